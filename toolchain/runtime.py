"""Run an artifact: numpy in, numpy out, on ONNX Runtime or TensorRT.

    with load("runs/digits/onnx/", threads=2) as model:
        out = model({"image": frames})  # {"probabilities": float32 (batch, classes), "label": int64 (batch,)}

Needs numpy; onnxruntime, tensorrt or tensorrt_rtx, and cuda.bindings are imported when an artifact asks for them.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toolchain import artifact
from toolchain.artifact import EdgestillError, Manifest, Port

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}
REMAKE = "; make the artifact again with this edgestill"
Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]


class RuntimeLoadError(EdgestillError):
    """The artifact cannot run here as asked: package, provider, device, or the model file itself."""


class DeviceMissing(RuntimeLoadError):
    """The artifact is for another device than those of this machine."""


class RuntimeInputError(EdgestillError):
    """The feeds are not what the model's ports say."""


class RuntimeRunError(EdgestillError):
    """The backend failed in a call, or the runtime is closed."""


class Runtime:
    """A loaded model. Safe to call from several threads; the arrays it returns are the caller's to keep.

    ``inputs`` and ``outputs`` are the artifact's ports; ``manifest`` is None for a FakeRuntime.
    """

    def __init__(self, inputs: list[Port], outputs: list[Port], manifest: Manifest | None = None) -> None:
        self.inputs, self.outputs, self.manifest = inputs, outputs, manifest
        self.closed = False

    def __call__(self, feeds: Feeds) -> Outputs:
        """Every output by name, for every input by name.

        Inputs must have their port's dtype (nothing is cast), rank and fixed sizes; one symbolic dimension has
        one size across all inputs; floats must be finite. Non-contiguous arrays are fine.
        Raises RuntimeInputError, RuntimeRunError.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free what the runtime holds; later calls raise RuntimeRunError."""
        self.closed = True

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, feeds: Feeds) -> dict[str, int]:
        """The sizes of the symbolic dimensions, after every check of names, types, dtypes and shapes."""
        if self.closed:
            raise RuntimeRunError("this runtime is closed; load the artifact again")
        if not isinstance(feeds, Mapping):
            raise RuntimeInputError(f"expected a dict of input name to numpy array, found {type(feeds).__name__}")
        names = [port.name for port in self.inputs]
        for name in feeds:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"inputs are {names}"
                raise RuntimeInputError(f"unknown input {name!r}; {hint}")
        if missing := [name for name in names if name not in feeds]:
            raise RuntimeInputError(f"missing input {', '.join(map(repr, missing))}; inputs are {names}")
        sizes: dict[str, int] = {}
        origin: dict[str, str] = {}
        for port in self.inputs:
            array = feeds[port.name]
            if not isinstance(array, np.ndarray):
                raise RuntimeInputError(
                    f"{port.name}: expected a numpy array, found {type(array).__module__}.{type(array).__name__}; "
                    "convert it first"
                )
            if array.dtype != np.dtype(port.dtype):
                raise RuntimeInputError(
                    f"{port.name}: expected dtype {port.dtype}, found {array.dtype}; nothing is cast silently, "
                    f"so cast it yourself{f' ({port.unit})' if port.unit else ''}"
                )
            if array.ndim != len(port.shape):
                raise RuntimeInputError(f"{port.name}: expected shape {shown(port.shape)}, found {shown(array.shape)}")
            for dimension, size in zip(port.shape, array.shape, strict=True):
                if isinstance(dimension, str):
                    if sizes.setdefault(dimension, size) != size:
                        raise RuntimeInputError(
                            f"{port.name}: {dimension} is {size}, but {sizes[dimension]} in {origin[dimension]}; "
                            "they must agree"
                        )
                    origin.setdefault(dimension, port.name)
                elif dimension != size:
                    raise RuntimeInputError(
                        f"{port.name}: expected shape {shown(port.shape)}, found {shown(array.shape)}"
                    )
        return sizes


def shown(shape: Iterable[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


def check_finite(name: str, array: np.ndarray) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise RuntimeInputError(
            f"{name}: {array.size - int(finite.sum())} of {array.size} values are NaN or infinite, the first at {where}"
        )


def load(folder: Path | str, *, provider: str = "cpu", threads: int | None = None, device: int = 0) -> Runtime:
    """The artifact in ``folder``, checked (manifest, hashes, ports, device, versions) and ready to call.

    ``provider``: where ONNX Runtime runs ``model.onnx``: "cpu", "cuda" or "tensorrt"; what was asked for is what
    runs, or RuntimeLoadError says why not. A ``model.engine`` runs on the GPU it was built for.
    ``threads``: ONNX Runtime's intra-op threads; None is one per physical core. ``device``: the GPU's index.
    Raises ArtifactError, RuntimeLoadError.
    """
    folder = Path(folder)
    if provider not in PROVIDERS:
        raise RuntimeLoadError(f"provider {provider!r} is unknown; choose one of {', '.join(PROVIDERS)}")
    if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= artifact.MOST_THREADS):
        raise RuntimeLoadError(
            f"threads: expected an integer from 1 to {artifact.MOST_THREADS} or None, found {threads!r}"
        )
    manifest = artifact.verify(folder)
    if not manifest.inputs_ports or not manifest.outputs_ports:
        raise RuntimeLoadError(
            f"{folder}: expected an onnx or engine folder, found one of stage {manifest.stage}, which names no input "
            "and output ports; give the folder that was exported from it"
        )
    if "model.onnx" in manifest.files:
        from toolchain.onnx_runtime import OnnxRuntime

        return OnnxRuntime(folder, manifest, provider, threads, device)
    if "model.engine" in manifest.files:
        if provider == "cuda":
            raise RuntimeLoadError(f"{folder}: an engine runs on TensorRT; leave provider out")
        from toolchain.tensorrt_runtime import TensorRT

        return TensorRT(folder, manifest, device)
    raise RuntimeLoadError(
        f"{folder}: expected model.onnx or model.engine, found {', '.join(sorted(manifest.files)) or 'no file'}; "
        f"stage {manifest.stage!r} makes nothing that runs"
    )


def import_or_explain(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeLoadError(f"{module} cannot be imported ({error}); pip install 'edgestill[{extra}]'") from error


def check_ports(folder: Path, side: str, declared: list[Port], found: list[Port]) -> None:
    """The file's ports against the manifest's; an open dimension of the file may be named or fixed by the manifest."""
    if sorted(port.name for port in declared) != sorted(port.name for port in found):
        raise RuntimeLoadError(
            f"{folder}: the manifest's {side} are {[port.name for port in declared]}, "
            f"the model's {[port.name for port in found]}{REMAKE}"
        )
    by_name = {port.name: port for port in found}
    for port in declared:
        other = by_name[port.name]
        same = len(port.shape) == len(other.shape) and all(
            not isinstance(theirs, int) or theirs == ours for ours, theirs in zip(port.shape, other.shape, strict=True)
        )
        if port.dtype != other.dtype or not same:
            raise RuntimeLoadError(
                f"{folder}: the manifest says {port.name} is {port.dtype} {shown(port.shape)}, "
                f"the model {other.dtype} {shown(other.shape)}{REMAKE}"
            )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class FakeRuntime(Runtime):
    """A runtime without a model, for an application's own tests: feeds are checked, then ``function`` answers.

    model = FakeRuntime([Port("image", "uint8", ("batch", 8, 8, 1))], [Port("label", "int64", ("batch",))],
                        lambda feeds: {"label": np.zeros(len(feeds["image"]), np.int64)})
    """

    def __init__(self, inputs: list[Port], outputs: list[Port], function: Callable[[Feeds], Outputs]) -> None:
        super().__init__(inputs, outputs)
        self._function = function

    def __call__(self, feeds: Feeds) -> Outputs:
        self._check(feeds)
        for name, array in feeds.items():
            if array.dtype.kind == "f":
                check_finite(name, array)
        outputs = self._function(feeds)
        declared = {port.name: port.dtype for port in self.outputs}
        found = {name: array.dtype.name for name, array in outputs.items()}
        if found != declared:
            raise RuntimeRunError(f"the fake's function should return {declared}, found {found}")
        return outputs
