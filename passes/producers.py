"""Where a multiplication of the channels of a linear's input by a vector can go: into the norm before it, into the rows of the linear before it, or nowhere (a multiply in the graph).

No table of architectures: the graph is walked backwards from the input through operations that commute with a factor for each channel. How channels map to rows of the producer is found by
*executing* the views on the way on a tensor of row numbers (axes over which it is constant have stride 0, so that it costs K numbers, whatever the tokens); legality is that nobody else reads a value that would change.
Scaling equivalences: SmoothQuant (Xiao et al. 2023, section 4), AWQ (Lin et al. 2023, section 3.2), cross-layer equalization (Nagel et al. 2019, section 4.1).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile import compat
from qcompile.core.errors import PassError, Skip

from . import experts
from .infra import target_name
from .observe import input_of
from .sites import Site, example

Kind = Literal["norm", "rows", "multiply"]
RUNS = 256
"""Pieces that a vector may be cut into on its way to the producer's rows; a permutation of single elements is refused."""

SAME = {
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach", "neg", torch.neg, operator.neg, torch.clone, F.dropout, torch.dropout,
}  # fmt: skip
"""Element by element, and commuting with any factor (dropout: whatever its mask)."""
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
ABOUT = {"size", "dim", "numel", "stride", "new_ones", "new_zeros", "new_full", "new_empty", torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like}
"""Ask for shape, dtype or device, never for values."""
LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Ask that of their second argument."""

Map = Tensor | tuple[Any, ...]
"""Row of the producer that scales each element: int32 of the node's shape, or a tuple of these where the node gives several tensors."""


@dataclass(frozen=True)
class Place:
    """Where x's channels are multiplied by a vector v (K,). ``nodes``: norm, the vectors to multiply, each as ``users`` (of the same length) reads it; rows, the producer; multiply, x.

    ``index[c]`` is the producer's row that scales channel c (grouped-query attention: several channels have one row, and v must be equal over them: see ``shared``).
    ``homogeneous``: an activation such as relu lies between, so v must be positive. ``site``: the producer's name. ``why`` is for the report.
    """

    kind: Kind
    why: str
    nodes: tuple[fx.Node, ...]
    index: tuple[int, ...] | None = None
    site: str = ""
    homogeneous: bool = False
    users: tuple[fx.Node, ...] = ()


def place(gm: fx.GraphModule, sites: Sequence[str]) -> Place:
    """The best place for the kin ``sites``, which read one x. Raises PassError where they do not, or where the graph has no such sites. The nodes live in ``gm``, not in its clones."""
    readers = _readers(gm, sites)
    x = input_of(readers[0])
    if other := _other_reader(x, readers):
        return Place("multiply", f"kept as a multiply: x is also read by {other}", (x,))
    by_column = _by_column(readers[0])
    k = gm.meta["sites"][sites[0]].k
    reasons: list[str] = []
    with compat.no_dispatch_modes():
        for path, kind in _paths(x, (), k, reasons):
            found = _norm(path, readers, k, by_column) if kind == "norm" else _rows(gm, path, readers, k, by_column)
            if isinstance(found, Place):
                return found
            reasons.append(str(found))
    return Place("multiply", f"kept as a multiply: {reasons[0] if reasons else 'x is an input of the graph'}", (x,))


def shared(v: Tensor, place: Place) -> Tensor:
    """``v`` (K,) made legal at the place: the maximum over channels that share a row. Raises PassError where it must be positive and is not."""
    if place.homogeneous and not bool((v > 0).all()):
        raise PassError(f"a vector with values that are not positive cannot be put {place.why}: an activation lies between, which only commutes with positive factors")
    if place.index is None:
        return v
    rows = torch.tensor(place.index, device=v.device)
    top = torch.full((int(rows.max()) + 1,), -torch.inf, dtype=v.dtype, device=v.device).scatter_reduce(0, rows, v, "amax")
    return top[rows]


def apply(gm: fx.GraphModule, place: Place, sites: Sequence[str], vector: fx.Node) -> None:
    """Multiply x, as the sites see it, by ``vector`` (K,); no other value in the graph changes, nor does a dtype. ``vector`` must stand before the place and be legal there (see ``shared``)."""
    graph = gm.graph
    if place.kind == "norm":
        for node, user in zip(place.nodes, place.users):
            with graph.inserting_before(user):
                user.replace_input_with(node, _product(graph, node, vector))
    elif place.kind == "rows":
        assert place.index is not None
        source = place.nodes[0]
        users = set(source.users)
        with graph.inserting_before(source.next):
            product = _product(graph, source, _by_row(graph, vector, place.index, gm.meta["sites"][place.site].n))
        source.replace_all_uses_with(product, delete_user_cb=lambda user: user in users)
    else:
        _multiply(graph, _readers(gm, sites), vector)


def _multiply(graph: fx.Graph, readers: list[fx.Node], vector: fx.Node) -> None:
    x = input_of(readers[0])
    with graph.inserting_before(next(node for node in graph.nodes if node in readers)):
        if _by_column(readers[0]):
            vector = _call(graph, "unsqueeze", vector, -1)
        product = _product(graph, x, vector)
    for reader in readers:
        reader.replace_input_with(x, product)


# --- walking back ------------------------------------------------------------------------------------------------------


def _paths(node: fx.Node, tail: tuple[fx.Node, ...], k: int, reasons: list[str]) -> Iterator[tuple[tuple[fx.Node, ...], Kind]]:
    """Paths from a possible place to x. Where one ends at neither, ``reasons`` says at what."""
    path = (node, *tail)
    if "site" in node.meta:
        yield path, "rows"
        return
    if _vectors(node, k):
        yield path, "norm"
    operands = _operands(node, k)
    if not operands:
        reasons.append(_obstacle(node))
    for operand in operands:
        yield from _paths(operand, path, k, reasons)


def _operands(node: fx.Node, k: int) -> list[fx.Node]:
    """Inputs through which a factor for each channel passes; of a product of two, either may carry it."""
    args = [a for a in node.args if isinstance(a, fx.Node)]
    if node.op not in ("call_function", "call_method") or not _is_float(node):
        return []
    if node.target in MUL:
        return [a for a in args if _is_float(a) and not _is_vector(a, k)]
    if node.target in ADD and not node.kwargs:
        return [a for a, b in zip(args, reversed(args)) if len(args) == 2 and _is_vector(b, k) and not _is_vector(a, k)]
    if node.target is F.scaled_dot_product_attention:
        value = node.args[2] if len(node.args) > 2 else node.kwargs["value"]
        return [value] if isinstance(value, fx.Node) else []
    if node.target in PRODUCT:
        return args[1:2] if len(args) == 2 else []
    first = node.args[0] if node.args else node.kwargs.get("input")
    known = node.target in SAME | POSITIVE | VIEW or (node.target in DIV and not node.kwargs)
    return [first] if known and isinstance(first, fx.Node) else []


def _is_float(node: fx.Node) -> bool:
    value = example(node)
    return isinstance(value, (tuple, list)) or (isinstance(value, Tensor) and value.dtype.is_floating_point)


def _vectors(node: fx.Node, k: int) -> list[fx.Node]:
    """Vectors (K,) that scale and shift the node's last axis: the weight and bias of a norm, or the one factor of a product."""
    if node.target in (F.layer_norm, torch.layer_norm, F.rms_norm, getattr(torch, "rms_norm", F.rms_norm)):
        names = ("input", "normalized_shape", "weight", "bias") if "layer_norm" in target_name(node.target) else ("input", "normalized_shape", "weight")
        given = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]
        found = [v for v in given[2:] if v is not None]
        whole = isinstance(given[1], (tuple, list)) and len(given[1]) == 1 and given[2] is not None
        return [v for v in found if isinstance(v, fx.Node)] if whole and all(_is_vector(v, k) for v in found) else []
    if node.target in MUL and len(node.args) == 2:
        a, b = node.args
        return [v for v, other in ((a, b), (b, a)) if isinstance(v, fx.Node) and _is_vector(v, k) and not _is_vector(other, k)]
    return []


def _is_vector(node: Any, k: int) -> bool:
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


def _obstacle(node: fx.Node) -> str:
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


# --- the two places ------------------------------------------------------------------------------------------------------


def _norm(path: tuple[fx.Node, ...], readers: list[fx.Node], k: int, by_column: bool) -> Place | Skip:
    index = _channels(path, k, by_column)
    if isinstance(index, Skip):
        return index
    if index != tuple(range(k)):
        return Skip(f"the channels of {path[0].name} are reordered before x")
    if (refusal := _legal(path, readers, index)) is not None:
        return refusal
    found = [(v, path[0]) for v in _vectors(path[0], k)]
    for i, node in enumerate(path[1:], 2):
        if node.target in ADD:
            if _channels(path[:i], k, False) != index:
                return Skip(f"{target_name(node.target)} ({node.name}) adds to other channels than x has")
            found += [(v, node) for v in node.all_input_nodes if _is_vector(v, k)]
    return Place("norm", f"folded into the norm {_module(found[0][0])}", tuple(v for v, _ in found), None, "", _homogeneous(path), tuple(user for _, user in found))


def _rows(gm: fx.GraphModule, path: tuple[fx.Node, ...], readers: list[fx.Node], k: int, by_column: bool) -> Place | Skip:
    site: Site = gm.meta["sites"][path[0].meta["site"]]
    if path[0] in readers or _by_column(path[0]):
        return Skip(f"the output of {site.name} has its rows on another axis")
    if shift := next((node for node in path[1:] if node.target in ADD), None):
        return Skip(f"{_obstacle(shift)}")
    index = _channels(path, site.n, by_column)
    if isinstance(index, Skip):
        return index
    if len(set(index)) == 1 < k:
        return Skip(f"one row of {site.name} scales all channels")
    if (refusal := _legal(path, readers, index)) is not None:
        return refusal
    if len(_runs(index, site.n)) > RUNS:
        return Skip(f"the rows of {site.name} are permuted one by one before x")
    through = " through repeated heads" if len(set(index)) < k else ""
    return Place("rows", f"in the rows of {site.name}{through}", (path[0],), index, site.name, _homogeneous(path))


def _homogeneous(path: tuple[fx.Node, ...]) -> bool:
    return any(node.target in POSITIVE for node in path)


def _module(vector: fx.Node) -> str:
    """Name of the module whose parameter a vector is computed from."""
    while vector.op != "placeholder":
        vector = next(n for n in vector.all_input_nodes)
    return str(vector.meta["param"].path.removesuffix(".weight"))


def _legal(path: tuple[fx.Node, ...], readers: list[fx.Node], index: tuple[int, ...]) -> Skip | None:
    """Nobody reads a value that would change, except on the way to the readers."""
    touched = torch.tensor(sorted(set(index)), dtype=torch.int32)
    maps = _maps(path, None)
    assert not isinstance(maps, Skip), maps
    for node, rows, after in zip(path, maps, (*path[1:], None)):
        for user in node.users:
            on_path = user is after if after is not None else user in readers
            if on_path and _uses(user, node) == 1:
                continue
            if (refusal := _reads(user, node, rows, touched)) is not None:
                return refusal
    return None


def _reads(user: fx.Node, node: fx.Node, rows: Map, touched: Tensor) -> Skip | None:
    """A refusal if the user, or what views through it, reads a touched row: the other parts of a fused projection do not."""
    if _asks_about(user, node) or not _meets(rows, touched):
        return None
    if user.op == "output":
        return Skip(f"{node.name} is also an output of the graph")
    image = _carry(user, node, rows) if user.target in VIEW and _uses(user, node) == 1 else Skip("no view")
    if isinstance(image, Skip):
        return Skip(f"{node.name} is also read by {_called(user)}")
    return next((refusal for u in user.users if (refusal := _reads(u, user, image, touched)) is not None), None)


def _meets(rows: Map, touched: Tensor) -> bool:
    return any(_meets(r, touched) for r in rows) if isinstance(rows, tuple) else bool(torch.isin(_narrow(rows), touched).any())


def _asks_about(user: fx.Node, node: fx.Node) -> bool:
    if user.target in ABOUT or (user.target is getattr and user.args[1] in ("shape", "dtype", "device", "ndim")):
        return user.args[:1] == (node,) and _uses(user, node) == 1
    return user.target in LIKE and user.args[1:2] == (node,) and _uses(user, node) == 1


def _uses(user: fx.Node, node: fx.Node) -> int:
    """How often the node stands among the user's arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


def _called(node: fx.Node) -> str:
    return node.meta["site"] if "site" in node.meta else f"{target_name(node.target)} ({node.name})"


# --- rows through views --------------------------------------------------------------------------------------------------


def _channels(path: tuple[fx.Node, ...], n: int, by_column: bool) -> tuple[int, ...] | Skip:
    """For each channel of x the element of the place's last axis that scales it."""
    maps = _maps(path, n)
    if isinstance(maps, Skip):
        return maps
    rows = maps[-1]
    assert isinstance(rows, Tensor)
    rows = rows.movedim(-2, -1) if by_column else rows
    if any(size != 1 for size in _narrow(rows).shape[:-1]):
        return Skip(f"the rows of {path[0].name} spread over several axes of x")
    while rows.dim() > 1:
        rows = rows[0]
    return tuple(rows.tolist())


def _maps(path: tuple[fx.Node, ...], n: int | None) -> list[Map] | Skip:
    """The map of each node of the path. ``n``: length of the first one's last axis, to be checked."""
    shape = _sizes(path[0])
    if None in shape or 0 in shape:
        return Skip(f"{path[0].name} has no elements, or as many as its values say")
    if n is not None and shape[-1] != n:
        return Skip(f"the last axis of {path[0].name} has {shape[-1]} elements, not {n}")
    maps: list[Map] = [torch.arange(shape[-1], dtype=torch.int32).expand(shape)]
    for source, node in pairwise(path):
        if _uses(node, source) != 1:
            return Skip(f"{target_name(node.target)} ({node.name}) reads {source.name} twice")
        image = _carry(node, source, maps[-1])
        if isinstance(image, Skip):
            return image
        maps.append(image)
    return maps


def _carry(node: fx.Node, source: fx.Node, rows: Map) -> Map | Skip:
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
    if rows.dim() < 2 or _narrow(rows).shape[-2] != 1:
        return Skip(f"{target_name(node.target)} ({node.name}) sums over channels")
    shape, rows = _sizes(node), rows.narrow(-2, 0, 1)
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
    n = len(_tokens(node))
    if isinstance(rows, Tensor) and rows.dim() > n and all(size == 1 for size in _narrow(rows).shape[:n]):
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


def _narrow(rows: Tensor) -> Tensor:
    """One element on every axis of stride 0: the axes over which a compact map is constant."""
    for axis, stride in enumerate(rows.stride()):
        if stride == 0:
            rows = rows.narrow(axis, 0, min(1, rows.shape[axis]))
    return rows


def _compact(rows: Tensor) -> Tensor:
    """The same map with stride 0 on every axis over which it is constant."""
    small = _narrow(rows)
    for axis in range(small.dim()):
        first = small.narrow(axis, 0, min(1, small.shape[axis]))
        if bool((small == first).all()):
            small = first
    small = small.contiguous()
    return small.as_strided(small.shape, [0 if size == 1 else stride for size, stride in zip(small.shape, small.stride())]).expand(rows.shape)


# --- building ------------------------------------------------------------------------------------------------------------


def _readers(gm: fx.GraphModule, sites: Sequence[str]) -> list[fx.Node]:
    """The nodes of the sites, in the order of the graph."""
    nodes = [node for node in gm.graph.nodes if node.meta.get("site") in sites]
    if missing := set(sites) - {node.meta["site"] for node in nodes}:
        raise PassError(f"no such sites in the graph: {', '.join(sorted(missing))}; it has {', '.join(gm.meta.get('sites', {})) or 'none'}")
    inputs = {input_of(node) for node in nodes}
    if len(inputs) != 1:
        raise PassError(f"{', '.join(sites)} do not read one input: {', '.join(sorted(n.name for n in inputs)) or 'no sites were given'}")
    return nodes


def _other_reader(x: fx.Node, readers: list[fx.Node]) -> str:
    """Who else reads the values of x, in words."""
    for user in x.users:
        if user in readers and _uses(user, x) == 1:
            continue
        if user.op == "output":
            return "the output of the graph"
        if not _asks_about(user, x):
            return f"{_called(user)}" + (" (residual stream)" if user.target in ADD else "")
    return ""


def _by_column(node: fx.Node) -> bool:
    """The rows of experts are (S, K, 1) in and (S, N, 1) out."""
    product = experts.resolve(node)
    return isinstance(product, experts.Experts) and product.form == "weight_first"


def _runs(index: tuple[int, ...], n: int) -> list[tuple[int, int]]:
    """Pieces of a vector over the producer's rows: (first channel, length), or (-1, length) for rows that keep their value."""
    channel = [-1] * n
    for c in reversed(range(len(index))):
        channel[index[c]] = c
    runs: list[tuple[int, int]] = []
    for c in channel:
        first, length = runs[-1] if runs else (-2, 0)
        if runs and ((c == -1 and first == -1) or (c != -1 and first != -1 and c == first + length)):
            runs[-1] = (first, length + 1)
        else:
            runs.append((c, 1))
    return runs


def _by_row(graph: fx.Graph, vector: fx.Node, index: tuple[int, ...], n: int) -> fx.Node:
    """The vector over the producer's rows (N,), built from slices, so that no index tensor becomes part of the graph."""
    runs = _runs(index, n)
    if runs == [(0, len(index))]:
        return vector
    pieces = [_call(graph, "narrow", vector, 0, first, length) if first >= 0 else _call(graph, "new_ones", vector, (length,)) for first, length in runs]
    node = graph.call_function(torch.cat, (pieces,))
    node.meta["example_value"] = torch.cat([example(p) for p in pieces])
    return node


def _product(graph: fx.Graph, node: fx.Node, vector: fx.Node) -> fx.Node:
    """``node * vector`` in the wider of the two dtypes, rounded once to that of the node."""
    product = graph.call_function(torch.mul, (node, vector))
    value, dtype = example(node), torch.promote_types(example(node).dtype, example(vector).dtype)
    product.meta["example_value"] = value.to(dtype)  # not computed: the two may be fake tensors of different modes
    return product if dtype == value.dtype else _call(graph, "to", product, value.dtype)


def _call(graph: fx.Graph, method: str, node: fx.Node, *args: Any) -> fx.Node:
    made = graph.call_method(method, (node, *args))
    made.meta["example_value"] = getattr(example(node), method)(*args)
    return made
