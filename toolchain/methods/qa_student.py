"""A smaller encoder for question answering: fewer layers, pieces and neurons of the teacher, then distilled from it.

    L = ce * CE + kd * KD(T) + hidden * 1/|K| sum_{i in K} mean ( LN(h_S,i) - LN(h_T,m(i)) )^2

KD is Hinton's on start and end logits (arXiv 1503.02531, section 2). The hidden term is that of Patient KD (Sun et al.,
arXiv 1908.09355) and TinyBERT (Jiao et al., arXiv 1909.10351) at the embeddings and every kept layer i, against the
teacher's layer m(i) it was copied from; widths are equal, so there is no projection. Padding does not count.

Deliberate deviations: states are layer-normalised without affine part instead of divided by their norm (Patient KD) or
left as they are (TinyBERT), so that no layer outweighs another; one training with all terms. Intermediate neurons, if
any, are cut out of the distilled student, which ``repair`` distils once more. CE is 0 at windows of
``data.unlabelled_questions``: a label weighs the same whatever else is in its batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.artifact import EdgestillError
from toolchain.config import Config
from toolchain.distiller import Batch, Distiller, Frozen
from toolchain.losses import accuracy, cross_entropy, hinton_kd
from toolchain.methods.options import QaStudent
from toolchain.methods.self_distillation import recipe_of
from toolchain.tasks.qa_batches import SpanBatches
from toolchain.tasks.qa_data import UNLABELLED, USED
from toolchain.tasks.qa_nets import QaNet, load
from toolchain.tasks.qa_pruning import layers_of, narrow, plan, smaller
from toolchain.tasks.qa_tokenizer import TOKENIZER, check_same, used_pieces
from toolchain.train import Run

MEASURED = 32  # batches whose intermediate activations tell which neurons stay


class Smaller(Distiller):
    """``layers``: of the teacher, those that the student's layers were copied from."""

    student: QaNet

    def __init__(self, student: QaNet, teacher: QaNet, layers: list[int], options: QaStudent) -> None:
        super().__init__()
        self.student, self.teacher, self.options = student, Frozen(teacher), options
        self.pairs = [(0, 0), *((place + 1, layer + 1) for place, layer in enumerate(layers))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        o, label, feeds = self.options, batch["label"], (batch["input_ids"], batch["attention_mask"])
        z, states = self.student.deep(*feeds)
        z_t, states_t = self._taught(*feeds)
        labelled = (label != UNLABELLED).float().mean()
        ce, kd = labelled * cross_entropy(z, label, UNLABELLED), hinton_kd(z, z_t, o.temperature)
        hidden = sum(
            (state_distance(states[mine], states_t[its], batch["attention_mask"]) for mine, its in self.pairs),
            start=z.new_zeros(()),
        ) / len(self.pairs)
        loss = o.ce * ce + o.kd * kd + o.hidden * hidden
        return {"loss": loss, "ce": ce, "kd": kd, "hidden": hidden, "agreement": accuracy(z, z_t.argmax(1))}

    @torch.no_grad()
    def _taught(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.teacher.module.deep(input_ids, attention_mask)  # type: ignore[operator, no-any-return]


def state_distance(mine: Tensor, its: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of layer-normalised states (B, S, width) at the tokens of ``mask`` (B, S)."""
    a, b = (F.layer_norm(state.float(), state.shape[-1:]) for state in (mine, its))
    each = (a - b).square().mean(-1)
    return (each * mask).sum() / mask.sum().clamp(min=1)


def distill(cfg: Config, run: Run) -> nn.Module:
    o: QaStudent = cfg.method
    if "teacher" not in run.inputs:
        raise EdgestillError("method qa_student makes a student out of a teacher; add a teacher section to the config")
    teacher = load(run.inputs["teacher"])
    check_same(run.data.files[TOKENIZER], teacher.tokenizer, "the teacher")
    layers, _ = plan(teacher.encoder, cfg.student.layers, o.intermediate_size)
    total = len(layers_of(teacher.encoder))
    splits = tuple(name for name in ("first", "train", "unlabelled") if name in run.data.splits)
    batches = SpanBatches(run, splits, cfg.train.batch_size)
    used = np.array(json.loads(run.data.files[USED]), np.int64)
    pieces = used_pieces(teacher.tokenizer, [used], o.extra_pieces) if o.vocabulary == "used" else None
    if pieces is not None:
        whole = int(teacher.encoder.config.vocab_size)
        what = f"{len(pieces):,} of its {whole:,} word pieces; {_lost(run, pieces)}"
        run.step(what, smaller(teacher, list(range(total)), pieces))
    student = smaller(teacher, layers, pieces)
    if len(layers) < total:
        run.step(f"{len(layers)} of its {total} layers, not yet distilled", student)
    run.stage("student", Smaller(student, teacher, layers, o), batches, cfg.train, run.scorer())
    if o.intermediate_size is None:
        return student
    whole = int(student.encoder.config.intermediate_size)
    val = run.records[-1]["val"]
    run.step(f"distilled, with all {whole} intermediate neurons in each layer", student, val)
    narrow(student.to(run.device), o.intermediate_size, _measured(batches))
    run.step(f"{o.intermediate_size} of its {whole} intermediate neurons in each layer, not repaired", student)
    if o.repair is None:
        return student
    recipe = recipe_of(cfg.train, o.repair)
    batches = SpanBatches(run, splits, recipe.batch_size)
    return run.stage("repair", Smaller(student, teacher, layers, o), batches, recipe, run.scorer())


def _measured(batches: SpanBatches) -> Iterator[Batch]:
    """The first batches, whole in every process, so that all cut the same neurons."""
    order, size = batches.order(0), batches.batch_size
    for at in range(0, min(MEASURED, len(batches)) * size, size):
        yield batches.fetch(order[at : at + size], 0)


def _lost(run: Run, pieces: NDArray[np.int64]) -> str:
    """How much of the validation text the smaller vocabulary does not have."""
    arrays = run.data.splits["val"].arrays
    ids = np.asarray(arrays["input_ids"])[np.asarray(arrays["attention_mask"]) > 0]
    share = 1 - float(np.isin(ids, pieces).mean())
    return f"{share:.2%} of the validation tokens are outside it (the runtime cuts them into smaller pieces)"
