"""Two remedies, so that dynamic int8 loses less: a product's input is smoothed, or its largest channels stay float.

A few channels of what a matrix product reads may be tens of times larger than the rest; one range for all leaves the
rest few of its 255 steps. As x W = (x / s) (s W), a channel's size can be moved into the weights, whose ranges are
those of single outputs (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, equations 3 and 4):

    s_j = max |x_j|^a / max |w_j|^(1 - a)

Where that is not enough, the largest channels O can be multiplied in float beside the rest (LLM.int8(), Dettmers et
al. 2022, arXiv 2208.07339, equation 8):

    x W = (x / s) (s W) over the channels not in O, in int8, + x W over the channels in O, in float

Deliberate deviations: ``a`` is chosen for each input, by the error of the products that read it; what gains little is
left as it is; O is chosen once, on samples, and of one size, not in every call by a threshold. The division is a Mul of
its own: in an encoder that normalises after its residuals, these read the same tensor, so that the normalisation before
cannot take it over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.verify import cpu_call
from toolchain.tasks import Split

Floats = NDArray[np.float32]

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
GAIN = 0.75  # of the error without, at most: less is not worth a Mul
LEAST = 1e-5  # of the largest channel: dead ones get the scale of this
OUTLIERS = 8  # channels of a product's input that may stay float
FEW = 8  # and at most one of so many
NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Remedy:
    """What a product's input is divided by, ``scale`` (channels,), and the channels that stay float, ``apart`` (k,)."""

    scale: Floats
    apart: NDArray[np.int64]


@dataclass
class Remedies:
    """By the MatMul's name, where int8 gains: ``smooth``, one remedy for all that read the same input, with no channels
    apart, and ``apart``, of that product alone, with some."""

    smooth: dict[str, Remedy]
    apart: dict[str, Remedy]


def measured(model: Any, samples: Split) -> Remedies:
    """What would help the MatMuls of a float graph whose weight nothing else reads; not a Gemm.

    ``samples`` are fed one at a time, as a dynamic graph's ranges are those of one call.
    """
    from onnx import numpy_helper

    readers = _readers(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    made = Remedies({}, {})
    for name, found in _values(model, list(readers), samples).items():
        products = {node.name: _Product(found, numpy_helper.to_array(tensors[node.input[1]])) for node in readers[name]}
        nothing = Remedy(np.ones(found[0].shape[1], np.float32), NONE)
        before = {node: product.error(nothing) for node, product in products.items()}
        after, shared = _best(list(products.values()), NONE)
        if after < GAIN * np.sqrt(sum(before.values())):
            made.smooth |= dict.fromkeys(products, shared)
        largest = np.max([np.abs(one).max(0) for one in found], 0)
        outliers = np.sort(np.argsort(-largest)[: min(OUTLIERS, len(largest) // FEW)])
        for node, product in products.items() if len(outliers) else ():
            after, alone = _best([product], outliers)
            if after < GAIN * np.sqrt(before[node]):
                made.apart[node] = alone
    return made


def remedied(model: Any, remedies: Mapping[str, Remedy]) -> Any:
    """A copy of a float graph that computes the same, with what is given to its MatMuls.

    The product of a MatMul's channels apart is one of its own, see ``beside``, added after a constant, so that ONNX
    Runtime still takes that into the int8 product.
    """
    from onnx import helper, numpy_helper

    made = type(model).FromString(model.SerializeToString())
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    ends = _ends(made)
    divided: dict[tuple[str, Remedy], str] = {}
    joined: dict[str, list[Any]] = {}
    nodes: list[Any] = []

    def constant(name: str, value: NDArray[Any]) -> str:
        made.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    for node in made.graph.node:
        if remedy := remedies.get(node.name):
            source, matrix = node.input[0], numpy_helper.to_array(tensors[node.input[1]])
            inside = np.ones_like(remedy.scale)
            inside[remedy.apart] = 0
            if (source, remedy) not in divided:
                name = f"{node.name}/rest of x" if len(remedy.apart) else f"{source}/smooth"
                factors = constant(f"{name} scale", inside / remedy.scale)
                nodes.append(helper.make_node("Mul", [source, factors], [name], name))
                divided[source, remedy] = name
            inner = numpy_helper.from_array(matrix * (inside * remedy.scale)[:, None], node.input[1])
            tensors[node.input[1]].CopyFrom(inner)
            node.input[0] = divided[source, remedy]
            if len(remedy.apart):
                few, product, end = f"{node.name}/few", beside(node.name), ends[node.output[0]]
                channels, rows = (f"{few} channels", remedy.apart), (f"{few} weight", matrix[remedy.apart])
                nodes.append(helper.make_node("Gather", [source, constant(*channels)], [few], few, axis=-1))
                nodes.append(helper.make_node("MatMul", [few, constant(*rows)], [product], product))
                rest, whole = f"{node.name}/rest", f"{node.name}/whole"
                joined[end.name] = [helper.make_node("Add", [rest, product], [end.output[0]], whole)]
                end.output[0] = rest
        nodes += [node, *joined.pop(node.name, ())]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    made.graph.ClearField("node")
    made.graph.node.extend(copies)
    return made


def _ends(model: Any) -> dict[str, Any]:
    """By the output of a MatMul: it, or the Add of a constant that alone reads it."""
    constants = {tensor.name for tensor in model.graph.initializer}
    uses = Counter(_names_read(model.graph))
    found = {node.output[0]: node for node in model.graph.node if node.op_type == "MatMul"}
    for node in model.graph.node:
        if node.op_type == "Add" and constants.intersection(node.input):
            found |= {name: node for name in node.input if name in found and uses[name] == 1}
    return found


def beside(name: str) -> str:
    """The name of the MatMul of what ``name`` leaves float."""
    return f"{name}/apart"


def _readers(model: Any) -> dict[str, list[Any]]:
    """By their input: the MatMuls by a constant float matrix that nothing else reads."""
    import onnx

    single = onnx.TensorProto.FLOAT
    matrices = {t.name for t in model.graph.initializer if t.data_type == single and len(t.dims) == 2}
    uses = Counter(_names_read(model.graph))
    found: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices and uses[node.input[1]] == 1:
            found.setdefault(node.input[0], []).append(node)
    return found


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


class _Product:
    """x W on samples: ``found``, x of each (tokens, channels), and ``weight`` W (channels, outputs)."""

    def __init__(self, found: Sequence[Floats], weight: Floats) -> None:
        self.found, self.weight = found, weight
        self.exact = [one @ weight for one in found]

    def error(self, remedy: Remedy) -> float:
        """Mean squared error in int8, in units of the product's variance, summed over the samples."""
        scale, apart = remedy.scale, remedy.apart
        inside = np.ones_like(scale)
        inside[apart] = 0
        weight = _weight_in_int8(self.weight * (inside * scale)[:, None])
        total = 0.0
        for x, exact in zip(self.found, self.exact, strict=True):
            product = _in_int8(x * (inside / scale)) @ weight + x[:, apart] @ self.weight[apart]
            total += float(np.square(product - exact).mean() / (exact.var() + 1e-12))
        return total


def _best(products: Sequence[_Product], apart: NDArray[np.int64]) -> tuple[float, Remedy]:
    """Of remedies for products of one input, the scales of EXPONENTS or ones: the least root error, and whose it is."""
    x = np.max([np.abs(one).max(0) for one in products[0].found], 0)
    w = np.max([np.abs(product.weight).max(1) for product in products], 0)
    x[apart], w[apart] = 0, 0
    scales = [np.ones_like(x)]
    if x.any() and w.any():
        x, w = (np.maximum(size, LEAST * size.max()) for size in (x, w))
        scales += [(x**exponent / w ** (1 - exponent)).astype(np.float32) for exponent in EXPONENTS]
    remedies = [Remedy(scale, apart) for scale in scales]
    errors = [float(np.sqrt(sum(product.error(remedy) for product in products))) for remedy in remedies]
    return min(errors), remedies[int(np.argmin(errors))]


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
