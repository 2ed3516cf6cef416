"""What a Runtime call costs on top of ONNX Runtime: p50 of our call against a bare ``session.run``.

    python -m benchmarks.overhead [--json PATH]

Two tiny models (a CNN of some 40 us and an MLP of some 10 us), 1 and 2 threads, one process. Both sides use one
session, since two sessions of one model differ by more than the overhead does, and they take turns in short blocks,
so that they see the same machine. Microseconds per call at batch 1, numpy on the host in and out; the ratio's 95 %
interval is a bootstrap over rounds. Target: ratio <= 1.05.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from benchmarks.environment import environment
from toolchain import artifact
from toolchain.artifact import Port
from toolchain.runtime import load

WARMUP, CALLS = 10, 50  # per block


def _weights(rng: np.random.Generator, **shapes: tuple[int, ...]) -> list[Any]:
    from onnx import numpy_helper

    return [
        numpy_helper.from_array(
            (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32), name
        )
        for name, shape in shapes.items()
    ]


def mlp(rng: np.random.Generator) -> tuple[Any, Port, Port]:
    """256 -> 256 -> 256 -> 10, float32 in."""
    from onnx import helper

    nodes, value = [], "x"
    for index in range(3):
        nodes.append(helper.make_node("Gemm", [value, f"w{index}", f"b{index}"], [f"h{index}"], transB=1))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [value := f"r{index}" if index < 2 else "y"]))
    weights = _weights(rng, w0=(256, 256), b0=(256,), w1=(256, 256), b1=(256,), w2=(10, 256), b2=(10,))
    return (nodes, weights), Port("x", "float32", ("batch", 256)), Port("y", "float32", ("batch", 10))


def cnn(rng: np.random.Generator) -> tuple[Any, Port, Port]:
    """Two convolutions, pooling and a classifier on a 28 x 28 image, uint8 in."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["float", "w0"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["g"], transB=1),
        helper.make_node("Softmax", ["g"], ["y"]),
    ]
    weights = _weights(rng, w0=(16, 1, 3, 3), w1=(48, 16, 3, 3), w2=(10, 48), b2=(10,))
    return (nodes, weights), Port("x", "uint8", ("batch", 1, 28, 28)), Port("y", "float32", ("batch", 10))


def write(folder: Path, model: Callable[[np.random.Generator], tuple[Any, Port, Port]]) -> dict[str, np.ndarray]:
    """Make the model's artifact at ``folder``; returns a feed of batch 1."""
    import onnx
    from onnx import helper

    rng = np.random.default_rng(0)
    (nodes, weights), source, result = model(rng)
    values = [
        helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype)), port.shape)
        for port in (source, result)
    ]
    graph = helper.make_graph(nodes, model.__name__, values[:1], values[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with artifact.create(folder, stage="onnx", config={}) as draft:
        draft.set_ports([source], [result])
        onnx.save(proto, draft.path / "model.onnx")
    shape = tuple(1 if isinstance(size, str) else size for size in source.shape)
    return {"x": rng.integers(0, 255, shape).astype(source.dtype)}


def measure(folder: Path, feeds: dict[str, np.ndarray], threads: int, rounds: int) -> dict[str, Any]:
    """p50 of both in microseconds, their ratio with its 95 % interval, and every round's medians."""
    with load(folder, threads=threads) as model:
        session = model._session  # type: ignore[attr-defined]
        names = [output.name for output in session.get_outputs()]
        if any(not np.array_equal(a, b) for a, b in zip(session.run(names, feeds), model(feeds).values(), strict=True)):
            raise RuntimeError("the two sides disagree on the same feed")
        sides: list[Callable[[], object]] = [lambda: session.run(names, feeds), lambda: model(feeds)]
        blocks = np.empty((rounds, 2, CALLS))
        for index in range(rounds):
            for side in (0, 1) if index % 2 else (1, 0):
                call = sides[side]
                for _ in range(WARMUP):
                    call()
                for turn in range(CALLS):
                    start = perf_counter_ns()
                    call()
                    blocks[index, side, turn] = perf_counter_ns() - start
    medians = np.median(blocks, axis=2) / 1000
    bare, ours = np.median(blocks, axis=(0, 2)) / 1000
    draws = np.random.default_rng(0).integers(0, rounds, (2000, rounds))
    ratios = np.median(medians[draws, 1], axis=1) / np.median(medians[draws, 0], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "threads": threads,
        "bare_p50_us": round(float(bare), 3),
        "ours_p50_us": round(float(ours), 3),
        "ratio": round(float(ours / bare), 4),
        "ratio_ci95": [round(float(low), 4), round(float(high), 4)],
        "round_medians_us": medians.round(3).tolist(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result, with every round, to this file")
    parser.add_argument("--rounds", type=int, default=200, help="blocks of 50 timed calls a side (default 200)")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"unit": "us", "batch": 1, "environment": environment(), "results": []}
    print(f"{'model':6} {'threads':>7} {'session.run':>12} {'edgestill':>10} {'ratio':>6}  95 % interval   (p50, us)")
    with tempfile.TemporaryDirectory() as temporary:
        for model in (mlp, cnn):
            folder = Path(temporary) / model.__name__
            feeds = write(folder, model)
            for threads in (1, 2):
                row = {"model": model.__name__} | measure(folder, feeds, threads, options.rounds)
                result["results"].append(row)
                low, high = row["ratio_ci95"]
                print(
                    f"{row['model']:6} {threads:7} {row['bare_p50_us']:12.2f} {row['ours_p50_us']:10.2f} "
                    f"{row['ratio']:6.3f}  {low:.3f} to {high:.3f}"
                )
    if options.json:
        artifact.write_json(options.json, result)
        print(f"wrote {options.json}", file=sys.stderr)
    for row in result["results"]:
        del row["round_medians_us"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
