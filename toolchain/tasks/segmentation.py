"""Semantic segmentation: uint8 images in, a class per pixel out; mean intersection over union in percent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from toolchain import metrics
from toolchain.tasks import Arrays, Data, Split, vision
from toolchain.tasks.datasets import assemble
from toolchain.tasks.readers import SEGMENTATION
from toolchain.tasks.vision import *  # noqa: F403 - what every image task offers
from toolchain.tasks.vision import DataBase

HEADLINE = "miou"
HIGHER_IS_BETTER = True
UNIT = "%"


class DataSection(DataBase):
    """``image_size``: height and width of the student's images. ``classes``: names of a folder's mask values 0, 1, ...
    ``ignore_index``: the mask value that counts as unlabelled (CamVid 11; a folder's default is 255)."""

    source: Literal["camvid", "folder"]
    image_size: tuple[vision.Side, vision.Side] = (180, 240)
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=255)] | None = None
    ignore_index: Annotated[int, Field(ge=0, le=255)] | None = None

    @model_validator(mode="after")
    def _sound(self) -> DataSection:
        own = self.source == "folder"
        if own and not (self.path and self.classes):
            raise ValueError(
                "source folder needs path (the folder of your images) and classes (the names of 0, 1, ...)"
            )
        if own and self.ignore_index is not None and self.ignore_index < len(self.classes or ()):
            raise ValueError(
                f"ignore_index {self.ignore_index} is also the number of a class; choose another, such as 255"
            )
        if not own and (self.classes is not None or self.ignore_index is not None):
            raise ValueError(f"{self.source} has its own classes and ignore_index; remove those keys")
        return self


def check(config: Any) -> list[tuple[tuple[Any, ...], str]]:
    """Faults between sections, as (key path, message)."""
    return vision.check(config, *config.data.image_size)


def prepare(section: DataSection) -> Data:
    """Read the source. Arrays: ``image`` uint8 (N, H, W, C), ``label`` int64 (N, H, W). Raises DataError."""
    return assemble(SEGMENTATION[section.source](section), section, *section.image_size)


def score(outputs: Arrays, split: Split) -> dict[str, float]:
    """Mean intersection over union and pixel accuracy, percent; unlabelled pixels do not count."""
    classes, ignored = len(split.meta["classes"]), split.meta["ignore_index"]
    counts = metrics.confusion(outputs["label"], split.arrays["label"], classes, ignored)
    return {HEADLINE: metrics.mean_iou(counts), "pixel_accuracy": metrics.pixel_accuracy(counts)}


def interval(outputs: Arrays, split: Split) -> tuple[float, float] | None:
    """95 % interval of the mean intersection over union, had other images been drawn; None where there is one image."""
    classes, ignored = len(split.meta["classes"]), split.meta["ignore_index"]
    each = metrics.confusions(outputs["label"], split.arrays["label"], classes, ignored)
    hits, unions = np.stack([metrics.hits_and_unions(counts) for counts in each], 1)
    return metrics.cluster_interval(100.0 * hits, unions)


def agreement(a: Arrays, b: Arrays) -> float:
    """Share in [0, 1] of pixels with equal labels."""
    return metrics.agreement(a["label"], b["label"])


def show(outputs: Arrays, split: Split, index: int) -> dict[str, Any]:
    """A sample for the report: ``image`` uint8 (H, W, C), ``truth`` and ``prediction`` as (H, W) class numbers."""
    return {
        "image": split.arrays["image"][index],
        "truth": split.arrays["label"][index],
        "prediction": outputs["label"][index],
        "classes": split.meta["classes"],
        "ignore_index": split.meta["ignore_index"],
    }
