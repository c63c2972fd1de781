"""Bias correction: the mean of the output is what it was, and means known without data are those of samples."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from calibrated import solutions
from correlated import SHAPES, layer
from small import close, said
from torch import nn

import qcompile
from qcompile.calibrate import calibrate
from qcompile.core.errors import WeightError
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import Choice, Method
from qcompile.core.scheme import Scheme
from qcompile.passes.bias import clipped_normal_mean, correction, mean_after_norm
from qcompile.solve import first_needs, needs_data, then_needs


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


# --- as a step of a recipe, without data ---------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Two linears behind a norm; the input of the third comes from neither."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(32), nn.Linear(32, 48, bias=False), nn.Linear(32, 48), nn.Linear(48, 16)
        with torch.no_grad():
            self.norm.weight.add_(0.3 * torch.randn(32))
            self.norm.bias.add_(torch.randn(32))

    def forward(self, x):
        x = self.norm(x)
        return self.c(torch.tanh(self.a(x)) * self.b(x))


BY_NORM = {"weight": "int3.row", "lower": "eager"}


@torch.no_grad()
@pytest.mark.parametrize("extra", [[], ["smooth"], ["smooth", "outliers(columns=3)"], ["gptq"]], ids="+".join)
def test_by_the_norm_before(extra):
    """Once compiled, with nothing but weights where no other step wants data; where none precedes, the note says why."""
    model, x = Normed(), torch.randn(64, 32)
    fast = torch.compile(model, backend="qcompile", options=BY_NORM | {"passes": [*extra, "bias(data=False)"]})
    with said() as texts:
        y = fast(x)
    found = solutions(model)
    for name in ("a", "b"):
        s, w = found[name], getattr(model, name).weight
        mean = model.norm.bias if s.smooth is None else model.norm.bias / s.smooth
        mean = mean if s.outliers is None else mean.index_fill(0, s.outliers, 0.0)
        q = s.q if s.q is not None else quantize(s.prepared(w), Scheme.parse("int3.row"))
        torch.testing.assert_close(s.bias, correction(s.prepared(w), q, mean))
    assert found["c"].bias is None and any("c: the bias is not corrected without data: no norm makes the input" in t for t in texts)
    assert close(y, model(x), 0.6)


@torch.no_grad()
def test_by_the_norm_no_moments_are_taken():
    choice = Choice(Scheme.parse("int3.row"), None, "", (Method.parse("bias(data=False)"),))
    assert needs_data(choice) and not first_needs(choice) and not then_needs(choice)
    assert then_needs(replace(choice, methods=(Method.parse("bias"),))) == ("moments",)


@torch.no_grad()
def test_by_the_norm_offline():
    """Any values serve ``quantize``, and the mean of normal data moves less."""
    plain, model, x = Normed(), Normed(), torch.randn(4096, 32)
    plain.load_state_dict(model.state_dict())
    normed = model.norm(x)
    exact = model.a(normed).mean(0)
    model.dummy_inputs = {"x": torch.zeros(1, 32)}
    with said():
        qcompile.quantize(model, "W4A16", weight="int3.row", passes=["bias(data=False)"], progress=False)
    fast = torch.compile(model.a, backend="qcompile", options={"lower": "eager"})
    rounded = normed @ dequantize(quantize(plain.a.weight, Scheme.parse("int3.row"))).T
    assert (fast(normed).mean(0) - exact).norm() < 0.2 * (rounded.mean(0) - exact).norm()


@torch.no_grad()
def test_from_a_file_of_statistics(tmp_path):
    model, x = Normed(), torch.randn(64, 32)
    fast = torch.compile(model, backend="qcompile", options=BY_NORM | {"passes": ["smooth", "bias(data=False)"]})
    with said():
        calibrate(fast, [x], progress=False).save(tmp_path / "seen")
        twin = Normed()
        twin.load_state_dict(model.state_dict())
        torch.compile(twin, backend="qcompile", options=BY_NORM | {"passes": ["smooth", "bias(data=False)"], "calibration": tmp_path / "seen"})(x)
    assert torch.equal(solutions(twin)["a"].bias, solutions(model)["a"].bias) and solutions(twin)["c"].bias is None
