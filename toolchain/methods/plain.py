"""Plain supervised training: cross-entropy, no teacher. The row every distillation has to beat.

Works for any task whose batches carry ``image`` and ``label`` and whose student gives logits (B, C, ...).
"""

from __future__ import annotations

from torch import Tensor, nn

from toolchain.config import Config
from toolchain.distiller import Batch, Distiller
from toolchain.losses import accuracy, cross_entropy
from toolchain.train import Run


class Plain(Distiller):
    def __init__(self, student: nn.Module, ignore_index: int | None = None) -> None:
        super().__init__()
        self.student, self.ignore_index = student, ignore_index

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits, label = self.student(batch["image"]), batch["label"]
        loss = cross_entropy(logits, label, self.ignore_index)
        return {"loss": loss, "accuracy": accuracy(logits, label, self.ignore_index)}


def distill(cfg: Config, run: Run) -> nn.Module:
    distiller = Plain(run.student(), run.data.info.get("ignore_index"))
    return run.stage("student", distiller, run.batches(), cfg.train, run.scorer())
