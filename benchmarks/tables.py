"""Tables rendered from JSON: a run's summary for the terminal and Markdown, and the results of studies in documents.

    python -m benchmarks.tables --summary runs/digits/summary.json
    python -m benchmarks.tables [--check] [--results benchmarks/results] README.md ...

Between ``<!-- results:<name> -->`` and ``<!-- /results -->`` a document holds the table of ``<name>.jsonl``, a study,
or of ``<name>.json``: a run's summary, or what ``benchmarks.overhead`` or ``benchmarks.distillation`` measured.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from toolchain.artifact import EdgestillError
from toolchain.stage import console, guard

RESULTS = Path(__file__).parent / "results"
BASELINES = ("plain", "ce")  # a study's methods are compared with the first of these that it has
NOISY = 0.25  # a training benchmark whose rounds differ by more is marked
LEAST_WIDTH = 100  # a cut column says nothing; a terminal that is narrower wraps
MARKED = re.compile(r"(<!-- results:(?P<study>[\w.-]+) -->\n)(?P<body>.*?)(<!-- /results -->)", re.DOTALL)
# Student's t, 0.975 quantile, 1 to 30 degrees of freedom.
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

COLUMNS = ("row", "params", "size", "score", "change", "agreement", "p50 ms", "speed-up")
NUMERIC = COLUMNS[1:]


class TableError(EdgestillError):
    """A results file or a document's markers are wrong, or a table is out of date."""


# --- formats shared by terminal, Markdown and HTML


def count(value: int | None) -> str:
    if value is None:
        return "–"
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}" if value < 1000 * limit else f"{value / limit:,.0f} {unit}"
    return str(value)


def size(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def ms(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "–"
    return (
        f"{value:.0f}" if value >= 100 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
    )


def score(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return text.replace("-", "−") if float(text) else "0.00"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> str:
    """A Markdown table; columns named in ``right`` are right-aligned."""
    right = set(right)
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("--:" if h in right else "---" for h in header) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# --- a run


def p50(row: Mapping[str, Any], batch: int | str = 1) -> float | None:
    found = (row.get("latency") or {}).get(str(batch), {}).get("p50")
    return float(found["ms"]) if found else None


def headline(row: Mapping[str, Any], metric: Mapping[str, Any] | None) -> float | None:
    return (row.get("accuracy") or {}).get(metric["name"]) if metric else None


def of(rows: Sequence[Mapping[str, Any]], kind: str, precision: str = "fp32") -> Mapping[str, Any] | None:
    return next((row for row in rows if row["kind"] == kind and row["precision"] == precision), None)


def reference(rows: Sequence[Mapping[str, Any]], metric: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The row that the others' scores are compared with: the student in PyTorch, else its fp32 graph."""
    found = (of(rows, kind) for kind in ("student", "onnx"))
    return next((row for row in found if row is not None and headline(row, metric) is not None), None)


def first_batch(rows: Sequence[Mapping[str, Any]]) -> str:
    """The smallest batch measured: 1 wherever it was asked for."""
    found = {int(batch) for row in rows for batch in row.get("latency") or {}}
    return str(min(found, default=1))


def cells(value: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a bench.json or summary.json as text, in the order of COLUMNS.

    Change is against ``reference``, speed-up against row 0.
    """
    rows, metric = value["rows"], value.get("metric")
    batch = first_batch(rows)
    base = reference(rows, metric)
    before = headline(base, metric) if base else None
    slowest = p50(rows[0], batch) if rows else None
    table = []
    for row in rows:
        if row["status"] != "ok" and not row.get("accuracy"):
            table.append([row["name"], *["–"] * (len(NUMERIC) - 1), row["status"]])
            continue
        found, mine = headline(row, metric), p50(row, batch)
        summary = (row.get("latency") or {}).get(batch, {})
        table.append(
            [
                row["name"],
                count(row["parameters"]),
                size(row["bytes"]),
                score(found),
                score(found - before, signed=True) if found is not None and before is not None else "–",
                share((row.get("agreement") or {}).get("student")),
                ms(mine) + (" ~" if summary.get("noisy") else ""),
                times(slowest / mine if slowest and mine else None),
            ]
        )
    return table


def header(value: Mapping[str, Any]) -> list[str]:
    metric = value.get("metric")
    names = {"score": metric["name"] + (f" ({metric['unit']})" if metric["unit"] else "")} if metric else {}
    return [names.get(column, column) for column in COLUMNS]


def notes(value: Mapping[str, Any]) -> list[str]:
    """What the numbers of ``cells`` mean."""
    settings, batch = value.get("settings", {}), first_batch(value["rows"])
    base = reference(value["rows"], value.get("metric"))
    name = "the student in PyTorch" if base and base["kind"] == "student" else base and base["name"]
    text = [
        (
            f"Latency: batch {batch}, {settings.get('threads', '?')} threads, {device(value['environment'])}, numpy "
            f"to numpy. {f'Change and agreement: against {name}. ' if name else ''}Speed-up: against the first row."
        )
    ]
    if any((row.get("latency") or {}).get(batch, {}).get("noisy") for row in value["rows"]):
        text.append("~ noisy: medians of the rounds lie more than 5 % apart.")
    if note := (value.get("metric") or {}).get("note"):
        text.append(note)
    return text


def reasons(value: Mapping[str, Any]) -> list[str]:
    """Why rows are missing."""
    missing = [row for row in value["rows"] if row["status"] != "ok"]
    return [f"{row['name']} {row['status']}: {' '.join(str(row['reason']).split())}" for row in missing]


def device(environment: Mapping[str, Any]) -> str:
    cpu = environment.get("cpu") or {}
    names = [f"{cpu.get('model', 'CPU')} ({cpu.get('usable_cores', '?')} cores)"]
    return " + ".join([*names, *(gpu["name"] for gpu in environment.get("gpus") or [])])


def summary_table(value: Mapping[str, Any]) -> Table:
    """The table at the end of a run, from summary.json or bench.json."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, title in zip(COLUMNS, header(value), strict=True):
        table.add_column(title, justify="right" if name in NUMERIC else "left", no_wrap=True)
    best = (value.get("recommended") or {}).get("name")
    for row in cells(value):
        table.add_row(*row, style="bold green" if row[0] == best else "dim" if row[-2] == "–" else None)
    return table


def summary_markdown(value: Mapping[str, Any]) -> str:
    return markdown(header(value), cells(value), right=header(value)[1:])


# --- studies


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a study's results file. Raises TableError."""
    if not path.is_file():
        near = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl"))) or "none"
        raise TableError(f"{path}: no such results; studies there: {near}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            assert row["dataset"]
            assert row["method"]
            assert isinstance(row["metrics"], dict)
            assert row["metrics"]
            int(row["seed"])
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise TableError(
                f"{path}:{number}: expected a JSON object with dataset, method, seed and metrics; run the study again"
            ) from error
        rows.append(row)
    return rows


def mean_sd(values: Sequence[float], signed: bool = False) -> str:
    mean = score(statistics.fmean(values), signed)
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def paired(differences: Sequence[float]) -> str:
    """Mean ± sd of differences on the same seeds, with the 95 % interval of their mean by Student's t."""
    n = len(differences)
    if n < 2:
        return mean_sd(differences, signed=True)
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    half = (T975[n - 2] if n <= len(T975) + 1 else 1.96) * sd / math.sqrt(n)
    return f"{mean_sd(differences, signed=True)} [{score(mean - half, True)}, {score(mean + half, True)}]"


def study_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± sd over seeds of each (dataset, method), and the paired difference to the study's baseline.

    The headline metric is the first of a row's ``metrics``. A seed that was run twice counts once, as last written;
    rows of another config than the last one of their (dataset, method) do not count.
    """
    if not rows:
        return "No results yet.\n"
    groups: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    latest = {(row["dataset"], row["method"]): row.get("config_sha256") for row in rows}
    for row in rows:
        if row.get("config_sha256") != latest[row["dataset"], row["method"]]:
            continue
        groups.setdefault(row["dataset"], {}).setdefault(row["method"], {})[int(row["seed"])] = row
    body = []
    base = next((name for name in BASELINES if any(name in methods for methods in groups.values())), BASELINES[0])
    for dataset, methods in groups.items():
        metric = next(iter(rows_of(methods)[0]["metrics"]))
        plain = methods.get(base, {})
        for method in sorted(methods, key=lambda name: name != base):
            by_seed = methods[method]
            shared = sorted(set(by_seed) & set(plain)) if method != base else []
            differences = [by_seed[s]["metrics"][metric] - plain[s]["metrics"][metric] for s in shared]
            values = [by_seed[seed]["metrics"][metric] for seed in sorted(by_seed)]
            devices = ", ".join(dict.fromkeys(str(row.get("device", "–")) for row in by_seed.values()))
            change = paired(differences) if differences else "–"
            body.append([dataset, method, metric, mean_sd(values), change, str(len(values)), devices])
    title = ["dataset", "method", "metric", "mean ± sd", f"difference to {base} ± sd [95 %]", "seeds", "device"]
    return markdown(title, body, right=title[3:6])


def rows_of(methods: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    return [row for by_seed in methods.values() for row in by_seed.values()]


def measured_table(value: Mapping[str, Any], what: str) -> str:
    """The table of a single measurement. Raises TableError."""
    if "pair" in value:
        title = ["epoch of", "samples/s", "time of an epoch, plain = 1"]
        body = [_distillation_cells(name, row) for name, row in value["rows"].items()]
        where, threads = value["environment"], value["environment"]["threads"]
        note = f"Medians of {value['rounds']} interleaved rounds, {threads} threads, {device(where)}."
        if any(row.get("spread", 0) > NOISY for row in value["rows"].values()):
            note += f" ~ noisy: rounds lie more than {NOISY:.0%} apart."
        return f"{markdown(title, body, right=title[1:])}\n{note}\n"
    if "results" in value:
        title = ["model", "threads", "`session.run`, µs", "edgestill, µs", "ratio [95 %]"]
        body = [
            [row["model"], str(row["threads"]), f"{row['bare_p50_us']:.1f}", f"{row['ours_p50_us']:.1f}", _ratio(row)]
            for row in value["results"]
        ]
        return f"{markdown(title, body, right=title[1:])}\np50, batch 1, {device(value['environment'])}.\n"
    if "rows" in value:
        return summary_markdown(value)
    raise TableError(f"{what}: neither a summary nor a measurement of benchmarks.overhead or benchmarks.distillation")


def _distillation_cells(name: str, row: Mapping[str, Any]) -> list[str]:
    if "samples_per_second" not in row:
        return [name, "–", str(row["status"])]
    noisy = " ~" if row["spread"] > NOISY else ""
    return [name, f"{row['samples_per_second']:.0f}{noisy}", f"{row['epoch_time_vs_plain']:.2f}"]


def _ratio(row: Mapping[str, Any]) -> str:
    low, high = row["ratio_ci95"]
    return f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def render(text: str, results: Path, what: str) -> str:
    """``text`` with every marked table rendered anew. Raises TableError."""
    if text.count("<!-- results:") != len(MARKED.findall(text)):
        raise TableError(f"{what}: a `<!-- results:<study> -->` line has no `<!-- /results -->` after it; add one")

    def replaced(match: re.Match[str]) -> str:
        measured = results / f"{match['study']}.json"
        if measured.is_file():
            table = measured_table(json.loads(measured.read_text(encoding="utf-8")), str(measured))
        else:
            table = study_table(read_results(results / f"{match['study']}.jsonl"))
        return f"{match[1]}\n{table}\n{match[4]}"

    return MARKED.sub(replaced, text)


def update(paths: Sequence[Path], results: Path, check: bool) -> list[Path]:
    """Render the tables of ``paths``; returns those that were out of date. With ``check`` nothing is written."""
    stale = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if (new := render(text, results, str(path))) != text:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    return stale


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Render tables from results.")
    parser.add_argument("documents", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a table is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", type=Path, help="print the table of a summary.json or bench.json")
    arguments = parser.parse_args(argv)

    def act() -> None:
        if arguments.summary:
            value = json.loads(arguments.summary.read_text(encoding="utf-8"))
            console.width = max(console.width, LEAST_WIDTH)
            console.print(summary_table(value))
            for note in (*notes(value), *reasons(value)):
                console.print(note, style="dim", markup=False)
        stale = update(arguments.documents, arguments.results, arguments.check)
        if stale and arguments.check:
            names = " ".join(map(str, stale))
            raise TableError(f"{names}: tables differ from their results; run python -m benchmarks.tables {names}")

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
