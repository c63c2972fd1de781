"""Counters that a graph steps on, such as those of a static cache's layers, step in one kernel. A layer each launches a kernel of its own for a single number, at the end of every decoded token.

Runs on the post-grad ATen graph, where an update in place is a sum and, among the last nodes, its copy back into the input.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

ATEN = torch.ops.aten
MOST = 16
"""Elements of what counts as a counter."""


def counters(graph: fx.Graph) -> None:
    """Rewrite in place: the sums of one step and device become one ``_foreach_sub`` in front of their copies, which Inductor then writes where the inputs are.

    Of a negative step, because Inductor writes a ``_foreach_add`` in place by itself, and then what read the old counts without having been stored yet reads the new ones.
    """
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for copy in graph.find_nodes(op="call_function", target=ATEN.copy_.default):
        if (step := _step(copy)) is not None:
            groups[step, copy.args[0].meta["val"].device].append(copy)
    for (step, _), copies in groups.items():
        if len(copies) > 1:
            _join(graph, step, copies)


def _step(copy: fx.Node) -> int | None:
    """What an input gains that is written back by ``copy``; None where it is not a few integers that gain a constant, or where somebody else reads the sum."""
    base, added = copy.args[:2]
    if not (isinstance(base, fx.Node) and isinstance(added, fx.Node)) or base.op != "placeholder" or added.target is not ATEN.add.Tensor or added.kwargs or len(added.users) > 1:
        return None
    value, (given, step) = added.meta["val"], added.args
    plain = given is base and type(step) is int and not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool
    few = plain and all(isinstance(size, int) for size in value.shape) and value.numel() <= MOST and value.dtype == base.meta["val"].dtype
    return step if few else None  # type: ignore[return-value]


def _join(graph: fx.Graph, step: int, copies: list[fx.Node]) -> None:
    sums: list[Any] = [copy.args[1] for copy in copies]
    with graph.inserting_before(copies[0]):
        together = graph.call_function(ATEN._foreach_sub.Scalar, ([copy.args[0] for copy in copies], -step))
        together.meta = {"val": [added.meta["val"] for added in sums]}
        for i, (copy, added) in enumerate(zip(copies, sums, strict=True)):
            one = graph.call_function(operator.getitem, (together, i))
            one.meta = dict(added.meta)
            copy.replace_input_with(added, one)
            graph.erase_node(added)
