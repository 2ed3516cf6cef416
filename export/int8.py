"""int8 inside an ONNX graph: Q/DQ calibrated on real samples, or scaled in every call; nodes can be kept float."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stdout
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.half import (
    COMPUTE,
    ISLANDS,
    PrecisionError,
    edges,
    float_compute,
    measured,
    name_nodes,
    opset_of,
    to_half,
)
from export.smooth import Remedies, beside, remedied
from toolchain.stage import console, progress
from toolchain.tasks import Split

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
DYNAMIC_OPS = {"MatMul": 1, "Gather": 0, "LSTM": 1}  # and which input is the weight


class Int8(Protocol):
    """Makes int8 graphs of one float graph."""

    source: Any

    @property
    def separable(self) -> Collection[str]:
        """Names of nodes of which a few channels of the input can stay float while the rest is in int8."""

    def __call__(self, kept: Collection[str] = (), apart: bool = False) -> Any:
        """The graph in which the nodes ``kept`` compute in float; with ``apart``, the separable ones only in part.

        Raises PrecisionError on a name not in ``source``.
        """

    def convertible(self, made: Any) -> list[str]:
        """Names in ``source`` of what computes in int8 in ``made``, the graph without ``kept``, and may be kept."""


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


class Static:
    """Q/DQ graphs: int8 weights per channel, activations calibrated on ``split`` by ``method``, once.

    What reads a float input of the graph is not quantised (see ``half.measured``).

    ``int8-cpu``: asymmetric uint8 activations, every operator that ONNX Runtime's CPU kernels gain from, and weights of
    seven bits: on x86 without VNNI those kernels add two products in int16, which eight bits overflow.
    ``int8-trt``: symmetric int8 activations, float bias, and Q/DQ on the inputs of Conv, MatMul and Gemm alone, which
    is what TensorRT fuses; its parser rejects int32 bias. The rest is half, as TensorRT's fastest int8 engines are
    (and sm_75 has no float32 matrix product), from opset 19 on, where Q/DQ may be half.
    """

    separable: Collection[str] = ()

    def __init__(self, model: Any, precision: str, split: Split, method: str = "minmax") -> None:
        from onnxruntime import __version__ as found
        from onnxruntime.quantization import quantize_static

        if "calibration_cache_path" not in signature(quantize_static).parameters:
            raise PrecisionError(
                f"int8 graphs are made with ONNX Runtime 1.27 or newer, found {found}: pip install --upgrade "
                "onnxruntime (or onnxruntime-gpu), or leave int8 out of export.precisions"
            )
        self.precision, self.split, self.method = precision, split, method
        self.source = _source(model)
        self.float_ = edges(self.source) | masks(self.source) | measured(self.source)
        self.ranges: str | None = None
        if precision == "int8-trt" and opset_of(self.source) < HALF_SCALES:
            console.print("    note: below opset 19 the rest of int8-trt stays float32; set export.opset=20")

    def convertible(self, made: Any) -> list[str]:
        stays = set(float_compute(made, self.precision))
        return [n.name for n in self.source.graph.node if n.op_type in COMPUTE and n.name not in stays]

    def __call__(self, kept: Collection[str] = (), apart: bool = False) -> Any:
        _known(self.source, kept)
        result = self._quantised(self.float_ | _with_feeding(self.source, kept))
        if self.precision == "int8-cpu" or opset_of(result) < HALF_SCALES:
            return result
        return to_half(result, ISLANDS - {"QuantizeLinear", "DequantizeLinear"})

    def _quantised(self, float_: Collection[str]) -> Any:
        import onnx
        from onnxruntime import quantization as ort

        cpu = self.precision == "int8-cpu"
        options: dict[str, Any] = {"WeightSymmetric": True}
        if cpu:
            # A logit is not quantised again on its way out.
            options |= {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
        else:
            options |= {"ActivationSymmetric": True, "QuantizeBias": False}
            options |= {"OpTypesToExcludeOutputQuantization": list(TRT_OPS), "MinimumRealRange": 254 * LEAST_SCALE}
        methods = {name.lower(): value for name, value in ort.CalibrationMethod.__members__.items()}
        with tempfile.TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
            made, cache = Path(scratch, "int8.onnx"), Path(scratch, "ranges.json")

            def quantise(reader: Reader | None) -> None:
                ort.quantize_static(
                    _copy(self.source),  # it moves the weights out of what it is given
                    made,
                    reader,
                    quant_format=ort.QuantFormat.QDQ,
                    op_types_to_quantize=list(CPU_OPS if cpu else TRT_OPS),
                    per_channel=True,
                    reduce_range=cpu,
                    activation_type=ort.QuantType.QUInt8 if cpu else ort.QuantType.QInt8,
                    weight_type=ort.QuantType.QInt8,
                    nodes_to_exclude=sorted(float_),
                    calibrate_method=methods[self.method],
                    extra_options=options,
                    calibration_cache_path=cache,
                )

            if self.ranges is None:
                # Histograms need equal shapes, so they take one sample at a time.
                batch = 16 if self.method == "minmax" else 1
                with progress("calibrating", len(self.split)) as bar:
                    quantise(Reader(self.split, batch, bar.advance))
                self.ranges = cache.read_text(encoding="utf-8")
            else:
                cache.write_text(self.ranges, encoding="utf-8")
                quantise(None)
            return _without_unused_opsets(onnx.load(made))


class Dynamic:
    """int8 weights per channel; activations quantised at run time from their own range (ONNX Runtime CPU only).

    Weights have seven bits, see ``Static``. ``remedies`` are of ``source``, see ``smooth.measured``; at first none.
    """

    def __init__(self, model: Any) -> None:
        self.source, self.remedies = _source(model), Remedies({}, {})

    def convertible(self, made: Any) -> list[str]:
        import onnx

        single = onnx.TensorProto.FLOAT
        weights = {tensor.name for tensor in self.source.graph.initializer if tensor.data_type == single}
        place = {"Gemm": 1} | DYNAMIC_OPS
        return [n.name for n in self.source.graph.node if n.op_type in place and n.input[place[n.op_type]] in weights]

    @property
    def separable(self) -> Collection[str]:
        return self.remedies.apart

    def __call__(self, kept: Collection[str] = (), apart: bool = False) -> Any:
        import onnx
        from onnxruntime import quantization as ort

        _known(self.source, kept)
        partly = {name: self.remedies.apart[name] for name in kept if apart and name in self.separable}
        smooth = {name: remedy for name, remedy in self.remedies.smooth.items() if name not in kept}
        float_ = sorted({*kept} - {*partly} | {beside(name) for name in partly})
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch, "int8.onnx")
            ort.quantize_dynamic(
                remedied(self.source, smooth | partly),
                made,
                list(DYNAMIC_OPS),
                per_channel=True,
                weight_type=ort.QuantType.QInt8,
                reduce_range=True,
                # A Gemm is renamed before the names are looked at.
                nodes_to_exclude=[name for one in float_ for name in (one, f"{one}_MatMul")],
            )
            return _without_unused_opsets(onnx.load(made))


def _known(model: Any, names: Collection[str]) -> None:
    if unknown := set(names) - {node.name for node in model.graph.node}:
        raise PrecisionError(f"expected nodes of the graph to keep float, found {', '.join(sorted(unknown))}")


def _source(model: Any) -> Any:
    """A folded copy with named nodes, in which no Gemm shares its weight: ONNX Runtime transposes the weight of a Gemm
    in place, or scales it per channel along the axis that its transB asks for."""
    source = name_nodes(_folded(model))
    weights = {tensor.name: tensor for tensor in source.graph.initializer}
    users = Counter(name for node in source.graph.node for name in node.input)
    for node in source.graph.node:
        if node.op_type == "Gemm" and node.input[1] in weights and users[node.input[1]] > 1:
            own = source.graph.initializer.add()
            own.CopyFrom(weights[node.input[1]])
            own.name = node.input[1] = f"{node.name}/{own.name}"
    return source


def _with_feeding(model: Any, names: Collection[str]) -> set[str]:
    """``names`` and the nodes on the way to them, whose outputs would be quantised for them too: up to the convolution
    or matrix product before, or to where two values are joined."""
    makers = {name: node for node in model.graph.node if node.op_type != "Constant" for name in node.output}
    found, left = set(names), [node for node in model.graph.node if node.name in names]
    while left:
        feeding = [makers[name] for name in left.pop().input if name in makers]
        new = {one.name: one for one in feeding if one.op_type not in COMPUTE and one.name not in found}
        found.update(new)
        left += [one for one in new.values() if sum(name in makers for name in one.input) == 1]
    return found


def _copy(model: Any) -> Any:
    return type(model).FromString(model.SerializeToString())


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
