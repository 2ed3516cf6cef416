from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from export import precision
from export.half import PrecisionError, edges, emulated_half, float_compute, name_nodes, to_half
from export.int8 import Dynamic, Static
from export.precision import Gate, half_with_islands, int8_with_islands
from export.verify import ParityError
from tests.export.graphs import outliers_graph, outliers_split, session, small_graph
from toolchain import artifact
from toolchain.artifact import Port
from toolchain.stage import Job
from toolchain.tasks import Data, Split, save_data

Model = Callable[..., Any]
EXPORT: dict[str, Any] = {
    "calibration": {"samples": 32, "method": "minmax"},
    "dynamic_int8": False,
    "parity": {
        "samples": 24,
        "limits": {
            "fp16": {"max_difference": 0.02, "agreement": 0.95, "metric_drop": 5.0},
            "int8-cpu": {"max_difference": None, "agreement": 0.8, "metric_drop": 20.0},
            "int8-trt": {"max_difference": None, "agreement": 0.8, "metric_drop": 20.0},
        },
    },
}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: Any = ModuleType("tiny_export_task")
    module.HEADLINE, module.HIGHER_IS_BETTER = "accuracy", True
    module.score = lambda outputs, split: {
        "accuracy": 100.0 * float((outputs["label"] == split.arrays["target"]).mean())
    }
    module.agreement = lambda a, b: float((a["label"] == b["label"]).mean())
    monkeypatch.setitem(sys.modules, "tiny_export_task.task", module)
    return module


@pytest.fixture
def data_folder(tmp_path: Path, make_model: Model, make_images: Model) -> Path:
    call = session(make_model())
    splits = {}
    for seed, name in enumerate(("train", "val")):
        images = make_images(48, seed + 10)
        splits[name] = Split({"image": images, "target": call({"image": images})["label"]}, ("image",))
    with artifact.create(tmp_path / "data", stage="data", config={}) as draft:
        save_data(draft.path, Data(splits, {}))
    return tmp_path / "data"


def gate(model: Any, task: ModuleType, images: np.ndarray, **limits: float) -> Gate:
    reference = session(model)({"image": images})
    split = Split({"image": images, "target": reference["label"]}, ("image",))
    return Gate(split, reference, task, limits)


def job(kind: str, source: Path, data: Path, **export: Any) -> Job:
    config = {"precision": kind, "export": EXPORT | export, "task": "tiny_export_task.task"}
    return Job(f"onnx-{kind}", source.with_name(f"onnx-{kind}"), config, {"onnx": source, "data": data})


def test_edges_are_what_casts_normalises_and_decodes(make_model: Model) -> None:
    inputs = {"input.cast", "input.sub", "input.mul", "input.transpose"}
    assert edges(make_model()) == inputs | {"softmax", "argmax"}


def test_half_keeps_ports_and_edges_and_casts_each_tensor_once(make_model: Model, make_images: Model) -> None:
    model = make_model()
    before = model.SerializeToString()
    half = to_half(model)
    assert model.SerializeToString() == before
    assert [str(v) for v in half.graph.input] == [str(v) for v in model.graph.input]
    assert [str(v) for v in half.graph.output] == [str(v) for v in model.graph.output]
    assert [node.input[0] for node in half.graph.node if node.op_type == "Cast"] == ["image", "nchw", "logits"]
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert kinds["mean"] == kinds["scale"] == onnx.TensorProto.FLOAT
    assert kinds["conv.weight/half"] == kinds["head.bias/half"] == onnx.TensorProto.FLOAT16
    assert float_compute(half, "fp16") == []
    images = make_images(32)
    expected, found = session(model)({"image": images}), session(half)({"image": images})
    assert found["probabilities"].dtype == np.float32
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=5e-3)


def test_half_with_float_inputs_outputs_shared_tensors_and_resize_scales() -> None:
    from onnx import helper

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Softplus", ["a"], ["b"]),
        helper.make_node("Exp", ["a"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Resize", ["d", "", "scales"], ["e"], mode="nearest"),
        helper.make_node("Conv", ["e", "w"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    weights = {"w": np.full((2, 2, 1, 1), 0.5, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    model = small_graph(nodes, {"x": ["n", 2, 4, 4]}, {"y": ["n", 2, 8, 8], "z": ["n", 2, 8, 8]}, weights)
    half = to_half(model)
    casts = [tuple(node.output) for node in half.graph.node if node.op_type == "Cast"]
    assert casts == [("x/half",), ("a/float",), ("b/half",), ("c/half",), ("y",), ("z",)]
    x = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    for name, array in session(model)({"x": x}).items():
        np.testing.assert_allclose(session(half)({"x": x})[name], array, rtol=5e-3, atol=5e-3)


def test_half_refuses_control_flow() -> None:
    from onnx import TensorProto, helper

    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["r"])],
        "b",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, [1])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], "branch", then_branch=branch, else_branch=branch)],
        "flow",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(PrecisionError, match=r"branch \(If\): expected a graph without control flow"):
        to_half(model)


def test_emulated_half_rounds_where_the_cpu_does_not(make_model: Model, make_images: Model) -> None:
    half = to_half(make_model())
    images = make_images(32)
    exact, native = session(make_model())({"image": images}), session(half)({"image": images})
    rounded = session(emulated_half(half))({"image": images})
    error = {
        kind: np.abs(out["probabilities"] - exact["probabilities"]).max()
        for kind, out in {"native": native, "rounded": rounded}.items()
    }
    assert 0 < error["rounded"] < 0.01
    assert error["rounded"] != error["native"]


def test_islands_are_found_where_half_overflows(make_model: Model, make_images: Model, task: ModuleType) -> None:
    model = make_model(gain=2e4, island="Mul")
    limits = {"max_difference": 0.01, "agreement": 0.95}
    check = gate(model, task, make_images(32), **limits)
    half = to_half(model)
    assert np.isfinite(session(half)({"image": make_images(32)})["probabilities"]).all(), "the CPU hides the overflow"
    assert check(half).max_difference == {"probabilities": None}
    made, report, islands = half_with_islands(model, check)
    assert report.passed
    assert {"Conv", "Mul", "Relu"} <= set(islands)
    assert float_compute(made, "fp16") == ["conv"]


def test_the_search_for_islands_ends_in_a_failed_report(
    make_model: Model, make_images: Model, task: ModuleType
) -> None:
    check = gate(make_model(), task, make_images(16), max_difference=0.0)
    _, report, islands = half_with_islands(make_model(), check)
    assert not report.passed
    assert islands


def outliers_gate(task: ModuleType, **limits: float) -> Gate:
    split = outliers_split()
    return Gate(split, session(outliers_graph())({"x": split.arrays["x"]}), task, limits)


@pytest.mark.parametrize("kind", ["int8-cpu", "int8-trt", "dynamic"])
def test_int8_keeps_float_what_it_ruins_and_nothing_else(kind: str, task: ModuleType) -> None:
    check = outliers_gate(task, agreement=0.9)
    model = outliers_graph()
    make: Any = Dynamic(model) if kind == "dynamic" else Static(model, kind, check.split)
    full = make()
    assert check(full).agreement < 0.5
    assert {"a", "wide", "c"} <= set(make.convertible(full))
    made, report, kept, _ = int8_with_islands(make, check)
    assert report.passed
    assert kept == ["wide"]
    if kind != "dynamic":
        assert {"a", "c"}.isdisjoint(float_compute(made, kind))
        assert "wide" in float_compute(made, kind)


class Fixed:
    """Nodes a to h, whose weights in int8 shift the output by a known amount each; by a tenth when partly kept."""

    def __init__(self, harm: dict[str, float], kinds: dict[str, str] | None = None, separable: str = "") -> None:
        self.harm, self.separable, self.made = harm, separable, list[list[str]]()
        kinds = kinds or {}
        nodes = [onnx.helper.make_node(kinds.get(name, "MatMul"), ["x", "x"], [name], name) for name in harm]
        self.source = onnx.helper.make_model(onnx.helper.make_graph(nodes, "fixed", [], []))

    def convertible(self, made: Any) -> list[str]:
        return list(self.harm)

    def __call__(self, kept: Any = (), apart: bool = False) -> Any:
        self.made.append(sorted(kept))
        part = {name: 0.1 if apart and name in self.separable else 0.0 for name in kept}
        return sum(value * part.get(name, 1.0) for name, value in self.harm.items())


class Budget:
    """A gate that allows a shift of ``most``."""

    def __init__(self, most: float) -> None:
        self.most = most

    def __call__(self, shift: float) -> Any:
        reasons = ("too far",) if shift > self.most else ()
        return SimpleNamespace(passed=not reasons, reasons=reasons)

    def part(self, count: int) -> Budget:
        return self

    def shift(self, model: float) -> float:
        return model


@pytest.mark.parametrize(("most", "kept"), [(36, ""), (35, "h"), (22, "gh"), (20, "fgh"), (6, "defgh"), (1, "bcdefgh")])
def test_the_worst_nodes_are_kept_float_up_to_where_the_gate_passes(most: float, kept: str) -> None:
    harm = {name: float(value) for value, name in enumerate("abcdefgh", start=1)}
    make: Any = Fixed(harm)
    shift, report, found, _ = int8_with_islands(make, Budget(most))  # type: ignore[arg-type]
    assert report.passed
    assert "".join(sorted(found)) == kept
    assert found == sorted(found, reverse=True)
    assert shift == sum(harm[name] for name in harm if name not in kept) <= most
    assert len(make.made) <= 1 + len(harm) + 6


@pytest.mark.parametrize(
    ("most", "separable", "kept", "partly"),
    [(29, "h", "", "h"), (28.5, "h", "h", ""), (22, "h", "g", "h"), (22, "a", "hg", "")],
)
def test_the_worst_nodes_are_partly_kept_where_that_is_enough(
    most: float, separable: str, kept: str, partly: str
) -> None:
    harm = {name: float(value) for value, name in enumerate("abcdefgh", start=1)}
    make: Any = Fixed(harm, separable=separable)
    _, report, *found = int8_with_islands(make, Budget(most))  # type: ignore[arg-type]
    assert report.passed
    assert found == [list(kept), list(partly)]


def test_a_graph_with_nothing_left_in_int8_that_computes_is_not_what_passes() -> None:
    make: Any = Fixed({"table": 1.0, "a": 2.0, "b": 3.0}, {"table": "Gather"})
    _, report, found, _ = int8_with_islands(make, Budget(1.5))  # type: ignore[arg-type]
    assert not report.passed
    assert found == []
    assert ["a", "b"] not in make.made[4:]


def test_one_node_is_not_searched_for() -> None:
    make: Any = Fixed({"a": 1.0})
    assert int8_with_islands(make, Budget(0.5))[2] == []  # type: ignore[arg-type]
    assert make.made == [[]]


def test_names_of_nodes_are_given_once() -> None:
    nodes = [onnx.helper.make_node("Relu", ["x"], [f"y{i}"], name) for i, name in enumerate(["Relu_2", "a", "", "a"])]
    model = name_nodes(onnx.helper.make_model(onnx.helper.make_graph(nodes, "names", [], [])))
    names = [node.name for node in model.graph.node]
    assert names[:2] == ["Relu_2", "a"]
    assert len(set(names)) == 4


def test_the_search_for_float_nodes_ends_in_a_failed_report(task: ModuleType) -> None:
    check = outliers_gate(task, max_difference=0.0)
    _, report, kept, _ = int8_with_islands(Dynamic(outliers_graph()), check)
    assert not report.passed
    assert kept == []


@pytest.mark.parametrize("kind", ["fp16", "int8-cpu", "int8-trt"])
def test_the_stage_writes_a_gated_artifact(
    kind: str, onnx_folder: Callable[..., Path], data_folder: Path, task: ModuleType
) -> None:
    source = onnx_folder()
    work = job(kind, source, data_folder)
    precision.run(work)
    manifest, origin = artifact.verify(work.out), artifact.read(source)
    assert manifest.ports == origin.ports
    assert manifest.files["samples.npz"] == origin.files["samples.npz"]
    assert manifest.inputs["onnx"]["id"] == origin.id
    assert manifest.extra["precision"] == kind
    assert manifest.extra["float_nodes"] == []
    assert manifest.extra["parameters"] == 500
    assert manifest.extra["verify"]["samples"] == 24
    assert set(manifest.metrics) == {"accuracy", "agreement", "max_difference"}
    if kind == "fp16":
        assert manifest.extra["fp32_islands"] == []
    else:
        assert manifest.extra["calibration"] == {"samples": 32, "method": "minmax"}
        assert manifest.extra["converted"].endswith("converted, calibrated on 32 training samples (minmax)")


def test_dynamic_int8_says_what_stayed_float(
    onnx_folder: Callable[..., Path], data_folder: Path, task: ModuleType
) -> None:
    work = job("int8-cpu", onnx_folder(), data_folder, dynamic_int8=True)
    precision.run(work)
    extra = artifact.verify(work.out).extra
    assert extra["float_nodes"] == ["conv"]
    assert extra["calibration"] == {"samples": 0, "method": "dynamic"}
    assert extra["converted"].endswith("without calibration; in float32: conv")


def test_many_nodes_that_stayed_float_are_counted() -> None:
    text = precision.converted(9, [f"n{i}" for i in range(8)], {"samples": 4, "method": "minmax"}, "fp16")
    assert text == (
        "1 of 9 compute nodes converted, calibrated on 4 training samples (minmax); "
        "in fp16: n0, n1, n2, n3, n4, n5 and 2 more"
    )


def extra_of_outliers(kind: str, dynamic: bool, folder: Path, graph: Any = None) -> dict[str, Any]:
    """What the stage tells of a graph with a product that int8 ruins."""
    source, split = folder / "onnx", outliers_split()
    with artifact.create(source, stage="onnx", config={}) as draft:
        onnx.save(graph or outliers_graph(), draft.path / "model.onnx")
        np.savez(draft.path / "samples.npz", x=split.arrays["x"])
        outputs = [Port("probabilities", "float32", ("n", 16)), Port("label", "int64", ("n",))]
        draft.set_ports([Port("x", "float32", ("n", 4))], outputs)
        draft.extra = {"precision": "fp32", "opset": 20, "parameters": 832, "task": "tiny"}
    with artifact.create(folder / "positions", stage="data", config={}) as draft:
        save_data(draft.path, Data({"train": split, "val": split}, {}))
    limits = EXPORT["parity"]["limits"] | {kind: {"max_difference": None, "agreement": 0.9, "metric_drop": 20.0}}
    parity = {"samples": 96, "limits": limits}
    work = job(kind, source, folder / "positions", dynamic_int8=dynamic, parity=parity)
    precision.run(work)
    extra = artifact.verify(work.out).extra
    assert extra["verify"]["agreement"] >= 0.9
    return extra


@pytest.mark.parametrize("kind", ["int8-cpu", "int8-trt"])
def test_the_stage_tells_what_it_kept_float(kind: str, tmp_path: Path, task: ModuleType) -> None:
    extra = extra_of_outliers(kind, False, tmp_path)
    assert extra["float_islands"] == ["wide"]
    assert "wide" in extra["float_nodes"]
    assert extra["converted"].endswith("to pass the gate: wide")


def test_the_stage_smooths_dynamic_int8_before_it_keeps_anything_float(tmp_path: Path, task: ModuleType) -> None:
    extra = extra_of_outliers("int8-cpu", True, tmp_path)
    assert extra["smoothed"] == ["wide"]
    assert extra["float_islands"] == extra["partly_float"] == []
    assert extra["float_nodes"] == []
    assert extra["converted"].endswith("without calibration, the inputs of 1 products smoothed for the gate")


def test_names_that_folding_changes_are_told_too(tmp_path: Path, task: ModuleType) -> None:
    graph = outliers_graph()
    place = next(index for index, node in enumerate(graph.graph.node) if node.name == "wide")
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.full(16, 0.01, np.float32), "bias"))
    graph.graph.node[place].output[0] = "product"
    graph.graph.node.insert(place + 1, onnx.helper.make_node("Add", ["product", "bias"], ["t4"], "add"))
    made = Dynamic(graph)
    (name,) = {node.name for node in made.source.graph.node if node.name.startswith("wide")}
    assert name != "wide"
    assert [one for one in float_compute(made([name]), "int8-cpu") if "wide" in one]
    extra = extra_of_outliers("int8-cpu", False, tmp_path, graph)
    assert extra["float_islands"] == [name]
    assert [one for one in extra["float_nodes"] if "wide" in one]


def test_what_was_kept_float_for_the_gate_is_told() -> None:
    text = precision.converted(4, ["wide"], {"samples": 0, "method": "dynamic"}, "float32", ["wide"], ["a"], ["b"])
    assert text.startswith("3 of 4 compute nodes converted")
    assert text.endswith(
        "the inputs of 1 products smoothed for the gate; in float32: wide; a few channels in float32 to pass the gate: "
        "b; kept in float32 to pass the gate: wide"
    )


def test_an_impossible_limit_fails_and_leaves_nothing(
    onnx_folder: Callable[..., Path], data_folder: Path, task: ModuleType
) -> None:
    limits = EXPORT["parity"]["limits"] | {"int8-trt": {"max_difference": 1e-9, "agreement": 1.0, "metric_drop": 0.0}}
    work = job("int8-trt", onnx_folder(), data_folder, parity={"samples": 8, "limits": limits})
    with pytest.raises(ParityError, match=r"export\.parity\.limits\.int8-trt"):
        precision.run(work)
    assert not work.out.exists()


def test_precision_never_imports_torch() -> None:
    code = "import sys, export.precision, export.verify, onnxruntime.quantization; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
