"""ProC-KD: Prototype-guided Cross-task Knowledge Distillation for Large-scale Models.

Li, Wu, Han, Tian, arXiv 2212.13180; journal version FITEE 2025 26(6):912-929.

The teacher's local features P are rewritten through a small bank of learned prototypes C (R), augmented with them, and
read by the student's own head: a prediction in the student's label space, made of the teacher's parts. The student
learns to agree with it. The teacher's own head and label space are never used.

    P = ReLU(W_cat [T_1; T_2; T_3] + b)                       adapter
    R = g([P_n; u]),  u = W_v vec(V) + b_v                    prototype learning, from normalised residuals V to C
    aug(Q) = ReLU(a([E; F]) + Q)                              task-adaptive augmentation: attention of Q over C
    z_S = h(S),  z_T = h(aug(R)),  z_A = h(aug(S))            h: the student's head, shared
    L = CE(z_S) + w_T CE(z_T) + w_A CE(z_A) + w_KL KL(z_S, z_T) + w_KA KL(z_S, z_A) + w_P L_P

What is known, and from where (we have not seen the paper's body):
- from the authors' code: every module above, back-propagated prototypes, uniform initialisation, CE on z_S, the shared
  head, and a teacher head that is no input of anything;
- likely, from names in that code and from a paper sharing an author: the KL term; its weight 10 is one reading of a
  folder's name. Preset ``evidence`` is the literal reading of all that;
- reconstruction of ours: which layers are tapped, w_T, w_A, w_KA, stop-gradient and warm-up (preset ``default``), the
  mean over positions instead of a class token, no weight decay on C, k-means initialisation, ``proto_reduce``,
  ``token_dropout`` (element-wise, on the teacher's tokens), and all of segmentation: aug(R) is put on the student's
  grid bilinearly before the head, and the KL is per pixel that counts.

L_P is our extension, preset ``assignment``: see ``toolchain/methods/prototypes.py``. It uses none of the modules above.
With ``train_prototypes: ema`` or ``sinkhorn`` the task's losses do not reach C: it follows unit(P), as described there
(``sinkhorn``: and the student's tokens, which that loss does not reach).

Deliberate deviations: the residuals are never materialised, V_k = (A^T X)_k - (sum_n A_nk) C_k; norms, residuals and
softmaxes are in float32 under autocast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from toolchain.artifact import EdgestillError
from toolchain.config import Config
from toolchain.distiller import Batch, Distiller
from toolchain.grids import Grid, map_of, resized, tokens_of
from toolchain.losses import accuracy, cross_entropy, kl, usage_perplexity, valid
from toolchain.methods.options import ProCKD as Options
from toolchain.methods.prototypes import (
    Banks,
    MovingAverages,
    commitment,
    first_tokens,
    kmeans,
    swapped_prediction,
    unit,
)
from toolchain.train import Run


def mixer(width: int) -> nn.Sequential:
    """Two position-wise layers, 2d -> d -> d."""
    return nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def residuals(x: Tensor, assignment: Tensor, prototypes: Tensor) -> Tensor:
    """V_k = sum_n A_nk (X_n - C_k): (B, N, d), (B, N, K), (K, d) -> (B, K, d), float32, without the B N K d tensor."""
    with torch.autocast(x.device.type, enabled=False):
        x, assignment, prototypes = x.float(), assignment.float(), prototypes.float()
        return assignment.transpose(1, 2) @ x - assignment.sum(1)[:, :, None] * prototypes


class PrototypeLearning(nn.Module):
    """P (B, N, d), C (K, d) -> R (B, N, d) and the assignment A (B, N, K)."""

    def __init__(self, width: int, prototypes: int, reduce: int | None = None) -> None:
        super().__init__()
        self.assign = nn.Linear(width, prototypes)
        flat = prototypes * width
        self.describe: nn.Module = nn.Linear(flat, width)
        if reduce is not None:
            self.describe = nn.Sequential(nn.Linear(flat, reduce, bias=False), nn.Linear(reduce, width))
        self.mix = mixer(width)

    def descriptor(self, p: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, d), a description of the whole image, and A (B, N, K)."""
        x = unit(p)
        assignment = self.assign(x).float().softmax(-1)
        v = unit(unit(residuals(x, assignment, prototypes)).flatten(1))
        return self.describe(v), assignment

    def forward(self, p: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        u, assignment = self.descriptor(p, prototypes)
        return self.mix(torch.cat([p, u[:, None].expand_as(p)], -1)), assignment


class TaskAdaptiveAugmentation(nn.Module):
    """aug(Q) for tokens Q (B, N, d). It owns the prototypes C (K, d): all that aug-mode inference keeps.

    ``task_gradient``: whether the task's losses train C.
    """

    no_decay = True  # its own parameter is C

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.C = nn.Parameter(torch.rand(prototypes, width))
        self.task_gradient = True
        self.encode = nn.Linear(width, width)
        self.mix = mixer(width)

    @property
    def prototypes(self) -> Tensor:
        """C as the task's losses see it."""
        return self.C if self.task_gradient else self.C.detach()

    def forward(self, q: Tensor) -> Tensor:
        e, m = self.encode(q), self.encode(self.prototypes)
        with torch.autocast(q.device.type, enabled=False):
            weights = (e.float() @ m.float().T).softmax(-1)
        return F.relu(self.mix(torch.cat([e, weights.to(e.dtype) @ m], -1)) + q)


class Kit(nn.Module):
    """Everything that is trained beside the student and not exported; ``augment`` stays in aug mode."""

    def __init__(self, channels: int, width: int, options: Options) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(channels, width), nn.ReLU())
        self.prototypes = PrototypeLearning(width, options.K, options.proto_reduce)
        self.augment = TaskAdaptiveAugmentation(width, options.K)
        self.learning, self.augmenting = options.prototype_learning, options.feature_augmentation
        self.token_dropout = options.token_dropout
        if options.proto_init == "unit_normal":
            with torch.no_grad():
                self.augment.C.copy_(unit(torch.randn_like(self.augment.C)))
        learner = options.learner
        self.augment.C.requires_grad_(options.train_prototypes in (True, "sinkhorn"))
        self.augment.task_gradient = learner is None
        self.averages = MovingAverages(options.K, width) if learner == "ema" else None

    def local(self, tokens: Tensor) -> Tensor:
        """Teacher tokens (B, N, c) -> P (B, N, d)."""
        p: Tensor = self.adapter(F.dropout(tokens, self.token_dropout, self.training))
        return p

    def rewrite(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """P -> R (B, N, d) and the assignment, None without prototype learning."""
        return self.prototypes(p, self.augment.prototypes) if self.learning else (p, None)

    def learn(self, p: Tensor, s: Tensor, frozen: bool) -> Tensor:
        """The loss of the prototypes' own learner; P and the student's tokens S, both (B, N, d)."""
        points, c = unit(p).flatten(0, 1), self.augment.C
        if self.averages is not None:
            loss = commitment(points, c)
            if self.training:
                c.data.copy_(self.averages.update(points.detach()))
            return loss
        axes = unit(c.detach() if frozen else c).T
        with torch.autocast(p.device.type, enabled=False):
            return swapped_prediction(points @ axes, unit(s.detach()).flatten(0, 1) @ axes)

    def aug(self, q: Tensor) -> Tensor:
        return self.augment(q) if self.augmenting else q


class AugStudent(nn.Module):
    """h(aug(S)): the student with the prototypes, for ``infer: aug``."""

    def __init__(self, student: nn.Module, augment: TaskAdaptiveAugmentation) -> None:
        super().__init__()
        self.student, self.augment = student, augment
        self.width = student.width

    def features(self, image: Tensor) -> Tensor:
        features: Tensor = self.student.features(image)  # type: ignore[operator]
        height, width = features.shape[-2:]
        return map_of(self.augment(tokens_of(features)), (height, width))

    def head(self, features: Tensor) -> Tensor:
        return self.student.head(features)  # type: ignore[operator, no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


def aug_student(student: nn.Module, options: Mapping[str, Any] | Options) -> AugStudent:
    """An untrained aug-mode student around ``student``, to load an artifact of ``infer: aug`` into."""
    section = options if isinstance(options, Options) else Options.model_validate(dict(options))
    return AugStudent(student, TaskAdaptiveAugmentation(int(student.width), section.K))  # type: ignore[arg-type]


class ProCKD(Distiller):
    """``widths``: channels of the teacher's taps, whose concatenated tokens lie on ``grid``. ``rest``: the share of the
    training in which SwAV's prototypes are frozen, its first epoch (Caron et al., appendix A)."""

    def __init__(
        self,
        student: nn.Module,
        widths: Sequence[int],
        grid: Grid,
        options: Options,
        ignore_index: int | None = None,
        rest: float = 0.0,
    ) -> None:
        super().__init__()
        width = int(student.width)  # type: ignore[arg-type]
        if options.d is not None and options.d != width:
            raise EdgestillError(f"method.d: expected the student's width {width}, found {options.d}; leave d out")
        self.student = student
        self.kit = Kit(sum(widths), width, options)
        self.banks = Banks(width, widths, options.K, options.temperature, options.learner) if options.w_P else None
        self.grid, self.options, self.ignore_index, self.rest = grid, options, ignore_index, rest

    def head(self, tokens: Tensor, grid: Grid, dense_grid: Grid | None) -> Tensor:
        """Tokens on ``grid`` through the student's head; a dense task puts them on ``dense_grid`` first."""
        features = map_of(tokens, grid)
        if dense_grid is not None and dense_grid != grid:
            features = F.interpolate(features, size=dense_grid, mode="bilinear", align_corners=False)
        return self.student.head(features)  # type: ignore[operator, no-any-return]

    def teacher_branch(self, p: Tensor, dense_grid: Grid | None) -> tuple[Tensor, Tensor | None]:
        """z_T and the assignment A, of P (B, N, d)."""
        r, assignment = self.kit.rewrite(p)
        return self.head(self.kit.aug(r), self.grid, dense_grid), assignment

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        o, label = self.options, batch["label"]
        features: Tensor = self.student.features(batch["image"])  # type: ignore[operator]
        height, width = features.shape[-2:]
        dense_grid = (height, width) if label.ndim > 1 else None
        z_s: Tensor = self.student.head(features)  # type: ignore[operator]
        loss = cross_entropy(z_s, label, self.ignore_index)
        out = {"ce": loss, "accuracy": accuracy(z_s, label, self.ignore_index)}
        frozen = self.progress < self.rest
        if o.w_T or o.w_KL:
            p = self.kit.local(batch["tokens"])
            if o.learner:
                out["prototype_loss"] = self.kit.learn(p, tokens_of(resized(features, self.grid)), frozen)
                loss = loss + out["prototype_loss"]
            z_t, assignment = self.teacher_branch(p, dense_grid)
            loss = loss + self._guided(out, "teacher", z_s, z_t, label, o.w_T, o.w_KL)
            if assignment is not None:
                out["perplexity"] = usage_perplexity(assignment)
        if o.w_A or o.w_KA:
            z_a = self.head(self.kit.aug(tokens_of(features)), (height, width), None)
            loss = loss + self._guided(out, "aug", z_s, z_a, label, o.w_A, o.w_KA)
        if self.banks is not None:
            teacher = batch["tokens"].roll(1, 0) if o.control == "other_image" else batch["tokens"]
            self.banks.frozen = frozen
            name = "swapped_ce" if o.learner == "sinkhorn" else "assignment_kl"
            out[name], out["bank_perplexity"] = self.banks(tokens_of(resized(features, self.grid)), teacher)
            loss = loss + o.w_P * out[name]
        return {"loss": loss} | out

    def _guided(
        self, out: dict[str, Tensor], name: str, z_s: Tensor, z: Tensor, label: Tensor, w_ce: float, w_kl: float
    ) -> Tensor:
        """The two terms of one branch, logged under its name."""
        o = self.options
        out[f"{name}_accuracy"] = accuracy(z, label, self.ignore_index)
        total = z_s.new_zeros(())
        if w_ce:
            out[f"{name}_ce"] = cross_entropy(z, label, self.ignore_index)
            total = total + w_ce * out[f"{name}_ce"]
        if w_kl:
            target = z.detach() if o.stop_grad else z
            pair = (z_s, target) if o.kl_dir == "student_teacher" else (target, z_s)
            out[f"{name}_kl"] = kl(*pair, valid(label, self.ignore_index))
            warm = min(1.0, self.progress / o.kl_warmup) if o.kl_warmup else 1.0
            total = total + w_kl * warm * out[f"{name}_kl"]
        return total


@torch.no_grad()
def init_prototypes(kit: Kit, batches: Any, seed: int) -> None:
    """Set C to the k-means centres of P over the first batches of an epoch."""
    points = kit.adapter(first_tokens(batches.epoch(0)).to(kit.augment.C.device)).cpu()
    kit.augment.C.copy_(kmeans(points, len(kit.augment.C), torch.Generator().manual_seed(seed)))


def distill(cfg: Config, run: Run) -> nn.Module:
    options: Options = cfg.method
    batches, ignore = run.batches("tokens"), run.data.info.get("ignore_index")
    with run.seeded("kit"):
        rest = 1 / cfg.train.epochs if cfg.train.epochs > 1 else 0.0
        distiller = ProCKD(run.student(), batches.tap_channels, batches.grid, options, ignore, rest)
    if options.proto_init == "kmeans":
        init_prototypes(distiller.kit, batches, cfg.seed)
    if distiller.kit.averages is not None:
        distiller.kit.averages.start(distiller.kit.augment.C)
    if distiller.banks is not None:
        distiller.banks.learn(first_tokens(batches.epoch(0)), cfg.seed)
        if options.control == "shuffled":
            distiller.banks.shuffle(cfg.seed)
    start = [distiller.state_dict()]  # each process saw its own share of the tokens: all take the first one's
    distiller.load_state_dict(broadcast_object_list(start)[0])
    scorer, headline = run.scorer(), run.task.HEADLINE

    def score(student: nn.Module) -> dict[str, float]:
        """What ships first; then the other mode and the teacher branch, where they are trained."""
        scores = {"plain": scorer(student)}
        if options.w_A or options.w_KA or options.infer == "aug":
            scores["aug"] = scorer(AugStudent(student, distiller.kit.augment))
        out = dict(scores[options.infer])
        out |= {f"{mode}_{headline}": float(value[headline]) for mode, value in scores.items()}
        if options.w_T or options.w_KL:
            out["teacher_branch_accuracy"] = branch_accuracy(distiller, batches)
        return out

    student = run.stage("student", distiller, batches, cfg.train, score)
    return AugStudent(student, distiller.kit.augment) if options.infer == "aug" else student


@torch.no_grad()
def branch_accuracy(distiller: ProCKD, batches: Any) -> float:
    """Accuracy of z_T on the validation split, in percent (of pixels for a dense task)."""
    distiller.eval()
    right = total = 0.0
    for batch in batches.held_out():
        label = batch["label"]
        dense_grid = None
        if label.ndim > 1:
            height, width = distiller.student.features(batch["image"]).shape[-2:]  # type: ignore[operator]
            dense_grid = (height, width)
        z_t, _ = distiller.teacher_branch(distiller.kit.local(batch["tokens"]), dense_grid)
        counted = float(valid(label, distiller.ignore_index).sum())
        right += float(accuracy(z_t, label, distiller.ignore_index)) * counted
        total += counted
    return right / max(total, 1.0)
