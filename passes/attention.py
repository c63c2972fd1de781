"""``multi_head_attention_forward``, one call of torch's ``nn.MultiheadAttention``, as its two linears with ``scaled_dot_product_attention`` between them.

Taken is self-attention with the packed ``in_proj_weight``, in eval mode, without masks and extra keys, whose attention weights nobody reads; the rest is left alone, with the reason.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qcompile.core.errors import Skip

from .sites import example

FORWARD = F.multi_head_attention_forward
ARGUMENTS = tuple(inspect.signature(FORWARD).parameters)


def expand(graph: fx.Graph, node: fx.Node) -> Skip | None:
    """Rewrite one call, or say why not."""
    given: dict[str, Any] = dict(zip(ARGUMENTS, node.args)) | node.kwargs
    if refusal := _refusal(node, given):
        return Skip(f"multi_head_attention_forward {refusal}")
    x, heads = given["query"], int(given["num_heads"])
    outputs = [user for user in node.users if user.args[1] == 0]
    with graph.inserting_before(node):
        y = _call(graph, F.linear, x, given["in_proj_weight"], given["in_proj_bias"])
        q, k, v = (_by_head(graph, y, i, heads) for i in range(3))
        attended = _call(graph, F.scaled_dot_product_attention, q, k, v)
        rows = _call(graph, "flatten", _call(graph, "permute", attended, 2, 0, 1, 3), 2)
        out = _call(graph, F.linear, rows, given["out_proj_weight"], given["out_proj_bias"])
    for user in list(node.users):
        if user in outputs:
            user.replace_all_uses_with(out)
        graph.erase_node(user)
    graph.erase_node(node)
    return None


def _refusal(node: fx.Node, given: dict[str, Any]) -> str:
    """Why a call is left alone; "" where it can be rewritten."""
    x = given["query"]
    if given["key"] is not x or given["value"] is not x:
        return "whose query, key and value differ reads parts of one matrix"
    if given.get("in_proj_weight") is None or given.get("use_separate_proj_weight"):
        return "with a weight each for query, key and value"
    if given.get("training", True) and given.get("dropout_p"):
        return "with dropout"
    if any(given.get(name) is not None for name in ("bias_k", "bias_v", "key_padding_mask", "attn_mask", "static_k", "static_v")) or given.get("add_zero_attn") or given.get("is_causal"):
        return "with masks or added keys"
    if example(x) is None or example(x).dim() != 3:
        return "without a batch axis"
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
        return "whose attention weights are read: call it with need_weights=False"
    return ""


def _by_head(graph: fx.Graph, y: fx.Node, i: int, heads: int) -> fx.Node:
    """The i-th third of (L, B, 3 E) as (B, heads, L, E / heads)."""
    width = int(example(y).shape[-1]) // 3
    part = _call(graph, "narrow", y, -1, i * width, width)
    return _call(graph, "permute", _call(graph, "unflatten", part, -1, (heads, width // heads)), 1, 2, 0, 3)


def _call(graph: fx.Graph, what: Any, *args: Any) -> fx.Node:
    """A node with its fake value."""
    node = graph.call_method(what, args) if isinstance(what, str) else graph.call_function(what, args)
    values = [example(a) if isinstance(a, fx.Node) else a for a in args]
    with torch.no_grad():
        node.meta["example_value"] = getattr(values[0], what)(*values[1:]) if isinstance(what, str) else what(*values)
    return node
