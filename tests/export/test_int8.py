from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export.half import PrecisionError, edges, float_compute, measured
from export.int8 import Dynamic, Static
from tests.export.graphs import outliers_graph, outliers_split, session, small_graph
from toolchain.tasks import Split

Model = Callable[..., Any]


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
    model = small_graph(nodes, {"x": ["n", 8], "mask": ["n", 8]}, {"y": ["n", 8]}, {"w": weight})
    mask = np.where(np.arange(8) < rng.integers(2, 8, (16, 1)), 0.0, -3e38).astype(np.float32)
    feeds = {"x": rng.normal(size=(16, 8)).astype(np.float32), "mask": mask}
    expected = session(model)(feeds)["y"]
    for kind in ("int8-cpu", "int8-trt"):
        made = Static(model, kind, Split(feeds, ("x", "mask")))()
        assert float_compute(made, kind) == ["first"]
        np.testing.assert_allclose(session(made)(feeds)["y"], expected, atol=0.1)


def positions_graph() -> Any:
    """x (n, 4, 2) float -> minus its last row, halved -> MatMul -> Relu -> MatMul: a network that reads positions."""
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
    return small_graph(nodes, {"x": ["n", 4, 2]}, {"y": ["n", 4, 3]}, values)


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
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], "first", transB=1),
        helper.make_node("Gemm", ["a", "w"], ["y"], "second", transB=1),
    ]
    model = small_graph(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, {"w": rng.normal(size=(8, 8)).astype(np.float32)})
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
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], "in"),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"], "plain"),
        helper.make_node("Tanh", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "w"], ["y"], "transposed", transB=1),
    ]
    weights = {"w0": rng.normal(size=(8, 8)), "w": rng.normal(size=(8, 8)) * np.logspace(-1, 1, 8)}
    model = small_graph(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, weights)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    expected = session(model)({"x": x})["y"]
    found = session(Static(model, kind, Split({"x": x}, ("x",)))())({"x": x})["y"]
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()


def test_dynamic_int8_lists_what_has_a_constant_weight() -> None:
    nodes = [
        helper.make_node("MatMul", ["left", "x"], ["a"], "left"),
        helper.make_node("MatMul", ["a", "right"], ["b"], "right"),
        helper.make_node("MatMul", ["b", "a"], ["y"], "both"),
    ]
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    model = small_graph(nodes, {"x": [8, 8]}, {"y": [8, 8]}, {"left": weight, "right": weight})
    make = Dynamic(model)
    made = make()
    assert make.convertible(made) == ["right"]
    assert [node.op_type for node in made.graph.node].count("MatMulInteger") == 1


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


def test_what_is_not_in_the_graph_cannot_be_kept(make_model: Model, make_images: Model) -> None:
    for make in (Dynamic(outliers_graph()), Static(outliers_graph(), "int8-cpu", outliers_split())):
        with pytest.raises(PrecisionError, match="expected nodes of the graph to keep float, found wied"):
            make(["wied"])


def test_int8_needs_a_runtime_that_keeps_its_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.quantization.quantize_static", lambda model, out, reader: None)
    with pytest.raises(PrecisionError, match=r"ONNX Runtime 1\.27 or newer, found .*pip install --upgrade onnxruntime"):
        Static(outliers_graph(), "int8-cpu", outliers_split())
