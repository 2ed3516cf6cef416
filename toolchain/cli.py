"""The ``edgestill`` command: parses and dispatches, nothing else. Heavy imports happen inside the verbs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="edgestill",
    help="Distil a large model into a small one, export it to ONNX, compile it with TensorRT, and measure it all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _folder(text: str) -> Path:
    if not text:
        raise typer.BadParameter("expected the name of a folder, found none (an unset variable?); name one")
    return Path(text)


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config of a pipeline.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.epochs=5.")
]
Out = Annotated[
    Path | None, typer.Option("--out", parser=_folder, metavar="FOLDER", help="Folder to write to.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check config, data, teacher taps and shapes; train nothing.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Data artifact; default: beside the given folder.")]


def _set(example: str) -> Any:
    return typer.Option("--set", metavar="KEY=VALUE", help=f"A setting, such as {example}.", show_default=False)


def _do(action: Callable[[], int | None], debug: bool = False) -> None:
    from toolchain.stage import guard

    if debug:
        os.environ["EDGESTILL_DEBUG"] = "1"
    if code := guard(action):
        raise typer.Exit(code)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Every stage of a config, skipping what is fresh: data, teacher, student, ONNX, engines, bench, report."""

    def action() -> int:
        from toolchain import commands

        result = commands.run(config, overrides or [], out, dry_run=dry_run, show=not json)
        if json:
            _print_json(result)
        return commands.INCOMPLETE if result.get("failed") else 0

    _do(action, debug)


@app.command()
def distill(
    config: ConfigFile, overrides: Overrides = None, out: Out = None, json: Json = False, debug: Debug = False
) -> None:
    """The stages up to the student."""

    def action() -> None:
        from toolchain import commands

        result = commands.run(config, overrides or [], out, last="student", show=not json)
        if json:
            _print_json(result)

    _do(action, debug)


@app.command()
def export(
    student: Annotated[Path, typer.Argument(metavar="STUDENT_DIR", help="Student folder.", show_default=False)],
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16, int8-cpu or int8-trt.")] = "fp32",
    overrides: Annotated[list[str] | None, _set("export.parity.samples=256")] = None,
    out: Out = None,
    data: DataFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A student folder becomes an ONNX folder, checked against the student on real samples."""

    def action() -> None:
        from toolchain import commands

        folder = commands.export(student, precision, overrides or [], out, data)
        if json:
            _print_json(commands.describe(folder))

    _do(action, debug)


@app.command(name="compile")
def compile_(
    onnx: Annotated[Path, typer.Argument(metavar="ONNX_DIR", help="ONNX folder.", show_default=False)],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="Compute capabilities: sm_86,sm_89. Default: the run's; outside a run the GPU's here, else sm_86.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", help="auto, tensorrt or tensorrt-rtx. Default: the run's, else auto.", show_default=False
        ),
    ] = None,
    overrides: Annotated[list[str] | None, _set("compile.batch.max=16")] = None,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """An ONNX folder becomes a TensorRT engine per target. Needs no torch."""

    def action() -> None:
        from toolchain import commands

        folders = commands.compile(onnx, target, backend, overrides or [], out)
        if json:
            _print_json([commands.describe(folder) for folder in folders])

    _do(action, debug)


@app.command()
def bench(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Artifact folders.", show_default=False)],
    overrides: Annotated[list[str] | None, _set("bench.threads=1")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")] = Path("bench"),
    data: DataFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure folders side by side: latency and memory, and accuracy where the data is at hand."""

    def action() -> int:
        from toolchain import commands

        result = commands.bench_result(commands.bench(folders, overrides or [], out, data, show=not json))
        if json:
            _print_json(result)
        return commands.INCOMPLETE if commands.failures(result["rows"]) else 0

    _do(action, debug)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Render report.html and report.md of a finished run again."""

    def action() -> None:
        from toolchain import commands

        result = commands.report(run_dir, show=not json)
        if json:
            _print_json(result)

    _do(action, debug)


@app.command()
def inspect(
    target: Annotated[
        Path, typer.Argument(metavar="DIR|CONFIG", help="Artifact folder, or a config for its teacher's layers.")
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What a folder holds: ports, lineage, parameters; or the hookable teacher layers of a config."""

    def action() -> None:
        from toolchain import commands

        result = commands.inspect(target)
        if json:
            _print_json(result)
        else:
            commands.show_inspection(result)

    _do(action, debug)


@app.command()
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Which runtimes, providers, builders and devices work here; for each that does not, why and what to install."""

    def action() -> None:
        from toolchain import commands

        checks = commands.doctor(show=not json)
        if json:
            _print_json(checks)

    _do(action, debug)


@app.command()
def study(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML config of a study.", show_default=False)],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the results file.")] = Path("benchmarks/results"),
    work: Annotated[Path, typer.Option("--work", help="Folder for caches.")] = Path("runs/studies"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every run's config; list what is left.")] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="So many datasets side by side; on a CPU set train.threads.")
    ] = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Method x dataset x seed: a JSON line per run; runs that are there are not run again."""

    def action() -> None:
        from toolchain import commands

        result = commands.study(config, overrides or [], out, work, dry_run=dry_run, jobs=jobs)
        if json:
            _print_json(result)

    _do(action, debug)
