"""Sines and cosines that several kernels read are computed once. Inductor writes them out in each reader: the rotary embedding's angles again for every head of every layer, and a sine of an angle of any
size is two hundred instructions of a GPU. The angles themselves are products of positions with frequencies, written as matrices with one column and one row: a product of elements, not of a library.

Runs on the post-grad ATen graph: what is to be read (behind a cast and constant factors) is made to own its memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .narrow import pin

ATEN = torch.ops.aten
ANGLES = (ATEN.cos.default, ATEN.sin.default)
VIEWS = (ATEN.view.default, ATEN.reshape.default, ATEN.unsqueeze.default, ATEN.expand.default, ATEN.slice.Tensor, ATEN.permute.default, ATEN.select.int, ATEN.squeeze.dim)


def angles(graph: fx.Graph) -> None:
    """Pin each that two ops or more read; rewrites in place."""
    for product in (ATEN.mm.default, ATEN.bmm.default):
        for node in graph.find_nodes(op="call_function", target=product):
            if node.args[0].meta["val"].shape[-1] == 1:  # (..., M, 1) @ (..., 1, N)
                node.target = ATEN.mul.Tensor
    for node in list(graph.nodes):
        if node.target in ANGLES:
            last = _last(node)
            if _readers(last) > 1 and (strides := _strides(last.meta["val"])) is not None:
                pin(graph, last, strides)


def _last(node: fx.Node) -> fx.Node:
    """The end of the chain of pointwise ops of one operand, each the only reader of the one before."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not isinstance(user.target, torch._ops.OpOverload) or torch.Tag.pointwise not in user.target.tags or sum(isinstance(a, fx.Node) for a in user.args) != 1:
            break
        node = user
    return node


def _readers(node: fx.Node) -> int:
    """Ops that read it, also through views."""
    return sum(_readers(user) if user.target in VIEWS else 1 for user in node.users)


def _strides(value: Any) -> list[int] | None:
    """Of a contiguous tensor, as integers; None where that takes a symbolic size. An axis of one element takes any."""
    strides: list[int] = []
    step: Any = 1
    for size in reversed(value.shape):
        if not isinstance(step, int) and size != 1:
            return None
        strides.append(step if isinstance(step, int) else strides[-1])
        step = step * size
    return strides[::-1]
