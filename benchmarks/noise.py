"""What noisy positions cost a trajectory graph: a tracker on a camera is less steady than the tracks of a data set.

    python -m benchmarks.noise runs/zara1/onnx runs/zara1_jitter/onnx --out benchmarks/results/noise.json

Normal noise of each standard deviation, the same for every graph, is added to the observed positions of the test split
that lies beside each; what people really did is scored against, without noise. Graphs of several runs are compared
where their test splits are equal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy
from benchmarks.environment import environment
from benchmarks.formats import score
from toolchain import artifact
from toolchain.artifact import EdgestillError
from toolchain.runtime import Runtime, load
from toolchain.stage import console, guard
from toolchain.tasks import Split, load_data, trajectory

DEVIATIONS = (0.0, 0.01, 0.02, 0.03, 0.05)  # in the data's unit


def noisy(split: Split, deviation: float, seed: int = 0) -> Split:
    """``split`` with noise on its ``observed`` positions (N, T_o, 2)."""
    observed = split.arrays["observed"]
    drawn = np.random.default_rng(seed).standard_normal(observed.shape)
    return replace(split, arrays=split.arrays | {"observed": (observed + deviation * drawn).astype(np.float32)})


def scores(model: Runtime, split: Split) -> dict[str, float | None]:
    """See ``toolchain.tasks.trajectory.score``; None is no number."""
    with tempfile.TemporaryDirectory() as folder:
        accuracy.predict(model, split, accuracy.CHUNK, Path(folder))
        return accuracy.score(trajectory, accuracy.load_outputs(Path(folder)), split)


def measure(folders: Sequence[Path], deviations: Sequence[float] = DEVIATIONS, threads: int = 2) -> dict[str, Any]:
    """A row per graph, with its scores at each of ``deviations``. Raises EdgestillError."""
    split, info = _test(folders[0])
    for folder in folders[1:]:
        other, _ = _test(folder)
        if any(not np.array_equal(split.arrays[name], other.arrays[name]) for name in ("observed", "future")):
            raise EdgestillError(
                f"{folder}: expected the test split of {folders[0]}, found another; compare runs of one data section"
            )
    splits = [noisy(split, deviation) for deviation in deviations]
    rows = []
    for folder in folders:
        with load(folder, threads=threads) as model:
            found = [scores(model, one) for one in splits]
        rows.append({"graph": str(folder), "scores": found})
        shown = ", ".join(
            f"{score(one['minADE'], 3)} at {deviation:g}" for one, deviation in zip(found, deviations, strict=True)
        )
        console.print(f"    {folder}: minADE {shown} {info['unit']}", markup=False)
    scenes = split.meta["scenes"]
    return {
        "noise": rows,
        "deviations": list(deviations),
        "unit": info["unit"],
        "recordings": [scenes[k] for k in np.unique(split.arrays["scene"])],
        "windows": len(split),
        "environment": environment(),
    }


def _test(folder: Path) -> tuple[Split, dict[str, Any]]:
    data = load_data(folder.resolve().parent / "data")
    split = data.splits["test"]
    if not {"observed", "future"} <= set(split.arrays):
        raise EdgestillError(f"{folder}: expected a graph of a run of task trajectory, found data without tracks")
    return split, data.info


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="graphs of runs of task trajectory, beside their data")
    parser.add_argument("--deviations", nargs="+", type=float, default=DEVIATIONS, help="in the data's unit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)

    def act() -> None:
        found = measure(arguments.folders, arguments.deviations, arguments.threads)
        if arguments.out:
            artifact.write_json(arguments.out, found)

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
