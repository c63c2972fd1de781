"""Spellings round-trip, errors list what exists, and the stated size is what memory holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompile.core.errors import OptionError
from qcompile.core.formats import FORMATS
from qcompile.core.layouts import LAYOUTS
from qcompile.core.qtensor import quantize
from qcompile.core.scheme import FULL, GROUPS, Scheme

sizes = st.integers(1, 5000)
groups = st.one_of(st.sampled_from(sorted(GROUPS.values())), st.tuples(st.just(1), sizes), st.tuples(sizes, sizes))


@st.composite
def schemes(draw, depth: int = 2) -> Scheme:
    """Any scheme that the rules allow."""
    nested = draw(st.none() | schemes(depth - 1)) if depth else None
    parts = (draw(st.sampled_from(sorted(FORMATS.values(), key=str))), draw(groups), draw(st.sampled_from(["none", "point", "min"])), draw(st.booleans()), nested)
    try:
        return Scheme(*parts, draw(st.sampled_from(["", *LAYOUTS])))
    except OptionError:
        assume(False)
        raise


@settings(deadline=None)
@given(schemes())
def test_round_trip(s):
    assert Scheme.parse(str(s)) == s
    assert Scheme.parse(f"  {str(s).upper()} ") == s
    assert Scheme.parse(s) is s
    assert hash(Scheme.parse(str(s))) == hash(s)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_alone_is_a_scheme_for_each_row(name):
    assert str(Scheme.parse(name)) == f"{name}.row"
    assert Scheme.parse(name) == Scheme(FORMATS[name], (1, FULL))


def test_parts_in_any_order():
    assert Scheme.parse("uint4.point.plain.g64") == Scheme(FORMATS["uint4"], (1, 64), "point", layout="plain")
    assert str(Scheme.parse("int4.b1x128")) == "int4.g128"
    assert Scheme.parse("nf4.g64/int8.g256").scale == Scheme.parse("int8.g256")
    assert Scheme.parse("nf4.g64/int8.g256/e4m3.tensor").scale.scale == Scheme.parse("e4m3.tensor")


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("in4.g128", r"unknown format 'in4' in scheme 'in4.g128'. Did you mean 'int4'\? Known: int2, .*nf4, fp4"),
        ("", r"unknown format ''.*Known: int2"),
        (
            "int4.g128.pont",
            r"unknown part 'pont' in scheme 'int4.g128.pont'. Did you mean 'point'\?.*tensor, row, g<columns>, b<rows>x<columns>, point, min, static, plain, planes",
        ),
        ("int4.g0", "unknown part 'g0'"),
        ("int4..g8", "unknown part ''"),
        ("int4.g128.row", "gives its group twice: 'g128' and 'row'"),
        ("int4.point.min", "gives its zero twice"),
        ("int8.row.static", r"static range is one for the tensor; write 'int8.tensor.static'"),
        ("nf4.g64.point", "integer zero point needs an integer format; 'min'"),
        ("e4m3.row.planes", "8 bits"),
        ("nf4.g64/", r"unknown format ''"),
        ("nf4.g64/int8.tensor.static", r"write '/int8.tensor'"),
        ("nf4.g64.min/uint6.g8", "minima of nf4 may be negative"),
        (None, "a scheme is a string such as 'int4.g128', not None"),
        (4, "a scheme is a string"),
    ],
)
def test_errors_say_what_exists(spelling, message):
    with pytest.raises(OptionError, match=message):
        Scheme.parse(spelling)


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [
        ("int8.row", 8 + 32 / 4096),
        ("int8.tensor.static", 8.0),
        ("uint4.g128.point", 4.1875),
        ("e4m3.tensor", 8.0),
        ("e4m3.b128x128", 8 + 16 / 128**2),
        ("nf4.g64/int8.row", 4.125 + 32 / 4096),
        ("nf4.g64/int8.g256", 4.125 + 16 / 4096),  # a row has 64 scales, so that a group of 256 is the row
        ("int4.g32", 4.5),
        ("uint4.g32.min", 5.0),
        ("int8.g32", 8.5),
        ("uint4.g32.min/uint6.g8", 4.5),
        ("e2m1.g16/e4m3.tensor", 4.5),
        ("int4.g128.plain", 8.125),
    ],
)
def test_bits_of_named_schemes(spelling, bits):
    """The table of the design, on a 4096 x 4096 weight with scales of 16 and zero points of 8 bits."""
    assert Scheme.parse(spelling).bits_per_weight((4096, 4096)) == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize(
    "tail", [".row", ".tensor", ".g32", ".g128", ".g48", ".b4x64", ".g32.min", ".g128.plain", ".g16/int8.row", ".g32/e4m3.tensor", ".g16/int6.g8", ".g8/e4m3.b2x4"]
)
@pytest.mark.parametrize("name", ["int2", "int3", "int4", "uint5", "int8", "e4m3", "e3m2", "nf4"])
def test_bits_are_the_bytes_that_memory_holds(name, tail):
    s = Scheme.parse(name + tail)
    for shape in ((24, 256), (1, 128), (5, 130), (3, 8, 384), (2, 7, 1)):
        x = torch.rand(shape)
        assert s.bits_per_weight(shape) * x.numel() == pytest.approx(8 * quantize(x, s).nbytes, rel=1e-9), shape


def test_bits_with_zero_points():
    s = Scheme.parse("uint4.g128.point")
    assert s.bits_per_weight((16, 256)) == 8 * quantize(torch.randn(16, 256), s).nbytes / (16 * 256) == 4.1875


@settings(deadline=None)
@given(schemes(depth=0), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 400), st.integers(1, 400))
def test_extent_and_grid(s, lead, n, k):
    r, c = s.extent(n, k)
    assert 1 <= r <= n and 1 <= c <= k
    assert s.group[0] in (FULL, r) or r == n
    assert s.group[1] in (FULL, c) or c == k
    rows, columns = s.grid_shape((*lead, n, k))[-2:]
    assert (rows - 1) * r < n <= rows * r and (columns - 1) * c < k <= columns * c
    assert s.grid_shape((*lead, n, k))[:-2] == tuple(lead)


def test_packing_is_the_layout_or_the_default():
    assert Scheme.parse("int4").packing == "planes"
    assert Scheme.parse("int4.plain").packing == "plain"
    assert Scheme.parse("int8").packing == "plain"
    for name, fmt in FORMATS.items():
        assert Scheme.parse(name).packing == ("plain" if fmt.bits == 8 else "planes")
