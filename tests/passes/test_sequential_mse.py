"""Scales chosen by the error of the output: never above rounding to nearest, and equal to an exhaustive search where that is possible."""

from __future__ import annotations

import itertools

import pytest
import torch
from correlated import SCHEMES, SHAPES, layer, second_moment

from qcompile.core.errors import OptionError, WeightError
from qcompile.core.qtensor import dequantize, find_range, grid, grid_of
from qcompile.core.scheme import Scheme
from qcompile.passes import rtn, sequential_mse
from qcompile.passes.method import output_error
from qcompile.passes.sequential_mse import clip_search, rounded, search, shrinks


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("clip", [False, True])
def test_never_worse_than_nearest(spelling, clip):
    for n, k in SHAPES:
        w, x = layer(n, k, dtype=torch.bfloat16)
        h, scheme = x.T @ x / len(x), Scheme.parse(spelling)
        q = sequential_mse.solve(w, scheme, second_moment(x), clip=clip, candidates=10)
        assert output_error(w - dequantize(q), h) <= output_error(w - dequantize(rtn.solve(w, scheme)), h)


@pytest.mark.parametrize("spelling", ["int3.row", "int4.g64", "uint3.g32.min", "uint4.g64.point", "e3m0.g32", "int4.b5x7"])
def test_better_where_scales_are_free(spelling):
    w, x = layer(48, 200)
    h, scheme = x.T @ x / len(x), Scheme.parse(spelling)
    before = output_error(w - dequantize(rtn.solve(w, scheme)), h)
    q = sequential_mse.solve(w, scheme, second_moment(x))
    assert output_error(w - dequantize(q), h) < 0.9 * before
    alone = output_error(w - rounded(w, clip_search(w, scheme, h, least=0.05)), h)
    groups = scheme.grid_shape(w.shape)[1]
    assert output_error(w - dequantize(q), h) < alone or (groups == 1 and output_error(w - dequantize(q), h) == alone)  # the other groups' errors are worth knowing


@pytest.mark.parametrize("spelling", ["int3.g4", "uint3.g4.min", "uint3.g4.point", "int3.b3x4", "int3.tensor"])
def test_each_step_is_the_exhaustive_best(spelling):
    """After one pass over two groups: the first is best given the second unshrunk, the second best given the first; per row, or per block of rows."""
    w, x = layer(6, 8)
    h, scheme, factors = x.T @ x / len(x), Scheme.parse(spelling), shrinks(6, 0.4)
    got = output_error(w - rounded(w, grid_of(*search(w, scheme, h, factors), scheme, w.shape)), h)
    r, c = scheme.extent(6, 8)
    total = 0.0
    for rows in w.split(r):
        best = [1.0] * (8 // c)
        for i, factor in itertools.product(range(len(best)), factors):
            trial = [*best[:i], factor, *best[i + 1 :]]
            if _error(rows, scheme, h, trial) < _error(rows, scheme, h, best):
                best = trial
        total += _error(rows, scheme, h, best)
    assert got == pytest.approx(total, rel=1e-5)


def _error(rows: torch.Tensor, scheme: Scheme, h: torch.Tensor, factors: list[float]) -> float:
    scale, zero = find_range(rows, scheme)
    by = torch.tensor(factors)
    g = grid_of(scale * by, zero * by if scheme.zero == "min" else zero, scheme, rows.shape)
    return output_error(rows - rounded(rows, g), h)


@pytest.mark.parametrize("spelling", ["uint4.g16.min/uint3.row", "int6.g16/uint4.row"])
def test_scales_that_move_when_stored(spelling):
    """Coarse scales of scales undo the choice; then the result is the nearest. (Searched for: most seeds have it.)"""
    scheme, undone = Scheme.parse(spelling), 0
    for seed in range(4):
        w, x = layer(24, 96, seed=seed)
        h = x.T @ x / len(x)
        before = output_error(w - dequantize(rtn.solve(w, scheme)), h)
        undone += output_error(w - rounded(w, grid_of(*search(w, scheme, h, shrinks(20, 0.05)), scheme, w.shape)), h) > before
        assert output_error(w - dequantize(sequential_mse.solve(w, scheme, second_moment(x))), h) <= before
    assert undone > 0


def test_clip_search_shrinks_only_what_pays():
    w, x = layer(48, 200)
    w[:, 0] = 20  # an outlier in every first group ...
    x[:, 0] /= 1e3  # ... that hardly meets any input
    scheme = Scheme.parse("int4.g64")
    h = x.T @ x / len(x)
    clipped, plain = clip_search(w, scheme, h), grid(w, scheme)
    ratio = clipped.scale.float() / plain.scale.float()
    assert ratio[:, 0].mean() < 0.55 and bool((ratio[:, 1:].mean(0) > 0.7).all())
    assert bool((ratio <= 1).all()) and bool((ratio > 0.49).all())


def test_what_is_wrong_is_named():
    w, x = layer(64, 96)
    with pytest.raises(OptionError, match="candidates >= 1"):
        sequential_mse.solve(w, Scheme.parse("int4.row"), second_moment(x), candidates=0)
    with pytest.raises(WeightError, match=r"layers\.0\.q"):
        sequential_mse.solve(w[:, :50], Scheme.parse("int4.row"), second_moment(x), name="layers.0.q")
