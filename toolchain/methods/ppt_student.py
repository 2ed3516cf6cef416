"""A finished PPT teaches a network small enough for a camera, hypothesis by hypothesis. Ours.

The teacher's K paths p, its destination feature g and its numbering of the hypotheses are computed once for every
training window in each of the five versions of PPT's augmentation; of an ensemble p are the merged paths, and g and the
numbering the first PPT's. With the student's paths s, its feature f and its logits l, and the true path y, all in the
scaled unit:

L = w_paths        * mean_{k,t} |s_kt - p_kt|                 full trajectories
  + w_destinations * mean_k |s_kT - p_kT|                     destinations
  + w_features     * MSE(W f, g)                              intermediate feature; W trains and does not ship
  + w_truth        * (min_k mean_t |s_kt - y_t| + min_k |s_kT - y_T|)
  + w_ranking      * CE(l, argmin_k |s_kT - y_T|)             how likely each hypothesis is

The teacher never ranks its hypotheses, so the last term learns from the data alone. With w_paths, w_destinations and
w_features 0 this is plain training, for which no teacher is needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from toolchain.batches import TrainingError
from toolchain.config import Config
from toolchain.distiller import Batch, Distiller
from toolchain.losses import displacement
from toolchain.train import Run


class PPTStudent(Distiller):
    """``options`` are the weights of ``methods.options.PPTStudent``; ``feature`` is the width of the teacher's.

    With a feature the student has ``width``, ``feature(observed)`` and ``decode(feature, observed)`` (see ``OneShot``).
    """

    def __init__(self, student: nn.Module, options: Any, observe: int, feature: int | None) -> None:
        super().__init__()
        self.student, self.options, self.observe = student, options, observe
        if feature is not None:
            check_feature(student)
        self.adapt = None if feature is None else nn.Linear(int(student.width), feature)  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        options = self.options
        observed, future = batch["track"][:, : self.observe], batch["track"][:, self.observe :]
        parts: dict[str, Tensor] = {}
        if self.adapt is None:
            paths, logits = self.student(observed)
        else:
            own = self.student.feature(observed)  # type: ignore[operator]
            paths, logits = self.student.decode(own, observed)  # type: ignore[operator]
            parts["features"] = F.mse_loss(self.adapt(own), batch["feature"])
        error = (paths - future[:, None]).norm(dim=-1)
        end = error[:, :, -1]
        parts["truth"] = (error.mean(-1).min(1).values + end.min(1).values).mean()
        parts["ranking"] = F.cross_entropy(logits.float(), end.detach().argmin(1))
        if "paths" in batch:
            parts["paths"] = displacement(paths, batch["paths"])
            parts["destinations"] = displacement(paths[:, :, -1], batch["paths"][:, :, -1])
        weights = {name: getattr(options, name) for name in parts}
        loss = sum((weights[name] * part for name, part in parts.items()), error.new_zeros(()))
        return {"loss": loss} | {name: part for name, part in parts.items() if weights[name]}


def check_feature(student: nn.Module) -> None:
    """That a teacher's feature can be taught to ``student``. Raises TrainingError."""
    if not all(hasattr(student, name) for name in ("width", "feature", "decode")):
        raise TrainingError(
            f"method.features needs a student with width, feature and decode, which {type(student).__name__} has "
            "not (one_shot has them); set method.features to 0"
        )


def distill(cfg: Config, run: Run) -> nn.Module:
    options = cfg.method
    wanted = ["paths"] if options.paths or options.destinations else []
    wanted += ["feature"] if options.features else []
    with run.seeded("adapter"):
        feature = cfg.teacher.student.width if options.features else None
        distiller = PPTStudent(run.student(), options, int(run.data.info["observe"]), feature)
    return run.stage("student", distiller, run.batches(*wanted), cfg.train, run.scorer())
