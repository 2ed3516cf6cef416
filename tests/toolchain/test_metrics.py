from __future__ import annotations

import numpy as np
import pytest

from toolchain import metrics
from toolchain.metrics import MetricError


def test_accuracy_is_percent() -> None:
    assert metrics.accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0])) == 75.0


def test_top_k_equals_a_sort() -> None:
    rng = np.random.default_rng(0)
    probabilities, truth = rng.random((200, 7)).astype(np.float32), rng.integers(0, 7, 200)
    for k in range(1, 8):
        naive = np.mean([t in np.argsort(-p, kind="stable")[:k] for p, t in zip(probabilities, truth, strict=True)])
        assert metrics.top_k(probabilities, truth, k) == pytest.approx(100 * naive)
    assert metrics.top_k(probabilities, truth, 1) == metrics.accuracy(probabilities.argmax(1), truth)


def test_top_k_of_equal_values_is_not_a_gift() -> None:
    assert metrics.top_k(np.zeros((4, 4)), np.arange(4), 1) == 25.0


def test_scores_refuse_what_does_not_fit() -> None:
    with pytest.raises(MetricError, match="NaN"):
        metrics.top_k(np.full((2, 3), np.nan), np.array([0, 1]), 1)
    with pytest.raises(MetricError, match="one shape"):
        metrics.accuracy(np.zeros(3), np.zeros(4))
    with pytest.raises(MetricError, match="non-empty"):
        metrics.agreement(np.zeros(0), np.zeros(0))
    with pytest.raises(MetricError, match=r"labels in 0\.\.2, found 0\.\.3"):
        metrics.top_k(np.zeros((2, 3)), np.array([0, 3]), 1)


def test_mean_iou_equals_a_naive_loop_and_ignores() -> None:
    rng = np.random.default_rng(1)
    truth, found = rng.integers(0, 5, (3, 9, 7)), rng.integers(0, 4, (3, 9, 7))
    truth[truth == 3] = 11
    counts = metrics.confusion(found, truth, 6, ignore_index=11)
    valid = truth != 11
    ious = []
    for k in range(6):
        union = (((found == k) | (truth == k)) & valid).sum()
        if union:
            ious.append(((found == k) & (truth == k)).sum() / union)
    assert len(ious) == 5
    assert metrics.mean_iou(counts) == pytest.approx(100 * np.mean(ious))
    assert np.isnan(metrics.class_iou(counts)[5])
    assert metrics.pixel_accuracy(counts) == pytest.approx(100 * (found == truth)[valid].mean())
    assert counts.sum() == valid.sum()


def test_confusion_refuses_unknown_classes_and_only_ignored() -> None:
    with pytest.raises(MetricError, match="labels in"):
        metrics.confusion(np.zeros((1, 2)), np.array([[0, 5]]), 2, 11)
    with pytest.raises(MetricError, match="predictions in"):
        metrics.confusion(np.array([[0, 5]]), np.zeros((1, 2)), 2, 11)
    with pytest.raises(MetricError, match="only ignore_index"):
        metrics.confusion(np.zeros((1, 2)), np.full((1, 2), 11), 2, 11)


def test_agreement_is_a_share() -> None:
    assert metrics.agreement(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 0]])) == 0.75


def test_displacement_errors_equal_a_naive_loop_and_forget_the_order_of_hypotheses() -> None:
    rng = np.random.default_rng(0)
    paths, truth = rng.normal(size=(6, 5, 12, 2)), rng.normal(size=(6, 12, 2))
    ade = [
        [np.mean([np.hypot(*(p[k, t] - y[t])) for t in range(12)]) for k in range(5)]
        for p, y in zip(paths, truth, strict=True)
    ]
    fde = [[np.hypot(*(p[k, 11] - y[11])) for k in range(5)] for p, y in zip(paths, truth, strict=True)]
    assert any(np.argmin(a) != np.argmin(f) for a, f in zip(ade, fde, strict=True))
    expected = {
        "minADE": np.mean([min(row) for row in ade]),
        "minFDE": np.mean([min(row) for row in fde]),
        "meanADE": np.mean(ade),
        "meanFDE": np.mean(fde),
    }
    assert metrics.displacement_errors(paths, truth) == pytest.approx(expected)
    assert metrics.displacement_errors(paths[:, [3, 0, 4, 2, 1]], truth) == pytest.approx(expected)
    first = metrics.displacement_errors(paths, truth, best_of=2)
    assert first["minFDE"] == pytest.approx(np.mean([min(row[:2]) for row in fde]))


def test_displacement_errors_refuse_what_does_not_fit() -> None:
    paths, truth = np.zeros((2, 3, 4, 2)), np.zeros((2, 4, 2))
    for wrong in (paths[:1], paths[:, :, :3], paths[..., :1], paths[0]):
        with pytest.raises(MetricError, match="expected paths"):
            metrics.displacement_errors(wrong, truth)
    with pytest.raises(MetricError, match="NaN or infinity"):
        metrics.displacement_errors(paths * np.nan, truth)
    with pytest.raises(MetricError, match=r"best_of in 1..3"):
        metrics.displacement_errors(paths, truth, best_of=4)


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert metrics.wilson(81, 263) == pytest.approx((25.5, 36.6), abs=0.05)  # Newcombe 1998, table I, method 3
    assert metrics.wilson(0, 20) == pytest.approx((0.0, 16.1), abs=0.05)
    assert metrics.wilson(400, 400) == pytest.approx((99.05, 100.0), abs=0.005)


def test_copies_of_a_sample_make_its_mean_no_surer() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (200, 1))
    low, high = metrics.cluster_interval(values, np.ones((200, 1))) or (0.0, 0.0)
    spread = 1.96 * values.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.1 * spread)
    assert metrics.cluster_interval(10 * values, np.full((200, 1), 10)) == pytest.approx((low, high))
    assert metrics.cluster_interval(values[:1], np.ones((1, 1))) is None
    apart = metrics.cluster_interval(np.array([[0.0], [1.0]]), np.array([[3], [1]]))
    assert apart == (0.0, 1.0), "whole clusters are drawn: both times the one, or both times the other"


def test_the_interval_is_of_the_mean_over_parts() -> None:
    sums, counts = np.array([[1.0, 0.0], [1.0, 0.0], [3.0, 8.0]]), np.array([[2, 0], [2, 0], [4, 10]])
    low, high = metrics.cluster_interval(sums, counts) or (0.0, 0.0)
    assert low == 0.5, "the second part is in one cluster alone; without it the first is all"
    assert high == pytest.approx((0.75 + 0.8) / 2)
