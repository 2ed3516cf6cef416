"""The config of each built-in method. Imports pydantic only, so that a config is checked before torch is loaded.

A method of your own declares a pydantic model ``Options`` with a ``name`` field in its module.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from toolchain.section import Section

Weight = Annotated[float, Field(ge=0)]
Balance = Annotated[float, Field(ge=0, le=1, exclude_if=lambda value: not value)]
Jitter = Annotated[float, Field(ge=0, exclude_if=lambda value: not value)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Plain(Section):
    """Supervised training without a teacher."""

    name: Literal["plain"]


class FitNet(Section):
    """Hints: the student's features regress the teacher's through a linear projector."""

    name: Literal["fitnet"]
    weight: Weight = 20.0


class VkD(Section):
    """Smooth-L1 of projected mean-pooled student features to layer-normalised teacher features."""

    name: Literal["vkd"]
    weight: Weight = 20.0
    projector: Literal["orthogonal", "linear"] = "orthogonal"


class InvertedProjection(Section):
    """The learnable projector sits on the teacher's side."""

    name: Literal["inverted_projection"]
    weight: Weight = 20.0


class Hinton(Section):
    """KL to the softened predictions of a linear probe of the teacher, trained on the student's task."""

    name: Literal["hinton"]
    temperature: Annotated[float, Field(gt=0)] = 4.0
    alpha: Fraction = 0.9


PRESETS: dict[str, dict[str, Any]] = {
    "evidence": {
        "w_T": 0.0,
        "w_A": 0.0,
        "w_KL": 10.0,
        "kl_dir": "student_teacher",
        "stop_grad": False,
        "kl_warmup": 0.0,
    },
    "default": {"w_T": 1.0, "w_A": 1.0, "w_KL": 10.0, "kl_dir": "teacher_student", "stop_grad": True, "kl_warmup": 0.2},
    "assignment": {"w_T": 0.0, "w_A": 0.0, "w_KL": 0.0, "w_P": 2.0},
}


class ProCKD(Section):
    """Prototype-guided cross-task distillation; keys as in the paper's notation, see ``methods/prockd.py``.

    ``preset`` fills the loss weights; a key given beside it wins. ``evidence`` and ``default`` read the paper's code,
    ``assignment`` is our extension: ``K`` prototypes of each tap, learned from the teacher alone, whose assignment (at
    ``temperature``) the student predicts. ``control``: what has to break it, channels ``shuffled`` over the prototypes,
    or the assignments of the ``other_image`` in the batch. ``train_prototypes``: by the task's losses (true), not at
    all, or by a learner of their own, ``ema`` of VQ-VAE or ``sinkhorn`` of SwAV, which also takes k-means' place in
    ``assignment``.
    """

    name: Literal["prockd"]
    preset: Literal["evidence", "default", "assignment"] = "default"
    K: Positive = 24
    d: Positive | None = None
    proto_init: Literal["uniform", "kmeans", "unit_normal"] = "uniform"
    proto_reduce: Positive | None = None
    w_T: Weight = 1.0
    w_A: Weight = 1.0
    w_KL: Weight = 10.0
    w_KA: Weight = 0.0
    w_P: Weight = 0.0
    temperature: Annotated[float, Field(gt=0)] = 0.1
    control: Literal["none", "shuffled", "other_image"] = "none"
    kl_dir: Literal["student_teacher", "teacher_student"] = "teacher_student"
    stop_grad: bool = True
    kl_warmup: Fraction = 0.2
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    prototype_learning: bool = True
    feature_augmentation: bool = True
    train_prototypes: Literal[True, False, "ema", "sinkhorn"] = True
    infer: Literal["plain", "aug"] = "plain"

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if isinstance(value, dict):
            preset = value.get("preset", "default")
            return (PRESETS.get(preset, {}) if isinstance(preset, str) else {}) | value
        return value

    @model_validator(mode="after")
    def _sound(self) -> ProCKD:
        if self.w_T == 0 and self.stop_grad and self.w_KL > 0:
            raise ValueError(
                "w_T=0 with stop_grad and w_KL>0 makes an untrained branch the target, and the student collapses"
            )
        if self.control != "none" and not self.w_P:
            raise ValueError(f"control={self.control} breaks the assignment, which w_P=0 leaves out; set w_P")
        if self.infer == "aug" and not self.feature_augmentation:
            raise ValueError("infer=aug needs feature_augmentation")
        if self.learner:
            self._sound_learner()
        return self

    def _sound_learner(self) -> None:
        branch, learner = bool(self.w_T or self.w_KL), f"train_prototypes={self.learner}"
        if not (branch or self.w_P):
            raise ValueError(f"{learner} learns from teacher tokens, which w_T, w_KL and w_P of 0 leave out")
        if not branch and (self.w_A or self.w_KA or self.infer == "aug"):
            raise ValueError(f"{learner} learns in the teacher branch, which w_T and w_KL of 0 leave out; set one")
        if branch and not (self.prototype_learning or self.feature_augmentation):
            raise ValueError(f"{learner} without prototype_learning and feature_augmentation: nothing uses them")
        if self.control == "shuffled":
            raise ValueError("control=shuffled breaks prototypes that are learned before; leave train_prototypes out")
        if self.learner == "ema" and self.proto_init != "uniform":
            raise ValueError(f"{learner} replaces what proto_init={self.proto_init} sets; leave proto_init out")
        if self.learner == "sinkhorn" and self.temperature != 0.1:
            raise ValueError("temperature is SwAV's .1 with train_prototypes=sinkhorn; leave it out")

    @property
    def learner(self) -> Literal["ema", "sinkhorn"] | None:
        """How the prototypes learn apart from the task's losses."""
        return None if isinstance(self.train_prototypes, bool) else self.train_prototypes


class Training(Section):
    """One of a method's trainings: what it has of its own beside the section ``train``. No epochs: it is left out."""

    epochs: Annotated[int, Field(ge=0)]
    lr: Annotated[float, Field(gt=0)]


class PPT(Section):
    """Progressive pretext-task learning; weights in the unit of the scaled tracks, see ``methods/ppt.py``.

    ``step``: next position (task I). ``warmup`` and ``destination``: task II, first with the encoder frozen; of its
    loss ``diversity`` and ``sigma`` are the second term, ``winners`` how many candidates learn from a sample at first.
    ``complete``: task III; its destination predictor learns at ``destination_lr`` (0: frozen), ``features`` and
    ``destination_features`` are its distillation terms, ``branches`` its supervision of the other hypotheses by the
    section ``teacher``. ``test_selected``: also report the epoch of task III that is best on the test split, the
    official code's habit, beside the honest one. ``stretch``: every window is multiplied by a factor drawn from
    1/stretch..stretch, log-uniformly, anew in each epoch. ``balance``: windows are drawn from the recordings in
    proportion to their sizes to the power of 1 - balance: 0 as they come, 1 as many from each. ``jitter``: the
    observed positions of half of the windows get normal noise, whose standard deviation in the data's unit is drawn
    from 0..jitter for each window, anew in each epoch; what task I is to predict of them is noisy, too. ``rotate``:
    beside being shown in one of the augmentation's five versions, every window is turned by any angle, drawn anew in
    each epoch.
    """

    name: Literal["ppt"]
    step: Training = Training(epochs=60, lr=1e-3)
    warmup: Training = Training(epochs=10, lr=1e-3)
    destination: Training = Training(epochs=60, lr=1e-4)
    complete: Training = Training(epochs=60, lr=1.5e-3)
    destination_lr: Weight = 1e-7
    destination_weight: Weight = 1.0
    diversity: Weight = 100.0
    sigma: Annotated[float, Field(gt=0)] = 1.0
    winners: Positive = 1
    features: Weight = 5.0
    destination_features: Weight = 0.5
    branches: Weight = 0.0
    stretch: Annotated[float, Field(ge=1)] = 1.0
    balance: Balance = 0.0
    jitter: Jitter = 0.0
    rotate: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    test_selected: bool = False

    @field_validator("step", "warmup", "destination", "complete", mode="before")
    @classmethod
    def _beside_defaults(cls, value: Any, info: ValidationInfo) -> Any:
        given = cls.model_fields[str(info.field_name)].default
        return given.model_dump() | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _sound(self) -> PPT:
        if not self.complete.epochs:
            raise ValueError("complete.epochs: task III makes the model that ships; expected at least 1")
        if self.warmup.epochs and not self.destination.epochs:
            raise ValueError("warmup without destination: set warmup.epochs to 0 too, or give destination.epochs")
        if self.features and not self.step.epochs:
            raise ValueError("features > 0 distils from task I, which step.epochs 0 leaves out; set features to 0")
        if self.destination_features and not self.destination_lr:
            raise ValueError(
                "destination_features > 0 teaches the destination predictor, which destination_lr 0 freezes; set "
                "destination_features to 0, or destination_lr above 0"
            )
        if self.destination_features and not self.destination.epochs:
            raise ValueError(
                "destination_features > 0 distils from task II, which destination.epochs 0 leaves out; "
                "set destination_features to 0"
            )
        return self


class PPTStudent(Section):
    """A finished PPT teaches a smaller network, hypothesis by hypothesis; see ``methods/ppt_student.py``.

    ``balance`` and ``jitter`` are as in ``PPT``; the teacher saw the observed positions without the noise.
    """

    name: Literal["ppt_student"]
    paths: Weight = 1.0
    destinations: Weight = 1.0
    features: Weight = 1.0
    truth: Weight = 1.0
    ranking: Weight = 1.0
    balance: Balance = 0.0
    jitter: Jitter = 0.0


class Recipe(Section):
    """Keys of ``train`` that a stage of its own has otherwise."""

    epochs: Positive | None = None
    batch_size: Positive | None = None
    accumulate: Positive | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    warmup: Fraction | None = None


class SelfDistillation(Section):
    """Generations of an extractive question answering model, each taught by the one before; ``train`` is the recipe of
    the cross-lingual stage, ``first`` of the stage in one language before it (None leaves it out).

    The loss is ``ce`` x cross-entropy + ``kd`` x coefficient x KD. ``coefficient``: ``map`` is how high the right
    positions stand among the teacher's ``k`` best, ``constant`` is 1. ``strict`` counts the very position alone,
    ``symmetric`` also the fifth position behind it; ``every_hit`` is the true AP@k; ``per_example`` gives each window
    its own coefficient. ``stop``: the stage after which to stop, to measure what the first one alone reaches.
    ``cache``: compute a generation's teacher logits once, before its first step.
    """

    name: Literal["self_distillation"]
    first: Recipe | None = Recipe()
    stop: Literal["first", "generations"] = "generations"
    ce: Weight = 1.0
    kd: Weight = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    coefficient: Literal["map", "constant"] = "map"
    k: Positive = 10
    tolerance: Annotated[int, Field(ge=0)] = 5
    symmetric: bool = False
    strict: bool = False
    every_hit: bool = False
    per_example: bool = False
    cache: bool = True

    @model_validator(mode="after")
    def _sound(self) -> SelfDistillation:
        if not self.ce and not self.kd:
            raise ValueError("ce and kd are both 0, so there is nothing to learn from")
        if self.stop == "first" and self.first is None:
            raise ValueError("stop: first needs the first stage; give first a section")
        return self


class QaStudent(Section):
    """A smaller encoder out of the teacher's layers and vocabulary, distilled from it on all training windows.

    ``ce``, ``kd`` and ``hidden`` weigh cross-entropy, softened logits, and the squared difference of layer-normalised
    hidden states. ``vocabulary``: ``used`` keeps the pieces of all texts of the training articles, and ``extra_pieces``
    others. ``intermediate_size``: how many intermediate neurons the distilled student keeps in each layer (None: all);
    ``repair``: the training after the others are cut (None: none). What it leaves out is as in ``train``.
    """

    name: Literal["qa_student"]
    ce: Weight = 0.5
    kd: Weight = 1.0
    hidden: Weight = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    vocabulary: Literal["used", "full"] = "used"
    extra_pieces: Annotated[int, Field(ge=0)] = 0
    intermediate_size: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None
    repair: Annotated[Recipe | None, Field(exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _sound(self) -> QaStudent:
        if self.repair is not None and self.intermediate_size is None:
            raise ValueError("repair is the training after a cut; give intermediate_size too, or leave repair out")
        return self


OPTIONS: dict[str, type[Section]] = {
    "plain": Plain,
    "fitnet": FitNet,
    "vkd": VkD,
    "inverted_projection": InvertedProjection,
    "hinton": Hinton,
    "prockd": ProCKD,
    "ppt": PPT,
    "ppt_student": PPTStudent,
    "self_distillation": SelfDistillation,
    "qa_student": QaStudent,
}
TRAJECTORY = frozenset({"ppt", "ppt_student"})
QUESTIONS = frozenset({"self_distillation", "qa_student"})
NEEDS_TEACHER = frozenset(OPTIONS) - TRAJECTORY - QUESTIONS - {"plain"}
