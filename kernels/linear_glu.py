"""``linear_glu(x, x_scale, weight, scheme, activation, gate_first)``: a gated linear unit (Shazeer 2020, arXiv 2002.05202), ``activation(x @ gate.T) * (x @ up.T)`` in float32.

``weight`` is gate and up, one behind the other: (2 I, K), of which the first half is the gate's where ``gate_first``. ``scheme`` is that of the weight, or ``input @ weight`` where the
activations are quantized; ``x_scale`` is empty for 16-bit ones.

An epilogue of Inductor cannot read columns n and n + I of a product, so on a GPU this is a kernel of its own: the streamed loop with two tiles of weights and two sums, which meet the same
tile of activations. What follows (the cast, the next linear's static quantization) fuses into its store as into any product's. Where the product would not be streamed (many rows of 16 bits
go to a library, some formats to the general template) it stays a product of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.core.errors import Skip, unknown

from . import product, stream, tuned
from .op import FEW, Case, Kernel, Op, always, target, two_dimensional, two_dimensional_scales


@dataclass(frozen=True)
class Activation:
    """What the gate goes through: in torch, and as an expression of Triton on the float32 tile ``acc``."""

    name: str
    fn: Callable[[Tensor], Tensor]
    text: str


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("silu", F.silu, "acc * tl.sigmoid(acc)"),
        Activation("gelu", F.gelu, "0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))"),
        Activation("gelu_tanh", _gelu_tanh, "acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))"),  # 1 + tanh(u) is 2 sigmoid(2 u)
        Activation("relu", F.relu, "tl.where(acc < 0.0, 0.0, acc)"),  # NaN stays NaN
        Activation("relu_squared", _relu_squared, "tl.where(acc < 0.0, 0.0, acc * acc)"),
        Activation("sigmoid", torch.sigmoid, "tl.sigmoid(acc)"),
    )
}
"""A new one is a row here, and its spelling in ``passes/glu.py``."""


def known(activation: str) -> Activation:
    """A row of the table; OptionError with the list."""
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS, "linear_glu")
    return ACTIVATIONS[activation]


def _gated(y: Tensor, activation: str, gate_first: bool) -> Tensor:
    """The two halves of the columns of y as one."""
    half = y.shape[-1] // 2
    first, second = y.narrow(-1, 0, half), y.narrow(-1, half, half)
    gate, up = (first, second) if gate_first else (second, first)
    return known(activation).fn(gate) * up


def reference(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str, activation: str, gate_first: bool) -> Tensor:
    """(..., K) -> (..., I), float32; ``x_scale`` as ``quantize`` gives it, ``weight`` as ``QTensor.flatten`` of the (2 I, K) matrix does. OptionError for an activation that is not in the table."""
    return _gated(product.reference(x, x_scale, weight, scheme), activation, gate_first)


def apart(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str, activation: str, gate_first: bool) -> Tensor:
    """The same as a product, by the kernel that it has, and plain torch behind it."""
    return _gated(product.call(x, x_scale, weight, scheme), activation, gate_first)


def fake(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str, activation: str, gate_first: bool) -> Tensor:
    """Shape and dtype of ``reference``."""
    return x.new_empty((*x.shape[:-1], weight[0].shape[-2] // 2), dtype=torch.float32)


def case(x: Any, x_scale: Sequence[Any], weight: Sequence[Any], scheme: str, activation: str, gate_first: bool) -> Case:
    """The case of one call, that of the whole product: ``n`` counts the rows of both halves. Tensors and IR nodes alike."""
    return product.case(x, weight, scheme)


def simplify(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str, activation: str, gate_first: bool) -> Any:
    """N-D activations to 2-D; quantized weight scales to float32 scales."""
    if x.dim() != 2:
        out = target("linear_glu")(two_dimensional(x), two_dimensional_scales(x, x_scale), list(weight), scheme, activation, gate_first)
        return out.reshape(*x.shape[:-1], weight[0].shape[-2] // 2)
    if (flat := product.flattened(x, weight, scheme)) is not None:
        return target("linear_glu")(x, list(x_scale), *flat, activation, gate_first)
    return NotImplemented


def supports(c: Case) -> Skip | None:
    """Where the whole product would be streamed, and no library is ahead: asked of the product's own table of kernels."""
    kernel, reason = product.op_of(c).choose(c)
    if kernel is None:
        return reason
    if kernel.name == "triton stream":
        if c.input is None and (c.m is None or c.m > FEW):  # measured: the registers of two tiles of 16-bit operands leave room for half of the plain product's tile
            return Skip(f"more than {FEW} rows of 16 bits are faster as a product, then the activation")
        return None
    refused = stream.supports(c)
    return refused if refused is not None else Skip(f"a product of {c.m} rows is left to {kernel.name}")


def gpu_lower(c: Case, x: Any, x_scale: Sequence[Any], weight: Sequence[Any], scheme: str, activation: str, gate_first: bool) -> Any:
    """Inductor's node: (M, I) float32."""
    gate = stream.Gate(activation, known(activation).text, gate_first)
    return stream.lower(c, "linear_glu", [x, *weight, *x_scale[:1]], scheme, tuned.gated(c), gate)


OP = Op(
    "linear_glu",
    "(Tensor x, Tensor[] x_scale, Tensor[] weight, str scheme, str activation, bool gate_first) -> Tensor",
    reference,
    fake,
    case,
    (
        Kernel("triton stream, gated", "cuda", supports, gpu_lower),
        Kernel("product, then the activation", "cuda", always, None, apart),
        Kernel("product, then the activation", "cpu", always, None, apart),
    ),
    simplify,
)
