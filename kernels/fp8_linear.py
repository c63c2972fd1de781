"""``fp8_linear``: the linear of FP8 training. y = x W^T multiplies in E4M3, and its backward dx = g W, dw = g^T x in the gradient's format, each with a scale per tensor or per row.

Every product is ``fp8_product``, a (M, K) times b (N, K) transposed, both with rows that lie together, which is what FP8 tensor cores read: the backward transposes FP8 codes, one byte each. The
op gives the codes that its backward needs beside y, so that eager autograd and AOTAutograd save those and not 16-bit tensors; a bias is added behind it, and keeps its gradient in 16 bits.

======= ========================================= ======== ============= ===============================================================================================
name    scales                                    gradient accumulation  source
======= ========================================= ======== ============= ===============================================================================================
tensor  one for each tensor, of its values now    E5M2     y fast        Transformer Engine's ``Float8CurrentScaling``, torchao's "tensorwise"
row     one for each row of each operand of each  E4M3     all fast      torchao's "rowwise": x, W and g are cast twice, along either axis, since each product sums along another
        product, of its values now
delayed one for each tensor, of calls before      E5M2     y fast        Transformer Engine's ``DelayedScaling``, see ``fp8_history``
======= ========================================= ======== ============= ===============================================================================================

E4M3 forward and E5M2 backward: Micikevicius et al. 2022 (arXiv 2209.05433), table 1. A scale multiplies before the cast, its reciprocal after the product. Where x, W or g hold inf or NaN the
products that read them are NaN, as in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.ranges import TINY
from qcompile.core.scheme import Scheme

from .fp8_history import BACK, E4M3, E5M2, entered, highest
from .op import Case, Kernel, Op, target, two_dimensional

STEP = 16
"""The library takes FP8 operands whose sizes are multiples of this."""


@dataclass(frozen=True)
class Scaling:
    """One row of the table above. ``fast``: the products of the backward accumulate fast, too; the forward's always does."""

    name: str
    by_row: bool
    delayed: bool
    gradient: torch.dtype
    fast: bool
    doc: str


_ROWS = (
    Scaling("tensor", False, False, E5M2, False, "one scale for each tensor, of its values now"),
    Scaling("row", True, False, E4M3, True, "one scale for each row of each operand, of its values now"),
    Scaling("delayed", False, True, E5M2, False, "one scale for each tensor, of the largest magnitudes of the calls before"),
)
SCALINGS: dict[str, Scaling] = {row.name: row for row in _ROWS}


def largest(x: Tensor, axis: int | None = None) -> Tensor:
    """The largest magnitude of x (M, K): (1, 1), or along one axis (M, 1) or (1, K); float32. Of the whole tensor it is taken by rows first, which fuses into a norm before it."""
    if 0 in x.shape:
        return x.new_zeros((1, 1) if axis is None else (x.shape[0], 1) if axis % 2 else (1, x.shape[1]), dtype=torch.float32)
    along = x.abs().amax(-1 if axis is None else axis, keepdim=True)
    return (along.amax(0, keepdim=True) if axis is None else along).float()


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, given: bool = False) -> Tensor:
    """``x`` times a scale as FP8. A ``given`` scale may be too large: what is beyond the format saturates, while inf becomes NaN (E4M3 has no inf), so that a loss scaler sees it."""
    hi = highest(dtype)
    z = x.float() * scale
    y = z.clamp(-hi, hi)
    return (y + (z - z) if given else y).to(dtype)  # inf - inf is NaN; as a constant NaN would differ from itself, and casts of the same x would not be made one


def scaled(x: Tensor, dtype: torch.dtype, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """(codes of x (M, K), what multiplies them back): one number, or along an axis (M, 1) or (1, K). Where x holds inf or NaN the latter is not finite."""
    scale = highest(dtype) / largest(x, axis).clamp(min=TINY)
    return cast(x, scale, dtype), 1 / scale


def product_reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """Codes (M, K) and (N, K) in FP8, scales (M, 1) or (1, 1) and (N, 1) or (1, 1) in float32 -> (M, N) in ``dtype``, summed in float32. ``fast`` is a hint to the library."""
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b.float().T * a_scale * b_scale.reshape(1, -1)).to(dtype)


def product_fake(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """Shape and dtype of ``product_reference``."""
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def product_case(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Case:
    """The case of one call; its K may be any size, since the trace pads it."""
    return case_of(compat.device_of(a), dtype, compat.sizes(b)[0], STEP)


def case_of(device: torch.device, dtype: torch.dtype, n: int, k: int) -> Case:
    """The case of a linear with an (N, K) weight, all three of its products."""
    return Case(device, dtype, Scheme.parse("e4m3.tensor"), Scheme.parse("e4m3.tensor"), n, k)


def supports(c: Case) -> Skip | None:
    if c.compute_capability < (8, 9):
        return Skip(f"FP8 matmul needs compute capability 8.9, this device has {c.compute_capability}")
    if c.n % STEP or c.k % STEP:
        return Skip(f"FP8 training needs sizes that are multiples of {STEP}, found {c.n} x {c.k}")
    return None


def product_simplify(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Any:
    """For the library: sums along a multiple of 16 are padded, and scales by rows come out in bfloat16."""
    if PRODUCT.choose(product_case(a, a_scale, b, b_scale, dtype, fast))[0] is None:
        return NotImplemented
    if extra := -a.shape[1] % STEP:
        a, b = (F.pad(t.view(torch.uint8), (0, extra)).view(t.dtype) for t in (a, b))
        return target("fp8_product")(a, a_scale, b, b_scale, dtype, fast)
    if dtype != torch.bfloat16 and (a_scale.shape[0] != 1 or b_scale.shape[0] != 1):
        return target("fp8_product")(a, a_scale, b, b_scale, torch.bfloat16, fast).to(dtype)
    return NotImplemented


def _lower(case: Case, a: Any, a_scale: Any, b: Any, b_scale: Any, dtype: torch.dtype, fast: bool) -> Any:
    return compat.scaled_mm(a, a_scale, b, b_scale, dtype, fast)


PRODUCT = Op(
    "fp8_product",
    "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType dtype, bool fast) -> Tensor",
    product_reference,
    product_fake,
    product_case,
    (Kernel("scaled_mm", "cuda", supports, _lower),),
    product_simplify,
)


def transpose_reference(codes: Tensor, after: Tensor) -> Tensor:
    """Codes (M, K) as (K, M), rows together. ``after`` is any gradient: what depends on one is computed in the backward, so that codes are saved once, or, in a checkpointed body, not at all."""
    return codes.t().contiguous()


def transpose_fake(codes: Tensor, after: Tensor) -> Tensor:
    """Shape and dtype of ``transpose_reference``."""
    return codes.new_empty((codes.shape[1], codes.shape[0]))


TRANSPOSE = Op(
    "fp8_transpose",
    "(Tensor codes, Tensor after) -> Tensor",
    transpose_reference,
    transpose_fake,
    lambda codes, after: Case(compat.device_of(codes), torch.uint8, Scheme.parse("e4m3.tensor"), None, 1, 1),
    (Kernel("transpose", "cuda", lambda case: None, lambda case, codes, after: compat.transposed(codes)),),
)

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(x: Tensor, weight: Tensor, numbers: Sequence[Tensor], history: Sequence[Tensor], row: int, first: int, scaling: str) -> Parts:
    """x (..., K), weight (N, K) -> y (..., N) in x's dtype; codes of x (M, K) and of the weight (N, K) for the backward, with what multiplies them back; and their largest magnitudes (2,).

    ``numbers`` [(S, NUMBERS)] and ``history`` [(S, 1, L)] are of delayed scaling (``fp8_history``), empty otherwise: this linear's are at ``row``, its input's at ``first``, that of the first linear
    that reads the same input.
    """
    how, flat, multiply = SCALINGS[scaling], two_dimensional(x), target("fp8_product")
    if how.by_row:
        y = multiply(*scaled(flat, E4M3, -1), *scaled(weight, E4M3, -1), x.dtype, True)
        saved = (*scaled(flat, E4M3, 0), *scaled(weight, E4M3, 0))
        amax = x.new_zeros(2, dtype=torch.float32)
    elif how.delayed:
        codes, w_codes = cast(flat, numbers[0][first, 0], E4M3, True), cast(weight, numbers[0][row, 1], E4M3, True)
        y = multiply(codes, _back(numbers[0], first, 0), w_codes, _back(numbers[0], row, 1), x.dtype, True)
        saved = (codes, x.new_zeros((1, 1), dtype=torch.float32), w_codes, x.new_zeros((1, 1), dtype=torch.float32))  # the numbers say it: no output may be a part of an input
        amax = torch.cat([largest(flat), largest(weight)]).reshape(2)
    else:
        saved = (*scaled(flat, E4M3), *scaled(weight, E4M3))
        y = multiply(*saved, x.dtype, True)
        amax = x.new_zeros(2, dtype=torch.float32)
    return y.reshape(*x.shape[:-1], weight.shape[0]), *saved, amax


def _back(numbers: Tensor, row: int, role: int) -> Tensor:
    """What multiplies codes back, (1, 1): a view of the numbers."""
    return numbers[row, BACK + BACK * role].reshape(1, 1)


def fake(x: Tensor, weight: Tensor, numbers: Sequence[Tensor], history: Sequence[Tensor], row: int, first: int, scaling: str) -> Parts:
    """Shapes and dtypes of ``reference``."""
    flat = two_dimensional(x)
    m, (n, k) = flat.shape[0], weight.shape
    columns = k if SCALINGS[scaling].by_row else 1
    codes = (x.new_empty((m, k), dtype=E4M3), x.new_empty((1, columns), dtype=torch.float32))
    return x.new_empty((*x.shape[:-1], n)), *codes, x.new_empty((n, k), dtype=E4M3), x.new_empty((1, columns), dtype=torch.float32), x.new_empty(2, dtype=torch.float32)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    """Keep what the backward reads: codes of x where the weight is trained, codes of the weight where x needs a gradient. The history is no saved tensor: other linears write to it meanwhile."""
    x, weight, numbers, ctx.history, ctx.row, ctx.first, scaling = inputs
    _, codes, back, w_codes, w_back, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (x.dtype, weight.dtype)
    ctx.needs = ctx.needs_input_grad[:2]
    ctx.save_for_backward(*((w_codes, w_back) if ctx.needs[0] else ()), *((codes, back) if ctx.needs[1] else ()), *numbers)


def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of x and of the weight, in their dtypes; the largest magnitude of the gradient enters the history."""
    rest = ([None] * len(ctx.history), [None] * len(ctx.history), None, None, None)
    if grad is None:
        return None, None, *rest
    how, g = SCALINGS[ctx.scaling], two_dimensional(grad)
    held = list(ctx.saved_tensors)
    w, x = (((held.pop(0), held.pop(0)) if needed else None) for needed in ctx.needs)
    along = across = None
    if how.by_row:
        along, across = scaled(g, how.gradient, -1) if w else None, scaled(g, how.gradient, 0) if x else None
    elif how.delayed:
        w, x = (w[0], _back(held[0], ctx.row, 1)) if w else None, (x[0], _back(held[0], ctx.first, 0)) if x else None
        along = across = _delayed(g, held[0], ctx.row, ctx.history[0][ctx.row], how)
    else:
        along = across = scaled(g, how.gradient)
    dx = None if w is None or along is None else _times(*along, *w, g, ctx.dtypes[0], how.fast).reshape(ctx.shape)
    dw = None if x is None or across is None else _times(target("fp8_transpose")(across[0], g), across[1].reshape(-1, 1), *x, g, ctx.dtypes[1], how.fast)
    return dx, dw, *rest


def _delayed(g: Tensor, numbers: Tensor, row: int, history: Tensor, how: Scaling) -> tuple[Tensor, Tensor]:
    """Codes of a gradient under the scale of calls before. It is written to in place: AOTAutograd keeps that in the graph of the backward."""
    with torch.no_grad():
        history.copy_(entered(history, numbers[row, 2:3], numbers[row, 3:4], largest(g).reshape(1), highest(how.gradient)))
    return cast(g, numbers[row, 2], how.gradient, True), _back(numbers, row, 2)


def _times(a: Tensor, a_back: Tensor, b: Tensor, b_back: Tensor, g: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a (M, K) times b (K, N), whose scale is along N."""
    return target("fp8_product")(a, a_back, target("fp8_transpose")(b, g), b_back.reshape(-1, 1), dtype, fast)  # type: ignore[no-any-return]


OP = Op(
    "fp8_linear",
    "(Tensor x, Tensor weight, Tensor[] numbers, Tensor[] history, int row, int first, str scaling) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    fake,
    gradient=(backward, setup),
)


def kernel_for(device: torch.device, dtype: torch.dtype, n: int, k: int) -> str | Skip:
    """The name of what multiplies for a linear, or why it is emulated."""
    kernel, reason = PRODUCT.choose(case_of(device, dtype, n, k))
    if kernel is None:
        assert reason is not None
        return reason
    return kernel.name


__all__ = ["OP", "PRODUCT", "SCALINGS", "TRANSPOSE", "Scaling", "backward", "kernel_for"]
