"""Smaller encoders cut out of a trained one: fewer layers, word pieces and intermediate neurons.

The distillation that repairs what is lost is ``methods/qa_student.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.tasks.backbones import ModelError
from toolchain.tasks.qa_nets import QaNet
from toolchain.tasks.qa_tokenizer import lookup, prune


def layers_of(encoder: Any) -> nn.ModuleList:
    """The list of an encoder's layers, whatever the architecture calls it. Raises ModelError."""
    count = int(encoder.config.num_hidden_layers)
    lists = (module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    found = next(lists, None)
    if found is None:
        raise ModelError(
            f"{type(encoder).__name__}: found no list of its {count} layers; method qa_student cannot cut it"
        )
    return found


def plan(encoder: Any, layers: int | None, width: int | None) -> tuple[list[int], str]:
    """The layers that are kept of the teacher's encoder, and with their ``width`` in words; None keeps all.

    Raises ModelError.
    """
    total = int(encoder.config.num_hidden_layers)
    kept = kept_layers(total, layers or total)
    words = f"layers {kept} of the teacher's {total}"
    if width is not None:
        whole = intermediate_size(encoder)
        if width >= whole:
            raise ModelError(f"method.intermediate_size: expected fewer than the teacher's {whole}, found {width}")
        words += f", {width} of its {whole} intermediate neurons in each"
    return kept, words


def kept_layers(total: int, count: int) -> list[int]:
    """``count`` of ``total`` layers, evenly, the last among them: 12 to 4 gives 2, 5, 8, 11."""
    if count > total:
        raise ModelError(f"student.layers: expected at most the teacher's {total}, found {count}")
    return [round((index + 1) * total / count) - 1 for index in range(count)]


def smaller(net: QaNet, layers: list[int], pieces: NDArray[np.int64] | None) -> QaNet:
    """A copy of ``net`` with some of its ``layers``, and of its vocabulary only ``pieces`` (old numbers, sorted)."""
    result = copy.deepcopy(net)
    chosen = layers_of(result.encoder)
    modules = [chosen[index] for index in layers]
    while len(chosen):
        del chosen[0]
    chosen.extend(modules)
    result.encoder.config.num_hidden_layers = len(layers)
    if pieces is None:
        return result
    old = result.encoder.get_input_embeddings()
    new = {int(number): place for place, number in enumerate(pieces)}
    pad = new.get(int(net.settings["pad"]), 0)
    embedding = nn.Embedding(len(pieces), old.embedding_dim, padding_idx=pad)
    with torch.no_grad():
        embedding.weight.copy_(old.weight[torch.from_numpy(pieces)])
    result.encoder.set_input_embeddings(embedding)
    result.encoder.config.vocab_size, result.encoder.config.pad_token_id = len(pieces), pad
    result.tokenizer = prune(net.tokenizer, pieces)
    table = lookup(net.tokenizer, result.tokenizer, pieces, old.num_embeddings)
    result.register_buffer("table", torch.from_numpy(table), persistent=False)
    result.settings |= {"separator": new[int(net.settings["separator"])], "pad": pad}
    return result


# --- intermediate neurons


def intermediate_size(encoder: Any) -> int:
    """The encoder's intermediate neurons per layer. Raises ModelError unless `narrow` can cut them."""
    total = getattr(encoder.config, "intermediate_size", None)
    if total is None:
        raise ModelError(f"method.intermediate_size: {type(encoder).__name__} has no such size; leave the key out")
    for layer in layers_of(encoder):
        _feed_forward(layer, total)
    return int(total)


def _feed_forward(layer: nn.Module, total: int) -> tuple[nn.Linear, nn.Linear]:
    """The linear maps of a layer to its intermediate neurons and from them."""
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    into = [module for module in linear if module.out_features == total]
    out = [module for module in linear if module.in_features == total]
    biased = all(module.bias is not None for module in into + out)
    if len(into) != 1 or len(out) != 1 or into[0] is out[0] or not biased:
        raise ModelError(
            f"method.intermediate_size: expected one linear map to the {total} intermediate neurons of a "
            f"{type(layer).__name__} and one from them, with biases, found {len(into)} and {len(out)}"
            f"{'' if biased else ' without'}; leave the key out"
        )
    return into[0], out[0]


def narrow(net: QaNet, width: int, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Leave, in place, ``width`` intermediate neurons in every layer of ``net``, by what they do on ``batches``.

    Those stay whose removal would change the layer's output most once their mean is in its bias: the neurons j of the
    largest Var(a_j) * |W_out[:, j]|^2 (FLAP, An et al., arXiv 2312.11983, which compares layers too; here all keep as
    many). Raises ModelError for layers without a plain pair of linear maps.
    """
    total = intermediate_size(net.encoder)
    for layer, mean, variance in zip(layers_of(net.encoder), *_moments(net, batches), strict=True):
        into, out = _feed_forward(layer, total)
        score = variance * out.weight.detach().double().square().sum(0)
        keep = score.argsort(descending=True, stable=True)[:width].sort().values
        gone = torch.ones(total, dtype=torch.bool, device=keep.device)
        gone[keep] = False
        with torch.no_grad():
            out.bias.copy_(out.bias + out.weight[:, gone].double() @ mean[gone])
            into.weight, out.weight = nn.Parameter(into.weight[keep]), nn.Parameter(out.weight[:, keep].contiguous())
            into.bias = nn.Parameter(into.bias[keep])
        into.out_features, out.in_features = width, width
    net.encoder.config.intermediate_size = width


@torch.inference_mode()
def _moments(net: QaNet, batches: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance (layers, neurons) of the intermediate activations, over tokens that are not padding."""
    device, total = net.head.weight.device, intermediate_size(net.encoder)
    maps = [_feed_forward(layer, total)[1] for layer in layers_of(net.encoder)]
    sums = torch.zeros(2, len(maps), total, dtype=torch.float64, device=device)
    mask, count = torch.empty(0, device=device), 0

    def add(place: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken = inputs[0][mask > 0].double()
        sums[:, place] += torch.stack([taken.sum(0), taken.square().sum(0)])

    with ExitStack() as hooks:
        for place, module in enumerate(maps):
            hooks.callback(module.register_forward_pre_hook(partial(add, place)).remove)
        for batch in batches:
            ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
            net.eval()(ids, mask)
            count += int(mask.sum())
    mean = sums[0] / count
    return mean, sums[1] / count - mean.square()
