"""Every row of FORMATS against what a format promises; values against the specifications, written out."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.core import formats
from qcompile.core.errors import OptionError
from qcompile.core.formats import FORMATS, Format, decode, encode, numbers, table

rows = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def all_codes(fmt: Format) -> torch.Tensor:
    """Each code that has a finite value, as ``encode`` would give it."""
    raw = torch.arange(2**fmt.bits, dtype=torch.uint8)
    if fmt.kind == "table":
        return raw[: len(fmt.values)]
    if fmt.kind == "int" and fmt.signed:
        return (raw.to(torch.int16) - 2 ** (fmt.bits - 1)).to(torch.int8)
    raw = raw[torch.isfinite(table(fmt))]
    return raw.view(fmt.native) if fmt.native is not None else raw


def values_of(fmt: Format) -> np.ndarray:
    """Every finite value, ascending, -0 and 0 once."""
    return np.unique(decode(all_codes(fmt), fmt).double().numpy() + 0.0)


def probes(fmt: Format) -> torch.Tensor:
    """Values, midpoints, their neighbours in float32, random and extreme values of both signs."""
    v = values_of(fmt)
    middle = torch.tensor((v[1:] + v[:-1]) / 2, dtype=torch.float32)
    exact = torch.tensor(v, dtype=torch.float32)
    near = [torch.nextafter(t, torch.tensor(to)) for t in (middle, exact) for to in (float("inf"), -float("inf"))]
    wide = torch.randn(2000) * torch.logspace(-8, 8, 2000)
    return torch.cat([exact, middle, *near, wide, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e30, -1e30, float("inf"), -float("inf")])])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, so that NaN equals NaN and 0 differs from -0."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@rows
def test_codes_survive_a_round_trip(fmt):
    codes = all_codes(fmt)
    assert len(codes) >= 3
    back = encode(decode(codes, fmt), fmt)
    assert back.dtype == codes.dtype == fmt.dtype
    assert same(back, codes)  # signed zeros of minifloats included: encode keeps the sign
    assert len(values_of(fmt)) in (len(codes), len(codes) - 1)


@rows
def test_idempotent_on_values(fmt):
    once = decode(encode(probes(fmt), fmt), fmt)
    assert same(decode(encode(once, fmt), fmt), once)


@rows
def test_monotone(fmt):
    y = decode(encode(probes(fmt).sort().values, fmt), fmt)
    assert bool((y.diff() >= 0).all())


@rows
def test_saturates(fmt):
    x = torch.tensor([1e30, float("inf"), -1e30, -float("inf")])
    assert decode(encode(x, fmt), fmt).tolist() == pytest.approx([fmt.hi, fmt.hi, fmt.lo, fmt.lo], rel=1e-7)
    v = values_of(fmt)
    assert (v[0], v[-1]) == pytest.approx((fmt.lo, fmt.hi), rel=1e-7)


@rows
def test_nan_stays_nan_or_is_zero(fmt):
    y = float(decode(encode(torch.tensor([float("nan"), -float("nan")]), fmt), fmt)[0])
    assert np.isnan(y) if fmt.name in FP8 else y == 0


@rows
def test_nearest_value_ties_to_even(fmt):
    """Against exact arithmetic: no value lies nearer, and of two equally near ones the even code (of a table: the lower one) is taken."""
    v = values_of(fmt)
    x = probes(fmt)
    x = x[torch.isfinite(x)]
    y = decode(encode(x, fmt), fmt).double().numpy()
    x64 = x.double().numpy()
    gap = np.abs(v[None] - x64[:, None]).min(1)
    slack = 1e-7 * np.abs(v).max() if fmt.kind == "table" else 0  # a table's midpoints are rounded to float32
    assert np.all(np.abs(y - x64) <= gap + slack)
    if fmt.kind == "table":
        return
    for a, b in pairwise(v):
        middle = (Fraction(a) + Fraction(b)) / 2
        codes = encode(torch.tensor([a, b, float(middle)], dtype=torch.float32), fmt)
        low, high, got = (codes if fmt.kind == "int" else codes.view(torch.uint8)).tolist()
        even = low if low % 2 == 0 else high
        if b == 0 or a == 0:  # either zero will do
            got, even = (0 if c == 2 ** (fmt.bits - 1) and fmt.kind == "float" else c for c in (got, even))
        assert got == even, (a, b)


def test_ties_of_a_table_go_down():
    small = Format("small", 2, "table", values=(-1.0, 0.0, 2.0))
    assert encode(torch.tensor([-0.5, 1.0, 1.0001]), small).tolist() == [0, 1, 2]


@rows
def test_table_is_decode(fmt):
    codes = all_codes(fmt)
    index = codes.view(torch.uint8).int() % 2**fmt.bits
    assert same(table(fmt)[index], decode(codes, fmt))
    assert table(fmt).shape == (2**fmt.bits,)


@rows
def test_lo_hi_and_names(fmt):
    assert FORMATS[fmt.name] is fmt and str(fmt) == fmt.name and formats.find(fmt.name) is fmt
    assert 2 <= fmt.bits <= 8 and fmt.lo <= 0 < fmt.hi
    assert list(numbers(fmt)) == sorted(set(numbers(fmt)))
    assert fmt.integral == fmt.name.lstrip("u").startswith("int")


@rows
def test_input_dtypes_and_shapes(fmt):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(3, 5, 7).to(dtype)
        assert same(encode(x, fmt), encode(x.float(), fmt)), dtype
        assert encode(x, fmt).shape == x.shape
        assert same(encode(x.mT[:, ::2], fmt), encode(x, fmt).mT[:, ::2])
    assert encode(torch.ones(0, 3), fmt).shape == (0, 3) and encode(torch.tensor(1.0), fmt).shape == ()


@rows
def test_traced_branch_is_the_eager_branch(fmt):
    """What Inductor sees has no constant tensors, and means the same bit for bit."""
    x = torch.cat([probes(fmt), torch.tensor([float("nan")])])
    traced = make_fx(lambda t: encode(t, fmt), tracing_mode="fake")(x)
    codes = encode(x, fmt)
    back = make_fx(lambda t: decode(t, fmt), tracing_mode="fake")(codes)
    assert not [n for g in (traced, back) for n in g.graph.nodes if n.op == "get_attr"]
    assert same(traced(x), codes)
    assert same(back(codes), decode(codes, fmt))
    assert same(back(all_codes(fmt)), decode(all_codes(fmt), fmt))


@rows
def test_parameters_and_subclasses(fmt):
    x = torch.nn.Parameter(torch.randn(64))
    assert same(encode(x, fmt).detach(), encode(x.detach(), fmt))


# --- values, written out ---------------------------------------------------------------------------------------------


def every_16_bit_float() -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = torch.cat([bits.view(torch.float16).float(), bits.view(torch.bfloat16).float(), torch.randn(100_000) * torch.logspace(-12, 6, 100_000)])
    return x[~x.isnan()]


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_torchs_cast(name):
    """Both the row (a cast) and the formula that serves the other minifloats, over every float16 and bfloat16 in range."""
    fmt = FORMATS[name]
    x = every_16_bit_float()
    x = x[x.abs() <= fmt.hi]
    wanted = x.to(FP8[name]).view(torch.uint8)
    assert torch.equal(encode(x, fmt).view(torch.uint8), wanted)
    assert torch.equal(formats._encode_minifloat(x, fmt), wanted)
    assert fmt.native is FP8[name] and fmt.hi == torch.finfo(fmt.native).max
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(table(fmt), codes.view(fmt.native).float(), rtol=0, atol=0, equal_nan=True)


OCP_MX = {  # OCP Microscaling Formats v1.0, section 5.3: non-negative values in the order of their codes
    "e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "e3m2": (
        0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75,
        2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28,
    ),
    "e2m3": (
        0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
        2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5,
    ),
    "e1m2": (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5),  # LLM-FP4, bias 0
    "e3m0": (0, 0.25, 0.5, 1, 2, 4, 8, 16),  # LLM-FP4, bias 3: the least non-zero magnitude is 2 ** (1 - 3)
}  # fmt: skip


@pytest.mark.parametrize("name", OCP_MX)
def test_small_minifloats(name):
    half = torch.tensor(OCP_MX[name], dtype=torch.float32)
    assert same(table(FORMATS[name]), torch.cat([half, -half]))


EXTREMES = {  # worked out by hand: least subnormal, least normal and greatest value, with the codes of the last two
    "e3m4": (0.015625, (0x10, 0.25), (0x7F, 31)),  # bias 3: 2**-2 / 16, 2**(1 - 3), (2 - 1/16) * 2**(7 - 3)
    "e2m5": (0.03125, (0x20, 1), (0x7F, 7.875)),  # bias 1: 2**0 / 32, 2**(1 - 1), (2 - 1/32) * 2**(3 - 1)
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_of_8_bit_minifloats(name):
    """No code is lost at the top: all ones is a number, and the greatest."""
    fmt = FORMATS[name]
    subnormal, (normal, least), (top, greatest) = EXTREMES[name]
    codes, values = torch.tensor([0, 1, normal - 1, normal, top], dtype=torch.uint8), torch.tensor([0, subnormal, least - subnormal, least, greatest])
    for sign, bit in ((1, 0), (-1, 0x80)):
        assert same(table(fmt)[codes.int() + bit], sign * values) and same(decode(codes + bit, fmt), sign * values)
        assert same(encode(sign * values, fmt), codes + bit)
        assert encode(sign * torch.tensor([2 * greatest, float("inf")]), fmt).tolist() == [top + bit] * 2
    assert (fmt.bits, fmt.lo, fmt.hi, len(numbers(fmt))) == (8, -greatest, greatest, 128)


def test_hfp8():
    """Sun et al. 2019: every exponent of E4M3 means a sixteenth of OCP's, and the codes that OCP gives to NaN are the greatest values."""
    fmt, ocp = FORMATS["e4m3b11"], table(FORMATS["e4m3"])
    nan = ocp.isnan()
    assert nan.nonzero().flatten().tolist() == [127, 255] and table(fmt)[nan].tolist() == [30, -30]
    assert same(table(fmt)[~nan], ocp[~nan] / 16)
    assert (fmt.bias, FORMATS["e4m3"].bias, FORMATS["e5m2"].bias) == (11, 7, 15)
    assert (numbers(fmt)[1], numbers(fmt)[8]) == (2**-13, 2**-10)
    assert FORMATS["e5m2"].hi == 57344 and numbers(FORMATS["e5m2"])[1] == 2**-16  # its backward format


@pytest.mark.parametrize(("name", "lo", "hi"), [("int2", -2, 1), ("int4", -8, 7), ("int8", -128, 127), ("uint3", 0, 7), ("uint4", 0, 15), ("uint8", 0, 255)])
def test_integers(name, lo, hi):
    assert values_of(FORMATS[name]).tolist() == list(range(lo, hi + 1))


def test_nf4():
    """QLoRA, appendix E, to the digits that are printed there."""
    printed = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    assert table(FORMATS["nf4"]).tolist() == pytest.approx(printed, abs=5.1e-5)


def test_bitsandbytes_fp4():
    """create_fp4_map of bitsandbytes: 0.0625, 8, 12, 4, 6, 2, 3 over 12 and their negatives."""
    magnitudes = sorted(v / 12 for v in (0.0625, 8, 12, 4, 6, 2, 3))
    assert table(FORMATS["fp4"])[:15].tolist() == pytest.approx([-m for m in reversed(magnitudes)] + [0.0] + magnitudes)


def test_a_learned_table_may_be_shorter_than_its_codes():
    fmt = Format("learned", 4, "table", values=(-3.0, -0.5, 0.0, 1.0, 5.0))
    x = torch.tensor([-9.0, -0.4, 0.2, 0.9, 99.0, float("nan")])
    assert decode(encode(x, fmt), fmt).tolist() == [-3.0, -0.5, 0.0, 1.0, 5.0, 0.0]


def test_unknown_format_lists_and_suggests():
    with pytest.raises(OptionError, match=r"unknown format 'in4'.*Did you mean 'int4'.*Known: int2.*nf4"):
        formats.find("in4")
