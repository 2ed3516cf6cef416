"""Training speed: what distillation costs on top of plain training, with cached and with live teacher features.

    python -m benchmarks.distillation [--rounds 3] [--threads 2] [--out distillation.json]

One run, interleaved rounds A B C A B C, on the real scanned digits with EfficientNet-Lite0 (random weights: speed does
not depend on them) and the built-in student. Each round trains one epoch; the unit is samples per second of that epoch,
from the training loop's own clock. torchdistill trains the same student with the same teacher, taps, batch and
optimiser; where it is not installed its row says so: pip install torchdistill.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import environment
from toolchain.artifact import create, versions
from toolchain.config import Config, validate
from toolchain.distill import load_method
from toolchain.stage import Job, console
from toolchain.tasks import load_data, load_task, save_data
from toolchain.tasks.teacher import load_features
from toolchain.train import Run, read_metrics

SIZE, TEACHER_SIZE, BATCH = 32, 96, 64


def config(method: str, threads: int) -> Config:
    return validate(
        {
            "name": "speed",
            "task": "classification",
            "data": {"source": "digits", "image_size": SIZE},
            "teacher": {"model": "tf_efficientnet_lite0", "weights": "random", "image_size": TEACHER_SIZE},
            "student": {"model": "small_cnn", "width": 32},
            "method": {"name": method},
            "train": {"epochs": 1, "batch_size": BATCH, "threads": threads},
        }
    )


def prepare(root: Path, cfg: Config) -> dict[str, Path]:
    """The data and features artifacts."""
    task, inputs = load_task(cfg.task), {"data": root / "data"}
    with create(inputs["data"], stage="data", config=cfg.section("task", "data")) as draft:
        save_data(draft.path, task.prepare(cfg.data))
    sections = cfg.section("seed", "task", "data", "teacher")
    task.features(Job("features", root / "features", sections, dict(inputs)))
    return inputs | {"features": root / "features"}


class Runner:
    """One epoch of each variant, samples per second."""

    def __init__(self, inputs: dict[str, Path], root: Path, threads: int) -> None:
        self.inputs, self.root, self.threads = inputs, root, threads
        cfg = config("fitnet", threads)
        self.data = load_data(inputs["data"])
        self.features = load_features(
            inputs["features"], data_folder=inputs["data"], config=cfg.section("data", "teacher")
        )

    def ours(self, method: str, live: bool = False) -> float:
        cfg = config(method, self.threads)
        with tempfile.TemporaryDirectory(dir=self.root) as work:
            run = Run(cfg, self.data, self.inputs, Path(work), quiet=True)
            if live:
                run.task = _Live(run.task, self)
            load_method(method).distill(cfg, run)
            return float(json.loads(read_metrics(run).splitlines()[-1])["samples_per_second"])

    def live_tokens(self, index: Tensor) -> Tensor:
        images = np.array(self.data.splits["train"].arrays["image"][index.numpy()])
        return torch.from_numpy(self.features.live(images)[0]).float()


class _Live:
    """The task, with batches whose tokens are computed by the teacher as they are drawn."""

    def __init__(self, task: Any, runner: Runner) -> None:
        self._task, self._runner = task, runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def batches(self, run: Run, *wanted: str) -> Any:
        batches = self._task.batches(run, *wanted)
        del batches.extra["tokens"]
        gather = batches.gather

        def fetch(index: Any, epoch: int) -> dict[str, Tensor]:
            batch: dict[str, Tensor] = gather(index, epoch)
            return batch | {"tokens": self._runner.live_tokens(batch["index"])}

        batches.fetch = fetch
        return batches


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Samples per second of each variant over interleaved rounds, after a round of warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = prepare(root, config("fitnet", threads))
        runner = Runner(inputs, root, threads)
        variants: dict[str, Callable[[], float]] = {
            "plain": lambda: runner.ours("plain"),
            "fitnet, cached features": lambda: runner.ours("fitnet"),
            "prockd, cached features": lambda: runner.ours("prockd"),
            "fitnet, live teacher": lambda: runner.ours("fitnet", live=True),
        }
        present = importlib.util.find_spec("torchdistill") is not None
        if present:
            from benchmarks import torchdistill_pair

            features, cfg = runner.features, config("fitnet", threads)
            variants["fitnet, torchdistill"] = lambda: torchdistill_pair.epoch(cfg, runner.data, inputs, root, features)
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 1):
            for name, variant in variants.items():
                value = variant()
                console.print(f"    round {number}/{rounds} {name}: {value:.0f} samples/s", markup=False)
                if number:
                    samples[name].append(value)
    rows = rates(samples)
    if not present:
        rows["fitnet, torchdistill"] = {"status": "not installed: pip install torchdistill"}
    machine = environment() | {"threads": threads}
    pair = {
        "teacher": "tf_efficientnet_lite0",
        "teacher_px": TEACHER_SIZE,
        "student": "small_cnn, width 32",
        "px": SIZE,
    }
    used = versions("torch", "timm", "accelerate", "torchdistill")
    return {"pair": pair | {"batch": BATCH}, "rounds": rounds, "rows": rows, "environment": machine, "versions": used}


def rates(samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Rows of samples per second over rounds; the first variant is plain training, which the others are set against."""
    plain = next(iter(samples.values()))
    return {
        name: {
            "samples_per_second": statistics.median(values),
            "epoch_time_vs_plain": statistics.median(p / v for p, v in zip(plain, values, strict=True)),
            "spread": max(values) / min(values) - 1,
            "raw": list(values),
        }
        for name, values in samples.items()
    }


def main(measure: Callable[[int, int], dict[str, Any]] = measure, about: str | None = __doc__) -> None:
    """The command line of a speed benchmark: ``measure(rounds, threads)``, printed and written."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.rounds, arguments.threads), indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
