"""``fake_quant(x, learned, scheme, estimator, activation)``: a value as inference will see it, with the estimator's gradient. There is no kernel: the reference is traced, so that Inductor
fuses it, and its backward, with what stands around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.estimators import fake_quantize, gradients
from qcompile.core.scheme import Scheme

from .op import Op


def reference(x: Tensor, learned: Sequence[Tensor], scheme: str, estimator: str, activation: bool) -> Tensor:
    """``x`` rounded, in its own shape and dtype: a weight (..., N, K), or activations (..., K). ``learned``: what the estimator learned, or a given range; see ``core/estimators.py``."""
    return fake_quantize(x, learned, Scheme.parse(scheme), estimator, activation)


def fake(x: Tensor, learned: Sequence[Tensor], scheme: str, estimator: str, activation: bool) -> Tensor:
    """Shape and dtype of ``reference``."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward reads."""
    x, learned, *ctx.how = inputs
    ctx.save_for_backward(x, *learned)


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of x and of what is learned."""
    x, *learned = ctx.saved_tensors
    scheme, estimator, activation = ctx.how
    dx, rest = gradients(grad, x, learned, Scheme.parse(scheme), estimator, activation)
    return dx, rest, None, None, None


OP = Op("fake_quant", "(Tensor x, Tensor[] learned, str scheme, str estimator, bool activation) -> Tensor", reference, fake, gradient=(backward, setup))


def moving_reference(x: Tensor, held: Tensor, momentum: float, reduce: bool) -> Tensor:
    """``held`` (2,) float32, [lo, hi] of what came so far, moved toward the range of ``x``; of zero width: nothing came yet, and the range of x is taken as it is.

    ``reduce`` takes the range over all processes of the default group, where there is one.
    """
    if not x.numel() and not reduce:
        return held.clone()
    x = x.float()
    ends = torch.stack([(-x.amin()).clamp(min=0), x.amax().clamp(min=0)]) if x.numel() else torch.zeros_like(held)  # the greatest of both: one reduction, which every process takes part in
    if reduce:
        ends = compat.all_reduce(ends, "max")
    now = torch.stack([-ends[0], ends[1]])
    return torch.where(held[1] > held[0], torch.lerp(held, now, momentum), now)


def moving_fake(x: Tensor, held: Tensor, momentum: float, reduce: bool) -> Tensor:
    """Shape and dtype of ``moving_reference``."""
    return torch.empty_like(held)


MOVING = Op("moving_range", "(Tensor x, Tensor held, float momentum, bool reduce) -> Tensor", moving_reference, moving_fake)
