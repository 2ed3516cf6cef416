"""Smoothing, so that dynamic int8 loses less (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, equations 3 and 4).

A few channels of what a matrix product reads may be tens of times larger than the rest; one range for all leaves the
rest few of its 255 steps. As x W = (x / s) (s W), a channel's size can be moved into the weights, whose ranges are
those of single outputs:

    s_j = max |x_j|^a / max |w_j|^(1 - a)

Deliberate deviations: ``a`` is chosen for each input, by the error of the products that read it, and what gains little
is left as it is. The division is a Mul of its own: in an encoder that normalises after its residuals, these read the
same tensor, so that the normalisation before cannot take it over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.tasks import Split

Floats = NDArray[np.float32]

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
GAIN = 0.75  # of the error without, at most: less is not worth a Mul
LEAST = 1e-5  # of the largest channel: dead ones get the scale of this


def smoothed(model: Any, samples: Split) -> tuple[Any, list[str]]:
    """A copy of a float graph that computes the same, and the matrix products whose inputs it smooths.

    ``samples`` are fed one at a time, as a dynamic graph's ranges are those of one call.
    """
    import onnx
    from onnx import helper, numpy_helper

    made = type(model).FromString(model.SerializeToString())
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in made.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    }
    readers: dict[str, list[Any]] = {}
    for node in made.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            readers.setdefault(node.input[0], []).append(node)
    names: list[str] = []
    for name, found in _values(model, list(readers), samples):
        nodes = readers[name]
        scale = _scale(found, [weights[node.input[1]] for node in nodes])
        if scale is None:
            continue
        divided, inverse = f"{name}/smooth", f"{name}/smooth scale"
        made.graph.initializer.append(numpy_helper.from_array(1 / scale, inverse))
        place = min(list(made.graph.node).index(node) for node in nodes)
        made.graph.node.insert(place, helper.make_node("Mul", [name, inverse], [divided], divided))
        for node in nodes:
            own = f"{node.name}/smooth weight"
            made.graph.initializer.append(numpy_helper.from_array(weights[node.input[1]] * scale[:, None], own))
            node.input[0], node.input[1] = divided, own
            names.append(node.name)
    used = {name for node in made.graph.node for name in node.input}
    kept = [tensor for tensor in made.graph.initializer if tensor.name in used]
    made.graph.ClearField("initializer")
    made.graph.initializer.extend(kept)
    return made, names


def _values(model: Any, names: Sequence[str], samples: Split) -> Iterator[tuple[str, list[Floats]]]:
    """Each tensor's values, (tokens, channels) of every sample."""
    import onnxruntime
    from onnx import helper

    shown = type(model).FromString(model.SerializeToString())
    ports = {port.name for port in (*shown.graph.output, *shown.graph.input)}
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in ports)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = [name for name in names if name not in {port.name for port in shown.graph.input}]
    found: dict[str, list[Floats]] = {name: [] for name in names}
    for row in range(len(samples)):
        feeds: Mapping[str, Any] = samples.feed(slice(row, row + 1))
        values = dict(zip(made, session.run(made, dict(feeds)), strict=True)) if made else {}
        for name in names:
            value = values[name] if name in values else feeds[name]
            found[name].append(value.reshape(-1, value.shape[-1]))
    yield from found.items()


def _scale(found: Sequence[Floats], weights: Sequence[Floats]) -> Floats | None:
    """s (channels,), or None where none gains."""
    x = np.max([np.abs(one).max(0) for one in found], 0)
    w = np.max([np.abs(one).max(1) for one in weights], 0)
    if not x.any() or not w.any():
        return None
    x, w = (np.maximum(size, LEAST * size.max()) for size in (x, w))
    scales = [(x**exponent / w ** (1 - exponent)).astype(np.float32) for exponent in EXPONENTS]
    best = min(scales, key=lambda scale: _error(found, weights, scale))
    return best if _error(found, weights, best) <= GAIN * _error(found, weights, np.ones_like(best)) else None


def _error(found: Sequence[Floats], weights: Sequence[Floats], scale: Floats) -> float:
    """Root of the mean squared error of the products in int8, in units of their standard deviations."""
    total = 0.0
    for weight in weights:
        rounded = _weight_in_int8(weight * scale[:, None])
        for x in found:
            exact = x @ weight
            total += float(np.square(_in_int8(x / scale) @ rounded - exact).mean() / (exact.var() + 1e-12))
    return float(np.sqrt(total))


def _in_int8(x: Floats) -> Floats:
    """As DynamicQuantizeLinear rounds: uint8, one range, which holds 0."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.round(-low / step)
    rounded: Floats = ((np.clip(np.round(x / step) + zero, 0, 255) - zero) * step).astype(np.float32)
    return rounded


def _weight_in_int8(weight: Floats) -> Floats:
    """Seven bits per output, see ``int8.Dynamic``."""
    step = np.abs(weight).max(0, keepdims=True) / 63
    step[step == 0] = 1
    rounded: Floats = np.round(weight / step) * step
    return rounded
