"""FitNet by torchdistill: same student, teacher, taps, batch and optimiser as ``benchmarks.distillation``.

torchdistill itself does not put a teacher in eval mode; this one always is, so that both compute the same.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.config import Config
from toolchain.grids import resized, tokens_of
from toolchain.tasks import Data
from toolchain.tasks.teacher import Features
from toolchain.tasks.vision_nets import normalise
from toolchain.train import Run


def epoch(cfg: Config, data: Data, inputs: dict[str, Path], work: Path, features: Features) -> float:
    """Samples per second of one epoch."""
    from torchdistill.core.distillation import get_distillation_box

    torch.manual_seed(0)
    train = data.splits["train"].arrays
    images = normalise(torch.from_numpy(np.array(train["image"])), data.info)
    dataset = torch.utils.data.TensorDataset(images, torch.from_numpy(np.array(train["label"])))
    student = _WithRegressor(Run(cfg, data, inputs, work, quiet=True).student(), features)
    teacher, settings = _TeacherTokens(features, data.info), _settings(cfg)
    box = get_distillation_box(teacher, student, {"train": dataset}, settings, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    count, start = 0, time.perf_counter()
    for batch, targets, supplement in box.train_data_loader:
        box.pre_forward_process()
        box.post_forward_process(box.forward_process(batch, targets, supplement))
        count += len(targets)
    return count / (time.perf_counter() - start)


class _TeacherTokens(nn.Module):
    """Student-normalised pictures -> standardised tokens."""

    def __init__(self, features: Features, info: dict[str, Any]) -> None:
        super().__init__()
        self.body = features.extractor.body
        self.pixel_mean, self.pixel_std = (torch.tensor(info[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        self.mean, self.std = torch.from_numpy(features.mean), torch.from_numpy(features.std)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.body(image * self.pixel_std + self.pixel_mean)[0]
        return (tokens - self.mean) / self.std


class _WithRegressor(nn.Module):
    """The student, computing FitNet's regression beside its logits, where a hook reads it."""

    def __init__(self, student: Any, features: Features) -> None:
        super().__init__()
        self.student, self.grid = student, features.grid
        self.regressor = nn.Linear(student.width, features.taps.shape[-1])

    def forward(self, image: Tensor) -> Tensor:
        features = self.student.features(image)
        self.regressor(tokens_of(resized(features, self.grid)))
        return self.student.head(features)  # type: ignore[no-any-return]


def _settings(cfg: Config) -> dict[str, Any]:
    def term(key: str, module: str, target: dict[str, Any], weight: float) -> dict[str, Any]:
        source = {"is_from_teacher": False, "module_path": module, "io": "output"}
        wrapper = {"key": "SimpleLossWrapper", "kwargs": {"input": source, "target": target}}
        return {"criterion": {"key": key, "kwargs": {}}, "criterion_wrapper": wrapper, "weight": weight}

    tokens = {"is_from_teacher": True, "module_path": ".", "io": "output"}
    hint = term("MSELoss", "regressor", tokens, cfg.method.weight)
    forward = {"forward_proc": "forward_batch_only"}
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler},
            "kwargs": {"batch_size": cfg.train.batch_size, "drop_last": True},
        },
        "teacher": forward | {"requires_grad": False, "forward_hook": {"input": [], "output": []}},
        "student": forward | {"requires_grad": True, "forward_hook": {"input": [], "output": ["regressor"]}},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": cfg.train.lr, "weight_decay": cfg.train.weight_decay}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"ce": term("CrossEntropyLoss", ".", {"uses_label": True}, 1.0), "hint": hint}},
        },
    }
