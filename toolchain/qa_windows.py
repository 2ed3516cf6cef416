"""Texts to windows of tokens, and logits over windows to an answer: the same code for training, scoring and the edge.

A window is ``[CLS] question [SEP] part of the context [SEP]`` in the tokenizer's own special tokens. Needs numpy, and
for text a tokenizer of the package ``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifact import EdgestillError

BEST = 20  # starts and ends looked at in a window
LONGEST = 30  # tokens of an answer
OUTSIDE, CONTEXT, CENTRAL = 0, 1, 2  # CENTRAL: no other window gives this context token more surroundings
CHUNK = 4096  # windows decoded at a time

Array = NDArray[Any]


class WindowError(EdgestillError):
    """Texts cannot be cut into windows with these settings."""


@dataclass(frozen=True)
class Layout:
    """Token ids before the question, between question and context, and behind; ``typed``: the context has type 1."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    typed: bool
    pad: int

    @property
    def extra(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)


def layout_of(tokenizer: Any) -> Layout:
    """How ``tokenizer`` (of the package tokenizers) joins a pair of texts. Raises WindowError."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    probe = tokenizer.encode("a", "a")
    of = probe.sequence_ids
    if 0 not in of or 1 not in of or None not in of:
        raise WindowError(
            "expected a tokenizer with special tokens around a pair of texts, found none; use an encoder's"
        )
    first, second = of.index(0), of.index(1)
    behind = len(of) - of[::-1].index(1)
    middle = [index for index in range(first, second) if of[index] is None]
    pads = (tokenizer.token_to_id(token) for token in ("<pad>", "[PAD]"))
    return Layout(
        tuple(probe.ids[:first]),
        tuple(probe.ids[index] for index in middle),
        tuple(probe.ids[behind:]),
        probe.type_ids[second] == 1,
        next((pad for pad in pads if pad is not None), 0),
    )


@dataclass(frozen=True)
class Cut:
    """``max_length`` tokens a window, ``max_question`` of them for the question; windows start every ``step`` context
    tokens, or share ``overlap`` context tokens with the next: one of the two."""

    max_length: int
    max_question: int
    step: int | None = None
    overlap: int | None = None

    def starts(self, tokens: int, room: int) -> range:
        """First context token of each window, for ``room`` context tokens a window. Raises WindowError."""
        step = self.step if self.step is not None else room - (self.overlap or 0)
        if not 0 < step <= room:
            raise WindowError(
                f"windows of {self.max_length} tokens have room for {room} of the context: expected a step in "
                f"1..{room}, found {step}; raise max_length, or lower max_question, step or overlap"
            )
        return range(0, max(1, tokens - room + step), step)


@dataclass(frozen=True)
class Window:
    """``ids`` of one window of text pair ``pair``; ``offset`` (n, 2) and ``role`` (n,) of the context tokens, the first
    of which is at position ``at``."""

    pair: int
    ids: list[int]
    at: int
    offset: NDArray[np.int32]
    role: NDArray[np.uint8]


def windows(
    tokenizer: Any, layout: Layout, cut: Cut, questions: Sequence[str], contexts: Sequence[str]
) -> Iterator[Window]:
    """The windows of each (question, context), in order; every context token is in at least one. Raises WindowError."""
    asked = dict(zip(unique := list(dict.fromkeys(questions)), _encode(tokenizer, unique), strict=True))
    read = dict(zip(unique := list(dict.fromkeys(contexts)), _encode(tokenizer, unique), strict=True))
    offsets = {text: np.array(found.offsets, np.int32).reshape(-1, 2) for text, found in read.items()}
    for pair, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        head = [*layout.prefix, *asked[question].ids[: cut.max_question], *layout.middle]
        ids, offset = read[context].ids, offsets[context]
        room = cut.max_length - len(head) - len(layout.suffix)
        starts = cut.starts(len(ids), room)
        parts = [(start, min(start + room, len(ids))) for start in starts]
        for (start, stop), role in zip(parts, _roles(parts, len(ids)), strict=True):
            yield Window(pair, [*head, *ids[start:stop], *layout.suffix], len(head), offset[start:stop], role)


def _encode(tokenizer: Any, texts: list[str]) -> list[Any]:
    return tokenizer.encode_batch(texts, add_special_tokens=False)  # type: ignore[no-any-return]


def _roles(parts: Sequence[tuple[int, int]], tokens: int) -> list[NDArray[np.uint8]]:
    """Whether each part is the one that gives a token the most context on its poorer side (then the longer part)."""
    score = np.full((len(parts), tokens), -1.0)
    for row, (start, stop) in enumerate(parts):
        place = np.arange(stop - start)
        score[row, start:stop] = np.minimum(place, place[::-1]) + 0.01 * (stop - start)
    owner = score.argmax(0) if tokens else np.zeros(0, int)
    return [
        np.where(owner[start:stop] == row, CENTRAL, CONTEXT).astype(np.uint8) for row, (start, stop) in enumerate(parts)
    ]


def label_of(window: Window, first: int, last: int) -> tuple[int, int]:
    """Positions in the window of the tokens that hold characters ``first`` to ``last`` (exclusive) of the context.

    (0, 0), the first special token, when the window does not hold all of them.
    """
    low, high = window.offset[:, 0], window.offset[:, 1]
    held = np.flatnonzero((high > first) & (low < last) & (high > low))
    whole = len(held) and low[held[0]] <= first and high[held[-1]] >= last
    return (window.at + int(held[0]), window.at + int(held[-1])) if whole else (0, 0)


def arrays(found: Sequence[Window], width: int, pad: int, decode: bool) -> dict[str, Array]:
    """``input_ids`` and ``attention_mask`` int64 (N, width); to ``decode``: ``offset`` int32 (N, width, 2), characters
    of the context, and ``role`` uint8 (N, width)."""
    result: dict[str, Array] = {
        "input_ids": np.full((len(found), width), pad, np.int64),
        "attention_mask": np.zeros((len(found), width), np.int64),
    }
    if decode:
        result["offset"] = np.zeros((len(found), width, 2), np.int32)
        result["role"] = np.zeros((len(found), width), np.uint8)
    for row, window in enumerate(found):
        result["input_ids"][row, : len(window.ids)] = window.ids
        result["attention_mask"][row, : len(window.ids)] = 1
        if decode:
            part = slice(window.at, window.at + len(window.role))
            result["offset"][row, part], result["role"][row, part] = window.offset, window.role
    return result


def best_spans(
    start: Array, end: Array, role: Array, longest: int = LONGEST
) -> tuple[Array, Array, NDArray[np.float32]]:
    """First and last token (N,) of each window's best span, and its score: start logit + end logit.

    ``start``, ``end``, ``role`` (N, S). Of the 20 best starts among CENTRAL tokens and the 20 best ends among context
    tokens, the best pair that is in order and at most ``longest`` tokens; score -inf where there is none.
    """
    chunks = [slice(i, i + CHUNK) for i in range(0, len(start), CHUNK)]
    parts = [_best_spans(start[chunk], end[chunk], role[chunk], longest) for chunk in chunks]
    first, last, score = zip(*parts, strict=True)
    return np.concatenate(first), np.concatenate(last), np.concatenate(score)


def _best_spans(start: Array, end: Array, role: Array, longest: int) -> tuple[Array, Array, NDArray[np.float32]]:
    width = start.shape[1]
    role = role[:, :width]
    starts = np.where(role == CENTRAL, start, -np.inf).astype(np.float32)
    ends = np.where(role != OUTSIDE, end, -np.inf).astype(np.float32)
    count = min(BEST, width)
    s = np.sort(np.argpartition(-starts, count - 1, 1)[:, :count], 1)
    e = np.sort(np.argpartition(-ends, count - 1, 1)[:, :count], 1)
    length = e[:, None, :] - s[:, :, None]
    score = np.take_along_axis(starts, s, 1)[:, :, None] + np.take_along_axis(ends, e, 1)[:, None, :]
    score = np.where((length >= 0) & (length < longest), score, -np.inf).reshape(len(start), -1)
    best = score.argmax(1)
    rows = np.arange(len(start))
    return s[rows, best // count], e[rows, best % count], score[rows, best]


def pooled(owner: Array, score: NDArray[np.float32]) -> dict[int, int]:
    """The window with the best span of each ``owner`` (N,): owner -> window; of equal ones the first."""
    order = np.lexsort((np.arange(len(score)), -score, owner))
    owners, first = np.unique(np.asarray(owner)[order], return_index=True)
    return dict(zip(owners.tolist(), order[first].tolist(), strict=True))


def answer_of(context: str, offset: Array, first: int, last: int) -> tuple[str, int, int]:
    """The text of tokens ``first`` to ``last``, cut out of ``context`` without outer spaces, and its characters."""
    low, high = int(offset[first, 0]), int(offset[last, 1])
    text = context[low:high]
    low += len(text) - len(text.lstrip())
    text = text.strip()
    return text, low, low + len(text)


def cut_of(settings: Mapping[str, Any]) -> Cut:
    return Cut(settings["max_length"], settings["max_question"], settings.get("step"), settings.get("overlap"))
