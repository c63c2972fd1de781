"""Store what a product makes in the model's own 16 bits.

A product is float32 in the graph, and Inductor inlines the bias and the cast behind it into whatever reads them. Where the reader is a kernel of its own (a norm, attention, a split),
the product's store would stay float32: twice the bytes out and twice in. So the cast is made to own its memory; as the last thing that a template's store does it costs nothing, and where
all readers fuse into the template too, nothing is stored at all. On CPUs the product is a call into C++, into which nothing fuses, and graphs stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.kernels.op import NAMESPACE

DENSE = ("linear", "scaled_linear", "linear_glu", "split_linear")
PRODUCTS = (*DENSE, "grouped_linear")
CAST = torch.ops.prims.convert_element_type.default
BY_COLUMN = (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)
"""With a vector: a bias, or factors that smooth the next linear's input."""


def narrow(graph: fx.Graph) -> None:
    """Pin the first 16-bit value behind each product; rewrites in place."""
    for node in list(graph.nodes):
        if is_product(node, PRODUCTS) and node.meta["val"].device.type != "cpu":
            cast = cast_behind(node)
            if cast is not None and cast.meta["val"].dim() == 2:
                pin(graph, cast, [int(cast.meta["val"].shape[1]), 1])


def is_product(node: Any, names: tuple[str, ...]) -> bool:
    """The node calls one of our ops of these names."""
    return isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE and node.target._opname in names


def cast_behind(product: fx.Node) -> fx.Node | None:
    """The cast to 16 bits that alone reads the product, or what a bias and factors for the next linear's input make of it."""
    node = product
    for _ in range(3):
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        if user.target is CAST:
            dtype = user.args[1]
            return user if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize == 2 else None
        if user.target not in BY_COLUMN or any(isinstance(a, fx.Node) and a is not node and a.meta["val"].dim() != 1 for a in user.args):
            return None
        node = user
    return None


def pin(graph: fx.Graph, node: fx.Node, strides: list[int]) -> None:
    """Make a node own its memory, with these strides."""
    with graph.inserting_after(node):
        own = graph.call_function(compat.force_stride_order(), (node, strides))
    own.meta = dict(node.meta)
    node.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)
