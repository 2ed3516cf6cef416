"""Are two methods of a study different? Paired tests over the samples that all of them were tested on.

    python -m benchmarks.paired runs/studies/qa_xquad/samples --against ce --out benchmarks/results/qa_xquad-paired.json

A study leaves ``<dataset>-<method>-<seed>.json`` there: {part: {sample: score}}. A sample's scores are averaged over
the seeds that both methods have; samples named ``<id>_<...>`` are translations of one question and count as one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.formats import markdown, score
from toolchain.artifact import EdgestillError, write_json
from toolchain.qa_metrics import bootstrap, paired, wilcoxon
from toolchain.stage import guard

NAME = re.compile(r"(?P<row>.+)-(?P<seed>\d+)")
NOTE = (
    "F1 in percent. One question is one sample: its translations, and the seeds, are averaged first. Interval and p: "
    "bootstrap over questions; Wilcoxon's signed-rank test beside it."
)
Scores = dict[int, dict[str, dict[str, float]]]  # seed -> part -> sample -> score


def read(folder: Path, against: str) -> dict[str, dict[str, Scores]]:
    """dataset -> method -> scores; what ends in ``-<against>`` names the datasets. Raises EdgestillError."""
    rows: dict[str, Scores] = {}
    for path in sorted(folder.glob("*.json")):
        if match := NAME.fullmatch(path.stem):
            rows.setdefault(match["row"], {})[int(match["seed"])] = json.loads(path.read_text(encoding="utf-8"))
    datasets = [row.removesuffix(f"-{against}") for row in rows if row.endswith(f"-{against}")]
    if not datasets:
        shown = ", ".join(rows) or "none"
        raise EdgestillError(
            f"{folder}: expected samples of a method {against}, found {shown}; run the study, or --against"
        )
    return {
        name: {row.removeprefix(f"{name}-"): found for row, found in rows.items() if row.startswith(f"{name}-")}
        for name in datasets
    }


def compare(methods: dict[str, Scores], against: str) -> list[dict[str, Any]]:
    """For every other method and part: the difference to ``against``, its 95 % interval, and two p values."""
    found = []
    for method, mine in methods.items():
        seeds = sorted(set(mine) & set(methods[against]))
        if method == against or not seeds:
            continue
        for part in mine[seeds[0]]:
            sides = [_mean([scores[seed][part] for seed in seeds]) for scores in (mine, methods[against])]
            a, b = paired(sides[0], sides[1], lambda name: name.partition("_")[0])
            told = {"method": method, "part": part, "seeds": seeds, **asdict(bootstrap(a, b))}
            found.append(told | {"p_wilcoxon": wilcoxon(a, b)[1]})
    return found


def _mean(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}


def table(result: dict[str, list[dict[str, Any]]], against: str) -> str:
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
    return markdown(title, body, right=title[3:])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paired", description="Paired tests of a study's methods."
    )
    parser.add_argument("samples", type=Path)
    parser.add_argument("--against", default="ce", help="the method that the others are compared with")
    parser.add_argument("--out", type=Path, help="write the comparisons as JSON")
    arguments = parser.parse_args(argv)

    def act() -> None:
        datasets = read(arguments.samples, arguments.against)
        result = {name: compare(methods, arguments.against) for name, methods in datasets.items()}
        print(table(result, arguments.against))
        if arguments.out:
            write_json(arguments.out, {"against": arguments.against, "comparisons": result})

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
