"""Scales of whole tensors for training in 8 and 16 bits: powers of two, so that a scale that changes moves no value that both scales can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.core.qtensor import nearest

LEAST = 2.0**-126
"""The least scale: that of a tensor of zeros."""


def scale_for(amax: Tensor, greatest: float) -> Tensor:
    """The least power of two that brings ``amax`` to ``greatest`` or below, float32 of the shape of ``amax``; a code times its scale is its value.

    FP8-LM (Peng et al. 2023, arXiv 2310.18313), section 2, where the scale is the reciprocal; the power of two as in its code, MS-AMP. ``amax`` is at least 0; where it is infinite or NaN the scale is
    neither finite nor of use. The exponent is read in the bits of float32: logarithms round.
    """
    ratio = (amax.float() / greatest).clamp(min=LEAST)
    bits = ratio.view(torch.int32)
    up = (bits & 0x7FFFFF) != 0
    return (((bits >> 23) + up.to(torch.int32)) << 23).view(torch.float32)


def cast(w: Tensor, dtype: torch.dtype) -> Tensor:
    """``w`` in a parameter's dtype; FP8 saturates, where torch's cast would give NaN."""
    return w.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype) if dtype.itemsize == 1 else w.to(dtype)


def round_to_dtype(w: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``w`` rounded to what a dtype can hold, nearest even, still in float32; saturating in FP8, and in float16 for magnitudes below 65520 only.

    A cast there and back would do, but Inductor leaves such casts out for 16 bits: its kernels compute in float32 (seen in torch 2.11 and 2.13). So these are rounded by arithmetic.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return cast(w, dtype).float()
    near = nearest(w, 16 if dtype is torch.bfloat16 else 13)
    if dtype is torch.bfloat16:
        return torch.where(w.isfinite(), near, w)
    least = torch.where(w < 0, w - 0.75 + 0.75, w + 0.75 - 0.75)  # below 2**-14 steps are 2**-24, as those of float32 are between 0.5 and 1
    return torch.where(w.isfinite(), torch.where(w.abs() < 2.0**-14, least, near), w)


def greatest(x: Tensor) -> Tensor:
    """Largest magnitude of a tensor, a float32 scalar; 0 for an empty one."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
