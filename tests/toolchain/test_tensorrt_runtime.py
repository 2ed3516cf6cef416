from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.toolchain.graph_doubles import INPUTS, OUTPUTS, expected, feeds_of, model, same, write
from toolchain.artifact import Manifest, Port
from toolchain.runtime import RuntimeInputError, RuntimeLoadError, RuntimeRunError, load
from toolchain.tensorrt_runtime import check_backend, check_device, this_platform


def engine(folder: Path, **extra: Any) -> Path:
    built = {"backend": "tensorrt", "backend_version": "10.13.2", "platform": this_platform()}
    built |= {"compute_capabilities": ["sm_86"], "precision": "fp16"}
    return write(folder / "engine", {"model.engine": b"plan"}, INPUTS, OUTPUTS, **(built | extra))


def manifest_of(**extra: Any) -> Manifest:
    inputs = {"onnx": {"path": "runs/digits/onnx-fp16", "id": "0" * 64}}
    return Manifest(stage="engine", config={}, inputs=inputs, files={}, extra=extra)


def test_an_engine_for_another_device_says_how_to_rebuild() -> None:
    extra = {"backend": "tensorrt-rtx", "backend_version": "1.7.1", "platform": this_platform()}
    manifest = manifest_of(**extra, compute_capabilities=["sm_86"])
    check_backend(Path("e"), manifest, "1.7.0.116")
    check_device(Path("e"), manifest, "sm_86", "RTX 3060")
    with pytest.raises(
        RuntimeLoadError,
        match=r"engine built for sm_86 / TensorRT-RTX 1.7.1; this device is sm_90 \(H200\); "
        "rebuild with `edgestill compile runs/digits/onnx-fp16 --target sm_90`",
    ):
        check_device(Path("e"), manifest, "sm_90", "H200")
    with pytest.raises(RuntimeLoadError, match=r"TensorRT-RTX 1.7; here it is TensorRT-RTX 1.8"):
        check_backend(Path("e"), manifest, "1.8.0")


class FakeCuda:
    """The CUDA runtime over host memory."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, devices: int = 1, major: int = 8) -> None:
        self.devices, self.major = devices, major
        self.live: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:  # every call that only succeeds
        return lambda *arguments: (0, 7) if name == "cudaStreamCreate" else (0,)

    def cudaGetDeviceCount(self) -> Any:
        return (
            SimpleNamespace(name="cudaErrorNoDevice", __int__=None) if 0 else (Status(not self.devices), self.devices)
        )

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return 0, SimpleNamespace(name=b"RTX 3060", major=self.major, minor=6)

    def cudaMalloc(self, size: int) -> Any:
        buffer = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> Any:
        del self.live[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> Any:
        ctypes.memmove(target, source, count)
        return (0,)


class Status(int):
    name = "cudaErrorNoDevice"


class FakeContext:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.fail = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = tuple(shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = self.shapes["image"][0]
        return {"scores": (batch, 6), "label": (batch,)}.get(name) or self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def view(self, port: Port) -> np.ndarray:
        shape, dtype = self.get_tensor_shape(port.name), np.dtype(port.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        return (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.addresses[port.name]))
            .view(dtype)
            .reshape(shape)
        )

    def execute_async_v3(self, stream: int) -> bool:
        results = expected({port.name: self.view(port) for port in INPUTS})
        for port in OUTPUTS:
            self.view(port)[...] = results[port.name]
        return not self.fail


class FakeEngine:
    num_io_tensors = 4

    def __init__(self) -> None:
        self.context = FakeContext()

    def port(self, name: str) -> Port:
        return next(port for port in [*INPUTS, *OUTPUTS] if port.name == name)

    def get_tensor_name(self, index: int) -> str:
        return [*INPUTS, *OUTPUTS][index].name

    def get_tensor_dtype(self, name: str) -> str:
        return self.port(name).dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self.port(name).shape)

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in ("image", "scale") else "out"

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        rest = self.get_tensor_shape(name)[1:]
        return [(1, *rest), (4, *rest), (8, *rest)]

    def create_execution_context(self) -> FakeContext:
        return self.context


class FakeTensorRT:
    """A TensorRT whose engine computes ``expected``."""

    __version__ = "10.13.3.9"
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    nptype = staticmethod(np.dtype)

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = "error", "internal", "warning"

    def __init__(self, engine: FakeEngine | None) -> None:
        self.engine = engine

    def Runtime(self, logger: Any) -> Any:
        if not self.engine:
            logger.log("error", "Version tag does not match")
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self.engine)


def install(monkeypatch: pytest.MonkeyPatch, trt: Any, cuda: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)


def test_an_engine_runs_within_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, plan = FakeCuda(), FakeEngine()
    install(monkeypatch, FakeTensorRT(plan), cuda)
    with load(engine(tmp_path)) as run:
        kept = run(feeds_of(8))
        assert same(run(feeds_of(3, 1)), feeds_of(3, 1))
        assert same(kept, feeds_of(8))
        strided = feeds_of(5) | {"image": np.asfortranarray(feeds_of(5)["image"])}
        assert same(run(strided), feeds_of(5))
        with pytest.raises(RuntimeInputError, match=r"image: the engine's profile takes \(1, 2, 3\) to \(8, 2, 3\)"):
            run(feeds_of(9))
        with pytest.raises(RuntimeInputError, match="scale: 1 of 2 values are NaN"):
            run(feeds_of(2) | {"scale": np.array([1, np.nan], np.float32)})
        plan.context.fail = True
        with pytest.raises(RuntimeRunError, match="TensorRT could not run on RTX 3060"):
            run(feeds_of(1))
    assert cuda.live == {}
    with pytest.raises(RuntimeRunError, match="closed"):
        run(feeds_of(1))


@pytest.mark.parametrize(
    ("extra", "trt", "cuda", "message"),
    [
        ({}, FakeTensorRT(None), FakeCuda(), "could not load the engine on RTX 3060: Version tag does not match"),
        ({}, FakeTensorRT(FakeEngine()), FakeCuda(devices=0), "no CUDA device here .cudaErrorNoDevice."),
        ({}, FakeTensorRT(FakeEngine()), FakeCuda(major=9), r"engine built for sm_86 .* device is sm_96"),
        ({"backend_version": "10.9.0"}, FakeTensorRT(None), FakeCuda(), r"TensorRT 10.9; here it is TensorRT 10.13"),
        ({"platform": "linux-aarch64"}, FakeTensorRT(None), FakeCuda(), "engine built for linux-aarch64"),
        ({"backend": "other"}, FakeTensorRT(None), FakeCuda(), "does not say what the engine was built for"),
        ({}, None, FakeCuda(), r"tensorrt cannot be imported .* pip install 'edgestill\[trt\]'"),
        ({}, FakeTensorRT(FakeEngine()), None, r"cuda.bindings.runtime cannot be imported .*edgestill\[trt\]"),
    ],
)
def test_an_engine_that_cannot_run_here_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], trt: Any, cuda: Any, message: str
) -> None:
    install(monkeypatch, trt, cuda)
    with pytest.raises(RuntimeLoadError, match=message):
        load(engine(tmp_path, **extra))


def test_an_engine_takes_no_onnx_provider(tmp_path: Path) -> None:
    with pytest.raises(RuntimeLoadError, match="an engine runs on TensorRT"):
        load(engine(tmp_path), provider="cuda")


def test_a_second_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeTensorRT(FakeEngine()), FakeCuda())
    with pytest.raises(RuntimeLoadError, match="device 1: this machine has CUDA devices 0 to 0"):
        load(engine(tmp_path), device=1)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_the_real_packages_have_what_the_fakes_have(backend: str) -> None:
    trt = pytest.importorskip(backend)
    cuda = pytest.importorskip("cuda.bindings.runtime")
    for kind, fake in ((trt.ICudaEngine, FakeEngine), (trt.IExecutionContext, FakeContext)):
        assert {name for name in vars(fake) if name.startswith(("get_", "set_", "num_", "create_", "exec"))} <= set(
            dir(kind)
        )
    for name in ("GetDeviceCount", "GetDeviceProperties", "SetDevice", "StreamCreate", "StreamSynchronize"):
        assert hasattr(cuda, f"cuda{name}")
    for name in ("Malloc", "MallocHost", "Free", "FreeHost", "MemcpyAsync", "MemcpyKind", "StreamDestroy"):
        assert hasattr(cuda, f"cuda{name}")
    assert np.dtype(trt.nptype(trt.uint8)) == np.uint8


@pytest.mark.gpu
def test_on_a_gpu_an_engine_runs(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from toolchain.tensorrt_runtime import Cuda, logger

    builder = trt.Builder(logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger(trt))
    assert parser.parse(model()), parser.get_error(0)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("image", (1, 2, 3), (4, 2, 3), (8, 2, 3))
    profile.set_shape("scale", (1,), (4,), (8,))
    config.add_optimization_profile(profile)
    plan = bytes(builder.build_serialized_network(network, config))
    device = Cuda(0, "trt-rtx")
    built = {"backend": "tensorrt-rtx", "backend_version": trt.__version__, "platform": this_platform()}
    built |= {"compute_capabilities": [device.capability]}
    write(tmp_path / "engine", {"model.engine": plan}, INPUTS, OUTPUTS, **built)
    with load(tmp_path / "engine") as run:
        for batch in (1, 8, 3):
            found, wanted = run(feeds_of(batch)), expected(feeds_of(batch))
            np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=1e-4)
            assert np.array_equal(found["label"], wanted["label"])
