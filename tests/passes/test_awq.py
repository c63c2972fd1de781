"""AWQ's factors against the textbook, its loss against the outputs themselves, and that the search never loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_smooth import linears

from qcompile.core.errors import OptionError
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.core.stats import new
from qcompile.passes.awq import TRANSFORM, awq, candidates, loss, mean_magnitude, mean_weight
from qcompile.passes.method import Linears, second_moment

SCHEMES = ("int4.g32", "uint4.g16.point", "int3.row", "nf4.g64")


def by_outputs(given: Linears, s) -> float:
    """The mean squared error over tokens, computed on the rows."""
    x = given.stats["samples"]["rows"].double()
    return sum(float(((x / s) @ dequantize(quantize(w * s, scheme)).double().T - x @ w.double().T).square().sum()) for w, scheme in zip(given.weights, given.schemes)) / len(x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_is_that_of_the_outputs(scheme):
    given = linears(weight=scheme, input=None)
    h = second_moment(given.stats)
    for s in (torch.ones(48), torch.rand(48) + 0.5):
        assert loss(given, h, s) == pytest.approx(by_outputs(given, s), rel=1e-3)


def test_textbook():
    given = linears(input=None)
    x = np.abs(given.stats["samples"]["rows"].double().numpy()).mean(0)
    for i, s in enumerate(candidates(given, mean_magnitude(given, "awq"))):
        expected = np.maximum(x ** (i / 20), 1e-4)
        np.testing.assert_allclose(s.numpy(), expected / np.sqrt(expected.max() * expected.min()), rtol=1e-5)


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("k", [48, 37, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_never_worse_than_no_scaling(scheme, k, duo):
    given = linears(k=k, weight=scheme, input=None, seed=k)
    h = second_moment(given.stats)
    s = awq(given, duo=duo)
    every = [loss(given, h, c) for c in (torch.ones(k), *candidates(given, mean_magnitude(given, "awq"), duo))]
    assert s.shape == (k,) and bool((s > 0).all()) and loss(given, h, s) == min(every)


@pytest.mark.parametrize("scheme", ["int4.g32", "int3.row"])
def test_large_channels_are_spared(scheme):
    given = linears(weight=scheme, input=None, tokens=256)
    assert by_outputs(given, awq(given)) < 0.8 * by_outputs(given, torch.ones(48))


@pytest.mark.parametrize("duo", [False, True])
def test_channels_that_are_always_zero(duo):
    """They get 1 and do not spoil the normalization of the others; weights of zero are as good as any."""
    given = linears(weight="int4.g32", input=None, dead=(0, 9), unused=(4,))
    s = awq(given, duo=duo)
    assert s[[0, 9]].tolist() == [1, 1] and bool(s.isfinite().all()) and bool((s > 0).all())
    live = [i for i in range(48) if i not in (0, 9)]
    for c in candidates(given, mean_magnitude(given, "awq"), duo):
        assert float(c[live].max() * c[live].min()) == pytest.approx(1, rel=1e-4)
    silent = linears(weight="int4.g32", input=None, dead=range(48))
    assert torch.equal(awq(silent, duo=duo), torch.ones(48))


def test_mean_weights_are_relative_to_their_group():
    w = torch.tensor([[1.0, -2.0, 4.0, 0.5, 3.0], [0.0, 0.0, 1.0, 1.0, -6.0]])
    given = Linears([w], [Scheme.parse("int4.g2")], None, {})
    torch.testing.assert_close(mean_weight(given), torch.tensor([0.25, 0.5, 1.0, 0.5625, 1.0]))


def test_what_is_refused():
    given = linears()
    with pytest.raises(OptionError, match="awq needs the statistic 'hessian'"):
        awq(Linears(given.weights, given.schemes, None, {"moments": given.stats["moments"]}))
    with pytest.raises(OptionError, match="'moments' has seen no tokens"):
        awq(Linears(given.weights, given.schemes, None, new(("moments", "hessian"), 48)))
    assert TRANSFORM.fn is awq and TRANSFORM.needs == ("moments", "hessian")
