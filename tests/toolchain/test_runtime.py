from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from toolchain import artifact
from toolchain.artifact import ArtifactError, Manifest, Port
from toolchain.runtime import (
    FakeRuntime,
    Runtime,
    RuntimeInputError,
    RuntimeLoadError,
    RuntimeRunError,
    load,
)
from toolchain.tensorrt_runtime import check_backend, check_device, this_platform

INPUTS = [Port("image", "uint8", ("batch", 2, 3), unit="0..255"), Port("scale", "float32", ("batch",))]
OUTPUTS = [Port("scores", "float32", ("batch", 6)), Port("label", "int64", ("batch",))]


def info(port: Port) -> Any:
    return helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype)), port.shape)


def model() -> bytes:
    """scores = flat(image) * scale; label = argmax(scores)."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("Unsqueeze", ["scale", "one"], ["column"]),
        helper.make_node("Mul", ["flat", "column"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "g", [info(port) for port in INPUTS], [info(port) for port in OUTPUTS], [one])
    return onnx_bytes(graph)


def onnx_bytes(graph: onnx.GraphProto) -> bytes:
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return proto.SerializeToString()  # type: ignore[no-any-return]


def expected(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    scores = feeds["image"].reshape(len(feeds["image"]), -1).astype(np.float32) * feeds["scale"][:, None]
    return {"scores": scores, "label": scores.argmax(1)}


def feeds_of(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 255, (batch, 2, 3), np.uint8)
    return {"image": image, "scale": rng.random(batch, np.float32) + 0.5}


def write(folder: Path, files: dict[str, bytes], inputs: list[Port], outputs: list[Port], **extra: Any) -> Path:
    with artifact.create(folder, stage="onnx", config={}) as draft:
        draft.set_ports(inputs, outputs)
        draft.extra = extra
        for name, content in files.items():
            (draft.path / name).write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "onnx", {"model.onnx": model()}, INPUTS, OUTPUTS)


def same(found: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> bool:
    wanted = expected(feeds)
    return set(found) == set(wanted) and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array) for name, array in wanted.items()
    )


# ---- calls


@pytest.mark.parametrize("batch", [1, 3, 25000, 60000])  # copied, copied, both ways, bound where it lies
def test_outputs_match_numpy_and_are_the_callers_to_keep(folder: Path, batch: int) -> None:
    first, second = feeds_of(batch, 1), feeds_of(batch, 2)
    with load(folder, threads=1) as run:
        kept = run(first)
        assert same(run(second), second)
        assert same(kept, first)
    assert same(kept, first)


@pytest.mark.parametrize("batch", [4, 60000])
def test_odd_memory_layouts_are_read_as_they_mean(folder: Path, batch: int) -> None:
    feeds = feeds_of(batch)
    strided = np.asfortranarray(feeds["image"])
    raw = np.zeros(batch * 4 + 1, np.uint8)
    unaligned = raw[1:].view(np.float32)
    unaligned[:] = feeds["scale"]
    unaligned.flags.writeable = False
    with load(folder, threads=1) as run:
        assert same(run({"scale": unaligned, "image": strided}), feeds)


def test_more_shapes_than_are_kept_still_answer(folder: Path) -> None:
    with load(folder, threads=1) as run:
        for batch in [*range(1, 40), *range(1, 40)]:
            feeds = feeds_of(batch)
            assert same(run(feeds), feeds)


def test_an_empty_batch_is_a_batch(folder: Path) -> None:
    with load(folder, threads=1) as run:
        assert run(feeds_of(0))["scores"].shape == (0, 6)


def test_outputs_of_data_dependent_shape(tmp_path: Path) -> None:
    ports = [Port("x", "float32", ("n",))], [Port("where", "int64", (1, "found"))]
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["where"])], "g", *([info(p[0])] for p in ports))
    write(tmp_path / "onnx", {"model.onnx": onnx_bytes(graph)}, *ports)
    with load(tmp_path / "onnx", threads=1) as run:
        first = run({"x": np.array([1, 0, 1], np.float32)})["where"]
        assert run({"x": np.array([1, 1, 1], np.float32)})["where"].tolist() == [[0, 1, 2]]
        assert first.tolist() == [[0, 2]]
        with pytest.raises(RuntimeInputError, match="unknown input 'y'"):
            run({"x": np.array([1, 0, 1], np.float32), "y": np.array([1])})


def test_threads_at_once_each_get_their_own_answer(folder: Path) -> None:
    wrong: list[Any] = []

    def work(run: Runtime, seed: int) -> None:
        try:
            for turn in range(150):
                feeds = feeds_of(1 + (seed + turn) % 3, seed * 1000 + turn)
                if not same(run(feeds), feeds):
                    wrong.append((seed, turn))
        except Exception as error:
            wrong.append(error)

    with load(folder, threads=2) as run:
        workers = [threading.Thread(target=work, args=(run, seed)) for seed in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []


def test_after_close_calls_raise(folder: Path) -> None:
    run = load(folder)
    run(feeds_of(1))
    run.close()
    run.close()
    with pytest.raises(RuntimeRunError, match="closed"):
        run(feeds_of(1))


def test_a_failing_graph_is_a_clear_error(tmp_path: Path) -> None:
    ports = [Port("x", "int64", ("n",))], [Port("y", "float32", ("n",))]
    table = helper.make_tensor("table", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["y"])], "g", *([info(p[0])] for p in ports), [table]
    )
    write(tmp_path / "onnx", {"model.onnx": onnx_bytes(graph)}, *ports)
    with load(tmp_path / "onnx", threads=1) as run, pytest.raises(RuntimeRunError, match="ONNX Runtime failed"):
        run({"x": np.array([7])})


# ---- inputs


BAD_FEEDS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda f: {"imgae": f["image"], "scale": f["scale"]}, "unknown input 'imgae'; did you mean 'image'"),
    (lambda f: f | {"zzz": f["scale"]}, r"unknown input 'zzz'; inputs are \['image', 'scale'\]"),
    (lambda f: {"image": f["image"]}, "missing input 'scale'"),
    (lambda f: f | {"image": f["image"].tolist()}, "image: expected a numpy array, found builtins.list"),
    (lambda f: f | {"image": f["image"].astype(np.float32)}, "image: expected dtype uint8, found float32.*0..255"),
    (lambda f: f | {"scale": f["scale"].astype(">f4")}, "scale: expected dtype float32, found >f4"),
    (lambda f: f | {"image": f["image"][0]}, r"image: expected shape \(batch, 2, 3\), found \(2, 3\)"),
    (lambda f: f | {"image": f["image"][:, :1]}, r"image: expected shape \(batch, 2, 3\), found \(2, 1, 3\)"),
    (lambda f: f | {"scale": f["scale"][:1]}, "scale: batch is 1, but 2 in image"),
    (lambda f: f | {"scale": np.array([1, np.nan], np.float32)}, r"scale: 1 of 2 values are NaN .* first at \(1,\)"),
    (lambda f: f | {"scale": np.array([np.inf, 1], np.float32)}, "scale: 1 of 2 values are NaN or infinite"),
    (lambda f: list(f.values()), "expected a dict of input name to numpy array, found list"),
]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("change", "message"), BAD_FEEDS)
def test_wrong_feeds_are_named(folder: Path, change: Callable[[dict[str, Any]], Any], message: str, warm: bool) -> None:
    fake = FakeRuntime(INPUTS, OUTPUTS, lambda feeds: expected(dict(feeds)))
    with load(folder, threads=1) as real:
        for run in (real, fake):
            if warm:
                assert same(run(feeds_of(2)), feeds_of(2))
            with pytest.raises(RuntimeInputError, match=message):
                run(change(feeds_of(2)))
            assert same(run(feeds_of(2)), feeds_of(2))


def test_nan_in_a_large_input_is_found_and_large_finite_values_are_not(folder: Path) -> None:
    feeds = feeds_of(60000)
    with load(folder, threads=1) as run:
        feeds["scale"][123] = 3e38
        run(feeds)
        feeds["scale"][59999] = np.nan
        with pytest.raises(RuntimeInputError, match=r"the first at \(59999,\)"):
            run(feeds)
        small = feeds_of(2)
        small["scale"][:] = 3e38
        run(small)


# ---- loading


def edit(folder: Path, **changes: Any) -> None:
    path = folder / artifact.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damage_is_found_before_anything_is_loaded(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[40] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged or was changed"):
        load(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx is missing"):
        load(folder)
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit(folder, files={"../model.onnx": entry})
    with pytest.raises(ArtifactError, match="outside its folder"):
        load(folder)
    edit(folder, schema=99)
    with pytest.raises(ArtifactError, match="upgrade edgestill"):
        load(folder)
    with pytest.raises(ArtifactError, match="found nothing"):
        load(folder / "absent")


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x00" * 500, model()[:-30], model()[30:]])
def test_a_file_that_is_not_onnx_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "onnx", {"model.onnx": content}, INPUTS, OUTPUTS)
    with pytest.raises(RuntimeLoadError, match=r"model.onnx: ONNX Runtime .* cannot load it"):
        load(tmp_path / "onnx")


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([INPUTS[0]], OUTPUTS, "the manifest's inputs are"),
        ([INPUTS[0], Port("scale", "float64", ("batch",))], OUTPUTS, "scale is float64 .* the model float32"),
        ([Port("image", "uint8", ("batch", 2, 4)), INPUTS[1]], OUTPUTS, r"image is uint8 \(batch, 2, 4\)"),
        (INPUTS, [OUTPUTS[0], Port("label", "int64", ("batch", 1))], r"label is int64 \(batch, 1\)"),
        ([], [], "names no input and output ports"),
    ],
)
def test_ports_must_be_the_graphs(tmp_path: Path, inputs: list[Port], outputs: list[Port], message: str) -> None:
    write(tmp_path / "onnx", {"model.onnx": model()}, inputs, outputs)
    with pytest.raises(RuntimeLoadError, match=message):
        load(tmp_path / "onnx")


def test_wrong_arguments_and_folders_without_a_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(RuntimeLoadError, match="provider 'gpu' is unknown; choose one of cpu, cuda, tensorrt"):
        load(folder, provider="gpu")
    with pytest.raises(RuntimeLoadError, match="threads: expected an integer"):
        load(folder, threads=0)
    write(tmp_path / "data", {"train.npy": b"x"}, INPUTS, OUTPUTS)
    with pytest.raises(RuntimeLoadError, match=r"expected model.onnx or model.engine, found train.npy"):
        load(tmp_path / "data")


def test_a_provider_that_is_not_built_in_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeLoadError, match=r"not CUDAExecutionProvider; .*edgestill\[ort-gpu\]"):
        load(folder, provider="cuda")


def no_gpu() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU driver here")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_cannot_start_says_why(folder: Path, provider: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeLoadError, match=f"provider '{provider}' is not available: .*; "):
        load(folder, provider=provider)
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_onnx_runtime_drops_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr("toolchain.onnx_runtime.provider_problem", lambda provider: None)
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeLoadError, match="CUDAExecutionProvider"):
        load(folder, provider="cuda")


def test_a_missing_package_names_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeLoadError, match=r"pip install 'edgestill\[ort\]'"):
        load(folder)


def test_importing_the_runtime_imports_nothing_heavy() -> None:
    script = (
        "import sys, toolchain.runtime, toolchain.onnx_runtime, toolchain.tensorrt_runtime; "
        "heavy = {'torch', 'onnx', 'pydantic', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'cuda'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_running_a_model_needs_neither_torch_nor_onnx_nor_pydantic(folder: Path) -> None:
    script = (
        "import sys, numpy as np; from toolchain.runtime import load\n"
        f"load({str(folder)!r})({{'image': np.zeros((1, 2, 3), np.uint8), 'scale': np.ones(1, np.float32)}})\n"
        "sys.exit(len({'torch', 'onnx', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- fakes


def test_a_fake_must_return_its_outputs() -> None:
    fake = FakeRuntime([Port("x", "float32", ("n",))], [Port("y", "float32", ("n",))], lambda feeds: {"z": feeds["x"]})
    with pytest.raises(RuntimeRunError, match="should return"):
        fake({"x": np.zeros(2, np.float32)})
    fake.close()
    with pytest.raises(RuntimeRunError, match="closed"):
        fake({"x": np.zeros(2, np.float32)})


# ---- engines


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
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_on_a_gpu_the_provider_asked_for_runs(folder: Path, provider: str) -> None:
    with load(folder, provider=provider) as run:
        for batch in (1, 5, 1):
            found, wanted = run(feeds_of(batch)), expected(feeds_of(batch))
            np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=1e-5)
            assert np.array_equal(found["label"], wanted["label"])


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
