from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.attention import fused
from export.half import opset_of
from export.int8 import Dynamic
from tests.export.graphs import session, small_graph

HEADS, SIZE = 3, 4
WIDTH = HEADS * SIZE


def in_pieces(
    more: Callable[[Any], None] = lambda model: None,
    mask: Sequence[Any] = ("n", 1, "s", "s"),
    other: Sequence[Any] | None = None,
) -> Any:
    """x (n, s, 12), mask -> y (n, s, 12), as transformers' attention is exported; keys and values of ``other``."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {f"w.{name}": rng.normal(size=(WIDTH, WIDTH)) for name in "qkv"}
    weights |= {"scale": np.array(0.3), "joined": np.array([0, 0, WIDTH])}
    weights |= {f"{name}.shape": np.array([0, 0, HEADS, SIZE]) for name in "qkv"}
    nodes = []
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        source = "x" if name == "q" or other is None else "other"
        nodes += [
            helper.make_node("MatMul", [source, f"w.{name}"], [name], f"{name}.product"),
            helper.make_node("Reshape", [name, f"{name}.shape"], [f"{name}.heads"], f"{name}.reshape"),
            helper.make_node("Transpose", [f"{name}.heads"], [f"{name}.first"], f"{name}.transpose", perm=perm),
        ]
    nodes += [
        helper.make_node("MatMul", ["q.first", "k.first"], ["raw"], "products"),
        helper.make_node("Mul", ["raw", "scale"], ["scaled"], "scaling"),
        helper.make_node("Add", ["scaled", "mask"], ["masked"], "masking"),
        helper.make_node("Softmax", ["masked"], ["weights"], "softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "v.first"], ["found"], "weighted"),
        helper.make_node("Transpose", ["found"], ["back"], "back", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "joined"], ["y"], "join"),
    ]
    shapes = {"x": ["n", "s", WIDTH], "mask": list(mask)} | ({} if other is None else {"other": list(other)})
    model = small_graph(nodes, shapes, {"y": ["n", "s", WIDTH]}, weights)
    more(model)
    return model


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    """The last sample has two places of padding, which nothing looks at."""
    mask = np.zeros((batch, 1, length, length), np.float32)
    mask[-1, ..., -2:] = np.finfo(np.float32).min
    return {"x": np.random.default_rng(batch).normal(size=(batch, length, WIDTH)).astype(np.float32), "mask": mask}


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 7)])
def test_attention_in_one_operator_computes_the_same(batch: int, length: int) -> None:
    model = in_pieces()
    made = fused(model)
    onnx.checker.check_model(made, full_check=True)
    assert [node.op_type for node in made.graph.node] == ["MatMul", "MatMul", "MatMul", "Attention"]
    assert opset_of(made) == 23
    assert (made.graph.input, made.graph.output) == (model.graph.input, model.graph.output)
    given = feeds(batch, length)
    np.testing.assert_allclose(session(made)(given)["y"], session(model)(given)["y"], rtol=1e-4, atol=1e-5)


def test_it_is_quantised_with_attention_in_float() -> None:
    made = Dynamic(fused(in_pieces()))()
    kinds = [node.op_type for node in made.graph.node]
    assert (kinds.count("MatMulInteger"), kinds.count("MatMul"), kinds.count("Attention")) == (3, 0, 1)
    assert np.isfinite(session(made)(feeds(2, 6))["y"]).all()


def test_keys_and_values_may_be_of_another_input() -> None:
    model = in_pieces(mask=[1, HEADS, "s", "t"], other=["n", "t", WIDTH])
    made = fused(model)
    assert "Attention" in [node.op_type for node in made.graph.node]
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 5, WIDTH), "other": (2, 7, WIDTH), "mask": (1, HEADS, 5, 7)}
    given = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.testing.assert_allclose(session(made)(given)["y"], session(model)(given)["y"], rtol=1e-4, atol=1e-5)


def _shown(model: Any) -> None:
    model.graph.output.append(helper.make_tensor_value_info("weights", onnx.TensorProto.FLOAT, ["n", HEADS, "s", "s"]))


def _other_axis(model: Any) -> None:
    next(node for node in model.graph.node if node.name == "softmax").attribute[0].i = 1


def _set(name: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    return change


@pytest.mark.parametrize(
    "more",
    [
        _shown,
        _other_axis,
        _set("scale", np.ones((1, HEADS, 1, 1), np.float32)),
        _set("joined", [1, -1, WIDTH]),
        _set("q.shape", [-1, 2, HEADS, SIZE]),
        _set("k.shape", [0, 0, 1, WIDTH]),
    ],
)
def test_what_is_not_attention_is_left_as_it_is(more: Callable[[Any], None]) -> None:
    model = in_pieces(more)
    assert fused(model) is model
    assert opset_of(model) == 20


@pytest.mark.parametrize("mask", [["n", 1, 1, "s"], ["n", 1, "s", 1], [1, 1, 1, 1], ["m", 1, "s", "s"], [None] * 4])
def test_attention_with_a_mask_that_the_kernel_does_not_broadcast_is_left(mask: Sequence[Any]) -> None:
    model = in_pieces(mask=mask)
    assert fused(model) is model


def test_attention_of_queries_of_another_batch_is_left() -> None:
    model = in_pieces(other=["m", "s", WIDTH])
    assert fused(model) is model
