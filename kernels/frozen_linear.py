"""``frozen_linear(x, weight, range, scheme)``: a linear whose quantized weight does not train, with a gradient for x alone (QLoRA: Dettmers et al. 2023, arXiv 2305.14314, equations 5 and 6).

Forward, ``y = Q(x) @ dequantize(W).T``, it is traced as ``quantize`` and ``scaled_linear``, or ``linear``: the kernels of inference. Backward, ``dx = dy @ dequantize(W)``, straight through the
rounding of x: the packed tensors are all that is kept for it, no activation and no dequantized weight. For that the backward is an op of its own, ``frozen_grad``, which AOTAutograd sees
whole: torch ops that read nothing but the codes could be run before the forward ends, and the partitioner would choose to keep what they give, the weight in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.qtensor import QTensor, dequantize
from qcompile.core.scheme import Scheme

from . import linear, quantize, scaled_linear
from .op import Op, target


def schemes(scheme: str) -> tuple[Scheme | None, Scheme]:
    """(input or None, weight) of the op's string: ``input @ weight``, or the weight's scheme alone."""
    return scaled_linear.parse(scheme) if " @ " in scheme else (None, Scheme.parse(scheme))


def reference(x: Tensor, weight: Sequence[Tensor], range: Sequence[Tensor], scheme: str) -> Tensor:
    """(..., K) -> (..., N), float32; ``weight`` as ``QTensor.flatten`` gives it, ``range`` the static range of x, empty where there is none. The same numbers as inference, to the last bit."""
    sx, _ = schemes(scheme)
    if sx is None:
        return linear.reference(x, weight, scheme)
    codes, *scale = quantize.reference(x, range, str(sx))
    return scaled_linear.reference(codes, [*(range if sx.static else scale)], weight, scheme)


def fake(x: Tensor, weight: Sequence[Tensor], range: Sequence[Tensor], scheme: str) -> Tensor:
    """Shape and dtype of ``reference``."""
    return x.new_empty((*x.shape[:-1], weight[0].shape[-2]), dtype=torch.float32)


def simplify(x: Tensor, weight: Sequence[Tensor], range: Sequence[Tensor], scheme: str) -> Any:
    """The ops of inference. They have no gradient and need none: this op's own stands above them."""
    sx, _ = schemes(scheme)
    if sx is None:
        return target("linear")(x, list(weight), scheme)
    codes, *scale = target("quantize")(x, list(range), str(sx))
    return target("scaled_linear")(codes, [*(range if sx.static else scale)], list(weight), scheme)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward reads: the packed tensors."""
    x, weight, range, scheme = inputs
    ctx.save_for_backward(*weight)
    ctx.none = [None] * len(weight), [None] * len(range)
    ctx.how = str(schemes(scheme)[1]), x.shape[-1], x.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradient of x, in its dtype."""
    scheme, k, dtype = ctx.how
    return target("frozen_grad")(grad, list(ctx.saved_tensors), scheme, k, dtype), *ctx.none, None


def grad_reference(grad: Tensor, weight: Sequence[Tensor], scheme: str, k: int, dtype: torch.dtype) -> Tensor:
    """(..., N) -> (..., K) in ``dtype``, in which both factors are multiplied: as eager PyTorch computes the gradient of a linear of that dtype."""
    w = dequantize(QTensor.unflatten(weight, Scheme.parse(scheme), k), dtype)
    return torch.mm(grad.reshape(-1, grad.shape[-1]).to(dtype), w).reshape(*grad.shape[:-1], k)


def grad_fake(grad: Tensor, weight: Sequence[Tensor], scheme: str, k: int, dtype: torch.dtype) -> Tensor:
    """Shape and dtype of ``grad_reference``."""
    return grad.new_empty((*grad.shape[:-1], k), dtype=dtype)


def _call(case: None, *args: Any) -> Any:
    """As a call, on CPUs: Inductor's C++ for unpacking takes long to compile, and is no faster."""
    return compat.fallback_kernel(target("frozen_grad"), *args)


OP = Op("frozen_linear", "(Tensor x, Tensor[] weight, Tensor[] range, str scheme) -> Tensor", reference, fake, simplify=simplify, gradient=(backward, setup))
GRAD = Op("frozen_grad", "(Tensor grad, Tensor[] weight, str scheme, int k, ScalarType dtype) -> Tensor", grad_reference, grad_fake, fallback=_call, late=True)
