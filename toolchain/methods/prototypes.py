"""Prototypes learned from the teacher alone, and guidance by their assignment: our extension of ProC-KD.

Each of the teacher's taps i has a bank C_i of K unit vectors, the spherical k-means centres of its tokens over the
training images, without labels. A token belongs to prototype k in the share A_k = softmax_k(cos(t, C_k) / temperature):
NetVLAD's assignment as its authors initialise it (Arandjelovic et al., arXiv 1511.07247, equation 3 with alpha =
1 / (2 temperature)). The student predicts A_i at the same place from its own last map, averaged onto the teacher's
grid, through one linear layer that does not ship:

    L_P = sum_i mean_n KL(A_i(t_n) || softmax(W_i s_n + b_i))

In the spirit of ProC-KD's abstract, which guides the student through prototypes of local features; the paper's code
compares logits only. 24 for each of three taps is how we read its number of prototypes, 72.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolchain.losses import usage_perplexity

EPS = 1e-12
KMEANS_TOKENS, KMEANS_STEPS = 8192, 20


def unit(value: Tensor) -> Tensor:
    """``value`` in float32, divided by its L2 norm over the last dimension."""
    return F.normalize(value.float(), dim=-1, eps=EPS)


def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres (count, d) of ``points`` (n, d): k-means++ seeding (Arthur and Vassilvitskii 2007), Lloyd's steps."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(count - 1):
        gap = torch.cdist(points, centres).min(1).values.square() + EPS
        centres = torch.cat([centres, points[torch.multinomial(gap, 1, generator=generator)]])
    for _ in range(KMEANS_STEPS):
        nearest = F.one_hot(torch.cdist(points, centres).argmin(1), count).to(points.dtype)
        size = nearest.sum(0)[:, None]
        centres = torch.where(size > 0, nearest.T @ points / size.clamp(min=1), centres)
    return centres


def first_tokens(batches: Iterator[Mapping[str, Tensor]]) -> Tensor:
    """Teacher tokens (n, c) on the CPU of the first batches, at most ``KMEANS_TOKENS``."""
    points: list[Tensor] = []
    for batch in batches:
        points.append(batch["tokens"].flatten(0, 1).cpu().float())
        if sum(map(len, points)) >= KMEANS_TOKENS:
            break
    return torch.cat(points)[:KMEANS_TOKENS]


class Banks(nn.Module):
    """Prototypes of the teacher's taps (buffers), and the student's prediction of their assignment (trained).

    ``widths``: channels of each tap; together they are the teacher's tokens. ``width``: the student's.
    """

    C: Tensor

    def __init__(self, width: int, widths: Sequence[int], count: int, temperature: float) -> None:
        super().__init__()
        self.widths, self.count, self.temperature = list(widths), count, temperature
        self.register_buffer("C", torch.zeros(count, sum(widths)))
        self.predict = nn.Linear(width, count * len(widths))

    def parts(self, value: Tensor) -> tuple[Tensor, ...]:
        """``value`` (..., c) by tap."""
        return torch.split(value, self.widths, -1)

    @torch.no_grad()
    def learn(self, tokens: Tensor, seed: int) -> None:
        """Set every bank to the spherical k-means centres of its part of ``tokens`` (n, c)."""
        parts = [unit(points) for points in self.parts(tokens)]
        found = [unit(kmeans(points, self.count, torch.Generator().manual_seed(seed))) for points in parts]
        self.C.copy_(torch.cat(found, -1))

    @torch.no_grad()
    def shuffle(self, seed: int) -> None:
        """The control: every channel permuted over the prototypes, so that none is a part of any image."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(self.C.shape, generator=generator).argsort(0)
        self.C.copy_(torch.cat([unit(part) for part in self.parts(self.C.cpu().gather(0, order))], -1))

    @torch.no_grad()
    def assignment(self, tokens: Tensor) -> Tensor:
        """A (B, N, taps, K) of teacher tokens (B, N, c)."""
        with torch.autocast(tokens.device.type, enabled=False):
            parts = zip(self.parts(tokens), self.parts(self.C), strict=True)
            return torch.stack([(unit(t) @ c.T / self.temperature).softmax(-1) for t, c in parts], -2)

    def forward(self, tokens: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """L_P of student tokens (B, N, d), and the mean usage perplexity of the banks."""
        logits = self.predict(tokens).float().unflatten(-1, (len(self.widths), self.count))
        divergence = torch.special.xlogy(assignment, assignment) - assignment * logits.log_softmax(-1)
        used = [usage_perplexity(bank) for bank in assignment.unbind(-2)]
        return divergence.sum((-1, -2)).mean(), torch.stack(used).mean()
