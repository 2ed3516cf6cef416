from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from toolchain.artifact import ArtifactError, EdgestillError
from toolchain.tasks.backbones import load_safetensors


def safetensors_file(path: Path, header_bytes: int) -> None:
    """One tensor of two floats, its header padded to ``header_bytes``."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).ljust(header_bytes)
    values = torch.tensor([1.5, -2.0]).numpy().tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + values)


@pytest.mark.parametrize("header_bytes", [0x80, 0x180, 0x4B50])
def test_safetensors_whose_length_begins_like_a_pickle_or_a_zip_are_read(tmp_path: Path, header_bytes: int) -> None:
    safetensors_file(tmp_path / "model.safetensors", header_bytes)
    assert (tmp_path / "model.safetensors").read_bytes()[:2] in (b"\x80\x00", b"\x80\x01", b"PK")
    assert load_safetensors(tmp_path / "model.safetensors")["w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_in_both_of_torchs_formats(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match="expected safetensors, found a pickle, never opened here"):
        load_safetensors(path)


def test_what_is_neither_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(EdgestillError, match="expected safetensors"):
        load_safetensors(tmp_path / "model.safetensors")
    with pytest.raises(EdgestillError, match="expected safetensors"):
        load_safetensors(tmp_path / "missing.safetensors")
