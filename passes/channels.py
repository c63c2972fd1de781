"""Which operations a factor for each channel passes through, and to which channels it goes there.

How channels map is found by *executing* the views of the graph on a tensor of row numbers, never by formulas: element e of a node is scaled by the factor of row ``map[e]`` of the place where the factor enters.
Axes over which a map is constant have stride 0, so that it costs K numbers, whatever the tokens.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile.core.errors import Skip

from .infra import target_name
from .sites import example

SAME = {
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach", "neg", torch.neg, operator.neg, torch.clone, F.dropout, torch.dropout,
}  # fmt: skip
"""Element by element, and commuting with any factor (dropout: whatever its mask)."""
FILL = {"masked_fill", torch.masked_fill}
"""Commuting where what they put in is zero: whatever a factor makes of it."""
POSITIVE = {F.relu, torch.relu, "relu", F.leaky_relu}
"""f(v x) = v f(x) for v > 0."""
MUL = {torch.mul, operator.mul, "mul", "__mul__"}
DIV = {torch.div, operator.truediv, "div", "__truediv__"}
ADD = {torch.add, operator.add, "add", "__add__"}
VIEW = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "expand", "repeat", "repeat_interleave", "movedim", "swapaxes", "chunk", "split", "unbind",
    "narrow", "select", "t", torch.reshape, torch.flatten, torch.unflatten, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.repeat_interleave, torch.movedim,
    torch.swapaxes, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.select, torch.t, operator.getitem, getattr,
}  # fmt: skip
PRODUCT = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__"}

Map = Tensor | tuple[Any, ...]
"""Row of the producer that scales each element: int32 of the node's shape, or a tuple of these where the node gives several tensors."""


def operands(node: fx.Node, k: int) -> list[fx.Node]:
    """Inputs through which a factor for each channel passes; of a product of two, either may carry it."""
    args = [a for a in node.args if isinstance(a, fx.Node)]
    if node.op not in ("call_function", "call_method") or not _is_float(node):
        return []
    if node.target in MUL:
        return [a for a in args if _is_float(a) and not is_vector(a, k)]
    if node.target in ADD and not node.kwargs:
        return [a for a, b in zip(args, reversed(args)) if len(args) == 2 and is_vector(b, k) and not is_vector(a, k)]
    if node.target is F.scaled_dot_product_attention:
        value = node.args[2] if len(node.args) > 2 else node.kwargs["value"]
        return [value] if isinstance(value, fx.Node) else []
    if node.target in PRODUCT:
        return args[1:2] if len(args) == 2 else []
    first = node.args[0] if node.args else node.kwargs.get("input")
    known = node.target in SAME | POSITIVE | VIEW or (node.target in DIV and not node.kwargs) or (node.target in FILL and _zero_fill(node))
    return [first] if known and isinstance(first, fx.Node) else []


def _zero_fill(node: fx.Node) -> bool:
    """Whether a masked_fill puts in the number zero."""
    value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value")
    return isinstance(value, (int, float)) and value == 0


def _is_float(node: fx.Node) -> bool:
    value = example(node)
    return isinstance(value, (tuple, list)) or (isinstance(value, Tensor) and value.dtype.is_floating_point)


def vectors(node: fx.Node, k: int) -> list[fx.Node]:
    """Vectors (K,) that scale and shift the node's last axis: the weight and bias of a norm, or the one factor of a product."""
    if node.target in (F.layer_norm, torch.layer_norm, F.rms_norm, getattr(torch, "rms_norm", F.rms_norm)):
        names = ("input", "normalized_shape", "weight", "bias") if "layer_norm" in target_name(node.target) else ("input", "normalized_shape", "weight")
        given = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]
        found = [v for v in given[2:] if v is not None]
        whole = isinstance(given[1], (tuple, list)) and len(given[1]) == 1 and given[2] is not None
        return [v for v in found if isinstance(v, fx.Node)] if whole and all(is_vector(v, k) for v in found) else []
    if node.target in MUL and len(node.args) == 2:
        a, b = node.args
        return [v for v, other in ((a, b), (b, a)) if isinstance(v, fx.Node) and is_vector(v, k) and not is_vector(other, k)]
    return []


def is_vector(node: Any, k: int) -> bool:
    """K values on the last axis, computed from parameters alone."""
    value = example(node)
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[-1] != k or value.numel() != k or not value.dtype.is_floating_point:
        return False
    front, seen = [node], {node}
    while front:
        n = front.pop()
        if n.op not in ("call_function", "call_method") and not (n.op == "placeholder" and "param" in n.meta):
            return False
        new = [i for i in n.all_input_nodes if i not in seen]
        seen.update(new)
        front += new
    return any(n.op == "placeholder" for n in seen)


def obstacle(node: fx.Node) -> str:
    """Why no factor passes a node, for the report."""
    if node.op == "placeholder":
        return "x is an input of the graph"
    if node.target in (F.layer_norm, torch.layer_norm, F.rms_norm):
        return f"the norm {node.name} has no weight of its own"
    name = target_name(node.target)
    if name in ("cat", "index_copy_", "copy_", "setitem"):
        return f"{name} ({node.name}) lies between, as a cache has"
    if node.target in ADD:
        return f"add ({node.name}) lies between"
    return f"{name} ({node.name}) does not commute with a factor for each channel"


def channels(path: tuple[fx.Node, ...], n: int, by_column: bool) -> tuple[int, ...] | Skip:
    """For each channel of x the element of the place's last axis that scales it."""
    maps = maps_of(path, n)
    if isinstance(maps, Skip):
        return maps
    rows = maps[-1]
    assert isinstance(rows, Tensor)
    rows = rows.movedim(-2, -1) if by_column else rows
    if any(size != 1 for size in narrowed(rows).shape[:-1]):
        return Skip(f"the rows of {path[0].name} spread over several axes of x")
    while rows.dim() > 1:
        rows = rows[0]
    return tuple(rows.tolist())


def maps_of(path: tuple[fx.Node, ...], n: int | None) -> list[Map] | Skip:
    """The map of each node of the path. ``n``: length of the first one's last axis, to be checked."""
    shape = _sizes(path[0])
    if None in shape or 0 in shape:
        return Skip(f"{path[0].name} has no elements, or as many as its values say")
    if n is not None and shape[-1] != n:
        return Skip(f"the last axis of {path[0].name} has {shape[-1]} elements, not {n}")
    maps: list[Map] = [torch.arange(shape[-1], dtype=torch.int32).expand(shape)]
    for source, node in pairwise(path):
        if uses(node, source) != 1:
            return Skip(f"{target_name(node.target)} ({node.name}) reads {source.name} twice")
        image = carry(node, source, maps[-1])
        if isinstance(image, Skip):
            return image
        maps.append(image)
    return maps


def carry(node: fx.Node, source: fx.Node, rows: Map) -> Map | Skip:
    """The map of a node, given that of the one input that carries the factor."""
    if isinstance(example(node), Tensor) and None in _sizes(node):
        return Skip(f"the size of {target_name(node.target)} ({node.name}) depends on values")
    if node.target in VIEW:
        image = _select_rows(node, rows) if _tokens(node) else _execute(node, source, rows)
    elif not isinstance(rows, Tensor):
        return Skip(f"{target_name(node.target)} ({node.name}) reads several tensors")
    elif node.target in PRODUCT or node.target is F.scaled_dot_product_attention:
        image = _attend(node, rows)
    else:
        image = rows.expand(_sizes(node))
    if isinstance(image, (tuple, list)):
        return tuple(_compact(t) for t in image)
    if isinstance(image, Tensor) and tuple(image.shape) != _sizes(node):
        return Skip(f"{target_name(node.target)} ({node.name}) gives a shape that was not expected")
    return _compact(image) if isinstance(image, Tensor) else image


def _attend(node: fx.Node, rows: Tensor) -> Tensor | Skip:
    """Sums over the tokens (axis -2) of the second factor; heads are repeated or broadcast."""
    if rows.dim() < 2 or narrowed(rows).shape[-2] != 1:
        return Skip(f"{target_name(node.target)} ({node.name}) sums over channels")
    shape, rows = _sizes(node), rows.narrow(-2, 0, 1)
    if len(shape) < rows.dim():
        return Skip(f"{target_name(node.target)} ({node.name}) multiplies a vector")
    if node.kwargs.get("enable_gqa") and rows.dim() > 2 and rows.shape[-3] not in (1, shape[-3]):
        rows = rows.repeat_interleave(shape[-3] // rows.shape[-3], dim=-3)
    return rows.expand(shape)


def _tokens(node: fx.Node) -> list[Tensor]:
    """The integer tensors that ``x[ids]`` or ``x[i, j]`` picks along the leading axes (experts and pooling do); empty for other ways to index."""
    if node.target is not operator.getitem:
        return []
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    ids = [example(i) for i in index if isinstance(example(i), Tensor)]
    return ids if len(ids) == len(index) and not any(i.dtype.is_floating_point or i.dtype == torch.bool for i in ids) else []


def _select_rows(node: fx.Node, rows: Map) -> Tensor | Skip:
    """Any choice of tokens has the map of the first, where the map is constant over tokens."""
    n = len(_tokens(node))
    if isinstance(rows, Tensor) and rows.dim() > n and all(size == 1 for size in narrowed(rows).shape[:n]):
        return rows[(0,) * n].expand(_sizes(node))
    return Skip(f"getitem ({node.name}) picks channels by values")


def _execute(node: fx.Node, source: fx.Node, rows: Map) -> Any:
    """Run a view on the map itself, with the hints of symbolic sizes."""

    def concrete(n: fx.Node) -> Any:
        return rows if n is source else _plain(example(n))

    if any(isinstance(example(n), Tensor) for n in node.all_input_nodes if n is not source):
        return Skip(f"{target_name(node.target)} ({node.name}) picks values by their position")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), concrete)
    try:
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return getattr(args[0], "reshape" if node.target == "view" else str(node.target))(*args[1:], **kwargs)  # strides of the map are not those of the value
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError) as error:
        return Skip(f"{target_name(node.target)} ({node.name}) could not be followed: {str(error).splitlines()[0]}")


def _plain(value: Any) -> Any:
    """Sizes as integers; a tensor is no size."""
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, torch.SymInt):
        value = value.node.hint  # None where the size depends on data
    return int(value) if isinstance(value, int) else None


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return tuple(_plain(example(node).shape))


def narrowed(rows: Tensor) -> Tensor:
    """One element on every axis of stride 0: the axes over which a compact map is constant."""
    for axis, stride in enumerate(rows.stride()):
        if stride == 0:
            rows = rows.narrow(axis, 0, min(1, rows.shape[axis]))
    return rows


def _compact(rows: Tensor) -> Tensor:
    """The same map with stride 0 on every axis over which it is constant."""
    small = narrowed(rows)
    for axis in range(small.dim()):
        first = small.narrow(axis, 0, min(1, small.shape[axis]))
        if bool((small == first).all()):
            small = first
    small = small.contiguous()
    return small.as_strided(small.shape, [0 if size == 1 else stride for size, stride in zip(small.shape, small.stride())]).expand(rows.shape)


def uses(user: fx.Node, node: fx.Node) -> int:
    """How often the node stands among the user's arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)
