"""Tokenizers of encoders: found beside them, trained for the demo, pruned to the pieces that are in use.

Works on ``tokenizer.json``, the format of the package ``tokenizers``, which is also what ships.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifact import EdgestillError
from toolchain.tasks.datasets import data_root

TOKENIZER = "tokenizer.json"
SCRIPT_SHARE = 0.02  # fewer are names and quotations
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PROBE = "Zoë’s  ﬁrst №1: 12,5 % of ÉCOLE, 東京都 ไทย العربية हिन्दी"  # tokenizers that differ cut it otherwise


class TokenizerError(EdgestillError):
    """A tokenizer cannot be had, or does not belong to the network."""


def encoder_folder(name: str) -> Path | None:
    """The folder of an encoder: ``name`` itself, or ``models/<name>`` in or beside the data folder; None: a hub id."""
    root = data_root(None)
    places = [Path(name).expanduser(), root / "models" / name, root.parent / "models" / name]
    return next((place for place in places if place.is_dir()), None)


def read_tokenizer(name: str) -> str:
    """The ``tokenizer.json`` of an encoder's folder or hub id, as text. Raises TokenizerError."""
    folder = encoder_folder(name)
    if folder is not None and (folder / TOKENIZER).is_file():
        return (folder / TOKENIZER).read_text(encoding="utf-8")
    try:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(folder or name))
        return str(found.backend_tokenizer.to_str())
    except Exception as error:  # transformers and the hub raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(
            f"no tokenizer for {name!r}: expected a folder with {TOKENIZER} (here, or models/{name} in or beside the "
            f"data folder), or a hub id that can be reached; found {type(error).__name__}: {reason}"
        ) from error


def parse(text: str) -> Any:
    """A ``tokenizers.Tokenizer`` of a ``tokenizer.json``. Raises TokenizerError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare exceptions
        raise TokenizerError(f"expected a {TOKENIZER}, found something else ({error})") from error


def check_same(mine: str, other: str, who: str) -> None:
    """Raise TokenizerError unless two ``tokenizer.json`` have the same pieces under the same numbers and cut alike."""
    if mine == other:
        return
    ours, theirs = parse(mine), parse(other)
    a, b = ours.get_vocab(), theirs.get_vocab()
    if a != b:
        unlike = f"{len(a):,} pieces, found {len(b):,} (they differ in {min(a.items() ^ b.items())[0]!r})"
    elif _cut(ours) != _cut(theirs):
        unlike = "its normalizer, pre-tokenizer and special tokens, found others around the same pieces"
    else:
        return
    raise TokenizerError(
        f"{who} was made with another tokenizer than the data: expected {unlike}; set data.tokenizer to that of the "
        "encoder, so that targets mean the same"
    )


def _cut(tokenizer: Any) -> list[int]:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return list(tokenizer.encode(PROBE, PROBE).ids)


def train_tokenizer(texts: Iterable[str], size: int) -> str:
    """A WordPiece ``tokenizer.json`` of every character and the most frequent words, at most ``size`` pieces.

    Counted, not merged pair by pair: the package's trainers give other pieces in other processes. Han characters are
    words of their own.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalise = normalizers.BertNormalizer(lowercase=False, strip_accents=False, handle_chinese_chars=True)
    split = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(normalise.normalize_str(text)))
    characters = sorted({char for word in counts for char in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces = [*SPECIAL, *characters, *(f"##{char}" for char in characters), *words][:size]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalise, split
    tokenizer.add_special_tokens(list(SPECIAL))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return str(tokenizer.to_str())


# --- pruning


def used_pieces(text: str, ids: Iterable[NDArray[Any]], extra: int = 0) -> NDArray[np.int64]:
    """The pieces to keep, as sorted ids: those in ``ids``, special ones, single characters, and ``extra`` others: the
    likeliest (the first, since vocabularies are in order of frequency) in scripts that at least SCRIPT_SHARE of the
    pieces in ``ids`` are written in, then the rest.

    Single characters keep every text within reach that was, and byte pieces stand for what is unknown.
    """
    value, vocabulary = json.loads(text), parse(text).get_vocab()
    added = {token["id"] for token in value.get("added_tokens", [])}
    names = {number: piece for piece, number in vocabulary.items()}
    used = set(np.unique(np.concatenate([np.asarray(part).ravel() for part in ids])).tolist())
    counts = Counter(script for number in used for script in _scripts(names[number]))
    written = {script for script, count in counts.items() if count >= SCRIPT_SHARE * len(used)}
    kept = used | added
    marks = ("##", "▁", "Ġ")
    for piece, number in vocabulary.items():
        bare = next((piece[len(mark) :] for mark in marks if piece.startswith(mark)), piece)
        if len(bare) <= 1 or (piece.startswith("<0x") and piece.endswith(">")):
            kept.add(number)
    unknown = value["model"].get("unk_token")
    kept |= {vocabulary[unknown]} if unknown in vocabulary else set()
    for number in sorted(names, key=lambda number: (not _scripts(names[number]) <= written, number)):
        if extra <= 0:
            break
        if number not in kept:
            kept.add(number)
            extra -= 1
    if value["model"]["type"] == "BPE":
        kept = _with_parts(value["model"], kept)
    return np.array(sorted(kept), np.int64)


def _scripts(piece: str) -> set[str]:
    """The first words of the Unicode names of its letters: LATIN, CYRILLIC, CJK ..."""
    return {unicodedata.name(letter, "?").split()[0] for letter in piece if letter.isalpha()}


def _with_parts(model: Any, kept: set[int]) -> set[int]:
    """Also the pieces that the kept ones are merged of, in byte-pair encoding."""
    vocabulary: dict[str, int] = model["vocab"]
    made: dict[str, tuple[str, str]] = {}
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        made.setdefault(left + right, (left, right))
    names = {number: piece for piece, number in vocabulary.items()}
    waiting = [names[number] for number in kept if number in names]
    while waiting:
        for part in made.get(waiting.pop(), ()):
            if vocabulary[part] not in kept:
                kept.add(vocabulary[part])
                waiting.append(part)
    return kept


def prune(text: str, kept: Sequence[int] | NDArray[Any]) -> str:
    """``tokenizer.json`` with the pieces ``kept`` alone, renumbered in order. Raises TokenizerError."""
    value = json.loads(text)
    model, new = value["model"], {int(old): number for number, old in enumerate(kept)}
    if model["type"] == "Unigram":
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in new]
        model["unk_id"] = new[model["unk_id"]] if model.get("unk_id") is not None else None
    elif model["type"] in ("WordPiece", "BPE"):
        pieces = model["vocab"]
        model["vocab"] = {piece: new[number] for piece, number in pieces.items() if number in new}
        if model["type"] == "BPE":
            pairs = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
            there = model["vocab"]
            model["merges"] = [pair for pair in pairs if {*pair, pair[0] + pair[1]} <= there.keys()]
    else:
        raise TokenizerError(f"expected a Unigram, WordPiece or BPE tokenizer to prune, found {model['type']}")
    for token in value.get("added_tokens", []):
        token["id"] = new[token["id"]]
    _renumber(value.get("post_processor"), new)
    pruned = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    parse(pruned)
    return pruned


def lookup(text: str, pruned: str, kept: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each of ``count`` piece numbers of ``text`` the one in ``pruned``, made of it by keeping ``kept``.

    A piece that was dropped becomes the longest of those that the pruned tokenizer cuts it into: so much a model sees
    of it where the whole tokenizer has cut the texts already, as it has those of a data artifact.
    """
    whole, small = parse(text), parse(pruned)
    inside = "##" if json.loads(text)["model"]["type"] == "WordPiece" else ""
    table = np.zeros(count, np.int64)
    table[kept] = np.arange(len(kept))
    for number in np.setdiff1d(np.arange(whole.get_vocab_size()), kept).tolist():
        parts = small.model.tokenize(whole.id_to_token(number).removeprefix(inside))
        if parts:
            table[number] = max(parts, key=lambda part: part.offsets[1] - part.offsets[0]).id
    return table


def _renumber(value: Any, new: dict[int, int]) -> None:
    """The ids of special tokens inside a post-processor, in place."""
    if isinstance(value, dict):
        if isinstance(value.get("ids"), list) and "tokens" in value:
            value["ids"] = [new[number] for number in value["ids"]]
        for key in ("sep", "cls"):
            if isinstance(value.get(key), list):
                value[key] = [value[key][0], new[value[key][1]]]
        for item in value.values():
            _renumber(item, new)
    elif isinstance(value, list):
        for item in value:
            _renumber(item, new)
