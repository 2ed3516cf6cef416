"""VkD: Improving Knowledge Distillation using Orthogonal Projections. Miles, Elezi, Deng, CVPR 2024, arXiv 2403.06213.

L = CE(z_S, y) + weight * smooth-L1( P mean(f_S), LayerNorm(mean(f_T)) ),   P^T P = I

mean() is over positions; LayerNorm has no affine part, its purpose being to whiten the target's scale.

Deliberate deviations: P is kept orthogonal by Householder reflections (our specification read the authors' training
engine, but not how they parametrise P; theirs costs a C x C matrix function per step); no additional KL on logits, so
that the teacher's label space may be another. ``projector: linear`` drops the constraint (the ablation).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from toolchain.config import Config
from toolchain.distiller import Batch, Distiller
from toolchain.losses import accuracy, cross_entropy, vkd
from toolchain.train import Run


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
        projector = nn.Linear(int(student.width), channels, bias=False)  # type: ignore[arg-type]
        self.projector = orthogonal(projector, orthogonal_map="householder") if constrained else projector
        if constrained:
            self.projector.parametrizations.weight.no_decay = True  # type: ignore[union-attr]

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
