from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.toolchain.qa_doubles import DATA, SMALL, config, data, net, run
from toolchain.artifact import create
from toolchain.checkpoint import save_tensors
from toolchain.tasks import qa
from toolchain.tasks.backbones import ModelError
from toolchain.tasks.qa_batches import SpanBatches, outputs
from toolchain.tasks.qa_nets import build, load, network, save_extra
from toolchain.tasks.qa_tokenizer import TokenizerError, parse


def feeds(count: int = 3, split: str = "test") -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in data().splits[split].feed(slice(0, count)).values()]


def saved(model, folder: Path) -> Path:
    with create(folder, stage="student", config={}) as draft:
        save_tensors(draft.path / "model.safetensors", model.state_dict())
        save_extra(model, draft.path)
    return folder


def test_the_same_seed_gives_the_same_network_and_padding_changes_nothing(tmp_path: Path) -> None:
    first, second = net(tmp_path / "a"), net(tmp_path / "b")
    ids, mask = feeds()
    out = first(ids, mask)
    assert torch.equal(out, second(ids, mask))
    assert out.shape == (*ids.shape, 2)
    assert (out[mask == 0] == -1e4).all()
    padded = first(torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5)))
    torch.testing.assert_close(padded[:, :-5], out, atol=1e-5, rtol=1e-5)
    assert (padded[:, -5:] == -1e4).all()


def test_token_types_tell_question_and_context_apart(tmp_path: Path) -> None:
    model = net(tmp_path)
    ids, mask = feeds(1)
    seen = {}
    model.encoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(ids, mask)
    expected = parse(model.tokenizer).encode("a", "b")
    assert expected.type_ids == [0, 0, 0, 1, 1]
    second = int((ids[0] == model.settings["separator"]).nonzero()[0])
    assert seen["token_type_ids"][0].tolist() == [0] * (second + 1) + [1] * (ids.shape[1] - second - 1)


def test_any_encoder_in_a_folder_and_its_tokenizer_must_be_the_datas(tmp_path: Path, monkeypatch) -> None:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    encoder = XLMRobertaModel(XLMRobertaConfig(**SMALL, vocab_size=data().info["pieces"], max_position_embeddings=64))
    encoder.save_pretrained(tmp_path / "models" / "mine")
    own = tmp_path / "models" / "mine" / "tokenizer.json"
    own.write_text(data().files["tokenizer.json"])
    monkeypatch.setenv("EDGESTILL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    this = run(tmp_path / "run", student={"model": "mine", "dropout": 0.3})
    model = network(this)
    assert model.encoder.config.hidden_dropout_prob == 0.3
    for name, value in encoder.state_dict().items():
        if not name.startswith("pooler"):
            assert torch.equal(model.encoder.state_dict()[name], value)
    random = build(config(student={"model": "mine", "weights": "random"}).student, data().info, 0)
    assert not torch.equal(next(random.encoder.parameters()), next(model.encoder.parameters()))
    assert model.eval()(*feeds()).isfinite().all()
    changed = json.loads(own.read_text())
    changed["model"]["vocab"] = {
        piece: (n + 1) % len(changed["model"]["vocab"]) for piece, n in changed["model"]["vocab"].items()
    }
    own.write_text(json.dumps(changed))
    with pytest.raises(TokenizerError, match="the encoder mine was made with another tokenizer"):
        network(this)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"options": {"hiden_size": 8}}, "BertConfig has no 'hiden_size'"),
        ({"options": {"vocab_size": 10}}, "expected at least the tokenizer's"),
        ({"options": {"max_position_embeddings": 20}}, "fewer than data.windows.max_length 48"),
        ({"model": "nowhere/nothing"}, "a hub id that can be reached"),
    ],
)
def test_what_does_not_fit_is_explained(student: dict, message: str, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=message):
        build(config(student=student).student, data().info, 0)


def test_an_artifact_is_enough_to_load_a_network(tmp_path: Path) -> None:
    model = net(tmp_path / "run")
    again = load(saved(model, tmp_path / "student"))
    assert torch.equal(model(*feeds()), again(*feeds()))
    assert (again.tokenizer, again.settings) == (model.tokenizer, model.settings)
    assert qa.files_state(config().student) is None
    assert os.listdir(tmp_path / "student")


def test_batches_are_of_like_length_and_cover_the_set(tmp_path: Path) -> None:
    batches = SpanBatches(run(tmp_path), ("first", "train"), 8)
    total = len(data().splits["first"]) + len(data().splits["train"])
    found = [batch["index"].tolist() for batch in batches.epoch(0)]
    assert len({index for batch in found for index in batch}) == total // 8 * 8
    assert found == [batch["index"].tolist() for batch in batches.epoch(0)]
    assert found != [batch["index"].tolist() for batch in batches.epoch(1)]
    padding = mixed = 0
    for batch in batches.epoch(0):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        padding += int((batch["attention_mask"] == 0).sum())
    order = np.random.default_rng(0).permutation(total)
    for at in range(0, total // 8 * 8, 8):
        length = batches.length[order[at : at + 8]]
        mixed += int((length.max() - length).sum())
    assert padding < 0.7 * mixed
    with pytest.raises(Exception, match="no split 'second'"):
        SpanBatches(run(tmp_path), ("second",), 8)


def test_scoring_gives_every_window_its_own_logits(tmp_path: Path) -> None:
    model, split = net(tmp_path), data().splits["test"]
    found = outputs(model, split, torch.device("cpu"))
    ids, mask = feeds(5)
    alone = model(ids, mask).detach().numpy()
    np.testing.assert_allclose(found["start"][:5, : ids.shape[1]], alone[:, :, 0], atol=1e-5)
    assert qa.scorer(run(tmp_path), "test")(model) == qa.score(found, split)


def test_a_dry_run_describes_student_and_teacher() -> None:
    assert "-> [2, " in qa.dry_run(config(), data())["student"]
    both = config(method="qa_student", teacher={"options": SMALL}, student={"layers": 1})
    assert qa.dry_run(both, data())["student"] == "layers [1] of the teacher's 2"
    wide = {"options": SMALL | {"intermediate_size": 24}}
    both = config(method={"name": "qa_student", "intermediate_size": 8}, teacher=wide, student={})
    words = "layers [0, 1] of the teacher's 2, 8 of its 24 intermediate neurons in each"
    assert qa.dry_run(both, data())["student"] == words
    assert DATA["ntl"] == 1
