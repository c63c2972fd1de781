"""What quantization means: nearest representable value under the stored scale, and scales that clip nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.core import qtensor as QTENSOR
from qcompile.core.errors import WeightError
from qcompile.core.formats import FORMATS, table
from qcompile.core.qtensor import GROUP_SCALE, QTensor, dequantize, quantize, tile, unpack, untile, value
from qcompile.core.ranges import RANGES, TINY
from qcompile.core.scheme import Scheme

SIGNED = [name for name, fmt in FORMATS.items() if fmt.lo < 0]
UNSIGNED = [name for name, fmt in FORMATS.items() if fmt.lo == 0]
NESTED = [
    "nf4.g64/int8.row",
    "int4.g16/e4m3.tensor",
    "uint4.g32.min/uint6.g8",
    "int4.g32.min/int6.g8",
    "e4m3.g16/int8.row",
    "e2m1.g16/e4m3.tensor",
    "nf4.g8/int8.g4/e4m3.tensor",
    "uint4.g32.point/int8.row",
]
EVERY = [
    *(f"{name}.{group}" for name in SIGNED for group in ("row", "g48")),
    *(f"{name}.g48.min" for name in FORMATS),
    *(f"{name}.g48.point" for name, fmt in FORMATS.items() if fmt.kind == "int"),
    *(f"int4.{group}" for group in ("tensor", "g32", "g1000", "b4x32", "b5x7", "b100x1000")),
    *(f"uint4.{group}.{zero}" for group in ("row", "tensor", "b4x32") for zero in ("min", "point")),
    "e4m3.tensor", "e4m3.b4x32", "int4.g48.plain", "nf4.g48.min.plain", *NESTED,
]  # fmt: skip


def parts(x: torch.Tensor, q: QTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales and zeros as float64 of shape (..., N, K): each element beside its own scale."""
    n, k = x.shape[-2:]
    r, c = q.scheme.extent(n, k)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.double().repeat_interleave(r, -2).repeat_interleave(c, -1)[..., :n, :k]

    zero = torch.zeros(1, 1) if q.zero is None else spread(value(q.zero))
    return x.double(), spread(value(q.scale)), zero.double()


def candidates(x: torch.Tensor, q: QTensor) -> torch.Tensor:
    """Every value that each element could have been given, (..., N, K, codes)."""
    _, s, z = parts(x, q)
    codes = table(q.scheme.fmt).double()
    codes = codes[torch.isfinite(codes)][: len(q.scheme.fmt.values) or None]
    s, z = s[..., None], z[..., None]
    return {"none": codes * s, "point": (codes - z) * s, "min": codes * s - z}[q.scheme.zero]


def check(x: torch.Tensor, s: Scheme) -> QTensor:
    """Quantize, and hold the result against the definition."""
    q = quantize(x, s)
    y = dequantize(q)
    assert y.dtype == torch.float32 and y.shape == x.shape == q.shape and bool(torch.isfinite(y).all())
    x64, scale, zero = parts(x, q)
    every = candidates(x, q)
    best = (every - x64[..., None]).abs().amin(-1)
    size = every.abs().amax(-1)
    assert bool(((y.double() - x64).abs() <= best + 1e-6 * (size + zero.abs())).all()), "a nearer value exists"
    if s.scale is None:  # within half the widest step of the format; at an end half a step more where the zero was rounded, and the rounding of the scale
        v = torch.tensor(sorted({float(t) for t in table(s.fmt) if torch.isfinite(t)}))
        assert bool((best <= (0.5 * float(v.diff().max()) + 2**-8 * (s.fmt.hi - min(s.fmt.lo, 0))) * scale).all()), "an error above half a step"
        low, high = every.amin(-1), every.amax(-1)
        slack = 2**-8 * (s.fmt.hi - min(s.fmt.lo, 0)) * scale + {"none": 0.0, "point": 0.5 * scale, "min": 2**-8 * zero.abs()}[s.zero]
        assert bool((x64 <= high + slack).all()), "clipped above"
        assert bool((x64 >= low - slack).all()), "clipped below"
    return q


@pytest.mark.parametrize("spelling", EVERY)
def test_nearest_and_unclipped(spelling):
    s = Scheme.parse(spelling)
    check(torch.randn(9, 130), s)
    check(torch.randn(5, 7) * 3 + 1, s)


@pytest.mark.parametrize("spelling", [f"{name}.{group}" for name in UNSIGNED for group in ("row", "g48")])
def test_unsigned_formats_hold_what_is_not_negative(spelling):
    check(torch.rand(9, 130), Scheme.parse(spelling))
    with pytest.raises(WeightError, match=r"w of shape \(9, 130\) has negative values, which uint.* cannot hold.*'point' or 'min'"):
        quantize(torch.randn(9, 130), Scheme.parse(spelling), name="w")


@pytest.mark.parametrize("name", SIGNED)
def test_half_a_step_for_rows(name):
    """The bound that everybody quotes, written out: half the widest gap of the format times the row's maximum over the format's."""
    fmt = FORMATS[name]
    x = torch.randn(64, 200)
    v = table(fmt)[torch.isfinite(table(fmt))].unique()
    step = float(v.diff().max()) * x.abs().amax(1, keepdim=True) / fmt.hi
    error = (dequantize(quantize(x, Scheme.parse(f"{name}.row"))) - x).abs()
    assert bool((error <= 0.5 * step * (1 + 2**-8)).all())  # a bfloat16 scale is off by at most 2**-9 of it


@pytest.mark.parametrize("spelling", EVERY)
def test_experts_are_quantized_one_by_one(spelling):
    s = Scheme.parse(spelling)
    x = torch.randn(2, 3, 6, 70) * torch.logspace(-2, 2, 6).reshape(2, 3, 1, 1)
    q = quantize(x, s)
    assert q.shape == x.shape
    for i in range(2):
        for j in range(3):
            for whole, own in zip(q.flatten(), quantize(x[i, j], s).flatten()):
                assert torch.equal(whole[i, j].view(torch.uint8), own.view(torch.uint8))


@pytest.mark.parametrize("spelling", EVERY)
def test_zeros_stay_zeros(spelling):
    s = Scheme.parse(spelling)
    x = torch.randn(8, 128)
    x[:4] = 0
    x[4, 16:64] = 0
    y = dequantize(quantize(x, s))
    if s.zero != "min":  # a minimum need not be a multiple of its scale
        assert bool((y[x == 0] == 0).all())
    assert bool(torch.isfinite(y).all())
    zeros = dequantize(quantize(torch.zeros(4, 128), s))
    assert bool((zeros == 0).all())


@pytest.mark.parametrize("spelling", [s for s in EVERY if "/" not in s])
def test_constants(spelling):
    """One value everywhere is an end of its own range: at most the scale's rounding and half a step away."""
    s = Scheme.parse(spelling)
    for level in (1.0, -1.0, 0.3, -7.25, 1e-30, -1e-30, 1e-20, 1e30, -1e30, 1e-44):
        x = torch.full((4, 130), level)
        q = quantize(x, s)
        y = dequantize(q)
        assert bool(torch.isfinite(y).all())
        step = max(2.0**-7 * abs(level), 0.5 * value(q.scale).max().item() * _widest_gap(s))
        assert float((y - x).abs().max()) <= step * (1 + 1e-4) + TINY * s.fmt.hi, level


def _widest_gap(s: Scheme) -> float:
    v = table(s.fmt)[torch.isfinite(table(s.fmt))].unique()
    return float(v.diff().max())


@pytest.mark.parametrize("spelling", [s for s in EVERY if "/" not in s and s.split(".")[1] in ("row", "g48", "tensor")])
def test_tiny_and_huge(spelling):
    s = Scheme.parse(spelling)
    for scale in (1e-38, 1e-30, 1e-20, 1e20, 1e30, 3e37):
        x = torch.randn(4, 96).clamp(-3, 3) * scale
        q = quantize(x, s)
        y = dequantize(q)
        assert bool(torch.isfinite(y).all())
        bound = 0.5 * _widest_gap(s) * float(value(q.scale).max()) + 2**-8 * float(x.abs().max())
        assert float((y.double() - x.double()).abs().max()) <= bound, scale


@pytest.mark.parametrize(("spelling", "most"), [("nf4.row", torch.finfo(torch.float32).max), ("int8.row", 3.3e38), ("e5m2.tensor", 3.3e38), ("uint4.g32.point", 3.3e38)])
def test_no_scale_overflows(spelling, most):
    x = torch.zeros(2, 64)
    x[0, 0] = most
    assert bool(torch.isfinite(dequantize(quantize(x, Scheme.parse(spelling)))).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("spelling", ["int8.row", "uint4.g32.point", "nf4.g64/int8.row", "e4m3.b4x32", "int4.g32.min"])
def test_input_and_output_dtypes(spelling, dtype):
    s = Scheme.parse(spelling)
    x = torch.randn(6, 100).to(dtype)
    q = quantize(x, s)
    for a, b in zip(q.flatten(), quantize(x.float(), s).flatten()):
        assert torch.equal(a, b)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(q, out), dequantize(q).to(out)) and dequantize(q, out).dtype == out


def test_parameters_leave_no_graph_and_strides_do_not_matter():
    w = torch.nn.Parameter(torch.randn(70, 6))
    q = quantize(w.T, Scheme.parse("int4.g32"))
    assert not any(t.requires_grad for t in q.flatten()) and all(t.is_contiguous() for t in q.flatten())
    assert torch.equal(dequantize(q), dequantize(quantize(w.detach().T.contiguous(), Scheme.parse("int4.g32"))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite(bad, dtype):
    x = torch.randn(2, 3, 40, dtype=dtype)
    x[1, 2, 7] = x[1, 2, 9] = bad
    with pytest.raises(WeightError, match=r"parameter model\.fc\.weight of shape \(2, 3, 40\) has 2 values that are NaN or infinite, the first at \(1, 2, 7\)"):
        quantize(x, Scheme.parse("int8.row"), name="model.fc.weight")


@pytest.mark.parametrize("shape", [(5,), (), (0, 8), (8, 0)])
def test_not_a_weight(shape):
    with pytest.raises(WeightError, match=r"parameter norm of shape .* cannot be quantized"):
        quantize(torch.ones(shape), Scheme.parse("int8.row"), name="norm")


# --- double quantization ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", NESTED)
def test_scales_are_quantized_by_their_own_scheme(spelling):
    s = Scheme.parse(spelling)
    x = torch.randn(8, 256)
    q = quantize(x, s)
    assert isinstance(q.scale, QTensor) and q.scale.scheme == s.scale and q.scale.shape == s.grid_shape(x.shape)
    assert isinstance(q.zero, QTensor if s.zero == "min" else torch.Tensor if s.zero == "point" else type(None))
    r, c = s.extent(8, 256)
    flat, _ = RANGES["absmax"](tile(x, (r, c)), s, (-3, -1))
    wanted = quantize(flat[..., :, 0, :, 0], s.scale)
    assert torch.equal(value(q.scale), dequantize(wanted))


@pytest.mark.parametrize("spelling", NESTED)
def test_a_scale_that_becomes_zero_reads_as_zeros(spelling):
    x = torch.randn(4, 256)
    x[:, :64] *= 1e-6
    x[0, 64:128] = 0
    y = dequantize(quantize(x, Scheme.parse(spelling)))
    assert bool(torch.isfinite(y).all())
    assert float((y - x).norm() / x.norm()) < 0.3
    assert float(y[0, 64:128].abs().max()) < 0.1


# --- scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNED)
def test_the_maximum_is_hardly_clipped(name):
    """Stored scale times greatest value is the maximum up to the rounding of the scale, for maxima all over a binade."""
    s = Scheme.parse(f"{name}.row")
    x = torch.linspace(1, 4, 999)[:, None]
    q = quantize(x, s)
    assert bool((value(q.scale) * s.fmt.hi >= x * (1 - 2**-8)).all())
    assert bool((value(q.scale) * s.fmt.hi <= x * (1 + 2**-8)).all())


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.kind == "int"])
def test_zero_points_represent_zero(name):
    s = Scheme.parse(f"{name}.row.point")
    x = torch.randn(200, 33) + torch.linspace(-5, 5, 200)[:, None]
    x[:, 5] = 0
    q = quantize(x, s)
    assert q.zero.dtype == s.fmt.dtype
    assert bool((value(q.zero) >= s.fmt.lo).all()) and bool((value(q.zero) <= s.fmt.hi).all())
    assert bool((dequantize(q)[:, 5] == 0).all())


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-(2.0**122), 2.0**122, width=32), min_size=1, max_size=24), st.sampled_from(EVERY))
def test_any_finite_row(values, spelling):
    s = Scheme.parse(spelling)
    x = torch.tensor([values])
    y = dequantize(quantize(x, s))
    assert bool(torch.isfinite(y).all())
    if s.scale is None:
        spread = float(x.max().clamp(min=0) - x.min().clamp(max=0)) if s.zero != "none" else 2 * float(x.abs().max())
        width = _widest_gap(s) / (s.fmt.hi - s.fmt.lo if s.zero != "none" else 2 * s.fmt.hi)
        assert float((y.double() - x.double()).abs().max()) <= 0.5 * width * spread * 1.02 + 2**-8 * spread + TINY * s.fmt.hi


# --- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", EVERY)
def test_flatten_round_trip(spelling):
    s = Scheme.parse(spelling)
    for shape in ((9, 130), (2, 3, 70)):
        q = quantize(torch.randn(shape), s)
        tensors = q.flatten()
        assert all(type(t) is torch.Tensor for t in tensors)
        back = QTensor.unflatten(tensors, s, q.k)
        assert back.shape == q.shape and back.nbytes == q.nbytes == sum(t.nbytes for t in tensors)
        assert [t.data_ptr() for t in back.flatten()] == [t.data_ptr() for t in tensors]
        assert torch.equal(dequantize(back), dequantize(q))
        codes = unpack(q)
        assert codes.shape == shape and codes.dtype == s.fmt.dtype


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(1, 50))
@settings(deadline=None)
def test_tile(n, k, r, c):
    r, c = min(r, n), min(c, k)
    x = torch.randn(2, n, k)
    t = tile(x, (r, c))
    assert t.shape == (2, -(-n // r), r, -(-k // c), c)
    assert torch.equal(untile(t, n, k), x)
    assert torch.equal(t[:, 0, :, 0], x[:, :r, :c])
    assert float(t.double().sum()) == pytest.approx(float(x.double().sum()), abs=1e-6)


def test_group_larger_than_the_axis_is_the_axis():
    x = torch.randn(5, 40)
    wide, row = quantize(x, Scheme.parse("int4.g128")), quantize(x, Scheme.parse("int4.row"), scale_dtype=GROUP_SCALE)
    assert wide.scale.shape == row.scale.shape == (5, 1)
    assert torch.equal(dequantize(wide), dequantize(row))


def test_a_ragged_group_is_quantized_by_itself():
    x = torch.randn(5, 70)
    x[:, 64:] *= 100
    y = dequantize(quantize(x, Scheme.parse("int8.g32")))
    assert torch.equal(y[:, 64:], dequantize(quantize(x[:, 64:], Scheme.parse("int8.row"), scale_dtype=GROUP_SCALE)))
    assert torch.equal(y[:, :32], dequantize(quantize(x[:, :32], Scheme.parse("int8.row"), scale_dtype=GROUP_SCALE)))


def test_blocks_share_scales_across_rows():
    x = torch.randn(130, 200)
    q = quantize(x, Scheme.parse("e4m3.b128x128"))
    assert q.scale.shape == (2, 2)
    own = quantize(x[128:, 128:], Scheme.parse("e4m3.tensor"), scale_dtype=GROUP_SCALE)
    assert torch.equal(dequantize(q)[128:, 128:], dequantize(own))


def test_gguf_q4_0_by_hand():
    """int4.g32 on one block, computed the long way."""
    x = torch.linspace(-1, 2, 32)[None]
    q = quantize(x, Scheme.parse("int4.g32"))
    scale = float(q.scale[0, 0])
    assert scale == pytest.approx(2 / 7, rel=2**-8)
    assert unpack(q)[0].tolist() == [max(-8, min(7, round(float(v) / scale))) for v in x[0]]


@pytest.mark.parametrize("spelling", ["int4.g32", "uint4.g32.point", "uint4.g32.min", "nf4.g32/int8.row", "int8.row", "e4m3.row", "int3.g32", "int8.tensor", "nf4.g32/int8.tensor", "int4.b16x32"])
@pytest.mark.parametrize("shape", [(37, 96), (5, 12, 96)], ids=str)
def test_in_pieces_is_the_same(monkeypatch, spelling, shape):
    """Large weights are quantized some rows at a time where rows do not depend on each other; schemes whose groups span rows are not."""
    x, scheme = torch.randn(shape), Scheme.parse(spelling)
    whole = quantize(x, scheme).flatten()
    monkeypatch.setattr(QTENSOR, "PIECE", 700)
    calls = []
    real = QTENSOR._in_pieces
    monkeypatch.setattr(QTENSOR, "_in_pieces", lambda *args: (calls.append(1), real(*args))[1])
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(quantize(x, scheme).flatten(), whole, strict=True))
    assert bool(calls) == (len(shape) > 2 or QTENSOR.by_rows(scheme))


def test_errors_in_pieces_name_the_place_in_all_of_the_weight(monkeypatch):
    monkeypatch.setattr(QTENSOR, "PIECE", 100)
    x = torch.randn(40, 32)
    x[33, 7] = float("nan")
    with pytest.raises(WeightError, match=r"parameter w of shape \(40, 32\).*\(33, 7\)"):
        quantize(x, Scheme.parse("int8.row"), name="w")
