"""Self-distillation with mAP@k coefficients for cross-lingual extractive question answering.

Carrino, Escolano, Fonollosa, arXiv 2309.17134 (2023); code github ccasimiro88/self-distillation-gxlt-qa, c6b7f10. The
paper's body was not available to us: what follows is from the abstract and the code's behaviour.

Stage ``first`` trains on questions in one language. Stage ``generations`` trains on the cross-lingual sample; its
teacher is the first stage's network, then, from each epoch's start, the student as it was there:

    L = ce * CE + kd * a * KD,   KD = 1/2 [ T^2 KL(p'_start || p_start) + T^2 KL(p'_end || p_end) ]

CE is the mean of the start's and the end's cross-entropy. a = 1, or the "mAP@k" coefficient: the mean over windows and
both ends of 1 / rank of the first of the teacher's 10 best positions that is in label - 5 .. label + 4, else 0: one
number per micro-batch, which in the code is of 6 windows, from teacher logits alone, without gradient.

Deliberate deviations: padding takes no part in CE, KD or ranking, so that a loss does not depend on how long the
batch's other windows are (question and special tokens do, as published); batches are of windows of like length; an
epoch's last incomplete batch is dropped and its gradients flow nowhere. ``cache`` computes a generation's teacher
logits before its first step, in the very batches of that epoch: the loss is the same to the bit. As one generation is
one epoch, a window is seen once in it, so within one run this saves nothing; what the first generation's teacher says
is shared by all runs of a study that start from the same first stage.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn

from toolchain.artifact import digest, read
from toolchain.checkpoint import load_tensors, save_tensors
from toolchain.config import Config, TrainSection
from toolchain.distiller import Batch, Distiller, Frozen, fingerprint
from toolchain.losses import accuracy, cross_entropy, hinton_kd, hit_precision, weighted_kd
from toolchain.methods.options import Recipe, SelfDistillation
from toolchain.stage import progress
from toolchain.tasks.qa_batches import SpanBatches
from toolchain.train import Run

FIRST_SECTIONS = ("seed", "task", "data", "student")


class TeacherLogits:
    """What a teacher says of every window of an epoch, computed in that epoch's own batches.

    Kept in ``work``, the latest generation's alone, so that a resumed run need not compute it again; the first
    generation's in ``shared``. ``source`` is the id of the data.
    """

    def __init__(
        self, batches: SpanBatches, work: Path, shared: Path, source: str, precision: str, quiet: bool = True
    ) -> None:
        self.batches, self.work, self.shared = batches, work, shared
        self.source, self.precision, self.quiet = source, precision, quiet
        self.epoch: int | None = None
        self.table = torch.zeros(0)  # (windows, width, 2), where the batches are

    def __call__(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, S, 2) for a batch that was just fetched."""
        ids = batch["input_ids"]
        if self.epoch != self.batches.fetched_epoch:
            self.epoch = self.batches.fetched_epoch
            self.table = self._filled(teacher, self.epoch, ids.device).to(ids.device)
        return self.table[batch["index"], : ids.shape[1]]

    def _filled(self, teacher: nn.Module, epoch: int, device: torch.device) -> Tensor:
        b = self.batches
        place = [b.seed, b.batch_size, b.count, b.rank, b.world, epoch, self.precision, self.source]
        folder = self.work if epoch else self.shared
        path = folder / f"logits-{digest([fingerprint(teacher), *place])[:24]}.safetensors"
        if path.is_file():
            return load_tensors(path)["logits"]
        table = self._computed(teacher, epoch, device)
        for old in self.work.glob("logits-*.safetensors") if epoch else ():
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"logits": table})
        return table

    def _computed(self, teacher: nn.Module, epoch: int, device: torch.device) -> Tensor:
        table = torch.zeros(self.batches.count, self.batches.width, 2)
        half = torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        shown = contextlib.nullcontext(None) if self.quiet else progress("teacher's logits", len(self.batches))
        with half, shown as bar:
            for batch in self.batches.epoch(epoch):
                logits = teacher(batch["input_ids"].to(device), batch["attention_mask"].to(device))
                table[batch["index"], : logits.shape[1]] = logits.float().cpu()
                if bar is not None:
                    bar.advance()
        return table


class Generations(Distiller):
    """``logits`` keeps the teacher's; None asks it in every step."""

    def __init__(self, student: nn.Module, options: SelfDistillation, logits: TeacherLogits | None = None) -> None:
        super().__init__()
        self.student, self.options, self.logits = student, options, logits
        if options.kd:
            self.teacher = Frozen(student)

    def on_epoch_start(self, epoch: int) -> None:
        if epoch and self.options.kd:
            self.teacher.refresh(self.student)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        o, label = self.options, batch["label"]
        z = self.student(batch["input_ids"], batch["attention_mask"])
        ce = cross_entropy(z, label)
        out = {"ce": ce, "accuracy": accuracy(z, label)}
        loss = o.ce * ce
        if o.kd:
            z_t = self._taught(batch)
            weight = coefficient(z_t, label, o, batch["attention_mask"].sum(1))
            out |= {"coefficient": weight.mean(), "kd": hinton_kd(z, z_t, o.temperature)}
            kd = weighted_kd(z, z_t, o.temperature, weight) if o.per_example else weight.mean() * out["kd"]
            loss = loss + o.kd * kd
        return {"loss": loss} | out

    def _taught(self, batch: Batch) -> Tensor:
        if self.logits is not None:
            return self.logits(self.teacher, batch)
        return self.teacher(batch["input_ids"], batch["attention_mask"])  # type: ignore[no-any-return]


def coefficient(teacher: Tensor, label: Tensor, options: SelfDistillation, length: Tensor | None = None) -> Tensor:
    """The weight (B,) of each window's distillation, from teacher logits (B, S, 2) and labels (B, 2), in [0, 1].

    ``length`` (B,): tokens that are not padding.
    """
    if options.coefficient == "constant":
        return torch.ones(len(label), device=teacher.device)
    below = 0 if options.strict else options.tolerance
    above = below if options.symmetric else max(0, below - 1)
    return hit_precision(teacher, label, options.k, below, above, options.every_hit, length).mean(1)


def recipe_of(train: TrainSection, own: Recipe) -> TrainSection:
    """``train`` with what a stage of its own has otherwise."""
    return train.model_copy(update=own.model_dump(exclude_none=True))


def distill(cfg: Config, run: Run) -> nn.Module:
    o: SelfDistillation = cfg.method
    student, score = run.task.network(run), run.scorer()
    if o.first is not None:
        recipe = recipe_of(cfg.train, o.first)
        plain = Generations(student, o.model_copy(update={"ce": 1.0, "kd": 0.0}))
        batches = SpanBatches(run, ("first",), recipe.batch_size)
        run.stage("first", plain, batches, recipe, score, sections=FIRST_SECTIONS)
    if o.stop == "first":
        return student  # type: ignore[no-any-return]
    batches = run.batches("train")
    logits = None
    if o.cache and o.kd:
        source = read(run.inputs["data"]).id if "data" in run.inputs else ""
        work = run.work / "logits"
        logits = TeacherLogits(batches, work, run.shared or work, source, cfg.train.precision, run.quiet)
    return run.stage("generations", Generations(student, o, logits), batches, cfg.train, score)
