"""Learning to Project for Cross-Task Knowledge Distillation. Auty, Miles, Kolbeinsson, Mikolajczyk, arXiv 2403.14494.

L = CE(z_S, y) + weight * D( f_S, P f_T )

The learnable projector P is on the teacher's side, so that it can discard directions that only serve the teacher's own
task. Pair it with a random teacher (``teacher.weights: random``): the paper finds part of the gain there.

Reconstruction: we have read the abstract, not the equations. D is the mean squared difference of layer-normalised
features at each position of the teacher's grid; without a normalisation of both sides the projector could shrink the
distance by scale alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from toolchain.config import Config
from toolchain.distiller import Batch, Distiller
from toolchain.grids import Grid, resized, tokens_of
from toolchain.losses import accuracy, cross_entropy, inverted_projection
from toolchain.train import Run


class InvertedProjection(Distiller):
    """``channels``: width of the teacher's tokens, which lie on ``grid``. ``student`` has features(), head(), width."""

    def __init__(
        self, student: nn.Module, channels: int, grid: Grid, weight: float, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.student, self.grid, self.weight, self.ignore_index = student, grid, weight, ignore_index
        self.projector = nn.Linear(channels, int(student.width), bias=False)  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.student.features(batch["image"])  # type: ignore[operator]
        logits, label = self.student.head(features), batch["label"]  # type: ignore[operator]
        ce = cross_entropy(logits, label, self.ignore_index)
        distance = inverted_projection(tokens_of(resized(features, self.grid)), self.projector(batch["tokens"]))
        return {
            "loss": ce + self.weight * distance,
            "ce": ce,
            "distance": distance,
            "accuracy": accuracy(logits, label, self.ignore_index),
        }


def distill(cfg: Config, run: Run) -> nn.Module:
    batches = run.batches("tokens")
    with run.seeded("projector"):
        ignore = run.data.info.get("ignore_index")
        distiller = InvertedProjection(run.student(), batches.channels, batches.grid, cfg.method.weight, ignore)
    return run.stage("student", distiller, batches, cfg.train, run.scorer())
