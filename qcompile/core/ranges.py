"""Range rules: from values to a scale and a zero, one signature for all.

``rule(t, scheme, axes)`` reduces ``t`` (float32) over ``axes`` (kept as size 1) and returns ``(scale, zero)``: a positive float32 scale and, for schemes with one,
the float32 zero (integer-valued for "point"). A range of zero width gets the least scale that does not overflow, so that zero stays exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .formats import Format

if TYPE_CHECKING:
    from .scheme import Scheme

TINY = 2.0**-100
"""Least scale: its reciprocal is finite in float32, and its products with the ends of every format are exact in bfloat16, so that zeros stay zeros under a minimum, too."""

RangeRule = Callable[[Tensor, "Scheme", tuple[int, ...]], tuple[Tensor, Tensor | None]]


def absmax(t: Tensor, scheme: Scheme, axes: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """The whole range: symmetric about zero without a zero point, else from the least to the greatest value, zero included.

    Symmetric: s = max|x| / q_max. With a zero: s = (r_max - r_min) / (q_max - q_min), Z = round(q_min - r_min / s) (asymmetric linear quantization).
    """
    if scheme.zero == "none":
        return scale_of(t.abs().amax(axes, keepdim=True), scheme.fmt), None
    return affine(t.amin(axes, keepdim=True), t.amax(axes, keepdim=True), scheme)


def scale_of(absolute_maximum: Tensor, fmt: Format) -> Tensor:
    """Symmetric scale that maps the absolute maximum to the greatest value of the format."""
    return (absolute_maximum / fmt.hi).clamp(min=TINY)


def affine(lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of the range [lo, hi], widened to hold zero."""
    fmt = scheme.fmt
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = ((hi - lo) / (fmt.hi - fmt.lo)).clamp(min=TINY)
    if scheme.zero == "min":
        return scale, fmt.lo * scale - lo  # q * s - m, so that q = lo of the format is the least value
    return scale, (fmt.lo - lo / scale).round().clamp(fmt.lo, fmt.hi)


RANGES: dict[str, RangeRule] = {"absmax": absmax}


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` in ``dtype``, never below it, so that a maximum is not clipped by the rounding of its own scale; at most the dtype's greatest value."""
    low = scale.to(dtype)
    up = torch.where(low.float() < scale, torch.nextafter(low, torch.full_like(low, float("inf"))), low)
    return up.clamp(max=torch.finfo(dtype).max)
