"""fp32 ONNX graph -> fp16 graph with fp32 islands, or int8 Q/DQ graph; gated on real samples.

Precision lives in the graph, because TensorRT 11 and TensorRT-RTX build only what the graph's types say.
Graph inputs, outputs and their types never change. What touches them (casting and normalising the input, decoding
the output) stays float32 in every precision: it costs little, and a pixel or a position keeps all its digits.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from export.half import COMPUTE, ISLANDS, PrecisionError, edges, emulated_half, has_half, measured, name_nodes, to_half
from export.verify import Arrays, Report, compare, evenly, predict
from toolchain import artifact, runtime
from toolchain.onnx_runtime import CRASHES
from toolchain.stage import Job, console, main, progress
from toolchain.tasks import Split, as_fed, load_data, load_task

BATCH = 64
NAMED = 6  # nodes that are told by name
HALF_SCALES = 19  # the first opset whose QuantizeLinear takes half scales
# Of int8-trt, whose scales are half: below this, half's spacing would be coarser than int8's own rounding.
LEAST_SCALE = 1e-5
# What ONNX Runtime's CPU kernels gain from; softmax, sigmoid and normalisations would lose more than they gain.
CPU_OPS = (
    *COMPUTE,
    *("Add", "Mul", "Relu", "Clip", "LeakyRelu", "Concat", "Resize", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Pad"),
)
TRT_OPS = ("Conv", "MatMul", "Gemm")


def float_compute(model: Any, precision: str) -> list[str]:
    """Names of the convolutions and matrix products that do not compute in ``precision``: not half, not from int8."""
    import onnx

    model = onnx.shape_inference.infer_shapes(model)
    values = (*model.graph.value_info, *model.graph.input)
    half = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    int8 = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in COMPUTE
        and not (node.input[0] in half if precision == "fp16" else int8.issuperset(node.input[:2]))
    ]


def masks(model: Any) -> set[str]:
    """Names of the nodes other than matrix products that feed a softmax: a mask's -inf would use up int8's range."""
    into = {node.input[0] for node in model.graph.node if node.op_type in ("Softmax", "LogSoftmax")}
    return {n.name for n in model.graph.node if n.op_type not in COMPUTE and into.intersection(n.output)}


class Reader:
    """Feeds real samples to ONNX Runtime's calibration, ``batch`` at a time."""

    def __init__(self, split: Split, batch: int, tell: Callable[[int], None]) -> None:
        self._feeds = self._batches(split, batch, tell)

    @staticmethod
    def _batches(split: Split, batch: int, tell: Callable[[int], None]) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(split), batch):
            stop = min(start + batch, len(split))
            yield split.feed(slice(start, stop))
            tell(stop - start)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def to_int8(model: Any, precision: str, split: Split, method: str = "minmax") -> Any:
    """A Q/DQ graph: int8 weights per channel, activations calibrated on ``split`` by ``method``.

    What reads a float input of the graph is not quantised (see ``half.measured``).

    ``int8-cpu``: asymmetric uint8 activations, every operator that ONNX Runtime's CPU kernels gain from, and weights of
    seven bits: on x86 without VNNI those kernels add two products in int16, which eight bits overflow.
    ``int8-trt``: symmetric int8 activations, float bias, and Q/DQ on the inputs of Conv, MatMul and Gemm alone, which
    is what TensorRT fuses; its parser rejects int32 bias. The rest is half, as TensorRT's fastest int8 engines are
    (and sm_75 has no float32 matrix product), from opset 19 on, where Q/DQ may be half.
    """
    import onnx
    from onnxruntime import quantization as ort

    activation = ort.QuantType.QUInt8 if precision == "int8-cpu" else ort.QuantType.QInt8
    options: dict[str, Any] = {"WeightSymmetric": True}
    if precision == "int8-cpu":
        # A logit is not quantised again on its way out.
        options |= {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
    else:
        options |= {"ActivationSymmetric": True, "QuantizeBias": False}
        options |= {"OpTypesToExcludeOutputQuantization": list(TRT_OPS), "MinimumRealRange": 254 * LEAST_SCALE}
    methods = {name.lower(): value for name, value in ort.CalibrationMethod.__members__.items()}
    source = name_nodes(_folded(model))
    chatter = redirect_stdout(StringIO())
    with tempfile.TemporaryDirectory() as scratch, progress("calibrating", len(split)) as bar, chatter:
        made = Path(scratch, "int8.onnx")
        # Histograms need equal shapes, so they take one sample at a time.
        batch = 16 if method == "minmax" else 1
        ort.quantize_static(
            source,
            made,
            Reader(split, batch, bar.advance),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=list(CPU_OPS if precision == "int8-cpu" else TRT_OPS),
            per_channel=True,
            reduce_range=precision == "int8-cpu",
            activation_type=activation,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=sorted(edges(source) | masks(source) | measured(source)),
            calibrate_method=methods[method],
            extra_options=options,
        )
        result = _without_unused_opsets(onnx.load(made))
    if precision == "int8-cpu":
        return result
    if opset_of(result) < HALF_SCALES:
        console.print("    note: below opset 19 the unquantised part of int8-trt stays float32; set export.opset=20")
        return result
    return to_half(result, ISLANDS - {"QuantizeLinear", "DequantizeLinear"})


def opset_of(model: Any) -> int:
    """Version of ONNX's own operators in ``model``."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _without_unused_opsets(model: Any) -> Any:
    used = {node.domain for node in model.graph.node} | {""}
    pairs = [(entry.domain, entry.version) for entry in model.opset_import if entry.domain in used]
    model.ClearField("opset_import")
    for domain, version in pairs:
        model.opset_import.add(domain=domain, version=version)
    return model


def _folded(model: Any) -> Any:
    """A copy with constants and batch normalisation folded, as quantising wants it."""
    import onnx
    from onnxruntime.quantization import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch:
        source, folded = Path(scratch, "source.onnx"), Path(scratch, "folded.onnx")
        onnx.save(model, source)
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        model = onnx.load(folded)
        model.graph.ClearField("value_info")
        return model


def to_dynamic_int8(model: Any) -> Any:
    """int8 weights per channel; activations quantised at run time from their own range (ONNX Runtime CPU only).

    Weights have seven bits, see ``to_int8``.
    """
    import onnx
    from onnxruntime import quantization as ort

    source = name_nodes(_folded(model))
    # ONNX Runtime turns each Gemm into a MatMul by transposing its weight in place, so none may be shared.
    weights = {tensor.name: tensor for tensor in source.graph.initializer}
    for node in source.graph.node:
        if node.op_type == "Gemm" and node.input[1] in weights:
            own = source.graph.initializer.add()
            own.CopyFrom(weights[node.input[1]])
            own.name = node.input[1] = f"{node.name}/{own.name}"
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "int8.onnx")
        kinds = ["MatMul", "Gather", "LSTM"]
        ort.quantize_dynamic(source, made, kinds, per_channel=True, weight_type=ort.QuantType.QInt8, reduce_range=True)
        return _without_unused_opsets(onnx.load(made))


def cpu_call(model: bytes | str) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """A graph, or the path of one, on ONNX Runtime's CPU provider: feeds to outputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=[CRASHES]
    )
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


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
    part = gate.part(64)
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


def _compute_names(model: Any) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in COMPUTE]


def converted(compute: int, stayed: Sequence[str], calibration: Mapping[str, Any] | None, rest: str) -> str:
    """In words: how many of the ``compute`` nodes, which ``stayed`` in ``rest``, and on how many samples."""
    text = f"{compute - len(stayed)} of {compute} compute nodes converted"
    if calibration and calibration["samples"]:
        text += f", calibrated on {calibration['samples']} training samples ({calibration['method']})"
    elif calibration:
        text += ", activations scaled in every call, without calibration"
    if stayed:
        more = f" and {len(stayed) - NAMED} more" if len(stayed) > NAMED else ""
        text += f"; in {rest}: {', '.join(stayed[:NAMED])}{more}"
    return text


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
        made, extra["calibration"] = to_dynamic_int8(model), {"samples": 0, "method": "dynamic"}
        report = gate(made)
    elif precision in ("int8-cpu", "int8-trt"):
        calibration = settings["calibration"]
        samples = train.select(evenly(len(train), calibration["samples"]))
        made = to_int8(model, precision, samples, calibration["method"])
        extra["calibration"] = {"samples": len(samples), "method": calibration["method"]}
        report = gate(made)
    else:
        raise PrecisionError(f"precision {precision!r}: expected one of fp16, int8-cpu, int8-trt")

    compute, stayed = len(_compute_names(model)), float_compute(made, precision)
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
            "converted": converted(compute, stayed, extra.get("calibration"), _rest(made, precision)),
            "verify": report.as_dict(),
        }
        draft.metrics = {
            report.metric: report.metric_candidate,
            "agreement": report.agreement,
            "max_difference": report.max_difference,
        }
        draft.versions = artifact.versions("onnx", "onnxruntime", "onnxruntime-gpu", "numpy")
    console.print(
        f"    {precision}: {draft.extra['converted']}; "
        f"{report.metric} {report.metric_candidate:.4g} (fp32 {report.metric_reference:.4g}), "
        f"agreement {report.agreement:.4f} on {report.samples} samples",
        markup=False,
    )


if __name__ == "__main__":
    main(run)
