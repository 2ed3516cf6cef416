"""Students for pictures, and the adapter that makes a trained network deployable.

A body gives a feature map, a head reads it: ``Student`` keeps the two apart because distillation meets the student
between them. Bodies: the built-in ``small_cnn``, any timm model, or any ``nn.Module`` of the user's own.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolchain.artifact import Port, verify
from toolchain.tasks.backbones import (
    WEIGHTS,
    ModelError,
    as_map,
    fit,
    load_state,
    read_weights,
    seeded,
    timm_model,
    weight_file,
)
from toolchain.tasks.nets import Deploy, count_parameters, is_own, made_by, own

# --- pictures to tensors


def normalise(image: Tensor, info: Mapping[str, Any]) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32, standardised by ``info["mean"]`` and ``info["std"]`` (in 0..1)."""
    mean = torch.tensor(info["mean"], dtype=torch.float32, device=image.device)
    std = torch.tensor(info["std"], dtype=torch.float32, device=image.device)
    return _affine(image, 1 / (255 * std), -mean / std)


def _affine(image: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return image.float().permute(0, 3, 1, 2) * scale[:, None, None] + offset[:, None, None]


class Normalise(nn.Module):
    """``normalise`` as a module: part of the deployed graph."""

    scale: Tensor
    offset: Tensor

    def __init__(self, info: Mapping[str, Any]) -> None:
        super().__init__()
        mean, std = torch.tensor(info["mean"]), torch.tensor(info["std"])
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("offset", -mean / std)

    def forward(self, image: Tensor) -> Tensor:
        return _affine(image, self.scale, self.offset)


# --- heads


class ClassHead(nn.Module):
    """LayerNorm over channels at each position, mean over positions, Linear: (B, d, h, w) -> (B, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.norm(features.flatten(2).transpose(1, 2))
        return self.linear(tokens.mean(1))  # type: ignore[no-any-return]


class MaskHead(nn.Module):
    """LayerNorm at each position, 1x1 convolution, bilinear: (B, d, h, w) -> (B, classes, H, W)."""

    def __init__(self, width: int, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, classes, 1)
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        normed = self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.interpolate(self.conv(normed), size=self.size, mode="bilinear", align_corners=False)


class Student(nn.Module):
    """All that ships: ``head(features(image))``.

    ``features``: (B, C, H, W) normalised -> (B, width, h, w). ``head`` reads a map of any grid.
    """

    def __init__(self, body: nn.Module, head: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head, self.width = body, head, width

    def features(self, image: Tensor) -> Tensor:
        value: Tensor = self.body(image)
        return value if value.ndim == 4 else value[:, :, None, None]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))  # type: ignore[no-any-return]


# --- the built-in body


def _conv(inside: int, outside: int, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Module:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inside, outside, kernel, stride, padding, dilation, groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outside))


class Separable(nn.Module):
    """Residual depthwise-separable convolution."""

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise = _conv(width, width, dilation=dilation, groups=width)
        self.pointwise = _conv(width, width, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.pointwise(F.relu(self.depthwise(x))))


class Context(nn.Module):
    """Add a projection of the picture's mean to every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.project(x.mean((2, 3), keepdim=True)))


def small_cnn(
    channels: int, size: tuple[int, int], width: int, dense: bool, depth: int | None = None, grid: int = 8
) -> nn.Module:
    """Three convolutions (width, 2 width, 4 width), then ``depth`` separable ones (2, or 4 for dense tasks).

    Strides are chosen so that the map is at most ``grid`` x ``grid`` for classification, and 1/8 of the side for dense
    tasks.
    With width 32: 0.13 M parameters, dense 0.19 M.
    """
    halvings = 3 if dense else max(0, math.ceil(math.log2(max(size) / grid)))
    strides = [2 if halvings > 2 - i else 1 for i in range(3)] if halvings < 3 else [2, 2, 2]
    layers: list[nn.Module] = [_conv(channels, width, stride=strides[0]), nn.ReLU()]
    for _ in range(halvings - 3):
        layers += [_conv(width, width, stride=2), nn.ReLU()]
    layers += [_conv(width, 2 * width, stride=strides[1]), nn.ReLU(), Separable(2 * width)]
    layers += [_conv(2 * width, 4 * width, stride=strides[2]), nn.ReLU()]
    depth = (4 if dense else 2) if depth is None else depth
    layers += [Separable(4 * width, dilation=2 ** (i % 4) if dense else 1) for i in range(depth)]
    return nn.Sequential(*layers, *([Context(4 * width)] if dense else []))


class TimmBody(nn.Module):
    """A timm model's last features as a map."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        value = self.net.forward_features(image)  # type: ignore[operator]
        return as_map(value, self.net, (height, width), int(self.net.num_features))  # type: ignore[arg-type]


# --- building and loading


def build_student(section: Any, info: Mapping[str, Any], task: str, seed: int, weights: str | None = None) -> Student:
    """The student of a ``StudentSection``, drawn from ``seed`` alone; ``weights`` overrides the section's.

    A dotted ``model`` is called with the section's ``options`` and returns any module from a normalised picture
    (B, C, H, W) to a map (B, d, h, w) or a vector (B, d). Raises ModelError.
    """
    height, wide = info["image_size"]
    size, channels, dense = (height, wide), int(info["channels"]), task.endswith("segmentation")
    source = weights or section.weights
    mine = section.model == "small_cnn" or is_own(section.model)
    with seeded(seed):
        if section.model == "small_cnn":
            body = made_by(small_cnn, section, channels=channels, size=size, width=section.width, dense=dense)
        elif mine:
            body = made_by(own(section.model), section)
        else:
            body = _timm(section, size, channels, source, seed)
        width = _width(body, (1, channels, *size), section.model)
        classes = len(info["classes"])
        student = Student(body, MaskHead(width, classes, size) if dense else ClassHead(width, classes), width)
    if mine and source != "random":
        _read_own(body, source)
    found, allowed = count_parameters(student), section.max_parameters
    if allowed is not None and found > allowed:
        raise ModelError(
            f"student.max_parameters: allowed {allowed:,}, found {found:,} in {section.model}; "
            "lower student.width or choose a smaller model"
        )
    return student


def _timm(section: Any, size: tuple[int, int], channels: int, weights: str, seed: int) -> nn.Module:
    options = section.options
    try:
        net = timm_model(section.model, size=size, channels=channels, weights=weights, seed=seed, options=options)
    except ModelError as error:
        raise ModelError(f"student.model: {error} (or small_cnn, or your own package.module:function)") from error
    return TimmBody(net)


def _read_own(body: nn.Module, weights: str) -> None:
    """Weights of a body that is not timm's: a file of its state dict, or of a whole student's."""
    file = weight_file(weights)
    if file is None:
        raise ModelError(f"student.weights {weights!r}: only timm models are on the hub; use random or a file")
    found = read_weights(file)
    mine = {name.removeprefix("body."): value for name, value in found.items() if name.startswith("body.")} or found
    fit(body, mine, file)


def _width(body: nn.Module, shape: tuple[int, ...], name: str) -> int:
    modes = {module: module.training for module in body.modules()}
    try:
        with torch.no_grad():
            value = body.eval()(torch.zeros(shape))
    except Exception as error:  # a user's module may raise anything
        raise ModelError(f"student.model {name} fails on a picture {list(shape)}: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(value, Tensor) or value.ndim not in (2, 4):
        shown = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(f"student.model {name}: expected a map (B, d, h, w) or a vector (B, d), found {shown}")
    return int(value.shape[1])


def load_student(folder: Path | str) -> Student:
    """A trained student from its artifact alone, in eval mode. Raises ArtifactError, ModelError."""
    from toolchain.tasks.vision import StudentSection

    folder = Path(folder)
    manifest = verify(folder)
    section = StudentSection.model_validate(manifest.config["student"])
    task = manifest.config["task"]
    student = build_student(section, manifest.extra["info"], task, manifest.config.get("seed", 0), "random")
    method = manifest.config.get("method") or {}
    if method.get("infer") == "aug":
        prockd = importlib.import_module("toolchain.methods.prockd")
        student = prockd.aug_student(student, method)
    load_state(student, folder / WEIGHTS)
    return student.eval()


# --- deployment


class Decoded(nn.Module):
    """uint8 picture in, ``probabilities`` and ``label`` out."""

    def __init__(self, model: nn.Module, info: Mapping[str, Any]) -> None:
        super().__init__()
        self.normalise, self.model = Normalise(info), model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(self.normalise(image))
        return logits.softmax(1), logits.argmax(1)


def deploy(model: nn.Module, config: Mapping[str, Any], info: Mapping[str, Any]) -> Deploy:
    """``model`` (from a normalised picture to logits over classes in dimension 1) as a self-contained graph."""
    height, width = info["image_size"]
    channels, classes = int(info["channels"]), len(info["classes"])
    place: tuple[int | str, ...] = (height, width) if str(config["task"]).endswith("segmentation") else ()
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    shape = ("batch", height, width, channels)
    generator = torch.Generator().manual_seed(0)
    return Deploy(
        module=Decoded(model, info).eval(),
        inputs=[Port("image", "uint8", shape, f"{colour} picture", "0..255")],
        outputs=[
            Port("probabilities", "float32", ("batch", classes, *place), "probability of each class", "0..1"),
            Port("label", "int64", ("batch", *place), "most probable class", "index"),
        ],
        example={"image": torch.randint(0, 256, (2, height, width, channels), dtype=torch.uint8, generator=generator)},
        dynamic={"image": {0: "batch"}},
    )
