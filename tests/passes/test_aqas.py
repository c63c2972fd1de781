"""AQAS weighs both roundings: on the sampled rows it is no worse than SmoothQuant, AWQ or nothing."""

from __future__ import annotations

import pytest
import torch
from test_smooth import error, linears

from qcompile.core.errors import OptionError
from qcompile.core.scheme import Scheme
from qcompile.passes.aqas import TRANSFORM, aqas
from qcompile.passes.awq import awq
from qcompile.passes.method import Linears
from qcompile.passes.smooth import smooth


@pytest.mark.parametrize("k", [48, 37])
@pytest.mark.parametrize("input", ["int8.row", "int8.tensor.static", "e4m3.tensor"])
@pytest.mark.parametrize("weight", ["int4.g32", "uint4.row.point"])
def test_no_worse_than_the_methods_it_joins(weight, input, k):
    given = linears(k=k, weight=weight, input=input, seed=k)
    s = aqas(given)
    assert s.shape == (k,) and bool((s > 0).all())
    for other in (torch.ones(k), smooth(given), smooth(given, alpha="auto"), awq(given)):
        assert error(given, s) <= error(given, other)


def test_the_error_is_that_of_both_roundings():
    """Against the definition, with int8 rows and int4 weights written out."""
    given = linears(rows=(16,), weight="int4.row", input="int8.row")
    s = torch.rand(48) + 0.5
    x, w = given.stats["samples"]["rows"].double(), given.weights[0].double()

    def round_rows(t, bits, stored):
        scale = t.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        if stored:
            scale = scale.to(torch.bfloat16).double()
        return (t / scale).round() * scale

    y = round_rows(x / s, 8, False) @ round_rows(w * s, 4, True).T
    assert error(given, s) == pytest.approx(float((y - x @ w.T).square().sum()), rel=1e-3)


def test_without_rounded_inputs_it_weighs_weights_alone():
    given = linears(weight="int4.g32", input=None)
    assert error(given, aqas(given)) <= error(given, awq(given))


def test_zero_channels_stay():
    s = aqas(linears(weight="int4.g32", dead=(1,), unused=(2,)))
    assert s[1] == 1 and bool(s.isfinite().all())


def test_what_is_refused():
    given = linears()
    for name in TRANSFORM.needs:
        with pytest.raises(OptionError, match=f"aqas needs the statistic '{name}'"):
            aqas(Linears(given.weights, given.schemes, Scheme.parse("int8.row"), {n: state for n, state in given.stats.items() if n != name}))
    assert TRANSFORM.fn is aqas and TRANSFORM.needs == ("absmax", "moments", "samples")
