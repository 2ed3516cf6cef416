"""What ships for question answering, asked as an application asks it: texts in, an answer out, torch nowhere.

    python -m benchmarks.questions runs/qa_xquad_cpu onnx-teacher onnx onnx-int8-cpu --out benchmarks/results/qa.json

Each folder answers all questions of the test split through ``load_qa``, with its own tokenizer: where the vocabulary is
smaller, texts are cut into other pieces than the run's arrays, which the run's scores are of, hold. Milliseconds are
of ``answer``, one question at a time, tokenizer included, in interleaved rounds over the same questions, which are in
languages that were trained on: a smaller vocabulary cuts others into more pieces, as their scores tell. Rounds while
two cores share a cache and rounds while they do not (``benchmarks.cores``) are told apart; a round in which that
changes counts as neither. Where other work on the machine disturbs the rounds, the fastest that each question was
answered in any of the near ones tells more: the median of these is ``least_p50_ms``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from benchmarks import cores
from benchmarks.environment import environment
from benchmarks.latency import summarise
from toolchain import artifact
from toolchain.artifact import EdgestillError
from toolchain.qa_runtime import QaRuntime, load_qa
from toolchain.stage import console, guard
from toolchain.tasks import Split, load_data, qa
from toolchain.tasks.qa_data import CELLS

TIMED, WARMUP = 40, 3  # questions of a round, from all over the split; the first few do not count
ROUNDS, MOST, LEAST = 10, 40, 3  # measured until there are so many of near cores, or so many in all; fewer tell nothing


def texts(split: Split, part: str | None = None) -> tuple[list[str], list[str]]:
    """Questions, of a part of the split or all, and their contexts."""
    asked = [one for one in split.meta["questions"] if part in (None, one["part"])]
    return [one["question"] for one in asked], [split.meta["contexts"][one["context"]] for one in asked]


def scores(model: QaRuntime, split: Split) -> dict[str, float]:
    """See ``toolchain.tasks.qa.score``, of all questions."""
    return qa.score_texts({n: found.text for n, found in enumerate(model.answer_all(*texts(split)))}, split)


def times(
    models: dict[str, QaRuntime], split: Split, apart: Callable[[], bool | None]
) -> dict[bool, dict[str, list[list[int]]]]:
    """Nanoseconds of each answer, by whether the cores were ``apart`` (False where that is not told), folder and round.

    A round of all models counts only where the cores were the same before and after each of them.
    """
    count = WARMUP + TIMED
    asked = list(zip(*texts(split, CELLS), strict=True))
    asked = asked[:: max(1, len(asked) // count)][:count]
    taken: dict[bool, dict[str, list[list[int]]]] = {far: {name: [] for name in models} for far in (False, True)}
    for _ in range(MOST):
        seen, rounds = [bool(apart())], {}
        for name, model in models.items():
            rounds[name] = [_timed(model, *pair) for pair in asked][WARMUP:]
            seen.append(bool(apart()))
        if len(set(seen)) == 1:
            for name, round_ in rounds.items():
                taken[seen[0]][name].append(round_)
        if len(taken[False][next(iter(models))]) >= ROUNDS:
            break
    return taken


def _timed(model: QaRuntime, question: str, context: str) -> int:
    start = perf_counter_ns()
    model.answer(question, context)
    return perf_counter_ns() - start


def measure(
    run: Path, folders: Sequence[str], threads: int, apart: Callable[[], bool | None] = cores.apart
) -> dict[str, Any]:
    """A row per folder of ``run``; its ``data`` must be of task qa. Raises EdgestillError.

    ``latency`` is that of near cores, or of any where that cannot be told, ``latency_apart`` that of cores apart; None
    where there were too few rounds.
    """
    split = load_data(run / "data").splits["test"]
    if "questions" not in split.meta:
        raise EdgestillError(f"{run}: expected a run of task qa, found data without questions; give another folder")
    models = {name: load_qa(run / name, threads=threads) for name in folders}
    rows = []
    try:
        taken = times(models, split, apart if threads > 1 else lambda: None)
        for name, model in models.items():
            found = scores(model, split)
            weights = sum(path.stat().st_size for path in (run / name).glob("*.onnx*"))
            row: dict[str, Any] = {
                "folder": name,
                "bytes": weights,
                "scores": found,
            }
            told = []
            for far, key in ((False, "latency"), (True, "latency_apart")):
                rounds = taken[far][name]
                row[key] = summarise(rounds, 1) if len(rounds) >= LEAST else None
                if p50 := (row[key] or {}).get("p50"):
                    told.append(f"{p50['ms']:.1f} ms{', cores apart' if far else ''}")
            row["least_p50_ms"] = float(np.median(np.min(taken[False][name], 0))) / 1e6 if row["latency"] else None
            rows.append(row)
            shown = "; ".join(told) or "too few rounds to tell a time"
            console.print(f"    {name}: G-XLT F1 {found[qa.HEADLINE]:.2f}, {shown}", markup=False)
    finally:
        for model in models.values():
            model.close()
    count, where = len(split.meta["questions"]), environment()
    return {"answers": rows, "questions": count, "threads": threads, "environment": where}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.questions", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of task qa")
    parser.add_argument("folders", nargs="+", help="of the run; the first is what the others are compared with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)

    def act() -> None:
        found = measure(arguments.run, arguments.folders, arguments.threads)
        if arguments.out:
            artifact.write_json(arguments.out, found)

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
