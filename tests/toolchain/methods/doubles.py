"""Tiny students, data and runs shared by the tests of training and of methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.batches import Batches
from toolchain.config import TrainSection
from toolchain.tasks import Data
from toolchain.train import Run

CLASSES, WIDTH, GRID, COUNT = 3, 6, (2, 2), 36
TAP_CHANNELS = (4, 6)
CHANNELS = sum(TAP_CHANNELS)


class TinyStudent(nn.Module):
    """(B, 3, 8, 8) -> map (B, 6, 4, 4) -> logits (B, 3); dense: (B, 3, 8, 8)."""

    def __init__(self, dense: bool = False, dropout: float = 0.2) -> None:
        super().__init__()
        self.width, self.dense = WIDTH, dense
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Dropout(dropout))
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def features(self, image: Tensor) -> Tensor:
        return self.body(image)

    def head(self, features: Tensor) -> Tensor:
        logits = self.linear(self.norm(features.permute(0, 2, 3, 1)))
        if self.dense:
            return nn.functional.interpolate(logits.permute(0, 3, 1, 2), size=(8, 8), mode="bilinear")
        return logits.mean((1, 2))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


def student(seed: int = 0, dense: bool = False) -> TinyStudent:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyStudent(dense)


def samples(count: int = COUNT, dense: bool = False) -> dict[str, Tensor]:
    """Learnable samples: the label is which channel of the picture is brightest."""
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(CLASSES, (count,), generator=generator)
    image = torch.randn(count, 3, 8, 8, generator=generator) * 0.3
    image[torch.arange(count), label] += 1
    tokens = torch.randn(count, 4, CHANNELS, generator=generator) + 2 * label[:, None, None]
    logits = nn.functional.one_hot(label, CLASSES) * 3.0
    if dense:
        label = label[:, None, None].expand(-1, 8, 8).clone()
        label[:, 0] = 255
        logits = logits[:, :, None, None].expand(-1, -1, 8, 8)
    return {"image": image, "label": label, "tokens": tokens, "teacher_logits": logits}


class TinyBatches(Batches):
    grid, channels, tap_channels = GRID, CHANNELS, TAP_CHANNELS

    def __init__(self, batch_size: int = 8, dense: bool = False, count: int = COUNT) -> None:
        self.samples = samples(count, dense)
        self.fetched = 0
        super().__init__(count, batch_size, self.pick)

    def pick(self, index: Any, epoch: int) -> dict[str, Tensor]:
        self.fetched += 1
        return {name: value[torch.from_numpy(index)] for name, value in self.samples.items()}

    def held_out(self) -> Iterator[Mapping[str, Tensor]]:
        yield self.samples


class Settings(SimpleNamespace):
    """Stands for a Config: attributes, and sections of plain values."""

    def section(self, *keys: str) -> dict[str, Any]:
        method = getattr(self, "method", None)
        return {"seed": self.seed, "method": method.model_dump(mode="json") if method is not None else None}


def tiny_run(
    work: Path, *, method: Any = None, train: Mapping[str, Any] | None = None, dense: bool = False, batches: Any = None
) -> Run:
    """A Run on tiny data in this process."""
    torch.set_num_threads(1)
    recipe = TrainSection(
        **({"epochs": 3, "batch_size": 8, "lr": 0.01, "checkpoint_seconds": 1e-9} | dict(train or {}))
    )
    shown = samples(COUNT, dense)

    def scorer(run: Run, split: str = "val") -> Any:
        @torch.no_grad()
        def score(module: nn.Module) -> dict[str, float]:
            right = module.eval()(shown["image"]).argmax(1) == shown["label"]
            return {"accuracy": 100 * right.float().mean().item()}

        return score

    task = SimpleNamespace(
        HEADLINE="accuracy",
        HIGHER_IS_BETTER=True,
        student=lambda sections, info: student(sections["seed"], dense),
        batches=lambda run, *wanted: batches or TinyBatches(recipe.batch_size, dense),
        scorer=scorer,
    )
    info = {"classes": list(range(CLASSES)), "ignore_index": 255 if dense else None, "image_size": [8, 8]}
    cfg: Any = Settings(seed=0, task="tiny", method=method, train=recipe)
    return Run(cfg, Data({}, info), {}, work, quiet=True, task=task)


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items()}


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
