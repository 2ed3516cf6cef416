"""Prototypes learned from the teacher alone, and guidance by their assignment: our extension of ProC-KD.

Each of the teacher's taps i has a bank C_i of K unit vectors, the spherical k-means centres of its tokens over the
training images, without labels. A token belongs to prototype k in the share A_k = softmax_k(cos(t, C_k) / temperature):
NetVLAD's assignment as its authors initialise it (Arandjelovic et al., arXiv 1511.07247, equation 3 with alpha =
1 / (2 temperature)). The student predicts A_i at the same place from its own last map, averaged onto the teacher's
grid, through one linear layer that does not ship:

    L_P = sum_i mean_n KL(A_i(t_n) || softmax(W_i s_n + b_i))

In the spirit of ProC-KD's abstract, which guides the student through prototypes of local features; the paper's code
compares logits only. 24 for each of three taps is how we read its number of prototypes, 72.

Two other ways to learn prototypes, for the ablations (``method.train_prototypes``): moving averages of the points
nearest to each, as VQ-VAE's codebook, and SwAV's swapped prediction of balanced codes. There the two views of a place
are the teacher's token and the student's, codes are balanced over one process's batch, and the prototypes rest in the
first of several epochs. A bank's codes take the place of A_i, and its C_i starts from random points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

from toolchain.losses import usage_perplexity

Learner = Literal["ema", "sinkhorn"]
EPS = 1e-12
KMEANS_TOKENS, KMEANS_STEPS = 8192, 20
DECAY, COMMITMENT = 0.99, 0.25  # van den Oord et al.
SINKHORN_EPS, SINKHORN_STEPS, SWAV_TEMPERATURE = 0.05, 3, 0.1  # Caron et al.


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


class MovingAverages(nn.Module):
    """Prototypes as moving averages of the points nearest to them: VQ-VAE's codebook (van den Oord et al., arXiv
    1711.00937, appendix A.1). One that has less than one point of weight left becomes a point of the batch."""

    size: Tensor
    total: Tensor

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.register_buffer("size", torch.ones(count))
        self.register_buffer("total", torch.zeros(count, width))

    @property
    def prototypes(self) -> Tensor:
        """The means (K, d)."""
        return self.total / self.size[:, None]

    @torch.no_grad()
    def start(self, prototypes: Tensor) -> None:
        """Each of ``prototypes`` (K, d) counts as one point."""
        self.size.fill_(1.0)
        self.total.copy_(prototypes)

    @torch.no_grad()
    def update(self, points: Tensor) -> Tensor:
        """The prototypes, moved towards the means of their nearest ``points`` (n, d) of all processes."""
        with torch.autocast(points.device.type, enabled=False):
            nearest = F.one_hot(torch.cdist(points, self.prototypes).argmin(1), len(self.size)).to(points.dtype)
            self.size.lerp_(reduce(nearest.sum(0), "sum"), 1 - DECAY)
            self.total.lerp_(reduce(nearest.T @ points, "sum"), 1 - DECAY)
        drawn = broadcast(points[torch.randint(len(points), (len(self.size),), device=points.device)])
        self.total.copy_(torch.where(self.size[:, None] < 1, drawn, self.total))
        self.size.clamp_(min=1)
        return self.prototypes


def commitment(points: Tensor, prototypes: Tensor) -> Tensor:
    """Mean of beta |x - sg(C_k)|^2 over ``points`` (n, d), C_k the nearest prototype (VQ-VAE, equation 3)."""
    nearest = prototypes.detach()[torch.cdist(points.detach(), prototypes.detach()).argmin(1)]
    return COMMITMENT * (points - nearest).square().sum(-1).mean()


@torch.no_grad()
def balanced_codes(scores: Tensor) -> Tensor:
    """``scores`` (n, K) of n points -> codes (n, K): rows sum to 1 and columns to about n / K.

    Sinkhorn-Knopp on exp(scores / eps), in logarithms: Caron et al., arXiv 2006.09882, section 3.1.
    """
    logs = scores.float() / SINKHORN_EPS
    for _ in range(SINKHORN_STEPS):
        logs = logs - logs.logsumexp(0)
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.exp()


def swapped_prediction(one: Tensor, other: Tensor) -> Tensor:
    """Each view's scores (n, K) predict the other's balanced codes: SwAV, equations 1 and 2."""
    loss = one.new_zeros(())
    for seen, hidden in ((one, other), (other, one)):
        log_p = (seen.float() / SWAV_TEMPERATURE).log_softmax(-1)
        loss = loss - (balanced_codes(hidden) * log_p).sum(-1).mean()
    return loss


class Banks(nn.Module):
    """Prototypes of the teacher's taps, and the student's prediction of their assignment (trained).

    ``widths``: channels of each tap; together they are the teacher's tokens. ``width``: the student's. ``learner``:
    how the prototypes go on learning after ``learn``; None: not at all. ``frozen``: ``sinkhorn`` rests.
    """

    no_decay = True  # its own parameter is C
    frozen = False
    C: Tensor

    def __init__(
        self, width: int, widths: Sequence[int], count: int, temperature: float, learner: Learner | None = None
    ) -> None:
        super().__init__()
        self.widths, self.count, self.temperature, self.learner = list(widths), count, temperature, learner
        start = torch.zeros(count, sum(widths))
        if learner == "sinkhorn":
            self.C = nn.Parameter(start)
        else:
            self.register_buffer("C", start)
        self.averages = nn.ModuleList(MovingAverages(count, part) for part in widths if learner == "ema")
        self.predict = nn.Linear(width, count * len(widths))

    def parts(self, value: Tensor) -> tuple[Tensor, ...]:
        """``value`` (..., c) by tap."""
        return torch.split(value, self.widths, -1)

    @torch.no_grad()
    def learn(self, tokens: Tensor, seed: int) -> None:
        """Set every bank from its part of ``tokens`` (n, c): to the spherical k-means centres, or to random points
        where it goes on learning."""
        found = []
        for points in map(unit, self.parts(tokens)):
            generator = torch.Generator().manual_seed(seed)
            if self.learner is None:
                found.append(unit(kmeans(points, self.count, generator)))
            else:
                found.append(points[torch.randperm(len(points), generator=generator)[: self.count]])
        self.C.copy_(torch.cat(found, -1))
        for average, prototypes in zip(self.averages, found, strict=False):
            average.start(prototypes)  # type: ignore[operator]

    @torch.no_grad()
    def shuffle(self, seed: int) -> None:
        """The control: every channel permuted over the prototypes, so that none is a part of any image."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(self.C.shape, generator=generator).argsort(0)
        self.C.copy_(torch.cat([unit(part) for part in self.parts(self.C.cpu().gather(0, order))], -1))

    def scores(self, tokens: Tensor) -> Tensor:
        """Cosines (B, N, taps, K) of teacher tokens (B, N, c) to the prototypes."""
        prototypes = self.parts(self.C.detach() if self.frozen else self.C)
        if self.learner is not None:
            prototypes = tuple(map(unit, prototypes))
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.stack([unit(t) @ c.T for t, c in zip(self.parts(tokens), prototypes, strict=True)], -2)

    @torch.no_grad()
    def assignment(self, tokens: Tensor) -> Tensor:
        """A (B, N, taps, K) of teacher tokens (B, N, c)."""
        return (self.scores(tokens) / self.temperature).softmax(-1)

    def forward(self, tokens: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """L_P of student tokens (B, N, d) beside ``teacher``'s (B, N, c), and the banks' mean usage perplexity."""
        logits = self.predict(tokens).float().unflatten(-1, (len(self.widths), self.count))
        if self.averages and self.training:
            pairs = zip(self.averages, self.parts(teacher), strict=True)
            moved = [average.update(unit(points).flatten(0, -2)) for average, points in pairs]  # type: ignore[operator]
            self.C.copy_(torch.cat(moved, -1))
        assignment = self.assignment(teacher)
        used = torch.stack([usage_perplexity(bank) for bank in assignment.unbind(-2)]).mean()
        if self.learner == "sinkhorn":
            views = (self.scores(teacher).flatten(0, 1), logits.flatten(0, 1) * SWAV_TEMPERATURE)
            banks = zip(*(view.unbind(1) for view in views), strict=True)
            return torch.stack([swapped_prediction(*pair) for pair in banks]).sum(), used
        divergence = torch.special.xlogy(assignment, assignment) - assignment * logits.log_softmax(-1)
        return divergence.sum((-1, -2)).mean(), used
