"""The teacher of image tasks as a network: a timm model, the layers it is tapped at, and how pictures reach it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from toolchain.artifact import EdgestillError
from toolchain.tasks.backbones import ModelError, as_map, timm_model
from toolchain.tasks.vision import TeacherSection

Array = NDArray[Any]


class TeacherError(EdgestillError):
    """The teacher cannot be used as configured."""


class TeacherBody(nn.Module):
    """A timm model that gives the maps of its taps and its pooled features.

    Pictures come as (B, C, H, W) in 0..1 at the student's size; resizing (bilinear), grey to three channels, and the
    model's own standardisation happen here. ``grid`` is (h, w) of the tokens, ``tap_channels`` the taps' widths,
    ``pooled`` the width of the pooled features. Raises ModelError, TeacherError.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, section: TeacherSection, channels: int, weights: str | None = None) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise TeacherError(f"expected pictures of 1 or 3 channels for a teacher, found {channels}")
        side = section.image_size
        self.size = (side, side) if isinstance(side, int) else side
        try:
            net = timm_model(section.model, size=self.size, weights=weights or section.weights, seed=section.seed)
        except ModelError as error:
            raise ModelError(f"teacher: {error}") from error
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        config = cast("Mapping[str, Any]", net.pretrained_cfg)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(1, 3, 1, 1), persistent=False)
        self.taps = tuple(section.taps) if section.taps else automatic_taps(net, section.model)
        known = dict(net.named_modules())
        for name in self.taps:
            if name not in known:
                near = ", ".join(difflib.get_close_matches(name, list(known), 3, cutoff=0.4)) or "none"
                raise TeacherError(
                    f"teacher.taps: {section.model} has no layer {name!r}; nearest: {near}; "
                    "`edgestill inspect CONFIG` lists all layers with their shapes"
                )
        self._widths = {entry["module"]: int(entry["num_chs"]) for entry in _feature_info(net)}
        self.eval().requires_grad_(False)
        try:
            maps, pooled = self._run(torch.zeros(1, channels, *self.size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise TeacherError(f"teacher: {section.model} fails on a picture of {self.size}: {error}") from error
        coarsest = min((tuple(value.shape[-2:]) for value in maps), key=math.prod)
        most = section.grid or max(coarsest)
        self.grid = (min(coarsest[0], most), min(coarsest[1], most))
        self.tap_channels = tuple(int(value.shape[1]) for value in maps)
        self.pooled_width = int(pooled.shape[1])

    def train(self, mode: bool = True) -> TeacherBody:
        """A teacher is always in eval mode."""
        return super().train(False)

    def _run(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        seen: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: seen.__setitem__(name, output)

        handles = [self.net.get_submodule(name).register_forward_hook(keep(name)) for name in self.taps]
        try:
            pooled = self.pooled(pixels)
        finally:
            for handle in handles:
                handle.remove()
        if missed := [name for name in self.taps if name not in seen]:
            raise TeacherError(f"teacher.taps: {missed} do not run when features are computed; choose other layers")
        try:
            return [as_map(seen[name], self.net, self.size, self._widths.get(name)) for name in self.taps], pooled
        except ModelError as error:
            raise TeacherError(f"teacher.taps: {error}; `edgestill inspect CONFIG` lists layers with shapes") from error

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 -> (B, D), what the model's own classifier would read."""
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        if tuple(pixels.shape[-2:]) != self.size:
            shrinks = pixels.shape[-2] > self.size[0] or pixels.shape[-1] > self.size[1]
            pixels = F.interpolate(pixels, size=self.size, mode="bilinear", align_corners=False, antialias=shrinks)
        image = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        net = cast("Any", self.net)
        return cast("Tensor", net.forward_head(net.forward_features(image), pre_logits=True)).flatten(1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) in 0..1 -> tokens (B, L, sum of tap channels) on one grid, pooled (B, D)."""
        maps, pooled = self._run(pixels)
        gridded = [
            value if value.shape[-2:] == self.grid else F.adaptive_avg_pool2d(value, self.grid) for value in maps
        ]
        return torch.cat(gridded, 1).flatten(2).transpose(1, 2), pooled


def _feature_info(net: nn.Module) -> list[dict[str, Any]]:
    info: Any = getattr(net, "feature_info", [])
    return [dict(entry) for entry in getattr(info, "info", info)]


def automatic_taps(net: nn.Module, name: str) -> tuple[str, ...]:
    """The last block of the last three stages; where all are of one scale (a ViT), blocks L/3, 2L/3 and L."""
    entries = _feature_info(net)
    if not entries:
        raise TeacherError(
            f"teacher.taps: {name} does not describe its stages; name layers, `edgestill inspect CONFIG`"
        )
    last = {entry["reduction"]: entry["module"] for entry in entries}
    if len(last) > 1:
        return tuple(last[reduction] for reduction in sorted(last)[-3:])
    blocks = [entry["module"] for entry in entries]
    return tuple(dict.fromkeys(blocks[math.ceil(len(blocks) * third / 3) - 1] for third in (1, 2, 3)))


def hookable(net: nn.Module, size: tuple[int, int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, type, output shape for one picture) of each layer that can be a tap, in the order in which they run."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim in (3, 4):
                found[name] = (type(module).__name__, tuple(output.shape))

        return hook

    handles = [module.register_forward_hook(see(name)) for name, module in net.named_modules() if name]
    try:
        with torch.inference_mode():
            cast("Any", net).forward_features(torch.zeros(1, 3, *size))
    finally:
        for handle in handles:
            handle.remove()
    return [(name, kind, shape) for name, (kind, shape) in found.items()]


def hookable_layers(section: TeacherSection) -> list[tuple[str, str, tuple[int, ...]]]:
    """``hookable`` for a config's teacher; its weights do not matter and are not read."""
    side = section.image_size
    size = (side, side) if isinstance(side, int) else side
    return hookable(timm_model(section.model, size=size), size)


class Extractor:
    """The teacher on uint8 pictures (N, H, W, C), in chunks of exactly ``batch_size``."""

    def __init__(self, body: TeacherBody, batch_size: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.body, self.batch_size = body.to(self.device), batch_size

    @torch.inference_mode()
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Tokens (N, L, C) and pooled (N, D), float32, as the network gives them."""
        tokens: list[Array] = []
        pooled: list[Array] = []
        for start in range(0, len(images), self.batch_size):
            chunk = np.ascontiguousarray(images[start : start + self.batch_size])
            filled = np.concatenate([chunk, chunk[-1:].repeat(self.batch_size - len(chunk), 0)])
            pixels = torch.from_numpy(filled).to(self.device).permute(0, 3, 1, 2).float() / 255
            for store, value in zip((tokens, pooled), self.body(pixels), strict=True):
                store.append(value.float().cpu().numpy()[: len(chunk)])
        return np.concatenate(tokens), np.concatenate(pooled)
