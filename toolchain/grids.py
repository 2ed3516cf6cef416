"""Feature maps (B, d, h, w) and token tensors (B, h w, d), on the grid one needs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def tokens_of(features: Tensor) -> Tensor:
    """(B, d, h, w) -> (B, h w, d)."""
    return features.flatten(2).transpose(1, 2)


def map_of(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h w, d) -> (B, d, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def resized(features: Tensor, grid: Grid) -> Tensor:
    """A map on another grid: adaptive average pooling to a coarser one, bilinear otherwise."""
    height, width = features.shape[-2:]
    if (height, width) == grid:
        return features
    if grid[0] <= height and grid[1] <= width:
        return F.adaptive_avg_pool2d(features, grid)
    return F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
