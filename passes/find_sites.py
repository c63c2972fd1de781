"""Name every linear, its role and its kin; leave alone, with a reason, what should not be quantized.

Roles are read off the graph, not off a table of architectures: a *router* is a linear whose output reaches ``topk`` through pointwise ops, softmax and views;
the *head* is a linear whose weight has the shape of an embedding table of the graph (tied or not), or is called ``lm_head``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .infra import graph_pass
from .normalize import LINEAR
from .sites import Param, Role, Site, example, rows

HEAD_NAMES = ("lm_head",)
REACH = 24
"""Nodes that the search for ``topk`` looks at before it gives up."""
TRANSPARENT = {
    torch.softmax, torch.sigmoid, F.softmax, torch.nn.functional.sigmoid, torch.add, torch.mul, operator.add, operator.mul, operator.iadd, operator.truediv, torch.div, operator.getitem,
    "softmax", "sigmoid", "float", "to", "view", "reshape", "unsqueeze", "squeeze", "add", "mul", "div", "log_softmax", F.log_softmax, "flatten", "masked_fill", "masked_fill_", "type", "sum", "topk",
}  # fmt: skip


@graph_pass(after=("normalize",))
def find_sites(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Fill ``gm.meta["sites"]`` (name -> Site) and ``node.meta["site"]``."""
    tables = _embedding_shapes(gm)
    sites: dict[str, Site] = {}
    readers: dict[tuple[fx.Node, int], list[str]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not LINEAR:
            continue
        parameter, view = source_of(node.args[1])
        if parameter is None:
            continue
        site = _site(node, parameter, view, tables, sites)
        sites[site.name] = site
        node.meta["site"] = site.name
        readers.setdefault((node.args[0], site.k), []).append(site.name)
    for names in readers.values():
        for name in names:
            sites[name] = _with_kin(sites[name], tuple(names))
    gm.meta["sites"] = sites
    gm.meta["note"] = f"{len(sites)} linears"
    return gm


def source_of(weight: Any) -> tuple[fx.Node | None, str]:
    """(parameter placeholder, view) of a canonical weight argument; (None, "") where the weight is no parameter. Casts, which autocast and models write, are seen through."""
    node, view = weight, ""
    while isinstance(node, fx.Node) and node.op == "call_method":
        if node.target == "t":
            view = "" if view == "t" else "t"
        elif node.target == "flatten":
            view = "flat"
        elif node.target not in ("to", "float", "half", "bfloat16", "contiguous", "detach", "type"):
            return None, ""
        node = node.args[0]
    if isinstance(node, fx.Node) and node.op == "placeholder" and "param" in node.meta:
        return node, view
    return None, ""


def _site(node: fx.Node, parameter: fx.Node, view: str, tables: set[tuple[int, int]], taken: dict[str, Site]) -> Site:
    param: Param = parameter.meta["param"]
    value = parameter.meta["example_value"]
    matrix = value.t() if view == "t" else value.flatten(1) if view == "flat" else value
    n, k = int(matrix.shape[0]), int(matrix.shape[1])
    path = param.path.removesuffix(".weight")
    name, again = path, 2
    while name in taken:
        name, again = f"{path}@{again}", again + 1
    x = example(node.args[0])
    m = rows(x.shape) if x is not None else 0
    return Site(name, path, param, view, n, k, role=_role(node, path, (n, k), tables), m=m, dtype=value.dtype, device=value.device.type)


def _with_kin(site: Site, kin: tuple[str, ...]) -> Site:
    from dataclasses import replace

    return replace(site, kin=tuple(name for name in kin if name != site.name))


def _role(node: fx.Node, path: str, shape: tuple[int, int], tables: set[tuple[int, int]]) -> Role:
    if shape in tables or path.rpartition(".")[2] in HEAD_NAMES:
        return "head"
    return "router" if _reaches_topk(node) else "linear"


def _embedding_shapes(gm: fx.GraphModule) -> set[tuple[int, int]]:
    """Shapes of the tables that token ids look up. Only those with integer inputs of the graph behind the look-up would be token tables; position tables never match a linear in practice."""
    found = set()
    for node in gm.graph.nodes:
        if node.target in (F.embedding, torch.embedding):
            table = node.args[1] if node.target is F.embedding else node.args[0]
            value = example(table)
            if value is not None and value.dim() == 2 and isinstance(table, fx.Node) and "param" in table.meta:
                found.add((int(value.shape[0]), int(value.shape[1])))
    return found


def _reaches_topk(node: fx.Node) -> bool:
    front, seen = [node], {node}
    while front and len(seen) < REACH:
        for user in front.pop(0).users:
            if user.target in (torch.topk, "topk"):
                return True
            if user not in seen and user.target in TRANSPARENT:
                seen.add(user)
                front.append(user)
    return False
