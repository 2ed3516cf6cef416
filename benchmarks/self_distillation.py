"""What a self-distillation costs on top of cross-entropy: the teacher asked in every step, or its logits kept.

    python -m benchmarks.self_distillation [--rounds 3] [--threads 2] [--out benchmarks/results/self_distillation.json]

One process, interleaved rounds that begin with another variant each. A variant trains a generation on the same windows
of made-up questions, with a random encoder of the size of multilingual MiniLM (12 layers, 384 wide): speed depends on
neither. The unit is windows per second of the training loop's own clock, the computing of the kept logits included.

Within a generation every window is met once, so keeping its logits spares nothing by itself. It pays where they are met
again: by the next system of a study (``taken over``), and by a training that goes on after an interruption.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.distillation import main, rates
from benchmarks.environment import environment
from toolchain.artifact import create, versions
from toolchain.config import Config, validate
from toolchain.methods.self_distillation import distill
from toolchain.stage import console
from toolchain.tasks import load_data, load_task, save_data
from toolchain.train import Run, read_metrics

ENCODER = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
PLAIN, LIVE, KEPT, TAKEN = "plain: cross-entropy", "skd, teacher live", "skd, logits kept", "skd, logits taken over"
VARIANTS: dict[str, dict[str, Any]] = {PLAIN: {"kd": 0}, LIVE: {"cache": False}, KEPT: {}, TAKEN: {}}


def config(variant: str, threads: int, quick: bool) -> Config:
    return validate(
        {
            "name": "speed",
            "task": "qa",
            "data": {"source": "templates", "languages": ["en", "es"], "ntl": 2, "articles": [2, 16, 1, 1]},
            "student": {"model": "small", "options": SMALL if quick else ENCODER},
            "method": {"name": "self_distillation", "first": None, **VARIANTS[variant]},
            "train": {"epochs": 1, "batch_size": 8, "lr": 1e-4, "threads": threads},
        }
    )


def order(number: int) -> list[str]:
    """The variants of a round: another one is first in each, and TAKEN follows KEPT, whose logits it takes."""
    groups = [[PLAIN], [LIVE], [KEPT, TAKEN]]
    first = number % len(groups)
    return [name for group in groups[first:] + groups[:first] for name in group]


def measure(rounds: int, threads: int, quick: bool = False) -> dict[str, Any]:
    """Windows per second of each variant over interleaved rounds, after a round of warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cfg = config(PLAIN, threads, quick)
        with create(root / "data", stage="data", config=cfg.section("task", "data")) as draft:
            save_data(draft.path, load_task(cfg.task).prepare(cfg.data))
        data = load_data(root / "data")
        for number in range(rounds + 1):
            for name in order(number):
                shared = root / f"shared-{number}" if name in (KEPT, TAKEN) else None
                run = Run(
                    config(name, threads, quick),
                    data,
                    {"data": root / "data"},
                    root / f"{number}-{name}",
                    quiet=True,
                    shared=shared,
                )
                distill(run.cfg, run)
                value = float(json.loads(read_metrics(run).splitlines()[-1])["samples_per_second"])
                console.print(f"    round {number}/{rounds} {name}: {value:.1f} windows/s", markup=False)
                if number:
                    samples[name].append(value)
    rows = rates(samples)
    pair = {
        "student": "small",
        "options": SMALL if quick else ENCODER,
        "windows": len(data.splits["train"]),
        "batch": 8,
    }
    machine, used = environment() | {"threads": threads}, versions("torch", "transformers", "accelerate")
    return {"pair": pair, "rounds": rounds, "rows": rows, "environment": machine, "versions": used}


if __name__ == "__main__":
    main(measure, __doc__)
