"""Stage: the config's method, from data and teacher to the student that ships."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate import PartialState
from torch import nn

from toolchain.artifact import create, remove, versions
from toolchain.checkpoint import save_tensors
from toolchain.config import Config, validate
from toolchain.stage import Job, console, main
from toolchain.tasks import Data, digits_of, load_data, unit_of
from toolchain.train import Run, read_metrics


def load_method(name: str) -> ModuleType:
    """``prockd`` is ``toolchain.methods.prockd``; a dotted name is the user's own module."""
    return importlib.import_module(name if "." in name else f"toolchain.methods.{name}")


@dataclass(frozen=True)
class Trained:
    """A student, its scores on the validation split, and the run that made it."""

    student: nn.Module
    val: dict[str, float]
    run: Run


def train_student(cfg: Config, data: Data, inputs: dict[str, Path], work: Path, shared: Path | None = None) -> Trained:
    """The config's method, from start or from where a killed training under ``work`` stopped; ``shared``: see Run."""
    this = Run(cfg, data, inputs, work, shared=shared)
    student = load_method(cfg.method.name).distill(cfg, this)
    val = {name: float(value) for name, value in this.scorer()(student).items()}
    return Trained(student, val, this)


def run(job: Job) -> None:
    """Inputs: ``data`` and, with a teacher, ``features`` and ``teacher``. Resumes, see ``toolchain.train``."""
    data = load_data(job.inputs["data"])
    sections = {key: value for key, value in job.config.items() if key != "files"}
    trained = train_student(validate({"name": "student"} | sections), data, job.inputs, job.work)
    if not PartialState().is_main_process:
        return
    write(trained, job.out, job.config)
    remove(job.work)
    headline, value = next(iter(trained.val.items()))
    parameters = sum(parameter.numel() for parameter in trained.student.parameters())
    shown = f"{value:.{digits_of(trained.run.task)}f} {unit_of(trained.run.task, data.info)}".rstrip()
    console.print(f"    student: {parameters:,} parameters, validation {headline} {shown}", markup=False)


def write(trained: Trained, out: Path, config: dict[str, Any]) -> None:
    """The student artifact; ``config`` holds the sections it was made from."""
    records = trained.run.records
    with create(out, stage="student", config=config, inputs=trained.run.inputs) as draft:
        save_tensors(draft.path / "model.safetensors", trained.student.state_dict())
        if hasattr(trained.run.task, "save_student"):
            trained.run.task.save_student(trained.student, draft.path)
        (draft.path / "train.jsonl").write_text(read_metrics(trained.run), encoding="utf-8")
        draft.metrics = {"val": trained.val}
        draft.versions = versions("torch", "accelerate", "safetensors", "timm", "transformers", "numpy")
        draft.extra = {
            "info": trained.run.data.info,
            "method": trained.run.cfg.method.name,
            "parameters": sum(parameter.numel() for parameter in trained.student.parameters()),
            "steps": trained.run.steps,
            "stages": records,
            "best_epoch": records[-1]["best_epoch"] if records else None,
        }


if __name__ == "__main__":
    main(run)
