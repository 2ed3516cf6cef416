"""Encoders with a span head: any Hugging Face encoder, and what makes a trained one deployable."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.artifact import Port, verify
from toolchain.tasks import FILL
from toolchain.tasks.backbones import WEIGHTS, ModelError, load_state, seeded
from toolchain.tasks.nets import Deploy
from toolchain.tasks.qa_tokenizer import TOKENIZER, check_same, encoder_folder, read_tokenizer

if TYPE_CHECKING:
    from toolchain.tasks import Data
    from toolchain.tasks.qa import Encoder
    from toolchain.train import Run

CONFIG, SETTINGS, PIECES = "config.json", "qa.json", "lookup.input_ids.npy"
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


class QaNet(nn.Module):
    """``encoder`` and one linear layer to the logits of start and end.

    ``settings``: ``windows``, ``typed`` (whether the context has token type 1) and ``separator`` (the token id before
    it). ``table`` (data pieces,) int64 translates the data's piece numbers to those of a pruned vocabulary.
    """

    table: Tensor | None

    def __init__(
        self, encoder: Any, settings: Mapping[str, Any], tokenizer: str = "", table: NDArray[np.int64] | None = None
    ) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        self.encoder, self.settings, self.tokenizer = encoder, dict(settings), tokenizer
        self.head = nn.Linear(int(encoder.config.hidden_size), 2)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("table", None if table is None else torch.from_numpy(table), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) int64 -> logits (B, S, 2) of start and end; padding has FILL."""
        return self.spans(self.own(input_ids), attention_mask)

    def own(self, input_ids: Tensor) -> Tensor:
        return input_ids if self.table is None else self.table[input_ids]

    def spans(self, own_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``forward`` of ids in this network's own piece numbers."""
        return self._head(self.encode(own_ids, attention_mask).last_hidden_state, attention_mask)

    def deep(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits, and the hidden states (B, S, width) after the embeddings and after each layer."""
        found = self.encode(self.own(input_ids), attention_mask, output_hidden_states=True)
        return self._head(found.last_hidden_state, attention_mask), found.hidden_states

    def encode(self, own_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        if self.settings["typed"]:
            ends = (own_ids == self.settings["separator"]).long()
            options["token_type_ids"] = ((ends.cumsum(1) - ends) > 0).long() * attention_mask
        return self.encoder(input_ids=own_ids, attention_mask=attention_mask, **options)

    def _head(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(states)
        return torch.where(attention_mask[:, :, None] > 0, logits.float(), FILL)


def build(section: Encoder, info: Mapping[str, Any], seed: int) -> QaNet:
    """A new network of an ``Encoder`` section for data of ``info``; what is random is drawn from ``seed``."""
    from transformers import AutoConfig, AutoModel

    with seeded(seed):
        try:
            if section.model == "small":
                config = _small(section.options, info)
            else:
                source = str(encoder_folder(section.model) or section.model)
                config = AutoConfig.from_pretrained(source)
            for name in DROPOUTS if section.dropout is not None else ():
                if hasattr(config, name):
                    setattr(config, name, section.dropout)
            if section.model == "small" or section.weights == "random":
                encoder = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
            else:
                encoder = _pretrained(source, config)
        except ModelError:
            raise
        except Exception as error:  # transformers and the hub raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"model {section.model!r}: expected small, an encoder's folder (here, or in models/ in or beside the "
                f"data folder) or a hub id that can be reached; found {type(error).__name__}: {reason}"
            ) from error
        settings = {key: info[key] for key in ("windows", "typed", "separator", "pad")}
        net = QaNet(encoder, settings)
    _fits(encoder.config, section.model, info)
    return net


def _pretrained(source: str, config: Any) -> Any:
    """The encoder's weights; all but the pooler's, which is dropped, must be there. Raises ModelError."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder, found = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler")):
        raise ModelError(
            f"model {source}: its weights lack {missing[0]} and {len(missing) - 1} others; give an encoder's"
        )
    return encoder


def _small(options: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
    from transformers import BertConfig

    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    shape |= {"max_position_embeddings": info["positions"], "hidden_dropout_prob": 0.0}
    shape |= {"vocab_size": info["pieces"], "pad_token_id": info["pad"], "attention_probs_dropout_prob": 0.0}
    if strange := [key for key in options if key not in BertConfig().to_dict()]:
        raise ModelError(f"options: BertConfig has no {strange[0]!r}; it has {', '.join(shape)} and others")
    return BertConfig(**{**shape, **options})


def _fits(config: Any, model: str, info: Mapping[str, Any]) -> None:
    """Raise ModelError unless the encoder has the data's pieces and positions."""
    if config.vocab_size < info["pieces"]:
        raise ModelError(
            f"model {model}: expected at least the tokenizer's {info['pieces']:,} pieces, found {config.vocab_size:,}; "
            "set data.tokenizer to that of the encoder"
        )
    positions, longest = getattr(config, "max_position_embeddings", None), info["positions"]
    if positions is not None and positions < longest:
        raise ModelError(
            f"model {model}: has {positions} positions, fewer than data.windows.max_length {longest}; lower it"
        )


def network(run: Run) -> QaNet:
    """The run's student, with the tokenizer of its data. Raises TokenizerError when it has another one."""
    section = run.cfg.student
    net = run.student()
    assert isinstance(net, QaNet)
    net.tokenizer = run.data.files[TOKENIZER]
    if section.model != "small":
        check_same(net.tokenizer, read_tokenizer(section.model), f"the encoder {section.model}")
    return net


# --- artifacts


def save_extra(net: QaNet, folder: Path) -> None:
    net.encoder.config.to_json_file(folder / CONFIG)
    (folder / TOKENIZER).write_text(net.tokenizer, encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(net.settings), encoding="utf-8")
    if net.table is not None:
        np.save(folder / PIECES, _lookup(net.table), allow_pickle=False)


def _lookup(table: Tensor) -> NDArray[np.int32]:
    return table.cpu().numpy().astype(np.int32)


def load(folder: Path) -> QaNet:
    """A trained network from its artifact alone, in eval mode. Raises ArtifactError, ModelError."""
    from transformers import AutoConfig, AutoModel

    verify(folder)
    config = AutoConfig.from_pretrained(folder / CONFIG)
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    table = np.load(folder / PIECES).astype(np.int64) if (folder / PIECES).is_file() else None
    tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8")
    with seeded(0):
        encoder = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        net = QaNet(encoder, settings, tokenizer, table)
    load_state(net, folder / WEIGHTS)
    return net.eval()


class Spans(nn.Module):
    """Token ids in the network's own numbers in, ``start`` and ``end`` out."""

    def __init__(self, net: QaNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net.spans(input_ids, attention_mask)
        return logits[:, :, 0], logits[:, :, 1]


def deploy(model: nn.Module, info: Mapping[str, Any]) -> Deploy:
    """``model`` as a graph of dynamic batch and sequence; padding changes no other position."""
    net = copy.deepcopy(model)
    assert isinstance(net, QaNet)
    net.encoder.set_attn_implementation("eager")
    shape: tuple[int | str, ...] = ("batch", "sequence")
    size = (2, min(16, int(net.settings["windows"]["max_length"])))
    ids = torch.randint(0, int(net.encoder.config.vocab_size), size, generator=torch.Generator().manual_seed(0))
    return Deploy(
        module=Spans(net).eval(),
        inputs=[
            Port(
                "input_ids", "int64", shape, "question and part of the context, as the tokenizer numbers them", "index"
            ),
            Port("attention_mask", "int64", shape, "1 for a token, 0 for padding", "0 or 1"),
        ],
        outputs=[
            Port("start", "float32", shape, "the answer starts here", "logit"),
            Port("end", "float32", shape, "the answer ends here, inclusive", "logit"),
        ],
        example={"input_ids": ids, "attention_mask": torch.ones(size, dtype=torch.int64)},
        dynamic={name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")},
        files={TOKENIZER: net.tokenizer, SETTINGS: json.dumps(net.settings)},
        arrays={} if net.table is None else {PIECES: _lookup(net.table)},
    )


def dry_run(config: Any, data: Data) -> dict[str, str]:
    """The encoder of the config on two real windows, described."""
    from toolchain.tasks.qa_pruning import plan

    section = config.student if config.teacher is None else config.teacher
    net = build(section, data.info, config.seed).eval()
    feeds = data.splits["train"].feed(slice(0, 2))
    with torch.inference_mode():
        out = net(*(torch.from_numpy(array) for array in feeds.values()))
    count = sum(parameter.numel() for parameter in net.parameters())
    role = "student" if config.teacher is None else "teacher"
    found = {role: f"{section.model}: {list(feeds['input_ids'].shape)} -> {list(out.shape)}, {count:,} parameters"}
    if config.teacher is not None:
        _, found["student"] = plan(net.encoder, config.student.layers, config.method.intermediate_size)
    return found
