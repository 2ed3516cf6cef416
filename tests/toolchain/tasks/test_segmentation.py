from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.config import validate
from toolchain.faults import ConfigError
from toolchain.tasks import Split, segmentation
from toolchain.tasks.segmentation import DataSection


def split_of(truth: np.ndarray) -> Split:
    image = np.zeros((*truth.shape, 3), np.uint8)
    return Split({"image": image, "label": truth}, ("image",), {"classes": ["a", "b", "c"], "ignore_index": 11})


def test_score_agreement_and_show() -> None:
    truth = np.array([[[0, 0, 1], [1, 11, 11]]])
    found = {"label": np.array([[[0, 1, 1], [1, 2, 0]]])}
    scores = segmentation.score(found, split_of(truth))
    assert list(scores) == ["miou", "pixel_accuracy"]
    assert scores["miou"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert scores["pixel_accuracy"] == 75.0
    assert segmentation.interval(found, split_of(truth)) is None
    twice = split_of(np.concatenate([truth, np.full_like(truth, 11)]))
    interval = segmentation.interval({"label": found["label"].repeat(2, 0)}, twice)
    assert interval == pytest.approx((scores["miou"], scores["miou"])), "an image without labels changes nothing"
    assert segmentation.agreement(found, {"label": truth}) == 0.5
    sample = segmentation.show(found, split_of(truth), 0)
    assert sample["image"].shape == (2, 3, 3)
    assert np.array_equal(sample["truth"], truth[0])
    assert np.array_equal(sample["prediction"], found["label"][0])


def test_camvid(data_root: Path) -> None:
    data = segmentation.prepare(
        DataSection(source="camvid", path=str(data_root), image_size=(90, 120), train_samples=20)
    )
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 20, "val": 101, "test": 233}
    arrays = data.splits["test"].arrays
    assert (arrays["image"].shape, arrays["image"].dtype) == ((233, 90, 120, 3), np.uint8)
    assert (arrays["label"].shape, arrays["label"].dtype) == ((233, 90, 120), np.int64)
    assert np.unique(arrays["label"]).tolist() == list(range(12))
    perfect = {"label": np.where(arrays["label"] == 11, 0, arrays["label"])}
    assert segmentation.score(perfect, data.splits["test"]) == {"miou": 100.0, "pixel_accuracy": 100.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "folder", "path": "x"}, "source folder needs path"),
        ({"source": "camvid", "ignore_index": 3}, "camvid has its own classes"),
        ({"source": "folder", "path": "x", "classes": ["a", "b"], "ignore_index": 1}, "also the number of a class"),
        ({"source": "camvid", "views": {"count": 3, "flip": True}}, "data.views: views.count 3: only 2 distinct"),
        ({"source": "camvid", "image_size": 64}, "data.image_size"),
    ],
)
def test_faults_name_the_key(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"name": "x", "task": "segmentation", "method": "plain", "data": data})
    assert message in str(caught.value)


def test_a_sound_config_passes() -> None:
    teacher = {"model": "tf_efficientnet_lite0", "image_size": [180, 240]}
    value = {"name": "x", "task": "segmentation", "method": "hinton", "data": {"source": "camvid"}, "teacher": teacher}
    assert validate(value).data.image_size == (180, 240)
