"""Scales of whole tensors for training in 8 and 16 bits: powers of two, so that a scale that changes moves no value that both scales can hold."""

from __future__ import annotations

import torch
from torch import Tensor

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


def greatest(x: Tensor) -> Tensor:
    """Largest magnitude of a tensor, a float32 scalar; 0 for an empty one."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
