"""A task of three classes on four numbers, for the bench and the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from toolchain.tasks import Arrays, Split

HEADLINE, HIGHER_IS_BETTER, UNIT = "accuracy", True, "%"


def score(outputs: Arrays, split: Split) -> dict[str, float]:
    return {"accuracy": 100 * float(np.mean(outputs["label"] == split.arrays["label"]))}


def agreement(a: Arrays, b: Arrays) -> float:
    return float(np.mean(a["label"] == b["label"]))


def show(outputs: Arrays, split: Split, index: int) -> dict[str, Any]:
    truth, prediction = int(split.arrays["label"][index]), int(outputs["label"][index])
    picture = np.clip(128 + 40 * split.arrays["x"][index].reshape(2, 2, 1), 0, 255).astype(np.uint8)
    return {"image": picture, "truth": "abc"[truth], "prediction": "abc"[prediction], "correct": truth == prediction}
