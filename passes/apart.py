"""Products that stay as they are, whatever they multiply: inside a transform of ``torch.func``, which knows no rule for ops on codes (a gradient through them would be zero), and with a weight that
the graph itself has written before, of which codes taken before the call know nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.core.errors import Skip

from .sites import example

OPENS, CLOSES = "_increment_nesting", "_decrement_nesting"
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
INPLACE = {"setitem", "__setitem__", *(f"i{name}" for name in OPERATORS), *(f"__i{name}__" for name in OPERATORS)}
NO_WRITES = {"requires_grad_", "share_memory_", "retain_grad"}


def apart(graph: fx.Graph) -> dict[fx.Node, Skip]:
    """Node -> why it is left alone, for every call inside a transform and every one that reads a written parameter, under whatever name: what counts is the memory of the example values."""
    found: dict[fx.Node, Skip] = {}
    opened: list[str] = []
    parameters = {key for node in graph.find_nodes(op="placeholder") if "param" in node.meta for key in _memory(node)}
    written: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = name_of(node)
        if name.endswith(OPENS):
            opened.append(name.removesuffix(OPENS).strip("_"))
        elif name.endswith(CLOSES) and opened:
            opened.pop()
        elif opened:
            found[node] = Skip(f"inside a transform of torch.func ({opened[-1]}), which has no rule for quantized products")
        for writer in (written[key] for read in node.all_input_nodes for key in _memory(read) if key in written):
            found.setdefault(node, Skip(f"the forward writes this weight ({name_of(writer)}) before it multiplies by it"))
        for target in _targets(node, name):
            written |= dict.fromkeys(parameters.intersection(_memory(target)) - written.keys(), node)
    return found


def name_of(node: fx.Node) -> str:
    """Of what a node calls, as it is written."""
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))


def _memory(node: fx.Node) -> list[int]:
    """Keys of the memory of a node's value, or of all values in it."""
    value = example(node)
    return [key for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor) and (key := compat.storage_key(v)) is not None]


def _targets(node: fx.Node, name: str) -> list[fx.Node]:
    """What a call writes to."""
    inplace = (name.endswith("_") and not name.endswith("__") and name not in NO_WRITES) or name in INPLACE or node.target is operator.setitem or node.kwargs.get("inplace") is True
    values: list[Any] = [*([node.args[0] if node.args else next(iter(node.kwargs.values()), None)] if inplace else []), node.kwargs.get("out")]
    return [n for value in values for n in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(n, fx.Node)]
