from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from export.verify import ParityError, compare, predict
from toolchain.artifact import EdgestillError
from toolchain.tasks import Split

SPLIT = Split({"x": np.arange(10, dtype=np.float32), "label": np.arange(10) % 2}, ("x",))
TASK = SimpleNamespace(
    HEADLINE="accuracy",
    HIGHER_IS_BETTER=True,
    score=lambda outputs, split: {"accuracy": 100.0 * float((outputs["label"] == split.arrays["label"]).mean())},
    agreement=lambda a, b: float((a["label"] == b["label"]).mean()),
)


def outputs(shift: float = 0.0, wrong: int = 0) -> dict[str, np.ndarray]:
    label = SPLIT.arrays["label"].copy()
    label[:wrong] ^= 1
    return {"score": np.linspace(0, 1, 10, dtype=np.float32) + np.float32(shift), "label": label}


def test_predict_feeds_only_graph_inputs_and_keeps_the_last_short_batch() -> None:
    seen = []

    def call(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append((sorted(feeds), len(feeds["x"])))
        return {"y": feeds["x"] * 2}

    assert np.array_equal(predict(call, SPLIT, 4)["y"], SPLIT.arrays["x"] * 2)
    assert seen == [(["x"], 4), (["x"], 4), (["x"], 2)]


def test_predict_copies_outputs_that_share_a_buffer() -> None:
    buffer = np.zeros(5, np.float32)

    def call(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        np.copyto(buffer, feeds["x"])
        return {"y": buffer}

    assert np.array_equal(predict(call, SPLIT, 5)["y"], SPLIT.arrays["x"])


def test_predict_refuses_a_frozen_batch_and_an_empty_split() -> None:
    with pytest.raises(EdgestillError, match=r"expected 4 rows .* dynamic batch"):
        predict(lambda feeds: {"y": np.zeros(1)}, SPLIT, 4)
    with pytest.raises(EdgestillError, match="empty split"):
        predict(lambda feeds: {}, SPLIT.select(slice(0, 0)), 4)


def test_compare_reports_metric_agreement_and_difference_of_floats_only() -> None:
    report = compare(outputs(), outputs(0.25, wrong=2), SPLIT, TASK, {})
    assert (report.metric, report.metric_reference, report.metric_candidate) == ("accuracy", 100.0, 80.0)
    assert report.agreement == pytest.approx(0.8)
    assert report.max_difference == {"score": pytest.approx(0.25)}
    assert report.passed
    assert report.check("fp16") is report
    assert report.as_dict()["reasons"] == []


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({"max_difference": 0.1}, "max_difference"),
        ({"agreement": 0.9}, "agreement"),
        ({"metric_drop": 5}, "metric_drop"),
    ],
)
def test_each_limit_fails_alone_and_names_its_key(limits: dict[str, float], key: str) -> None:
    report = compare(outputs(), outputs(0.25, wrong=2), SPLIT, TASK, limits)
    assert len(report.reasons) == 1
    with pytest.raises(ParityError, match=rf"int8-cpu .*{key}.* expected .* found .*export\.parity\.limits\.int8-cpu"):
        report.check("int8-cpu")


def test_a_limit_of_none_does_not_bind() -> None:
    assert compare(outputs(), outputs(9.0), SPLIT, TASK, {"max_difference": None, "agreement": 1.0}).passed


def test_metric_drop_follows_the_metric_direction() -> None:
    lower = SimpleNamespace(**{**vars(TASK), "HIGHER_IS_BETTER": False})
    assert compare(outputs(), outputs(wrong=5), SPLIT, lower, {"metric_drop": 0}).passed
    assert not compare(outputs(wrong=5), outputs(), SPLIT, lower, {"metric_drop": 0}).passed
    assert compare(outputs(wrong=5), outputs(), SPLIT, TASK, {"metric_drop": 0}).passed


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_a_number_fails_without_limits_on_either_side(value: float, side: int) -> None:
    sides = [outputs(), outputs()]
    sides[side]["score"][3] = value
    report = compare(*sides, SPLIT, TASK, {})
    assert report.max_difference == {"score": None}
    assert not report.passed


def test_equal_infinities_are_equal() -> None:
    sides = [outputs(), outputs()]
    for side in sides:
        side["score"][3] = -np.inf
    assert compare(*sides, SPLIT, TASK, {"max_difference": 0}).max_difference == {"score": 0.0}


def test_compare_refuses_other_outputs() -> None:
    with pytest.raises(EdgestillError, match="expected the outputs"):
        compare(outputs(), {"score": outputs()["score"]}, SPLIT, TASK, {})
    with pytest.raises(EdgestillError, match=r"output 'score': expected float32\[10\], found float32\[9\]"):
        compare(outputs(), outputs() | {"score": np.zeros(9, np.float32)}, SPLIT, TASK, {})
