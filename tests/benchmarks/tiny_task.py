"""A task of three classes on four numbers, for the bench and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from toolchain.artifact import Port
from toolchain.tasks import Arrays, Split, classification

HEADLINE, HIGHER_IS_BETTER, UNIT = "accuracy", True, "%"
interval = classification.interval


def score(outputs: Arrays, split: Split) -> dict[str, float]:
    return {"accuracy": 100 * float(np.mean(outputs["label"] == split.arrays["label"]))}


def agreement(a: Arrays, b: Arrays) -> float:
    return float(np.mean(a["label"] == b["label"]))


def show(outputs: Arrays, split: Split, index: int) -> dict[str, Any]:
    truth, prediction = int(split.arrays["label"][index]), int(outputs["label"][index])
    picture = np.clip(128 + 40 * split.arrays["x"][index].reshape(2, 2, 1), 0, 255).astype(np.uint8)
    return {"image": picture, "truth": "abc"[truth], "prediction": "abc"[prediction], "correct": truth == prediction}


def load_student(folder: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    model = torch.nn.Linear(4, 3, bias=False)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model


def deploy(model: Any, config: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
    import torch

    class Decoded(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            probabilities = model(x).softmax(-1)
            return probabilities, probabilities.argmax(-1)

    outputs = [Port("probabilities", "float32", ("batch", 3)), Port("label", "int64", ("batch",))]
    return SimpleNamespace(module=Decoded(), inputs=[Port("x", "float32", ("batch", 4))], outputs=outputs)
