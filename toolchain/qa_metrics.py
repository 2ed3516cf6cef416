"""Scores of extractive question answering, and whether two systems differ. numpy and the standard library.

F1 is bag-of-tokens overlap, EM equality, both after a normaliser: SQuAD v1.1's (English, used by XQuAD and TyDiQA-GoldP
for every language) or MLQA's (by the language of the context). Per question the best over the references; percent.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.metrics import MetricError

Values = NDArray[np.float64]
Normalise = Callable[[str], str]

_ASCII = str.maketrans("", "", string.punctuation)
_SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")
MLQA_ARTICLES = {
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "de": "ein eine einen einem eines einer der die das den dem des",
    "vi": "của là cái chiếc những",
}


def squad_normalise(text: str) -> str:
    """SQuAD v1.1: lower case, without ASCII punctuation and the articles a, an, the; single spaces."""
    return " ".join(_SQUAD_ARTICLES.sub(" ", text.lower().translate(_ASCII)).split())


def mlqa_normalise(text: str, language: str) -> str:
    """MLQA: lower case, without punctuation of any script and the ``language``'s articles; tokens joined by spaces.

    A Chinese character is a token of its own. Languages other than MLQA's seven have no articles.
    """
    text = "".join(char for char in text.lower() if not _punctuation(char))
    if language == "ar":
        text = text.replace("ال", " ")
    elif language in MLQA_ARTICLES:
        text = _articles(language).sub(" ", text)
    if language == "zh":
        text = "".join(f" {char} " if "一" <= char <= "龥" else char for char in text)
    return " ".join(text.split())


@cache
def _punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


@cache
def _articles(language: str) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(MLQA_ARTICLES[language].split())})\b")


def normaliser(name: str, language: str) -> Normalise:
    """``squad`` or ``mlqa`` for answers in ``language``, the language of the context."""
    return squad_normalise if name == "squad" else partial(mlqa_normalise, language=language)


def f1(prediction: str, truth: str, normalise: Normalise) -> float:
    """Harmonic mean of token precision and recall in [0, 1]; 0 without overlap."""
    found, wanted = normalise(prediction).split(), normalise(truth).split()
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def exact(prediction: str, truth: str, normalise: Normalise) -> float:
    return float(normalise(prediction) == normalise(truth))


def best(prediction: str, truths: Sequence[str], normalise: Normalise) -> tuple[float, float]:
    """(F1, EM) in [0, 1]: each the greatest over the references."""
    return max(f1(prediction, t, normalise) for t in truths), max(exact(prediction, t, normalise) for t in truths)


# --- the matrix of question and context languages


def cell_means(
    values: Values, questions: Sequence[str], contexts: Sequence[str], languages: Sequence[str]
) -> NDArray[np.float64]:
    """Means (L, L) of per-question ``values``, rows the question's language, columns the context's; NaN where none."""
    order = {language: index for index, language in enumerate(languages)}
    sums, counts = (np.zeros((len(languages), len(languages))) for _ in range(2))
    where = (np.array([order[q] for q in questions], int), np.array([order[c] for c in contexts], int))
    np.add.at(sums, where, values)
    np.add.at(counts, where, 1)
    with np.errstate(invalid="ignore"):
        return sums / counts


def averages(cells: NDArray[np.float64]) -> dict[str, float]:
    """``gxlt``: all cells, the diagonal included, as published; ``xlt``: the diagonal; ``gxlt_off``: the others.

    Cells without questions do not count; an average without cells is left out.
    """
    diagonal = np.eye(len(cells), dtype=bool)
    parts = {"gxlt": cells, "xlt": cells[diagonal], "gxlt_off": cells[~diagonal]}
    return {name: float(np.nanmean(part)) for name, part in parts.items() if np.isfinite(part).any()}


# --- is the difference real?


@dataclass(frozen=True)
class Difference:
    """Of paired scores: mean of a - b over ``n`` pairs, its 95 % interval, and the two-sided p that it is 0."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired(a: Mapping[str, float], b: Mapping[str, float], group: Callable[[str], str] = str) -> tuple[Values, Values]:
    """Scores of the same question ids side by side, averaged over the ids of a ``group``.

    The translations of one question are not independent samples: group them by the question they translate.
    Raises MetricError when the ids differ.
    """
    if a.keys() != b.keys() or not a:
        lost = sorted(a.keys() ^ b.keys())[:3]
        raise MetricError(f"expected scores of the same questions, found {len(a)} and {len(b)}; not in both: {lost}")
    members: dict[str, list[str]] = {}
    for name in sorted(a):
        members.setdefault(group(name), []).append(name)
    sides = [[float(np.mean([side[name] for name in ids])) for ids in members.values()] for side in (a, b)]
    return np.array(sides[0]), np.array(sides[1])


def bootstrap(a: Values, b: Values, draws: int = 10_000, seed: int = 0) -> Difference:
    """Paired bootstrap over the pairs: percentile interval; p from the share of draws on the other side of 0."""
    gap = _gap(a, b)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [gap[rng.integers(len(gap), size=(min(500, draws - at), len(gap)))].mean(1) for at in range(0, draws, 500)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    tail = (1 + min(int((means <= 0).sum()), int((means >= 0).sum()))) / (1 + draws)
    return Difference(float(gap.mean()), float(low), float(high), min(1.0, 2 * tail), len(gap))


def wilcoxon(a: Values, b: Values, zeros: str = "wilcox") -> tuple[float, float]:
    """Signed-rank test of paired scores: (W+, two-sided p) by the normal approximation, corrected for ties.

    ``zeros``: ``wilcox`` drops pairs without difference, ``pratt`` ranks them and drops their ranks (Pratt 1959).
    p is 1 when no pair differs. For 20 or more differing pairs the approximation is good.
    """
    gap = _gap(a, b)
    if zeros == "wilcox":
        gap = gap[gap != 0]
    absent, n = int((gap == 0).sum()), len(gap)
    if n == absent:
        return 0.0, 1.0
    ranks, _ = _ranks(np.abs(gap))
    plus = float(ranks[gap > 0].sum())
    mean = (n * (n + 1) - absent * (absent + 1)) / 4
    _, ties = _ranks(np.abs(gap[gap != 0]))
    variance = n * (n + 1) * (2 * n + 1) - absent * (absent + 1) * (2 * absent + 1) - float((ties**3 - ties).sum()) / 2
    z = (plus - mean) / math.sqrt(variance / 24)
    return plus, math.erfc(abs(z) / math.sqrt(2))


def _ranks(values: Values) -> tuple[Values, NDArray[np.int64]]:
    """Ranks from 1, equal values sharing their mean, and how many share each."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse], counts


def _gap(a: Any, b: Any) -> Values:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise MetricError(f"expected paired scores (N,) of two systems, found {a.shape} and {b.shape}")
    gap: Values = a - b
    return gap
