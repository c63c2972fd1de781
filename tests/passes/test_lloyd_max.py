"""Codebooks of a weight's own: what is fitted, what an error in a column counts, which solvers take them and which say that they cannot."""

from __future__ import annotations

import pytest
import torch
from correlated import SHAPES, layer, second_moment

from qcompile.core.codebooks import BINS, fit_codebook, fit_many
from qcompile.core.errors import OptionError
from qcompile.core.formats import LEARNED, fitted
from qcompile.core.qtensor import QTensor, dequantize, grid, quantize, rounded, unpack
from qcompile.core.recipe import input_scheme
from qcompile.core.scheme import Scheme
from qcompile.passes import adaround, awq, gptq, lloyd_max, rtn, sequential_mse
from qcompile.passes.method import Linears, output_error
from qcompile.passes.method import second_moment as moment

SCHEMES = ["lut4.g64", "lut4.row", "lut3.g32.min", "lut2.tensor", "lut4.g32/int8.row", "lut4.g64.plain", "lut3.b16x16"]


def moments(x):
    return {"moments": {"count": torch.tensor(len(x)), "abs": x.double().abs().sum(0), "square": x.double().square().sum(0)}}


@pytest.mark.parametrize("spelling", SCHEMES)
def test_a_codebook_belongs_to_its_tensor(spelling):
    scheme = Scheme.parse(spelling)
    assert Scheme.parse(str(scheme)) == scheme
    for n, k in SHAPES:
        w, _ = layer(n, k)
        q = quantize(w, scheme)
        again = QTensor.unflatten(q.flatten(), scheme, k)
        assert q.codebook.shape == (2**scheme.fmt.bits,) and q.codebook.dtype == torch.float32 and torch.equal(q.codebook, q.codebook.sort().values)
        assert torch.equal(dequantize(again), dequantize(q)) and torch.equal(dequantize(q), rounded(w, grid(w, scheme)))
        assert abs(q.nbytes * 8 / w.numel() - scheme.bits_per_weight((n, k))) < 0.02 * 8
        both = quantize(torch.stack([w, 3 * w.flip(0) ** 3]), scheme)  # experts
        assert both.codebook.shape == (2, 2**scheme.fmt.bits) and torch.equal(dequantize(both)[0], dequantize(q)) and not torch.equal(both.codebook[0], both.codebook[1])


def test_it_is_nearer_than_fixed_values():
    w, _ = layer(130, 192)
    error = {spelling: float((w - dequantize(quantize(w, Scheme.parse(spelling)))).square().sum()) for spelling in ("lut4.g64", "nf4.g64", "int4.g64", "lut3.g64", "int3.g64")}
    assert error["lut4.g64"] < 0.95 * error["nf4.g64"] < error["int4.g64"] and error["lut3.g64"] < 0.7 * error["int3.g64"]


def test_few_distinct_values_are_exact():
    w = torch.tensor([-1.0, -0.25, 0.0, 0.5])[torch.randint(4, (32, 64), generator=torch.Generator().manual_seed(0))]
    w[:, 0] = -1
    for spelling in ("lut2.row", "lut4.tensor"):
        assert torch.equal(dequantize(quantize(w, Scheme.parse(spelling))), w)
    assert not dequantize(quantize(torch.zeros(4, 8), Scheme.parse("lut4.row"))).any()


def test_bins_do_not_matter_and_order_neither():
    x = torch.randn(BINS // 16, 32, generator=torch.Generator().manual_seed(0))
    x /= x.abs().amax(1, keepdim=True)
    error = lambda c: float((x - c[torch.bucketize(x, (c[1:] + c[:-1]) / 2)]).square().mean())  # noqa: E731
    binned = fit_many(x, 4)
    assert error(binned) < 1.01 * error(fit_codebook(x, 4))
    assert torch.equal(fit_many(x.flip(0), 4), binned)
    assert torch.equal(fit_many(x, 4, torch.full((32,), 7.0)), binned), "equal columns count as none"
    assert torch.equal(fit_many(x, 4, torch.zeros(32)), binned), "an input that is always zero"
    one = torch.zeros(32)
    one[5] = 1
    assert torch.allclose(fit_many(x, 2, one), fit_codebook(x[:, 5], 2), atol=1e-3)


@pytest.mark.parametrize("n, k", [(96, 256), (48, 96)])
def test_columns_count_by_their_inputs(n, k):
    w, x = layer(n, k)
    x = x * torch.where(torch.arange(k) % 8 == 0, 30.0, 0.1)
    w[:, ::8] *= 0.2  # what counts lies in the middle of the range
    h = x.square().mean(0)
    cost = lambda q: float(((w - dequantize(q)).square() * h).sum())  # noqa: E731
    scheme = Scheme.parse("lut3.row")
    assert cost(lloyd_max.solve(w, scheme, moments(x))) < 0.5 * cost(rtn.solve(w, scheme))
    flat = {"moments": {"count": torch.tensor(1.0), "square": torch.ones(k)}}
    assert torch.equal(dequantize(lloyd_max.solve(w, scheme, flat)), dequantize(rtn.solve(w, scheme)))


@pytest.mark.parametrize("spelling", ["lut4.g64", "lut3.row"])
def test_other_solvers_start_from_it(spelling):
    w, x = layer(96, 256)
    scheme, stats = Scheme.parse(spelling), second_moment(x)
    error = lambda q: output_error(w - dequantize(q), moment(stats))  # noqa: E731
    nearest = rtn.solve(w, scheme)
    for q in (gptq.solve(w, scheme, stats), gptq.solve(w, scheme, stats, act_order=False), adaround.solve(w, scheme, stats, iterations=100)):
        assert torch.equal(q.codebook, nearest.codebook) and not torch.equal(unpack(q), unpack(nearest))
        assert error(q) < 0.8 * error(nearest)
    s = awq.awq(Linears([w], [scheme], None, stats | moments(x)))
    assert bool((s > 0).all())


def test_what_cannot_be():
    w, x = layer(64, 96)
    for solve in (lambda s: sequential_mse.solve(w, s, second_moment(x)), lambda s: gptq.solve(w, s, second_moment(x), clip=True)):
        with pytest.raises(OptionError, match="lut4 are fitted to the whole weight"):
            solve(Scheme.parse("lut4.g64"))
    fixed = Scheme.parse("int4.g64")
    assert torch.equal(dequantize(lloyd_max.solve(w, fixed, moments(x))), dequantize(rtn.solve(w, fixed))), "fixed values leave nothing to fit"
    for spelling, why in (("int4.g64/lut4.row", "scales have no codebook"), ("lut4.g64.point", "integer format")):
        with pytest.raises(OptionError, match=why):
            Scheme.parse(spelling)
    with pytest.raises(OptionError, match="activations take a format of fixed values"):
        input_scheme("lut4.row")
    assert fitted(LEARNED["lut2"], torch.tensor([-1.0, 0.0, 0.5, 1.0])).values == (-1.0, 0.0, 0.5, 1.0)
