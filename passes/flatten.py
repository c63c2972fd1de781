"""Keep what follows a linear in two dimensions.

A linear on (B, S, K) is a product on (B*S, K) between two views. Torch 2.11 does not fuse a pointwise chain written on (B, S, N) into a product whose output is (B*S, N); so the view behind
the product sinks below the pointwise ops, down to where a third dimension is needed (a reduction's output, attention, the residual stream).
Runs on the post-grad ATen graph, which is functional: no order of writes can change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .angles import angles
from .counters import counters
from .late import late
from .library import library
from .narrow import DENSE, is_product, narrow

VIEW = torch.ops.aten.view.default
RESHAPES = (VIEW, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)


def flatten(graph: fx.Graph) -> None:
    """Rewrite in place; the graph is left as it was where nothing applies. ``late`` comes before it; then, with casts right behind their products, ``library`` and ``narrow``; last ``angles`` and ``counters``."""
    late(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in RESHAPES and is_product(node.args[0], DENSE):
            _sink(graph, node)
    library(graph)
    narrow(graph)
    angles(graph)
    counters(graph)


def _sink(graph: fx.Graph, view: fx.Node) -> None:
    """Grow the region of pointwise ops behind ``view`` and rewrite it on the product's own shape."""
    product: fx.Node = view.args[0]  # type: ignore[assignment]
    shape = list(_value(view).shape)
    if len(shape) < 3 or _value(product).dim() != 2:
        return
    flat: dict[fx.Node, fx.Node] = {view: product}
    order = {n: i for i, n in enumerate(graph.nodes)}
    front = sorted(view.users, key=order.__getitem__)
    while front:
        node = front.pop(0)
        if node in flat or not _joins(node, flat, shape):
            continue
        with graph.inserting_before(node):
            args = [_two_dimensional(graph, a, flat, shape) for a in node.args]
            new = graph.call_function(node.target, tuple(args), node.kwargs)  # type: ignore[arg-type]
        new.meta = {**node.meta, "val": _value(node).reshape(-1, shape[-1])}
        flat[node] = new
        front = sorted({*front, *node.users}, key=order.__getitem__)
    for old, new in flat.items():
        if old is not view:
            _replace(graph, old, new, flat)
    for old in reversed(list(flat)):
        if old is not view and not old.users:
            graph.erase_node(old)
    if not view.users:
        graph.erase_node(view)


def _joins(node: fx.Node, flat: dict[fx.Node, fx.Node], shape: list[Any]) -> bool:
    """A pointwise op of the region's shape whose every operand can be had in two dimensions."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return False
    value = _value(node)
    if not isinstance(value, torch.Tensor) or list(value.shape) != shape or any(isinstance(a, (list, tuple)) for a in node.args):
        return False
    if node.kwargs.get("memory_format") not in (None, torch.contiguous_format, torch.preserve_format):
        return False  # formats of four or five dimensions
    return not any(isinstance(v, fx.Node) for v in node.kwargs.values()) and all(_flattens(a, flat, shape) for a in node.args)


def _flattens(arg: Any, flat: dict[fx.Node, fx.Node], shape: list[Any]) -> bool:
    if not isinstance(arg, fx.Node) or arg in flat:
        return True
    value = _value(arg)
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return True
    other = list(value.shape)
    if len(other) < len(shape) and all(s == 1 for s in other[:-1]):
        return True
    return len(other) == len(shape) and (other[:-1] == shape[:-1] or all(s == 1 for s in other[:-1])) and other[-1] in (1, shape[-1])


def _two_dimensional(graph: fx.Graph, arg: Any, flat: dict[fx.Node, fx.Node], shape: list[Any]) -> Any:
    if not isinstance(arg, fx.Node) or arg in flat:
        return flat[arg] if isinstance(arg, fx.Node) else arg
    value = _value(arg)
    if not isinstance(value, torch.Tensor) or value.dim() <= 1:
        return arg
    if arg.target in RESHAPES and isinstance(arg.args[0], fx.Node) and list(_value(arg.args[0]).shape) == list(value.reshape(-1, value.shape[-1]).shape):
        return arg.args[0]  # a view of something that is two-dimensional already
    return _reshape(graph, arg, value.reshape(-1, value.shape[-1]))


def _reshape(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> fx.Node:
    """``node`` viewed as ``value``; leading sizes are written as -1, so that no symbolic size has to be found in the graph."""
    out = graph.call_function(torch.ops.aten.reshape.default, (node, [-1, int(value.shape[-1])]))
    out.meta["val"] = value
    return out


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node, flat: dict[fx.Node, fx.Node]) -> None:
    """Users outside the region read a view of the new node; a view to two dimensions reads it as it is."""
    outside = [user for user in old.users if user not in flat]
    if not outside:
        return
    back: fx.Node | None = None
    for user in outside:
        if user.target in RESHAPES and list(_value(user).shape) == list(_value(new).shape):
            user.replace_all_uses_with(new)
            graph.erase_node(user)
            continue
        if back is None:
            with graph.inserting_after(old):
                back = graph.call_function(torch.ops.aten.reshape.default, (new, _sizes(graph, old, flat)))
            back.meta = dict(old.meta)
        user.replace_input_with(old, back)


def _sizes(graph: fx.Graph, node: fx.Node, flat: dict[fx.Node, fx.Node]) -> Any:
    """The shape argument of the view that the region began with: every member has that shape."""
    first = next(iter(flat))
    return first.args[1]


def _value(node: Any) -> Any:
    return node.meta.get("val")
