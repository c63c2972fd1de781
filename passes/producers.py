"""Where a multiplication of the channels of a linear's input by a vector can go: into the norm before it, into the rows of the linear before it, or nowhere (a multiply in the graph).

No table of architectures: the graph is walked backwards from the input through operations that commute with a factor for each channel. Legality is that nobody else reads a value that would change.
How channels map to rows of the producer is followed in ``channels``.
Scaling equivalences: SmoothQuant (Xiao et al. 2023, section 4), AWQ (Lin et al. 2023, section 3.2), cross-layer equalization (Nagel et al. 2019, section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.core.errors import PassError, Skip

from . import experts
from .channels import ADD, POSITIVE, VIEW, Map, carry, channels, is_vector, maps_of, narrowed, obstacle, operands, uses, vectors
from .infra import target_name
from .observe import input_of
from .sites import Site, call_method, example

Kind = Literal["norm", "rows", "multiply"]
RUNS = 256
"""Pieces that a vector may be cut into on its way to the producer's rows; a permutation of single elements is refused."""

ABOUT = {"size", "dim", "numel", "stride", "new_ones", "new_zeros", "new_full", "new_empty", torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like}
"""Ask for shape, dtype or device, never for values."""
LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Ask that of their second argument."""


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
        for path, kind in _paths(x, (), k, reasons, set()):
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
            vector = call_method(graph, "unsqueeze", vector, -1)
        product = _product(graph, x, vector)
    for reader in readers:
        reader.replace_input_with(x, product)


# --- walking back ------------------------------------------------------------------------------------------------------


def _paths(node: fx.Node, tail: tuple[fx.Node, ...], k: int, reasons: list[str], seen: set[fx.Node]) -> Iterator[tuple[tuple[fx.Node, ...], Kind]]:
    """Paths from a possible place to x. Where one ends at neither, ``reasons`` says at what. A node that two paths reach has a second reader, so that one of them is enough."""
    if node in seen:
        return
    seen.add(node)
    path = (node, *tail)
    if "site" in node.meta:
        yield path, "rows"
        return
    if vectors(node, k):
        yield path, "norm"
    sources = operands(node, k)
    if not sources:
        reasons.append(obstacle(node))
    for source in sources:
        yield from _paths(source, path, k, reasons, seen)


def _norm(path: tuple[fx.Node, ...], readers: list[fx.Node], k: int, by_column: bool) -> Place | Skip:
    index = channels(path, k, by_column)
    if isinstance(index, Skip):
        return index
    if index != tuple(range(k)):
        return Skip(f"the channels of {path[0].name} are reordered before x")
    if (refusal := _legal(path, readers, index)) is not None:
        return refusal
    found = [(v, path[0]) for v in vectors(path[0], k)]
    for i, node in enumerate(path[1:], 2):
        if node.target in ADD:
            if channels(path[:i], k, False) != index:
                return Skip(f"{target_name(node.target)} ({node.name}) adds to other channels than x has")
            found += [(v, node) for v in node.all_input_nodes if is_vector(v, k)]
    return Place("norm", f"folded into the norm {_module(found[0][0])}", tuple(v for v, _ in found), None, "", _homogeneous(path), tuple(user for _, user in found))


def _rows(gm: fx.GraphModule, path: tuple[fx.Node, ...], readers: list[fx.Node], k: int, by_column: bool) -> Place | Skip:
    site: Site = gm.meta["sites"][path[0].meta["site"]]
    if path[0] in readers or _by_column(path[0]):
        return Skip(f"the output of {site.name} has its rows on another axis")
    if shift := next((node for node in path[1:] if node.target in ADD), None):
        return Skip(f"{obstacle(shift)}")
    index = channels(path, site.n, by_column)
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
    maps = maps_of(path, None)
    assert not isinstance(maps, Skip), maps
    for node, rows, after in zip(path, maps, (*path[1:], None)):
        for user in node.users:
            on_path = user is after if after is not None else user in readers
            if on_path and uses(user, node) == 1:
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
    image = carry(user, node, rows) if user.target in VIEW and uses(user, node) == 1 else Skip("no view")
    if isinstance(image, Skip):
        return Skip(f"{node.name} is also read by {_called(user)}")
    return next((refusal for u in user.users if (refusal := _reads(u, user, image, touched)) is not None), None)


def _meets(rows: Map, touched: Tensor) -> bool:
    return any(_meets(r, touched) for r in rows) if isinstance(rows, tuple) else bool(torch.isin(narrowed(rows), touched).any())


def _asks_about(user: fx.Node, node: fx.Node) -> bool:
    if user.target in ABOUT or (user.target is getattr and user.args[1] in ("shape", "dtype", "device", "ndim")):
        return user.args[:1] == (node,) and uses(user, node) == 1
    return user.target in LIKE and user.args[1:2] == (node,) and uses(user, node) == 1


def _called(node: fx.Node) -> str:
    return node.meta["site"] if "site" in node.meta else f"{target_name(node.target)} ({node.name})"


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
        if user in readers and uses(user, x) == 1:
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
    pieces = [call_method(graph, "narrow", vector, 0, first, length) if first >= 0 else call_method(graph, "new_ones", vector, (length,)) for first, length in runs]
    node = graph.call_function(torch.cat, (pieces,))
    node.meta["example_value"] = torch.cat([example(p) for p in pieces])
    return node


def _product(graph: fx.Graph, node: fx.Node, vector: fx.Node) -> fx.Node:
    """``node * vector`` in the wider of the two dtypes, rounded once to that of the node."""
    product = graph.call_function(torch.mul, (node, vector))
    value, dtype = example(node), torch.promote_types(example(node).dtype, example(vector).dtype)
    product.meta["example_value"] = value.to(dtype)  # not computed: the two may be fake tensors of different modes
    return product if dtype == value.dtype else call_method(graph, "to", product, value.dtype)
