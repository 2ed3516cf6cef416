"""Checkpoints of a training: tensors as safetensors, the rest as JSON, the last two kept. Nothing is pickled.

A checkpoint is ``checkpoint-<step>.safetensors`` and, written after it, ``checkpoint-<step>.json`` with its sha256.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolchain.artifact import EdgestillError, digest, sha256, write_json

KEPT = 2


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors atomically; tied and strided tensors are written as copies."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(copies, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors onto the CPU. Raises EdgestillError when the file is not one."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EdgestillError(f"{path}: expected safetensors, found {error}; make the artifact again") from error


@dataclass
class Checkpoint:
    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of ``step`` and remove all but the last two, leftovers of killed writes included."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:09d}.safetensors"
    save_tensors(path, tensors)
    write_json(path.with_suffix(".json"), {"sha256": sha256(path), "state_sha256": digest(state), "state": dict(state)})
    earlier = [old for old in _newest_first(folder) if old.stem <= path.stem][:KEPT]
    kept = {old.stem for old in earlier}
    for file in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]:
        if file.stem not in kept:
            file.unlink()
    return path


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.json"), reverse=True)


def read(folder: Path) -> Iterator[Checkpoint | str]:
    """The checkpoints in ``folder``, newest first; for one that is damaged, a sentence saying so."""
    for path in _newest_first(folder):
        file = path.with_suffix(".safetensors")
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if sha256(file) != entry["sha256"] or digest(entry["state"]) != entry["state_sha256"]:
                raise ValueError("its sha256 is not the recorded one")
            yield Checkpoint(file, load_tensors(file), entry["state"])
        except (OSError, ValueError, KeyError, TypeError, EdgestillError) as error:
            yield f"{path} is damaged ({error})"


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Torch's random states of this process, uint8."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_rng_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
