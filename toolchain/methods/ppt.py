"""Progressive Pretext Task Learning for Human Trajectory Prediction.

Lin, Liang, Lai, Hu, ECCV 2024, arXiv 2407.11588; official code iSEE-Laboratory/PPT at commit 88a1c87. Four trainings,
each starting from the one before it; x are the observed positions, y the future ones, E the K = 20 candidates for y_T:

I    next position      mean (Step(s)_t - s_{t+1})^2
IIa  warm-up            as IIb, with the encoder and the input layer frozen (dropout is on)
IIb  destination        min_k |E_k - y_T| + lambda_d * mean_{i<j} exp(-|E_i - E_j|^2 / sigma)
III  complete           mean_t |y^_t - y_t| + |e* - y_T|
                        + lambda_t * MSE(W_t f_III, f_I) + lambda_d' * MSE(W_d g_III, g_II)

In III y^ is the path to e*, the candidate nearest to y_T; f_I are the features of task I's network, frozen, which sees
the true future, and g_II the destination feature of task II's. W_t and W_d train and do not ship.

Deliberate deviations, each a key of the config but for what counts as an epoch:
- Coordinates are metres times ``student.scale`` (30: the pixels of the Stanford Drone Dataset that the published
  weights suit) and are divided by ``student.unit`` inside the networks; with raw pixels task I barely trains.
- One pass over the windows, each in one of the five augmented versions, counts as an epoch; the official code counts
  five.
- Sizes and schedule are those of the sections ``student`` and ``train``, whose defaults are not the published ones:
  Adam without weight decay at a constant learning rate, width 128, depth 3, dropout .1, GELU. They are in
  ``configs/studies/ppt_eth_ucy.yaml``, but for its one-cycle schedule.
- Epochs are selected on the validation split, or not at all (``train.select``); the official code selects every stage
  on the test split. ``test_selected`` reports what that habit would have reported of task III; ``data.validation:
  test`` follows it in all of them.
- ``winners`` above 1: in IIb the nearest of several candidates learn, their number falling geometrically to 1 over
  the first 60 % of the training, so that no candidate starves (evolving winner-takes-all: Makansi, Ilg, Cicek, Brox,
  CVPR 2019, arXiv 1906.03631). The paper has one winner throughout.
- ``stretch``: windows in other sizes too, so that speeds are known which the training scenes do not have.
- ``student.speed_floor``: coordinates are divided by the observed speed, which the networks are told; for the same
  reason.
- ``balance``: small recordings are drawn more often; but for UNIV's turn, 70 to 80 % of ETH/UCY's training windows are
  UNIV's.
- ``jitter``: half of the windows are seen with noise; the tracks of three of ETH/UCY's five scenes were interpolated
  between sparse positions, and those of the other two are noisy.
- ``rotate``: windows at any angle; a camera may look from anywhere, and PPT knows those of the training scenes and
  their quarter turns.
- ``student.align_heading``: tracks are turned to the observed direction of travel, and predictions back.
- ``branches``: the path to one further candidate, drawn anew in every step, follows the one that the config's teacher
  predicts for it; the official code leaves the other K - 1 paths without supervision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolchain.config import Config, TrainSection
from toolchain.distiller import Batch, Distiller, Frozen
from toolchain.loop import Score
from toolchain.losses import displacement, diversity, nearest
from toolchain.methods.options import Training
from toolchain.tasks.trajectory_batches import destination_scorer, next_position_scorer, pieces, scale_of, scorer
from toolchain.tasks.trajectory_nets import PPT, Destination, Step, shape_of
from toolchain.train import Run

EVOLVED = 0.6  # share of the training after which one winner is left


class NextPosition(Distiller):
    """Task I."""

    student: Step

    def __init__(self, student: Step) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        track = batch["track"]
        return {"loss": F.mse_loss(self.student(track[:, :-1]), track[:, 1:])}


class DestinationGuess(Distiller):
    """Task II; with ``warmup`` the encoder and the input layer do not learn.

    The ``winners`` nearest candidates learn from each sample at first; their number falls to one geometrically.
    """

    student: Destination

    def __init__(
        self, student: Destination, weight: float, sigma: float, *, winners: int = 1, warmup: bool = False
    ) -> None:
        super().__init__()
        self.student, self.weight, self.sigma, self.winners = student, weight, sigma, winners
        for part in (student.inp, student.encoder):
            part.requires_grad_(not warmup)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        track, observe = batch["track"], self.student.shape.observe
        candidates = self.student(track[:, :observe])
        distances = (candidates - track[:, None, -1]).norm(dim=-1)
        count = max(1, round(self.winners ** (1 - self.progress / EVOLVED)))
        loss = distances.topk(count, 1, largest=False).values.mean()
        parts = {"distance": distances.min(1).values.mean()}
        if self.weight:
            parts["diversity"] = diversity(candidates, self.sigma)
            loss = loss + self.weight * parts["diversity"]
        return {"loss": loss} | parts


class Complete(Distiller):
    """Task III. ``options`` are the weights of ``methods.options.PPT``; ``step`` and ``destination`` teach."""

    student: PPT

    def __init__(
        self, student: PPT, options: Any, step: Step | None, destination: Destination | None, teacher: PPT | None = None
    ) -> None:
        super().__init__()
        self.student, self.options = student, options
        width = student.shape.width
        self.step = Frozen(step) if step is not None and options.features else None
        self.destination = Frozen(destination) if destination is not None and options.destination_features else None
        self.teacher = Frozen(teacher) if teacher is not None and options.branches else None
        self.adapt_features = nn.Linear(width, width) if self.step else None
        self.adapt_destination = nn.Linear(width, width) if self.destination else None
        student.destination.requires_grad_(options.destination_lr > 0)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        slow = {id(parameter) for parameter in self.student.destination.parameters()}
        groups = []
        for group in super().param_groups(lr):
            for rate, inside in ((lr, False), (self.options.destination_lr, True)):
                parameters = [parameter for parameter in group["params"] if (id(parameter) in slow) is inside]
                if parameters:
                    groups.append(group | {"params": parameters, "lr": rate})
        return groups

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        options, observe = self.options, self.student.shape.observe
        track = batch["track"]
        observed, future = track[:, :observe], track[:, observe:]
        learns = options.destination_lr > 0
        if not learns:
            self.student.destination.eval()
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            feature = self.student.destination.feature(observed)
            candidates = self.student.destination.candidates(feature, observed)
            _, best = nearest(candidates, future[:, -1])
            chosen = candidates[torch.arange(len(best), device=best.device), best]
        path, features = self.student.complete(observed, chosen)
        parts = {"path": displacement(path, future)}
        loss = parts["path"]
        if learns:
            parts["destination"] = displacement(chosen, future[:, -1])
            loss = loss + options.destination_weight * parts["destination"]
        if self.step is not None and self.adapt_features is not None:
            with torch.no_grad():
                target = self.step.module.features(track[:, :-1])[:, observe - 1 :]  # type: ignore[operator]
            parts["features"] = F.mse_loss(self.adapt_features(features), target)
            loss = loss + options.features * parts["features"]
        if self.destination is not None and self.adapt_destination is not None:
            with torch.no_grad():
                target = self.destination.module.feature(observed)  # type: ignore[operator]
            parts["destination_features"] = F.mse_loss(self.adapt_destination(feature), target)
            loss = loss + options.destination_features * parts["destination_features"]
        if self.teacher is not None:
            other = candidates[torch.arange(len(best)), torch.randint(candidates.shape[1], (len(best),))].detach()
            with torch.no_grad():
                wanted, _ = self.teacher.module.complete(observed, other)  # type: ignore[operator]
            parts["branches"] = displacement(self.student.complete(observed, other)[0], wanted)
            loss = loss + options.branches * parts["branches"]
        return {"loss": loss} | parts


def complete_score(run: Run, split: str = "val") -> Score:
    """What task III is selected by, 3 minADE + minFDE, and the task's metrics: but for the most probable path's, as
    probabilities are counted when it has ended."""
    score = scorer(run, split)

    def scores(module: nn.Module) -> dict[str, float]:
        found = {name: value for name, value in score(module).items() if not name.startswith("top")}
        return {"selection": 3 * found["minADE"] + found["minFDE"], **found}

    return scores


def distill(cfg: Config, run: Run) -> nn.Module:
    options, batches = cfg.method, run.batches()
    shape = shape_of(cfg.student, run.data.info)

    def recipe(training: Training) -> TrainSection:
        return cfg.train.model_copy(update={"epochs": training.epochs, "lr": training.lr})

    with run.seeded("step"):
        step = Step(shape)
    if options.step.epochs:
        run.stage("I-next-position", NextPosition(step), batches, recipe(options.step), next_position_scorer(run))

    with run.seeded("destination"):
        destination = Destination(step)
    second = options.diversity, options.sigma
    if options.warmup.epochs:
        distiller = DestinationGuess(destination, *second, warmup=True)
        run.stage("IIa-warmup", distiller, batches, recipe(options.warmup), destination_scorer(run))
    if options.destination.epochs:
        distiller = DestinationGuess(destination, *second, winners=options.winners)
        run.stage("IIb-destination", distiller, batches, recipe(options.destination), destination_scorer(run))

    with run.seeded("complete"):
        ppt = PPT(destination)
        teacher = run.task.load_teacher(run.inputs["teacher"]) if options.branches else None
        complete = Complete(ppt, options, step, destination, teacher)
    watch = {"test": complete_score(run, "test")} if options.test_selected else None
    run.stage("III-complete", complete, batches, recipe(options.complete), complete_score(run), watch)
    ppt.requires_grad_(True)
    ppt.log_share.copy_(log_share(run, ppt))
    return ppt


@torch.inference_mode()
def log_share(run: Run, ppt: PPT) -> Tensor:
    """Logarithm of each candidate's share of the training windows it is nearest to; one is added to every count."""
    counts = torch.ones_like(ppt.log_share)
    for track in pieces(run.data.splits["train"], scale_of(run), run.device):
        _, best = nearest(ppt.destination(track[:, : ppt.shape.observe]), track[:, -1])
        counts += torch.bincount(best, minlength=len(counts))
    return (counts / counts.sum()).log()
