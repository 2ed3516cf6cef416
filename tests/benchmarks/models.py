"""Artifacts so small that a worker loads them in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    values = [
        [helper.make_tensor_value_info(p.name, kinds[p.dtype], p.shape) for p in ports] for ports in (INPUTS, OUTPUTS)
    ]
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
    """An engine that no machine runs."""
    with artifact.create(folder, stage="engine", config={}, inputs={"onnx": source}) as draft:
        (draft.path / "model.engine").write_bytes(b"not a plan")
        draft.set_ports(INPUTS, OUTPUTS)
        draft.extra = {"precision": "fp16", "backend": "tensorrt-rtx", "backend_version": "1.0", "parameters": 12}
        draft.extra |= {"compute_capabilities": ["sm_86"], "platform": "imaginary"}
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


def write_student(folder: Path, data: Path) -> Path:
    """The network of ``write_onnx`` as a student in PyTorch, with a training log."""
    from safetensors.numpy import save_file

    weight = np.random.default_rng(0).normal(0, 1, (4, 3)).astype(np.float32)
    config = {"task": TASK, "method": {"name": "prockd"}, "student": {"model": "linear"}}
    with artifact.create(folder, stage="student", config=config, inputs={"data": data}) as draft:
        save_file({"weight": np.ascontiguousarray(weight.T)}, draft.path / "model.safetensors")
        draft.extra = {"info": {"classes": ["a", "b", "c"]}, "parameters": 12, "method": "prockd"}
        lines = [
            {"step": s, "loss": 1 / (s + 1), "loss_kl": 0.5 / (s + 1), "perplexity": 3 + s, "lr": 0.1}
            for s in range(20)
        ]
        lines += [{"step": s, "val": {"accuracy": 50 + 2 * s}} for s in range(0, 20, 5)]
        (draft.path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_run(root: Path, **settings: Any) -> dict[str, Any]:
    """A bench job over a whole chain: teacher, student, fp32, fp16 and an engine that cannot run; its config."""
    data = write_data(root / "data")
    student = write_student(root / "student", data)
    teacher = write_onnx(root / "onnx-teacher", noise=0.01)
    onnx_ = write_onnx(root / "onnx", inputs={"model": student})
    half = write_onnx(root / "onnx-fp16", noise=0.3, precision="fp16", inputs={"onnx": onnx_})
    engine = write_engine(root / "engine-sm_86-fp16", half)
    bench = {"batches": [1, 4], "seconds": 0.05, "rounds": 2, "warmup_ms": 2.0, "threads": 1}
    bench |= {"paced_fps": 100.0, "paced_seconds": 0.1, "provider": "cpu", "teacher": True}
    folders = (data, engine, half, onnx_, teacher, student)
    return {
        "stage": "bench",
        "out": root / "bench",
        "config": {"task": TASK, "bench": bench | settings, "failed": {"engine-sm_86-int8-trt": "no builder here"}},
        "inputs": {folder.name: folder for folder in folders},
    }
