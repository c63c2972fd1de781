"""``split_linear(x, x_scale, weight, x16, w16, index, gather_x, gather_w, scheme)``: a quantized product and, beside it, some columns in 16 bits: ``dequantize(x) @ dequantize(weight).T + x16 @ w16.T``
in float32, LLM.int8()'s decomposition (Dettmers et al. 2022, equation 8).

``index`` (C,) names the columns, -1 is none, and ``x`` has zeros there. ``x16`` are all columns (..., K) where ``gather_x``, else these alone, (..., C); so are ``w16``, (N, K) or (N, C).
``scheme`` is that of the weight, or ``input @ weight`` where the activations are quantized; ``x_scale`` is empty for 16-bit ones.

On a GPU one kernel adds the columns to the sums before it stores them. With few rows it gathers them itself, too; where the product is not streamed, they are a product of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import Skip

from . import product, stream, tuned
from .beside import Beside
from .op import FEW, Case, Kernel, Op, always, target, two_dimensional, two_dimensional_scales

ROWS = 8
"""Up to so many rows the kernel gathers columns of the activations itself: two bytes of each row and column take a sector of their own, for every tile of the weight."""
COLUMNS = 256
"""More of them are a product that a library is better at; the kernel's dots are written out."""


def gathered_x(x16: Tensor, index: Tensor, gather: bool) -> Tensor:
    """(..., C) of the op's ``x16``; zeros where ``index`` is -1."""
    return torch.where(index >= 0, x16.index_select(-1, index.clamp(min=0)), 0) if gather else x16


def gathered_w(w16: Tensor, index: Tensor, gather: bool) -> Tensor:
    """(N, C) of the op's ``w16``; any column where ``index`` is -1."""
    return w16.index_select(-1, index.clamp(min=0)) if gather else w16


def reference(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], x16: Tensor, w16: Tensor, index: Tensor, gather_x: bool, gather_w: bool, scheme: str) -> Tensor:
    """(..., N) float32. Columns of the weight are rounded to the dtype of ``x16``, as the factors of any linear of that dtype are."""
    return product.reference(x, x_scale, weight, scheme) + gathered_x(x16, index, gather_x).float() @ gathered_w(w16, index, gather_w).to(x16.dtype).float().T


def fake(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], x16: Tensor, w16: Tensor, index: Tensor, gather_x: bool, gather_w: bool, scheme: str) -> Tensor:
    """Shape and dtype of ``reference``."""
    return x.new_empty((*x.shape[:-1], weight[0].shape[-2]), dtype=torch.float32)


def case(x: Any, x_scale: Sequence[Any], weight: Sequence[Any], x16: Any, w16: Any, index: Any, gather_x: bool, gather_w: bool, scheme: str) -> Case:
    """That of the quantized product."""
    return product.case(x, weight, scheme)


def simplify(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], x16: Tensor, w16: Tensor, index: Tensor, gather_x: bool, gather_w: bool, scheme: str) -> Any:
    """N-D activations to 2-D; quantized weight scales to float32 scales; columns gathered first where many rows or tiles of them would gather the same again and again, or strides are long."""
    op = target("split_linear")
    if x.dim() != 2:
        out = op(two_dimensional(x), two_dimensional_scales(x, x_scale), list(weight), two_dimensional(x16), w16, index, gather_x, gather_w, scheme)
        return out.reshape(*x.shape[:-1], weight[0].shape[-2])
    if (flat := product.flattened(x, weight, scheme)) is not None:
        return op(x, list(x_scale), flat[0], x16, w16, index, gather_x, gather_w, flat[1])
    c = product.case(x, weight, scheme)
    if c.device.type != "cuda":
        return NotImplemented
    if x16.dtype.itemsize != 2 or int(index.shape[0]) > COLUMNS:
        return apart(x, x_scale, weight, x16, w16, index, gather_x, gather_w, scheme)
    first_x = gather_x and (c.m is None or c.m > ROWS)
    first_w = gather_w and (c.m is None or c.m > FEW or w16.stride(-1) != 1)
    if first_x or first_w:
        return op(x, list(x_scale), list(weight), gathered_x(x16, index, first_x), gathered_w(w16, index, first_w), index, gather_x and not first_x, gather_w and not first_w, scheme)
    return NotImplemented


def apart(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], x16: Tensor, w16: Tensor, index: Tensor, gather_x: bool, gather_w: bool, scheme: str) -> Tensor:
    """The same as two products and their sum, the quantized one by the kernel that it has."""
    w = gathered_w(w16, index, gather_w).to(x16.dtype)
    return product.call(x, x_scale, weight, scheme) + (gathered_x(x16, index, gather_x) @ w.transpose(0, 1)).float()


def supports(c: Case) -> Skip | None:
    """Where the quantized product would be streamed: asked of its own table of kernels."""
    kernel, reason = product.op_of(c).choose(c)
    if kernel is None:
        return reason
    return None if kernel.name == "triton stream" else Skip(f"a product of {c.m} rows is left to {kernel.name}")


def _gpu_lower(c: Case, x: Any, x_scale: Sequence[Any], weight: Sequence[Any], x16: Any, w16: Any, index: Any, gather_x: bool, gather_w: bool, scheme: str) -> Any:
    beside = Beside(int(compat.sizes(index)[0]), gather_x, gather_w)
    return stream.lower(c, "split_linear", [x, *weight, *x_scale[:1], x16, w16, *([index] if beside.indexed else [])], scheme, tuned.config(c), beside=beside)


OP = Op(
    "split_linear",
    "(Tensor x, Tensor[] x_scale, Tensor[] weight, Tensor x16, Tensor w16, Tensor index, bool gather_x, bool gather_w, str scheme) -> Tensor",
    reference,
    fake,
    case,
    (
        Kernel("triton stream, and columns", "cuda", supports, _gpu_lower),
        Kernel("two products", "cuda", always, None, apart),
        Kernel("two products", "cpu", always, None, apart),
    ),
    simplify,
)
