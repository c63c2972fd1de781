"""Round to nearest is ``quantize``, in two steps that other solvers take apart."""

from __future__ import annotations

import pytest
import torch
from correlated import SCHEMES, SHAPES, layer

from qcompile.core.errors import OptionError, WeightError
from qcompile.core.formats import decode, encode
from qcompile.core.qtensor import dequantize, from_codes, grid, quantize, scaled, split_rows, unscaled
from qcompile.core.scheme import Scheme
from qcompile.passes import rtn


def same(a, b) -> bool:
    return len(a.flatten()) == len(b.flatten()) and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) and x.dtype == y.dtype for x, y in zip(a.flatten(), b.flatten()))


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rtn_is_quantize(spelling, dtype):
    for n, k in SHAPES:
        w, _ = layer(n, k, dtype=dtype)
        w[:, :3] = 0
        w[0] = 0
        scheme = Scheme.parse(spelling)
        q = rtn.solve(w, scheme)
        assert same(q, quantize(w, scheme)) and q.shape == (n, k)
        g = grid(w, scheme)
        codes = encode(scaled(w, g), scheme.fmt)
        torch.testing.assert_close(unscaled(decode(codes, scheme.fmt), g), dequantize(q), rtol=0, atol=0)


def test_experts_have_a_grid_too():
    w = torch.stack([layer(32, 96, seed=i)[0] for i in range(3)])
    scheme = Scheme.parse("uint4.g32.min/uint6.g8")
    g = grid(w, scheme)
    assert same(from_codes(encode(scaled(w, g), scheme.fmt), g), quantize(w, scheme))


@pytest.mark.parametrize("spelling", ["int4.g64", "uint4.g32.min/uint6.g2", "nf4.g16/int8.row", "uint4.g64.point"])
def test_stacked_rows_come_apart_again(spelling):
    a, b = layer(32, 96, seed=1)[0], layer(16, 96, seed=2)[0]
    scheme = Scheme.parse(spelling)
    first, second = split_rows(quantize(torch.cat([a, b]), scheme), [32, 16])
    assert same(first, quantize(a, scheme)) and same(second, quantize(b, scheme))
    assert first.codes.untyped_storage().nbytes() == first.codes.nbytes


def test_what_cannot_be_rounded_is_named():
    w, _ = layer(64, 96)
    with pytest.raises(OptionError, match=r"range rule 'abmax'.*absmax"):
        rtn.solve(w, Scheme.parse("int4.row"), rule="abmax")
    w[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"layers.3.up.*\(3, 4\)"):
        rtn.solve(w, Scheme.parse("int4.row"), name="layers.3.up")
