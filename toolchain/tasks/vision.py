"""What image tasks share: their config sections, augmentation as a set of views, and the way to their networks.

Imports numpy and pydantic only; the functions at the end import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, field_validator, model_validator

from toolchain.artifact import EdgestillError, digest, sha256
from toolchain.methods.options import NEEDS_TEACHER, QUESTIONS, TRAJECTORY
from toolchain.section import Section

if TYPE_CHECKING:
    from torch import nn

    from toolchain.stage import Job
    from toolchain.tasks import Data

__all__ = [
    "STAGES",
    "StudentSection",
    "TeacherSection",
    "batches",
    "deploy",
    "dry_run",
    "features",
    "files_state",
    "hookable",
    "load_student",
    "load_teacher",
    "scorer",
    "student",
    "teacher",
]

STAGES = ("features", "teacher")

Images = NDArray[np.uint8]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]
Side = Annotated[int, Field(ge=8, le=4096)]


def _weights(value: str) -> str:
    named = value in ("hub", "random") or (value.startswith("package:") and len(value) > len("package:"))
    if not named and not value.endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise ValueError(
            "expected hub, random, package:<distribution> or the path of a .safetensors, .pth, .pt or .bin file"
        )
    return value


Weights = Annotated[str, AfterValidator(_weights)]


class ViewError(EdgestillError):
    """The views asked for do not exist on images of this size."""


class Views(Section):
    """Augmentation as a fixed set of views of the whole dataset, so that teacher features can be cached.

    View 0 is the image; with ``flip`` view 1 is its mirror image; every other view is one transform drawn from
    ``seed``: a mirroring or none, and a shift of at most ``shift`` times the side, in whole pixels.
    """

    count: Positive = 1
    flip: bool = False
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    seed: Seed = 0

    @model_validator(mode="after")
    def _used(self) -> Views:
        if self.count == 1 and (self.flip or self.shift):
            raise ValueError("flip and shift make views beside the image itself; set count to 2 or more")
        return self


class DataBase(Section):
    """Keys of every image dataset.

    ``path``: the folder of a dataset of your own, or the data folder (default: EDGESTILL_DATA, else a cache folder).
    ``val_fraction`` and ``test_fraction``: shares drawn from the training images where the source has no such split.
    ``train_samples``: use that many training images, balanced over the classes.
    """

    path: str | None = None
    val_fraction: Share = 0.1
    test_fraction: Share = 0.2
    split_seed: Seed = 0
    train_samples: Positive | None = None
    download: bool = False
    views: Views = Views()


class ProbeSection(Section):
    """The linear probe that makes the teacher a reference on the student's task."""

    epochs: Positive = 40
    batch_size: Positive = 256
    lr: Annotated[float, Field(gt=0)] = 5e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3


class TeacherSection(Section):
    """A timm model as teacher.

    ``weights``: ``hub``, ``random`` (drawn from ``seed``: the control), ``package:<distribution>`` (an installed
    package that carries them) or the path of a .safetensors, .pth, .pt or .bin file. ``taps``: names of the layers
    whose maps are distilled (None: the last block of the last three stages), pooled to at most ``grid`` positions a
    side. Images are resized to ``image_size`` (side, or height and width) for the teacher.
    """

    model: Annotated[str, Field(min_length=1)]
    weights: Weights = "hub"
    seed: Seed = 0
    taps: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    image_size: Side | tuple[Side, Side] = 96
    grid: Positive | None = None
    batch_size: Positive = 64
    probe: ProbeSection = ProbeSection()

    @field_validator("taps")
    @classmethod
    def _distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("expected each layer once")
        return value


class StudentSection(Section):
    """The network that ships: ``small_cnn``, a timm name, or ``package.module:function`` of your own.

    ``options`` are keyword arguments of a timm model or of your function; ``weights`` as for a teacher.
    """

    model: Annotated[str, Field(min_length=1)] = "small_cnn"
    width: Positive = 32
    options: dict[str, Any] = Field(default_factory=dict)
    weights: Weights = "random"
    max_parameters: Positive | None = None

    @model_validator(mode="after")
    def _sound(self) -> StudentSection:
        if self.model == "small_cnn" and self.weights == "hub":
            raise ValueError("small_cnn has no weights on the hub; use weights: random or a file of your own")
        return self


def transforms(views: Views, height: int, width: int) -> list[tuple[bool, int, int]]:
    """(mirrored, dy, dx) of each view, in pixels of an image (height, width). Raises ViewError."""
    reach_y, reach_x = int(views.shift * height + 1e-9), int(views.shift * width + 1e-9)
    if views.shift and not (reach_y or reach_x):
        raise ViewError(
            f"views.shift {views.shift:g} of {height}x{width} pixels is less than one pixel; raise it or set 0"
        )
    most = (2 if views.flip else 1) * (2 * reach_y + 1) * (2 * reach_x + 1)
    if views.count > most:
        raise ViewError(
            f"views.count {views.count}: only {most} distinct views exist with flip={views.flip} and "
            f"shift={views.shift:g} on {height}x{width} pixels; lower count, or raise shift"
        )
    found = [(False, 0, 0), (True, 0, 0)] if views.flip else [(False, 0, 0)]
    rng = np.random.default_rng(views.seed)
    while len(found) < views.count:
        drawn = (
            bool(views.flip and rng.integers(2)),
            int(rng.integers(-reach_y, reach_y + 1)),
            int(rng.integers(-reach_x, reach_x + 1)),
        )
        if drawn not in found:
            found.append(drawn)
    return found[: views.count]


def apply_view(images: Images, view: int, views: Views) -> Images:
    """View number ``view`` of ``images`` (N, H, W, C); what a shift uncovers repeats the edge. Raises ViewError."""
    rows, columns = _gather(view, views, *images.shape[1:3])
    return images if view == 0 else images[:, rows.clip(0, len(rows) - 1)[:, None], columns.clip(0, len(columns) - 1)]


def apply_view_mask(masks: NDArray[Any], view: int, views: Views, ignore_index: int) -> NDArray[Any]:
    """The same for ``masks`` (N, H, W); what a shift uncovers is ``ignore_index``."""
    rows, columns = _gather(view, views, *masks.shape[1:3])
    if view == 0:
        return masks
    moved = masks[:, rows.clip(0, len(rows) - 1)[:, None], columns.clip(0, len(columns) - 1)]
    moved[:, (rows < 0) | (rows >= len(rows))] = ignore_index
    moved[:, :, (columns < 0) | (columns >= len(columns))] = ignore_index
    return moved


def _gather(view: int, views: Views, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column each output pixel comes from; outside the image where a shift uncovers."""
    chosen = transforms(views, height, width)
    if not 0 <= view < len(chosen):
        raise ViewError(f"expected a view in 0..{len(chosen) - 1}, found {view}")
    mirrored, dy, dx = chosen[view]
    columns = np.arange(width) - dx
    return np.arange(height) - dy, width - 1 - columns if mirrored else columns


def check(config: Any, height: int, width: int) -> list[tuple[tuple[Any, ...], str]]:
    """Faults between sections that image tasks share, as (key path, message)."""
    faults: list[tuple[tuple[Any, ...], str]] = []
    method = getattr(config.method, "name", None)
    if method in TRAJECTORY | QUESTIONS:
        kind = "trajectories" if method in TRAJECTORY else "questions"
        faults.append((("method",), f"{method} is for {kind}; for pictures choose another, such as prockd"))
    elif config.teacher is None and method in NEEDS_TEACHER:
        faults.append(
            (("teacher",), f"method {method} learns from a teacher; add a teacher section, or use method: plain")
        )
    try:
        transforms(config.data.views, height, width)
    except ViewError as error:
        faults.append((("data", "views"), str(error)))
    return faults


def student(config: Mapping[str, Any], info: Mapping[str, Any]) -> nn.Module:
    """A new student from the sections ``seed``, ``task`` and ``student``; ``info`` is the data's."""
    from toolchain.tasks import vision_nets

    section = StudentSection.model_validate(config["student"])
    return vision_nets.build_student(section, info, config["task"], config["seed"])


def load_student(folder: Any) -> nn.Module:
    """The trained student of a student artifact."""
    from toolchain.tasks import vision_nets

    return vision_nets.load_student(folder)


def load_teacher(folder: Any) -> nn.Module:
    """The reference teacher, with its probe, of a teacher artifact."""
    from toolchain.tasks import teacher as module

    return module.load_teacher(folder)


def deploy(model: nn.Module, config: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
    """The Deploy of ``model``: uint8 images in, decoded predictions out."""
    from toolchain.tasks import vision_nets

    return vision_nets.deploy(model, config, info)


def features(job: Job) -> None:
    """Stage: cache the teacher's features of every view."""
    from toolchain.tasks import teacher as module

    module.features(job)


def teacher(job: Job) -> None:
    """Stage: train the probe that makes the teacher a reference on this task."""
    from toolchain.tasks import teacher as module

    module.teach(job)


def batches(run: Any, *wanted: str) -> Any:
    """The training batches of a run, with the teacher's ``wanted``: ``tokens``, ``pooled``, ``teacher_logits``."""
    from toolchain.tasks import vision_batches

    return vision_batches.batches(run, *wanted)


def scorer(run: Any, split: str = "val") -> Any:
    """A function from a module to its scores on a split of a run's data."""
    from toolchain.tasks import vision_batches

    return vision_batches.scorer(run, split)


def hookable(config: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, type, output shape) of every layer that ``teacher.taps`` can name."""
    from toolchain.tasks import teacher_net

    return teacher_net.hookable_layers(config.teacher)


def files_state(section: Any) -> str | None:
    """A digest of the user's own files that a section names: when they change, what was made of them is stale.

    Of a data folder it covers names, sizes and times; of a weights file the content.
    """
    if isinstance(section, DataBase):
        place = section.path or getattr(section, "dataset", None)
        if getattr(section, "source", None) not in ("folder", "huggingface") or not place or not Path(place).is_dir():
            return None
        files = [(str(path), path.stat()) for path in sorted(Path(place).rglob("*")) if path.is_file()]
        return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in files])
    weights = Path(section.weights).expanduser()
    return sha256(weights) if weights.is_file() else None


def dry_run(config: Any, data: Data) -> dict[str, str]:
    """Build student and teacher, run two pictures through them, and describe their shapes."""
    from toolchain.tasks import teacher as module

    return module.dry_run(config, data)
