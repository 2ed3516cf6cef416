"""A small question answering set, an untrained encoder for it, and runs on both."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from toolchain.config import Config, validate
from toolchain.tasks import Data, load_task
from toolchain.tasks.qa_nets import QaNet, network
from toolchain.train import Run

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
DATA: dict[str, Any] = {
    "source": "templates",
    "languages": ["en", "es", "zh"],
    "ntl": 1,
    "articles": [8, 6, 2, 3],
    "windows": {"max_length": 48, "max_question": 16, "step": 12},
}


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "name": "tiny",
        "task": "qa",
        "data": DATA,
        "student": {"options": SMALL},
        "method": {"name": "self_distillation", "first": {"epochs": 1}},
        "train": {"epochs": 3, "batch_size": 8, "lr": 5e-3, "checkpoint_seconds": 1e-9},
        "compile": {"backend": "none"},
    }
    return validate(base | sections)


@cache
def data() -> Data:
    torch.set_num_threads(1)
    found: Data = load_task("qa").prepare(config().data)
    return found


def run(work: Path, inputs: Mapping[str, Path] | None = None, shared: Path | None = None, **sections: Any) -> Run:
    return Run(config(**sections), data(), dict(inputs or {}), work, quiet=True, shared=shared)


def net(work: Path, **sections: Any) -> QaNet:
    return network(run(work, **sections)).eval()
