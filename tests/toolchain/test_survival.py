"""The training stage itself under SIGKILL: forked children, so that torch is imported once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from toolchain import artifact, distill, stages
from toolchain.config import Config, load
from toolchain.stage import Job

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
SMALL = [
    *("teacher=null", "method=plain", "data.train_samples=200", "data.image_size=16", "student.width=4"),
    *("train.epochs=12", "train.batch_size=20", "train.checkpoint_seconds=0.001", "train.threads=1"),
]
SECTIONS = ("seed", "task", "data", "teacher", "student", "method", "train")


def student_job(cfg: Config, root: Path, data: Path) -> Job:
    return Job("student", root / "student", cfg.section(*SECTIONS), {"data": data})


def trained_weights(job: Job) -> str:
    return str(artifact.verify(job.out).files["model.safetensors"]["sha256"])


def killed_after(job: Job, seconds: float) -> bool:
    """Whether a child that runs ``job`` had to be killed after ``seconds``; False when it finished before."""
    child = os.fork()
    if child == 0:
        try:
            distill.run(job)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0, "the training failed"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def survive(root: Path) -> None:
    """At least twenty SIGKILLs; every interrupted training ends like the uninterrupted one."""
    cfg = load(DIGITS, SMALL)
    data = root / "data"
    stages.run(Job("data", data, cfg.section("task", "data")))
    whole = student_job(cfg, root / "whole", data)
    distill.run(whole)

    generator = random.Random(5)
    kills, resumed = 0, 0
    for attempt in range(40):
        job = student_job(cfg, root / f"killed{attempt}", data)
        while killed_after(job, generator.uniform(0.05, 0.7)):
            kills += 1
            resumed += any(job.work.glob("student/*.safetensors"))
        assert trained_weights(job) == trained_weights(whole), f"attempt {attempt} ended with other weights"
        assert (job.out / "train.jsonl").read_text().count("\n") == cfg.train.epochs
        if kills >= 20:
            break
    assert kills >= 20
    assert resumed >= 10, "the kills came before the first checkpoint"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_training_killed_twenty_times_gives_the_same_weights(tmp_path: Path) -> None:
    """In a process of its own: one that has run autograd with threads must not fork."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    survive(Path(sys.argv[1]))
