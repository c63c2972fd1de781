"""AdaRound: the gradient is the loss's, decisions end at 0 or 1, and no row gets worse than rounded to nearest."""

from __future__ import annotations

import pytest
import torch
from correlated import SCHEMES, SHAPES, from_h, layer, second_moment

from qcompile.core.errors import OptionError
from qcompile.core.formats import FORMATS
from qcompile.core.qtensor import dequantize, grid, scaled, unpack, unscaled, value
from qcompile.core.scheme import Scheme
from qcompile.passes import adaround, rtn
from qcompile.passes.method import output_error
from qcompile.passes.sequential_mse import row_error


def problem(spelling: str, n: int = 48, k: int = 200):
    """base, step, H and the errors of rounding to nearest, as ``relax`` takes them."""
    w, x = layer(n, k)
    h, scheme = x.T @ x / len(x), Scheme.parse(spelling)
    g = grid(w, scheme)
    low, high = adaround.neighbours(scaled(w, g), scheme.fmt)
    low, high = unscaled(low, g), unscaled(high, g)
    return w - low, high - low, h, row_error(w - dequantize(rtn.solve(w, scheme)), h)


@pytest.mark.parametrize("spelling", SCHEMES)
def test_error_falls_on_the_same_scales(spelling):
    n, k = SHAPES[SCHEMES.index(spelling) % len(SHAPES)]
    w, x = layer(n, k, dtype=torch.bfloat16)
    h, scheme = x.T @ x / len(x), Scheme.parse(spelling)
    q, plain = adaround.solve(w, scheme, second_moment(x), iterations=300), rtn.solve(w, scheme)
    after, before = w - dequantize(q), w - dequantize(plain)
    assert output_error(after, h) < 0.65 * output_error(before, h)
    assert bool((row_error(after, h) <= row_error(before, h)).all())
    assert torch.equal(value(q.scale), value(plain.scale))


def test_decisions_are_binary_at_the_end():
    soft = adaround.relax(*problem("int4.g64"), iterations=1000, rate=1e-2, regularization=1.0, warmup=0.2)
    assert float(((soft == 0) | (soft == 1)).float().mean()) > 0.99
    undecided = adaround.relax(*problem("int4.g64"), iterations=1000, rate=1e-2, regularization=0.0, warmup=0.2)
    assert float(((undecided == 0) | (undecided == 1)).float().mean()) < 0.5  # so it is the penalty that decides


@pytest.mark.parametrize("beta", [None, 20.0, 2.0])
def test_gradient_is_that_of_the_loss(beta):
    base, step, h, error = (t.double() for t in problem("nf4.g64", 16, 64))
    v = torch.randn_like(base, requires_grad=True)
    soft = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    loss = (64 / error * row_error(base - soft * step, h)).sum()
    hold = torch.rand_like(base) * 16
    if beta is not None:
        loss = loss + (hold * (1 - (2 * soft - 1).abs() ** beta)).sum()
    loss.backward()
    torch.testing.assert_close(adaround.gradient(v.detach(), base, step, h, 64 / error, hold, beta), v.grad)


def test_an_outlier_channel_is_made_up_for(monkeypatch):
    """Its weights have to be decided while others can still follow, which one penalty for all does not give."""
    x = torch.randn(1024, 256) @ torch.randn(256, 256) * torch.exp(torch.randn(256) / 2)
    x[:, 7] *= 100
    w, h, scheme = torch.randn(32, 256), x.T @ x / 1024, Scheme.parse("int4.g64")
    before = output_error(w - dequantize(rtn.solve(w, scheme)), h)
    gain = 1 - output_error(w - dequantize(adaround.solve(w, scheme, second_moment(x))), h) / before
    monkeypatch.setattr(adaround, "penalty", lambda step, h, weigh: torch.ones_like(step))
    plain = 1 - output_error(w - dequantize(adaround.solve(w, scheme, second_moment(x), regularization=16.0)), h) / before
    assert gain > 0.1 and gain > 2 * plain


def test_dead_channels_stay_at_the_nearest():
    w, x = layer(48, 200)
    dead = torch.arange(5, 60)
    x[:, dead] = 0
    scheme = Scheme.parse("int4.g64")
    q, nearest = adaround.solve(w, scheme, second_moment(x), iterations=100), rtn.solve(w, scheme)
    assert torch.equal(unpack(q)[:, dead], unpack(nearest)[:, dead]) and not torch.equal(q.codes, nearest.codes)


@pytest.mark.parametrize("name", FORMATS)
def test_neighbours_are_adjacent(name):
    fmt = FORMATS[name]
    y = torch.cat([torch.linspace(fmt.lo * 1.2 - 0.1, fmt.hi * 1.2, 997), torch.tensor([0.0, fmt.lo, fmt.hi])])
    low, high = adaround.neighbours(y, fmt)
    inside = (y >= fmt.lo) & (y <= fmt.hi)
    assert bool(((low <= y) & (y <= high))[inside].all()) and bool((low < high).all())
    every = torch.cat([low, high]).unique()
    assert not bool(((every > low[:, None]) & (every < high[:, None])).any())


def test_independent_channels_round_to_nearest():
    w, _ = layer(48, 200)
    scheme = Scheme.parse("int4.g64")
    assert torch.equal(unpack(adaround.solve(w, scheme, from_h(torch.eye(200)))), unpack(rtn.solve(w, scheme)))


def test_a_row_without_error_and_dead_channels():
    w, x = layer(48, 200)
    w[0] = 0
    x[:, 5:9] = 0
    q = adaround.solve(w, Scheme.parse("int4.g64"), second_moment(x), iterations=50)
    assert bool(torch.isfinite(dequantize(q)).all()) and not dequantize(q)[0].any()


def test_options_out_of_range():
    w, x = layer(64, 96)
    with pytest.raises(OptionError, match="iterations >= 1"):
        adaround.solve(w, Scheme.parse("int4.row"), second_moment(x), iterations=0)
