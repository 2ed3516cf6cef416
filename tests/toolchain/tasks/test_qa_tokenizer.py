from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from toolchain.tasks.qa_readers import article_split, qa_root, xquad
from toolchain.tasks.qa_templates import articles
from toolchain.tasks.qa_tokenizer import (
    TokenizerError,
    check_same,
    lookup,
    parse,
    prune,
    read_tokenizer,
    train_tokenizer,
    used_pieces,
)

E5 = "multilingual-e5-small-12lang"


def texts(part: str = "train", languages: tuple[str, ...] = ("en", "es", "de", "ru", "zh")) -> list[str]:
    found = articles(part, 20, 0)
    return [text for one in languages for q in found[one] for text in (q.question, q.context)]


def byte_pairs() -> str:
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    return made.to_str()


def unigrams() -> str:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(texts(), trainer)
    return made.to_str()


@pytest.mark.parametrize(
    "make", [lambda: train_tokenizer(texts(), 600), byte_pairs, unigrams], ids=["wp", "bpe", "uni"]
)
def test_pruning_leaves_the_languages_in_use_as_they_are_and_reads_everything_else(make) -> None:
    text = make()
    whole, mine = parse(text), texts(languages=("en", "ru"))
    before = whole.encode_batch(mine)
    kept = used_pieces(text, [np.array(found.ids) for found in before])
    pruned = prune(text, kept)
    small = parse(pruned)
    assert small.get_vocab_size() == len(kept) < whole.get_vocab_size()
    assert len(pruned) < len(text)
    after = small.encode_batch(mine)
    assert [found.tokens for found in after] == [found.tokens for found in before]
    assert [kept[found.ids].tolist() for found in after] == [found.ids for found in before]
    for strange in ("Wohnung Tierarzt", "日本 ขวด ☃", "¿Dónde vive el conejo?"):
        told = small.encode(strange, add_special_tokens=False)
        assert told.ids
        assert max(told.ids) < len(kept)
        assert told.offsets[-1][1] == len(strange)


def test_a_dropped_piece_is_looked_up_as_its_longest_part() -> None:
    text = train_tokenizer(["ab abc xyz", "a b c x y z"], 100)
    whole = parse(text)
    gone = whole.token_to_id("abc")
    kept = np.array([number for number in range(whole.get_vocab_size()) if number != gone])
    pruned = prune(text, kept)
    table = lookup(text, pruned, kept, whole.get_vocab_size() + 3)
    assert (kept[table[kept]] == kept).all()
    assert parse(pruned).id_to_token(int(table[gone])) == "ab"
    assert len(table) == whole.get_vocab_size() + 3


def test_pieces_can_be_kept_beyond_those_in_use() -> None:
    text = train_tokenizer(texts(), 600)
    least = used_pieces(text, [np.array([0])])
    more = used_pieces(text, [np.array([0])], extra=40)
    assert len(more) == len(least) + 40
    assert set(least) < set(more)


def test_more_pieces_are_first_of_the_scripts_in_use() -> None:
    words = ["Γειά", "друг", "Ἀθῆναι", "river", "mountain", "河山", "straße", "dog"]
    text = train_tokenizer([" ".join(words)] * 3, 600)
    number = parse(text).token_to_id
    used = [np.array([number(word) for word in ("river", "dog", "河山"[0])])]
    least = used_pieces(text, used)
    more = set(used_pieces(text, used, extra=2)) - set(least)
    assert more == {number("mountain"), number("straße")}
    assert len(used_pieces(text, used, extra=5)) == len(least) + 5


def test_the_trained_tokenizer_is_the_same_in_every_process() -> None:
    script = (
        "import hashlib\nfrom tests.toolchain.tasks.test_qa_tokenizer import *\n"
        "print(hashlib.sha256(train_tokenizer(texts(), 600).encode()).hexdigest())"
    )
    run = [subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout for _ in range(2)]
    assert run[0] == run[1]
    assert parse(train_tokenizer(texts(), 600)).encode("王安娜").tokens[1:-1] != ["王安娜"]


def test_another_tokenizer_is_an_error_not_garbage() -> None:
    mine, other = train_tokenizer(texts(), 600), train_tokenizer(texts(), 500)
    check_same(mine, json.dumps(json.loads(mine), indent=1), "the teacher")
    with pytest.raises(TokenizerError, match=r"the teacher was made with another tokenizer.*set data\.tokenizer"):
        check_same(mine, other, "the teacher")
    lower = json.loads(mine)
    lower["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(TokenizerError, match=r"found others around the same pieces"):
        check_same(mine, json.dumps(lower), "the teacher")


def test_a_tokenizer_is_found_in_a_folder_and_its_absence_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = train_tokenizer(texts(), 500)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "tokenizer.json").write_text(text)
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("EDGESTILL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_tokenizer("mine") == read_tokenizer(str(tmp_path / "models" / "mine")) == text
    with pytest.raises(TokenizerError, match=r"expected a folder with tokenizer\.json"):
        read_tokenizer(str(tmp_path / "data"))


def test_pruning_the_real_vocabulary(data_root: Path) -> None:
    if not (data_root.parent / "models" / E5).is_dir():
        pytest.skip(f"no {E5} beside the data folder")
    text = read_tokenizer(E5)
    whole = parse(text)
    mine = [q.context for language in ("en", "zh") for q in xquad(language, qa_root(None))[::5]]
    before = whole.encode_batch(mine)
    kept = used_pieces(text, [np.array(found.ids) for found in before])
    assert len(kept) < 0.5 * whole.get_vocab_size()
    after = parse(prune(text, kept)).encode_batch(mine)
    assert [found.tokens for found in after] == [found.tokens for found in before]


def test_texts_of_other_articles_keep_their_real_pieces(data_root: Path) -> None:
    if not (data_root.parent / "models" / E5).is_dir() or not (qa_root(None) / "xquad").is_dir():
        pytest.skip(f"no {E5} beside the data folder, or no xquad in it")
    text = read_tokenizer(E5)
    whole = parse(text)
    questions = [q for language in ("en", "es", "zh") for q in xquad(language, qa_root(None))]
    train, _, test = article_split(q.title for q in questions)
    known, others = (sorted({q.context for q in questions if q.title in part}) for part in (train, test))
    used, longer = [np.array(whole.encode(one).ids) for one in known], []
    before = [whole.encode(one).tokens for one in others]
    for extra in (0, 12_000, 24_000):
        small = parse(prune(text, used_pieces(text, used, extra)))
        after = [small.encode(one).tokens for one in others]
        longer.append(sum(map(len, after)) / sum(map(len, before)) - 1)
    assert 0 <= longer[2] < 0.001 < longer[1] < 0.08 < longer[0] < 0.16, longer  # other articles have other words
