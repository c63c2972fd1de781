"""Bias correction: quantization shifts the mean of an output by ``(W_q - W) E[x]``; add the opposite to the bias.

Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2 and appendix A-C. Two ways to know E[x]:

 * empirical: the mean of the inputs over the calibration (statistic "moments");
 * analytical, without data: a normalization before the linear fixes the distribution of its output, N(beta, gamma^2) for each channel, and a clipped activation between has a mean in closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.core.errors import WeightError
from qcompile.core.qtensor import QTensor, dequantize

NEEDS = ("moments",)
"""Statistics that the empirical correction reads."""


def correction(weight: Tensor, q: QTensor, mean_x: Tensor) -> Tensor:
    """``(W - W_q) E[x]``, (N,) float32, to be added to the bias. ``weight`` (N, K) as it was quantized, ``mean_x`` (K,). Raises WeightError where shapes or values do not fit."""
    if tuple(weight.shape) != q.shape or mean_x.shape != weight.shape[-1:]:
        raise WeightError(f"bias correction of a weight of shape {tuple(weight.shape)} needs its own quantized form, not one of {q.shape}, and a mean of its K inputs, not {tuple(mean_x.shape)}")
    if not bool(torch.isfinite(mean_x).all()):
        raise WeightError(f"bias correction: the mean of the input has {int((~torch.isfinite(mean_x)).sum())} values that are NaN or infinite; look for infinite activations in the calibration data")
    delta = weight.double() - dequantize(q).double()  # N x K is read once: float64 costs nothing, and a mean over many channels cancels
    return (delta @ mean_x.to(delta)).float()


def mean_after_norm(gamma: Tensor, beta: Tensor | None, lo: float = -math.inf, hi: float = math.inf) -> Tensor:
    """E[x] of each channel, (K,) float32, where ``x = clip(gamma * z + beta, lo, hi)`` and z is standard normal: a normalization, followed by nothing, ReLU (lo = 0) or ReLU6 (lo = 0, hi = 6).

    That z is standard normal in each channel is an assumption: batch norm makes its mean zero, layer norm only on average over channels. A norm without beta (RMSNorm) gives zero.
    """
    mean = torch.zeros_like(gamma) if beta is None else beta
    return clipped_normal_mean(mean.float(), gamma.float().abs(), lo, hi)


def clipped_normal_mean(mean: Tensor, std: Tensor, lo: float, hi: float) -> Tensor:
    """``E[clip(X, lo, hi)]`` for X ~ N(mean, std^2), elementwise: std (phi(a) - phi(b)) + mean (Phi(b) - Phi(a)) + lo Phi(a) + hi (1 - Phi(b)), a = (lo - mean) / std, b = (hi - mean) / std.

    Nagel et al. 2019, appendix C. Where std is 0 the channel is constant: clip(mean).
    """
    m, s = mean.double(), std.double()
    safe = s.clamp(min=torch.finfo(torch.float32).tiny)
    a, b = (lo - m) / safe, (hi - m) / safe

    def density(t: Tensor) -> Tensor:
        return torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)  # each tail by itself: 1 - Phi(b) would cancel
    out = safe * (density(a) - density(b)) + m * (1 - below - above)
    out = out + (lo * below if math.isfinite(lo) else 0) + (hi * above if math.isfinite(hi) else 0)
    return torch.where(s > 0, out, m.clamp(lo, hi)).to(mean.dtype)
