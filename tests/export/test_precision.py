from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from export import precision
from export.half import PrecisionError, edges, emulated_half, float_compute, measured, name_nodes, to_half
from export.int8 import Dynamic, Static
from export.precision import Gate, half_with_islands, int8_with_islands
from export.verify import ParityError
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


def session(model: Any) -> Callable[[Any], dict[str, np.ndarray]]:
    made = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in made.get_outputs()]
    return lambda feeds: dict(zip(names, made.run(names, feeds), strict=True))


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
    from onnx import TensorProto, helper, numpy_helper

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
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "shared",
        [value("x", TensorProto.FLOAT, ["n", 2, 4, 4])],
        [value("y", TensorProto.FLOAT, ["n", 2, 8, 8]), value("z", TensorProto.FLOAT, ["n", 2, 8, 8])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
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


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_int8_cpu_quantises_all_that_computes(make_model: Model, make_images: Model, method: str) -> None:
    made = Static(make_model(), "int8-cpu", Split({"image": make_images(20)}, ("image",)), method)()
    onnx.checker.check_model(made, full_check=True)
    assert float_compute(made, "int8-cpu") == []
    zero = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    activations = [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
    assert {zero[node.input[2]].dtype for node in activations} == {np.dtype(np.uint8)}
    assert zero["conv.weight_quantized"].dtype == np.int8
    assert zero["conv.weight_scale"].shape == (16,)
    assert edges(make_model()) <= {node.name for node in made.graph.node}


def test_int8_trt_is_symmetric_without_quantised_bias_and_half_elsewhere(make_model: Model, make_images: Model) -> None:
    made = Static(make_model(), "int8-trt", Split({"image": make_images(20)}, ("image",)))()
    assert float_compute(made, "int8-trt") == []
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    for node in made.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
            assert values[node.input[1]].dtype == np.float16
    assert not [tensor for tensor in made.graph.initializer if tensor.data_type == onnx.TensorProto.INT32]


def test_a_mask_before_softmax_is_not_quantised() -> None:
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["first"], "first"),
        helper.make_node("Tanh", ["first"], ["tokens"], "tanh"),
        helper.make_node("MatMul", ["tokens", "w"], ["scores"], "scores"),
        helper.make_node("Add", ["scores", "mask"], ["masked"], "mask"),
        helper.make_node("Softmax", ["masked"], ["weights"], "softmax"),
        helper.make_node("MatMul", ["weights", "w"], ["y"], "values"),
    ]
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 8)).astype(np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "attention",
        [value("x", TensorProto.FLOAT, ["n", 8]), value("mask", TensorProto.FLOAT, ["n", 8])],
        [value("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    mask = np.where(np.arange(8) < rng.integers(2, 8, (16, 1)), 0.0, -3e38).astype(np.float32)
    feeds = {"x": rng.normal(size=(16, 8)).astype(np.float32), "mask": mask}
    expected = session(model)(feeds)["y"]
    for kind in ("int8-cpu", "int8-trt"):
        made = Static(model, kind, Split(feeds, ("x", "mask")))()
        assert float_compute(made, kind) == ["first"]
        np.testing.assert_allclose(session(made)(feeds)["y"], expected, atol=0.1)


def positions_graph() -> Any:
    """x (n, 4, 2) float -> minus its last row, halved -> MatMul -> Relu -> MatMul: a network that reads positions."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    values: dict[str, Any] = {"half": np.float32(0.5), "w0": rng.normal(size=(2, 8)), "w1": rng.normal(size=(8, 3))}
    values = {name: np.asarray(value, np.float32) for name, value in values.items()}
    values |= {"from": np.array([-1]), "to": np.array([9]), "axis": np.array([1])}
    nodes = [
        helper.make_node("Slice", ["x", "from", "to", "axis"], ["last"]),
        helper.make_node("Sub", ["x", "last"], ["relative"]),
        helper.make_node("Mul", ["relative", "half"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "w0"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["y"], "second"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "positions",
        [value("x", TensorProto.FLOAT, ["n", 4, 2])],
        [value("y", TensorProto.FLOAT, ["n", 4, 3])],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("kind", ["int8-cpu", "int8-trt"])
def test_what_reads_a_measured_input_stays_float_and_what_reads_pixels_does_not(kind: str, make_model: Model) -> None:
    model = positions_graph()
    assert measured(model) == {"first"}
    assert measured(make_model()) == set()
    rng = np.random.default_rng(1)
    x = rng.normal(size=(32, 4, 2)).astype(np.float32)
    x[:, 0] += rng.choice([0.0, 300.0], (32, 1)).astype(np.float32)  # eight bits of this range would leave metres
    made = Static(model, kind, Split({"x": x}, ("x",)))()
    assert float_compute(made, kind) == ["first"]
    near = np.zeros((1, 4, 2), np.float32)
    step = near + np.float32(0.5) * np.eye(4, 2, dtype=np.float32)
    assert not np.array_equal(session(made)({"x": near})["y"], session(made)({"x": step})["y"])


def test_dynamic_int8_of_layers_that_share_a_weight() -> None:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], "first", transB=1),
        helper.make_node("Gemm", ["a", "w"], ["y"], "second", transB=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tied",
        [value("x", TensorProto.FLOAT, ["n", 8])],
        [value("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = rng.normal(size=(16, 8)).astype(np.float32)
    expected, make = session(model)({"x": x})["y"], Dynamic(model)
    np.testing.assert_allclose(session(make())({"x": x})["y"], expected, atol=0.05 * np.abs(expected).max())
    assert make.convertible(make()) == ["first", "second"]
    half, whole = make(["first"]), make(["first", "second"])
    assert [node.op_type for node in half.graph.node].count("MatMulInteger") == 1
    np.testing.assert_allclose(session(whole)({"x": x})["y"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8-cpu", "int8-trt"])
def test_static_int8_of_layers_that_share_a_weight(kind: str) -> None:
    """ONNX Runtime scales the weight of a MatMul and of a transposed Gemm along different axes."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], "in"),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"], "plain"),
        helper.make_node("Tanh", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "w"], ["y"], "transposed", transB=1),
    ]
    weights = {"w0": rng.normal(size=(8, 8)), "w": rng.normal(size=(8, 8)) * np.logspace(-1, 1, 8)}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tied",
        [value("x", TensorProto.FLOAT, ["n", 8])],
        [value("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    expected = session(model)({"x": x})["y"]
    found = session(Static(model, kind, Split({"x": x}, ("x",)))())({"x": x})["y"]
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()


def test_dynamic_int8_lists_what_has_a_constant_weight() -> None:
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["left", "x"], ["a"], "left"),
        helper.make_node("MatMul", ["a", "right"], ["b"], "right"),
        helper.make_node("MatMul", ["b", "a"], ["y"], "both"),
    ]
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "sides",
        [value("x", TensorProto.FLOAT, [8, 8])],
        [value("y", TensorProto.FLOAT, [8, 8])],
        [numpy_helper.from_array(weight, name) for name in ("left", "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    make = Dynamic(model)
    made = make()
    assert make.convertible(made) == ["right"]
    assert [node.op_type for node in made.graph.node].count("MatMulInteger") == 1


def outliers_graph() -> Any:
    """x (n, 4) -> tokens (n, 16) -> four matrix products; what ``wide`` reads has a huge, unused channel."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    square = {name: rng.normal(size=(16, 16)) / 4 for name in ("w.a", "w.wide", "w.c")}
    square["w.wide"][0] = 0
    values = square | {"w.in": rng.normal(size=(4, 16)), "huge": np.eye(1, 16)[0] * 3000}
    nodes = [
        helper.make_node("MatMul", ["x", "w.in"], ["t"], "in"),
        helper.make_node("Tanh", ["t"], ["t0"]),
        helper.make_node("MatMul", ["t0", "w.a"], ["t1"], "a"),
        helper.make_node("Tanh", ["t1"], ["t2"]),
        helper.make_node("Add", ["t2", "huge"], ["t3"], "shift"),
        helper.make_node("MatMul", ["t3", "w.wide"], ["t4"], "wide"),
        helper.make_node("Tanh", ["t4"], ["t5"]),
        helper.make_node("MatMul", ["t5", "w.c"], ["logits"], "c"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], "softmax", axis=-1),
        helper.make_node("ArgMax", ["logits"], ["label"], "argmax", axis=-1, keepdims=0),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "outliers",
        [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("probabilities", TensorProto.FLOAT, ["n", 16]), value("label", TensorProto.INT64, ["n"])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def outliers_split() -> Split:
    x = np.random.default_rng(1).normal(size=(96, 4)).astype(np.float32)
    return Split({"x": x, "target": session(outliers_graph())({"x": x})["label"]}, ("x",))


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
    made, report, kept = int8_with_islands(make, check)
    assert report.passed
    assert kept == ["wide"]
    if kind != "dynamic":
        assert {"a", "c"}.isdisjoint(float_compute(made, kind))
        assert "wide" in float_compute(made, kind)


def test_a_calibration_is_done_once(make_model: Model, make_images: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Static(make_model(), "int8-cpu", Split({"image": make_images(20)}, ("image",)))
    first = make()
    monkeypatch.setattr(make, "split", None)
    assert float_compute(make(["conv"]), "int8-cpu") == ["conv"]
    again = make()
    assert len(again.graph.node) == len(first.graph.node)
    images = make_images(8)
    np.testing.assert_allclose(
        session(again)({"image": images})["probabilities"],
        session(first)({"image": images})["probabilities"],
        atol=1e-6,
    )


class Fixed:
    """Nodes a to h, whose weights in int8 shift the output by a known amount each."""

    def __init__(self, harm: dict[str, float], kinds: dict[str, str] | None = None) -> None:
        self.harm, self.made = harm, list[list[str]]()
        kinds = kinds or {}
        nodes = [onnx.helper.make_node(kinds.get(name, "MatMul"), ["x", "x"], [name], name) for name in harm]
        self.source = onnx.helper.make_model(onnx.helper.make_graph(nodes, "fixed", [], []))

    def convertible(self, made: Any) -> list[str]:
        return list(self.harm)

    def __call__(self, kept: Any = ()) -> Any:
        self.made.append(sorted(kept))
        return sum(value for name, value in self.harm.items() if name not in kept)


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
    shift, report, found = int8_with_islands(make, Budget(most))  # type: ignore[arg-type]
    assert report.passed
    assert "".join(sorted(found)) == kept
    assert found == sorted(found, reverse=True)
    assert shift == sum(harm[name] for name in harm if name not in kept) <= most
    assert len(make.made) <= 1 + len(harm) + 4


def test_a_graph_with_nothing_left_in_int8_that_computes_is_not_what_passes() -> None:
    make: Any = Fixed({"table": 1.0, "a": 2.0, "b": 3.0}, {"table": "Gather"})
    _, report, found = int8_with_islands(make, Budget(1.5))  # type: ignore[arg-type]
    assert not report.passed
    assert found == []
    assert ["a", "b"] not in make.made[4:]


def test_one_node_is_not_searched_for() -> None:
    make: Any = Fixed({"a": 1.0})
    assert int8_with_islands(make, Budget(0.5))[2] == []  # type: ignore[arg-type]
    assert make.made == [[]]


def test_what_is_not_in_the_graph_cannot_be_kept(make_model: Model, make_images: Model) -> None:
    for make in (Dynamic(outliers_graph()), Static(outliers_graph(), "int8-cpu", outliers_split())):
        with pytest.raises(PrecisionError, match="expected nodes of the graph to keep float, found wied"):
            make(["wied"])


def test_int8_needs_a_runtime_that_keeps_its_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.quantization.quantize_static", lambda model, out, reader: None)
    with pytest.raises(PrecisionError, match=r"ONNX Runtime 1\.27 or newer, found .*pip install --upgrade onnxruntime"):
        Static(outliers_graph(), "int8-cpu", outliers_split())


def test_names_of_nodes_are_given_once() -> None:
    nodes = [onnx.helper.make_node("Relu", ["x"], [f"y{i}"], name) for i, name in enumerate(["Relu_2", "a", "", "a"])]
    model = name_nodes(onnx.helper.make_model(onnx.helper.make_graph(nodes, "names", [], [])))
    names = [node.name for node in model.graph.node]
    assert names[:2] == ["Relu_2", "a"]
    assert len(set(names)) == 4


def test_the_search_for_float_nodes_ends_in_a_failed_report(task: ModuleType) -> None:
    check = outliers_gate(task, max_difference=0.0)
    _, report, kept = int8_with_islands(Dynamic(outliers_graph()), check)
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


@pytest.mark.parametrize(("kind", "dynamic"), [("int8-cpu", False), ("int8-trt", False), ("int8-cpu", True)])
def test_the_stage_tells_what_it_kept_float(kind: str, dynamic: bool, tmp_path: Path, task: ModuleType) -> None:
    source, split = tmp_path / "onnx", outliers_split()
    with artifact.create(source, stage="onnx", config={}) as draft:
        onnx.save(outliers_graph(), draft.path / "model.onnx")
        np.savez(draft.path / "samples.npz", x=split.arrays["x"])
        outputs = [Port("probabilities", "float32", ("n", 16)), Port("label", "int64", ("n",))]
        draft.set_ports([Port("x", "float32", ("n", 4))], outputs)
        draft.extra = {"precision": "fp32", "opset": 20, "parameters": 832, "task": "tiny"}
    with artifact.create(tmp_path / "positions", stage="data", config={}) as draft:
        save_data(draft.path, Data({"train": split, "val": split}, {}))
    limits = EXPORT["parity"]["limits"] | {kind: {"max_difference": None, "agreement": 0.9, "metric_drop": 20.0}}
    parity = {"samples": 96, "limits": limits}
    work = job(kind, source, tmp_path / "positions", dynamic_int8=dynamic, parity=parity)
    precision.run(work)
    extra = artifact.verify(work.out).extra
    assert extra["float_islands"] == ["wide"]
    assert "wide" in extra["float_nodes"]
    assert extra["converted"].endswith("to pass the gate: wide")
    assert extra["verify"]["agreement"] >= 0.9


def test_what_was_kept_float_for_the_gate_is_told() -> None:
    text = precision.converted(4, ["wide"], {"samples": 0, "method": "dynamic"}, "float32", ["wide"])
    assert text.endswith("in float32: wide; kept in float32 to pass the gate: wide")


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
