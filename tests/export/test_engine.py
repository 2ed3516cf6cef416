from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export import engine
from export.engine import BuilderMissing, EngineError, build, check_engine
from toolchain import artifact
from toolchain.stage import Job

trt = pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")

PROFILE = {"batch": {"min": 1, "opt": 4, "max": 16}}
Model = Callable[..., Any]


@pytest.fixture
def graphs(tmp_path: Path, make_model: Model, make_images: Model) -> Callable[[str], Path]:
    from export.half import to_half
    from export.int8 import Static
    from toolchain.tasks import Split

    def write(kind: str) -> Path:
        model = make_model()
        if kind == "fp16":
            model = to_half(model)
        elif kind.startswith("int8"):
            model = Static(model, kind, Split({"image": make_images(16)}, ("image",)))()
        onnx.save(model, tmp_path / f"{kind}.onnx")
        return tmp_path / f"{kind}.onnx"

    return write


def rtx(path: Path, *targets: str, precision: str | None = None, profile: Any = None) -> tuple[bytes, Any, Any]:
    chosen = PROFILE if profile is None else profile
    return build(path, backend="tensorrt-rtx", targets=targets or ("sm_86",), profile=chosen, precision=precision)


@pytest.mark.parametrize(("kind", "dtype"), [("fp32", "float"), ("fp16", "half"), ("int8-trt", "half")])
def test_rtx_builds_without_a_gpu_in_the_types_of_the_graph(
    graphs: Callable[[str], Path], kind: str, dtype: str
) -> None:
    plan, layers, info = rtx(graphs(kind), precision=kind)
    assert len(plan) > 1000
    compute = [layer for layer in layers["layers"] if layer["type"] in engine.COMPUTE]
    assert [layer["name"] for layer in compute] == ["conv", "head"]
    assert {layer["outputs"][0]["dtype"] for layer in compute} == {dtype}
    assert all(layer["quantised"] == (kind == "int8-trt") for layer in compute)
    assert layers["source"] == "network"
    assert info["profile"] == {"image": {bound: [n, 8, 8, 3] for bound, n in PROFILE["batch"].items()}}
    assert info["compute_capabilities"] == ["sm_86"]
    assert info["backend_version"] == trt.__version__


@pytest.mark.parametrize(
    ("kind", "claimed"), [("fp32", "fp16"), ("fp16", "fp32"), ("fp16", "int8-trt"), ("int8-trt", "fp32")]
)
def test_another_precision_than_claimed_fails(graphs: Callable[[str], Path], kind: str, claimed: str) -> None:
    with pytest.raises(EngineError, match=rf"expected a {claimed} graph, found \d layers computing in float"):
        rtx(graphs(kind), precision=claimed)


def test_int8_for_the_cpu_is_no_engine_and_the_parser_says_which_node(graphs: Callable[[str], Path]) -> None:
    path = graphs("int8-cpu")
    with pytest.raises(EngineError, match="precision int8-cpu has no engine; compile one of fp32, fp16, int8-trt"):
        rtx(path, precision="int8-cpu")
    with pytest.raises(EngineError, match=r"cannot parse it: conv\.bias_DequantizeLinear \(DequantizeLinear\)"):
        rtx(path)


def test_a_corrupt_file_and_a_missing_one_are_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match=r"bad\.onnx: .* cannot parse it"):
        rtx(tmp_path / "bad.onnx")
    with pytest.raises(EngineError, match=r"none\.onnx: expected an ONNX file"):
        rtx(tmp_path / "none.onnx")


def test_several_targets_share_one_engine_and_turing_takes_int8(graphs: Callable[[str], Path]) -> None:
    plan, _, info = rtx(graphs("int8-trt"), "sm_75", "sm_89")
    assert info["compute_capabilities"] == ["sm_75", "sm_89"]
    assert len(plan) > 1000


def test_what_the_builder_says_is_in_the_error(graphs: Callable[[str], Path]) -> None:
    with pytest.raises(EngineError, match=r"could not build it for sm_75: .*FP32 GEMM is not supported"):
        rtx(graphs("fp32"), "sm_75")


@pytest.mark.parametrize("targets", [("sm_53",), ("sm_86", "sm_90")])
def test_unknown_targets_list_the_known(graphs: Callable[[str], Path], targets: tuple[str, ...]) -> None:
    with pytest.raises(EngineError, match=rf"{targets[-1]} is not built by tensorrt-rtx .* one of sm_"):
        rtx(graphs("fp32"), *targets)


def test_every_symbolic_dimension_needs_a_range_and_no_other_has_one(graphs: Callable[[str], Path]) -> None:
    path = graphs("fp32")
    with pytest.raises(EngineError, match=r"dimension 'batch' .* compile\.shapes\.batch"):
        rtx(path, profile={})
    with pytest.raises(EngineError, match=r"compile\.shapes\.points: no input has that dimension"):
        rtx(path, profile=PROFILE | {"points": {"min": 1, "opt": 1, "max": 1}})
    with pytest.raises(EngineError, match="not valid"):
        rtx(path, profile={"batch": {"min": 4, "opt": 2, "max": 1}})


def test_missing_builder_says_why_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BuilderMissing, match=r"pip install 'edgestill\[trt-rtx\]'"):
        engine.backend_module("tensorrt-rtx")
    monkeypatch.setattr(engine, "device_capability", lambda: None)
    with pytest.raises(BuilderMissing, match=r"no CUDA device here: .*tensorrt_rtx cannot be imported"):
        engine.backend_module("auto")
    monkeypatch.setattr(engine, "device_capability", lambda: "sm_86")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BuilderMissing, match=r"pip install 'edgestill\[trt\]'"):
        engine.backend_module("tensorrt")
    with pytest.raises(EngineError, match="expected one of auto, tensorrt, tensorrt-rtx"):
        engine.backend_module("cuda")


def test_auto_takes_tensorrt_where_a_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(__version__="10.16.1")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(engine, "device_capability", lambda: "sm_87")
    assert engine.backend_module("auto") == ("tensorrt", fake)
    monkeypatch.setattr(engine, "device_capability", lambda: None)
    assert engine.backend_module("auto")[0] == "tensorrt-rtx"


def test_native_tensorrt_builds_for_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "device_capability", lambda: "sm_87")
    engine._set_targets(None, "tensorrt", None, ["sm_87"])
    with pytest.raises(EngineError, match="builds for the GPU it runs on, sm_87; the targets are sm_86"):
        engine._set_targets(None, "tensorrt", None, ["sm_86"])


def test_strong_typing_is_a_flag_in_10_and_always_on_in_11_and_rtx() -> None:
    flags = SimpleNamespace(STRONGLY_TYPED=1)
    assert (
        engine._strongly_typed(SimpleNamespace(__version__="10.13", NetworkDefinitionCreationFlag=flags), "tensorrt")
        == 2
    )
    assert engine._strongly_typed(SimpleNamespace(__version__="11.4"), "tensorrt") == 0
    assert engine._strongly_typed(SimpleNamespace(__version__="1.7"), "tensorrt-rtx") == 0
    old = SimpleNamespace(__version__="8.6", NetworkDefinitionCreationFlag=SimpleNamespace())
    with pytest.raises(BuilderMissing, match=r"strongly typed networks, found 8\.6"):
        engine._strongly_typed(old, "tensorrt")


def test_the_engines_own_account_must_name_the_precision() -> None:
    account = {"Layers": [{"Outputs": [{"Format/Datatype": "Row major linear FP32"}], "Inputs": []}]}
    check_engine(account, "fp32", "engine")
    with pytest.raises(EngineError, match="expected fp16 layers in the engine, found"):
        check_engine(account, "fp16", "engine")
    check_engine({"Layers": ["only names"]}, "fp16", "engine")


def test_the_stage_writes_a_bare_plan_with_its_layers(
    onnx_folder: Callable[..., Path], make_model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.half import to_half

    source = onnx_folder("onnx-fp16", to_half(make_model()), "fp16")
    settings = {"backend": "auto", "batch": PROFILE["batch"], "shapes": {}, "workspace_mb": 256}
    config = {"compile": settings | {"backend": "tensorrt-rtx"}, "targets": ["sm_86"]}
    job = Job("engine-sm_86-fp16", source.with_name("engine-sm_86-fp16"), config, {"onnx": source})
    engine.run(job)
    manifest = artifact.verify(job.out)
    assert set(manifest.files) == {"model.engine", "layers.json", "samples.npz"}
    assert manifest.extra["precision"] == "fp16"
    assert manifest.extra["backend"] == "tensorrt-rtx"
    assert {"backend_version", "compute_capabilities", "platform", "profile"} <= set(manifest.extra)
    assert manifest.metrics["plan_bytes"] == manifest.files["model.engine"]["bytes"]
    assert manifest.metrics["build_seconds"] > 0
    assert manifest.ports == artifact.read(source).ports
    assert manifest.inputs["onnx"]["id"] == artifact.read(source).id
    assert json.loads((job.out / "layers.json").read_text())["source"] == "network"
    assert np.load(job.out / "samples.npz")["image"].dtype == np.uint8


def test_building_needs_neither_torch_nor_onnx_nor_rich() -> None:
    blocked = ["torch", "onnx", "onnxruntime", "pydantic", "rich", "cuda"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import export.engine"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
