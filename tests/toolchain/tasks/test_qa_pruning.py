from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from tests.toolchain.qa_doubles import SMALL, data, net, run
from tests.toolchain.tasks.test_qa_nets import feeds, saved
from toolchain.tasks.backbones import ModelError
from toolchain.tasks.qa_batches import SpanBatches
from toolchain.tasks.qa_nets import QaNet, deploy, load
from toolchain.tasks.qa_pruning import kept_layers, layers_of, narrow, plan, smaller
from toolchain.tasks.qa_tokenizer import parse, used_pieces

WIDE = {"options": SMALL | {"intermediate_size": 24}}


def wide(work: Path) -> QaNet:
    return net(work, student=WIDE)


def batches(work: Path) -> list[dict[str, torch.Tensor]]:
    return list(SpanBatches(run(work), ("train",), 8).epoch(0))[:3]


def test_layers_are_kept_evenly_and_the_last_always() -> None:
    assert kept_layers(12, 4) == [2, 5, 8, 11]
    assert kept_layers(12, 12) == list(range(12))
    assert kept_layers(3, 2) == [1, 2]
    with pytest.raises(ModelError, match="at most the teacher's 2"):
        kept_layers(2, 3)


def test_a_smaller_copy_reads_what_it_knows_as_before(tmp_path: Path) -> None:
    model = net(tmp_path / "run")
    ids, mask = feeds(8)
    pieces = used_pieces(model.tokenizer, [ids.numpy()])
    assert len(pieces) < data().info["pieces"]
    copy = smaller(model, [0, 1], pieces)
    torch.testing.assert_close(copy(ids, mask), model(ids, mask))
    assert copy.settings["separator"] == parse(copy.tokenizer).token_to_id("[SEP]")
    assert copy.own(ids).max() < len(pieces)
    lost = np.setdiff1d(np.arange(data().info["pieces"]), pieces)
    assert copy.own(torch.from_numpy(lost)).max() < len(pieces)
    half = smaller(model, [1], None)
    assert len(layers_of(half.encoder)) == 1
    assert torch.equal(
        layers_of(half.encoder)[0].state_dict()["output.dense.weight"],
        layers_of(model.encoder)[1].state_dict()["output.dense.weight"],
    )
    again = load(saved(smaller(model, [1], pieces), tmp_path / "student"))
    assert again(ids, mask).isfinite().all()
    assert list(deploy(again, {}).arrays) == ["lookup.input_ids.npy"]


def test_the_neurons_that_change_the_output_most_stay(tmp_path: Path) -> None:
    model, seen = wide(tmp_path), batches(tmp_path)
    taken: list[torch.Tensor] = []
    first = layers_of(model.encoder)[0]
    handle = first.output.dense.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    for batch in seen:
        model(batch["input_ids"], batch["attention_mask"])
    handle.remove()
    tokens = [rows[batch["attention_mask"] > 0] for rows, batch in zip(taken, seen, strict=True)]
    found, into, out = torch.cat(tokens).detach(), first.intermediate.dense, first.output.dense
    strength = found.var(0, unbiased=False) * out.weight.detach().square().sum(0)
    keep = np.sort(np.argsort(-strength.numpy())[:10])
    gone = np.setdiff1d(np.arange(24), keep)
    bias = out.bias + out.weight[:, gone] @ found[:, gone].mean(0)
    rows, columns = into.weight[keep], out.weight[:, keep]
    narrow(model, 10, seen)
    first = layers_of(model.encoder)[0]
    assert torch.equal(first.intermediate.dense.weight, rows)
    assert torch.equal(first.output.dense.weight, columns)
    torch.testing.assert_close(first.output.dense.bias, bias)
    assert len(first.intermediate.dense.bias) == model.encoder.config.intermediate_size == 10


def test_neurons_that_never_change_cost_nothing(tmp_path: Path) -> None:
    model, seen = wide(tmp_path), batches(tmp_path)
    with torch.no_grad():
        for layer in layers_of(model.encoder):
            layer.intermediate.dense.weight[::2] = 0
            layer.intermediate.dense.bias[::2] = torch.linspace(0.1, 1, 12)
    ids, mask = feeds(8)
    before = model(ids, mask)
    narrow(model, 12, seen)
    torch.testing.assert_close(model(ids, mask), before)
    again = load(saved(model, tmp_path / "student"))
    assert torch.equal(again(ids, mask), model(ids, mask))
    start, _ = deploy(again, {}).module(ids, mask)
    torch.testing.assert_close(start, before[:, :, 0])


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    encoder = wide(tmp_path).encoder
    with pytest.raises(ModelError, match="intermediate_size: expected fewer than the teacher's 24, found 24"):
        plan(encoder, 1, 24)
    with pytest.raises(ModelError, match=r"one linear map to the 16 intermediate .* found 6 and 6; leave the key out"):
        plan(net(tmp_path).encoder, 1, 8)
    other = DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, hidden_dim=12, n_layers=1, n_heads=2))
    with pytest.raises(ModelError, match="DistilBertModel has no such size; leave the key out"):
        plan(other, 1, 8)
    layers_of(encoder)[1].output.dense.bias = None
    with pytest.raises(ModelError, match="from them, with biases, found 1 and 1 without; leave the key out"):
        plan(encoder, 1, 8)
