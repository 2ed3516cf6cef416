"""Run ``model.engine`` on the GPU it was built for; ``toolchain.runtime.load`` comes here for such folders."""

from __future__ import annotations

import ctypes
import math
import platform
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.artifact import EdgestillError, Manifest, Port
from toolchain.runtime import (
    REMAKE,
    DeviceMissing,
    Feeds,
    Outputs,
    Runtime,
    RuntimeInputError,
    RuntimeLoadError,
    RuntimeRunError,
    check_finite,
    check_ports,
    import_or_explain,
    shown,
)

BACKENDS = {
    "tensorrt": ("tensorrt", "TensorRT", "trt"),
    "tensorrt-rtx": ("tensorrt_rtx", "TensorRT-RTX", "trt-rtx"),
}


class Cuda:
    """The CUDA runtime on one device; its calls raise instead of returning a status."""

    def __init__(self, device: int, extra: str) -> None:
        self.api = import_or_explain("cuda.bindings.runtime", extra)
        error, count = self.api.cudaGetDeviceCount()
        if int(error) or not count:
            raise DeviceMissing(
                f"no CUDA device here ({error.name}); an engine needs an NVIDIA GPU and driver: check nvidia-smi, or "
                "load the onnx folder instead"
            )
        if not 0 <= device < count:
            raise RuntimeLoadError(f"device {device}: this machine has CUDA devices 0 to {count - 1}")
        self.device, self.count = device, int(count)
        properties = self("cudaGetDeviceProperties", device)
        self.name = properties.name.decode().rstrip("\0")
        self.capability = f"sm_{properties.major}{properties.minor}"

    def __call__(self, function: str, *arguments: Any) -> Any:
        error, *values = getattr(self.api, function)(*arguments)
        if int(error):
            raise RuntimeRunError(f"{function} failed on device {self.device}: {error.name}")
        return values[0] if values else None


def this_platform() -> str:
    """As engines record it, e.g. ``linux-x86_64``."""
    return f"{sys.platform}-{platform.machine()}".lower()


def check_platform(folder: Path, manifest: Manifest) -> None:
    """Raise DeviceMissing unless the engine was built for this machine's platform."""
    if (built := manifest.extra["platform"]) != this_platform():
        raise DeviceMissing(f"{folder}: engine built for {built}; here it is {this_platform()}; {_rebuild(manifest)}")


def check_backend(folder: Path, manifest: Manifest, version: str) -> None:
    """Raise RuntimeLoadError unless TensorRT ``version`` (major.minor) fits the engine."""
    title = BACKENDS[manifest.extra["backend"]][1]
    built, here = (".".join(v.split(".")[:2]) for v in (manifest.extra["backend_version"], version))
    if built != here:
        raise RuntimeLoadError(
            f"{folder}: engine built for {title} {built}; here it is {title} {here}; {_rebuild(manifest)}"
        )


def check_device(folder: Path, manifest: Manifest, capability: str, name: str) -> None:
    """Raise DeviceMissing unless the engine was built for the device's compute ``capability``."""
    built = manifest.extra["compute_capabilities"]
    if capability not in built:
        title = BACKENDS[manifest.extra["backend"]][1]
        raise DeviceMissing(
            f"{folder}: engine built for {', '.join(built)} / {title} {manifest.extra['backend_version']}; "
            f"this device is {capability} ({name}); {_rebuild(manifest, capability)}"
        )


def _rebuild(manifest: Manifest, target: str | None = None) -> str:
    source = next((entry["path"] for entry in manifest.inputs.values()), "<onnx folder>")
    return f"rebuild with `edgestill compile {source} --target {target or manifest.extra['compute_capabilities'][0]}`"


class TensorRT(Runtime):
    """``model.engine`` on TensorRT or TensorRT for RTX: profile 0, one execution context, calls one at a time.

    Host (page-locked) and device buffers are allocated once, at the profile's largest shapes.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: int) -> None:
        super().__init__(manifest.inputs_ports, manifest.outputs_ports, manifest)
        self._folder, self._lock = folder, threading.Lock()
        self._buffers: dict[str, list[Any]] = {}
        backend = manifest.extra.get("backend")
        wanted = {"backend_version", "platform", "compute_capabilities"}
        if backend not in BACKENDS or not wanted <= set(manifest.extra):
            raise RuntimeLoadError(f"{folder}: its manifest does not say what the engine was built for{REMAKE}")
        module, self._title, extra = BACKENDS[backend]
        check_platform(folder, manifest)
        trt = import_or_explain(module, extra)
        check_backend(folder, manifest, trt.__version__)
        self._cuda = Cuda(device, extra)
        check_device(folder, manifest, self._cuda.capability, self._cuda.name)
        self._cuda("cudaSetDevice", device)
        self._stream: Any = None
        try:
            self._load(trt)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any) -> None:
        self._logger = logger(trt)
        self._logger.errors.clear()
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((self._folder / "model.engine").read_bytes())
        self._context = self._engine and self._engine.create_execution_context()
        if not self._context:
            raise self._failed(RuntimeLoadError, "load the engine")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        found: dict[Any, list[Port]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
        for name in names:
            dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))).name
            shape = tuple(size if size >= 0 else "?" for size in self._engine.get_tensor_shape(name))
            found[self._engine.get_tensor_mode(name)].append(Port(name, dtype, shape))
        check_ports(self._folder, "inputs", self.inputs, found[trt.TensorIOMode.INPUT])
        check_ports(self._folder, "outputs", self.outputs, found[trt.TensorIOMode.OUTPUT])
        self._stream = self._cuda("cudaStreamCreate")
        self._profile = {}
        for port in self.inputs:
            low, _, high = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(port.name, 0))
            self._profile[port.name] = (low, high)
            self._context.set_input_shape(port.name, high)
            self._allocate(port, high)
        for port in self.outputs:
            largest: tuple[int, ...] = tuple(self._context.get_tensor_shape(port.name))
            if min(largest, default=0) < 0:
                raise RuntimeLoadError(
                    f"{self._folder}: the shape of {port.name} depends on the data, which engines of edgestill do "
                    "not support; run the onnx folder, or export without data-dependent shapes"
                )
            self._allocate(port, largest)

    def _allocate(self, port: Port, shape: tuple[int, ...]) -> None:
        size = max(1, math.prod(shape)) * np.dtype(port.dtype).itemsize
        device = self._cuda("cudaMalloc", size)
        self._buffers[port.name] = [device, None, None]
        host = self._cuda("cudaMallocHost", size)
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(host))).view(port.dtype)
        self._buffers[port.name] = [device, host, view]
        self._context.set_tensor_address(port.name, int(device))

    def _failed(self, kind: type[EdgestillError], what: str) -> EdgestillError:
        said = self._logger.errors[-1] if self._logger.errors else "it gave no reason"
        return kind(f"{self._folder}: {self._title} could not {what} on {self._cuda.name}: {said}")

    def __call__(self, feeds: Feeds) -> Outputs:
        with self._lock:
            self._check(feeds)
            kinds, cuda = self._cuda.api.cudaMemcpyKind, self._cuda
            cuda("cudaSetDevice", cuda.device)
            for port in self.inputs:
                array = feeds[port.name]
                low, high = self._profile[port.name]
                if not all(a <= size <= b for a, size, b in zip(low, array.shape, high, strict=True)):
                    raise RuntimeInputError(
                        f"{port.name}: the engine's profile takes {shown(low)} to {shown(high)}, found "
                        f"{shown(array.shape)}; split the batch, or compile with a larger profile"
                    )
                if array.dtype.kind == "f":
                    check_finite(port.name, array)
                device, host, view = self._buffers[port.name]
                view[: array.size].reshape(array.shape)[...] = array
                self._context.set_input_shape(port.name, array.shape)
                kind = kinds.cudaMemcpyHostToDevice
                cuda("cudaMemcpyAsync", device, host, array.nbytes, kind, self._stream)
            if not self._context.execute_async_v3(int(self._stream)):
                raise self._failed(RuntimeRunError, "run")
            views = {}
            for port in self.outputs:
                shape = tuple(self._context.get_tensor_shape(port.name))
                device, host, view = self._buffers[port.name]
                views[port.name] = view[: math.prod(shape)].reshape(shape)
                kind = kinds.cudaMemcpyDeviceToHost
                cuda("cudaMemcpyAsync", host, device, views[port.name].nbytes, kind, self._stream)
            cuda("cudaStreamSynchronize", self._stream)
            return {name: view.copy() for name, view in views.items()}

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            super().close()
            self._context = self._engine = self._runtime = None
            for device, host, _ in self._buffers.values():
                self._cuda("cudaFree", device)
                if host is not None:
                    self._cuda("cudaFreeHost", host)
            self._buffers = {}
            if self._stream is not None:
                self._cuda("cudaStreamDestroy", self._stream)


@cache
def logger(trt: Any) -> Any:
    """The process's TensorRT logger: keeps errors (``.errors``) and warnings (``.warnings``) instead of printing.

    One for all, since TensorRT ignores every logger after the first. Clear the lists before what is to be explained.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Logger()
