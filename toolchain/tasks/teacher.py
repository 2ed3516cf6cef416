"""The reference teacher: a linear probe on the frozen teacher, trained on the student's task from cached features."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from toolchain.artifact import create, verify, versions
from toolchain.checkpoint import save_tensors
from toolchain.stage import Job, progress
from toolchain.tasks import Data, load_data, load_task
from toolchain.tasks.backbones import WEIGHTS, load_safetensors, load_state, seeded, state_sha256
from toolchain.tasks.features import FeatureCacheError, Features, features, load_features
from toolchain.tasks.nets import count_parameters
from toolchain.tasks.teacher_net import Extractor, TeacherBody, TeacherError, hookable, hookable_layers
from toolchain.tasks.vision import TeacherSection, apply_view_mask
from toolchain.tasks.vision_nets import build_student, normalise

__all__ = [
    "Extractor",
    "FeatureCacheError",
    "Features",
    "Probe",
    "ProbeTeacher",
    "TeacherBody",
    "TeacherError",
    "dry_run",
    "features",
    "hookable",
    "hookable_layers",
    "load_features",
    "load_probe",
    "load_teacher",
    "teach",
]

Array = NDArray[Any]
PICTURES_PER_STEP = 32  # of a dense probe, whose every position is a sample
TRAINED_SIDE = 64  # a dense probe is trained on masks thinned to about this side


class Probe(nn.Module):
    """What a linear reading of the teacher knows of the student's task.

    Classification: pooled features (B, D) -> logits (B, classes). Segmentation (``grid`` given): standardised tokens
    (B, L, C) -> logits (B, classes, H, W), bilinear.
    """

    def __init__(self, width: int, classes: int, grid: tuple[int, int] | None, size: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.size = grid, size
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        logits: Tensor = self.linear(features)
        if self.grid is None:
            return logits
        maps = logits.transpose(1, 2).reshape(-1, self.linear.out_features, *self.grid)
        return F.interpolate(maps, size=size or self.size, mode="bilinear", align_corners=False)


class ProbeTeacher(nn.Module):
    """Teacher and probe in one: a picture (B, C, H, W), normalised as for the student, to logits on its task."""

    token_mean: Tensor
    token_std: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, body: TeacherBody, probe: Probe, info: Mapping[str, Any]) -> None:
        super().__init__()
        self.body, self.probe = body, probe
        channels = sum(body.tap_channels)
        self.register_buffer("token_mean", torch.zeros(channels))
        self.register_buffer("token_std", torch.ones(channels))
        for name, value in (("offset", info["mean"]), ("scale", info["std"])):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        pixels = image * self.scale + self.offset
        if self.probe.grid is None:
            return cast("Tensor", self.probe(self.body.pooled(pixels)))
        tokens, _ = self.body(pixels)
        return cast("Tensor", self.probe((tokens - self.token_mean) / self.token_std))


# --- training


def teach(job: Job) -> None:
    """Stage: train the probe on the cached features of every view; the epoch with the least validation loss stays."""
    data = load_data(job.inputs["data"])
    cached = load_features(job.inputs["features"], data_folder=job.inputs["data"], config=job.config)
    dense = cached.pooled is None
    height, wide = data.info["image_size"]
    width = cached.taps.shape[-1] if cached.pooled is None else cached.pooled.shape[-1]
    grid = cached.grid if dense else None
    with seeded(job.config["seed"]):
        probe = Probe(width, len(data.info["classes"]), grid, (height, wide))
        history = _fit(probe, cached, data)
    model = ProbeTeacher(TeacherBody(cached.section, cached.channels), probe, data.info).eval()
    model.token_mean.copy_(torch.from_numpy(cached.mean))
    model.token_std.copy_(torch.from_numpy(cached.std))
    task = load_task(job.config["task"])
    with create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        save_tensors(draft.path / WEIGHTS, model.state_dict())
        shape = {"width": width, "classes": len(data.info["classes"]), "grid": list(grid) if grid else None}
        draft.extra = {
            "info": data.info,
            "parameters": count_parameters(model),
            "probe": shape | {"epochs": history},
            "teacher_sha256": state_sha256(model.body.net),
        }
        draft.metrics = {"val": task.score(_predict(probe, cached), data.splits["val"])}
        draft.versions = versions("torch", "timm", "numpy")


def _fit(probe: Probe, cached: Features, data: Data) -> list[dict[str, float]]:
    """AdamW with a cosine to zero. Returns training and validation loss of each epoch."""
    section, dense = cached.section.probe, cached.pooled is None
    source = cast("Array", cached.taps if dense else cached.pooled)
    ignore = data.info.get("ignore_index")
    mean, std = _moments(source) if not dense else (0.0, 1.0)
    labels = [_labels(data, "train", view, cached) for view in range(len(source))]
    thin = max(1, min(probe.size) // TRAINED_SIDE) if dense else 1
    small = _thinned(labels[0], thin).shape[1:] if dense else None

    def loss_of(features: Array, truth: Array) -> Tensor:
        x = torch.from_numpy((features.astype(np.float32) - mean) / std)
        y = torch.from_numpy(np.ascontiguousarray(_thinned(truth, thin) if dense else truth).astype(np.int64))
        return F.cross_entropy(probe(x, small), y, ignore_index=-100 if ignore is None else ignore)

    size = min(section.batch_size, PICTURES_PER_STEP) if dense else section.batch_size
    steps = section.epochs * len(source) * math.ceil(source.shape[1] / size)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=section.lr, weight_decay=section.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    with progress("teacher probe", section.epochs) as bar:
        for _ in range(section.epochs):
            losses = []
            for view, index in _shuffled(len(source), source.shape[1], size):
                loss = loss_of(source[view, index], labels[view][index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            val = _validation(cached, data, loss_of, size)
            if not math.isfinite(val):
                raise TeacherError(
                    f"teacher.probe: expected a finite validation loss, found {val} in epoch {len(history) + 1}; lower "
                    f"teacher.probe.lr (now {section.lr:g})"
                )
            history.append({"train_loss": float(np.mean(losses)), "val_loss": val})
            if val <= min(entry["val_loss"] for entry in history):
                best = {name: value.clone() for name, value in probe.state_dict().items()}
            bar.advance()
            bar.update(f"teacher probe: val loss {val:.3g}")
    probe.load_state_dict(best)
    if not dense:  # the probe reads raw pooled features from here on
        with torch.no_grad():
            probe.linear.weight.div_(torch.as_tensor(std))
            probe.linear.bias.sub_(probe.linear.weight @ torch.as_tensor(mean))
    return history


def _moments(pooled: Array) -> tuple[Array, Array]:
    """Mean and deviation of each pooled feature over the identity view."""
    identity = pooled[0].astype(np.float32)
    std = identity.std(0)
    return identity.mean(0), np.where(std > 1e-5 * std.max(), std, 1.0).astype(np.float32)


def _labels(data: Data, split: str, view: int, cached: Features) -> Array:
    labels = data.splits[split].arrays["label"]
    if labels.ndim == 1:
        return labels
    return apply_view_mask(labels, view, cached.views, data.info["ignore_index"])


def _thinned(masks: Array, step: int) -> Array:
    return masks[:, step // 2 :: step, step // 2 :: step]


def _shuffled(views: int, count: int, size: int) -> list[tuple[int, Array]]:
    """(view, sample indices) of each step of an epoch, from torch's random state."""
    orders = [torch.randperm(count).numpy() for _ in range(views)]
    starts = range(0, count, size)
    batches = [(view, np.sort(order[at : at + size])) for view, order in enumerate(orders) for at in starts]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


@torch.no_grad()
def _validation(cached: Features, data: Data, loss_of: Callable[[Array, Array], Tensor], size: int) -> float:
    source, labels = _validation_source(cached)[0], _labels(data, "val", 0, cached)
    parts = [slice(start, start + size) for start in range(0, len(source), size)]
    return float(
        np.average([loss_of(source[p], labels[p]).item() for p in parts], weights=[len(source[p]) for p in parts])
    )


def _validation_source(cached: Features) -> Array:
    return cached.val_taps if cached.val_pooled is None else cached.val_pooled


@torch.no_grad()
def _predict(probe: Probe, cached: Features) -> dict[str, Array]:
    """The probe's predictions on ``val``."""
    source, outputs = _validation_source(cached)[0], []
    for start in range(0, len(source), PICTURES_PER_STEP):
        part = np.array(source[start : start + PICTURES_PER_STEP], np.float32)
        outputs.append(probe(torch.from_numpy(part)).softmax(1).numpy())
    probabilities = np.concatenate(outputs)
    return {"probabilities": probabilities, "label": probabilities.argmax(1)}


# --- loading


def _probe_of(manifest_extra: Mapping[str, Any]) -> Probe:
    shape, (height, wide) = manifest_extra["probe"], manifest_extra["info"]["image_size"]
    grid = (shape["grid"][0], shape["grid"][1]) if shape["grid"] else None
    return Probe(shape["width"], shape["classes"], grid, (height, wide))


def load_teacher(folder: Path | str) -> ProbeTeacher:
    """Teacher and probe from their artifact alone, in eval mode. Raises ArtifactError, ModelError."""
    manifest = verify(folder)
    info = manifest.extra["info"]
    body = TeacherBody(TeacherSection.model_validate(manifest.config["teacher"]), int(info["channels"]), "random")
    model = ProbeTeacher(body, _probe_of(manifest.extra), info)
    load_state(model, Path(folder) / WEIGHTS)
    return model.eval()


def load_probe(folder: Path | str) -> Probe:
    """The probe alone, for cached features: ``probe(pooled)``, or for segmentation ``probe(tokens)``, gives logits."""
    manifest = verify(folder)
    probe = _probe_of(manifest.extra)
    state = load_safetensors(Path(folder) / WEIGHTS)
    probe.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("probe.")})
    return probe.eval().requires_grad_(False)


def dry_run(cfg: Any, data: Data) -> dict[str, str]:
    """Build student and teacher and run two pictures through them; their shapes, to be shown."""
    pictures = np.array(data.splits["train"].arrays["image"][:2])
    student = build_student(cfg.student, data.info, cfg.task, cfg.seed).eval()
    with torch.inference_mode():
        map_ = student.features(normalise(torch.from_numpy(pictures), data.info))
        logits = student.head(map_)
    shown = {
        "student": f"{cfg.student.model}, {count_parameters(student):,} parameters, features {_shape(map_)}, "
        f"logits {_shape(logits)}"
    }
    if cfg.teacher is not None:
        body = TeacherBody(cfg.teacher, pictures.shape[-1])
        Extractor(body, 2)(pictures)
        taps = ", ".join(f"{name} ({width})" for name, width in zip(body.taps, body.tap_channels, strict=True))
        shown["teacher"] = (
            f"{cfg.teacher.model}, {count_parameters(body):,} parameters, taps {taps} on a grid of "
            f"{body.grid[0]}x{body.grid[1]}, pooled {body.pooled_width}"
        )
    return shown


def _shape(value: Tensor) -> str:
    return json.dumps(list(value.shape[1:]))
