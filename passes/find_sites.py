"""Name every linear, its role and its kin; leave alone, with a reason, what should not be quantized.

Roles are read off the graph, not off a table of architectures: a *router* is a linear whose output reaches ``topk`` through pointwise ops, softmax and views, or an ``argmax`` (or ``max``) over its
columns that picks something (by ``gather``, ``scatter`` or ``one_hot``);
the *head* is a linear whose weight has the shape of the graph's largest embedding table (tied or not) and whose output is an output of the graph, or is called ``lm_head``, or is the
weight of a live embedding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qcompile.core.errors import PassError

from . import experts
from .infra import graph_pass
from .normalize import LINEAR, is_element
from .sites import CASTS, Param, Role, Site, example, is_transpose, rows, view

HEAD_NAMES = ("lm_head",)
REACH = 24
"""Nodes that a search looks at before it gives up."""
TRANSPARENT = {
    torch.softmax, torch.sigmoid, F.softmax, torch.nn.functional.sigmoid, torch.add, torch.mul, operator.add, operator.mul, operator.iadd, operator.truediv, torch.div, operator.getitem,
    "softmax", "sigmoid", "float", "to", "view", "reshape", "unsqueeze", "squeeze", "add", "mul", "div", "log_softmax", F.log_softmax, "flatten", "masked_fill", "masked_fill_", "type", "sum", "tanh", torch.tanh, "transpose", "contiguous", "clone", "detach",
}  # fmt: skip

GREATEST = {torch.argmax, "argmax", torch.max, "max"}
PICKS = {torch.gather, "gather", torch.scatter, "scatter", "scatter_", F.one_hot}


@graph_pass(after=("normalize",))
def find_sites(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Fill ``gm.meta["sites"]`` (name -> Site) and ``node.meta["site"]``."""
    tables = _embedding_shapes(gm)
    sites: dict[str, Site] = {}
    readers: dict[tuple[fx.Node, int], list[str]] = {}
    for node in gm.graph.nodes:
        found = _find(node)
        if found is None:
            continue
        x, parameter, view = found
        site = _site(node, x, parameter, view, tables, sites)
        sites[site.name] = site
        node.meta["site"] = site.name
        readers.setdefault((x, site.k), []).append(site.name)
    for names in readers.values():
        for name in names:
            sites[name] = _with_kin(sites[name], tuple(names))
    gm.meta["sites"] = sites
    gm.meta["note"] = f"{len(sites)} linears"
    return gm


def _find(node: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    """(rows, parameter, view) of a linear or of a product with experts."""
    if node.op != "call_function" or "left_alone" in node.meta:
        return None
    if node.target is LINEAR:
        parameter, view = source_of(node.args[1])
        return (node.args[0], parameter, view) if parameter is not None else None  # type: ignore[return-value]
    product = experts.resolve(node)
    return (product.x, product.weight, product.view) if isinstance(product, experts.Experts) else None


def source_of(weight: Any) -> tuple[fx.Node | None, str]:
    """(parameter placeholder, view) of a canonical weight argument; (None, "") where the weight is no parameter. Casts, which autocast and models write, are seen through."""
    node = weight
    steps: list[str] = []
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if is_transpose(node):
            steps.pop() if steps[-1:] == ["t"] else steps.append("t")
        elif node.target == "flatten":
            steps.append("flat" if node.args[1:] == (1,) else "rows")
        elif is_element(node):
            steps.append(f"[{node.args[1]}]")
        elif node.target not in CASTS:
            return None, ""
        node = node.args[0]
    if isinstance(node, fx.Node) and "param" in node.meta:
        return node, ".".join(reversed(steps))
    return None, ""


def _site(node: fx.Node, x: fx.Node, parameter: fx.Node, how: str, tables: set[tuple[int, int]], taken: dict[str, Site]) -> Site:
    param: Param = parameter.meta["param"]
    value = parameter.meta["example_value"]
    *stack, n, k = (int(size) for size in view(value, how).shape)
    path = param.path.removesuffix(".weight")
    name, again = path, 2
    while name in taken:
        name, again = f"{path}@{again}", again + 1
    role: Role = "experts" if stack or "[" in how else _role(node, param, path, (n, k), tables)
    read = example(x)
    if read is not None and not read.dtype.is_floating_point:
        raise PassError(f"linear {path} has a weight of {value.dtype} and an input of {read.dtype}, which eager refuses, too: convert the input, x.to({value.dtype})")
    product = experts.resolve(node)
    by_column = isinstance(product, experts.Experts) and product.form == "weight_first"  # rows are (S, K, 1)
    m = 0 if read is None else rows((read.shape[0], k) if by_column else read.shape)
    return Site(name, path, param, how, n, k, stack[0] if stack else 1, role, m, value.dtype, value.device.type, stored=parameter.meta.get("stored"))


def _with_kin(site: Site, kin: tuple[str, ...]) -> Site:
    return replace(site, kin=tuple(name for name in kin if name != site.name))


def _role(node: fx.Node, param: Param, path: str, shape: tuple[int, int], tables: set[tuple[int, int]]) -> Role:
    if param.table or path.rpartition(".")[2] in HEAD_NAMES or (shape in tables and _reaches(node, lambda user: user.op == "output")):
        return "head"
    return "router" if _reaches(node, _chooses) else "linear"


def _chooses(node: fx.Node) -> bool:
    """``topk``, or the place of the greatest of the last axis where it picks something: not a pooling maximum, and not a label that the graph returns."""
    if node.target in (torch.topk, "topk"):
        return True
    value, dim = example(node.args[0]) if node.args else None, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if node.target not in GREATEST or value is None or not isinstance(dim, int) or dim % value.dim() != value.dim() - 1:
        return False
    places = [node] if node.target in (torch.argmax, "argmax") else [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
    return any(_reaches(place, lambda user: user.target in PICKS) for place in places)


def _embedding_shapes(gm: fx.GraphModule) -> set[tuple[int, int]]:
    """Shape of the largest table that ids look up: the vocabulary. Smaller ones are positions and types, whose shapes a linear may share by chance."""
    found = set()
    for node in gm.graph.nodes:
        if node.target in (F.embedding, torch.embedding):
            table = node.args[1] if node.target is F.embedding else node.args[0]
            value = example(table)
            if value is not None and value.dim() == 2 and isinstance(table, fx.Node) and "param" in table.meta:
                found.add((int(value.shape[0]), int(value.shape[1])))
    most = max((rows for rows, _ in found), default=0)
    return {shape for shape in found if shape[0] == most}


def _reaches(node: fx.Node, goal: Callable[[fx.Node], bool]) -> bool:
    """A user that is the goal lies behind the node through pointwise ops, softmax and views alone."""
    front, seen = [node], {node}
    while front and len(seen) < REACH:
        for user in front.pop(0).users:
            if goal(user):
                return True
            if user not in seen and user.target in TRANSPARENT:
                seen.add(user)
                front.append(user)
    return False
