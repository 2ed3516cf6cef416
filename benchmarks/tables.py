"""Tables rendered from JSON: a run's summary for the terminal and Markdown, and the results of studies in documents.

    python -m benchmarks.tables --summary runs/digits/summary.json
    python -m benchmarks.tables [--check] [--results benchmarks/results] README.md ...

Between ``<!-- results:<name> -->`` and ``<!-- /results -->`` a document holds the table of ``<name>.jsonl``, a study,
or of ``<name>.json``: a summary, or what ``benchmarks.overhead``, ``.distillation``, ``.ppt``, ``.noise``,
``.questions`` or ``.paired`` found. Of a study, ``<!-- results:<name> against <method> of <dataset> -->`` gives the
paired differences to that method, and the rows of that dataset alone; ``on validation`` before them gives the scores on
that split, and ``with <method>; <method>`` behind them the rows of those methods alone, without the sentences of their
protocols that begin with the name of another. All parts may be left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.formats import TableError, count, markdown, ms, score, scored, share, size, times, titled
from benchmarks.study_tables import SENTENCE, TEST, errors, paired_table, read_results, study_table
from toolchain.faults import allowed
from toolchain.stage import console, guard

RESULTS = Path(__file__).parent / "results"
NOISY = 0.25  # a training benchmark whose rounds differ by more is marked
LEAST_WIDTH = 100  # a cut column says nothing; a terminal that is narrower wraps
MARKED = re.compile(
    r"(<!-- results:(?P<study>[\w.-]+)(?: on (?P<split>validation))?(?: against (?P<base>[^>]+?))?"
    r"(?: of (?P<dataset>[\w.-]+))?(?: with (?P<methods>[^>]+?))? -->\n)"
    r"(?P<body>.*?)(<!-- /results -->)",
    re.DOTALL,
)
COLUMNS = ("row", "params", "size", "score", "change", "agreement", "p50 ms", "speed-up")
NUMERIC = COLUMNS[1:]


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
                scored(found, metric),
                scored(found - before, metric, signed=True) if found is not None and before is not None else "–",
                share((row.get("agreement") or {}).get("student")),
                ms(mine) + (" ~" if summary.get("noisy") else ""),
                times(slowest / mine if slowest and mine else None),
            ]
        )
    return table


def header(value: Mapping[str, Any]) -> list[str]:
    metric = value.get("metric")
    names = {"score": titled(metric)} if metric else {}
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
    metric = value.get("metric") or {}
    if not metric.get("higher_is_better", True):
        text.append(f"{metric['name']}: less is better, so a change above 0 is a loss.")
    if note := metric.get("note"):
        text.append(note)
    return text


def reasons(value: Mapping[str, Any]) -> list[str]:
    """Why rows are missing; rows of one reason together."""
    names: dict[str, list[str]] = {}
    for row in value["rows"]:
        if row["status"] != "ok":
            names.setdefault(f"{row['status']}: {' '.join(str(row['reason']).split())}", []).append(row["name"])
    return [f"{', '.join(found)} {why}" for why, found in names.items()]


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


def changed(after: float | None, before: float | None, metric: Mapping[str, Any]) -> str:
    return "–" if after is None or before is None else scored(after - before, metric, signed=True)


def steps_table(made: Sequence[Mapping[str, Any]], metric: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What became of a teacher on its way to the student, see ``benchmarks.report.steps``: title and rows."""
    before = [None, *(one["score"] for one in made)]
    body = [
        [one["what"], count(one["parameters"]), scored(one["score"], metric), changed(one["score"], last, metric)]
        for one, last in zip(made, before, strict=False)
    ]
    return ["step", "params", f"{titled(metric)}, validation", "change"], body


# --- documents


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
    if "training" in value and "inference" in value:
        return _ppt_tables(value)
    if "noise" in value:
        return _noise_table(value)
    if "answers" in value:
        return _answers_table(value)
    if "comparisons" in value:
        return paired_table(value["comparisons"], value["against"])
    if "rows" in value:
        parts = [summary_markdown(value), " ".join(notes(value)), *(f"\n{why}." for why in reasons(value))]
        if made := value.get("steps"):
            title, body = steps_table(made, value["metric"])
            parts.append(f"\n{markdown(title, body, right=title[1:])}".rstrip())
        return "\n".join([*parts, ""])
    raise TableError(
        f"{what}: neither a summary nor of benchmarks.overhead, .distillation, .ppt, .noise, .questions or .paired"
    )


def _answers_table(value: Mapping[str, Any]) -> str:
    first, *_ = value["answers"]
    best = first["scores"]["gxlt_f1"]
    title = ["folder", "graph", "G-XLT F1", "of the first", "XLT F1", "F1, languages not trained on"]
    timed = [key for key in ("latency", "latency_apart") if any(row.get(key) for row in value["answers"])]
    for key in timed:
        title += [f"{what}, cores apart" if key == "latency_apart" else what for what in ("p50 ms", "speed-up")]
    if fastest := first.get("least_p50_ms"):
        title += ["least p50 ms", "speed-up"]
    body = []
    for row in value["answers"]:
        found = row["scores"]
        scores = [score(found.get(name)) for name in ("gxlt_f1", "xlt_f1", "unseen_f1")]
        scores.insert(1, share(found["gxlt_f1"] / best if best else None))
        body.append([row["folder"], size(row["bytes"]), *scores])
        for key in timed:
            mine, slowest = (((one.get(key) or {}).get("p50") or {}).get("ms") for one in (row, first))
            noise = " ~" if row.get(key) and row[key]["noisy"] else ""
            body[-1] += [ms(mine) + noise, times(slowest / mine if mine and slowest else None)]
        if fastest:
            body[-1] += [ms(row["least_p50_ms"]), times(fastest / row["least_p50_ms"])]
    note = f"Text to answer through `load_qa`, {value['questions']} questions"
    summaries = [row[key] for row in value["answers"] for key in timed if row.get(key)]
    if summaries:
        rounds = sorted({summary["rounds"] for summary in summaries})
        note += (
            f"; p50 of one at a time, in the languages trained on, {' and '.join(map(str, rounds))} interleaved rounds"
        )
    note += f", {value['threads']} threads, {device(value['environment'])}."
    if "latency_apart" in timed:
        note += " Cores apart: while the two cores shared no cache, which happens to a virtual machine."
    if any(summary["noisy"] for summary in summaries):
        note += " ~ noisy: medians of the rounds lie more than 5 % apart."
    if fastest:
        note += " Least: of each question the fastest of the rounds, which other work on the machine disturbs least."
    return f"{markdown(title, body, right=title[1:])}\n{note}\n"


def _ppt_tables(value: Mapping[str, Any]) -> str:
    plan, noisy = value["plan"], False

    def marked(text: str, row: Mapping[str, Any]) -> str:
        nonlocal noisy
        noisy |= row["spread"] > NOISY
        return f"{text} ~" if row["spread"] > NOISY else text

    title = ["a step of task III", "", "samples/s", "speed-up", "multiply-adds a sample"]
    body = [
        [
            *(row["network"], row["way"], marked(f"{row['samples_per_second']:.0f}", row)),
            *(times(row["speed_up"]), count(row["multiply_adds_per_sample"])),
        ]
        for row in value["training"]
    ]
    text = markdown(title, body, right=title[2:])
    crowds = [f"p50 ms, {n} pedestrian{'s' * (n > 1)}" for n in plan["pedestrians"]]
    title = ["prediction", "", "parameters", "multiply-adds", *crowds]
    body = [
        [
            *(row["network"], row["runtime"], count(row["parameters"]), count(row["multiply_adds"])),
            *(marked(ms(one["p50_ms"]), one) for one in row["pedestrians"].values()),
        ]
        for row in value["inference"]
    ]
    text += "\n" + markdown(title, body, right=title[2:])
    where, threads = value["environment"], value["environment"]["threads"]
    note = (
        f"Medians of {plan['rounds']} interleaved rounds, {threads} threads, {device(where)}; batches of "
        f"{plan['batch']} samples; fresh weights, on which speed does not depend. Multiply-adds: forward and backward "
        "for a step, of one pedestrian for a prediction."
    )
    if noisy:
        note += f" ~ noisy: rounds lie more than {NOISY:.0%} apart."
    return f"{text}\n{note}\n"


def _noise_table(value: Mapping[str, Any]) -> str:
    unit = value["unit"]
    title = ["graph", *(f"{deviation:g} {unit}" for deviation in value["deviations"])]
    body = [[row["graph"], *(_both_errors(one) for one in row["scores"])] for row in value["noise"]]
    note = (
        f"minADE/minFDE in {unit}; less is better. Normal noise of that standard deviation on each observed position, "
        f"none on the {value['windows']} futures scored against ({', '.join(value['recordings'])})."
    )
    return f"{markdown(title, body, right=title[1:])}\n{note}\n"


def _both_errors(scores: Mapping[str, float | None]) -> str:
    found = [value for name in ("minADE", "minFDE") if (value := scores[name]) is not None]
    return errors(found) if len(found) == 2 else "–"


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
            rows = read_results(results / f"{match['study']}.jsonl")
            if match["methods"]:
                rows = _of_methods(rows, match["methods"].split("; "), what)
            rows = [row for row in rows if match["dataset"] in (None, row["dataset"])]
            table = study_table(rows, match["base"], match["split"] or TEST)
        return f"{match[1]}\n{table}\n<!-- /results -->"

    return MARKED.sub(replaced, text)


def _of_methods(rows: list[dict[str, Any]], wanted: Sequence[str], what: str) -> list[dict[str, Any]]:
    """The rows of ``wanted``, and of their protocols not the sentences "Name: ..." that are of others' names alone."""
    known = list(dict.fromkeys(row["method"] for row in rows))
    if unknown := [name for name in wanted if name not in known]:
        raise TableError(f"{what}: with {unknown[0]}: no such method; {allowed(unknown[0], known)}")

    def concerns(sentence: str) -> bool:
        label = sentence.partition(":")[0].lower()
        named = [name for name in known if label in name.lower()]
        return not named or not set(wanted).isdisjoint(named)

    def told(row: dict[str, Any]) -> str:
        return " ".join(filter(concerns, SENTENCE.split(str(row.get("protocol", "")).strip())))

    return [row | {"protocol": told(row)} for row in rows if row["method"] in wanted]


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
            try:
                value = json.loads(arguments.summary.read_text(encoding="utf-8"))
            except ValueError as error:
                raise TableError(f"{arguments.summary}: not readable as JSON ({error}); make it again") from error
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
