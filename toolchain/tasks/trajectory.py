"""Pedestrian trajectories: the last observed positions in, K futures and their probabilities out; minADE in metres.

Every hypothesis keeps its place among the K: they are not sorted. Errors are the least over the K hypotheses
(``minADE``, ``minFDE``, each with its own least), the mean over them (``meanADE``, ``meanFDE``), and that of the most
probable one (``topADE``, ``topFDE``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from toolchain import metrics
from toolchain.config import TrainSection
from toolchain.methods.options import PPT, TRAJECTORY
from toolchain.section import Section
from toolchain.tasks import Arrays, Data, Split, track_data
from toolchain.tasks.track_data import DataSection, prepare

if TYPE_CHECKING:
    from torch import nn

    from toolchain.stage import Job

__all__ = ["DataSection", "prepare"]

HEADLINE = "minADE"
HIGHER_IS_BETTER = False
UNIT = "m"
DIGITS = 3
STAGES = ("teacher", "predictions")
AGREES_WITHIN = 0.01  # of the mean distance travelled: 4 cm for a pedestrian
PUBLISHED = {"weight_decay": 0.0, "batch_size": 256, "schedule": "constant", "warmup": 0.0}  # of ``train``
SCALES = {"m": 30.0, "px": 1.0}
LIMITS = {  # of differences in metres
    "fp32": {"max_difference": 1e-3, "agreement": 0.999, "metric_drop": 1e-4},
    "fp16": {"max_difference": 0.05, "agreement": 0.98, "metric_drop": 0.002},
    "int8-cpu": {"agreement": 0.0, "metric_drop": 0.01},
    "int8-trt": {"agreement": 0.0, "metric_drop": 0.01},
}
MAX_DROP = 0.01  # metres

Positive = Annotated[int, Field(ge=1)]


class StudentSection(Section):
    """A network: ``ppt`` (two encoders of ``depth`` layers), ``one_shot`` or ``package.module:function`` of your own.

    ``scale``: what tracks are multiplied by for the losses (default 30 for metres, the pixels of the Stanford Drone
    Dataset, 1 for pixels); ``unit``: what the network divides them by inside. ``speed_floor``, in the data's unit a
    step: tracks are divided by their mean observed speed too, in floors, of at least one, so that a network knows
    speeds it was not trained on (give a ``unit`` that much smaller). ``align_heading``: tracks are turned so that the
    way from the first to the last observed position is along x, and predictions are turned back. Both are ours; task I
    then knows the mean of the observed steps before it has seen them. A function of your own is called with
    ``options`` and returns a module from observed (B, T_o, 2) to paths (B, K, T_p, 2) and logits (B, K).
    """

    model: Annotated[str, Field(pattern=r"^(ppt|one_shot|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")] = "one_shot"
    hypotheses: Positive = 20
    width: Positive = 64
    depth: Positive = 2
    heads: Positive = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    activation: Literal["gelu", "relu"] = "relu"
    scale: Annotated[float, Field(gt=0)] | None = None
    unit: Annotated[float, Field(gt=0)] = 60.0
    speed_floor: Annotated[Annotated[float, Field(gt=0)] | None, Field(exclude_if=lambda value: value is None)] = None
    align_heading: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    options: dict[str, Any] = Field(default_factory=dict)
    max_parameters: Positive | None = None

    @model_validator(mode="after")
    def _sound(self) -> StudentSection:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        for name in ("speed_floor", "align_heading"):
            if getattr(self, name) and self.model not in ("ppt", "one_shot"):
                raise ValueError(f"{name} is for ppt and one_shot; {self.model} normalises tracks itself; remove it")
        if self.options and self.model in ("ppt", "one_shot"):
            raise ValueError(f"options are for a function of your own; {self.model} has width, depth, heads, ...")
        return self

    def scale_of(self, unit: str) -> float:
        """What tracks in ``unit`` are multiplied by."""
        return SCALES[unit] if self.scale is None else self.scale


def defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Config values below a person's own; limits of tracks in pixels are 30 times those in metres (``SCALES``)."""
    unit = data.get("unit", "px" if data.get("source") == "sdd" else "m")
    factor = SCALES["m"] / SCALES["px"] if unit == "px" else 1.0
    limits = {
        name: {key: value if key == "agreement" else value * factor for key, value in found.items()}
        for name, found in LIMITS.items()
    }
    return {"export": {"parity": {"limits": limits}}, "report": {"max_drop": MAX_DROP * factor}}


def _published() -> StudentSection:
    return StudentSection(model="ppt", width=128, depth=3, heads=8, dropout=0.1, activation="gelu")


class TeacherSection(Section):
    """A PPT that teaches: ``student`` is its network, ``method`` and ``train`` its training on the same data. Keys that
    are not given are as published, but for the epochs, which are fewer; those of a network that is given are a
    student's.

    ``folder``: the student artifact of a finished run of ``method: ppt``, on the same data and with the same network,
    instead of a training. ``ensemble``: more such artifacts, of any PPT with as many hypotheses and the same scale; the
    paths of all are merged into K (see ``trajectory_ensemble``). ``mirrored``: each of them predicts the mirror
    image of a track too. ``versions``: in how many of the five versions of PPT's augmentation (of four at most with
    ``data.walk_axis``), drawn for each training window, the teacher predicts it for the student; with ``rotate`` each
    of them is turned by any angle, too, which is for a teacher that was trained so (``method.rotate``).
    """

    student: StudentSection = Field(default_factory=_published)
    method: PPT | None = None
    train: TrainSection | None = None
    folder: str | None = None
    ensemble: Annotated[tuple[str, ...], Field(exclude_if=lambda value: not value)] = ()
    mirrored: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    versions: Annotated[int, Field(ge=1, le=5)] = 5
    rotate: Annotated[bool, Field(exclude_if=lambda value: not value)] = False

    @property
    def merges(self) -> bool:
        """Whether the teacher's paths are those of several PPTs or views."""
        return bool(self.ensemble) or self.mirrored

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": "ppt"} | value if isinstance(value, dict) else value

    @field_validator("train", mode="before")
    @classmethod
    def _as_published(cls, value: Any) -> Any:
        return PUBLISHED | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _sound(self) -> TeacherSection:
        if self.student.model != "ppt":
            raise ValueError(f"the teacher is a PPT: expected student.model ppt, found {self.student.model}")
        if self.folder is not None and (self.method or self.train):
            raise ValueError("folder names a finished training: remove method and train, or remove folder")
        named = [Path(name).resolve() for name in (self.folder, *self.ensemble) if name is not None]
        if len(set(named)) < len(named):
            raise ValueError("ensemble: expected other PPTs than folder's, each once; remove what is named twice")
        if self.method is not None and self.method.branches:
            raise ValueError("method.branches needs a teacher of its own, which a teacher cannot have; set it to 0")
        if self.method is not None and self.method.winners > self.student.hypotheses:
            raise ValueError(_too_many(self.method, self.student))
        if self.train is not None and self.train.processes > 1:
            raise ValueError("train.processes: a teacher trains in one process; or give the folder of a finished run")
        return self


def _too_many(method: PPT, student: StudentSection) -> str:
    return f"method.winners: expected at most the {student.hypotheses} hypotheses, found {method.winners}"


def check(config: Any) -> list[tuple[tuple[Any, ...], str]]:
    """Faults between sections, as (key path, message)."""
    method, student, teacher = config.method, config.student, config.teacher
    name = getattr(method, "name", None)
    faults: list[tuple[tuple[Any, ...], str]] = []
    if "." not in str(name) and name not in TRAJECTORY:
        faults.append(
            (("method",), f"{name} is for pictures; for trajectories choose {' or '.join(sorted(TRAJECTORY))}")
        )
    trainings = {"": (method, config.train)}
    if teacher is not None and teacher.folder is None:
        trainings["teacher."] = (teacher.method, teacher.train or TrainSection.model_validate(PUBLISHED))
    for whose, (_, train) in trainings.items():
        select = f"{whose}train.select"
        if config.data.validation == "train" and train.select != "last":
            message = f"expected {select} last, found best, which would select by windows that trained; remove that key"
            faults.append((("data", "validation"), message))
        if config.data.validation == "test" and train.select != "best":
            message = f"expected {select} best, found {train.select}: nothing would be selected; remove the key"
            faults.append((("data", "validation"), message))
    rotates = [f"{whose}method.rotate" for whose, (how, _) in trainings.items() if getattr(how, "rotate", False)]
    asked = teacher is not None and teacher.rotate
    if config.data.walk_axis is not None and (turning := rotates + ["teacher.rotate"] * asked):
        message = f"keeps the axis that people walk along, and {turning[0]} turns windows by any angle"
        faults.append((("data", "walk_axis"), f"{message}; remove one of them"))
    if asked and teacher.folder is None and "teacher.method.rotate" not in rotates:
        message = "asks a PPT for windows at any angle, which it trains for with teacher.method.rotate; set it too"
        faults.append((("teacher", "rotate"), message))
    if name == "ppt" and student.model != "ppt":
        faults.append((("student", "model"), f"method ppt trains the network ppt, found {student.model}"))
    if name == "ppt" and method.winners > student.hypotheses:
        faults.append((("method", "winners"), _too_many(method, student)))
    if name == "ppt" and bool(method.branches) != (teacher is not None):
        message = "method ppt has a teacher if and only if method.branches is above 0; add or remove one of them"
        faults.append((("teacher",), message))
    if name == "ppt" and teacher is not None and teacher.merges:
        message = "method ppt takes the ways of one PPT; remove ensemble and mirrored, which merge several"
        faults.append((("teacher",), message))
    if name == "ppt_student" and teacher is None and (method.paths or method.destinations or method.features):
        message = "method ppt_student learns from a teacher; add a teacher section, or set"
        faults.append((("teacher",), f"{message} paths, destinations and features to 0"))
    if teacher is not None and teacher.student.hypotheses != student.hypotheses:
        message = f"expected the teacher's {teacher.student.hypotheses} hypotheses, found {student.hypotheses}"
        faults.append((("student", "hypotheses"), message))
    scales = [net.student.scale_of(config.data.unit) for net in (teacher, config) if net is not None]
    if scales[0] != scales[-1]:
        faults.append((("student", "scale"), f"expected the teacher's scale {scales[0]:g}, found {scales[-1]:g}"))
    return faults


def score(outputs: Arrays, split: Split) -> dict[str, float]:
    """ADE and FDE in the data's unit: least of K, mean over K, and of the most probable hypothesis."""
    paths, truth = np.asarray(outputs["trajectories"]), np.asarray(split.arrays["future"])
    top = np.asarray(outputs["probability"]).argmax(1)[:, None, None, None]
    first = metrics.displacement_errors(np.take_along_axis(paths, top, 1), truth)
    return metrics.displacement_errors(paths, truth) | {"topADE": first["minADE"], "topFDE": first["minFDE"]}


def interval(outputs: Arrays, split: Split) -> tuple[float, float] | None:
    """95 % interval of minADE, had other people been seen; None where there is one person."""
    least = metrics.errors(np.asarray(outputs["trajectories"]), np.asarray(split.arrays["future"])).mean(2).min(1)
    people = np.stack([split.arrays["scene"], split.arrays["agent"]], 1)
    person = np.unique(people, axis=0, return_inverse=True)[1].reshape(-1)
    return metrics.cluster_interval(np.bincount(person, least)[:, None], np.bincount(person)[:, None])


def agreement(a: Arrays, b: Arrays) -> float:
    """Share in [0, 1] of positions of ``b`` within 1 % of the mean distance travelled in ``a`` of those of ``a``."""
    first, second = (np.asarray(side["trajectories"], np.float64) for side in (a, b))
    if first.shape != second.shape or not first.size:
        raise metrics.MetricError(
            f"expected two non-empty arrays of one shape, found {first.shape} and {second.shape}; "
            "score the outputs of the split they were made from"
        )
    travelled = np.linalg.norm(np.diff(first, axis=2), axis=-1).sum(2).mean()
    near = np.linalg.norm(first - second, axis=-1) <= AGREES_WITHIN * travelled
    return float(near.mean())


def figures(split: Split, outputs: Mapping[str, Arrays]) -> list[tuple[str, bytes]]:
    """The report's pictures of the samples ``split``: title and PNG."""
    from toolchain.tasks import trajectory_figures

    return trajectory_figures.figures(split, outputs)


def files_state(section: Any) -> str | None:
    """A digest of the user's own files that a section names: when they change, what was made of them is stale."""
    if isinstance(section, DataSection):
        return track_data.files_state(section)
    if isinstance(section, TeacherSection):
        from toolchain.artifact import digest, is_whole, read

        named = [name for name in (section.folder, *section.ensemble) if name is not None]
        states = [read(Path(name)).id for name in named if is_whole(Path(name))]
        return states[0] if len(named) == 1 and states else digest(states) if states else None
    return None


def student(config: Mapping[str, Any], info: Mapping[str, Any]) -> nn.Module:
    """A new student from the sections ``seed`` and ``student``; ``info`` is the data's."""
    from toolchain.tasks import trajectory_nets

    return trajectory_nets.build(StudentSection.model_validate(config["student"]), info, config["seed"])


def network_of(config: Mapping[str, Any]) -> StudentSection:
    """The network section of a student's or a teacher's manifest."""
    found = config["student"] if "student" in config else config["teacher"]["student"]
    return StudentSection.model_validate(found)


def load_student(folder: Any) -> nn.Module:
    """The trained network of a student or teacher artifact."""
    from toolchain.artifact import read
    from toolchain.tasks import trajectory_nets

    return trajectory_nets.load(folder, network_of(read(folder).config))


def load_teacher(folder: Any) -> nn.Module:
    """The network of a teacher artifact: a PPT, or an ``Ensemble`` of several."""
    from toolchain.artifact import read
    from toolchain.tasks import trajectory_ensemble

    manifest = read(folder)
    section = TeacherSection.model_validate(manifest.config["teacher"])
    if not section.merges:
        return load_student(folder)
    members = [section.student, *map(StudentSection.model_validate, manifest.extra["ensemble"])]
    return trajectory_ensemble.load(folder, members, section.mirrored)


def deploy(model: nn.Module, config: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
    """The Deploy of ``model``: tracks in the data's own coordinates in, futures in the same out."""
    from toolchain.tasks import trajectory_nets

    return trajectory_nets.deploy(model, network_of(config), info)


def teacher(job: Job) -> None:
    """Stage: train the PPT that teaches, or take a finished one."""
    from toolchain.tasks import trajectory_teacher

    trajectory_teacher.teach(job)


def predictions(job: Job) -> None:
    """Stage: what the teacher predicts for every training window in every version."""
    from toolchain.tasks import trajectory_teacher

    trajectory_teacher.predictions(job)


def batches(run: Any, *wanted: str) -> Any:
    """The training batches of a run, with the teacher's ``wanted``: ``paths``, ``feature``."""
    from toolchain.tasks import trajectory_batches

    return trajectory_batches.batches(run, *wanted)


def scorer(run: Any, split: str = "val") -> Any:
    """A function from a network to its scores on a split of a run's data."""
    from toolchain.tasks import trajectory_batches

    return trajectory_batches.scorer(run, split)


def teacher_scores(run: Any, split: str) -> dict[str, float]:
    """The teacher's metrics on a split of a run's data: what a student can be held against."""
    from toolchain.tasks import trajectory_batches

    scored = trajectory_batches.scorer(run, split)(load_teacher(run.inputs["teacher"]).to(run.device))
    return dict(scored)


def dry_run(config: Any, data: Data) -> dict[str, str]:
    """Build the networks, which runs two tracks through each, check that the teacher can teach, and describe them."""
    from toolchain.methods import ppt_student
    from toolchain.tasks import trajectory_nets, trajectory_teacher
    from toolchain.tasks.nets import count_parameters

    shown = {}
    for key, section in (("student", config.student), ("teacher", config.teacher and config.teacher.student)):
        if section is not None:
            net = trajectory_nets.build(section, data.info, config.seed)
            if key == "student" and config.method.name == "ppt_student" and config.method.features:
                ppt_student.check_feature(net)
            shown[key] = f"{section.model}, {count_parameters(net):,} parameters, {section.hypotheses} hypotheses"
    if config.teacher:
        trajectory_teacher.check_finished(config.teacher, config.section("data"), data.info["unit"])
    if config.teacher and config.teacher.merges:
        others = [f"those of {len(config.teacher.ensemble)} more"] if config.teacher.ensemble else []
        others += ["those for the mirror image"] if config.teacher.mirrored else []
        shown["teacher"] += f"; its paths merged with {' and '.join(others)}"
    return shown
