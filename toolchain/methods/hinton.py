"""Distilling the Knowledge in a Neural Network. Hinton, Vinyals, Dean, arXiv 1503.02531, section 2.

L = (1 - alpha) CE(z_S, y) + alpha T^2 KL( softmax(z_T / T) || softmax(z_S / T) )

It needs a teacher in the student's label space: here the linear probe of the teacher, trained on the student's task
(the ``teacher`` artifact). T = 4 and alpha = 0.9 are mdistiller's CIFAR-100 settings. Per pixel for dense tasks.
"""

from __future__ import annotations

from torch import Tensor, nn

from toolchain.config import Config
from toolchain.distiller import Batch, Distiller
from toolchain.losses import accuracy, cross_entropy, hinton_kd, valid
from toolchain.train import Run


class Hinton(Distiller):
    def __init__(self, student: nn.Module, temperature: float, alpha: float, ignore_index: int | None = None) -> None:
        super().__init__()
        self.student, self.temperature, self.alpha, self.ignore_index = student, temperature, alpha, ignore_index

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits, label = self.student(batch["image"]), batch["label"]
        ce = cross_entropy(logits, label, self.ignore_index)
        kd = hinton_kd(logits, batch["teacher_logits"], self.temperature, valid(label, self.ignore_index))
        return {
            "loss": (1 - self.alpha) * ce + self.alpha * kd,
            "ce": ce,
            "kd": kd,
            "accuracy": accuracy(logits, label, self.ignore_index),
        }


def distill(cfg: Config, run: Run) -> nn.Module:
    ignore = run.data.info.get("ignore_index")
    distiller = Hinton(run.student(), cfg.method.temperature, cfg.method.alpha, ignore)
    return run.stage("student", distiller, run.batches("teacher_logits"), cfg.train, run.scorer())
