"""Artifacts so small that a worker loads them in no time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolchain import artifact
from toolchain.artifact import Port
from toolchain.tasks import Data, Split, save_data

INPUTS = [Port("x", "float32", ("batch", 4))]
OUTPUTS = [Port("probabilities", "float32", ("batch", 3)), Port("label", "int64", ("batch",))]
TASK = "tests.benchmarks.tiny_task"


def write_onnx(
    folder: Path,
    *,
    seed: int = 0,
    noise: float = 0.0,
    precision: str = "fp32",
    inputs: dict[str, Path] | None = None,
    samples: bool = True,
) -> Path:
    """x (batch, 4) -> Gemm -> Softmax, ArgMax; ``noise`` is added to the weights."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 1, (4, 3)) + noise * np.random.default_rng(seed + 1).normal(0, 1, (4, 3))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=-1, keepdims=0),
    ]
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    values = [[helper.make_tensor_value_info(p.name, kinds[p.dtype], p.shape) for p in ports] for ports in (INPUTS, OUTPUTS)]
    graph = helper.make_graph(nodes, "tiny", *values, [numpy_helper.from_array(weight.astype(np.float32), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with artifact.create(folder, stage="onnx", config={"task": TASK}, inputs=inputs) as draft:
        onnx.save(model, str(draft.path / "model.onnx"))
        if samples:
            np.savez(draft.path / "samples.npz", x=data_x(8))
        draft.set_ports(INPUTS, OUTPUTS)
        draft.extra = {"precision": precision, "parameters": 12, "opset": 20, "task": TASK}
    return folder


def write_engine(folder: Path, source: Path) -> Path:
    """An engine that no machine runs: its plan is not one."""
    with artifact.create(folder, stage="engine", config={}, inputs={"onnx": source}) as draft:
        (draft.path / "model.engine").write_bytes(b"not a plan")
        draft.set_ports(INPUTS, OUTPUTS)
        draft.extra = {"precision": "fp16", "backend": "tensorrt-rtx", "backend_version": "1.0", "parameters": 12}
        draft.extra |= {"compute_capabilities": ["sm_86"], "platform": "linux-x86_64"}
    return folder


def data_x(count: int) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 1, (count, 4)).astype(np.float32)


def write_data(folder: Path, count: int = 90) -> Path:
    x = data_x(count)
    label = np.argmax(x @ np.random.default_rng(0).normal(0, 1, (4, 3)), axis=1)
    split = Split({"x": x, "label": label}, ("x",))
    with artifact.create(folder, stage="data", config={"task": TASK}) as draft:
        save_data(draft.path, Data({"train": split, "val": split, "test": split}, {"classes": ["a", "b", "c"]}))
    return folder
