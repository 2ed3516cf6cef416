"""Attention that was exported in pieces, as the one operator that ONNX has had for it since opset 23.

ONNX Runtime's CPU kernel of it reads queries, keys and values where they lie, without transposing them first. Its own
MultiHeadAttention is no faster than the pieces where there is a mask.
"""

from __future__ import annotations

from typing import Any

from export.half import opset_of

OPSET = 23


def _pieces(op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any, q_in: Any, k_in: Any, v_in: Any, out: Any) -> Any:
    queries = op.Transpose(op.Reshape(q, q_in, _outputs=["q_heads"]), perm=[0, 2, 1, 3])
    keys = op.Transpose(op.Reshape(k, k_in, _outputs=["k_heads"]), perm=[0, 2, 3, 1])
    values = op.Transpose(op.Reshape(v, v_in, _outputs=["v_heads"]), perm=[0, 2, 1, 3])
    scores = op.Add(op.Mul(op.MatMul(queries, keys), scale), mask)
    found = op.MatMul(op.Softmax(scores, axis=-1), values)
    return op.Reshape(op.Transpose(found, perm=[0, 2, 1, 3]), out, _outputs=["result"])


def _is_attention(context: Any, scale: Any, **values: Any) -> bool:
    """Whether all shapes are what the kernel takes: it broadcasts a mask over batch and heads, and nothing else."""
    if scale.const_value is None or scale.const_value.size != 1:
        return False
    sizes = {}
    for name in ("q", "k", "v", "q_heads", "k_heads", "v_heads", "mask", "result"):
        shape = values[name].shape
        sizes[name] = () if shape is None else tuple(size if isinstance(size, int) else size.value for size in shape)
    if None in sum(sizes.values(), ()) or [len(shape) for shape in sizes.values()] != [3, 3, 3, 4, 4, 4, 4, 3]:
        return False
    batch, queries, _ = sizes["q"]
    keys, heads = sizes["k"][1], sizes["q_heads"][2]
    return (
        isinstance(heads, int)
        and sizes["q_heads"][:3] == (batch, queries, heads)
        and sizes["k"][:2] == sizes["v"][:2] == (batch, keys)
        and sizes["k_heads"][:3] == sizes["v_heads"][:3] == (batch, keys, heads)
        and sizes["result"][:2] == (batch, queries)
        and sizes["mask"][0] in (1, batch)
        and sizes["mask"][1] in (1, heads)
        and sizes["mask"][2:] == (queries, keys)
    )


def _operator(op: Any, q: Any, k: Any, v: Any, q_heads: Any, scale: Any, mask: Any, **_: Any) -> Any:
    heads, factor = q_heads.shape[2], float(scale.const_value.numpy().reshape(()))
    return op.Attention(q, k, v, mask, scale=factor, q_num_heads=heads, kv_num_heads=heads)


def fused(model: Any) -> Any:
    """A copy of ``model`` in opset 23 in which softmax(q k^T scale + mask) v of several heads is one operator.

    Found is what transformers' eager attention is exported as: q, k and v (batch, sequence, heads * size), mask
    (batch or 1, heads or 1, sequence, sequence). ``model`` itself where there is none.
    """
    import onnx
    import onnx.inliner
    import onnx.version_converter
    from onnxscript import ir
    from onnxscript.ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.rewriter import pattern

    if opset_of(model) > OPSET:
        return model
    whole = onnx.inliner.inline_local_functions(model) if model.functions else model
    typed = onnx.shape_inference.infer_shapes(whole, data_prop=True)
    made = ir.from_proto(onnx.version_converter.convert_version(typed, OPSET))
    if not pattern.RewriteRule(_pieces, _operator, _is_attention).apply_to_model(made, commute=True):
        return model
    RemoveUnusedNodesPass()(made)
    return ir.to_proto(made)
