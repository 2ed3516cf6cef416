"""Several finished PPTs as one teacher, and how it comes back from its artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.artifact import verify
from toolchain.tasks.backbones import WEIGHTS, load_state
from toolchain.tasks.trajectory_nets import PPT, build

TINY = 1e-6


class Ensemble(nn.Module):
    """The paths of all ``members``, merged into K by where they end. Source: ours, after the ensembles of MultiPath++
    (Varadarajan et al., ICRA 2022, arXiv 2111.14973).

    The first member's paths are the first centres, so the K keep its numbering. In each of ``ROUNDS`` every path
    belongs to centre k by softmax_k(-SHARPNESS (d_k / min_j d_j)^2), d_k the distance between their ends, and a centre
    becomes the mean of the paths that belong to it, each as heavy as it is probable: many hypotheses are for what few
    people do. The softmax is for export: rounding in another runtime moves no path to another centre. With
    ``mirrored`` each member also predicts the mirror image of a track.
    """

    mirror: Tensor
    ROUNDS, SHARPNESS = 2, 10.0

    def __init__(self, members: Sequence[PPT], *, mirrored: bool = False) -> None:
        super().__init__()
        self.members, self.mirrored = nn.ModuleList(members), mirrored
        self.register_buffer("mirror", torch.tensor([-1.0, 1.0]), persistent=False)

    def forward(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T_o, 2) -> paths (B, K, T_p, 2), logits (B, K)."""
        paths, logits, _ = self.with_feature(observed)
        return paths, logits

    def with_feature(self, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T_o, 2) -> paths (B, K, T_p, 2), logits (B, K), the first member's feature (B, d)."""
        *first, feature = self.members[0].with_feature(observed)  # type: ignore[operator]
        found = [first, *(member(observed) for member in self.members[1:])]
        if self.mirrored:
            turned = [member(observed * self.mirror) for member in self.members]
            found += [(paths * self.mirror, logits) for paths, logits in turned]
        paths = torch.cat([paths for paths, _ in found], 1)
        chances = torch.cat([logits.softmax(-1) for _, logits in found], 1)[:, None] / len(found)
        centres = found[0][0]
        for _ in range(self.ROUNDS):
            squared = (paths[:, :, None, -1] - centres[:, None, :, -1]).square().sum(-1)
            least = squared.amin(-1, keepdim=True).clamp(min=TINY)
            share = (-self.SHARPNESS * squared / least).softmax(-1).transpose(1, 2) * chances
            sums = (share @ paths.flatten(2)).view_as(centres)
            centres = (sums + TINY * centres) / (share.sum(-1)[..., None, None] + TINY)
        return centres, share.sum(-1).clamp(min=TINY).log(), feature


def load(folder: Path | str, sections: Sequence[Any], mirrored: bool) -> nn.Module:
    """The trained networks of a teacher artifact as one, in eval mode. Raises ArtifactError, ModelError."""
    manifest = verify(Path(folder))
    net = Ensemble([build(section, manifest.extra["info"], 0) for section in sections], mirrored=mirrored)  # type: ignore[misc]
    load_state(net, Path(folder) / WEIGHTS)
    return net.eval()
