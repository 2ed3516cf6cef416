"""FitNets: Hints for Thin Deep Nets. Romero et al., ICLR 2015, arXiv 1412.6550, equations 3 and 4.

L = CE(z_S, y) + weight * mean (W f_S + b - f_T)^2

f_S is the student's last map, averaged onto the teacher's grid; f_T the teacher's taps, z-scored per channel.

Deliberate deviations: one training with both terms, as the CIFAR-100 protocol of RepDistiller and mdistiller has it,
instead of hint training followed by distillation; the hint is the student's last map, and its regressor a 1x1
convolution, so that any student fits; no softened teacher labels, so that the teacher's label space may be another.
The weight 20 suits z-scored features (with raw features those protocols use 100).
"""

from __future__ import annotations

from torch import Tensor, nn

from toolchain.config import Config
from toolchain.distiller import Batch, Distiller
from toolchain.grids import Grid, resized, tokens_of
from toolchain.losses import accuracy, cross_entropy, fitnet
from toolchain.train import Run


class FitNet(Distiller):
    """``channels``: width of the teacher's tokens, which lie on ``grid``. ``student`` has features(), head(), width."""

    def __init__(
        self, student: nn.Module, channels: int, grid: Grid, weight: float, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.student, self.grid, self.weight, self.ignore_index = student, grid, weight, ignore_index
        self.regressor = nn.Linear(int(student.width), channels)  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.student.features(batch["image"])  # type: ignore[operator]
        logits, label = self.student.head(features), batch["label"]  # type: ignore[operator]
        ce = cross_entropy(logits, label, self.ignore_index)
        hint = fitnet(self.regressor(tokens_of(resized(features, self.grid))), batch["tokens"])
        return {
            "loss": ce + self.weight * hint,
            "ce": ce,
            "hint": hint,
            "accuracy": accuracy(logits, label, self.ignore_index),
        }


def distill(cfg: Config, run: Run) -> nn.Module:
    batches = run.batches("tokens")
    with run.seeded("regressor"):
        ignore = run.data.info.get("ignore_index")
        distiller = FitNet(run.student(), batches.channels, batches.grid, cfg.method.weight, ignore)
    return run.stage("student", distiller, batches, cfg.train, run.scorer())
