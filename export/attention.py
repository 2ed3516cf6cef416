"""Attention that was exported in pieces, as the one operator that ONNX has had for it since opset 23.

ONNX Runtime's CPU kernel of it reads queries, keys and values where they lie, without transposing them first. Its own
MultiHeadAttention is no faster than the pieces where there is a mask.
"""

from __future__ import annotations

from typing import Any

from onnxscript import ir
from onnxscript.rewriter import pattern, rewrite

from export.half import opset_of

OPSET = 23


def _pieces(op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any, q_in: Any, k_in: Any, v_in: Any, out: Any) -> Any:
    """softmax(q k^T scale + mask) v of several heads; q, k, v and the result (batch, sequence, heads * size)."""
    queries = op.Transpose(op.Reshape(q, q_in, _outputs=["q_heads"]), perm=[0, 2, 1, 3])
    keys = op.Transpose(op.Reshape(k, k_in, _outputs=["k_heads"]), perm=[0, 2, 3, 1])
    values = op.Transpose(op.Reshape(v, v_in, _outputs=["v_heads"]), perm=[0, 2, 1, 3])
    scores = op.Add(op.Mul(op.MatMul(queries, keys), scale), mask)
    found = op.MatMul(op.Softmax(scores, axis=-1), values)
    return op.Reshape(op.Transpose(found, perm=[0, 2, 1, 3]), out, _outputs=["result"])


def _is_attention(context: Any, scale: Any, mask: Any, result: Any, **values: Any) -> Any:
    checked = pattern.MatchResult()
    if scale.const_value is None or scale.const_value.size != 1:
        return checked.fail("the scale is not one constant")
    wanted = {"q": 3, "k": 3, "v": 3, "q_heads": 4, "k_heads": 4, "v_heads": 4}
    found = [(values[name].shape, rank) for name, rank in wanted.items()] + [(mask.shape, 4), (result.shape, 3)]
    if any(shape is None or len(shape) != rank for shape, rank in found):
        return checked.fail("expected (batch, sequence, heads * size), taken apart into heads and joined again")
    heads = {values[name].shape[2] for name in ("q_heads", "k_heads", "v_heads")}
    if len(heads) != 1 or not isinstance(heads.pop(), int):
        return checked.fail("expected one constant number of heads")
    return checked


def _operator(op: Any, q: Any, k: Any, v: Any, q_heads: Any, scale: Any, mask: Any, **_: Any) -> Any:
    heads = q_heads.shape[2]
    factor = float(scale.const_value.numpy().reshape(()))
    return op.Attention(q, k, v, mask, scale=factor, q_num_heads=heads, kv_num_heads=heads)


def fused(model: Any) -> Any:
    """A copy of ``model`` in opset 23 with attention in one operator; ``model`` itself where it has none."""
    import onnx

    if opset_of(model) > OPSET:
        return model
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True)
    made = ir.from_proto(onnx.version_converter.convert_version(typed, OPSET))
    changed = rewrite(made, pattern_rewrite_rules=[pattern.RewriteRule(_pieces, _operator, _is_attention)])
    if not any(node.op_type == "Attention" for node in changed.graph):
        return model
    return ir.to_proto(changed)
