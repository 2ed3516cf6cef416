from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from toolchain.qa_windows import (
    CENTRAL,
    CONTEXT,
    Cut,
    WindowError,
    answer_of,
    arrays,
    best_spans,
    label_of,
    layout_of,
    pooled,
    windows,
)

WORDS = [f"w{number}" for number in range(60)]


def tokenizer(pair: str = "[CLS] $A [SEP] $B:1 [SEP]:1") -> Tokenizer:
    """A piece per word."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *WORDS]
    made = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ends)
    return made


def cut(question: int, context: int, settings: Cut) -> list:
    made = tokenizer()
    return list(windows(made, layout_of(made), settings, [" ".join(WORDS[:question])], [" ".join(WORDS[:context])]))


def test_the_layout_is_the_tokenizers() -> None:
    layout = layout_of(tokenizer())
    assert (layout.prefix, layout.middle, layout.suffix, layout.typed, layout.pad) == ((2,), (3,), (3,), True, 0)
    roberta = layout_of(tokenizer("[CLS] $A [SEP] [SEP] $B [SEP]"))
    assert (roberta.middle, roberta.typed, roberta.extra) == ((3, 3), False, 4)
    with pytest.raises(WindowError, match="special tokens"):
        layout_of(tokenizer("$A $B"))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(16, 40), st.booleans(), st.integers(1, 20))
def test_windows_cover_every_token_and_one_of_them_owns_it(
    question: int, context: int, longest: int, by_step: bool, size: int
) -> None:
    most = 5
    room = longest - min(question, most) - 3
    size = min(size, room if by_step else room - 1)
    found = cut(
        question, context, Cut(longest, most, step=size if by_step else None, overlap=None if by_step else size)
    )
    spans = [tuple(window.offset[[0, -1], [0, 1]]) for window in found]
    assert spans == sorted(set(spans))
    central = [tuple(pair) for window in found for pair in window.offset[window.role == CENTRAL]]
    assert len(central) == len(set(central)) == context
    for window in found:
        assert len(window.ids) <= longest
        assert window.ids[: window.at] == [2, *range(5, 5 + min(question, most)), 3]
        assert window.ids[-1] == 3


def test_step_and_overlap_mean_what_they_say() -> None:
    stepped = cut(2, 30, Cut(15, 5, step=4))
    assert [window.ids[window.at] - 5 for window in stepped][:3] == [0, 4, 8]
    shared = cut(2, 30, Cut(15, 5, overlap=4))
    assert [window.ids[window.at] - 5 for window in shared][:3] == [0, 6, 12]
    with pytest.raises(WindowError, match=r"room for 10 of the context: expected a step in 1\.\.10, found 11"):
        cut(2, 30, Cut(15, 5, step=11))


def test_labels_are_tokens_that_hold_the_characters_or_the_first_token() -> None:
    (window,) = cut(2, 6, Cut(15, 5, step=4))
    text = " ".join(WORDS[:6])
    assert label_of(window, text.index("w2"), text.index("w3") + 2) == (window.at + 2, window.at + 3)
    assert label_of(window, text.index("w2") + 1, text.index("w2") + 2) == (window.at + 2, window.at + 2)
    first, *_ = cut(2, 30, Cut(15, 5, step=4))
    text = " ".join(WORDS[:30])
    assert label_of(first, text.index("w9"), text.index("w10") + 3) == (0, 0)  # it ends outside the window
    assert label_of(first, text.index("w20"), text.index("w20") + 3) == (0, 0)


def test_the_best_span_is_in_order_short_enough_and_starts_where_its_window_is_best() -> None:
    role = np.full((1, 50), CONTEXT, np.uint8)
    role[0, 10:] = CENTRAL
    role[0, :5] = 0
    start, end = np.zeros((2, 1, 50), np.float32)
    start[0, [7, 12, 20]], end[0, [11, 13, 49, 2]] = (9, 3, 4), (1, 2, 4.5, 99)
    assert [value.item() for value in best_spans(start, end, role)] == [20, 49, 8.5]
    assert [value.item() for value in best_spans(start, end, role, longest=29)] == [12, 13, 5.0]
    none = best_spans(start, end, np.zeros_like(role))
    assert none[2].item() == -np.inf


def test_decoding_equals_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(2, 20, 24)).astype(np.float32)
    role = rng.integers(0, 3, (20, 24)).astype(np.uint8)
    first, last, score = best_spans(start, end, role, longest=5)
    for row in range(20):
        pairs = [
            (start[row, s] + end[row, e], s, e)
            for s in np.flatnonzero(role[row] == CENTRAL)
            for e in np.flatnonzero(role[row])
            if 0 <= e - s < 5
        ]
        value, s, e = max(pairs)
        assert (first[row], last[row]) == (s, e)
        assert score[row] == pytest.approx(value)


@pytest.mark.parametrize(("rank", "found"), [(20, 59), (21, 0)])
def test_only_the_20_best_starts_are_looked_at(rank: int, found: int) -> None:
    role = np.full((1, 60), CENTRAL, np.uint8)
    start, end = np.zeros((2, 1, 60), np.float32)
    start[0, : rank - 1] = np.arange(rank - 1, 0, -1) + 10
    start[0, 59], end[0, [0, 59]] = 10, (1, 1000)  # of the best end, which stands alone, the start is the rank-th best
    assert best_spans(start, end, role, longest=1)[0].item() == found


def test_windows_of_a_question_are_pooled_and_the_answer_is_cut_out_of_the_context() -> None:
    assert pooled(np.array([3, 1, 3, 1]), np.array([1.0, 5.0, 2.0, 5.0], np.float32)) == {1: 1, 3: 2}
    assert answer_of("  a  red dog.", np.array([[0, 3], [3, 8], [8, 12]]), 1, 2) == ("red dog", 5, 12)


def test_arrays_are_padded_and_say_what_is_context() -> None:
    found = cut(2, 6, Cut(15, 5, step=4))
    made = arrays(found, 14, 0, decode=True)
    length = len(found[0].ids)
    assert made["input_ids"].dtype == made["attention_mask"].dtype == np.int64
    assert made["attention_mask"][0].tolist() == [1] * length + [0] * (14 - length)
    assert np.flatnonzero(made["role"][0]).tolist() == list(range(4, 10))
