"""Small ONNX graphs for the tests of precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from toolchain.tasks import Split

Shapes = Mapping[str, Sequence[Any]]


def small_graph(nodes: Sequence[Any], inputs: Shapes, outputs: Shapes, weights: Mapping[str, Any]) -> Any:
    """A model of opset 20. Its ports are float, but for what an ArgMax gives; float weights are made float32."""
    integer = {name for node in nodes if node.op_type == "ArgMax" for name in node.output}
    kinds = {name: TensorProto.INT64 if name in integer else TensorProto.FLOAT for name in (*inputs, *outputs)}
    ports = [
        [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    tensors = [
        numpy_helper.from_array(array.astype(np.float32) if array.dtype.kind == "f" else array, name)
        for name, array in arrays.items()
    ]
    graph = helper.make_graph(list(nodes), "small", *ports, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def session(model: Any) -> Callable[[Any], dict[str, np.ndarray]]:
    made = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in made.get_outputs()]
    return lambda feeds: dict(zip(names, made.run(names, feeds), strict=True))


def outliers_graph() -> Any:
    """x (n, 4) -> tokens (n, 16) -> four matrix products; what ``wide`` reads has a huge, unused channel."""
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
    return small_graph(nodes, {"x": ["n", 4]}, {"probabilities": ["n", 16], "label": ["n"]}, values)


def outliers_split() -> Split:
    x = np.random.default_rng(1).normal(size=(96, 4)).astype(np.float32)
    return Split({"x": x, "target": session(outliers_graph())({"x": x})["label"]}, ("x",))
