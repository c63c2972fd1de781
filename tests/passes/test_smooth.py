"""SmoothQuant's factors against the textbook in float64, their limits, and the search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.core.errors import OptionError
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.core.stats import new, update_all
from qcompile.kernels.quantize import reference
from qcompile.passes.method import Linears
from qcompile.passes.smooth import TRANSFORM, candidates, column_maxima, factor, joint_error, rounded, rounded_input, smooth

EVERY = ("absmax", "minmax", "moments", "hessian", "samples")


def linears(k=48, rows=(32, 20), weight="int8.row", input="int8.row", seed=0, tokens=64, dead=(), unused=()) -> Linears:
    """Linears that read rows with a few channels of large values; ``dead`` channels are always zero, ``unused`` ones meet zero weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) * torch.where(torch.rand(k, generator=g) < 0.1, 30.0, 1.0)
    x[:, list(dead)] = 0
    weights = [torch.randn(n, k, generator=g) * 0.1 for n in rows]
    for w in weights:
        w[:, list(unused)] = 0
    scheme = None if input is None else Scheme.parse(input)
    return Linears(weights, [Scheme.parse(weight)] * len(rows), scheme, update_all(new(EVERY, k), x))


def error(given: Linears, s) -> float:
    x = given.stats["samples"]["rows"]
    return float(joint_error(given, x, [x @ w.T for w in given.weights], s))


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.85])
def test_textbook(alpha):
    given = linears()
    x, w = given.stats["samples"]["rows"].double().numpy(), np.concatenate([w.double().numpy() for w in given.weights])
    expected = np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha)
    np.testing.assert_allclose(smooth(given, alpha=alpha).numpy(), expected, rtol=1e-6)


def test_half_makes_both_ranges_equal():
    given = linears()
    s = smooth(given)
    torch.testing.assert_close(given.stats["absmax"]["absmax"] / s, column_maxima(given.weights) * s)


def test_limits():
    """alpha 1 moves the whole range into the weights, alpha 0 that of the weights into the activations."""
    given = linears()
    torch.testing.assert_close(given.stats["absmax"]["absmax"] / smooth(given, alpha=1), torch.ones(48))
    torch.testing.assert_close(column_maxima(given.weights) * smooth(given, alpha=0), torch.ones(48))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1, "auto"])
def test_channels_with_nothing_to_share(alpha):
    s = smooth(linears(dead=(3, 7), unused=(5, 7)), alpha=alpha)
    assert s[[3, 5, 7]].tolist() == [1, 1, 1] and bool((s > 0).all()) and bool(s.isfinite().all())


def test_the_least_factor():
    assert factor(torch.tensor([1e-12]), torch.tensor([1.0]), 0.5).item() == pytest.approx(1e-5)


@pytest.mark.parametrize("k", [48, 37, 16])
@pytest.mark.parametrize(("weight", "input"), [("int8.row", "int8.row"), ("int4.g32", "int8.tensor.static"), ("uint4.g32.point", None), ("e4m3.row", "uint8.row.point"), ("nf4.g16", "e4m3.tensor")])
def test_auto_is_no_worse_than_any_alpha(k, weight, input):
    given = linears(k=k, weight=weight, input=input, seed=k)
    least = error(given, smooth(given, alpha="auto"))
    every = [error(given, s) for s in [torch.ones(k), *candidates(given.stats["absmax"]["absmax"], column_maxima(given.weights))]]
    assert least == min(every) and max(every) > least


def test_smoothing_helps_where_outliers_are():
    given = linears(weight="int8.row", input="int8.tensor")
    assert error(given, smooth(given)) < 0.5 * error(given, torch.ones(48))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 70), alpha=st.floats(0, 1))
def test_the_product_is_kept(seed, k, alpha):
    case = linears(k=k, seed=seed, tokens=9)
    s = smooth(case, alpha=alpha).double()
    assert bool((s > 0).all())
    x, w = case.stats["samples"]["rows"].double(), case.weights[0].double()
    torch.testing.assert_close((x / s) @ (w * s).T, x @ w.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("scheme", ["int8.row", "int4.g32", "uint4.g16.point", "nf4.g64/int8.row", "uint4.g32.min/uint6.g8", "e4m3.b16x16"])
def test_rounded_weights_are_those_that_are_stored(scheme):
    w = torch.randn(20, 37)
    assert torch.equal(rounded(w, Scheme.parse(scheme)), dequantize(quantize(w, Scheme.parse(scheme))))


@pytest.mark.parametrize("scheme", ["int8.row", "int8.tensor", "int8.g16", "e4m3.row", "uint8.row.point"])
def test_rounded_inputs_are_what_the_kernel_reads(scheme):
    x = torch.randn(9, 37) * 3
    codes, scale, *zero = reference(x, [], scheme)
    group = Scheme.parse(scheme).extent(1, 37)[1]
    if scheme == "int8.g16":
        scale = scale.repeat_interleave(group, 1)[:, :37]
    torch.testing.assert_close(rounded_input(x, Scheme.parse(scheme)), (codes.float() - (zero[0] if zero else 0)) * scale, rtol=1e-6, atol=1e-6)


def test_a_static_range_spans_what_was_seen_outside_the_rows():
    x = torch.randn(4, 8)
    stats = update_all(new(("absmax",), 8), torch.full((1, 8), 12.7))
    read = rounded_input(x, Scheme.parse("int8.tensor.static"), stats, torch.full((8,), 1.0))
    torch.testing.assert_close(read, (x * 10).round() / 10)
    assert rounded_input(x, None) is x


def test_what_is_refused():
    given = linears()
    for alpha in (-0.1, 1.5, "most", True):
        with pytest.raises(OptionError, match="alpha is a number from 0 to 1"):
            smooth(given, alpha=alpha)
    with pytest.raises(OptionError, match="needs the statistic 'absmax'"):
        smooth(Linears(given.weights, given.schemes, None, {}))
    with pytest.raises(OptionError, match="has \\[48\\] channels"):
        smooth(Linears([torch.randn(4, 16)], given.schemes[:1], None, given.stats))
    with pytest.raises(OptionError, match="'samples' holds no rows"):
        smooth(Linears(given.weights, given.schemes, None, {**given.stats, **new(("samples",), 48)}), alpha="auto")
    assert TRANSFORM.fn is smooth and TRANSFORM.needs == ("absmax", "samples")
