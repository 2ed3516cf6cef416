"""A small graph with known answers, as files and as numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from toolchain import artifact
from toolchain.artifact import Port

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


def same(found: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> bool:
    wanted = expected(feeds)
    return set(found) == set(wanted) and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array) for name, array in wanted.items()
    )
