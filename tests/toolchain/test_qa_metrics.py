from __future__ import annotations

import numpy as np
import pytest

from toolchain.metrics import MetricError
from toolchain.qa_metrics import (
    averages,
    best,
    bootstrap,
    cell_means,
    exact,
    f1,
    mlqa_normalise,
    normaliser,
    paired,
    squad_normalise,
    wilcoxon,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Panthers'  defense!", "panthers defense"), ("An a the", ""), ("北京。", "北京。"), ("theatre", "theatre")],
)
def test_the_squad_normaliser_is_english_and_ascii(text: str, normal: str) -> None:
    assert squad_normalise(text) == normal


@pytest.mark.parametrize(
    ("language", "text", "normal"),
    [
        ("en", "The «cat», a dog", "cat dog"),
        ("es", "¿Las casas de el Rey?", "casas de rey"),
        ("de", "Der Hund des Kindes", "hund kindes"),
        ("vi", "những con mèo của tôi", "con mèo tôi"),
        ("ar", "البيت الكبير،", "بيت كبير"),
        ("hi", "राम, घर।", "राम घर"),
        ("zh", "北京2008年。ok no", "北 京 2008 年 ok no"),
        ("ru", "Дом, a the", "дом a the"),
    ],
)
def test_the_mlqa_normaliser_knows_the_contexts_language(language: str, text: str, normal: str) -> None:
    assert mlqa_normalise(text, language) == normal


def test_f1_counts_tokens_and_em_wants_all() -> None:
    squad = normaliser("squad", "en")
    assert f1("the big red dog", "red dog", squad) == pytest.approx(0.8)
    assert f1("red red", "red", squad) == pytest.approx(2 / 3)
    assert f1("cat", "dog", squad) == f1("", "dog", squad) == 0
    assert exact("The dog.", "dog", squad) == 1
    assert best("October", ["October 1973", "October"], squad) == (1.0, 1.0)
    assert f1("北京", "北", normaliser("mlqa", "zh")) == pytest.approx(2 / 3)


def test_the_matrix_has_question_rows_and_context_columns() -> None:
    cells = cell_means(np.array([10.0, 30.0, 80.0]), ["en", "en", "es"], ["es", "es", "es"], ["en", "es"])
    np.testing.assert_array_equal(cells, [[np.nan, 20.0], [np.nan, 80.0]])
    assert averages(cells) == {"gxlt": 50.0, "xlt": 80.0, "gxlt_off": 20.0}
    assert averages(np.array([[60.0]])) == {"gxlt": 60.0, "xlt": 60.0}


def test_pairs_are_the_same_questions_grouped_by_what_they_translate() -> None:
    a, b = {"q1_en-en": 1.0, "q1_en-es": 0.0, "q2_en-en": 1.0}, {"q1_en-en": 0.0, "q1_en-es": 0.0, "q2_en-en": 1.0}
    first, second = paired(a, b, lambda name: name.partition("_")[0])
    np.testing.assert_array_equal(first, [0.5, 1.0])
    np.testing.assert_array_equal(second, [0.0, 1.0])
    with pytest.raises(MetricError, match="expected scores of the same questions"):
        paired(a, {"q1_en-en": 1.0})


def test_the_bootstrap_sees_a_shift_and_no_shift() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(size=300)
    shifted = bootstrap(b + 0.3 + 0.5 * rng.normal(size=300), b)
    assert shifted.low < 0.3 < shifted.high
    assert shifted.low > 0
    assert shifted.p < 0.01
    none = bootstrap(b + 0.5 * rng.normal(size=300), b)
    assert none.low < 0 < none.high
    assert none.p > 0.05
    assert bootstrap(b, b).p == 1
    assert bootstrap(b, b + 1) == bootstrap(b, b + 1)


@pytest.mark.parametrize("zeros", ["wilcox", "pratt"])
def test_wilcoxon_is_scipys(zeros: str) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is the reference")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a = np.round(rng.normal(0.2, 1, 80), 1).clip(-1, 1)
        b = np.round(rng.normal(0.0, 1, 80), 1).clip(-1, 1)
        expected = stats.wilcoxon(a, b, zero_method=zeros, method="asymptotic", correction=False)
        plus, p = wilcoxon(a, b, zeros)
        gap = a - b
        kept = gap if zeros == "pratt" else gap[gap != 0]
        rank_sum = stats.rankdata(np.abs(kept))[kept > 0].sum()
        assert plus == pytest.approx(rank_sum)
        assert p == pytest.approx(expected.pvalue, rel=1e-9)


def test_wilcoxon_of_a_textbook_example() -> None:
    """Siegel's (1956) eight pairs: T = 4 for the rarer sign; the exact two-sided p is 0.055."""
    a, b = [82, 69, 73, 43, 58, 56, 76, 65], [63, 42, 74, 37, 51, 43, 80, 62]
    plus, p = wilcoxon(np.array(a), np.array(b))
    assert plus == 32
    assert p == pytest.approx(0.05, abs=0.01)
    assert wilcoxon(np.ones(5), np.ones(5)) == (0.0, 1.0)
    with pytest.raises(MetricError, match="paired scores"):
        wilcoxon(np.ones(5), np.ones(4))
