"""The tables of studies, from a results file of a row per run."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.formats import TableError, count, markdown, score

BASELINES = ("plain", "ce")  # a study's methods are compared with the first of these that it has
REFERENCES = Path(__file__).parent / "results" / "references" / "ppt_eth_ucy.json"
AVG = "avg"
QUESTIONS = {
    "gxlt_em": "G-XLT EM",
    "xlt_f1": "XLT F1",
    "gxlt_off_f1": "G-XLT F1 off the diagonal",
    "unseen_f1": "F1, languages not trained on",
    "tydiqa_f1": "TyDiQA F1",
}
# What metrics begin with that are not the student's on the test split.
TEST_SELECTED, VALIDATED, TEACHER = "test_selected_", "val_", "teacher_"
TEST = "test"
PAIRED_NOTE = (
    "F1 in percent. One question is one sample: its translations, and the seeds, are averaged first. Interval and p: "
    "bootstrap over questions; Wilcoxon's signed-rank test beside it. Questions of one article count as independent, "
    "which they are not: the intervals are of other questions, not of other articles. The study's table averages over "
    "language pairs or languages, this one over questions: the two differ where languages have different questions "
    "(TyDiQA, MLQA)."
)
SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z(])")
Methods = Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]  # dataset -> method -> seed -> row
Pair = tuple[float, float]
# Student's t, 0.975 quantile, 1 to 30 degrees of freedom.
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


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
    mean = score(statistics.fmean(values), signed=signed)
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def paired(differences: Sequence[float]) -> str:
    """Mean ± sd of differences on the same seeds, with the 95 % interval of their mean by Student's t."""
    n = len(differences)
    if n < 2:
        return mean_sd(differences, signed=True)
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    half = (T975[n - 2] if n <= len(T975) + 1 else 1.96) * sd / math.sqrt(n)
    return f"{mean_sd(differences, signed=True)} [{score(mean - half, signed=True)}, {score(mean + half, signed=True)}]"


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, Mapping[str, Any]]]]:
    """Rows by dataset, method and seed.

    A seed that was run twice counts once, as last written; rows of another config than the last one of their (dataset,
    method) do not count.
    """
    groups: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    latest = {(row["dataset"], row["method"]): row.get("config_sha256") for row in rows}
    for row in rows:
        if row.get("config_sha256") == latest[row["dataset"], row["method"]]:
            groups.setdefault(row["dataset"], {}).setdefault(row["method"], {})[int(row["seed"])] = row
    return groups


def study_table(rows: Sequence[Mapping[str, Any]], against: str | None = None, split: str = TEST) -> str:
    """Mean ± sd over seeds of each (dataset, method), and the paired difference to the method ``against``, or else to
    the study's baseline, on a split. Raises TableError.

    The headline metric is the first of a row's ``metrics``, more is better: the best method stands first. For
    trajectories see ``trajectory_tables``; questions have a column per average.
    """
    if split != TEST:
        rows = [{**row, "metrics": on_validation(row["metrics"])} for row in rows]
        rows = [row for row in rows if row["metrics"]]
    if not rows:
        return "No results yet.\n"
    groups = grouped(rows)
    if all({"minADE", f"{TEST_SELECTED}minADE"}.intersection(row["metrics"]) for row in rows):
        return trajectory_tables(groups, split)
    body = []
    known = list(dict.fromkeys(name for methods in groups.values() for name in methods))
    if against is not None and against not in known:
        raise TableError(f"against {against}: no such method among {', '.join(known)}")
    base = against or next((name for name in BASELINES if name in known), BASELINES[0])
    more = {name: title for name, title in QUESTIONS.items() if all(name in row["metrics"] for row in rows)}
    for dataset, methods in groups.items():
        metric = next(iter(rows_of(methods)[0]["metrics"]))
        score_of = {
            method: {seed: float(row["metrics"][metric]) for seed, row in sorted(by_seed.items())}
            for method, by_seed in methods.items()
        }
        for method in sorted(methods, key=lambda name: -statistics.fmean(score_of[name].values())):
            mine, other = score_of[method], score_of.get(base, {})
            shared = sorted(set(mine) & set(other)) if method != base else []
            change = paired([mine[seed] - other[seed] for seed in shared]) if shared else "–"
            parameters = {row.get("parameters") for row in methods[method].values()}
            size = " or ".join(count(value) for value in sorted(parameters, key=str))
            others = [mean_sd([float(row["metrics"][name]) for row in methods[method].values()]) for name in more]
            named = metric if split == TEST else f"{metric}, {split}"
            body.append([dataset, method, size, named, mean_sd(list(mine.values())), change, *others, str(len(mine))])
    change = f"difference to {base} ± sd [95 %]"
    title = ["dataset", "method", "params", "metric", "mean ± sd", change, *more.values(), "seeds"]
    return f"{markdown(title, body, right=[title[2], *title[4:]])}\n{_made_on(groups)}"


def on_validation(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(VALIDATED): value for name, value in metrics.items() if name.startswith(VALIDATED)}


def rows_of(methods: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    return [row for by_seed in methods.values() for row in by_seed.values()]


def paired_table(result: Mapping[str, Sequence[Mapping[str, Any]]], against: str) -> str:
    """What ``benchmarks.paired`` found, dataset -> comparisons."""
    title = ["dataset", "method", "part", f"difference to {against} [95 %]", "p bootstrap", "p Wilcoxon", "n", "seeds"]
    body = [
        [
            dataset,
            row["method"],
            row["part"],
            f"{score(row['mean'], signed=True)} [{score(row['low'], signed=True)}, {score(row['high'], signed=True)}]",
            f"{row['p']:.4f}",
            f"{row['p_wilcoxon']:.4f}",
            str(row["n"]),
            str(len(row["seeds"])),
        ]
        for dataset, rows in result.items()
        for row in rows
    ]
    return f"{markdown(title, body, right=title[3:])}\n{PAIRED_NOTE}\n"


# --- trajectories


def trajectory_tables(groups: Methods, split: str = TEST) -> str:
    """A row per method, a column per dataset: minADE/minFDE, then meanADE/meanFDE; on the test split with what is known
    of others.

    Cells are means over seeds. AVG is the plain mean of the five scenes of ETH/UCY, where a method has all of them. The
    sd over seeds stands at AVG, or at each cell where there is no AVG.
    """
    known = json.loads(REFERENCES.read_text(encoding="utf-8"))
    scenes = [scene for scene in known["columns"] if scene in groups]
    columns = [*scenes, *(dataset for dataset in groups if dataset not in scenes)]
    averaged = known["columns"] if scenes == known["columns"] else []
    title = ["method", *(name.upper() for name in columns), *(["AVG"] if averaged else []), "seeds"]
    references = [_reference_cells(row, columns, averaged) for row in known["rows"]] if scenes and split == TEST else []

    def rows(whose: str, *metrics: str) -> list[list[str]]:
        """Of the methods that have ``metrics``, which are ADE and FDE; ``whose`` they are stands behind the name."""
        found = [_method_cells(groups, method, columns, averaged, metrics) for method in _methods(groups)]
        return [[name + whose, *cells, seeds] for name, *cells, seeds in found if {*cells} != {"–"}]

    best, mean = rows("", "minADE", "minFDE"), rows("", "meanADE", "meanFDE")
    habit = rows(" (test-selected)", f"{TEST_SELECTED}minADE", f"{TEST_SELECTED}minFDE")
    taught = rows(" (its teacher)", f"{TEACHER}minADE", f"{TEACHER}minFDE")
    unit = "in metres" if scenes == columns else "in the unit of the data"
    parts = [
        markdown(title, [*references, *best, *taught, *habit], right=title[1:]),
        (
            f"minADE/minFDE on the {split} split, {unit}: least of the K paths, each for itself; less is better. Mean "
            f"over seeds, ± sd over seeds.{' AVG: plain mean of the five scenes.' if averaged else ''}\n"
        ),
    ]
    if habit or references:
        parts.append(
            "(test-selected): the epoch of the last training, with the official protocol of all of them, was chosen on "
            "the test split, as published numbers are; that flatters, and serves only to compare with them.\n"
        )
    if taught:
        parts.append("(its teacher): what taught the student, scored as the student is.\n")
    if references:
        sources = [f"{row['method']}: {row['source']}" for row in known["rows"]]
        parts.append(f"{'; '.join(sources)}.\n")
    if mean:
        parts += [markdown(title, mean, right=title[1:]), "meanADE/meanFDE: the mean over all K paths.\n"]
    return "\n".join([*parts, _made_on(groups)])


def _methods(groups: Methods) -> list[str]:
    return list(dict.fromkeys(method for methods in groups.values() for method in methods))


def _method_cells(
    groups: Methods, method: str, columns: Sequence[str], averaged: Sequence[str], metrics: Sequence[str]
) -> list[str]:
    values = {
        dataset: {
            seed: (row["metrics"][metrics[0]], row["metrics"][metrics[1]])
            for seed, row in groups[dataset].get(method, {}).items()
            if all(metric in row["metrics"] for metric in metrics)
        }
        for dataset in columns
    }
    whole = bool(averaged) and all(values[scene] for scene in averaged)
    cells = [_over_seeds(list(values[dataset].values()), spread=not whole) for dataset in columns]
    if averaged:
        cells.append(_average([values[scene] for scene in averaged]) if whole else "–")
    counts = sorted({len(by_seed) for by_seed in values.values() if by_seed})
    return [method, *cells, "–".join(dict.fromkeys(map(str, (counts[0], counts[-1])))) if counts else "–"]


def _average(scenes: Sequence[Mapping[int, Pair]]) -> str:
    """Plain mean of the scenes' means, ± sd of that mean over the seeds that all of them have."""
    means = [[statistics.fmean(found[i] for found in by_seed.values()) for by_seed in scenes] for i in (0, 1)]
    shared = set.intersection(*(set(by_seed) for by_seed in scenes))
    of_seed = [[statistics.fmean(by_seed[seed][i] for by_seed in scenes) for seed in sorted(shared)] for i in (0, 1)]
    text = errors(map(statistics.fmean, means))
    return text + _spread(of_seed) if len(shared) > 1 else text


def _over_seeds(pairs: Sequence[Pair], *, spread: bool) -> str:
    if not pairs:
        return "–"
    both = list(map(list, zip(*pairs, strict=True)))
    text = errors(map(statistics.fmean, both))
    return text + _spread(both) if spread and len(pairs) > 1 else text


def _spread(both: Sequence[Sequence[float]]) -> str:
    return f" ± {errors(map(statistics.stdev, both))}"


def errors(pair: Iterable[float], digits: int = 3) -> str:
    """``.174/.321``: ADE and FDE."""
    return "/".join(f"{value:.{digits}f}".removeprefix("0" if value < 1 else "") for value in pair)


def _reference_cells(row: Mapping[str, Any], columns: Sequence[str], averaged: Sequence[str]) -> list[str]:
    scores, digits = row["scores"], row["digits"]
    cells = [errors(scores[name], digits) if name in scores else "–" for name in columns]
    if averaged:
        mean = scores.get(AVG) or [statistics.fmean(scores[scene][i] for scene in averaged) for i in (0, 1)]
        cells.append(errors(mean, digits))
    return [row["method"], *cells, "–"]


def _made_on(groups: Methods) -> str:
    """The protocols, no sentence twice, and which methods ran on which device."""
    rows = [row for methods in groups.values() for row in rows_of(methods)]
    where: dict[str, dict[str, None]] = {}
    for row in rows:
        where.setdefault(str(row.get("device", "a device not recorded")), {})[row["method"]] = None
    told = [device if len(where) == 1 else f"{device} ({', '.join(methods)})" for device, methods in where.items()]
    sentences = [sentence for row in rows for sentence in SENTENCE.split(str(row.get("protocol", "")).strip())]
    return " ".join([*filter(None, dict.fromkeys(sentences)), f"Computed on {'; '.join(told)}."]) + "\n"
