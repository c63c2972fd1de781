"""A vector that multiplies one linear's columns of a merged product multiplies the whole product, with ones for the others: then it is part of the product's store, where a product of some columns
alone would be a kernel. SmoothQuant and AWQ divide o's input by such a vector, which v's columns take over, and v is one product with q and k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .infra import erase_unread, graph_pass
from .narrow import is_product
from .sites import example

VIEWS = (torch.narrow, "narrow", "new_ones", torch.cat)
"""What vectors are made of by ``producers``, from placeholders."""


@graph_pass(after=("lower",))
def factors(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Rewrite every merged product some of whose columns a vector multiplies."""
    done = 0
    for product in list(gm.graph.nodes):
        if not is_product(product, ("linear", "scaled_linear")):
            continue
        value = _with_bias(product)
        whole = next(iter(value.users)) if len(value.users) == 1 else value
        if whole.target == "to" and all(user.target is torch.narrow and user.args[0] is whole for user in whole.users) and _hoist(gm.graph, value, whole):
            done += 1
    gm.meta["note"] = f"{done} merged products take a vector"
    return gm


def _with_bias(product: fx.Node) -> fx.Node:
    """The sum of a product and a vector (its linears' biases) where nothing else reads the product; else the product."""
    if len(product.users) == 1:
        (user,) = product.users
        if user.target is torch.add and user.args[0] is product and not user.kwargs and isinstance(bias := example(user.args[1]), Tensor) and bias.dim() == 1:
            return user
    return product


def _hoist(graph: fx.Graph, product: fx.Node, whole: fx.Node) -> bool:
    """``whole`` is ``product`` (..., N), with biases or without, float32, cast once; its users are the linears' columns. Returns whether any of them was multiplied by a vector."""
    parts = sorted((user for user in whole.users if user.target is torch.narrow), key=lambda part: part.args[2])  # type: ignore[arg-type,return-value]
    found = {part: use for part in parts if (use := _multiplied(part)) is not None}
    if not found:
        return False
    with graph.inserting_before(whole):
        pieces = []
        for part in parts:
            if part in found:
                pieces.append(_copied(graph, found[part][1], {}))
            else:
                ones = graph.call_method("new_ones", (product, (_width(part),)))
                ones.meta["example_value"] = torch.ones(_width(part), dtype=torch.float32, device="meta")
                pieces.append(ones)
        vector = graph.call_function(torch.cat, (pieces,))
        vector.meta["example_value"] = torch.empty(sum(map(_width, parts)), dtype=torch.float32, device="meta")
        scaled = graph.call_function(torch.mul, (product, vector))
        scaled.meta["example_value"] = example(product)
    whole.replace_input_with(product, scaled)
    for part, (replaced, once) in found.items():
        replaced[-1].replace_all_uses_with(part)
        for node in reversed(replaced):
            graph.erase_node(node)
        erase_unread(graph, once)
    return True


def _width(part: fx.Node) -> int:
    """Of a linear's columns."""
    width = part.args[3]
    assert isinstance(width, int)
    return width


def _multiplied(part: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    """(the product with a vector and the cast behind it, the vector) where these are the only readers of a linear's columns."""
    if len(part.users) != 1:
        return None
    (user,) = part.users
    if user.target is not torch.mul or user.args[0] is not part or user.kwargs:
        return None
    vector = user.args[1]
    if not isinstance(vector, fx.Node) or not isinstance(example(vector), Tensor) or example(vector).shape != (part.args[3],) or not _of_placeholders(vector):
        return None
    uses = [user]
    if example(user).dtype is not example(part).dtype:
        if len(user.users) != 1:
            return None
        (cast,) = user.users
        if cast.target != "to" or example(cast).dtype is not example(part).dtype:
            return None
        uses.append(cast)
    return uses, vector


def _of_placeholders(node: fx.Node) -> bool:
    return node.op == "placeholder" or (node.target in VIEWS and all(_of_placeholders(n) for n in node.all_input_nodes))


def _copied(graph: fx.Graph, node: fx.Node, done: dict[fx.Node, fx.Node]) -> fx.Node:
    """The vector's nodes once more, at the point of insertion: they stand behind the product."""
    if node.op == "placeholder":
        return node
    if node not in done:
        for n in node.all_input_nodes:
            done[n] = _copied(graph, n, done)
        done[node] = graph.node_copy(node, done.__getitem__)
    return done[node]
