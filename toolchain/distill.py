"""Stage: the config's method, from data and teacher to the student that ships."""

from __future__ import annotations

import importlib
from types import ModuleType

from accelerate import PartialState

from toolchain.artifact import create, remove, versions
from toolchain.checkpoint import save_tensors
from toolchain.config import validate
from toolchain.stage import Job, console, main
from toolchain.tasks import load_data
from toolchain.train import Run, read_metrics


def load_method(name: str) -> ModuleType:
    """``prockd`` is ``toolchain.methods.prockd``; a dotted name is the user's own module."""
    return importlib.import_module(name if "." in name else f"toolchain.methods.{name}")


def run(job: Job) -> None:
    """Inputs: ``data``; with a teacher ``features`` and ``teacher``. Resumes, see ``toolchain.train``."""
    cfg = validate({"name": "student"} | job.config)
    data = load_data(job.inputs["data"])
    this = Run(cfg, data, job.inputs, job.work)
    student = load_method(cfg.method.name).distill(cfg, this)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    val = {name: float(value) for name, value in this.scorer()(student).items()}
    if not PartialState().is_main_process:
        return
    with create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        save_tensors(draft.path / "model.safetensors", student.state_dict())
        (draft.path / "train.jsonl").write_text(read_metrics(this), encoding="utf-8")
        draft.metrics = {"val": val}
        draft.versions = versions("torch", "accelerate", "safetensors", "timm", "numpy")
        draft.extra = {
            "info": data.info,
            "method": cfg.method.name,
            "parameters": parameters,
            "stages": this.records,
            "best_epoch": this.records[-1]["best_epoch"] if this.records else None,
        }
    remove(job.work)
    headline, value = next(iter(val.items()))
    console.print(f"    student: {parameters:,} parameters, validation {headline} {value:.2f}", markup=False)


if __name__ == "__main__":
    main(run)
