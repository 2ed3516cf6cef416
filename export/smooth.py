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

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.verify import cpu_call
from toolchain.tasks import Split

Floats = NDArray[np.float32]

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
GAIN = 0.75  # of the error without, at most: less is not worth a Mul
LEAST = 1e-5  # of the largest channel: dead ones get the scale of this


def smoothed(model: Any, samples: Split) -> tuple[Any, list[str]]:
    """A copy of a float graph that computes the same, and the MatMuls whose inputs it smooths.

    ``samples`` are fed one at a time, as a dynamic graph's ranges are those of one call. A weight that anything else
    reads is left as it is; so is a Gemm's.
    """
    from onnx import helper, numpy_helper

    made = type(model).FromString(model.SerializeToString())
    readers = _readers(made)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    weights = {node.input[1]: numpy_helper.to_array(tensors[node.input[1]]) for n in readers.values() for node in n}
    names: list[str] = []
    for name, found in _values(model, list(readers), samples).items():
        nodes = readers[name]
        own = list(dict.fromkeys(node.input[1] for node in nodes))
        scale = _scale(found, [weights[weight] for weight in own])
        if scale is None:
            continue
        divided, inverse = f"{name}/smooth", f"{name}/smooth scale"
        made.graph.initializer.append(numpy_helper.from_array(1 / scale, inverse))
        place = min(list(made.graph.node).index(node) for node in nodes)
        made.graph.node.insert(place, helper.make_node("Mul", [name, inverse], [divided], divided))
        for weight in own:
            tensors[weight].CopyFrom(numpy_helper.from_array(weights[weight] * scale[:, None], weight))
        for node in nodes:
            node.input[0] = divided
            names.append(node.name)
    return made, names


def _readers(model: Any) -> dict[str, list[Any]]:
    """By their input: the MatMuls by a constant float matrix that nothing but they read."""
    import onnx

    single = onnx.TensorProto.FLOAT
    matrices = {t.name for t in model.graph.initializer if t.data_type == single and len(t.dims) == 2}
    found: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            found.setdefault(node.input[0], []).append(node)
    uses = Counter(_names_read(model.graph))
    mine = Counter((node.input[0], node.input[1]) for nodes in found.values() for node in nodes)
    return {
        name: kept
        for name, nodes in found.items()
        if (kept := [node for node in nodes if uses[node.input[1]] == mine[name, node.input[1]]])
    }


def _names_read(graph: Any) -> Iterator[str]:
    """What nodes read, inside branches and loops too, and what the graph gives."""
    yield from (port.name for port in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _names_read(inner)


def _values(model: Any, names: Sequence[str], samples: Split) -> dict[str, list[Floats]]:
    """Each tensor's values, (tokens, channels) of every sample."""
    from onnx import helper

    shown = type(model).FromString(model.SerializeToString())
    ports = {port.name for port in (*shown.graph.input, *shown.graph.output)}
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in ports)
    call = cpu_call(shown.SerializeToString())
    found: dict[str, list[Floats]] = {name: [] for name in names}
    for row in range(len(samples)):
        feeds = samples.feed(slice(row, row + 1))
        values = feeds | call(feeds)
        for name in names:
            found[name].append(values[name].reshape(-1, values[name].shape[-1]))
    return found


def _scale(found: Sequence[Floats], weights: Sequence[Floats]) -> Floats | None:
    """s (channels,), or None where none gains."""
    x = np.max([np.abs(one).max(0) for one in found], 0)
    w = np.max([np.abs(one).max(1) for one in weights], 0)
    if not x.any() or not w.any():
        return None
    x, w = (np.maximum(size, LEAST * size.max()) for size in (x, w))
    exact = [[one @ weight for one in found] for weight in weights]
    scales = [(x**exponent / w ** (1 - exponent)).astype(np.float32) for exponent in EXPONENTS]
    before, *errors = (_error(found, weights, exact, scale) for scale in (np.ones_like(scales[0]), *scales))
    best = int(np.argmin(errors))
    return scales[best] if errors[best] <= GAIN * before else None


def _error(
    found: Sequence[Floats], weights: Sequence[Floats], exact: Sequence[Sequence[Floats]], scale: Floats
) -> float:
    """Root of the mean squared error of the products in int8, in units of their standard deviations."""
    rounded = [_weight_in_int8(weight * scale[:, None]) for weight in weights]
    total = 0.0
    for number, x in enumerate(found):
        x8 = _in_int8(x / scale)
        for weight, products in zip(rounded, exact, strict=True):
            product = products[number]
            total += float(np.square(x8 @ weight - product).mean() / (product.var() + 1e-12))
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
