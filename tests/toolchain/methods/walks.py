"""Tiny tracks, networks and runs of trajectory prediction, shared by the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain import artifact
from toolchain.checkpoint import save_tensors
from toolchain.config import Config, validate
from toolchain.stage import Job
from toolchain.tasks import Data, Split, save_data
from toolchain.tasks.trajectory import LIMITS, StudentSection
from toolchain.tasks.trajectory_batches import TrajectoryBatches
from toolchain.tasks.trajectory_nets import PPT, Destination, Shape, Step, build
from toolchain.train import Run

OBSERVE, PREDICT, K, WIDTH = 8, 12, 4, 8
STEPS = OBSERVE + PREDICT
INFO: dict[str, Any] = {
    "source": "simulator",
    "unit": "m",
    "observe": OBSERVE,
    "predict": PREDICT,
    "seconds_per_step": 0.4,
}
EXPORT: dict[str, Any] = {
    "opset": 20,
    "dynamic_int8": False,
    "calibration": {"samples": 24, "method": "minmax"},
    "parity": {"samples": 10, "limits": LIMITS},
}
NET: dict[str, Any] = {"hypotheses": K, "width": WIDTH, "depth": 2, "heads": 2}
ONE = {"epochs": 1, "lr": 1e-2}
METHOD: dict[str, Any] = {
    "name": "ppt",
    "step": ONE,
    "warmup": ONE,
    "destination": {"epochs": 2, "lr": 1e-2},
    "complete": {"epochs": 2, "lr": 1e-2},
    "destination_lr": 1e-3,
}


def walks(count: int, seed: int = 0) -> Split:
    """People who walk at a constant pace and turn, in metres."""
    rng = np.random.default_rng(seed)
    heading = rng.uniform(0, 2 * np.pi, (count, 1)) + rng.normal(0, 0.1, (count, 1)) * np.arange(STEPS)
    steps = rng.uniform(0.3, 0.7, (count, 1, 1)) * np.stack([np.cos(heading), np.sin(heading)], -1)
    track = (rng.uniform(-5, 5, (count, 1, 2)) + steps.cumsum(1)).astype(np.float32)
    arrays = {"observed": track[:, :OBSERVE], "future": track[:, OBSERVE:], "scene": np.zeros(count, np.int64)}
    return Split(arrays, ("observed",), {"scenes": ["walks"]})


def data(train: int = 24) -> Data:
    return Data({"train": walks(train), "val": walks(10, 1), "test": walks(12, 2)}, dict(INFO))


def write_data(folder: Path, seed: int = 0) -> Path:
    made = data()
    made.splits["train"] = walks(24, seed)
    with artifact.create(folder, stage="data", config={}) as draft:
        save_data(draft.path, made)
    return folder


def write_exported(folder: Path, model: str, **changes: Any) -> Path:
    """The artifacts data, student and onnx of a network whose weights are all drawn anew; ``changes`` are of NET."""
    from export.onnx import run

    section = StudentSection(model=model, **(NET | changes))
    write_data(folder / "data")
    config = {"task": "trajectory", "student": section.model_dump(mode="json")}
    with artifact.create(folder / "student", stage="student", config=config) as draft:
        save_tensors(draft.path / "model.safetensors", shaken(build(section, INFO, 0)).float().state_dict())
        draft.extra = {"info": INFO}
    how = {"task": "trajectory", "which": "student", "export": EXPORT}
    run(Job("onnx", folder / "onnx", how, {"model": folder / "student", "data": folder / "data"}))
    return folder


def shape(**changes: Any) -> Shape:
    return Shape(OBSERVE, PREDICT, **(NET | {"dropout": 0.0, "activation": "relu"} | changes))


def shaken(module: nn.Module, seed: int = 0) -> Any:
    """``module`` in eval mode and float64 with every weight drawn anew, so that nothing is zero or equal by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.double().eval()


def tracks(count: int = 3, seed: int = 0) -> Tensor:
    """(count, 20, 2) float64, relative to the last observed position, of the size of scaled metres."""
    track = torch.randn(count, STEPS, 2, generator=torch.Generator().manual_seed(seed)).double().cumsum(1) * 15
    return track - track[:, OBSERVE - 1 : OBSERVE]


def ppt(**changes: Any) -> PPT:
    return PPT(Destination(Step(shape(**changes))))


def config(
    method: Mapping[str, Any],
    train: Mapping[str, Any] | None = None,
    student: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Config:
    network = NET | {"model": "ppt" if method["name"] == "ppt" else "one_shot"} | dict(student or {})
    recipe = {"batch_size": 8, "weight_decay": 0.0, "epochs": 2, "lr": 1e-2, "threads": 1, "checkpoint_seconds": 1e-9}
    sections = {"name": "tiny", "task": "trajectory", "data": {"source": "simulator"}, "compile": {"backend": "none"}}
    return validate(sections | {"method": dict(method), "student": network, "train": recipe | dict(train or {})} | rest)


def tiny_run(work: Path, cfg: Config, inputs: Mapping[str, Path] | None = None) -> Run:
    return Run(cfg, data(), dict(inputs or {}), work, quiet=True)


class Killed(BaseException):
    """Stands for SIGKILL: what is on disk stays as it is."""


class Dying(TrajectoryBatches):
    """Dies before giving batch number ``after``, counted over all the stages."""

    def __init__(self, run: Run, after: int) -> None:
        self.fetched, self.after = 0, after
        super().__init__(run)

    def gather(self, index: NDArray[np.int64], epoch: int) -> dict[str, Tensor]:
        if self.fetched == self.after:
            raise Killed
        self.fetched += 1
        return super().gather(index, epoch)
