from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export.int8 import Dynamic
from export.smooth import Remedy, beside, measured, remedied
from tests.export.graphs import session, small_graph
from toolchain.tasks import Split

LARGE = 40.0  # of three channels, beside ones of about 1


@pytest.fixture
def samples() -> Split:
    return Split({"x": np.random.default_rng(1).normal(size=(24, 5, 32)).astype(np.float32)}, ("x",))


def encoder(large: float = LARGE) -> Any:
    """x (n, s, 32) -> h, some channels of which are large, read by two products; h is given, too."""
    rng = np.random.default_rng(0)
    size = np.ones(32)
    size[[3, 17, 30]] = large
    weights = {name: rng.normal(size=(32, 32)) / 6 for name in ("w.in", "w.q", "w.k")} | {"size": size}
    for name in ("w.q", "w.k"):
        weights[name][[3, 17, 30]] /= large
    weights["w.out"] = np.sign(rng.normal(size=(32, 4))) / 6
    nodes = [
        helper.make_node("MatMul", ["x", "w.in"], ["a"], "in"),
        helper.make_node("Mul", ["a", "size"], ["h"], "large"),
        helper.make_node("MatMul", ["h", "w.q"], ["q"], "query"),
        helper.make_node("MatMul", ["h", "w.k"], ["k"], "key"),
        helper.make_node("Add", ["q", "k"], ["b"], "add"),
        helper.make_node("Tanh", ["b"], ["c"], "tanh"),
        helper.make_node("MatMul", ["c", "w.out"], ["y"], "out"),
    ]
    return small_graph(nodes, {"x": ["n", "s", 32]}, {"y": ["n", "s", 4], "h": ["n", "s", 32]}, weights)


def smoothed(model: Any, samples: Split) -> tuple[Any, list[str]]:
    remedies = measured(model, samples)
    return remedied(model, remedies.smooth), list(remedies.smooth)


def error(model: Any, reference: Any, samples: Split) -> float:
    feeds = {"x": samples.arrays["x"][8:9]}
    return float(np.abs(session(model)(feeds)["y"] - session(reference)(feeds)["y"]).mean())


def test_a_smoothed_graph_computes_the_same_in_float_and_loses_less_in_int8(samples: Split) -> None:
    model = encoder()
    made, names = smoothed(model, samples.select(np.arange(8)))
    onnx.checker.check_model(made, full_check=True)
    assert names == ["query", "key"]
    feeds = {"x": samples.arrays["x"]}
    for name, value in session(model)(feeds).items():
        np.testing.assert_allclose(session(made)(feeds)[name], value, rtol=1e-4, atol=1e-4)
    before, after = (error(Dynamic(one)(), model, samples) for one in (model, made))
    assert after < before / 3
    assert {name for name, _ in [(one, None) for one in Dynamic(made).convertible(made)]} == {
        "in",
        "query",
        "key",
        "out",
    }


def test_what_has_no_large_channels_is_left_as_it_is(samples: Split) -> None:
    model = encoder(1.0)
    made, names = smoothed(model, samples)
    assert names == []
    assert made == model


def test_dead_channels_and_products_of_zeros_stay_finite(samples: Split) -> None:
    model = encoder()
    for tensor in model.graph.initializer:
        if tensor.name == "size":
            size = onnx.numpy_helper.to_array(tensor).copy()
            size[:2] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(size, "size"))
    made, names = smoothed(model, samples)
    assert names == ["query", "key"]
    assert np.isfinite(session(made)({"x": samples.arrays["x"]})["y"]).all()
    silent = Split({"x": np.zeros((4, 5, 32), np.float32)}, ("x",))
    assert smoothed(model, silent)[1] == []


def test_a_weight_is_stored_once(samples: Split) -> None:
    made, _ = smoothed(encoder(), samples)
    names = [tensor.name for tensor in encoder().graph.initializer]
    assert [tensor.name for tensor in made.graph.initializer] == [*names, "h/smooth scale"]


@pytest.mark.parametrize("reader", ["other input", "branch", "output"])
def test_a_weight_that_something_else_reads_stays_as_it_is(reader: str, samples: Split) -> None:
    model = encoder()
    graph = model.graph
    if reader == "other input":
        graph.node.append(helper.make_node("MatMul", ["c", "w.q"], ["z"], "again"))
        graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", "s", 32]))
    elif reader == "output":
        graph.output.append(helper.make_tensor_value_info("w.q", onnx.TensorProto.FLOAT, [32, 32]))
    else:
        out = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [32, 32])
        branch = helper.make_graph([helper.make_node("Identity", ["w.q"], ["z"])], "branch", [], [out])
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
        graph.node.append(helper.make_node("If", ["yes"], ["chosen"], "if", then_branch=branch, else_branch=branch))
        graph.output.append(helper.make_tensor_value_info("chosen", onnx.TensorProto.FLOAT, [32, 32]))
    made, names = smoothed(model, samples)
    assert names == ["key"]
    feeds = {"x": samples.arrays["x"]}
    for name, value in session(model)(feeds).items():
        np.testing.assert_allclose(session(made)(feeds)[name], value, rtol=1e-4, atol=1e-4)


def test_an_input_of_the_graph_is_smoothed_too(samples: Split) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(32, 4))
    weight[5] /= 100
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "only")]
    model = small_graph(nodes, {"x": ["n", "s", 32]}, {"y": ["n", "s", 4]}, {"w": weight})
    x = samples.arrays["x"].copy()
    x[..., 5] *= 100
    made, names = smoothed(model, Split({"x": x}, ("x",)))
    assert names == ["only"]
    np.testing.assert_allclose(session(made)({"x": x})["y"], session(model)({"x": x})["y"], rtol=1e-3, atol=1e-3)


def biased(large: float = LARGE) -> Any:
    """A product with a bias, whose weights are as large for a large channel as for others: no scale helps it much."""
    rng = np.random.default_rng(0)
    size = np.ones(32)
    size[[3, 17, 30]] = LARGE
    weights = {
        "size": size,
        "w": rng.normal(size=(32, 8)),
        "bias": rng.normal(size=8),
        "w.out": rng.normal(size=(8, 4)),
    }
    weights["w"][[3, 17, 30]] *= large
    nodes = [
        helper.make_node("Mul", ["x", "size"], ["h"], "large"),
        helper.make_node("MatMul", ["h", "w"], ["p"], "wide"),
        helper.make_node("Add", ["p", "bias"], ["b"], "bias"),
        helper.make_node("MatMul", ["b", "w.out"], ["y"], "out"),
    ]
    return small_graph(nodes, {"x": ["n", "s", 32]}, {"y": ["n", "s", 4]}, weights)


def test_a_graph_with_channels_apart_computes_the_same_and_loses_less_in_int8(samples: Split) -> None:
    model = biased()
    remedies = measured(model, samples.select(np.arange(8)))
    assert "wide" in remedies.apart
    assert "wide" not in remedies.smooth
    assert set(remedies.apart["wide"].apart) >= {3, 17, 30}
    made = remedied(model, remedies.apart)
    onnx.checker.check_model(made, full_check=True)
    feeds = {"x": samples.arrays["x"]}
    np.testing.assert_allclose(session(made)(feeds)["y"], session(model)(feeds)["y"], rtol=1e-3, atol=1e-2)

    make = Dynamic(model)
    make.remedies = remedies
    assert list(make.separable) == list(remedies.apart)
    whole, partly, float_ = make(), make(["wide"], apart=True), make(["wide"])
    assert error(partly, float_, samples) < error(whole, float_, samples) / 3

    names = {node.name: node.op_type for node in partly.graph.node}
    assert names[beside("wide")] == "MatMul"
    assert "wide_quant" in names
    assert beside("wide") not in {node.name for node in float_.graph.node}


def test_channels_apart_are_added_after_the_bias(samples: Split) -> None:
    model = biased()
    made = remedied(model, {"wide": measured(model, samples).apart["wide"]})
    nodes = {node.name: node for node in made.graph.node}
    assert nodes["bias"].input[0] == nodes["wide"].output[0]
    assert list(nodes["wide/whole"].input) == [nodes["bias"].output[0], nodes[beside("wide")].output[0]]
    assert nodes["wide/whole"].output[0] == nodes["out"].input[0]


def test_products_of_one_input_keep_channels_apart_each_by_itself(samples: Split) -> None:
    model = encoder()
    apart = {"query": Remedy(np.ones(32, np.float32), np.array([3, 17]))}
    made = remedied(model, measured(model, samples).smooth | apart)
    inputs = {node.name: node.input[0] for node in made.graph.node if node.op_type == "MatMul"}
    assert (inputs["query"], inputs["key"]) == ("query/rest of x", "h/smooth")
    feeds = {"x": samples.arrays["x"]}
    for name, value in session(model)(feeds).items():
        np.testing.assert_allclose(session(made)(feeds)[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reader", ["output", "twice", "two values", "output and bias"])
def test_the_sum_comes_where_only_the_product_is_read(reader: str, samples: Split) -> None:
    model = biased()
    graph = model.graph
    add = next(node for node in graph.node if node.name == "bias")
    if reader in ("output", "output and bias"):
        graph.output.append(helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, ["n", "s", 8]))
    if reader == "twice":
        graph.node.insert(3, helper.make_node("Mul", ["p", "p"], ["q"], "square"))
        graph.output.append(helper.make_tensor_value_info("q", onnx.TensorProto.FLOAT, ["n", "s", 8]))
    if reader == "two values":
        graph.node.insert(1, helper.make_node("ReduceMean", ["h"], ["m"], "mean"))
        add.input[1] = "m"
    if reader == "output":
        graph.node.remove(add)
        next(node for node in graph.node if node.name == "out").input[0] = "p"
    made = remedied(model, {"wide": Remedy(np.ones(32, np.float32), np.array([3, 17, 30]))})
    onnx.checker.check_model(made, full_check=True)
    feeds = {"x": samples.arrays["x"]}
    for name, value in session(model)(feeds).items():
        np.testing.assert_allclose(session(made)(feeds)[name], value, rtol=1e-3, atol=1e-1)


def test_channels_apart_leave_the_scale_of_the_others_alone(samples: Split) -> None:
    """The large weights of a channel apart must not make the others' scales those of dead channels."""
    remedies = [measured(biased(large), samples).apart["wide"] for large in (LARGE, 10 * LARGE)]
    inside = np.setdiff1d(np.arange(32), remedies[0].apart)
    np.testing.assert_array_equal(remedies[0].apart, remedies[1].apart)
    np.testing.assert_allclose(remedies[0].scale[inside], remedies[1].scale[inside])
