"""Which questions train and which are held out, from every source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toolchain.qa_doubles import DATA, SMALL, config, data
from tests.toolchain.tasks.test_qa import gold
from toolchain.faults import ConfigError
from toolchain.tasks import qa, qa_data, qa_tokenizer
from toolchain.tasks.datasets import DataError


def test_unlabelled_questions_are_others_of_the_training_articles_and_bring_no_label() -> None:
    few = DATA | {"train_questions": 6}
    without = qa.prepare(qa.DataSection.model_validate(few))
    found = qa.prepare(qa.DataSection.model_validate(few | {"unlabelled_questions": 5}))
    assert found.info["questions"] == {"first": 24, "train ids": 6, "train": 6 * 4, "unlabelled": 5 * 4}
    arrays = found.splits["unlabelled"].arrays
    assert all((arrays[side] == qa_data.UNLABELLED).all() for side in ("start", "end"))
    assert arrays["question"].max() == 5 * 4 - 1
    for name, split in without.splits.items():
        assert np.array_equal(split.arrays["input_ids"], found.splits[name].arrays["input_ids"])
    width = min(split.arrays["input_ids"].shape[1] for split in found.splits.values())
    rows = [{row.tobytes() for row in split.arrays["input_ids"][:, :width]} for split in found.splits.values()]
    names = list(found.splits)
    unlabelled = rows.pop(names.index("unlabelled"))
    assert not unlabelled & set().union(*rows)
    left = qa.prepare(qa.DataSection.model_validate(few | {"unlabelled_questions": 100}))
    assert left.info["questions"]["unlabelled"] == 12 * 4


def test_unlabelled_questions_need_some_that_are_left() -> None:
    with pytest.raises(ValueError, match="unlabelled_questions are those that train_questions leaves over"):
        qa.DataSection.model_validate(DATA | {"unlabelled_questions": 5})
    section = qa.DataSection.model_validate(DATA | {"train_questions": 18, "unlabelled_questions": 5})
    with pytest.raises(DataError, match="beside the 18 of train_questions, found none; lower train_questions"):
        qa.prepare(section)


def test_only_a_student_of_a_teacher_can_use_unlabelled_questions() -> None:
    few = DATA | {"train_questions": 6, "unlabelled_questions": 5}
    with pytest.raises(ConfigError, match=r"data.unlabelled_questions: method self_distillation needs labels"):
        config(data=few)
    student = {"method": {"name": "qa_student"}, "teacher": {"options": SMALL}, "student": {"layers": 1}}
    assert config(data=few, **student).data.unlabelled_questions == 5


def own_files(folder: Path, **numbers: list[int]) -> dict[str, Any]:
    """Files of a question for each number, and the section that reads them."""
    for part, articles in numbers.items():
        data_ = [
            {
                "title": f"a{number}",
                "paragraphs": [
                    {
                        "context": f"Number {number} is here.",
                        "qas": [
                            {"id": str(number), "question": f"Which {number}?"}
                            | ({} if part == "unlabelled" else {"answers": [{"text": str(number), "answer_start": 7}]})
                        ],
                    }
                ],
            }
            for number in articles
        ]
        (folder / f"{part}.en.json").write_text(json.dumps({"version": "1.1", "data": data_}))
    (folder / "tokenizer.json").write_text(data().files[qa_tokenizer.TOKENIZER])
    section = {"source": "folder", "path": str(folder), "tokenizer": str(folder), "languages": ["en"], "ntl": 0}
    return section | {"windows": DATA["windows"]}


def test_unlabelled_questions_that_are_labelled_elsewhere_are_told(tmp_path: Path) -> None:
    section = own_files(tmp_path, first=[0, 1, 2], train=[0, 1, 2], val=[3], test=[4])
    section |= {"train_questions": 1, "unlabelled_questions": 2}
    found = qa.prepare(qa.DataSection.model_validate(section))
    assert "2 unlabelled questions are also trained on with their labels" in found.info["note"]


def test_unlabelled_questions_may_be_files_without_answers(tmp_path: Path) -> None:
    section = own_files(tmp_path, train=[0, 1, 2], unlabelled=[5, 6, 7], val=[3], test=[4])
    without = qa.prepare(qa.DataSection.model_validate(section))
    assert "unlabelled" not in without.splits
    assert "unlabelled.*.json are not used: set data.unlabelled_questions" in without.info["note"]
    found = qa.prepare(qa.DataSection.model_validate(section | {"unlabelled_questions": 2}))
    assert found.info["questions"] == {"first": 0, "train ids": 3, "train": 3, "unlabelled": 2}
    assert (found.splits["unlabelled"].arrays["start"] == qa_data.UNLABELLED).all()
    own_files(tmp_path, unlabelled=[5, 6, 7, 4])
    with pytest.raises(DataError, match=r"article 'a4' .* is among the unlabelled questions and in the test split"):
        qa.prepare(qa.DataSection.model_validate(section | {"unlabelled_questions": 1}))
    assert qa.prepare(qa.DataSection.model_validate(section)).files["pieces.json"] == without.files["pieces.json"]


def test_unlabelled_questions_of_a_folder_need_files_or_questions_that_are_left(tmp_path: Path) -> None:
    section = own_files(tmp_path, train=[0, 1, 2], val=[3], test=[4]) | {"unlabelled_questions": 2}
    with pytest.raises(DataError, match=r"found none; lower train_questions, give files unlabelled\.<language>\.json"):
        qa.prepare(qa.DataSection.model_validate(section))


def test_a_config_without_unlabelled_questions_is_what_it_was() -> None:
    """Results of older versions, which had no such key, stay those of the same config."""
    section = qa.DataSection.model_validate(DATA)
    assert "unlabelled_questions" not in section.model_dump(mode="json")
    asked = section.model_copy(update={"unlabelled_questions": 2})
    assert (
        qa.DataSection.model_validate(asked.model_dump(mode="json") | {"train_questions": 3}).unlabelled_questions == 2
    )


def written(folder: Path, part: str, language: str, titles: list[str], answer: str = "Lima") -> None:
    context = f"{language}: Ana vive en Lima, la capital."
    start = context.index(answer)
    articles = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": f"{context} {title}",
                    "qas": [
                        {"id": title, "question": "?¿ dónde", "answers": [{"text": answer, "answer_start": start}]}
                    ],
                }
            ],
        }
        for title in titles
    ]
    (folder / f"{part}.{language}.json").write_text(json.dumps({"data": articles}))


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """The keys of a data section of one's own files, in two languages."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(data().files["tokenizer.json"])
    for part, titles in (("train", ["a", "b"]), ("val", ["c"]), ("test", ["d"])):
        for language in ("en", "es"):
            written(tmp_path, part, language, titles)
    return {
        "source": "folder",
        "path": str(tmp_path),
        "tokenizer": str(tmp_path / "tok"),
        "languages": ("en", "es"),
        "ntl": 1,
    }


def test_files_of_ones_own_and_a_leak_among_them(own: dict[str, Any], tmp_path: Path) -> None:
    section = qa.DataSection(**own)
    found = qa.prepare(section)
    assert len(found.splits["train"]) == 8
    assert "first" not in found.splits
    assert found.info["note"] is None
    before = qa.files_state(section)
    for path in Path(str(section.path)).iterdir():
        os.utime(path, (1, 1))
    assert qa.files_state(section) == before
    for language in ("en", "es"):
        written(tmp_path, "test", language, ["a"])
    assert qa.files_state(section) != before
    with pytest.raises(Exception, match=r"article 'a' .* is among the training articles and in the test split"):
        qa.prepare(section)


def test_translations_of_ones_own_have_the_same_ids(own: dict[str, Any], tmp_path: Path) -> None:
    section = qa.DataSection(**own)
    written(tmp_path, "test", "es", ["d", "e"])
    written(tmp_path, "train", "en", ["a"])
    note = qa.prepare(section).info["note"]
    assert note == "1 questions of train are not in every language. 1 questions of test are not in every language."
    written(tmp_path, "test", "es", ["e"])
    with pytest.raises(DataError, match=r"test\.en\.json and test\.es\.json: expected questions with the same ids"):
        qa.prepare(section)
    (tmp_path / "test.es.json").unlink()
    with pytest.raises(DataError, match=r"test split in the languages of data\.languages, found no test\.es\.json"):
        qa.prepare(section)


def test_languages_of_ones_own_that_are_only_tested(own: dict[str, Any], tmp_path: Path) -> None:
    section = qa.DataSection(**own, unseen=("de",))
    with pytest.raises(DataError, match=r"test\.de\.json: expected a file in SQuAD-v1\.1 JSON, found nothing there"):
        qa.prepare(section)
    written(tmp_path, "test", "de", ["d"])
    test = qa.prepare(section).splits["test"]
    assert [q["id"] for q in test.meta["questions"] if q["part"] == "unseen"] == ["d_de-de"]
    assert qa.score(gold(test), test)["unseen_f1"] == 100


def test_training_questions_without_a_whole_answer_are_left_out(own: dict[str, Any], tmp_path: Path) -> None:
    section = qa.DataSection(**own, windows=qa.Windows(max_length=24, max_question=8, step=4))
    plain = qa.prepare(section).splits["train"]
    written(tmp_path, "train", "es", ["a", "b"], answer="es: Ana vive en Lima, la capital.")
    found = qa.prepare(section)
    assert found.info["note"] == "4 training questions were left out: no window holds their whole answer."
    assert found.info["questions"]["train"] == 4
    assert found.info["pairs"]["counts"] == {"en-en": 2, "es-en": 2}
    train = found.splits["train"].arrays
    assert np.unique(train["question"]).tolist() == [0, 1, 2, 3]
    assert len(train["question"]) < len(plain)
    written(tmp_path, "train", "en", ["a", "b"], answer="en: Ana vive en Lima, la capital.")
    with pytest.raises(DataError, match=r"whole in a window of 24 tokens, found none among 8 questions; raise"):
        qa.prepare(section)


@pytest.fixture
def mlqa(tmp_path: Path) -> dict[str, Any]:
    """The keys of a data section of XQuAD's articles a and b, and of MLQA, whose articles are others."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(data().files["tokenizer.json"])
    for folder in ("xquad", "mlqa/dev", "mlqa/test"):
        (tmp_path / "qa" / folder).mkdir(parents=True)
    for language in ("en", "es"):
        written(tmp_path / "qa" / "xquad", "xquad", language, ["a", "b"])
        for part in ("dev", "test"):
            for other in ("en", "es"):
                mlqa_file(tmp_path, part, other, language, f"{part} article {language}")
    keys = {"path": str(tmp_path), "tokenizer": str(tmp_path / "tok"), "languages": ("en", "es"), "ntl": 1}
    return keys | {"source": "xquad", "evaluate": "mlqa"}


def mlqa_file(folder: Path, part: str, asked: str, read: str, *titles: str) -> None:
    written(folder, "mlqa", read, list(titles))
    name = f"{part}-context-{read}-question-{asked}.json"
    (folder / f"mlqa.{read}.json").replace(folder / "qa" / "mlqa" / part / name)


def test_mlqa_scores_what_all_of_xquad_trained(mlqa: dict[str, Any]) -> None:
    found = qa.prepare(qa.DataSection(**mlqa))
    assert len(found.splits["train"]) == 2 * 4
    assert {tuple(q["cell"]) for q in found.splits["test"].meta["questions"]} == {
        (a, b) for a in ("en", "es") for b in ("en", "es")
    }
    assert qa.score(gold(found.splits["test"]), found.splits["test"])["gxlt_f1"] == 100
    with pytest.raises(ValueError, match="translations of articles that evaluate: mlqa trains on"):
        qa.DataSection(**mlqa, unseen=("ru",))
    with pytest.raises(ValueError, match="scored by MLQA's own normaliser"):
        qa.DataSection(**mlqa, normaliser="squad")


def test_tydiqa_is_scored_as_squad_is_beside_mlqa_too(mlqa: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "qa" / "tydiqa_goldp").mkdir()
    written(tmp_path, "dev", "fi", ["finnish-1"])
    (tmp_path / "dev.fi.json").rename(tmp_path / "qa" / "tydiqa_goldp" / "finnish_tydiqa_dev.json")
    split = qa.prepare(qa.DataSection(**mlqa, tydiqa=("fi",))).splits["test"]
    assert split.meta["normaliser"] == "mlqa"
    told = {n: f"el {q['answers'][0]}" for n, q in enumerate(split.meta["questions"])}
    scores = qa.score_texts(told, split)  # "el" is an article in MLQA's Spanish alone
    assert scores["gxlt_em"] == 50
    assert scores["tydiqa_em"] == 0
    told = {n: f"the {q['answers'][0]}" for n, q in enumerate(split.meta["questions"])}
    scores = qa.score_texts(told, split)  # SQuAD's English articles go in every language
    assert scores["gxlt_em"] == 50
    assert scores["tydiqa_em"] == 100


def test_articles_of_mlqa_are_not_trained_on(mlqa: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "qa" / "tydiqa_goldp").mkdir()
    written(tmp_path, "first", "en", ["english-1", "english-2"])
    (tmp_path / "first.en.json").rename(tmp_path / "qa" / "tydiqa_goldp" / "english_tydiqa_train.json")
    mlqa_file(tmp_path, "test", "es", "en", "A", "English-2")
    found = qa.prepare(qa.DataSection(**mlqa, first=("tydiqa_en",)))
    assert found.info["questions"] == {"first": 1, "train ids": 1, "train": 4}
    assert "1 training questions of XQuAD were left out: their articles are tested or chosen by." in found.info["note"]
    assert "1 questions of the first stage were left out: their articles are held out." in found.info["note"]
