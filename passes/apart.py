"""Products that stay as they are, whatever they multiply: inside a transform of ``torch.func``, which knows no rule for ops on codes (a gradient through them would be zero), and with a weight that
the graph itself has written before, of which codes taken before the call know nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile.core.errors import Skip

OPENS, CLOSES = "_increment_nesting", "_decrement_nesting"
SAME = {"data", "detach", "view", "reshape", "view_as", "narrow", "select", "getitem", "transpose", "t", "unsqueeze", "squeeze", "flatten", "permute", "_get_data_attr", "getattr", "chunk", "split"}
"""What gives another view of one memory."""
NO_WRITES = {"requires_grad_", "share_memory_", "retain_grad"}


def apart(graph: fx.Graph) -> dict[fx.Node, Skip]:
    """Node -> why it is left alone, for every call inside a transform and every one that reads a written parameter."""
    found: dict[fx.Node, Skip] = {}
    opened: list[str] = []
    written: dict[fx.Node, fx.Node] = {}
    """What shares the memory of a parameter that was written -> the call that wrote it."""
    roots: dict[fx.Node, fx.Node] = {}
    """What shares the memory of a parameter -> the parameter."""
    for node in graph.nodes:
        if node.op == "placeholder":
            if "param" in node.meta:
                roots[node] = node
            continue
        name = name_of(node)
        if name.endswith(OPENS):
            opened.append(name.removesuffix(OPENS).strip("_"))
        elif name.endswith(CLOSES) and opened:
            opened.pop()
        elif opened:
            found[node] = Skip(f"inside a transform of torch.func ({opened[-1]}), which has no rule for quantized products")
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in roots and name in SAME:
            roots[node] = roots[source]
        for target in _targets(node, name):
            if target in roots:
                written.setdefault(roots[target], node)
        for read in node.all_input_nodes:
            if (root := roots.get(read)) in written and written[root] is not node:
                found.setdefault(node, Skip(f"the forward writes this weight ({name_of(written[root])}) before it multiplies by it"))
    return found


def name_of(node: fx.Node) -> str:
    """Of what a node calls, as it is written."""
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))


def _targets(node: fx.Node, name: str) -> list[Any]:
    """What a call writes to."""
    inplace = (name.endswith("_") and not name.endswith("__") and name not in NO_WRITES) or node.target in (operator.setitem, torch.Tensor.__setitem__) or name in ("__setitem__", "iadd", "isub", "imul", "itruediv")
    return [*([node.args[0]] if inplace and node.args else []), *([node.kwargs["out"]] if "out" in node.kwargs else [])]
