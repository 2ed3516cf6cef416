from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.toolchain.graph_doubles import INPUTS, OUTPUTS, expected, feeds_of, info, model, onnx_bytes, same, write
from toolchain import artifact
from toolchain.artifact import ArtifactError, Port
from toolchain.runtime import (
    FakeRuntime,
    Runtime,
    RuntimeInputError,
    RuntimeLoadError,
    RuntimeRunError,
    load,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "onnx", {"model.onnx": model()}, INPUTS, OUTPUTS)


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
    (lambda f: np.zeros((2, 3)), "expected a dict of input name to numpy array, found ndarray"),
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
    with pytest.raises(RuntimeLoadError, match="threads: expected an integer from 1 to 1024"):
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


# ---- devices


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_on_a_gpu_the_provider_asked_for_runs(folder: Path, provider: str) -> None:
    with load(folder, provider=provider) as run:
        for batch in (1, 5, 1):
            found, wanted = run(feeds_of(batch)), expected(feeds_of(batch))
            np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=1e-5)
            assert np.array_equal(found["label"], wanted["label"])
