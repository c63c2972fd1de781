"""Values that a graph computes from no input: a causal mask made of ``arange``, say. They are found by computing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat

from .infra import target_name, written_by

LARGEST = 2**26
"""Elements of the largest value that is computed."""
UNSURE = ("rand", "dropout", "bernoulli", "normal", "multinomial", "empty", "exponential", "poisson")
"""Parts of names of functions that give something else each time."""
LEVELS = ("torch._functorch", "torch._C._functorch")
"""Modules of functions that mean something only inside of a level of ``torch.vmap``, which the graph enters and leaves by calls that no value depends on."""


def constant(node: fx.Node) -> Any:
    """The value of ``node`` where no input, parameter or chance has part in it and nothing writes into what it is made of; None where it is not known, or too large."""
    needed = _needed(node)
    if needed is None:
        return None
    values: dict[fx.Node, Any] = {}
    with compat.no_dispatch_modes(), torch.no_grad():
        for n in needed:
            args: Any = fx.map_arg(n.args, values.__getitem__)
            kwargs: Any = fx.map_arg(n.kwargs, values.__getitem__)
            fn: Any = getattr(args[0], str(n.target)) if n.op == "call_method" else n.target
            values[n] = fn(*(args[1:] if n.op == "call_method" else args), **kwargs)
    return values[node]


def is_causal(mask: Any) -> bool:
    """Whether each query of (..., Q, Q) sees itself and what comes before it, no more: True there, or 0 with the least that a float can hold elsewhere."""
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    seen = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype is torch.bool:
        return bool((mask == seen).all())
    if not mask.dtype.is_floating_point:
        return False
    return bool((torch.where(seen, mask, 0) == 0).all()) and bool((torch.where(seen, torch.finfo(mask.dtype).min, mask) <= torch.finfo(mask.dtype).min / 2).all())


def _needed(node: fx.Node) -> list[fx.Node] | None:
    """What ``node`` is made of, in the graph's order; None if that is not constant."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in found:
            continue
        value = n.meta.get("example_value")
        large = isinstance(value, Tensor) and (not all(compat.static_int(s) is not None for s in value.shape) or value.numel() > LARGEST)
        if n.op not in ("call_function", "call_method") or large or _unsure(n) or any(n in written_by(user) for user in n.users):
            return None
        found.add(n)
        todo += n.all_input_nodes
    return [n for n in node.graph.nodes if n in found]


def _unsure(node: fx.Node) -> bool:
    target = node.target
    return bool(written_by(node)) or any(part in target_name(target) for part in UNSURE) or any(part in str(getattr(target, "__module__", "")) for part in LEVELS)
