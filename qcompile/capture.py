"""Dynamo's graph as ours: copied, its parameters named as the model names them, its inputs' roles known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from qcompile import compat, stored
from qcompile.owners import owners
from qcompile.passes.infra import called, written_by
from qcompile.passes.sites import Param

CREATING = {"zeros", "empty", "ones", "full", "zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full"}
VIEWS = {"view", "reshape", "narrow", "select", "slice", "getitem", "__getitem__", "transpose", "t", "unsqueeze", "squeeze", "flatten", "expand", "permute", "detach"}


def capture(gm: fx.GraphModule, inputs: Sequence[Any], root: str = "", names: Mapping[int, tuple[nn.Module, str, str]] | None = None, tables: set[int] | None = None) -> fx.GraphModule:
    """A private copy of Dynamo's graph. Parameters get ``meta["param"]``; inputs that the graph writes to are marked static, so that CUDA graphs apply.

    Names are those of the outermost live module (or start with ``root``, where the user gave one), so that a layer compiled alone has the names it has in its model.
    ``names`` and ``tables``: the modules that own the parameters, as ``owners`` gives them, where they are known.
    """
    copy = compat.copy_graph(gm)
    tables = set() if tables is None else tables
    found = dict(names) if names is not None else owners(tables)
    for index, (node, value) in enumerate(zip(copy.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        if isinstance(value, nn.Parameter):
            owner, path, name = found.get(id(value), (None, "", ""))
            relative = dotted(compat.source_name(node))
            full = f"{root}.{relative}".strip(".") if root else f"{path}.{name}".strip(".") or relative or node.name
            node.meta["param"] = Param(index, full, type(owner).__name__ if owner is not None else "", id(value) in tables, value.requires_grad)
            continue
        source = compat.source_name(node) if isinstance(value, Tensor) else ""
        if "_buffers[" in source or source.startswith("L['self']"):  # or a plain tensor that is an attribute
            node.meta["buffer"] = Param(index, f"{root}.{dotted(source)}".strip("."), "buffer" if "_buffers[" in source else "tensor")
        if isinstance(value, Tensor) and _is_written(node):
            node.meta["mutated"] = True
            compat.mark_static(node)
    stored.fold(copy, inputs, found)
    copy.meta["skipped"] = []
    copy.meta["creates_state"] = _creates_state(copy.graph)
    return copy


def dotted(source: str) -> str:
    """``L['self']._modules['fc']._parameters['weight']`` -> ``fc.weight``."""
    tail = re.sub(r"^\w*\[[^\]]*\]|^\w+", "", source, count=1)
    parts = re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", tail)
    return ".".join(name for name in (a or b for a, b in parts) if name not in ("_modules", "_parameters", "_buffers"))


def _creates_state(graph: fx.Graph) -> bool:
    """Some output is a tensor that the graph makes and then fills in place: a cache that outlives the call (the prefill of a static cache that is allocated lazily).

    Such memory must not come from a CUDA graph's pool, which the next replay overwrites.
    """
    for node in graph.find_nodes(op="output")[0].all_input_nodes:
        while node.op in ("call_method", "call_function") and node.args and isinstance(node.args[0], fx.Node):
            if called(node) not in VIEWS and node.args[0] not in written_by(node):
                break
            node = node.args[0]
        if called(node) in CREATING and _is_written(node):
            return True
    return False


def _is_written(node: fx.Node, depth: int = 0) -> bool:
    """Some node writes to this tensor in place, directly or through a view."""
    for user in node.users:
        if node in written_by(user):
            return True
        if called(user) in VIEWS and depth < 4 and user.args and user.args[0] is node and _is_written(user, depth + 1):
            return True
    return False
