"""Trainings of a tiny student, and ways for them to die."""

import json

from torch import nn

from tests.toolchain.methods.doubles import TinyBatches, student
from toolchain.distiller import Distiller, Frozen
from toolchain.methods.plain import Plain
from toolchain.train import read_metrics


class Killed(BaseException):
    """Stands for SIGKILL: what is on disk stays as it is."""


class Dying(TinyBatches):
    """Dies before giving batch number ``after``."""

    def __init__(self, after, **options):
        super().__init__(**options)
        self.after = after

    def pick(self, index, epoch):
        if self.fetched == self.after:
            raise Killed
        return super().pick(index, epoch)


class Generations(Distiller):
    """Self-distillation: a Frozen copy refreshed at each epoch's start."""

    def __init__(self, module):
        super().__init__()
        self.student, self.teacher = module, Frozen(module)

    def on_epoch_start(self, epoch):
        if epoch:
            self.teacher.refresh(self.student)

    def forward(self, batch):
        out = self.student(batch["image"])
        loss = nn.functional.cross_entropy(out, batch["label"])
        return {"loss": loss + nn.functional.mse_loss(out, self.teacher(batch["image"]))}


def train(run, make=Plain, batches=None, name="student", score=True, **changes):
    distiller = make(student())
    recipe = run.cfg.train.model_copy(update=changes)
    result = run.stage(name, distiller, batches or run.batches(), recipe, run.scorer() if score else None)
    return distiller, result


def lines(run):
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in read_metrics(run).splitlines()]
