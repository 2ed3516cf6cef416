"""From question sets to the data artifact: which articles train and which are held out, sampled, cut into windows.

Splits: ``first`` (one language, for the first stage; may be absent), ``train`` (the cross-lingual sample),
``unlabelled`` (more questions, drawn like it; may be absent), ``val`` and ``test`` (every pair of languages; in
``test`` also languages that were never trained on). A row is a window.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.qa_windows import Cut, Layout, Window, arrays, label_of, layout_of, windows
from toolchain.tasks import Arrays, Data, Split, qa_readers
from toolchain.tasks.datasets import DataError
from toolchain.tasks.qa_readers import (
    Question,
    aligned,
    all_pairs,
    article_split,
    check_leak,
    of_articles,
    sample_pairs,
)
from toolchain.tasks.qa_templates import articles
from toolchain.tasks.qa_tokenizer import TOKENIZER, parse, read_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from toolchain.tasks.qa import DataSection

ByLanguage = Mapping[str, Sequence[Question]]
USED = "pieces.json"  # the pieces in use in the languages of the data: what a smaller vocabulary keeps
FEEDS = ("input_ids", "attention_mask")
CELLS, UNSEEN, TYDIQA = "cells", "unseen", "tydiqa"  # parts of a scored split
TRAINED_PIECES = 2000
UNLABELLED = -1  # start and end of a window whose label is not looked at


@dataclass
class Sets:
    """Questions by use; ``val`` and ``test`` by part."""

    first: list[Question]
    train: dict[str, dict[str, Question]]
    val: dict[str, list[Question]]
    test: dict[str, list[Question]]
    unlabelled: dict[str, dict[str, Question]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tokenizer: str | None = None  # where the source brings its own
    texts: set[str] = field(default_factory=set)  # of all articles that may be trained on, used for training or not


def assemble(section: DataSection) -> Data:
    """Raises DataError, DownloadError, TokenizerError, WindowError."""
    sets = {"templates": _templates, "xquad": _xquad, "folder": _folder}[section.source](section)
    _check(sets)
    train, unlabelled = (
        sample_pairs(ids, section.languages, section.ntl, section.sampling_seed, section.pivot, section.keep_pivot)
        for ids in (sets.train, sets.unlabelled)
    )
    if not train:
        raise DataError("no aligned training question in the languages asked for; check data.languages")
    text = sets.tokenizer or read_tokenizer(str(section.tokenizer))
    maker = _Maker(text, section)
    splits, asked = {}, len(sets.first) + len(train)
    if sets.first:
        splits["first"], sets.first = maker.split(sets.first, section.first_windows)
    splits["train"], train = maker.split(train)
    if lost := asked - len(sets.first) - len(train):
        sets.notes.append(f"{lost} training questions were left out: no window holds their whole answer.")
    if unlabelled:
        labelled = {(question.question, question.context) for question in (*sets.first, *train)}
        if known := sum((question.question, question.context) in labelled for question in unlabelled):
            sets.notes.append(f"{known} unlabelled questions are also trained on with their labels, in another set.")
        splits["unlabelled"] = maker.unlabelled(unlabelled)
    splits |= {name: maker.scored(parts) for name, parts in (("val", sets.val), ("test", sets.test))}
    info = {
        "languages": list(section.languages),
        "pieces": parse(text).get_vocab_size(),
        "windows": section.windows.model_dump(),
        "positions": max(one.max_length for one in (section.windows, section.first_windows or section.windows)),
        "typed": maker.layout.typed,
        "separator": maker.layout.suffix[0],
        "pad": maker.layout.pad,
        "pairs": _pairs(train),
        "questions": {"first": len(sets.first), "train ids": len(sets.train), "train": len(train)}
        | ({"unlabelled": len(unlabelled)} if unlabelled else {}),
        "note": " ".join(sets.notes) or None,
    }
    return Data(splits, info, {TOKENIZER: text, USED: json.dumps(maker.pieces(sets.texts))})


def _check(sets: Sets) -> None:
    drawn = (sets.train, sets.unlabelled)
    trained = [*sets.first, *(question for ids in drawn for here in ids.values() for question in here.values())]
    sides = {
        name: [question for part in parts.values() for question in part]
        for name, parts in (("the validation split", sets.val), ("the test split", sets.test))
    }
    for name, held_out in sides.items():
        check_leak(trained, held_out, name)
    check_leak(sides["the validation split"], sides["the test split"], "the test split", "the validation articles")


def _pairs(train: Sequence[Question]) -> dict[str, Any]:
    """How often each language pair is in the sample, with mean and standard deviation."""
    counts = Counter("-".join(question.cell) for question in train)
    values = list(counts.values())
    return {"mean": float(np.mean(values)), "sd": float(np.std(values)), "counts": dict(sorted(counts.items()))}


def _few(names: Iterable[str], most: int | None) -> list[str]:
    """At most ``most`` of ``names``, always the same ones."""
    order = sorted(names)
    random.Random(0).shuffle(order)
    return sorted(order if most is None else order[:most])


def _of(questions: Sequence[Question], most: int | None) -> list[Question]:
    kept = set(_few([question.id for question in questions], most))
    return [question for question in questions if question.id in kept]


# --- sources


def _templates(section: DataSection) -> Sets:
    first, train, val, test = (
        articles(part, count, section.sampling_seed)
        for part, count in zip(("first", "train", "val", "test"), section.articles, strict=True)
    )
    note = "Texts are made of templates: the scores say that the chain works, nothing about real questions."
    sets = _sets(section, first[section.pivot], train, val, test, [note])
    known = (question for part in (first, train) for questions in part.values() for question in questions)
    texts = {text for question in known for text in (question.question, question.context)}
    sets.tokenizer = train_tokenizer(texts, TRAINED_PIECES)
    return sets


def _folder(section: DataSection) -> Sets:
    folder = Path(str(section.path)).expanduser()
    parts = {part: qa_readers.own_files(folder, part, section.languages) for part in ("train", "val", "test")}
    for language in section.unseen:
        parts["test"][language] = qa_readers.read_squad(folder / f"test.{language}.json", language)
    first = folder / f"first.{section.pivot}.json"
    questions = qa_readers.read_squad(first, section.pivot) if first.is_file() else []
    unlabelled, notes = {}, []
    if section.unlabelled_questions:
        unlabelled = qa_readers.own_unlabelled(folder, section.languages)
        for part in ("val", "test"):
            check_leak(_every(unlabelled), _every(parts[part]), f"the {part} split", "the unlabelled questions")
    elif qa_readers.own_places(folder, "unlabelled", section.languages):
        notes = ["The files unlabelled.*.json are not used: set data.unlabelled_questions to how many of them to use."]
    notes += [note for part, found in parts.items() if (note := _unaligned(part, found, section.languages))]
    return _sets(section, questions, parts["train"], parts["val"], parts["test"], notes, unlabelled)


def _every(found: ByLanguage) -> list[Question]:
    return [question for questions in found.values() for question in questions]


def _unaligned(part: str, found: ByLanguage, languages: Sequence[str]) -> str | None:
    """How many ids lack a language. Raises DataError where two languages of a scored part share none."""
    ids = {language: {question.id for question in found.get(language, ())} for language in languages}
    for one, other in combinations(languages, 2):
        if part != "train" and not ids[one] & ids[other]:
            raise DataError(
                f"{part}.{one}.json and {part}.{other}.json: expected questions with the same ids, which are "
                "translations of each other, found none; give translations one id"
            )
    everywhere = set.union(*ids.values())
    lack = sum(not all(name in own for own in ids.values()) for name in everywhere)
    return f"{lack} questions of {part} are not in every language." if lack else None


def _xquad(section: DataSection) -> Sets:
    root, download = qa_readers.qa_root(section.path), section.download
    everything = {
        language: qa_readers.xquad(language, root, download) for language in (*section.languages, *section.unseen)
    }
    pairs = [(q, c) for q in section.languages for c in section.languages] if section.evaluate == "mlqa" else []
    mlqa = {part: {pair: qa_readers.mlqa(*pair, part, root, download) for pair in pairs} for part in ("dev", "test")}
    tydiqa = {language: qa_readers.tydiqa(language, "dev", root, download) for language in section.tydiqa}
    titles = {question.title for question in everything[section.pivot]}
    train, val, test = article_split(titles) if section.evaluate == "xquad" else (titles, set(), set())
    trained, chosen, tested = (
        {language: [q for q in questions if q.title in part] for language, questions in everything.items()}
        for part in (train, val, test)
    )
    measured = [question for part in mlqa.values() for questions in part.values() for question in questions]
    measured += [question for questions in tydiqa.values() for question in questions]
    trained, notes = _apart(trained, of_articles(measured))
    held_out = of_articles([*measured, *(q for q in everything[section.pivot] if q.title not in train)])
    first = _first(section, root, train)
    kept = [question for question in first if not held_out(question)]
    if lost := len(first) - len(kept):
        notes.append(f"{lost} questions of the first stage were left out: their articles are held out.")
    notes.append(
        "Not comparable with published XQuAD numbers: its articles are training data here, and scores are on held-out "
        "articles."
        if section.evaluate == "xquad"
        else "XQuAD's trained languages are training data here, no test set."
    )
    sets = _sets(section, kept, trained, chosen, tested, notes)
    for part, name in ((sets.val, "dev"), (sets.test, "test")):
        if pairs:
            part[CELLS] = [
                replace(question, id=f"{question.id}_{q}-{c}")
                for (q, c), questions in mlqa[name].items()
                for question in _of(questions, section.eval_questions)
            ]
    if tydiqa:
        sets.test[TYDIQA] = [q for questions in tydiqa.values() for q in _of(questions, section.eval_questions)]
    return sets


def _apart(
    trained: dict[str, list[Question]], measured: Callable[[Question], bool]
) -> tuple[dict[str, list[Question]], list[str]]:
    """``trained`` without the questions, in all languages, of articles that are measured, and a note of how many."""
    lost = {question.id for questions in trained.values() for question in questions if measured(question)}
    note = f"{len(lost)} training questions of XQuAD were left out: their articles are tested or chosen by."
    kept = {language: [q for q in questions if q.id not in lost] for language, questions in trained.items()}
    return kept, [note] if lost else []


def _first(section: DataSection, root: Path, train: set[str]) -> list[Question]:
    found: list[Question] = []
    if "squad_train" in section.first:
        found += qa_readers.squad_train(root, section.download)
    if "squad_dev" in section.first:
        found += [q for q in qa_readers.squad_dev(root, section.download) if q.title in train]
    if "tydiqa_en" in section.first:
        found += qa_readers.tydiqa("en", "train", root, section.download)
    return found


def _sets(
    section: DataSection,
    first: Sequence[Question],
    train: ByLanguage,
    val: ByLanguage,
    test: ByLanguage,
    notes: list[str],
    unlabelled: ByLanguage | None = None,
) -> Sets:
    """Aligned by id, cut to the numbers asked for, crossed where they are scored."""
    own = {language: questions for language, questions in train.items() if language in section.languages}
    ids = aligned(own)
    kept = _few(ids, section.train_questions)
    more = aligned(unlabelled) if unlabelled else {name: ids[name] for name in ids.keys() - set(kept)}
    parts = []
    for by_language in (val, test):
        names = aligned(by_language)
        chosen = {name: names[name] for name in _few(names, section.eval_questions)}
        parts.append(chosen)
    tested = {CELLS: all_pairs(parts[1], section.languages)}
    if section.unseen:
        tested[UNSEEN] = [
            here[language] for here in parts[1].values() for language in section.unseen if language in here
        ]
        tested[UNSEEN] = [replace(q, id=f"{q.id}_{q.language}-{q.language}") for q in tested[UNSEEN]]
    readable = [*first, *_every(own), *_every(unlabelled or {})]
    return Sets(
        _of(first, section.first_questions),
        {name: ids[name] for name in kept},
        {CELLS: all_pairs(parts[0], section.languages)},
        tested,
        {name: more[name] for name in _unlabelled(section, more)},
        notes,
        texts={text for question in readable for text in (question.question, question.context)},
    )


def _unlabelled(section: DataSection, left: Collection[str]) -> list[str]:
    """The ids of ``unlabelled_questions``, of those that are ``left``."""
    if section.unlabelled_questions and not left:
        files = ", give files unlabelled.<language>.json" if section.source == "folder" else ""
        raise DataError(
            f"unlabelled_questions: expected training questions beside the {section.train_questions or 'ones'} of "
            f"train_questions, found none; lower train_questions{files}, or leave unlabelled_questions out"
        )
    return _few(left, section.unlabelled_questions) if section.unlabelled_questions else []


# --- windows


class _Maker:
    """Cuts questions into the arrays of a split."""

    def __init__(self, tokenizer: str, section: DataSection) -> None:
        self.tokenizer, self.section = parse(tokenizer), section
        self.layout: Layout = layout_of(self.tokenizer)

    def split(self, questions: Sequence[Question], other: Any = None) -> tuple[Split, list[Question]]:
        """To train on: windows and their labels, of the questions that have a window with the whole answer.

        Raises DataError when none has.
        """
        settings = other or self.section.windows
        found = self._arrays(questions, settings, decode=False)
        kept = np.unique(found["question"][found["end"] > 0])
        if not len(kept):
            raise DataError(
                f"expected training answers that are whole in a window of {settings.max_length} tokens, found none "
                f"among {len(questions)} questions; raise max_length, or lower step"
            )
        rows = np.isin(found["question"], kept)
        arrays = {name: array[rows] for name, array in found.items()}
        arrays["question"] = np.searchsorted(kept, arrays["question"]).astype(np.int32)
        return Split(arrays, FEEDS, mask="attention_mask"), [questions[number] for number in kept]

    def unlabelled(self, questions: Sequence[Question]) -> Split:
        """To ask a teacher about: windows, whether or not they hold an answer, all of them labelled UNLABELLED."""
        _, found = self._cut(questions, self.section.windows, decode=False)
        found |= {name: np.full(len(found["question"]), UNLABELLED, np.int64) for name in ("start", "end")}
        return Split(found, FEEDS, mask="attention_mask")

    def scored(self, parts: Mapping[str, Sequence[Question]]) -> Split:
        """To score: what decoding and scoring need, too; shuffled, so that any prefix is a fair sample."""
        questions = [question for part in parts.values() for question in part]
        found = self._arrays(questions, self.section.windows, decode=True)
        order = np.random.default_rng(0).permutation(len(found["question"]))
        contexts = list(dict.fromkeys(question.context for question in questions))
        place = {context: number for number, context in enumerate(contexts)}
        meta = {
            "questions": [
                {
                    "id": question.id,
                    "part": part,
                    "question": question.question,
                    "context": place[question.context],
                    "answers": [text for text, _ in question.answers],
                    "cell": list(question.cell),
                }
                for part, members in parts.items()
                for question in members
            ],
            "contexts": contexts,
            "languages": list(self.section.languages),
            "normaliser": self.section.normaliser,
        }
        return Split({name: array[order] for name, array in found.items()}, FEEDS, meta, "attention_mask")

    def pieces(self, texts: set[str]) -> list[int]:
        """The numbers of the pieces that ``texts`` are cut into, sorted."""
        found = self.tokenizer.encode_batch(sorted(texts), add_special_tokens=False)
        return sorted({number for text in found for number in text.ids})

    def _cut(self, questions: Sequence[Question], settings: Any, decode: bool) -> tuple[list[Window], Arrays]:
        cut = Cut(settings.max_length, settings.max_question, settings.step, settings.overlap)
        asked, read = [q.question for q in questions], [q.context for q in questions]
        found = list(windows(self.tokenizer, self.layout, cut, asked, read))
        result = arrays(found, max(len(window.ids) for window in found), self.layout.pad, decode)
        result["question"] = np.array([window.pair for window in found], np.int32)
        return found, result

    def _arrays(self, questions: Sequence[Question], settings: Any, decode: bool) -> Arrays:
        found, result = self._cut(questions, settings, decode)
        labels = []
        for window in found:
            text, start = questions[window.pair].answers[0]
            labels.append(label_of(window, start, start + len(text)))
        result["start"], result["end"] = np.array(labels, np.int64).T.copy()
        return result
