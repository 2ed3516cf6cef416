"""Questions from SQuAD-v1.1 JSON: XQuAD, SQuAD, TyDiQA-GoldP, MLQA, or a person's own files; splits by article.

Standard library only. Every answer's text is checked against its offset, which counts code points of the context, and
kept without outer white space, which no token would hold.
"""

from __future__ import annotations

import gzip
import json
import random
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolchain.download import PUBLIC, fetch
from toolchain.tasks.datasets import DataError, data_root

TYDIQA = {
    "ar": "arabic",
    "bn": "bengali",
    "en": "english",
    "fi": "finnish",
    "id": "indonesian",
    "ko": "korean",
    "ru": "russian",
    "sw": "swahili",
    "te": "telugu",
}
XQUAD = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
MLQA = ("en", "es", "de", "ar", "vi", "hi", "zh")
MLQA_FOLDER = "MLQA_V1"
ARTICLES = (36, 4, 8)  # of XQuAD's and SQuAD dev's 48 articles: train, val, test
ARTICLE_SEED = 13


@dataclass(frozen=True)
class Question:
    """A question in ``language`` about a context in ``context_language``; answers are (text, offset) in the context."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    language: str
    context_language: str

    @property
    def cell(self) -> tuple[str, str]:
        return self.language, self.context_language


def read_squad(
    path: Path,
    language: str,
    context_language: str | None = None,
    keep: Callable[[Any], bool] = lambda entry: True,
    answered: bool = True,
) -> list[Question]:
    """The questions of a SQuAD-v1.1 file (``.json`` or ``.json.gz``) for which ``keep`` of their JSON entry is true.

    Unless ``answered``, answers are not looked at and need not be there.

    Raises DataError: not such a file, an id twice, or an answer that is not at its offset.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            articles = json.load(file)["data"]
        found = [
            Question(
                str(entry["id"]),
                str(article.get("title", "")),
                entry["question"],
                paragraph["context"],
                tuple((answer["text"], answer["answer_start"]) for answer in (entry["answers"] if answered else ())),
                language,
                context_language or language,
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
            if keep(entry)
        ]
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file in SQuAD-v1.1 JSON, found nothing there") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise DataError(
            f"{path}: expected SQuAD-v1.1 JSON (data, paragraphs, qas, answers), found {type(error).__name__}: {error};"
            " give a file in that form"
        ) from error
    ids: set[str] = set()
    for question in found:
        if answered:
            check_offsets(question, path)
        if question.id in ids:
            raise DataError(f"{path}: the id {question.id} is there twice; give every question an id of its own")
        ids.add(question.id)
    if not found:
        raise DataError(f"{path}: expected questions, found none; give a file with some")
    return [replace(question, answers=tuple(_stripped(*answer) for answer in question.answers)) for question in found]


def _stripped(text: str, start: int) -> tuple[str, int]:
    return text.strip(), start + len(text) - len(text.lstrip())


def check_offsets(question: Question, path: Path) -> None:
    """Raise DataError unless every answer's text stands at its offset."""
    if not question.answers:
        raise DataError(
            f"{path}: question {question.id}: expected an answer, found none; unanswerable questions (SQuAD 2.0) are "
            "not part of this task: remove them"
        )
    for text, start in question.answers:
        if not isinstance(start, int) or not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}: question {question.id}: expected a text and a number, found {text!r}, {start!r}")
        found = question.context[max(start, 0) : start + len(text)]
        if start < 0 or found != text:
            at = question.context.find(text)
            remedy = f"answer_start should be {at}" if at >= 0 else "the text is nowhere in the context; remove it"
            raise DataError(
                f"{path}: question {question.id}: expected {text!r} at offset {start}, found {found!r}; {remedy} "
                "(offsets count code points, not bytes or UTF-16 units)"
            )


def article_split(titles: Iterable[str], sizes: Sequence[int] = ARTICLES, seed: int = ARTICLE_SEED) -> list[set[str]]:
    """Sorted titles, shuffled by ``random.Random(seed)``, cut into parts of ``sizes``. Raises DataError."""
    order = sorted(set(titles))
    if sum(sizes) != len(order):
        raise DataError(f"expected {sum(sizes)} articles to split into {tuple(sizes)}, found {len(order)}")
    random.Random(seed).shuffle(order)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [set(order[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def name_of(title: str) -> str:
    """A title as it is compared: ``American_Broadcasting_Company`` is ``american broadcasting company``."""
    return " ".join(title.replace("_", " ").casefold().split())


def of_articles(questions: Iterable[Question]) -> Callable[[Question], bool]:
    """Whether a question is of an article of ``questions``, by title or by the text of its context."""
    known = list(questions)
    titles, contexts = {name_of(q.title) for q in known if q.title}, {q.context for q in known}
    return lambda q: (bool(q.title) and name_of(q.title) in titles) or q.context in contexts


def check_leak(
    train: Iterable[Question], held_out: Iterable[Question], what: str, where: str = "the training articles"
) -> None:
    """Raise DataError when an article is on both sides."""
    trained = of_articles(train)
    for question in held_out:
        if trained(question):
            raise DataError(
                f"article {question.title!r} (question {question.id}) is among {where} and in {what}; "
                "split by article, so that nothing measured was trained on or chosen by"
            )


# --- where the files are


def qa_root(path: str | None) -> Path:
    """The folder of the question answering sets: ``qa`` in the data folder, or that folder itself."""
    root = data_root(path)
    return root / "qa" if (root / "qa").is_dir() or not root.exists() else root


def _there(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def public(dataset: str, name: str, root: Path, download: bool) -> Path:
    """A file of a public set under ``root/dataset``, downloaded when asked for. Raises DataError, DownloadError."""
    remote = next(remote for remote in PUBLIC[dataset] if remote.name == name)
    target = root / dataset / name
    if not target.is_file():
        if not download:
            raise DataError(
                f"{dataset}: {target} is not there; set data.download=true to fetch it from {remote.url} "
                f"({remote.size / 1e6:.1f} MB), or EDGESTILL_DATA to the folder that has it"
            )
        fetch(remote.url, target, remote.sha256, remote.size)
    return target


def xquad(language: str, root: Path, download: bool = False) -> list[Question]:
    return read_squad(public("xquad", f"xquad.{language}.json", root, download), language)


def squad_train(root: Path, download: bool = False) -> list[Question]:
    return read_squad(public("squad", "train-v1.1.json", root, download), "en")


def squad_dev(root: Path, download: bool = False) -> list[Question]:
    """SQuAD v1.1 dev outside XQuAD's paragraphs.

    The rebuilt copy marks those, and the questions whose answer occurs once, so that its offset is certain: only they
    are used. The original file is told apart by its lack of marks; XQuAD's questions are then left out by id.
    """
    rebuilt = root / "squad_v1.1_dev" / "dev-v1.1.rebuilt.json.gz"
    if rebuilt.is_file():
        return read_squad(rebuilt, "en", keep=lambda e: e["answer_start_unique"] and not e["in_xquad_paragraph"])
    everything = read_squad(public("squad", "dev-v1.1.json", root, download), "en")
    taken = {question.id for question in xquad("en", root, download)}
    paragraphs = {question.context for question in everything if question.id in taken}
    return [question for question in everything if question.context not in paragraphs]


def tydiqa(language: str, part: str, root: Path, download: bool = False) -> list[Question]:
    """TyDiQA-GoldP; ``part`` is ``train`` or ``dev``. Titles are of the language's own Wikipedia, which they name."""
    name = TYDIQA[language]  # which ids begin with: the public file holds all languages
    own = _there([root / "tydiqa_goldp"], [f"{name}_tydiqa_{part}.json", f"tydiqa-goldp-{part}-{name}.json"])
    path = own or public("tydiqa_goldp", f"tydiqa-goldp-v1.1-{part}.json", root, download)
    found = read_squad(path, language, keep=lambda entry: entry["id"].startswith(f"{name}-"))
    return found if language == "en" else [replace(q, title=f"{language}:{q.title}") for q in found]


def mlqa(language: str, context_language: str, part: str, root: Path, download: bool = False) -> list[Question]:
    """MLQA, unpacked or as its public archive; ``part`` is ``dev`` or ``test``."""
    member = f"{MLQA_FOLDER}/{part}/{part}-context-{context_language}-question-{language}.json"
    path = _there([root / "mlqa", root], [member, member.removeprefix(f"{MLQA_FOLDER}/")])
    path = path or _unpacked(public("mlqa", f"{MLQA_FOLDER}.zip", root, download), member)
    return read_squad(path, language, context_language)


def _unpacked(archive: Path, member: str) -> Path:
    """A file of an archive, written beside it. Raises DataError."""
    target = archive.parent / member
    part = target.with_name(f"{target.name}.part")
    try:
        with zipfile.ZipFile(archive) as file:
            content = file.read(member)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{archive}: expected an archive with {member}, found {type(error).__name__}: {error}; remove it and get "
            "it again with data.download=true"
        ) from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(target)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error.strerror or error}); unpack {archive.name} there, or choose another "
            "data.path"
        ) from error
    return target


def own_files(folder: Path, part: str, languages: Sequence[str]) -> dict[str, list[Question]]:
    """``<part>.<language>.json`` of a person's own folder: to train on in one language at least, else in all.

    Raises DataError.
    """
    paths = own_places(folder, part, languages)
    missing = [f"{part}.{language}.json" for language in languages if language not in paths]
    if missing and (part != "train" or not paths):
        raise DataError(
            f"{folder}: expected SQuAD-v1.1 files of the {part} split in the languages of data.languages, found no "
            f"{', '.join(missing)}; add what is missing, or take the languages out"
        )
    return {language: read_squad(path, language) for language, path in paths.items()}


def own_unlabelled(folder: Path, languages: Sequence[str]) -> dict[str, list[Question]]:
    """``unlabelled.<language>.json``, which may lack answers; there may be none. Raises DataError."""
    paths = own_places(folder, "unlabelled", languages)
    return {language: read_squad(path, language, answered=False) for language, path in paths.items()}


def own_places(folder: Path, part: str, languages: Sequence[str]) -> dict[str, Path]:
    """The ``<part>.<language>.json`` that are there, by language."""
    paths = {language: folder / f"{part}.{language}.json" for language in languages}
    return {language: path for language, path in paths.items() if path.is_file()}


# --- aligned sets and the cross-lingual sample


def aligned(by_language: Mapping[str, Sequence[Question]]) -> dict[str, dict[str, Question]]:
    """id -> language -> question: the same id in several languages is one question and its translations."""
    found: dict[str, dict[str, Question]] = {}
    for language, questions in by_language.items():
        for question in questions:
            found.setdefault(question.id, {})[language] = question
    return found


def crossed(asked: Question, read: Question) -> Question:
    """The question of ``asked`` about the context of ``read``, whose language the answer is in; title of ``asked``."""
    name = f"{asked.id}_{asked.language}-{read.context_language}"
    return replace(read, id=name, title=asked.title, question=asked.question, language=asked.language)


def all_pairs(by_id: Mapping[str, Mapping[str, Question]], languages: Sequence[str]) -> list[Question]:
    """Every (question language, context language) pair of every id: what is scored."""
    return [
        crossed(found[q], found[c])
        for found in by_id.values()
        for q in languages
        for c in languages
        if {q, c} <= set(found)
    ]


def sample_pairs(
    by_id: Mapping[str, Mapping[str, Question]],
    languages: Sequence[str],
    ntl: int,
    seed: int,
    pivot: str = "en",
    keep_pivot: bool = True,
) -> list[Question]:
    """The cross-lingual training sample: per id ``ntl`` target languages, and all ordered pairs among them.

    ``pivot`` is always among them unless ``keep_pivot`` is false. ``ntl`` 0 means every language, each with itself
    only. Languages are sorted before they are drawn and the generator is private, so (ids, seed) decide alone.
    """
    rng = random.Random(seed)
    found: list[Question] = []
    for name in sorted(by_id):
        here = by_id[name]
        targets = sorted(set(here) & set(languages) - ({pivot} if keep_pivot else set()))
        own = [pivot] if keep_pivot and pivot in here else []
        chosen = own + (targets if ntl == 0 or ntl >= len(targets) else rng.sample(targets, ntl))
        pairs = [(q, q) for q in chosen] if ntl == 0 else [(q, c) for q in chosen for c in chosen]
        found += [crossed(here[q], here[c]) for q, c in pairs]
    rng.shuffle(found)
    return found
