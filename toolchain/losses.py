"""Losses of the methods, as pure functions.

Logits are (B, C, ...): classes in dimension 1, any number of positions behind it. Labels are int64 (B, ...).
Everything is computed in float32, also under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def valid(label: Tensor, ignore_index: int | None) -> Tensor:
    """True where ``label`` counts."""
    return torch.ones_like(label, dtype=torch.bool) if ignore_index is None else label != ignore_index


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` (B, ...) where ``mask`` is true; 0 when it is true nowhere."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int | None = None) -> Tensor:
    """-log softmax(logits)[label], averaged over the positions that count; 0 when none does."""
    if ignore_index is None:
        return F.cross_entropy(logits.float(), label)
    values = F.cross_entropy(logits.float(), label, ignore_index=ignore_index, reduction="none")
    return _mean(values, valid(label, ignore_index))


def accuracy(logits: Tensor, label: Tensor, ignore_index: int | None = None) -> Tensor:
    """Share of the positions that count whose largest logit is the label's, in percent."""
    return 100 * _mean((logits.detach().argmax(1) == label).float(), valid(label, ignore_index))


def kl(p_logits: Tensor, q_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(softmax p || softmax q) = sum_c p_c (log p_c - log q_c), averaged over positions: those where ``mask``."""
    log_p, log_q = F.log_softmax(p_logits.float(), 1), F.log_softmax(q_logits.float(), 1)
    return _mean((log_p.exp() * (log_p - log_q)).sum(1), mask)


def hinton_kd(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)). Hinton, Vinyals, Dean, arXiv 1503.02531, section 2."""
    return temperature**2 * kl(teacher.float() / temperature, student.float() / temperature, mask)


def weighted_kd(student: Tensor, teacher: Tensor, temperature: float, weight: Tensor) -> Tensor:
    """``hinton_kd`` of logits (B, C, ...) with a ``weight`` (B,) for each sample: mean of weight times KL."""
    p, q = (F.log_softmax(logits.float() / temperature, 1) for logits in (teacher, student))
    each = (p.exp() * (p - q)).sum(1)
    return temperature**2 * (each * weight.reshape(-1, *[1] * (each.ndim - 1))).mean()


def hit_precision(
    logits: Tensor,
    label: Tensor,
    k: int = 10,
    below: int = 5,
    above: int = 4,
    every_hit: bool = False,
    length: Tensor | None = None,
) -> Tensor:
    """How high the right positions stand in the ranking of ``logits`` (B, S, ...), in [0, 1] like ``label`` (B, ...).

    Of the ``k`` best positions those in label - below .. label + above are hits. 1 / rank of the first hit, 0 without
    one: what the "mAP@k" of Carrino et al., arXiv 2309.17134, is in their code. ``every_hit`` gives the true AP@k:
    precision at each hit's rank, summed, over min(number of right positions, k). ``length`` (B,): positions that are
    not padding, whose logits are the least; default S.
    """
    size = logits.shape[1]
    last = torch.full_like(label, size - 1)
    if length is not None:
        last = torch.minimum(last, length.reshape(-1, *[1] * (label.ndim - 1)) - 1)
    low, high = (label - below).clamp(min=0), torch.minimum(label + above, last)
    order = logits.detach().float().sort(stable=True, dim=1, descending=True).indices[:, : min(k, size)]
    hit = ((order >= low[:, None]) & (order <= high[:, None])).float()
    rank = torch.arange(1, order.shape[1] + 1, device=logits.device, dtype=torch.float32)
    rank = rank.reshape(1, -1, *[1] * (label.ndim - 1))
    if not every_hit:
        return (hit / rank).amax(1)
    return (hit * hit.cumsum(1) / rank).sum(1) / (high - low + 1).clamp(max=k)


def fitnet(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of projected student features and teacher features, both (B, L, C).

    Romero et al., FitNets, arXiv 1412.6550, equation 3 (there half the sum).
    """
    return F.mse_loss(projected.float(), teacher.float())


def vkd(projected: Tensor, teacher: Tensor) -> Tensor:
    """Smooth-L1 of projected student features and layer-normalised (no affine) teacher features, both (B, C).

    Miles, Elezi, Deng, VkD, arXiv 2403.06213.
    """
    return F.smooth_l1_loss(projected.float(), F.layer_norm(teacher.float(), teacher.shape[-1:]))


def inverted_projection(student: Tensor, projected: Tensor) -> Tensor:
    """Mean squared difference of student features and projected teacher features, both (..., d) and layer-normalised.

    Auty, Miles, Kolbeinsson, Mikolajczyk, arXiv 2403.14494; without the normalisation both sides may shrink to zero.
    """
    shape = student.shape[-1:]
    return F.mse_loss(F.layer_norm(student.float(), shape), F.layer_norm(projected.float(), shape))


def usage_perplexity(assignment: Tensor) -> Tensor:
    """exp(entropy(mean assignment)) of (..., K) distributions: K when all K are used alike, 1 when only one is."""
    mean = assignment.detach().float().flatten(0, -2).mean(0)
    entropy: Tensor = torch.special.entr(mean).sum()
    return entropy.exp()


def nearest(candidates: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``candidates`` (B, K, D) the one nearest to ``target`` (B, D): L2 distances (B,) and indices (B,)."""
    found = (candidates - target[:, None]).norm(dim=-1).min(1)
    return found.values, found.indices


def diversity(candidates: Tensor, sigma: float) -> Tensor:
    """Mean over pairs i < j of exp(-|E_i - E_j|^2 / sigma): 1 where all K of (B, K, D) coincide, 0 where far apart, and
    where K is 1.

    ``sigma`` in the candidates' unit squared. PPT, arXiv 2407.11588, the second term of task II's loss.
    """
    count = candidates.shape[1]
    rows, columns = torch.triu_indices(count, count, 1, device=candidates.device)
    squared = (candidates[:, rows] - candidates[:, columns]).square().sum(-1)
    spread: Tensor = torch.exp(-squared / sigma).sum() / max(1, squared.numel())
    return spread


def displacement(path: Tensor, target: Tensor) -> Tensor:
    """Mean L2 distance of positions, both (..., 2)."""
    distance: Tensor = (path - target).norm(dim=-1).mean()
    return distance
