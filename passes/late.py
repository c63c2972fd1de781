"""Ops that AOTAutograd was to see whole (``Op.late``) are written out by their references, so that Inductor fuses them with what stands around. On CPUs they
stay, and are called.

Runs on the post-grad graph of each half of a training graph: nothing can be moved from one half to the other any more.
"""

from __future__ import annotations

import torch
from torch import fx

from qcompile import compat
from qcompile.kernels import OPS
from qcompile.kernels.op import NAMESPACE


def late(graph: fx.Graph) -> None:
    """Rewrite in place."""
    for node in list(graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE and OPS[node.target._opname].late and node.meta["val"].device.type != "cpu":
            _write_out(graph, node)


def _write_out(graph: fx.Graph, node: fx.Node) -> None:
    op = OPS[node.target._opname]  # type: ignore[union-attr]
    nodes: list[fx.Node] = []
    fx.map_arg(node.args, nodes.append)

    def body(*values: torch.Tensor) -> torch.Tensor:
        given = iter(values)
        out: torch.Tensor = op.reference(*fx.map_arg(node.args, lambda _: next(given)))
        return out

    traced = compat.traced(body, [n.meta["val"] for n in nodes])
    inputs = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                node.replace_all_uses_with(inputs[inner.args[0]])
            elif inner.target is torch.ops.aten.alias.default:
                inputs[inner] = inputs[inner.args[0]]
            elif inner.op == "call_function":
                inputs[inner] = graph.node_copy(inner, inputs.__getitem__)
            elif inner.op != "placeholder":
                raise AssertionError(f"the reference of {op.name} holds a constant, {inner.format_node()}, which a graph of Inductor's cannot take")
    graph.erase_node(node)
