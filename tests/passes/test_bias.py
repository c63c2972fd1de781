"""Bias correction: the mean of the output is what it was, and means known without data are those of samples."""

from __future__ import annotations

import math

import pytest
import torch
from correlated import SHAPES, layer

from qcompile.core.errors import WeightError
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.passes.bias import clipped_normal_mean, correction, mean_after_norm


@pytest.mark.parametrize("spelling", ["int3.row", "uint4.g64.point", "nf4.g64/int8.g256", "uint4.g32.min/uint6.g8", "int8.b16x16"])
def test_mean_error_of_the_output_becomes_zero(spelling):
    for n, k in SHAPES:
        w, x = layer(n, k)
        x = (x + torch.randn(k)).double()
        q = quantize(w, Scheme.parse(spelling))
        error = ((dequantize(q).double() - w.double()) @ x.T).mean(1)
        left = error + correction(w, q, x.mean(0)).double()
        assert error.abs().max() > 1e-3 and left.abs().max() < 1e-6 * max(1.0, float(error.abs().max()))


@pytest.mark.parametrize("lo, hi", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 0.5)])
def test_clipped_mean_is_that_of_samples(lo, hi):
    mean = torch.tensor([0.0, 0.5, -2.0, 3.0, 7.0, -30.0, 30.0])
    std = torch.tensor([1.0, 2.0, 1.5, 4.0, 0.3, 0.1, 0.1])
    z = torch.special.ndtri((torch.arange(200000, dtype=torch.float64) + 0.5) / 200000)  # quantiles: a sample without noise
    sampled = (mean.double() + std.double() * z[:, None]).clamp(lo, hi).mean(0)
    torch.testing.assert_close(clipped_normal_mean(mean, std, lo, hi).double(), sampled, rtol=1e-4, atol=1e-4)


def test_after_a_norm():
    gamma, beta = torch.tensor([1.0, -2.0, 0.0, 0.0]), torch.tensor([0.3, -0.1, 0.7, -0.7])
    torch.testing.assert_close(mean_after_norm(gamma, beta), beta)
    assert not mean_after_norm(gamma, None).any()
    relu = mean_after_norm(gamma, beta, lo=0.0)
    assert relu[2] == beta[2] and relu[3] == 0  # a channel without variance is constant
    torch.testing.assert_close(relu[1], clipped_normal_mean(beta, gamma.abs(), 0.0, math.inf)[1])  # the sign of gamma says nothing
    torch.testing.assert_close(mean_after_norm(torch.ones(1), torch.zeros(1), lo=0.0), torch.tensor([1 / math.sqrt(2 * math.pi)]))


def test_correction_after_layer_norm_helps():
    n, k = 64, 96
    w, _ = layer(n, k)
    gamma, beta = torch.rand(k) + 0.5, torch.randn(k)
    x = torch.nn.functional.layer_norm(torch.randn(4096, k), (k,), gamma, beta).relu()
    q = quantize(w, Scheme.parse("int3.row"))
    error = ((dequantize(q) - w) @ x.T).mean(1)
    assert (error + correction(w, q, mean_after_norm(gamma, beta, lo=0.0))).norm() < 0.1 * error.norm()


def test_what_does_not_fit_is_named():
    w, _ = layer(64, 96)
    q = quantize(w, Scheme.parse("int4.row"))
    with pytest.raises(WeightError, match=r"\(64, 96\).*\(95,\)"):
        correction(w, q, torch.zeros(95))
    with pytest.raises(WeightError, match="2 values that are NaN"):
        correction(w, q, torch.tensor([float("nan"), float("inf")] + [0.0] * 94))
