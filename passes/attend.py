"""Attention with few queries, as in decoding, reads keys and values once for all heads that share them.

Models with grouped-query attention repeat keys and values for torch's ``scaled_dot_product_attention``: all of a static cache is read and written again in every layer and step, four times as large. Here the
repetition, however it is spelled, is left out and the call becomes ``qcompile::attention`` (``kernels/attention.py``).

Prompts, where products dominate, stay with torch's own kernels. But where their mask is the causal one, which a graph of fixed sizes shows, these are told so instead of being given it: they skip the half
that it hides, and on a GPU they need no repetition.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.kernels.attention import MOST
from qcompile.kernels.op import target

from .constant import constant, is_causal
from .infra import erase_unread, graph_pass, written_by
from .sites import example

SDPA = F.scaled_dot_product_attention
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
WHOLE = slice(None)


@graph_pass(after=("match",))
def attend(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Rewrite every call that has few queries; ``gm.meta["attention"]``: name of a node -> Skip for those that stay."""
    refused: dict[str, Skip] = {}
    done = causal = 0
    masks: dict[fx.Node, bool] = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=SDPA)):
        if _prompt(gm.graph, node, masks):
            causal += 1
        elif (reason := _rewrite(gm.graph, node)) is None:
            done += 1
        else:
            refused[node.name] = reason
    gm.meta["attention"] = refused
    gm.meta["note"] = f"{done} calls of attention with few queries" + (f", {causal} with a causal mask" if causal else "")
    return gm


def _prompt(graph: fx.Graph, node: fx.Node, masks: dict[fx.Node, bool]) -> bool:
    """Turn a causal mask into ``is_causal``; ``masks`` keeps what is known of each. A call without one stays as it is."""
    given: dict[str, Any] = {"attn_mask": None, **dict(zip(NAMES, node.args)), **node.kwargs}
    q, key, value, mask = (given[name] for name in NAMES[:4])
    if not isinstance(mask, fx.Node) or any(not isinstance(example(x), Tensor) or example(x).dim() != 4 for x in (q, key, value)):
        return False
    queries = compat.static_int(example(q).shape[2])
    if queries is None or queries < 2 or compat.static_int(example(key).shape[2]) != queries:
        return False
    if mask not in masks:
        masks[mask] = is_causal(constant(mask))
    if not masks[mask]:
        return False
    k, v = _shared(key), _shared(value)
    apart = (k, v) != (key, value) and shares_keys(example(q)) and example(k).shape[1] == example(v).shape[1]
    if apart and not any(_written(repeated, node) for repeated, source in ((key, k), (value, v)) if repeated is not source):
        given |= {"key": k, "value": v, "enable_gqa": True}
    node.args, node.kwargs = (), {**given, "attn_mask": None, "is_causal": True}
    for repeated in (key, value):
        erase_unread(graph, repeated)
    return True


def shares_keys(x: Tensor) -> bool:
    """Whether torch's fast kernels for queries like ``x`` take keys of fewer heads: those of GPUs, of 16 bits. The others would compute scores and their softmax one after the other."""
    return x.device.type == "cuda" and x.dtype.itemsize == 2


def _rewrite(graph: fx.Graph, node: fx.Node) -> Skip | None:
    given: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, **dict(zip(NAMES, node.args)), **node.kwargs}
    q, key, value, mask = (given[name] for name in NAMES[:4])
    shapes = [example(x) for x in (q, key, value)]
    if any(not isinstance(s, Tensor) or s.dim() != 4 for s in shapes):
        return Skip("not (batch, heads, tokens, columns)")
    dropout, scale = (_number(given[name]) for name in ("dropout_p", "scale"))
    if dropout != 0 or given["is_causal"]:
        return Skip("with dropout, or causal without a mask")
    if mask is not None and not isinstance(example(mask), Tensor):
        return Skip("a mask that is no tensor")
    heads, queries, columns = shapes[0].shape[1:]
    k, v = (_shared(x) for x in (key, value))
    groups = example(k).shape[1]
    if groups != example(v).shape[1] or shapes[1].shape[-1] != columns or shapes[2].shape[-1] != columns or heads % groups:
        return Skip("keys, values and queries differ in heads or columns")
    count = compat.static_int(queries)
    if count is None or count * (heads // groups) > MOST:
        return Skip(f"more than {MOST} queries for one key head, or a dynamic number")
    if count > 1 and compat.static_int(shapes[1].shape[2]) == count:
        return Skip("as many keys as queries: a prompt, or an encoder")
    if any(repeated is not source and _written(repeated, node) for repeated, source in ((key, k), (value, v))):
        return Skip("keys or values change between their repetition and the call")
    with graph.inserting_before(node):
        for _ in range(4 - example(mask).dim() if mask is not None else 0):
            short = mask
            mask = graph.call_method("unsqueeze", (short, 0))
            mask.meta["example_value"] = example(short).unsqueeze(0)
        new = graph.call_function(target("attention"), (q, k, v, mask, 1 / math.sqrt(int(columns)) if scale is None else scale))
    new.meta = {**node.meta}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for x in (key, value):
        erase_unread(graph, x)
    return None


def _number(x: Any) -> float | None:
    """A float argument's value. Dynamo makes a module's floats inputs under ``dynamic=True``; what torch's own call was given as one, it has read and guarded already."""
    value = example(x) if isinstance(x, fx.Node) else x
    return None if value is None else float(value)


def _shared(x: fx.Node) -> fx.Node:
    """The (B, G, S, D) that ``x`` repeats for its heads in their order: ``x[:, :, None].expand(...).reshape(...)`` or ``repeat_interleave(r, 1)``; ``x`` itself where it does not."""
    if x.target in ("repeat_interleave", torch.repeat_interleave):
        source, r, *axis = (*x.args, *x.kwargs.values())
        return source if isinstance(r, int) and axis in ([1], [-3]) and example(source).dim() == 4 else x  # type: ignore[return-value]
    if x.target not in ("reshape", "view", torch.reshape, "flatten", torch.flatten):
        return x
    wide = x.args[0]
    if not isinstance(wide, fx.Node) or wide.target not in ("expand", "broadcast_to", torch.broadcast_to):
        return x
    apart = wide.args[0]
    if not isinstance(apart, fx.Node) or (source := _unsqueezed(apart)) is None:
        return x
    (b, g, s, d), value, grown = example(source).shape, example(x), example(wide)
    ok = value.dim() == 4 and grown.dim() == 5 and value.shape[1] == g * grown.shape[2] and (value.shape[0], value.shape[2], value.shape[3]) == (b, s, d)
    return source if ok else x


def _unsqueezed(node: fx.Node) -> fx.Node | None:
    """The (B, G, S, D) of which ``node`` is the (B, G, 1, S, D) view."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(example(source), Tensor) or example(source).dim() != 4:
        return None
    if node.target in ("unsqueeze", torch.unsqueeze):
        return source if node.args[1:] in ((2,), (-3,)) else None
    index = node.args[1] if len(node.args) > 1 else None
    if node.target is not operator.getitem or not isinstance(index, tuple):
        return None
    return source if index[:3] == (WHOLE, WHOLE, None) and all(i in (WHOLE, Ellipsis) for i in index[3:]) else None


def _written(start: fx.Node, stop: fx.Node) -> bool:
    """Whether anything is written in place between two nodes: a repetition is a copy, which would not see it."""
    node = start.next
    while node is not stop:
        if written_by(node):
            return True
        node = node.next
    return False
