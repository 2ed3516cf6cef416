"""Image classification: uint8 images in, probabilities and label out; accuracy in percent."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from toolchain import metrics
from toolchain.tasks import Arrays, Data, Split, vision
from toolchain.tasks.datasets import assemble
from toolchain.tasks.readers import CLASSIFICATION
from toolchain.tasks.vision import *  # noqa: F403 - what every image task offers
from toolchain.tasks.vision import DataBase

HEADLINE = "accuracy"
HIGHER_IS_BETTER = True
UNIT = "%"


class DataSection(DataBase):
    """``image_size``: the student's side in pixels. ``dataset`` and the keys after it: a Hugging Face dataset's name on
    the hub or folder, its configuration and revision, and its columns."""

    source: Literal["digits", "mnist", "fashion_mnist", "cifar10", "folder", "huggingface"]
    image_size: vision.Side = 32
    dataset: str | None = Field(default=None, min_length=1)
    dataset_config: str | None = None
    revision: str | None = None
    image_column: str = "image"
    label_column: str = "label"

    @model_validator(mode="after")
    def _sound(self) -> DataSection:
        if self.source == "folder" and not self.path:
            raise ValueError("source folder needs path: the folder of your images")
        if (self.source == "huggingface") != (self.dataset is not None):
            raise ValueError("source huggingface and the key dataset go together")
        return self


def check(config: Any) -> list[tuple[tuple[Any, ...], str]]:
    """Faults between sections, as (key path, message)."""
    data = config.data
    faults = vision.check(config, data.image_size, data.image_size)
    if data.source in ("digits", "mnist") and data.views.flip:
        faults.append(
            (
                ("data", "views", "flip"),
                f"a mirrored digit is not that digit, so {data.source} cannot use it; use shift",
            )
        )
    return faults


def prepare(section: DataSection) -> Data:
    """Read the source. Arrays: ``image`` uint8 (N, H, W, C), ``label`` int64 (N,). Raises DataError, DownloadError."""
    return assemble(CLASSIFICATION[section.source](section), section, section.image_size, section.image_size)


def score(outputs: Arrays, split: Split) -> dict[str, float]:
    """Percent right at first and, with more than five classes, among the first five."""
    truth = split.arrays["label"]
    scores = {HEADLINE: metrics.accuracy(outputs["label"], truth)}
    if outputs["probabilities"].shape[-1] > 5:
        scores["top5"] = metrics.top_k(outputs["probabilities"], truth, 5)
    return scores


def interval(outputs: Arrays, split: Split) -> tuple[float, float]:
    """95 % interval of the accuracy, had other images been drawn."""
    truth = split.arrays["label"]
    return metrics.wilson(int((outputs["label"] == truth).sum()), len(truth))


def agreement(a: Arrays, b: Arrays) -> float:
    """Share in [0, 1] of equal labels."""
    return metrics.agreement(a["label"], b["label"])


def show(outputs: Arrays, split: Split, index: int) -> dict[str, Any]:
    """A sample for the report: ``image`` uint8 (H, W, C), ``truth`` and ``prediction`` as class names."""
    classes = split.meta["classes"]
    return {
        "image": split.arrays["image"][index],
        "truth": classes[int(split.arrays["label"][index])],
        "prediction": classes[int(outputs["label"][index])],
        "classes": classes,
    }
