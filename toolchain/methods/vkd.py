"""VkD: Improving Knowledge Distillation using Orthogonal Projections. Miles, Elezi, Deng, CVPR 2024, arXiv 2403.06213.

L = CE(z_S, y) + weight * smooth-L1( P mean(f_S), LayerNorm(mean(f_T)) ),   P^T P = I

mean() is over positions; LayerNorm has no affine part, its purpose being to whiten the target's scale.

Deliberate deviations: P is the Q of a QR decomposition of free weights (our specification read the authors' training
engine, but not how they parametrise P; at 624 x 128 QR is 27 times faster than torch's Householder parametrisation);
no additional KL on logits, so that the teacher's label space may be another. ``projector: linear`` drops the constraint
(the ablation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolchain.config import Config
from toolchain.distiller import Batch, Distiller
from toolchain.losses import accuracy, cross_entropy, vkd
from toolchain.train import Run


class Orthogonal(nn.Module):
    """(B, d) -> (B, C) by a matrix with orthonormal columns (rows, when C < d)."""

    no_decay = True  # the scale of the free weights means nothing

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(max(width, channels), min(width, channels)))
        self.wide = channels < width

    def matrix(self) -> Tensor:
        """P (C, d)."""
        q, r = torch.linalg.qr(self.free.float())
        basis: Tensor = q * r.diagonal().sign()  # QR is unique, hence continuous, with a positive diagonal of R
        return basis.T if self.wide else basis

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix().T


class VkD(Distiller):
    """``channels``: width of the teacher's tokens. ``student`` has features(), head(), width."""

    def __init__(
        self,
        student: nn.Module,
        channels: int,
        weight: float,
        constrained: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.student, self.weight, self.ignore_index = student, weight, ignore_index
        width = int(student.width)  # type: ignore[arg-type]
        self.projector = Orthogonal(width, channels) if constrained else nn.Linear(width, channels, bias=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.student.features(batch["image"])  # type: ignore[operator]
        logits, label = self.student.head(features), batch["label"]  # type: ignore[operator]
        ce = cross_entropy(logits, label, self.ignore_index)
        distance = vkd(self.projector(features.mean((2, 3))), batch["tokens"].mean(1))
        return {
            "loss": ce + self.weight * distance,
            "ce": ce,
            "distance": distance,
            "accuracy": accuracy(logits, label, self.ignore_index),
        }


def distill(cfg: Config, run: Run) -> nn.Module:
    batches = run.batches("tokens")
    constrained, ignore = cfg.method.projector == "orthogonal", run.data.info.get("ignore_index")
    with run.seeded("projector"):
        distiller = VkD(run.student(), batches.channels, cfg.method.weight, constrained, ignore)
    return run.stage("student", distiller, batches, cfg.train, run.scorer())
