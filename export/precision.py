"""fp32 ONNX graph -> fp16 graph with fp32 islands, or int8 graph with float islands; gated on real samples.

Precision lives in the graph, because TensorRT 11 and TensorRT-RTX build only what the graph's types say.
Graph inputs, outputs and their types never change. What touches them (casting and normalising the input, decoding
the output) stays float32 in every precision: it costs little, and a pixel or a position keeps all its digits.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.attention import fused
from export.half import (
    ISLANDS,
    PRODUCTS,
    PrecisionError,
    emulated_half,
    float_compute,
    has_half,
    name_nodes,
    opset_of,
    to_half,
)
from export.int8 import HALF_SCALES, Dynamic, Int8, Static
from export.smooth import beside, measured
from export.verify import Arrays, Report, compare, cpu_call, evenly, predict
from toolchain import artifact, runtime
from toolchain.stage import Job, console, main, progress
from toolchain.tasks import Split, as_fed, load_data, load_task

BATCH = 64
NAMED = 6  # nodes that are told by name
ISLAND_SAMPLES = 64
SMOOTHING_SAMPLES = 8


@dataclass
class Gate:
    """The fp32 graph's outputs on real samples, and the comparison of a candidate graph with them.

    A candidate with half tensors must pass twice: as it runs on the CPU, and rounded as a GPU would round it.
    """

    split: Split
    reference: Arrays
    task: Any
    limits: Mapping[str, float | None]

    def __call__(self, model: Any) -> Report:
        report = self._compare(model)
        if report.passed and has_half(model):
            return self._compare(emulated_half(model))
        return report

    def _compare(self, model: Any) -> Report:
        outputs = predict(cpu_call(model.SerializeToString()), self.split, BATCH)
        return compare(self.reference, outputs, self.split, self.task, self.limits)

    def part(self, count: int) -> Gate:
        index = evenly(len(self.split), count)
        reference = {name: value[index] for name, value in self.reference.items()}
        return Gate(self.split.select(index), reference, self.task, self.limits)

    def drift(self, model: Any) -> float:
        """Greatest difference of any float output when half is rounded; infinite where it overflows."""
        report = self._compare(emulated_half(model))
        values = [np.inf if value is None else value for value in report.max_difference.values()]
        return float(max(values, default=1.0 - report.agreement))

    def shift(self, model: Any) -> float:
        """Mean difference of the float outputs, of each in units of its standard deviation; else of predictions."""
        rounded = emulated_half(model) if has_half(model) else model
        outputs = predict(cpu_call(rounded.SerializeToString()), self.split, BATCH)
        floats = [(value, outputs[name]) for name, value in self.reference.items() if value.dtype.kind == "f"]
        if not floats:
            return 1.0 - float(self.task.agreement(self.reference, outputs))
        each = [float(np.abs(a - b).mean() / (a.std() + 1e-12)) for a, b in floats]
        return float(np.mean([value if np.isfinite(value) else np.inf for value in each]))


def half_with_islands(model: Any, gate: Gate) -> tuple[Any, Report, list[str]]:
    """The fp16 graph, its report, and the operator types that had to be kept float32 besides ``ISLANDS``.

    When the gate fails, every operator type's own drift is measured: the outputs' difference when it alone is half.
    Types that overflow become islands first, together, then the others, worst first, until the gate passes or
    nothing that computes is left in half.
    """
    candidate = to_half(model)
    report = gate(candidate)
    if report.passed:
        return candidate, report, []
    types = {node.op_type for node in name_nodes(model).graph.node} - ISLANDS - {"Constant", "Shape"}
    part = gate.part(ISLAND_SAMPLES)
    console.print(
        f"    fp16 fails its gate ({'; '.join(report.reasons)}); measuring the drift of {len(types)} operator types"
    )
    drift = {kind: part.drift(to_half(model, ISLANDS | types - {kind})) for kind in types}
    order = sorted((kind for kind in types if drift[kind] > 0), key=lambda kind: (-drift[kind], kind))
    found: list[str] = []
    every = set(_compute_names(model))
    for position, kind in enumerate(order):
        found.append(kind)
        if np.isinf(drift[kind]) and position + 1 < len(order) and np.isinf(drift[order[position + 1]]):
            continue
        attempt = to_half(model, ISLANDS | set(found))
        if every <= set(float_compute(attempt, "fp16")):
            break
        candidate, report = attempt, gate(attempt)
        if report.passed:
            break
    return candidate, report, found


def dynamic_with_islands(model: Any, gate: Gate, samples: Split) -> tuple[Any, Report, dict[str, list[str]]]:
    """The dynamic int8 graph, its report, and in lists what was done for the gate.

    When the gate fails, inputs are smoothed on ``samples``, which stays where it lowers the outputs' shift; then see
    ``int8_with_islands``. ``float_islands`` are nodes kept float; ``smoothed`` are products whose inputs are;
    ``partly_float`` are those of which a few channels are.
    """
    make = Dynamic(model)
    candidate = make()
    report = gate(candidate)
    if report.passed:
        return candidate, report, {"float_islands": [], "smoothed": [], "partly_float": []}
    console.print(f"    int8 fails its gate ({'; '.join(report.reasons)}); smoothing", markup=False)
    make.remedies = measured(make.source, samples.select(evenly(len(samples), SMOOTHING_SAMPLES)))
    smooth = make.remedies.smooth
    if smooth and not gate.shift(make()) < gate.shift(candidate):
        smooth.clear()
    made, report, islands, partly = int8_with_islands(make, gate)
    kept = {"float_islands": islands, "partly_float": partly}
    return made, report, kept | {"smoothed": [name for name in smooth if name not in {*islands, *partly}]}


def int8_with_islands(make: Int8, gate: Gate) -> tuple[Any, Report, list[str], list[str]]:
    """The int8 graph, its report, and the nodes kept float for the gate, wholly and partly, most harmful first.

    When the gate fails, the outputs' shift is measured with each convolution, matrix product or table alone in int8.
    In this order, those up to some place are kept float, or partly where they can be; the place is early in it, and
    passes the gate, on whose samples the choice is made. If all but the last that computes are not enough, none is
    kept, and the report says what failed.
    """
    candidate = make()
    report = gate(candidate)
    names = [] if report.passed else make.convertible(candidate)
    if len(names) < 2:
        return candidate, report, [], []
    computing = set(_compute_names(make.source))
    part = gate.part(ISLAND_SAMPLES)
    console.print(f"    int8 fails its gate ({'; '.join(report.reasons)}); measuring {len(names)} nodes", markup=False)
    shift: dict[str, float] = {}
    with progress("each node in int8", len(names)) as bar:
        for name in names:
            shift[name] = part.shift(make(set(names) - {name}))
            bar.advance()
    order = sorted(names, key=lambda name: (-shift[name], name))
    order = order[: max((place for place, name in enumerate(order) if name in computing), default=0)]
    if not order:
        return candidate, report, [], []
    if found := _fewest(make, order, gate):
        return found
    console.print(f"    keeping {len(order)} of them in float is not enough")
    return candidate, report, [], []


def _fewest(make: Int8, order: list[str], gate: Gate) -> tuple[Any, Report, list[str], list[str]] | None:
    """With as few of ``order`` kept, from its start, as pass the gate, partly if that is enough; None where all fail.

    Their number is doubled until it passes, and narrowed down by bisection.
    """

    def attempt(count: int, apart: bool) -> tuple[Any, Report, list[str], list[str]] | None:
        partly = [name for name in order[:count] if apart and name in make.separable]
        if apart and not partly:
            return None
        made = make(order[:count], apart)
        report = gate(made)
        return (made, report, [name for name in order[:count] if name not in partly], partly) if report.passed else None

    found, failed, count = None, 0, 1
    while not found and failed < count:
        if not (found := attempt(count, True) or attempt(count, False)):
            failed, count = count, min(2 * count, len(order))
    while found and failed + 1 < count:
        middle = (failed + count) // 2
        if fewer := attempt(middle, True) or attempt(middle, False):
            found, count = fewer, middle
        else:
            failed = middle
    return found


def _compute_names(model: Any) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in PRODUCTS]


def converted(
    compute: int,
    stayed: Sequence[str],
    calibration: Mapping[str, Any] | None,
    rest: str,
    kept: Sequence[str] = (),
    smooth: Sequence[str] = (),
    partly: Sequence[str] = (),
) -> str:
    """In words: how many of the ``compute`` nodes, which ``stayed`` in ``rest``, and on how many samples; and for the
    gate: of how many the inputs are ``smooth``, and which were ``partly`` and wholly ``kept`` in ``rest``."""
    text = f"{compute - len(stayed)} of {compute} compute nodes converted"
    if calibration and calibration["samples"]:
        text += f", calibrated on {calibration['samples']} training samples ({calibration['method']})"
    elif calibration:
        text += ", activations scaled in every call, without calibration"
    if smooth:
        text += f", the inputs of {len(smooth)} products smoothed for the gate"
    if stayed:
        text += f"; in {rest}: {_named(stayed)}"
    if partly:
        text += f"; a few channels in {rest} to pass the gate: {_named(partly)}"
    if kept:
        text += f"; kept in {rest} to pass the gate: {_named(kept)}"
    return text


def _named(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:NAMED]) + (f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else "")


def _rest(made: Any, precision: str) -> str:
    """What nodes that are not converted compute in: beside TensorRT's int8, fp16 where the opset has its scales."""
    return "fp16" if precision == "int8-trt" and opset_of(made) >= HALF_SCALES else "float32"


def run(job: Job) -> None:
    """Make the graph of ``job.config["precision"]`` from the fp32 one, gate it, and write the artifact."""
    import onnx

    logging.getLogger().setLevel(logging.ERROR)
    precision, settings = job.config["precision"], job.config["export"]
    source, parity = job.inputs["onnx"], settings["parity"]
    data, task = load_data(job.inputs["data"]), load_task(job.config["task"])
    manifest = artifact.verify(source)
    model = name_nodes(onnx.load(source / "model.onnx"))
    val, train = (as_fed(data.splits[name], source) for name in ("val", "train"))
    held_out = val.select(evenly(len(val), parity["samples"]))
    with runtime.load(source) as reference:
        gate = Gate(held_out, predict(reference, held_out, BATCH), task, parity["limits"][precision])

    extra = artifact.carried(manifest)
    if precision == "fp16":
        made, report, extra["fp32_islands"] = half_with_islands(model, gate)
    elif precision == "int8-cpu" and settings["dynamic_int8"]:
        model = name_nodes(fused(model))
        made, report, remedies = dynamic_with_islands(model, gate, train)
        extra |= remedies
        extra["calibration"] = {"samples": 0, "method": "dynamic"}
    elif precision in ("int8-cpu", "int8-trt"):
        calibration = settings["calibration"]
        samples = train.select(evenly(len(train), calibration["samples"]))
        make = Static(model, precision, samples, calibration["method"])
        made, report, extra["float_islands"], _ = int8_with_islands(make, gate)
        extra["calibration"] = {"samples": len(samples), "method": calibration["method"]}
    else:
        raise PrecisionError(f"precision {precision!r}: expected one of fp16, int8-cpu, int8-trt")

    compute = len(_compute_names(model))
    added = {beside(name) for name in extra.get("partly_float", ())}
    stayed = [name for name in float_compute(made, precision) if name not in added]
    if len(stayed) >= compute:
        raise PrecisionError(
            f"expected convolutions or matrix products in {precision}, found {len(stayed)} of {compute} without; "
            f"leave {precision} out of export.precisions"
        )
    report.check(precision)
    with artifact.create(job.out, stage=job.stage, config=job.config, inputs=job.inputs) as draft:
        onnx.save(made, draft.path / "model.onnx")
        for name in ("samples.npz", *extra.get("ships", ())):
            shutil.copyfile(source / name, draft.path / name)
        draft.ports = manifest.ports
        draft.extra = extra | {
            "precision": precision,
            "opset": opset_of(made),
            "float_nodes": stayed,
            "converted": converted(
                compute,
                stayed,
                extra.get("calibration"),
                _rest(made, precision),
                extra.get("float_islands", ()),
                extra.get("smoothed", ()),
                extra.get("partly_float", ()),
            ),
            "verify": report.as_dict(),
        }
        draft.metrics = {
            report.metric: report.metric_candidate,
            "agreement": report.agreement,
            "max_difference": report.max_difference,
        }
        draft.versions = artifact.versions("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")
    console.print(
        f"    {precision}: {draft.extra['converted']}; "
        f"{report.metric} {report.metric_candidate:.4g} (fp32 {report.metric_reference:.4g}), "
        f"agreement {report.agreement:.4f} on {report.samples} samples",
        markup=False,
    )


if __name__ == "__main__":
    main(run)
