"""What every step of the chain costs in accuracy, on the whole test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifact import EdgestillError
from toolchain.tasks import Arrays, Split

CHUNK = 64


def predict(call: Callable[[Arrays], Mapping[str, NDArray[Any]]], split: Split, batch: int, folder: Path) -> None:
    """Run ``call`` over ``split`` and write each output to ``<name>.npy``, a row per sample.

    Written through memory maps, so that dense outputs larger than memory are no trouble.
    """
    if not len(split):
        raise EdgestillError("expected real samples to score on, found an empty test split; check the data stage")
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for start in range(0, len(split), batch):
        stop = min(start + batch, len(split))
        for name, value in call(split.feed(slice(start, stop))).items():
            if value.ndim == 0 or len(value) != stop - start:
                raise EdgestillError(
                    f"output {name!r}: expected a row for each of {stop - start} samples, found shape {value.shape}"
                )
            value = split.whole(value)
            if name not in files:
                shape = (len(split), *value.shape[1:])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
            files[name][start:stop] = value
    for file in files.values():
        file.flush()


def load_outputs(folder: Path) -> Arrays:
    """What ``predict`` wrote, memory-mapped."""
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))}


def score(task: ModuleType, outputs: Arrays, split: Split) -> dict[str, float | None]:
    """The task's metrics, the headline first; what is not a number becomes None."""
    return {name: _number(value) for name, value in task.score(outputs, split).items()}


def interval(task: ModuleType, outputs: Arrays, split: Split) -> list[float] | None:
    """The 95 % interval of the headline that comes with the test samples, of a task that knows it."""
    found = task.interval(outputs, split) if hasattr(task, "interval") else None
    return None if found is None else [float(bound) for bound in found]


def max_difference(reference: Arrays, candidate: Arrays) -> dict[str, float | None]:
    """Greatest absolute difference of every float output the two share; None when it is not a number."""
    found: dict[str, float | None] = {}
    for name, expected in reference.items():
        other = candidate.get(name)
        if other is None or expected.dtype.kind != "f" or expected.shape != other.shape:
            continue
        worst = 0.0
        for start in range(0, len(expected), CHUNK):
            a, b = (x[start : start + CHUNK].astype(np.float64) for x in (expected, other))
            with np.errstate(invalid="ignore"):
                gap = np.where(a == b, 0.0, np.abs(a - b))
            worst = float(np.maximum(worst, gap.max(initial=0.0)))
        found[name] = _number(worst)
    return found


def choose_samples(task: ModuleType, outputs: Arrays, split: Split, seed: int = 0) -> NDArray[np.int64]:
    """Indices of samples worth showing: the worst of 256, worst first, and as many others drawn at random."""
    values_per_sample = sum(int(np.prod(array.shape[1:])) for array in outputs.values())
    count = 24 if values_per_sample < 10_000 else 6
    looked_at = np.random.default_rng(seed).permutation(len(split))[: 256 if count == 24 else 64]
    sign = 1 if task.HIGHER_IS_BETTER else -1
    badness = []
    for index in looked_at:
        one = np.array([index])
        value = _number(task.score({k: v[one] for k, v in outputs.items()}, split.select(one))[task.HEADLINE])
        badness.append(math.inf if value is None else sign * value)
    order = looked_at[np.argsort(badness, kind="stable")]
    worst = order[: count // 2]
    others = [index for index in looked_at if index not in worst]
    return np.concatenate([worst, np.array(others[: count - len(worst)], dtype=np.int64)]).astype(np.int64)


def _number(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
