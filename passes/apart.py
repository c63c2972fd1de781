"""Products that stay as they are, whatever they multiply: inside a transform of ``torch.func``, which knows no rule for ops on codes (a gradient through them would be zero), and with a weight that
the graph itself has written before, of which codes taken before the call know nothing."""

from __future__ import annotations

import torch
from torch import fx

from qcompile import compat
from qcompile.core.errors import Skip

from .infra import called, written_by
from .sites import example

OPENS, CLOSES = "_increment_nesting", "_decrement_nesting"


def apart(graph: fx.Graph) -> dict[fx.Node, Skip]:
    """Node -> why it is left alone, for every call inside a transform and every one that reads a written parameter, under whatever name: what counts is the memory of the example values."""
    found: dict[fx.Node, Skip] = {}
    opened: list[str] = []
    parameters = {key for node in graph.find_nodes(op="placeholder") if "param" in node.meta for key in _memory(node)}
    written: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = called(node)
        if name.endswith(OPENS):
            opened.append(name.removesuffix(OPENS).strip("_"))
        elif name.endswith(CLOSES) and opened:
            opened.pop()
        elif opened:
            found[node] = Skip(f"inside a transform of torch.func ({opened[-1]}), which has no rule for quantized products")
        for writer in (written[key] for read in node.all_input_nodes for key in _memory(read) if key in written):
            found.setdefault(node, Skip(f"the forward writes this weight ({called(writer)}) before it multiplies by it"))
        for target in written_by(node):
            written |= dict.fromkeys(parameters.intersection(_memory(target)) - written.keys(), node)
    return found


def _memory(node: fx.Node) -> list[int]:
    """Keys of the memory of a node's value, or of all values in it."""
    value = example(node)
    return [key for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor) and (key := compat.storage_key(v)) is not None]
