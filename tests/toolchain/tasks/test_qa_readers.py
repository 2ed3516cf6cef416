from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from toolchain import download
from toolchain.tasks import qa_readers
from toolchain.tasks.datasets import DataError
from toolchain.tasks.qa_readers import (
    MLQA,
    Question,
    aligned,
    all_pairs,
    article_split,
    check_leak,
    read_squad,
    sample_pairs,
)

LANGUAGES = ("en", "es", "de", "ar", "vi", "hi", "zh")


def squad(*questions: dict[str, Any], title: str = "Lima") -> dict[str, Any]:
    context = "Ana vive en Lima, la capital."
    base = {"id": "1", "question": "¿Dónde vive Ana?", "answers": [{"text": "Lima", "answer_start": 12}]}
    qas = [base | question for question in questions or ({},)]
    return {"data": [{"title": title, "paragraphs": [{"context": context, "qas": qas}]}]}


def written(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_file_is_read_without_a_version_and_zipped_too(tmp_path: Path, name: str) -> None:
    (question,) = read_squad(written(tmp_path / name, squad()), "es", "de")
    assert question.answers == (("Lima", 12),)
    assert question.cell == ("es", "de")
    assert question.context[12:16] == "Lima"


def test_answers_lose_outer_white_space(tmp_path: Path) -> None:
    answers = [{"text": " Lima", "answer_start": 11}, {"text": "en ", "answer_start": 9}]
    (question,) = read_squad(written(tmp_path / "a.json", squad({"answers": answers})), "es")
    assert question.answers == (("Lima", 12), ("en", 9))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "expected SQuAD-v1.1 JSON"),
        ({"data": [{"paragraphs": [{"qas": [{}]}]}]}, "found KeyError"),
        ({"data": []}, "expected questions, found none"),
        (squad({"answers": []}), "question 1: expected an answer, found none; unanswerable"),
        (squad({}, {}), "the id 1 is there twice"),
        (
            squad({"answers": [{"text": "Lima", "answer_start": 13}]}),
            "question 1: expected 'Lima' at offset 13, found 'ima,'; answer_start should be 12",
        ),
        (squad({"answers": [{"text": "Lima", "answer_start": -1}]}), "found 'Ana'; answer_start should be 12"),
        (squad({"answers": [{"text": "Quito", "answer_start": 3}]}), "nowhere in the context; remove it"),
        (squad({"answers": [{"text": "Lima", "answer_start": "12"}]}), "expected a text and a number"),
        (squad({"answers": [{"text": " ", "answer_start": 3}]}), "expected a text and a number"),
    ],
)
def test_a_wrong_file_is_named_with_id_expected_found_and_remedy(tmp_path: Path, value: Any, message: str) -> None:
    path = written(tmp_path / "bad.json", value)
    with pytest.raises(DataError) as caught:
        read_squad(path, "es")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def made(count: int, languages: tuple[str, ...] = LANGUAGES) -> dict[str, dict[str, Question]]:
    return aligned(
        {
            language: [
                Question(f"q{n}", f"t{n} {language}", f"? {language}", f"c {language}", (("c", 0),), language, language)
                for n in range(count)
            ]
            for language in languages
        }
    )


@pytest.mark.parametrize(
    ("ntl", "size"), [(0, 8330), (1, 4760), (2, 10710), (3, 19040), (4, 29750), (5, 42840), (6, 58310)]
)
def test_the_sample_has_the_published_sizes(ntl: int, size: int) -> None:
    found = sample_pairs(made(1190), LANGUAGES, ntl, seed=3)
    assert len(found) == size
    counts = Counter(question.cell for question in found)
    assert set(counts) <= {(q, c) for q in LANGUAGES for c in LANGUAGES if ntl or q == c}
    if 0 < ntl < 6:
        assert counts["en", "en"] == 1190
        assert counts["es", "es"] < 1190


def test_a_pair_asks_in_one_language_about_the_other() -> None:
    found = {question.id: question for question in sample_pairs(made(1), LANGUAGES, 6, seed=0)}
    one = found["q0_es-zh"]
    assert (one.question, one.title, one.context, one.answers) == ("? es", "t0 es", "c zh", (("c", 0),))
    assert len(found) == 49
    assert {q.id for q in all_pairs(made(1), ("en", "es"))} == {"q0_en-en", "q0_en-es", "q0_es-en", "q0_es-es"}


def test_the_pivot_may_be_drawn_like_the_others_and_a_missing_language_is_left_out() -> None:
    cells = [q.cell for q in sample_pairs(made(300), LANGUAGES, 2, seed=0, keep_pivot=False)]
    assert len(cells) == 300 * 4
    assert Counter(cells)["en", "en"] < 300
    some = {"q": {language: made(1)["q0"][language] for language in ("en", "de")}}
    assert {q.cell for q in sample_pairs(some, LANGUAGES, 3, seed=0)} == {
        (a, b) for a in ("en", "de") for b in ("en", "de")
    }


def test_the_sample_is_the_same_in_every_process() -> None:
    script = (
        "from tests.toolchain.tasks.test_qa_readers import *\n"
        "print(hashlib.sha256(repr(sample_pairs(made(60), LANGUAGES, 3, 7)).encode()).hexdigest())"
    )
    root = Path(__file__).parents[3]
    found = set()
    for hashed in ("0", "1", "random"):
        env = os.environ | {"PYTHONHASHSEED": hashed, "PYTHONPATH": str(root)}
        found.add(subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True).stdout)
    assert len(found) == 1
    assert sample_pairs(made(60), LANGUAGES, 3, 7) != sample_pairs(made(60), LANGUAGES, 3, 8)


def test_articles_are_split_as_documented(data_root: Path) -> None:
    root = qa_readers.qa_root(None)
    if not (root / "xquad").is_dir():
        pytest.skip("no xquad in the data folder")
    questions = qa_readers.xquad("en", root)
    parts = article_split(question.title for question in questions)
    assert [sum(q.title in part for q in questions) for part in parts] == [915, 86, 189]
    dev = qa_readers.squad_dev(root)
    assert [sum(q.title in part for q in dev) for part in parts] == [6743, 407, 1448]
    with pytest.raises(DataError, match="expected 48 articles"):
        article_split(["a", "b"])


def test_every_real_file_has_right_offsets(data_root: Path) -> None:
    root = qa_readers.qa_root(None)
    if not (root / "xquad").is_dir():
        pytest.skip("no xquad in the data folder")
    sizes = {language: len(qa_readers.xquad(language, root)) for language in qa_readers.XQUAD}
    assert set(sizes.values()) == {1190}
    expected = {"ar": 921, "bn": 113, "en": 440, "fi": 782, "id": 565, "ko": 276, "ru": 812, "sw": 499, "te": 669}
    assert {one: len(qa_readers.tydiqa(one, "dev", root)) for one in expected} == expected
    assert len(qa_readers.tydiqa("en", "train", root)) == 3696


def test_squad_dev_is_read_outside_the_paragraphs_of_xquad(tmp_path: Path) -> None:
    value = squad({"id": "1"}, {"id": "2"})
    other = squad({"id": "3"})["data"][0]["paragraphs"][0]
    value["data"][0]["paragraphs"].append(other | {"context": f"{other['context']} Y."})
    written(tmp_path / "squad" / "dev-v1.1.json", value)
    written(tmp_path / "xquad" / "xquad.en.json", squad({"id": "2"}))
    assert [question.id for question in qa_readers.squad_dev(tmp_path)] == ["3"]


def test_mlqa_is_read_by_both_languages(tmp_path: Path) -> None:
    written(tmp_path / "mlqa" / "test" / "test-context-es-question-de.json", squad())
    (question,) = qa_readers.mlqa("de", "es", "test", tmp_path)
    assert question.cell == ("de", "es")
    with pytest.raises(DataError, match=r"MLQA_V1\.zip is not there; set data\.download=true .* \(75\.7 MB\)"):
        qa_readers.mlqa("de", "es", "dev", tmp_path)
    assert len(MLQA) == 7


def test_tydiqa_is_read_from_the_file_of_all_languages(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fetch it from https://.*/tydiqa-goldp-v1\.1-train\.json"):
        qa_readers.tydiqa("fi", "train", tmp_path)
    value = squad({"id": "finnish-1-0"}, {"id": "english--2-0"})
    written(tmp_path / "tydiqa_goldp" / "tydiqa-goldp-v1.1-train.json", value)
    found = [(q.id, q.title) for one in ("fi", "en") for q in qa_readers.tydiqa(one, "train", tmp_path)]
    assert found == [("finnish-1-0", "fi:Lima"), ("english--2-0", "Lima")]


def test_an_article_on_both_sides_is_an_error() -> None:
    def one(name: str, title: str, context: str) -> Question:
        return Question(name, title, "?", context, (("c", 0),), "en", "en")

    train = [one("1", "Super_Bowl_50", "c a")]
    check_leak(train, [one("2", "Warsaw", "c b"), one("3", "", "c c")], "the test split")
    for leak in (one("2", "Super Bowl 50", "c b"), one("2", "Other", "c a")):
        with pytest.raises(DataError, match=r"\(question 2\) is among the training articles and in the test split"):
            check_leak(train, [leak], "the test split")
    with pytest.raises(DataError, match=r"is among the validation articles and in the test split; split by article"):
        check_leak(train, [one("2", "Super Bowl 50", "c b")], "the test split", "the validation articles")


def test_a_file_of_ones_own_is_looked_for_by_language(tmp_path: Path) -> None:
    written(tmp_path / "train.es.json", squad())
    assert list(qa_readers.own_files(tmp_path, "train", ("en", "es"))) == ["es"]
    with pytest.raises(DataError, match=r"expected SQuAD-v1.1 files of the test split .* found no test\.en\.json"):
        qa_readers.own_files(tmp_path, "test", ("en", "es"))


@contextmanager
def served(content: bytes) -> Iterator[Callable[[str], download.Remote]]:
    """What serves ``content`` under any name."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        home, digest = f"http://127.0.0.1:{server.server_port}", hashlib.sha256(content).hexdigest()
        yield lambda name: download.Remote(f"{home}/{name}", digest, len(content))
        server.shutdown()
        thread.join()


def archive(member: str) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(member, json.dumps(squad()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("dataset", "name", "content", "read"),
    [
        ("xquad", "xquad.es.json", json.dumps(squad()).encode(), partial(qa_readers.xquad, "es")),
        ("squad", "train-v1.1.json", json.dumps(squad()).encode(), qa_readers.squad_train),
        (
            "tydiqa_goldp",
            "tydiqa-goldp-v1.1-dev.json",
            json.dumps(squad({"id": "finnish-1-0"})).encode(),
            partial(qa_readers.tydiqa, "fi", "dev"),
        ),
        (
            "mlqa",
            "MLQA_V1.zip",
            archive("MLQA_V1/test/test-context-es-question-de.json"),
            partial(qa_readers.mlqa, "de", "es", "test"),
        ),
    ],
)
def test_public_files_are_downloaded_only_when_asked_for(
    dataset: str, name: str, content: bytes, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(content) as remote:
        monkeypatch.setitem(download.PUBLIC, dataset, (remote(name),))
        with pytest.raises(DataError, match=r"set data\.download=true to fetch it from http://127"):
            read(tmp_path)
        assert len(read(tmp_path, download=True)) == 1
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"no archive", archive("MLQA_V1/dev/other.json")])
def test_an_archive_that_is_none_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mlqa").mkdir()
    (tmp_path / "mlqa" / "MLQA_V1.zip").write_bytes(content)
    with pytest.raises(
        DataError, match=r"MLQA_V1\.zip: expected an archive with MLQA_V1/dev/dev-context-es-q.* remove"
    ):
        qa_readers.mlqa("de", "es", "dev", tmp_path)
    assert [path.name for path in (tmp_path / "mlqa").rglob("*")] == ["MLQA_V1.zip"]


def test_an_archive_in_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "mlqa").mkdir()
    (tmp_path / "mlqa" / "MLQA_V1.zip").write_bytes(archive("MLQA_V1/test/test-context-es-question-de.json"))
    (tmp_path / "mlqa" / "MLQA_V1").write_text("a file in the folder's place")
    with pytest.raises(DataError, match=r"test-context-es-question-de\.json: cannot be written .* unpack MLQA_V1\.zip"):
        qa_readers.mlqa("de", "es", "test", tmp_path)
