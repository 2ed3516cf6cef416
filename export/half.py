"""float16 inside an ONNX graph: which nodes, which stay float32, and what rounding does to the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from toolchain.artifact import EdgestillError

COMPUTE = ("Conv", "ConvTranspose", "MatMul", "Gemm")
PRODUCTS = (*COMPUTE, "Attention")
# Kept float32 in a half graph: LayerNorm and its parts when it was exported in pieces, softmax, powers, long sums,
# which magnify or overflow; and what ONNX types by an attribute, where a Cast behind the node is simpler and exact.
# Erf and Tanh are bounded and flat, so they drift no further than their input: half.
_NORMS = [f"{kind}Normalization" for kind in ("Layer", "RMS", "Group", "Instance", "MeanVariance", "Lp")]
_CURVES = ("Softmax", "LogSoftmax", "Softplus", "Pow", "Sqrt", "Reciprocal", "Exp", "Log")
_SUMS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "CumSum")
_TYPED = ("Range", "ConstantOfShape", "CastLike", "EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform")
_OTHER = ("RandomUniformLike", "NonMaxSuppression", "RoiAlign", "GridSample", "QuantizeLinear", "DequantizeLinear")
ISLANDS = frozenset((*_NORMS, *_CURVES, *_SUMS, *_TYPED, *_OTHER))
FLOAT_INPUTS = {"Resize": (1, 2)}
_ARITHMETIC = ("Cast", "Identity", "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Clip", "Min", "Max", "Where")
_MOVES = (
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Split",
    "Concat",
    "Expand",
    "Tile",
    "Pad",
)
_DECODES = ("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Exp", "Sqrt", "CumSum", "ArgMax", "TopK", "ReduceMax")
_LIGHT = frozenset((*_ARITHMETIC, *_MOVES))
_STATISTICS = _LIGHT | frozenset(("ReduceL2", "ReduceMean", "Log", "Greater"))
_DECODE = _LIGHT | frozenset((*_DECODES, "GatherElements"))


class PrecisionError(EdgestillError):
    """The graph cannot be brought to this precision."""


def name_nodes(model: Any) -> Any:
    """Give every node a unique name, in place: islands and exclusions are by name."""
    given, taken = {node.name for node in model.graph.node}, set[str]()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            places = (f"{node.op_type}_{number}" for number in itertools.count(index))
            node.name = next(name for name in places if name not in given | taken)
        taken.add(node.name)
    return model


def opset_of(model: Any) -> int:
    """Version of ONNX's own operators in ``model``."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def float_compute(model: Any, precision: str) -> list[str]:
    """Names of the nodes of PRODUCTS that do not compute in ``precision``: not half, not from int8."""
    import onnx

    model = onnx.shape_inference.infer_shapes(model)
    values = (*model.graph.value_info, *model.graph.input)
    half = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    int8 = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS
        and not (node.input[0] in half if precision == "fp16" else int8.issuperset(node.input[:2]))
    ]


def _constants(model: Any) -> set[str]:
    names = {tensor.name for tensor in model.graph.initializer} | {""}
    return names | {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}


def measured(model: Any) -> set[str]:
    """Names of the convolutions and matrix products that read a float graph input, but for casts, scaling and joining.

    Scaling and turning may be by what the input itself says, as its mean, its size or its direction.

    Eight bits are all that a pixel has; of a position in metres they leave centimetres.
    """
    import onnx

    constants = _constants(model)
    near = {v.name for v in model.graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT} - constants
    found = set[str]()
    for node in model.graph.node:
        if node.op_type in COMPUTE and near.intersection(node.input[:2]):  # the third is a bias
            found.add(node.name)
        elif _prepares(node, near, constants):
            near |= set(node.output)
    return found


def _prepares(node: Any, near: set[str], constants: set[str]) -> bool:
    """Whether ``node`` only casts, scales, turns, moves or joins values ``near`` a graph's input."""
    read = set(node.input) - constants
    joins = node.op_type == "Concat" and bool(read & near)
    return node.op_type in _STATISTICS and bool(read) and (read <= near or joins)


def edges(model: Any) -> set[str]:
    """Names of the nodes at the graph's two ends that only cast, scale, turn, move, join or decode values."""
    nodes, constants, found = list(model.graph.node), _constants(model), set[str]()
    near = {value.name for value in model.graph.input} - constants
    for node in nodes:
        if _prepares(node, near, constants):
            found.add(node.name)
            near |= set(node.output)
    far = {value.name for value in model.graph.output}
    used: dict[str, list[str]] = {}
    for node in reversed(nodes):
        users = [user for name in node.output for user in used.get(name, [])]
        ends = bool(users or far & set(node.output))
        if node.op_type in _DECODE and ends and found.issuperset(users):
            found.add(node.name)
        for name in node.input:
            used.setdefault(name, []).append(node.name)
    return found


def to_half(model: Any, islands: Iterable[str] = ISLANDS) -> Any:
    """A copy of ``model`` that computes in float16 except in ``islands`` (operator types) and at its ``edges``.

    Graph inputs and outputs keep their types; a tensor is cast at most once to each type; constants beyond half's
    range become its largest value. Raises PrecisionError on control flow or a tensor of unknown type.
    """
    import onnx
    import onnx.inliner
    from onnx import TensorProto, helper, numpy_helper

    single, half = TensorProto.FLOAT, TensorProto.FLOAT16
    model = onnx.inliner.inline_local_functions(model) if model.functions else model
    model = name_nodes(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
    graph, islands = model.graph, frozenset(islands)
    keep = edges(model)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {name: tensor.data_type for name, tensor in constants.items()}
    outputs = {value.name for value in graph.output}
    nodes: list[Any] = []
    copies: dict[tuple[str, int], str] = {}
    made: dict[str, int] = {}

    def as_type(name: str, kind: int) -> str:
        if made.get(name, single) == kind:
            return name
        if (name, kind) not in copies:
            copy = copies[name, kind] = f"{name}/{'half' if kind == half else 'float'}"
            if name in constants:
                limit = np.finfo(np.float16).max
                value = np.clip(numpy_helper.to_array(constants[name]), -limit, limit).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(value, copy))
            else:
                nodes.append(helper.make_node("Cast", [name], [copy], f"{copy}/cast", to=kind))
        return copies[name, kind]

    for node in graph.node:
        if any(attribute.type in (attribute.GRAPH, attribute.GRAPHS) for attribute in node.attribute):
            raise PrecisionError(
                f"{node.name} ({node.op_type}): expected a graph without control flow to make fp16 of; "
                "export the model without loops and branches, or leave fp16 out of export.precisions"
            )
        if unknown := [name for name in node.output if name and not kinds.get(name)]:
            raise PrecisionError(
                f"{node.name} ({node.op_type}): the type of {unknown[0]!r} cannot be inferred; "
                "use standard operators, or leave fp16 out of export.precisions"
            )
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            tensor = constants[node.output[0]] = node.attribute[0].t
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            continue
        to_float = node.op_type == "Cast" and kinds[node.output[0]] == single
        is_half = node.op_type not in islands | {"Constant"} and node.name not in keep
        for index, name in enumerate(node.input):
            if kinds.get(name) == single and not to_float:
                wanted = half if is_half and index not in FLOAT_INPUTS.get(node.op_type, ()) else single
                node.input[index] = as_type(name, wanted)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if is_half and kinds.get(name) == single:
                if name in outputs:
                    node.output[index] = f"{name}/half"
                    nodes.append(helper.make_node("Cast", [node.output[index]], [name], f"{name}/cast", to=single))
                    copies[name, half] = node.output[index]
                else:
                    made[name] = half
                if to_float:
                    next(attribute for attribute in node.attribute if attribute.name == "to").i = half

    used = {name for node in nodes for name in node.input} | outputs
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    for field_name, values in (("node", nodes), ("initializer", initializers), ("value_info", [])):
        kept = [type(value).FromString(value.SerializeToString()) for value in values]
        graph.ClearField(field_name)
        getattr(graph, field_name).extend(kept)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def has_half(model: Any) -> bool:
    """Whether any constant of ``model`` is float16, as a graph from ``to_half`` has."""
    import onnx

    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def emulated_half(model: Any) -> Any:
    """A float32 graph that rounds every half tensor of ``model`` where a GPU would.

    ONNX Runtime's CPU kernels compute most half operators in float32 and pass the unrounded values on, so running a
    half graph there shows neither its drift nor its overflow; explicit casts to half and back are kept.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    single, half = TensorProto.FLOAT, TensorProto.FLOAT16
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    halves = {value.name for value in inferred.value_info if value.type.tensor_type.elem_type == half}
    result = type(model).FromString(model.SerializeToString())
    graph = result.graph
    for tensor in graph.initializer:
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in halves and node.op_type != "DequantizeLinear":
                node.output[index] = f"{name}/exact"
                nodes.append(helper.make_node("Cast", [node.output[index]], [f"{name}/rounded"], to=half))
                nodes.append(helper.make_node("Cast", [f"{name}/rounded"], [name], to=single))
        if node.op_type == "Cast":
            to = next(attribute for attribute in node.attribute if attribute.name == "to")
            to.i = single if to.i == half else to.i
    nodes = [type(node).FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.ClearField("value_info")
    graph.node.extend(nodes)
    return result
