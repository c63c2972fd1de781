"""Range rules against their definitions by brute force in float64, at every granularity, on values and on what statistics keep of them; codebooks against Max's table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.core import stats
from qcompile.core.codebooks import fit_codebook
from qcompile.core.errors import OptionError, WeightError
from qcompile.core.formats import FORMATS, decode, encode
from qcompile.core.qtensor import dequantize, quantize, tile, value
from qcompile.core.ranges import NEEDS, RANGES, TINY, mse, needed, percentile, static_range
from qcompile.core.scheme import Scheme

rules = pytest.mark.parametrize("rule", RANGES)
KINDS = ["int8.{}", "int4.{}", "uint4.{}.point", "uint8.{}.min", "int8.{}.point", "e4m3.{}", "e2m1.{}", "nf4.{}", "nf4.{}.min", "fp4.{}"]
kinds = pytest.mark.parametrize("kind", KINDS)
GROUPS = ["tensor", "row", "g7", "b2x5", "g1000"]


def heavy(*shape: int) -> torch.Tensor:
    """Normal with a few values far out: what calibration is for."""
    x = torch.randn(*shape)
    return torch.where(torch.rand(*shape) < 0.01, 8 * x, x)


def grid(fmt) -> np.ndarray:
    """Every value of a format."""
    raw = torch.arange(2**fmt.bits, dtype=torch.uint8)
    codes = raw.view(fmt.native) if fmt.native else (raw.to(torch.int16) - 2 ** (fmt.bits - 1) * fmt.signed).to(fmt.dtype) if fmt.kind == "int" else raw
    v = decode(codes, fmt).double().numpy()
    return np.unique(v[np.isfinite(v)])


def nearest(x: np.ndarray, scheme: Scheme, scale: float, zero: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The nearest representable value by search over all, and what is beyond the ends."""
    values = grid(scheme.fmt)
    values = values * scale if zero is None else values * scale - zero if scheme.zero == "min" else (values - zero) * scale
    middle = (values[1:] + values[:-1]) / 2
    return values[np.searchsorted(middle, x)], (x < values[0] - 1e-6 * scale) | (x > values[-1] + 1e-6 * scale)


def cost(x: np.ndarray, scheme: Scheme, scale: float, zero: float | None, p: float = 2.0, gamma: float = 1.0, counts: np.ndarray | float = 1.0) -> float:
    q, outside = nearest(x, scheme, scale, zero)
    return float((np.abs(x - q) ** p * np.where(outside, gamma, 1.0) * counts).sum())


def of_range(lo: float, hi: float, scheme: Scheme) -> tuple[float, float | None]:
    fmt = scheme.fmt
    if scheme.zero == "none":
        return max(-lo, hi) / fmt.hi, None
    scale = (hi - lo) / (fmt.hi - fmt.lo)
    return scale, fmt.lo * scale - lo if scheme.zero == "min" else float(np.clip(np.round(fmt.lo - lo / scale), fmt.lo, fmt.hi))


def candidates(rule: str, lo: float, hi: float, scheme: Scheme) -> list[tuple[float, float | None]]:
    """What the search rules choose from, written anew."""
    if rule == "mse":
        return [of_range(lo * f, hi * f, scheme) for f in np.linspace(1, 0.2, 100)]
    scale, zero = of_range(lo, hi, scheme)
    if zero is None:
        return [(scale * i / 100, None) for i in range(1, 101)]
    codes = [zero / scale if scheme.zero == "min" else zero, *np.linspace(scheme.fmt.lo, scheme.fmt.hi, 20)]
    return [(s, c * s if scheme.zero == "min" else float(np.round(c))) for s in scale * np.arange(1, 18) / 17 for c in codes]


# --- every rule, every granularity -------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("kind", ["int8.{}", "uint4.{}.point", "nf4.{}.min", "e4m3.{}"])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_independent(rule, kind, group):
    """What a group gets is what it would get alone, padding of ragged groups uncounted; zero and constant rows read back as they are."""
    s = Scheme.parse(kind.format(group))
    x = heavy(4, 37).bfloat16().float()
    x[1], x[2] = 0, -0.75
    size = s.extent(4, 37)
    options = {"levels": 8} if rule == "kl" else {}  # few values in each group
    scale, zero = RANGES[rule](tile(x, size), s, (-3, -1), tile(torch.ones_like(x), size), **options)
    assert scale.shape[-3::2] == (1, 1) and bool((scale >= TINY).all()) and bool(torch.isfinite(scale).all())
    assert (zero is None) == (s.zero == "none")
    for i in {0, 2 * (scale.shape[0] - 1) // 3, scale.shape[0] - 1}:
        for j in {0, scale.shape[2] - 1}:
            part = x[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]].flatten()
            own_scale, own_zero = RANGES[rule](part, s, (0,), **options)
            torch.testing.assert_close(scale[i, 0, j], own_scale, rtol=1e-6, atol=0)
            if zero is not None:
                torch.testing.assert_close(zero[i, 0, j], own_zero, rtol=1e-5, atol=1e-6)


@rules
@kinds
def test_quantize_takes_every_rule(rule, kind):
    """Through ``quantize``: zeros stay zeros, constants stay what they are up to the format, and 8 bits stay close."""
    s = Scheme.parse(kind.format("row"))
    x = heavy(3, 50).bfloat16()
    x[1], x[2] = 0, 3.0
    back = dequantize(quantize(x, s, rule=rule))
    step = float(value(quantize(x, s).scale)[2])
    assert not back[1].any()
    assert back[2].tolist() == pytest.approx([3.0] * 50, abs=step if s.fmt.kind == "int" and s.fmt.bits == 8 else 1.1)
    if s.fmt.bits == 8 and s.zero == "none":
        inside = x[0].float().abs() <= float(value(quantize(x, s, rule=rule).scale)[0]) * s.fmt.hi
        torch.testing.assert_close(back[0][inside], x[0].float()[inside], rtol=0.07, atol=0.05)


@rules
@pytest.mark.parametrize("kind", ["int8.row", "uint4.row.point", "nf4.row.min"])
def test_counts_are_repetitions(rule, kind):
    s, x = Scheme.parse(kind), heavy(2, 40)
    n = torch.randint(0, 4, (2, 40))
    scale, zero = RANGES[rule](x, s, (1,), n)
    for row in range(2):
        own = RANGES[rule](x[row].repeat_interleave(n[row]), s, (0,))
        torch.testing.assert_close(scale[row], own[0], rtol=1e-6, atol=0)
        if zero is not None:
            torch.testing.assert_close(zero[row], own[1], rtol=1e-5, atol=1e-6)


@rules
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
def test_size_does_not_matter(rule, size):
    """A power of two times the values gives the same power of two times the scale."""
    s, x, f = Scheme.parse("int4.row"), heavy(2, 300), 2.0 ** round(math.log2(size))
    torch.testing.assert_close(RANGES[rule](x * f, s, (1,))[0], RANGES[rule](x, s, (1,))[0] * f, rtol=1e-6, atol=0)


def test_minmax_and_absmax():
    x = torch.tensor([[-1.0, 0.5, 3.0], [1.0, 2.0, 4.0]])
    for rule in ("absmax", "minmax", "moving_average"):
        assert RANGES[rule](x, Scheme.parse("int8.row"), (1,))[0].flatten().tolist() == pytest.approx([3 / 127, 4 / 127])
        scale, zero = RANGES[rule](x, Scheme.parse("uint8.row.point"), (1,))
        assert scale.flatten().tolist() == pytest.approx([4 / 255, 4 / 255]) and zero.flatten().tolist() == [64.0, 0.0]
        assert RANGES[rule](x, Scheme.parse("int8.row"), (1,), torch.tensor([1, 1, 0]))[0].flatten().tolist() == pytest.approx([1 / 127, 2 / 127])


# --- percentile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [50.0, 90.0, 99.0, 99.99])
def test_percentile(q):
    x = heavy(3, 1000)
    scale, _ = percentile(x, Scheme.parse("int8.row"), (1,), q=q)
    magnitude = x.abs().sort(1).values
    for row in range(3):  # exactly 1000 * q / 100 values are at most the percentile
        k = math.ceil(round(10 * q, 6))
        assert float(scale[row] * 127) == pytest.approx(float(magnitude[row, k - 1]), rel=1e-6)
        assert float(scale[row] * 127) == pytest.approx(np.percentile(x[row].abs().numpy(), q, method="inverted_cdf"), rel=1e-6)
    scale, zero = percentile(x, Scheme.parse("uint8.row.min"), (1,), q=q)
    ordered = x.sort(1).values
    cut = 1000 - math.ceil(round(10 * (100 + q) / 2, 6))
    assert torch.allclose(-zero[:, 0], ordered[:, cut].clamp(max=0)) and torch.allclose((scale * 255 - zero)[:, 0], ordered[:, 999 - cut].clamp(min=0), atol=1e-6)


# --- mse and sqnr --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mse", "sqnr"])
@kinds
def test_search_is_brute_force(rule, kind):
    s, x = Scheme.parse(kind.format("row")), heavy(3, 200)
    scale, zero = RANGES[rule](x, s, (1,))
    gamma = 3.0 if rule == "sqnr" else 1.0
    for row in range(3):
        v = x[row].double().numpy()
        costs = [cost(v, s, *c, gamma=gamma) for c in candidates(rule, min(v.min(), 0), max(v.max(), 0), s)]
        mine = cost(v, s, float(scale[row]), None if zero is None else float(zero[row]), gamma=gamma)
        assert mine == pytest.approx(min(costs), rel=2e-3) and min(costs) < max(costs)


def test_mse_options_and_known_optima():
    """Best clipping of a normal distribution: a uniform quantizer of 4 bits at 2.7 sigma, of 3 bits at 2.0 (ends of the grid: Max 1960, table II, step 0.335 and 0.586)."""
    x = torch.distributions.Normal(0, 1).icdf((torch.arange(40000) + 0.5) / 40000)[None]
    for bits, step in ((4, 0.3352), (3, 0.5860)):
        s = Scheme.parse(f"int{bits}.row")
        assert float(mse(x, s, (1,), steps=400)[0]) == pytest.approx(step, rel=0.08)  # Max's grid is mid-rise and has one level more at the top
    s, v = Scheme.parse("int4.row"), x[0].double().numpy()
    clips = {p: float(mse(x, s, (1,), p=p)[0]) for p in (1.0, 2.0, 2.4, 4.0)}
    assert clips[1.0] < clips[2.0] <= clips[2.4] < clips[4.0]
    assert cost(v, s, clips[2.4], None, p=2.4) == pytest.approx(min(cost(v, s, *c, p=2.4) for c in candidates("mse", v.min(), v.max(), s)), rel=1e-3)
    assert float(mse(x, Scheme.parse("int2.row"), (1,), least=0.9)[0]) == pytest.approx(0.9 * float(x.abs().max()), rel=1e-6)


def test_sqnr_clips_less_than_mse():
    x, s = heavy(4, 2000), Scheme.parse("int4.row")
    assert bool((RANGES["sqnr"](x, s, (1,))[0] >= 0.99 * RANGES["mse"](x, s, (1,))[0]).all())
    assert bool((RANGES["sqnr"](x, s, (1,))[0] > 1.01 * RANGES["mse"](x, s, (1,))[0]).any())


# --- kl --------------------------------------------------------------------------------------------------------------------


def kl_by_hand(x: np.ndarray, levels: int) -> tuple[dict[int, float], float]:
    """The criterion bin by bin: divergence of each end, and the limit of the histogram."""
    limit = 2.0 ** (math.floor(math.log2(np.abs(x).max())) + 1)
    return kl_of_bins(np.histogram(np.abs(x), 2048, (0, limit))[0].astype(float), levels), limit


def kl_of_bins(bins: np.ndarray, levels: int) -> dict[int, float]:
    """The divergence of each end of a histogram of magnitudes."""
    bins, end = bins.copy(), int(np.flatnonzero(bins)[-1]) + 1
    bins[0] = bins[1]
    found = {}
    for i in range(levels, end + 1):
        p = bins[:i].copy()
        p[-1] += bins[i:].sum()
        q, run = np.zeros(i), (np.arange(i) * levels) // i
        sums, filled = np.bincount(run, bins[:i], levels), np.bincount(run, bins[:i] > 0, levels)
        q = np.where(bins[:i] > 0, sums[run] / np.maximum(filled[run], 1), 0)
        if q.sum() == 0 or (p[q == 0] > 0).any():
            continue
        p, q = p / p.sum(), q / q.sum()
        found[i] = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    return found


@pytest.mark.parametrize("what", ["normal", "outliers", "laplace", "uniform", "few"])
@pytest.mark.parametrize("kind", ["int8.row", "int4.row"])
def test_kl_is_brute_force(what, kind):
    g = np.random.default_rng(0)
    x = {
        "normal": g.normal(size=20000), "outliers": np.concatenate([g.normal(size=20000), [60.0, -55.0, 58.0]]), "laplace": g.laplace(size=20000),
        "uniform": g.uniform(-1, 1, size=100000), "few": g.normal(size=50),
    }[what].astype(np.float32)  # fmt: skip
    s = Scheme.parse(kind)
    found, limit = kl_by_hand(x.astype(float), 2 ** (s.fmt.bits - 1))
    clip = float(RANGES["kl"](torch.from_numpy(x), s, (0,))[0]) * s.fmt.hi
    greatest = float(np.abs(x).max())
    i = math.ceil(clip / limit * 2048 - 1e-3)
    assert found[i] == pytest.approx(min(found.values()), rel=1e-9, abs=1e-12)
    assert clip == pytest.approx(min(i * limit / 2048, greatest), rel=1e-6)
    if kind == "int8.row":
        share = clip / greatest
        assert {"outliers": share < 0.15, "uniform": share > 0.97, "normal": share > 0.6}.get(what, True), share


@pytest.mark.parametrize(("kind", "clip"), [("int8.tensor", 4.80), ("int6.tensor", 4.21), ("int4.tensor", 3.50)])
def test_kl_on_a_gaussian_lands_where_theory_says(kind, clip):
    """The histogram that no sample has, differences of the normal distribution function: its best end by brute force, in deviations; then what a sample gives, at once and in batches."""
    s, edges = Scheme.parse(kind), torch.linspace(0, 8, 2049, dtype=torch.float64)
    exact = 2 * (torch.special.ndtr(-edges[:-1]) - torch.special.ndtr(-edges[1:]))
    found = kl_of_bins(exact.numpy(), 2 ** (s.fmt.bits - 1))
    best = 8 / 2048 * min(found, key=found.__getitem__)
    assert best == pytest.approx(clip, abs=0.01)
    centres = (edges[1:] + edges[:-1]).float() / 2
    assert float(RANGES["kl"](centres, s, (0,), exact)[0]) * s.fmt.hi == pytest.approx(best, rel=1e-3)
    x = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    assert float(RANGES["kl"](x, s, (0,))[0]) * s.fmt.hi == pytest.approx(best, rel=0.05)
    static = Scheme.parse(kind + ".static")
    assert float(static_range("kl", observed(x.reshape(-1, 64), "histogram"), static)[0]) * s.fmt.hi == pytest.approx(best, rel=0.05)


def test_kl_with_a_zero_clips_both_ends_alike():
    x = torch.cat([torch.randn(20000), torch.tensor([60.0, -5.5])])
    scale, zero = RANGES["kl"](x, Scheme.parse("uint8.tensor.min"), (0,))
    lo, hi = -float(zero), float(scale * 255 - zero)
    assert 3 < hi < 9 and lo == pytest.approx(max(-hi, float(x.min())), rel=1e-5)


# --- static ranges ------------------------------------------------------------------------------------------------------------


def observed(x: torch.Tensor, *names: str, batches: int = 4) -> dict:
    state = stats.new(names or stats.STATISTICS, x.shape[1])
    for piece in x.tensor_split(batches):
        state = stats.update_all(state, piece)
    return state


@rules
@pytest.mark.parametrize("kind", ["int8.tensor.static", "uint8.tensor.point.static", "uint8.tensor.min.static", "e4m3.tensor.static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_static_is_dynamic_over_all(rule, kind, dtype):
    """From the statistic what the rule would give on all values at once, up to the width of a bin, and no worse in the rule's own terms."""
    s, x = Scheme.parse(kind), (heavy(1000, 24) + 0.3).to(dtype)
    scale, zero = static_range(rule, observed(x, needed(rule, s)), s)
    assert scale.shape == (1,) and scale.dtype == torch.float32 and (zero is None) == (s.zero == "none") and (zero is None or zero.shape == (1,))
    t = x.float().flatten()
    if rule == "moving_average":
        state = observed(x, "moving")["moving"]
        t = torch.stack([state["lo"], state["hi"]])
    own = RANGES[rule](t, s, (0,))
    if rule in ("mse", "sqnr"):
        gamma, v = (3.0 if rule == "sqnr" else 1.0), t.double().numpy()
        mine, best = (cost(v, s, float(a), None if b is None else float(b), gamma=gamma) for a, b in ((scale, zero), own))
        assert mine <= 1.05 * best
    else:
        assert float(scale) == pytest.approx(float(own[0]), rel=0.01)
        if zero is not None:
            assert float(zero) == pytest.approx(float(own[1]), abs=1.0 if s.zero == "point" else 2 * float(scale))


def test_static_of_batches_merged_is_of_all():
    x, s = heavy(800, 16), Scheme.parse("int8.tensor.static")
    both = stats.merge_all(observed(x[:500]), observed(x[500:] * 1))
    for rule in set(RANGES) - {"moving_average"}:
        assert torch.equal(static_range(rule, both, s)[0], static_range(rule, observed(x), s)[0])


def test_static_says_what_is_missing():
    x, s = heavy(50, 16), Scheme.parse("int8.tensor.static")
    assert set(NEEDS) == set(RANGES) and set(NEEDS.values()) <= set(stats.STATISTICS)
    with pytest.raises(OptionError, match=r"'kl' of scheme 'int8.tensor.static' needs the statistic 'histogram' of the input; there is: absmax, moments"):
        static_range("kl", observed(x, "absmax", "moments"), s)
    with pytest.raises(OptionError, match="needs the statistic 'minmax' of the input; there is: absmax"):
        static_range("absmax", observed(x, "absmax"), Scheme.parse("uint8.tensor.point.static"))
    with pytest.raises(OptionError, match=r"there is: none\."):
        static_range("mse", {}, s)
    with pytest.raises(OptionError, match="Did you mean 'percentile'"):
        static_range("percentil", observed(x), s)
    for rule, name in (("mse", "histogram"), ("moving_average", "moving"), ("minmax", "minmax")):
        with pytest.raises(OptionError, match=f"{name!r} has seen no values"):
            static_range(rule, stats.new([name], 16), s)
    expected = static_range("absmax", observed(x, "absmax"), s)[0]
    assert torch.equal(static_range("absmax", observed(x, "minmax"), s)[0], expected) and torch.equal(static_range("minmax", observed(x, "absmax"), s)[0], expected)


@pytest.mark.parametrize("kind", ["int8.row", "uint8.row.point", "uint8.row.min"])
def test_absmax_is_traced(kind):
    """As in the op ``quantize``: one graph for every length, no look at a value, nothing but tensors of the range in it."""
    s, x = Scheme.parse(kind), heavy(5, 9)

    def range_of(t: torch.Tensor) -> list[torch.Tensor]:
        return [part for part in RANGES["absmax"](t, s, (-1,)) if part is not None]

    traced = make_fx(range_of, tracing_mode="symbolic")(x)
    for other in (x, heavy(7, 31)):
        assert all(torch.equal(a, b) for a, b in zip(traced(other), range_of(other)))
    assert not [n for n in traced.graph.nodes if n.op == "get_attr" or "local_scalar" in str(n.target)]


# --- codebooks ------------------------------------------------------------------------------------------------------------------

MAX_1960 = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152], 4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]}
"""Positive outputs of the quantizers of least squared error of a normal distribution (Max 1960, table I)."""


@pytest.mark.parametrize("bits", MAX_1960)
@pytest.mark.parametrize("how", ["counts", "values"])
def test_lloyd_max_on_a_normal_distribution(bits, how):
    if how == "counts":
        t = torch.linspace(-7, 7, 8001)
        fitted = fit_codebook(t, bits, counts=torch.exp(-t.double() ** 2 / 2), iterations=3000)
    else:
        fitted = fit_codebook(torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(100000) + 0.5) / 100000).view(100, 1000), bits, iterations=3000)
    half = MAX_1960[bits]
    assert fitted.dtype == torch.float32 and fitted.tolist() == pytest.approx([-v for v in reversed(half)] + half, rel=0.01)


def test_lloyd_max_is_optimal_where_it_can_be():
    t = torch.tensor([3.0, -1.0, 5.0, 5.0, -1.0, 0.25, 0.25, 7.0])
    assert fit_codebook(t, 3).unique().tolist() == [-1.0, 0.25, 3.0, 5.0, 7.0]  # fewer values than codes: all exact
    many_zeros = torch.cat([torch.zeros(10000), torch.tensor([1.0, 2.0, 4.0])])
    assert fit_codebook(many_zeros, 2).tolist() == [0.0, 1.0, 2.0, 4.0]
    assert fit_codebook(torch.full((7,), 2.5), 2).tolist() == [2.5] * 4
    assert fit_codebook(t, 1, counts=(t > 4).float()).tolist() == pytest.approx([5.0, 7.0])
    with pytest.raises(WeightError, match="finite"):
        fit_codebook(torch.tensor([1.0, float("nan")]), 2)
    with pytest.raises(WeightError, match="0 of them counted"):
        fit_codebook(t, 2, counts=torch.zeros(8))


def test_lloyd_max_beats_every_format_of_its_bits():
    x = heavy(20000)
    x = x / x.abs().max()

    def error(values: torch.Tensor) -> float:
        return float((x[:, None] - values).abs().amin(1).square().sum())

    fitted = error(fit_codebook(x.bfloat16(), 4))
    for name in ("nf4", "fp4", "int4", "e2m1"):
        fmt = FORMATS[name]
        assert fitted < 0.9 * error(torch.from_numpy(grid(fmt)).float() / fmt.hi)
    centres, counts = stats.centres(h := observed(x[:, None], "histogram")["histogram"]), h["counts"]
    assert error(fit_codebook(centres, 4, counts)) == pytest.approx(fitted, rel=0.02)


def test_encode_agrees_with_nearest():
    """The reference used above is the one that ``encode`` implements."""
    x = torch.randn(500)
    for kind in KINDS:
        s = Scheme.parse(kind.format("row"))
        if s.zero == "none":
            assert decode(encode(x / 0.25, s.fmt), s.fmt).double().numpy() * 0.25 == pytest.approx(nearest(x.double().numpy(), s, 0.25, None)[0])


@pytest.mark.gpu
@rules
@kinds
def test_devices_agree(rule, kind):
    s, x = Scheme.parse(kind.format("row")), heavy(4, 500)
    scale, zero = RANGES[rule](x, s, (1,))
    there, there_zero = RANGES[rule](x.cuda(), s, (1,))
    torch.testing.assert_close(there.cpu(), scale, rtol=1e-5, atol=0)
    tie = rule == "kl" and s.zero == "point"  # a range symmetric about zero has its zero amid two codes
    assert zero is None or torch.allclose(there_zero.cpu(), zero, rtol=1e-4, atol=1.0 if tie else 1e-6)
