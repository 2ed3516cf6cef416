"""Run ``model.onnx`` on ONNX Runtime; ``toolchain.runtime.load`` comes here for such folders."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.artifact import EdgestillError, Manifest, Port
from toolchain.runtime import (
    PROVIDERS,
    REMAKE,
    Feeds,
    Outputs,
    Runtime,
    RuntimeLoadError,
    RuntimeRunError,
    check_finite,
    check_ports,
    first_line,
    import_or_explain,
)

NOT_ON_CPU = (
    "FuseFp16InitializerToFp32NodeTransformer",  # ORT 1.31 dies in it on half-precision transformers
    "SkipLayerNormFusion",  # its kernel takes over twice the time of the Add and LayerNormalization that it replaces
)
HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "LSTM", "GRU"}
PLANS = 16  # input signatures kept per thread
COPIED = 1 << 17  # bytes; larger arrays on the host are bound where they lie, which then costs less than a copy


def provider_problem(provider: str) -> tuple[str, str] | None:
    """Why ONNX Runtime cannot have ``provider`` (a key of PROVIDERS) and the remedy; None if its library loads.

    Loads CUDA's, cuDNN's and TensorRT's libraries from their packages where they are installed as such.
    """
    ort = import_or_explain("onnxruntime", "ort" if provider == "cpu" else "ort-gpu")
    name = PROVIDERS[provider][0]
    if name not in (available := ort.get_available_providers()):
        remedy = "pip uninstall -y onnxruntime && pip install 'edgestill[ort-gpu]'"
        return f"this onnxruntime {ort.__version__} was built with {', '.join(available)}, not {name}", remedy
    if provider == "cpu":
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        getattr(ort, "preload_dlls", lambda: None)()
    if provider == "tensorrt":
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt")
    libraries = Path(ort.__file__).parent / "capi"
    for library in ("shared", provider):
        path = libraries / f"libonnxruntime_providers_{library}.so"
        try:
            if path.exists():
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            if "libcuda.so" in str(error):
                return str(error), "it needs an NVIDIA GPU with its driver; use cpu here"
            if "nvinfer" in str(error):
                return str(error), "it needs TensorRT 10: pip install 'tensorrt-cu13>=10.13,<11'"
            remedy = "it needs the CUDA and cuDNN that it was built with: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            return str(error), remedy
    return None


class OnnxRuntime(Runtime):
    """``model.onnx`` on ONNX Runtime, through bindings that live as long as the input shapes stay.

    A thread that calls with new shapes allocates buffers for them once (the last 16 signatures are kept), so later
    calls only copy small arrays in and out. Outputs whose shape does not follow from the inputs' symbolic
    dimensions are allocated by ONNX Runtime in every call instead.
    """

    def __init__(self, folder: Path, manifest: Manifest, provider: str, threads: int | None, device: int) -> None:
        super().__init__(manifest.inputs_ports, manifest.outputs_ports, manifest)
        self._folder, self._device, self._index = folder, "cpu" if provider == "cpu" else "cuda", device
        if problem := provider_problem(provider):
            raise RuntimeLoadError(f"{folder}: provider {provider!r} is not available: {'; '.join(problem)}")
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        settings = {} if provider == "cpu" else {"device_id": str(device)}
        asked = PROVIDERS[provider]
        try:
            self._session = ort.InferenceSession(
                str(folder / "model.onnx"),
                options,
                [(name, settings) for name in asked],
                disabled_optimizers=list(NOT_ON_CPU) if provider == "cpu" else None,
                enable_fallback=0,
            )
        except Exception as error:
            raise RuntimeLoadError(
                f"{folder / 'model.onnx'}: ONNX Runtime {ort.__version__} with {asked[0]} cannot load it: "
                f"{first_line(error)}{REMAKE if provider == 'cpu' else ''}"
            ) from error
        self._session.disable_fallback()
        if (active := self._session.get_providers())[: len(asked)] != asked:
            raise RuntimeLoadError(
                f"{folder}: asked for {', '.join(asked)}, active are {', '.join(active)}; see `edgestill doctor`"
            )
        if provider != "cpu" and (left := self._left_on_cpu()):
            raise RuntimeLoadError(
                f"{folder}: {asked[0]} left {', '.join(left)} on the CPU; export in another precision or use cpu"
            )
        check_ports(folder, "inputs", self.inputs, [_onnx_port(value) for value in self._session.get_inputs()])
        check_ports(folder, "outputs", self.outputs, [_onnx_port(value) for value in self._session.get_outputs()])
        self._key = _key_of([port.name for port in self.inputs])
        self._local: Any = threading.local()

    def _left_on_cpu(self) -> list[str]:
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return []
        parts = [p for p in self._session.get_provider_graph_assignment_info() if p.ep_name == "CPUExecutionProvider"]
        return sorted({node.op_type for part in parts for node in part.get_nodes()} & HEAVY)

    def __call__(self, feeds: Feeds) -> Outputs:
        try:
            call = self._local.calls[self._key(feeds)]
        except (AttributeError, IndexError, KeyError, TypeError):
            call = self._plan
        try:
            return call(feeds)  # type: ignore[no-any-return]
        except EdgestillError:
            raise
        except Exception as error:
            raise RuntimeRunError(f"{self._folder}: ONNX Runtime failed: {first_line(error)}") from error

    __call__.__doc__ = Runtime.__call__.__doc__

    def _plan(self, feeds: Feeds) -> Outputs:
        self._check(feeds)
        kind = _HostPlan if self._device == "cpu" else _DevicePlan
        call = kind(self._session, self._index, self.inputs, self.outputs, feeds).call
        calls = self._local.__dict__.setdefault("calls", {})
        if len(calls) >= PLANS:
            calls.pop(next(iter(calls)))
        calls[self._key(feeds)] = call
        return call(feeds)

    def close(self) -> None:
        super().close()
        self._local = self._session = None


def _key_of(names: list[str]) -> Callable[[Feeds], tuple[Any, ...]]:
    """What tells one plan from another; the fast path of every call, so one input has its own."""

    def of_one(feeds: Feeds) -> tuple[Any, ...]:
        array = feeds[first]
        return len(feeds), array.__class__, array.shape, array.dtype

    def of_many(feeds: Feeds) -> tuple[Any, ...]:
        arrays = [feeds[name] for name in names]
        return len(feeds), *[(array.__class__, array.shape, array.dtype) for array in arrays]

    first = names[0]
    return of_one if len(names) == 1 else of_many


class _HostPlan:
    """One thread's buffers and binding for one input signature."""

    device = "cpu"

    def __init__(self, session: Any, index: int, inputs: list[Port], outputs: list[Port], feeds: Feeds) -> None:
        self.index, self.binding = index, session.io_binding()
        # Past the Python wrapper, which checks for WebGPU in every call: a twentieth of a 10 us model's time.
        self.run = partial(session._sess.run_with_iobinding, self.binding._iobinding, None)
        self.names = [port.name for port in outputs]
        self.values: dict[str, Any] = {}  # on the device
        self.copied: list[tuple[str, np.ndarray, np.ndarray, bytearray, np.ndarray]] = []
        self.bound: list[tuple[str, bool]] = []
        self.small: list[tuple[str, Callable[[], np.ndarray]]] = []
        self.large: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = []
        sizes = {
            name: size
            for port in inputs
            for name, size in zip(port.shape, feeds[port.name].shape, strict=True)
            if isinstance(name, str)
        }
        shapes = [tuple(sizes.get(d, -1) if isinstance(d, str) else d for d in port.shape) for port in outputs]
        for port in inputs:
            self.add_input(port.name, feeds[port.name])
        self.call = self.call_free
        if all(size >= 0 for shape in shapes for size in shape):
            self.call = self.call_fixed
            for name, port, shape in zip(self.names, outputs, shapes, strict=True):
                self.add_output(name, np.dtype(port.dtype), shape)

    def add_input(self, name: str, array: np.ndarray) -> None:
        is_float = array.dtype.kind == "f"
        if array.nbytes > COPIED:
            self.bound.append((name, is_float))
            return
        buffer = np.zeros(array.shape, array.dtype)
        finite = bytearray(buffer.size if is_float else 0)
        self.binding.bind_cpu_input(name, buffer)
        self.copied.append((name, buffer, buffer.reshape(-1), finite, np.frombuffer(finite, np.bool_)))

    def add_output(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        buffer = np.empty(shape, dtype)
        if buffer.nbytes > COPIED:
            self.large.append((name, shape, dtype))
            return
        self.binding.bind_output(name, "cpu", 0, dtype, shape, buffer.ctypes.data)
        self.small.append((name, buffer.copy))

    def feed(self, feeds: Feeds) -> list[np.ndarray]:
        """Check and bring in the inputs; the arrays returned must live until the run is over."""
        for name, buffer, flat, finite, mask in self.copied:
            buffer[...] = feeds[name]
            if finite:
                np.isfinite(flat, mask)
                if 0 in finite:
                    check_finite(name, buffer)
        held = []
        for name, is_float in self.bound:
            array = feeds[name]
            if not (array.flags.c_contiguous and array.flags.aligned):
                array = np.array(array, order="C", subok=False)
            if is_float:
                check_finite(name, array)
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            held.append(array)
        return held

    def call_fixed(self, feeds: Feeds) -> Outputs:
        held = self.feed(feeds)  # noqa: F841
        results: Outputs = {}
        for name, shape, dtype in self.large:
            results[name] = array = np.empty(shape, dtype)
            self.binding.bind_output(name, "cpu", 0, dtype, shape, array.ctypes.data)
        self.run()
        for name, copy in self.small:
            results[name] = copy()
        return results

    def call_free(self, feeds: Feeds) -> Outputs:
        """For outputs whose shapes the inputs' do not tell: ONNX Runtime allocates them, anew in every call."""
        held = self.feed(feeds)  # noqa: F841
        self.binding.clear_binding_outputs()
        for name in self.names:
            self.binding.bind_output(name, self.device, self.index)
        self.run()
        return dict(zip(self.names, self.binding.copy_outputs_to_cpu(), strict=True))


class _DevicePlan(_HostPlan):
    """The same with buffers on the GPU: a call copies in, runs, and copies out."""

    device = "cuda"

    def add_input(self, name: str, array: np.ndarray) -> None:
        self.binding.bind_ortvalue_input(name, self.value(name, array.dtype, array.shape))

    def add_output(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        value = self.value(name, dtype, shape)
        self.binding.bind_ortvalue_output(name, value)
        self.small.append((name, value.numpy))

    def value(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        from onnxruntime import OrtValue

        self.values[name] = OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", self.index)
        return self.values[name]

    def feed(self, feeds: Feeds) -> list[np.ndarray]:
        for name, array in feeds.items():
            if array.dtype.kind == "f":
                check_finite(name, array)
            self.values[name].update_inplace(np.ascontiguousarray(array))
        return []


def _onnx_port(value: Any) -> Port:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
    return Port(value.name, dtype, tuple(size if isinstance(size, int) else str(size) for size in value.shape))
