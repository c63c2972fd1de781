"""``frozen_grouped(x, index, weight, range, scheme, by_row)``: ``frozen_linear`` for stacked experts. Forward it is traced as ``quantize`` and ``grouped_linear``; the gradient of x,
``frozen_grouped_grad``, is one product for each expert that has rows, its weight dequantized for it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.qtensor import QTensor, dequantize
from qcompile.core.scheme import Scheme

from . import grouped, quantize
from .frozen_linear import schemes
from .op import Op, target


def reference(x: Tensor, index: Tensor, weight: Sequence[Tensor], range: Sequence[Tensor], scheme: str, by_row: bool) -> Tensor:
    """(S, K) -> (S, N), float32; ``index`` and ``by_row`` as ``grouped_linear`` takes them, ``range`` the static range of x. The same numbers as inference, to the last bit."""
    codes, scale = _quantized(x, range, scheme, quantize.reference)
    return grouped.reference(codes, scale, index, weight, scheme, by_row)


def _quantized(x: Tensor, range: Sequence[Tensor], scheme: str, by: Any) -> tuple[Tensor, list[Tensor]]:
    sx, _ = schemes(scheme)
    if sx is None:
        return x, []
    codes, *scale = by(x, list(range), str(sx))
    return codes, [*(range if sx.static else scale)]


def fake(x: Tensor, index: Tensor, weight: Sequence[Tensor], range: Sequence[Tensor], scheme: str, by_row: bool) -> Tensor:
    """Shape and dtype of ``reference``."""
    return x.new_empty((x.shape[0], weight[0].shape[-2]), dtype=torch.float32)


def simplify(x: Tensor, index: Tensor, weight: Sequence[Tensor], range: Sequence[Tensor], scheme: str, by_row: bool) -> Any:
    """The ops of inference, which need no gradient of their own."""
    codes, scale = _quantized(x, range, scheme, target("quantize"))
    return target("grouped_linear")(codes, scale, index, list(weight), scheme, by_row)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward reads: which rows are whose, and the packed tensors."""
    x, index, weight, range, scheme, by_row = inputs
    ctx.save_for_backward(index, *weight)
    ctx.none = [None] * len(weight), [None] * len(range)
    ctx.how = str(schemes(scheme)[1]), by_row, x.shape[-1], x.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradient of x, in its dtype."""
    index, *weight = ctx.saved_tensors
    return target("frozen_grouped_grad")(grad, index, weight, *ctx.how), None, *ctx.none, None, None


def grad_reference(grad: Tensor, index: Tensor, weight: Sequence[Tensor], scheme: str, by_row: bool, k: int, dtype: torch.dtype) -> Tensor:
    """(S, N) -> (S, K) in ``dtype``; rows of no expert get zeros."""
    out = torch.zeros((grad.shape[0], k), dtype=dtype, device=grad.device)
    for expert, rows in grouped.rows_by_expert(index, by_row, weight[0].shape[0]):
        out[rows] = grad[rows].to(dtype) @ dequantize(QTensor.unflatten([t[expert] for t in weight], Scheme.parse(scheme), k), dtype)
    return out


def grad_fake(grad: Tensor, index: Tensor, weight: Sequence[Tensor], scheme: str, by_row: bool, k: int, dtype: torch.dtype) -> Tensor:
    """Shape and dtype of ``grad_reference``."""
    return grad.new_empty((grad.shape[0], k), dtype=dtype)


def _by_expert(case: None, *args: Any) -> Any:
    """As a call: how many rows an expert has is not known before, so that a GPU is waited for."""
    return compat.fallback_kernel(target("frozen_grouped_grad"), *args)


OP = Op("frozen_grouped", "(Tensor x, Tensor index, Tensor[] weight, Tensor[] range, str scheme, bool by_row) -> Tensor", reference, fake, simplify=simplify, gradient=(backward, setup))
GRAD = Op(
    "frozen_grouped_grad", "(Tensor grad, Tensor index, Tensor[] weight, str scheme, bool by_row, int k, ScalarType dtype) -> Tensor", grad_reference, grad_fake, fallback=_by_expert
)
