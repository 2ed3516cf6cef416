"""Tiny image classifiers as ONNX graphs, and the artifact folders around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain import artifact
from toolchain.artifact import Port

INPUTS = [Port("image", "uint8", ("batch", 8, 8, 3))]
OUTPUTS = [Port("probabilities", "float32", ("batch", 4)), Port("label", "int64", ("batch",))]


def classifier(seed: int = 0, gain: float = 1.0, island: str | None = None) -> Any:
    """uint8 NHWC -> cast, normalise -> conv, relu -> mean -> gemm -> softmax, argmax; 4 classes.

    ``gain`` scales the convolution and is divided out again later, so that half precision overflows when it is large;
    ``island`` names the unary operator (of an identity pair) put after the convolution.
    """
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = {
        "mean": np.full((1, 1, 1, 3), 127.5, np.float32),
        "scale": np.full((1, 1, 1, 3), 1 / 64, np.float32),
        "conv.weight": (rng.normal(0, 0.4, (16, 3, 3, 3)) * gain).astype(np.float32),
        "conv.bias": (rng.normal(0, 0.1, 16) * gain).astype(np.float32),
        "head.weight": rng.normal(0, 1.5, (4, 16)).astype(np.float32),
        "head.bias": np.zeros(4, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], "input.cast", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centred"], "input.sub"),
        helper.make_node("Mul", ["centred", "scale"], ["scaled"], "input.mul"),
        helper.make_node("Transpose", ["scaled"], ["nchw"], "input.transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "conv.weight", "conv.bias"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
    ]
    last = "relu"
    if island:
        weights["inverse"] = np.array(1 / gain, np.float32)
        nodes.append(helper.make_node(island, [last, "inverse"], ["island"], "island"))
        last = "island"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], "head", transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], "softmax", axis=-1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], "argmax", axis=-1, keepdims=0),
    ]
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(p.name, kinds[p.dtype], p.shape) for p in INPUTS],
        [helper.make_tensor_value_info(p.name, kinds[p.dtype], p.shape) for p in OUTPUTS],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def images(count: int, seed: int = 1) -> np.ndarray:
    """(count, 8, 8, 3) uint8: smooth colour fields, so that the tiny network's answers differ."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (count, 1, 1, 3)) + rng.normal(0, 40, (count, 8, 8, 3))
    return np.clip(base, 0, 255).astype(np.uint8)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return classifier


@pytest.fixture
def make_images() -> Callable[..., np.ndarray]:
    return images


@pytest.fixture
def onnx_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write an ONNX artifact: onnx_folder(name, model, precision) -> folder."""
    onnx = pytest.importorskip("onnx")

    def write(name: str = "onnx", model: Any = None, precision: str = "fp32") -> Path:
        with artifact.create(tmp_path / name, stage="onnx", config={}) as draft:
            onnx.save(model or classifier(), draft.path / "model.onnx")
            np.savez(draft.path / "samples.npz", image=images(8))
            draft.set_ports(INPUTS, OUTPUTS)
            draft.extra = {"precision": precision, "opset": 20, "parameters": 500, "task": "tiny"}
        return tmp_path / name

    return write
