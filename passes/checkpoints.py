"""Gradient checkpointing: the body of ``torch.utils.checkpoint.checkpoint`` is a graph of its own inside Dynamo's. It is written out here, so that every linear is seen, and its nodes carry
the mark by which AOTAutograd computes them again in the backward."""

from __future__ import annotations

from typing import Any

from torch import fx

from qcompile import compat

from .infra import graph_pass


@graph_pass()
def checkpoints(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Write out checkpointed bodies; nested ones, too."""
    count = write_out(gm, marked=True)
    gm.meta["note"] = f"{count} checkpointed bodies written out" if count else ""
    return gm


def write_out(gm: fx.GraphModule, marked: bool) -> int:
    """Rewrite in place; returns how many bodies there were. ``marked``: their nodes are to be computed again, which graphs without a backward must not say."""
    count = 0
    while bodies := [n for n in gm.graph.nodes if n.op == "call_function" and n.target is compat.checkpoint_op()]:
        for node in bodies:
            count += 1
            _write_out(gm, node, compat.recompute_mark(count) if marked else {})
    return count


def _write_out(gm: fx.GraphModule, node: fx.Node, mark: dict[str, Any]) -> None:
    body: Any = getattr(gm, str(node.args[0].target))  # type: ignore[union-attr]
    inputs = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda n: inputs[n])
                continue
            if inner.op == "get_attr":
                name = f"{node.name}_{inner.target}".replace(".", "_")
                gm.register_module(name, body.get_submodule(inner.target)) if inner.target in dict(body.named_modules()) else setattr(gm, name, getattr(body, inner.target))
                inputs[inner] = gm.graph.get_attr(name)
                continue
            copy = gm.graph.node_copy(inner, lambda n: inputs[n])
            copy.meta = {**inner.meta, **mark}
            inputs[inner] = copy
    results = results if isinstance(results, (tuple, list)) else (results,)
    for user in list(node.users):  # the op gives a tuple, whose parts are taken by getitem
        user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
        gm.graph.erase_node(user)
    attribute: Any = node.args[0]
    gm.graph.erase_node(node)
    if not attribute.users:
        gm.graph.erase_node(attribute)
