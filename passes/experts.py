"""Find products with the stacked 3-D parameters of mixtures of experts, in the three ways that models write them.

 * sorted rows: ``grouped_mm(x, W, offs=ends)``: torch's op, or the fallback that transformers registers for dtypes and devices without it;
 * one expert for each row: ``bmm(W[ids], x.unsqueeze(-1))`` or ``bmm(x.unsqueeze(1), W[ids])`` (transformers' ``batched_mm``, which decoding uses);
 * all experts on all rows: ``bmm(x, W)`` (Llama 4).

Nothing is rewritten here: ``resolve`` reads a node, and ``lower`` asks it again when it replaces the node.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from qcompile import compat
from qcompile.core.errors import Skip

from .sites import CASTS, example, is_transpose

GROUPED = compat.grouped_mm()
GROUPED_NAMES = ("grouped_mm", "grouped_mm_fallback", "_grouped_mm")


@dataclass(frozen=True)
class Experts:
    """One product: rows ``x``, the parameter and how N x K is read off it, the ``index`` node (None where every expert sees all rows), and the shape the product has in the graph."""

    x: fx.Node
    weight: fx.Node
    view: str
    index: fx.Node | None
    form: Literal["sorted", "weight_first", "rows_first", "dense"]


def resolve(node: fx.Node) -> Experts | Skip | None:
    """What the node is: a product with experts, one that cannot be taken (with the reason), or None: no such product."""
    if node.op != "call_function":
        return None
    if is_grouped(node.target):
        return _grouped(node)
    if node.target is torch.bmm:
        return _batched(node)
    return None


def is_grouped(target: Any) -> bool:
    """torch's grouped product, or transformers' fallback for it (a packet or an overload of an op with that name)."""
    if target in GROUPED:
        return True
    name = getattr(target, "_qualified_op_name", "") or (target.name() if isinstance(target, torch._ops.OpOverload) else "")
    return name.rpartition("::")[2].partition(".")[0] in GROUPED_NAMES if name else False


def _grouped(node: fx.Node) -> Experts | Skip:
    args = list(node.args)
    x, weight = args[0], args[1] if len(args) > 1 else node.kwargs.get("mat_b", node.kwargs.get("weight"))
    ends = node.kwargs.get("offs", args[2] if len(args) > 2 else None)
    if node.kwargs.get("bias") is not None:
        return Skip("a grouped product with a bias argument")
    parameter, transposed = _trace(weight)
    if parameter is None:
        return Skip("the experts' weights are computed in the graph")
    value = example(x)
    if ends is None or not isinstance(x, fx.Node) or value is None or value.dim() != 2:
        return Skip("a grouped product without sorted rows")
    return Experts(x, parameter, "" if transposed else "t", ends, "sorted")  # type: ignore[arg-type]


def _batched(node: fx.Node) -> Experts | Skip | None:
    first, second = node.args[0], node.args[1]
    for weight, rows, form in ((first, second, "weight_first"), (second, first, "rows_first")):
        parameter, ids, transposed = _selected(weight)
        if parameter is None:
            continue
        value, size = example(rows), example(parameter)
        if value is None or size is None or size.dim() != 3 or not isinstance(rows, fx.Node):
            continue
        plain = (form == "weight_first") != transposed  # the parameter is (E, N, K)
        if ids is None:
            return Skip("a batched product with the experts first") if form == "weight_first" else Experts(rows, parameter, "" if plain else "t", None, "dense")
        if value.shape[-1 if form == "weight_first" else 1] != 1:
            return Skip("a batched product with several columns for each expert")
        return Experts(rows, parameter, "" if plain else "t", ids, form)  # type: ignore[arg-type]
    return None


def _selected(node: Any) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """(parameter, ids, transposed) of ``W[ids]`` or ``W``, seen through transposes and casts."""
    base, transposed = _strip(node)
    if isinstance(base, fx.Node) and base.target in (operator.getitem, torch.index_select, "index_select"):
        ids = base.args[1] if base.target is operator.getitem else base.args[2]
        value = example(ids)
        if isinstance(ids, fx.Node) and isinstance(value, torch.Tensor) and value.dim() == 1 and not value.dtype.is_floating_point:
            parameter, inner = _trace(base.args[0])
            return parameter, ids, transposed != inner
        return None, None, False
    parameter, transposed = _trace(node)
    return parameter, None, transposed


def _trace(node: Any) -> tuple[fx.Node | None, bool]:
    """(3-D parameter, its last two axes swapped) or (None, False)."""
    base, transposed = _strip(node)
    value = example(base)
    if isinstance(base, fx.Node) and base.op == "placeholder" and "param" in base.meta and value is not None and value.dim() == 3:
        return base, transposed
    return None, False


def _strip(node: Any) -> tuple[Any, bool]:
    transposed = False
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if node.op == "call_method" and node.target in CASTS:
            node = node.args[0]
        elif is_transpose(node):
            node, transposed = node.args[0], not transposed
        else:
            break
    return node, transposed


def rows(product: Experts, x: torch.Tensor, index: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows (S, K), the expert of each row (S,)) of a product whose input is ``x``; ``index`` is the value of its index node."""
    if product.form == "dense":  # (E, T, K)
        return x.flatten(0, 1), torch.arange(x.shape[0], device=x.device).repeat_interleave(x.shape[1])
    assert index is not None
    if product.form == "sorted":
        return x, torch.bucketize(torch.arange(x.shape[0], device=x.device), index.to(torch.int64), right=True)
    return x.squeeze(-1 if product.form == "weight_first" else 1), index


def shaped(product: Experts, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows (S, N) of the result in the shape that the node had."""
    if product.form == "dense":
        dense: torch.Tensor = y.unflatten(0, (x.shape[0], -1))
        return dense
    return y if product.form == "sorted" else y.unsqueeze(-1 if product.form == "weight_first" else 1)
