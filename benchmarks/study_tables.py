"""The tables of studies, from a results file of a row per run."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.formats import TableError, markdown, score

BASELINE = "plain"
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


def study_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± sd over seeds of each (dataset, method), and the paired difference to the method ``plain``.

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
    for dataset, methods in groups.items():
        metric = next(iter(rows_of(methods)[0]["metrics"]))
        plain = methods.get(BASELINE, {})
        for method in sorted(methods, key=lambda name: name != BASELINE):
            by_seed = methods[method]
            shared = sorted(set(by_seed) & set(plain)) if method != BASELINE else []
            differences = [by_seed[s]["metrics"][metric] - plain[s]["metrics"][metric] for s in shared]
            values = [by_seed[seed]["metrics"][metric] for seed in sorted(by_seed)]
            devices = ", ".join(dict.fromkeys(str(row.get("device", "–")) for row in by_seed.values()))
            change = paired(differences) if differences else "–"
            body.append([dataset, method, metric, mean_sd(values), change, str(len(values)), devices])
    title = ["dataset", "method", "metric", "mean ± sd", f"difference to {BASELINE} ± sd [95 %]", "seeds", "device"]
    return markdown(title, body, right=title[3:6])


def rows_of(methods: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    return [row for by_seed in methods.values() for row in by_seed.values()]
