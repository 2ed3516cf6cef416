"""What the verbs of ``edgestill`` do. Each works on folders and returns JSON values."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.markup import escape
from rich.table import Table

from toolchain import artifact, child, pipeline
from toolchain.artifact import EdgestillError, Manifest, UsageError
from toolchain.config import Config, Precision, apply_overrides, validate, validate_section, validates_on_test
from toolchain.config import load as load_config
from toolchain.faults import ConfigError, allowed
from toolchain.pipeline import Pipeline, human_bytes, lock, perform, resumable
from toolchain.section import Section
from toolchain.stage import Job, console
from toolchain.tasks import defaults_of, load_task

INCOMPLETE = 3
REPORT_FILES = ("report.html", "report.md", "summary.json")


def run(
    config: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    dry_run: bool = False,
    last: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Run a pipeline up to stage ``last`` (default: all of it)."""
    cfg = load_config(config, overrides)
    if validates_on_test(cfg):
        raise ConfigError(
            f"{config}: data.validation: found test, by which the test split selects the model; only a study labels "
            "what it finds so; remove the key, or write a study"
        )
    root = out or Path("runs") / cfg.name
    work = Pipeline(cfg, root)
    if dry_run:
        return _dry_run(work)
    verb = "distill" if last else "run"
    command = ["edgestill", verb, str(config), *overrides, *(["--out", str(out)] if out else [])]
    with resumable(command):
        outcome = work.run(last)
    if last:
        folder = root / last
        console.print(f"next: {shlex.join(['edgestill', 'export', str(folder)])}", markup=False)
        return outcome.as_dict() | {"student": describe(folder)}
    publish(root)
    measured = failures(bench_result(root / "bench")["rows"])
    old = measured.keys() - outcome.failed.keys() if "bench" in outcome.reused else ()
    outcome.failed.update(measured)
    result = outcome.as_dict() | {"report": str(root / "report.html"), "summary": _read_json(root / "summary.json")}
    if show:
        show_summary(root)
        if not outcome.made and not outcome.failed:
            console.print("already complete: every stage was reused")
    for name, reason in outcome.failed.items():
        console.print(f"{name}: {reason}", style="yellow", markup=False)
    if old:
        console.print(f"measured by an earlier run; to measure again, remove {root / 'bench'}", markup=False)
    return result


def publish(root: Path) -> None:
    """Copy the report out of its artifact, to the top of the run's folder."""
    for name in REPORT_FILES:
        target = root / name
        temporary = target.with_name(f".{name}.tmp")
        temporary.write_bytes((root / "report" / name).read_bytes())
        temporary.replace(target)


def show_summary(root: Path) -> None:
    _show_table(root / "summary.json")
    console.print(f"report: {root / 'report.html'}", markup=False, style="bold")
    best = _read_json(root / "summary.json").get("recommended")
    if best:
        console.print(f"next:   ship {root / best['name']}", markup=False)


def _show_table(path: Path) -> None:
    """The table is drawn by the benchmarks package, in its own process: the core imports neither of the others."""
    if code := subprocess.run(child.command("benchmarks.tables", "--summary", str(path)), check=False).returncode:
        raise EdgestillError(f"{path}: its table could not be shown (benchmarks.tables ended with exit code {code})")


def _dry_run(work: Pipeline) -> dict[str, Any]:
    stages = [*work.stages, *pipeline.measure(work.cfg, work.stages, {})]
    if faults := pipeline.missing_packages(stages):
        raise EdgestillError("this pipeline cannot run here:\n" + "\n".join(f"  {fault}" for fault in faults))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dry.json"
        path.write_text(json.dumps(work.cfg.model_dump(mode="json")), encoding="utf-8")
        reply = subprocess.run(child.command("toolchain.dryrun", str(path)), stdout=subprocess.PIPE, check=False)
    if reply.returncode:
        raise EdgestillError("the dry run failed; nothing was trained")
    checked = json.loads(reply.stdout)
    table = Table("stage", "state", box=None, pad_edge=False)
    states: dict[str, str] = {}
    for stage in stages:
        first = next((name for name in stage.inputs.values() if states.get(name) != "fresh"), None)
        states[stage.name] = work.stale(stage) or (f"to be checked after {first}" if first else "fresh")
        table.add_row(stage.name, escape(states[stage.name]))
    console.print(table)
    console.print(f"dry run: all is well with {work.cfg.name}; nothing was trained", style="green")
    return {"stages": states, "checked": checked}


def export(student: Path, precision: str, overrides: Sequence[str], out: Path | None, data: Path | None) -> Path:
    """Make ``onnx`` (and from it ``onnx-<precision>``) beside the student, or at ``out``."""
    if precision not in get_args(Precision):
        raise UsageError(f"--precision {precision}: {allowed(precision, get_args(Precision))}")
    manifest = artifact.read(student)
    if manifest.stage not in ("student", "teacher"):
        raise UsageError(f"{student}: expected a student folder, found a folder of stage {manifest.stage}")
    data = _beside(student, data, "data")
    task = manifest.config["task"]
    _refuse_precisions("export", overrides, "give --precision")
    settings = _settings(student.parent, "export", task, overrides, manifest.config.get("data"))
    base = "onnx-teacher" if manifest.stage == "teacher" else "onnx"
    fp32 = student.parent / base if precision != "fp32" or out is None else out
    exact = {key: settings[key] for key in ("opset", "parity")}
    config = {"task": task, "which": manifest.stage, "export": exact}
    _make("export.onnx", Job(base, fp32, config, {"model": student, "data": data}))
    folder = fp32
    if precision != "fp32":
        folder = out or student.parent / f"{base}-{precision}"
        rest = {key: value for key, value in settings.items() if key != "precisions"}
        config = {"task": task, "precision": precision, "export": rest}
        _make("export.precision", Job(f"{base}-{precision}", folder, config, {"onnx": fp32, "data": data}))
    place = shlex.quote(str(folder))
    bench = f"edgestill bench {place}"
    console.print(
        f"next: {bench}" if precision == "int8-cpu" else f"next: edgestill compile {place}\n  or: {bench}",
        markup=False,
    )
    return folder


def compile(
    onnx: Path, target: str | None, backend: str | None, overrides: Sequence[str], out: Path | None
) -> list[Path]:
    """Build an engine per target beside the ONNX folder, or under ``out``."""
    manifest = artifact.read(onnx)
    if "model.onnx" not in manifest.files:
        raise UsageError(f"{onnx}: expected an ONNX folder, found a folder of stage {manifest.stage}")
    _refuse_precisions("compile", overrides, "it is the ONNX folder's")
    root = onnx.resolve().parent
    chosen = any(override.partition("=")[0].removeprefix("compile.") == "targets" for override in overrides)
    if target is None and not chosen and not (root / "config.json").is_file():
        target = _capability_here()
    if target is not None:
        overrides = [*overrides, f"targets={json.dumps([name.strip() for name in target.split(',')])}"]
    if backend is not None:
        overrides = [*overrides, f"backend={backend}"]
    settings = _settings(root, "compile", _task_of(manifest), overrides)
    if settings["backend"] == "none":
        raise UsageError("compile.backend none: nothing to do; give --backend auto, tensorrt or tensorrt-rtx")
    targets = settings.pop("targets")
    settings.pop("precisions")
    precision = manifest.extra["precision"]
    folders = []
    for name in targets:
        folder = (out or onnx.parent) / f"engine-{name}-{precision}"
        config = {"compile": settings, "targets": [name]}
        _make("export.engine", Job(folder.name, folder, config, {"onnx": onnx}))
        folders.append(folder)
    console.print(f"next: {shlex.join(['edgestill', 'bench', *map(str, [onnx, *folders])])}", markup=False)
    return folders


def bench(folders: Sequence[Path], overrides: Sequence[str], out: Path, data: Path | None, *, show: bool) -> Path:
    """Measure folders side by side."""
    inputs: dict[str, Path] = {}
    task = None
    for folder in folders:
        manifest = artifact.read(folder)
        task = task or _task_of(manifest)
        role = folder.resolve().name
        if role in inputs:
            role = f"{folder.resolve().parent.name}-{role}"
        inputs[role] = folder
    beside = data or folders[0].resolve().parent / "data"
    if data or artifact.is_whole(beside):
        inputs["data"] = beside
    else:
        console.print("no data artifact at hand (--data DIR): latency only, no accuracy", style="yellow")
    settings = _settings(folders[0].resolve().parent, "bench", task, overrides)
    job = Job("bench", out, {"task": task, "bench": settings, "failed": {}}, inputs)
    perform("benchmarks.bench", job)
    if show:
        _show_table(out / "bench.json")
    return out


def failures(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Why rows of a bench have no numbers; a model whose device is not here (``not run``) is no failure."""
    return {row["name"]: row["reason"] for row in rows if row["status"] not in ("ok", "not run")}


def bench_result(folder: Path) -> Any:
    return _read_json(folder / "bench.json")


def report(root: Path, *, show: bool) -> dict[str, Any]:
    """Render the report of a run again from its measurements."""
    cfg = _run_config(root)
    if cfg is None:
        raise UsageError(f"{root}: expected the folder of a run, found no config.json in it")
    if not artifact.is_whole(root / "bench"):
        raise UsageError(f"{root}: nothing was measured there yet; let edgestill run finish first")
    bench_manifest = artifact.read(root / "bench")
    closing = pipeline.measure(cfg, pipeline.plan(cfg), bench_manifest.config.get("failed", {}))
    stage = closing[-1]
    with lock(root):
        perform(stage.module, Pipeline(cfg, root).job(stage))
        publish(root)
    if show:
        show_summary(root)
    return {"report": str(root / "report.html"), "summary": _read_json(root / "summary.json")}


def inspect(target: Path) -> dict[str, Any]:
    """An artifact's manifest in short; for a config, the teacher's hookable layers."""
    if target.is_file():
        cfg = load_config(target)
        task = load_task(cfg.task)
        if cfg.teacher is None or not hasattr(task, "hookable"):
            raise UsageError(f"{target}: this config has no teacher whose layers could be listed")
        layers = [{"name": n, "type": t, "shape": list(s)} for n, t, s in task.hookable(cfg)]
        return {"teacher": cfg.teacher.model, "layers": layers}
    if not artifact.is_whole(target) and (target / "config.json").is_file():
        folders = ", ".join(path.parent.name for path in sorted(target.glob(f"*/{artifact.MANIFEST}")))
        raise UsageError(
            f"{target}: the folder of a run; inspect one of its artifacts: {folders or 'none is there yet'}"
        )
    return describe(target)


def describe(folder: Path) -> dict[str, Any]:
    """What ``folder`` holds and what it was made of, down to the data."""
    manifest = artifact.verify(folder)
    keys = ("stage", "ports", "metrics", "versions", "seconds", "created", "host", "extra", "files")
    value = {key: getattr(manifest, key) for key in keys}
    bytes_ = sum(entry["bytes"] for entry in manifest.files.values())
    return {"folder": str(folder), "id": manifest.id, "bytes": bytes_, **value, "lineage": lineage(folder, manifest)}


def lineage(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Every artifact this one was made of, nearest first, and whether it is still the one that was used."""
    found: dict[str, dict[str, Any]] = {}
    queue = [(folder, manifest)]
    while queue:
        place, current = queue.pop(0)
        for role, entry in current.parents.items():
            if entry["id"] in found:
                continue
            recorded = Path(entry["path"])
            path, state = recorded, "absent"
            beside = [place.parent / recorded.name] if role in current.inputs else []  # in a copied run
            for candidate in (recorded, *beside):
                if state != "unchanged" and artifact.is_whole(candidate):
                    path, parent = candidate, artifact.read(candidate)
                    state = "unchanged" if parent.id == entry["id"] else "changed since"
            if state != "absent":
                queue.append((path, parent))
            found[entry["id"]] = {"role": role, "path": str(path), "id": entry["id"], "state": state}
    return list(found.values())


def show_inspection(value: Mapping[str, Any]) -> None:
    if "layers" in value:
        table = Table("layer", "type", "output shape", title=f"hookable layers of {value['teacher']}")
        for layer in value["layers"]:
            table.add_row(layer["name"], layer["type"], " x ".join(map(str, layer["shape"])))
        console.print(table)
        return
    console.print(
        f"[bold]{escape(value['folder'])}[/]  stage {value['stage']}  {human_bytes(value['bytes'])}  {value['id'][:12]}"
    )
    if value["extra"].get("parameters"):
        console.print(f"parameters {value['extra']['parameters']:,}")
    for side in ("inputs", "outputs"):
        for port in value["ports"].get(side, []):
            shape = ", ".join(map(str, port["shape"]))
            text = f"{side[:-1]:<7} {port['name']}: {port['dtype']} ({shape})  {port['meaning']} {port['unit']}"
            console.print(text.rstrip(), markup=False)
    for name, entry in value["files"].items():
        console.print(f"file    {name}  {human_bytes(entry['bytes'])}  {entry['sha256'][:12]}", markup=False)
    for name, metric in value["metrics"].items():
        console.print(f"metric  {name}: {metric}", markup=False)
    for parent in value["lineage"]:
        console.print(
            f"made of {parent['role']} {parent['id'][:12]} ({parent['state']})  {parent['path']}", markup=False
        )


def doctor(*, show: bool) -> list[dict[str, Any]]:
    from toolchain.doctor import examine

    checks = [asdict(check) for check in examine()]
    if show:
        table = Table("", "what", "found", "remedy", box=None, pad_edge=False)
        for check in checks:
            mark = "[green]ok[/]" if check["ok"] else "[yellow]no[/]"
            table.add_row(mark, f"{check['group']} {check['name']}", escape(check["detail"]), escape(check["remedy"]))
        console.print(table)
    return checks


def study(config: Path, overrides: Sequence[str], out: Path, work: Path, *, dry_run: bool, jobs: int) -> dict[str, Any]:
    from toolchain import study as studies

    return studies.run(config, overrides, out, work, dry_run=dry_run, jobs=jobs)


def _make(module: str, job: Job) -> None:
    reason = artifact.stale_reason(job.out, stage=job.stage, config=job.config, inputs=job.inputs)
    if reason is None:
        artifact.verify(job.out)
        console.print(f"{job.out} reused", style="dim", markup=False)
        return
    root = job.out.resolve().parent
    with lock(root) if (root / "config.json").is_file() else nullcontext(), resumable(["edgestill", *sys.argv[1:]]):
        perform(module, job)


def _beside(folder: Path, given: Path | None, name: str) -> Path:
    path = given or folder.parent / name
    if not artifact.is_whole(path):
        raise UsageError(f"{path}: no {name} artifact there; give its folder with --{name} DIR")
    return path


def _run_config(root: Path) -> Config | None:
    path = root / "config.json"
    if not path.is_file():
        return None
    return validate(_read_json(path), source=str(path))


def _task_of(manifest: Manifest) -> str | None:
    return manifest.config.get("task") or manifest.extra.get("task")


def _refuse_precisions(key: str, overrides: Sequence[str], remedy: str) -> None:
    if found := [o for o in overrides if o.partition("=")[0].removeprefix(f"{key}.") == "precisions"]:
        raise UsageError(f"--set {found[0]}: one precision is made here; {remedy}")


def _settings(
    root: Path, key: str, task: str | None, overrides: Sequence[str], data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A section of the run's config, or outside a run what ``task`` has for it by default; then ``overrides``."""
    cfg = _run_config(root)
    section = Config.model_fields[key].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    own = getattr(cfg, key, None)
    found = validate_section(section, _defaults(task, data).get(key, {}), key) if own is None else own
    settings = {key: found.model_dump(mode="json")}
    apply_overrides(settings, [o if o.startswith(f"{key}.") else f"{key}.{o}" for o in overrides])
    return validate_section(section, settings[key], key).model_dump(mode="json")


def _defaults(task: str | None, data: Mapping[str, Any] | None) -> Mapping[str, Any]:
    try:
        return defaults_of(load_task(task), data) if task else {}
    except EdgestillError as error:  # a person's own task, which a device that compiles may lack
        console.print(f"{error}; its defaults do not count here, set them with --set", style="yellow", markup=False)
        return {}


def _capability_here() -> str | None:
    """Of the first GPU, asked for in a process: no CUDA in this one."""
    reply = subprocess.run(child.command("export.engine", "--device"), stdout=subprocess.PIPE, text=True, check=False)
    return reply.stdout.strip() or None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EdgestillError(f"{path}: not readable as JSON ({error}); run the stage that makes it again") from error
