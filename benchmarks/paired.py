"""Are two methods of a study different? Paired tests over the samples that all of them were tested on.

    python -m benchmarks.paired RESULTS.jsonl SAMPLES_FOLDER --against ce --out RESULTS-paired.json

The rows of the results file that its tables show say which samples to read: ``<dataset>-<method>-<seed>-<8 digits of
the config's digest>.json``, {part: {sample: score}}. A sample's scores are averaged over the seeds that both methods
have; samples named ``<id>_<question language>-<context language>`` are one question, translated, and count as one.
Of the part ``cells``, all language pairs, also ``xlt``, pairs of one language, and ``gxlt_off``, the others, are parts.
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

from benchmarks.study_tables import grouped, paired_table, read_results
from toolchain.artifact import EdgestillError, write_json
from toolchain.qa_metrics import bootstrap, paired, wilcoxon
from toolchain.stage import guard
from toolchain.study import run_name
from toolchain.tasks.qa_data import CELLS

PAIR = re.compile(r"_([a-z]{2,3})-([a-z]{2,3})$")  # of languages, at the end of a sample's name
Scores = dict[int, dict[str, dict[str, float]]]  # seed -> part -> sample -> score


def read(results: Path, samples: Path, against: str, only: str | None = None) -> dict[str, dict[str, Scores]]:
    """dataset -> method -> scores, of the datasets (or ``only`` this one) that have the method ``against``.

    Raises EdgestillError.
    """
    groups = grouped(read_results(results))
    if only is not None and only not in groups:
        raise EdgestillError(f"{results}: expected rows of dataset {only}, found {', '.join(groups) or 'none'}")
    groups = {dataset: methods for dataset, methods in groups.items() if only in (None, dataset)}
    if not any(against in methods for methods in groups.values()):
        shown = ", ".join(dict.fromkeys(method for methods in groups.values() for method in methods)) or "none"
        raise EdgestillError(f"{results}: expected rows of a method {against}, found {shown}; run it, or set --against")
    return {
        dataset: {
            method: {
                seed: _scores(samples / f"{run_name(dataset, method, seed, str(row.get('config_sha256')))}.json")
                for seed, row in by_seed.items()
            }
            for method, by_seed in methods.items()
        }
        for dataset, methods in groups.items()
        if against in methods
    }


def _scores(path: Path) -> dict[str, dict[str, float]]:
    if not path.is_file():
        raise EdgestillError(
            f"{path}: expected the samples of a row of the results, found no such file; give the samples folder of the "
            "study that wrote the results, or run it again with its --work folder after removing the row"
        )
    found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return _parts(found)


def _parts(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for part, samples in scores.items():
        found[part] = samples
        if part == CELLS:
            same = {name: match[1] == match[2] for name in samples if (match := PAIR.search(name))}
            found["xlt"] = {name: samples[name] for name, diagonal in same.items() if diagonal}
            found["gxlt_off"] = {name: samples[name] for name, diagonal in same.items() if not diagonal}
    return {part: samples for part, samples in found.items() if samples}


def compare(methods: dict[str, Scores], against: str) -> list[dict[str, Any]]:
    """For every other method and part: the difference to ``against``, its 95 % interval, and two p values."""
    found = []
    for method, mine in methods.items():
        seeds = sorted(set(mine) & set(methods[against]))
        if method == against or not seeds:
            continue
        for part in mine[seeds[0]]:
            sides = [_mean([scores[seed][part] for seed in seeds]) for scores in (mine, methods[against])]
            a, b = paired(sides[0], sides[1], lambda name: PAIR.sub("", name))
            if len(a) < 2:
                raise EdgestillError(
                    f"method {method}, {part}: expected scores of at least 2 questions to compare, found 1; run the "
                    "study with more test questions"
                )
            told = {"method": method, "part": part, "seeds": seeds, **asdict(bootstrap(a, b))}
            found.append(told | {"p_wilcoxon": wilcoxon(a, b)[1]})
    return found


def _mean(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paired", description="Paired tests of a study's methods."
    )
    parser.add_argument("results", type=Path, help="a study's results, a row per run")
    parser.add_argument("samples", type=Path, help="the folder samples in the study's working folder")
    parser.add_argument("--against", default="ce", help="the method that the others are compared with")
    parser.add_argument("--dataset", help="compare on this one alone")
    parser.add_argument("--out", type=Path, help="write the comparisons as JSON")
    arguments = parser.parse_args(argv)

    def act() -> None:
        datasets = read(arguments.results, arguments.samples, arguments.against, arguments.dataset)
        result = {name: compare(methods, arguments.against) for name, methods in datasets.items()}
        print(paired_table(result, arguments.against))
        if arguments.out:
            write_json(arguments.out, {"against": arguments.against, "comparisons": result})

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
