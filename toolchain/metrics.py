"""One scorer for teacher, student, ONNX and engine. Shares of 100 are percent; agreement is in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifact import EdgestillError

Array = NDArray[Any]


class MetricError(EdgestillError):
    """What is to be scored does not fit the truth."""


def accuracy(predicted: Array, truth: Array) -> float:
    """Percent of ``predicted`` (N,) equal to ``truth`` (N,)."""
    _same_shape(predicted, truth)
    return 100.0 * float(np.mean(predicted == truth))


def top_k(probabilities: Array, truth: Array, k: int) -> float:
    """Percent of samples whose true class is among the ``k`` likeliest.

    ``probabilities`` (N, classes) may be logits; of equal values the lower class comes first.
    """
    if probabilities.ndim != 2 or len(probabilities) != len(truth) or not len(truth):
        raise MetricError(
            f"expected probabilities (N, classes) for N = {len(truth)} > 0 labels, found {probabilities.shape}; "
            "score the outputs of the split they were made from"
        )
    if np.isnan(probabilities).any():
        raise MetricError("expected numbers, found NaN among the probabilities; the model is broken or overflows")
    classes = probabilities.shape[1]
    _in_range(truth, classes, "labels")
    own = np.take_along_axis(probabilities, truth[:, None].astype(np.int64), 1)
    earlier = np.arange(classes) < truth[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & earlier)).sum(1)
    return 100.0 * float(np.mean(rank < k))


def confusion(predicted: Array, truth: Array, classes: int, ignore_index: int | None = None) -> NDArray[np.int64]:
    """Counts (classes, classes), rows true, columns predicted; where truth is ``ignore_index`` nothing is counted."""
    counts = np.zeros((classes, classes), np.int64)
    for one in confusions(predicted, truth, classes, ignore_index):
        counts += one
    if not counts.any():
        raise MetricError(f"expected labelled positions, found only ignore_index {ignore_index}; check the masks")
    return counts


def confusions(
    predicted: Array, truth: Array, classes: int, ignore_index: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """``confusion`` of one sample after the other; of one without labels, zeros."""
    _same_shape(predicted, truth)
    for found, true in zip(predicted, truth, strict=True):
        valid = np.asarray(true) != ignore_index
        true, found = np.asarray(true)[valid].astype(np.int64), np.asarray(found)[valid].astype(np.int64)
        _in_range(true, classes, "labels")
        _in_range(found, classes, "predictions")
        yield np.bincount(true * classes + found, minlength=classes * classes).reshape(classes, classes)


def class_iou(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of each class, percent (classes,); NaN where a class is in neither side."""
    hit, union = hits_and_unions(counts)
    with np.errstate(invalid="ignore"):
        iou: NDArray[np.float64] = 100.0 * hit / union
    return iou


def hits_and_unions(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each class (2, classes): positions that are it on both sides, and on either."""
    hit = np.diag(counts)
    return np.stack([hit, counts.sum(0) + counts.sum(1) - hit])


def mean_iou(counts: NDArray[np.int64]) -> float:
    """Mean over classes of intersection over union, percent; classes in neither side are left out."""
    return float(np.nanmean(class_iou(counts)))


def pixel_accuracy(counts: NDArray[np.int64]) -> float:
    """Percent of counted positions that are right."""
    return 100.0 * float(np.diag(counts).sum() / counts.sum())


def agreement(a: Array, b: Array) -> float:
    """Share in [0, 1] of equal predictions."""
    _same_shape(a, b)
    return float(np.mean(a == b))


def errors(paths: Array, truth: Array) -> NDArray[np.float64]:
    """L2 error of every hypothesis at every step (N, K, T), of ``paths`` (N, K, T, 2) against ``truth`` (N, T, 2)."""
    if paths.ndim != 4 or truth.ndim != 3 or (paths.shape[0], *paths.shape[2:]) != truth.shape or not truth.size:
        raise MetricError(
            f"expected paths (N, K, T, 2) for true tracks (N, T, 2), found {paths.shape} and {truth.shape}; "
            "score the outputs of the split they were made from"
        )
    if not np.isfinite(paths).all():
        raise MetricError("expected finite positions, found NaN or infinity; the model is broken or overflows")
    found: NDArray[np.float64] = np.linalg.norm(paths.astype(np.float64) - truth[:, None], axis=-1)
    return found


def displacement_errors(paths: Array, truth: Array, best_of: int | None = None) -> dict[str, float]:
    """ADE (mean over steps) and FDE (last step) of ``paths`` (N, K, T, 2), in their unit, as means over the N tracks.

    ``minADE`` and ``minFDE``: the least of the first ``best_of`` hypotheses (default all K), each for itself;
    ``meanADE`` and ``meanFDE``: the mean over them.
    """
    if best_of is not None and not 1 <= best_of <= paths.shape[1]:
        raise MetricError(f"expected best_of in 1..{paths.shape[1]}, the hypotheses there are, found {best_of}")
    found = errors(paths[:, :best_of], truth)
    ade, fde = found.mean(2), found[:, :, -1]
    return {
        "minADE": float(ade.min(1).mean()),
        "minFDE": float(fde.min(1).mean()),
        "meanADE": float(ade.mean()),
        "meanFDE": float(fde.mean()),
    }


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of ``n`` independent samples, ``right`` of which are, in percent (Wilson 1927)."""
    z = 1.959964
    share, spread = right / n, z * math.sqrt(right / n * (1 - right / n) / n + (z / (2 * n)) ** 2)
    low, high = ((share + z * z / (2 * n) + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def cluster_interval(sums: Array, counts: Array, draws: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of a mean over P parts of sum over sum, both (G, P), when G clusters are drawn again.

    The cluster bootstrap (Davison and Hinkley 1997, section 3.8): samples of one cluster may depend on each other, as a
    person's windows do, which overlap; clusters may not. A draw in which a part is empty leaves it out. None where
    there is one cluster.
    """
    _same_shape(sums, counts)
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    means, at_once = [], max(1, 1_000_000 // sums.size)
    for start in range(0, draws, at_once):
        drawn = rng.integers(len(sums), size=(min(at_once, draws - start), len(sums)))
        with np.errstate(invalid="ignore"):
            parts = sums[drawn].sum(1) / counts[drawn].sum(1)
        means.append(np.nanmean(parts[np.isfinite(parts).any(1)], 1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape or not a.size:
        raise MetricError(
            f"expected two non-empty arrays of one shape, found {a.shape} and {b.shape}; "
            "score the outputs of the split they were made from"
        )


def _in_range(values: Array, classes: int, what: str) -> None:
    if values.size and (values.min() < 0 or values.max() >= classes):
        raise MetricError(
            f"expected {what} in 0..{classes - 1}, found {values.min()}..{values.max()}; check the classes"
        )
