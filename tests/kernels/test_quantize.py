"""``quantize``: codes and scales of activations, in every way that a scheme can ask for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qcompile.core import qtensor
from qcompile.core.formats import FORMATS
from qcompile.core.scheme import Scheme
from qcompile.kernels.quantize import OP, Activations, fake, reference, rows
from qcompile.kernels.scaled_linear import values

INPUTS = [
    *(f"{name}.row" for name, fmt in FORMATS.items() if fmt.lo < 0),
    *(f"{name}.row.point" for name, fmt in FORMATS.items() if fmt.kind == "int"),
    "int8.tensor", "e4m3.tensor", "uint8.tensor.point", "int8.g32", "e4m3.g128", "uint8.g32.point", "int4.g1000", "nf4.g48",
]  # fmt: skip
SHAPES = [(4, 96), (1, 1), (2, 3, 70), (7,), (1, 5, 1, 33)]


def check_error(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, s: Scheme) -> None:
    grid = (
        sorted({float(v) for v in qtensor.decode(torch.arange(2**s.fmt.bits, dtype=torch.uint8).view(s.fmt.native or torch.uint8), s.fmt)}) if s.fmt.kind != "int" else [0.0, 1.0]
    )
    gap = max(b - a for a, b in pairwise(grid) if b - a < float("inf")) if s.fmt.kind != "int" else 1.0
    columns = s.extent(1, x.shape[-1])[1]
    wide = scale if scale.numel() == 1 or scale.shape[-1] == 1 else scale.repeat_interleave(columns, -1)[..., : x.shape[-1]]
    assert bool(((y - x.float()).abs() <= 0.5 * gap * wide * (1 + 1e-4) + 1e-6 * x.float().abs()).all())


@pytest.mark.parametrize("spelling", INPUTS)
def test_half_a_step(spelling):
    s = Scheme.parse(spelling)
    for shape in SHAPES:
        x = torch.randn(shape) * 3 + (0.5 if s.zero != "none" else 0)
        codes, *scales = reference(x, [], spelling)
        assert codes.shape == x.shape and codes.dtype == s.fmt.dtype
        assert all(t.dtype == torch.float32 for t in scales) and len(scales) == (1 if s.zero == "none" else 2)
        y = values(codes, scales, s)
        assert y.shape == x.shape and y.dtype == torch.float32
        check_error(x, y, scales[0], s)


@pytest.mark.parametrize("spelling", ["int8.row", "e4m3.row", "uint8.row.point", "int8.g32"])
def test_agrees_with_the_weights_quantizer(spelling):
    """The same range rule: with scales kept in float32 a weight gets the same codes."""
    x = torch.randn(6, 96)
    codes, scale, *zero = reference(x, [], spelling)
    q = qtensor.quantize(x, Scheme.parse(spelling), scale_dtype=torch.float32)
    assert torch.equal(codes.view(torch.uint8), qtensor.unpack(q).view(torch.uint8)) and torch.equal(scale, q.scale)
    assert all(torch.equal(z, q.zero.float()) for z in zero)


def test_rows_are_independent_and_tensors_are_not():
    x = torch.randn(5, 40)
    x[2] *= 1000
    codes, scale = reference(x, [], "int8.row")
    for i in range(5):
        own, own_scale = reference(x[i : i + 1], [], "int8.row")
        assert torch.equal(codes[i : i + 1], own) and torch.equal(scale[i : i + 1], own_scale)
    _, one = reference(x, [], "int8.tensor")
    assert one.shape == (1,) and float(one) == float(x.abs().max() / 127)


def test_leading_axes_are_rows():
    x = torch.randn(2, 3, 4, 70)
    for spelling in ("int8.row", "int8.g32", "uint8.row.point", "uint8.g32.point"):
        for part, flat in zip(reference(x, [], spelling), reference(x.reshape(-1, 70), [], spelling)):
            assert part.shape[:-1] == (2, 3, 4)
            assert torch.equal(part.reshape(flat.shape), flat)


def test_static():
    x = torch.linspace(-10, 10, 101)
    (codes,) = reference(x, [torch.tensor([0.05])], "int8.tensor.static")
    assert torch.equal(codes, (x / 0.05).round().clamp(-128, 127).to(torch.int8))
    (codes,) = reference(x, [torch.tensor([0.05]), torch.tensor([100.0])], "uint8.tensor.static.point")
    assert torch.equal(codes, (x / 0.05 + 100).round().clamp(0, 255).to(torch.uint8))
    (codes,) = reference(x, [torch.tensor([0.01])], "e4m3.tensor.static")
    assert torch.equal(codes.view(torch.uint8), (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("spelling", [s for s in INPUTS if Scheme.parse(s).fmt.lo < 0])
def test_zero_rows_are_zeros(spelling):
    x = torch.randn(4, 96)
    x[1] = 0
    codes, *scales = reference(x, [], spelling)
    assert bool((values(codes, scales, Scheme.parse(spelling))[1] == 0).all())


def test_what_is_not_finite_stays_in_its_row():
    """No error is raised at run time; a NaN comes out as NaN, in its own row and nowhere else."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(4, 96)
        x[2, 5] = bad
        for spelling in ("int8.row", "e4m3.row", "int4.row"):
            codes, scale = reference(x, [], spelling)
            y = values(codes, [scale], Scheme.parse(spelling))
            assert not bool(torch.isfinite(y[2].sum())) and bool(torch.isfinite(y[[0, 1, 3]]).all())


@pytest.mark.parametrize("spelling", ["int8.row", "int8.tensor", "int8.g32", "uint8.row.point", "e4m3.row"])
@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)], ids=str)
def test_no_rows(spelling, shape):
    for got, wanted in zip(reference(torch.randn(shape), [], spelling), fake(torch.randn(shape), [], spelling), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_quantized_in_float32(dtype):
    x = torch.randn(4, 96).to(dtype)
    for got, wanted in zip(reference(x, [], "int8.row"), reference(x.float(), [], "int8.row")):
        assert torch.equal(got, wanted)


ROWS = ["int8.row", "int4.row", "e4m3.row", "e5m2.row"]


@pytest.mark.parametrize("spelling", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_gpu_are_the_references(spelling, dtype):
    """The same scales, and the same codes but for values that lie between two, at any size of values."""
    s = Scheme.parse(spelling)
    for shape in SHAPES:
        for factor in (1.0, 1e-4, 2.0**12):
            x = (torch.randn(shape) * factor).to(dtype)
            (codes, scale), (wanted, wanted_scale) = rows(x, [], spelling), reference(x, [], spelling)
            assert codes.dtype == wanted.dtype and codes.shape == wanted.shape and torch.equal(scale, wanted_scale)
            apart = (codes.float() - wanted.float()).abs() > 0
            assert float(apart.sum()) <= 1 + 0.01 * apart.numel()
            check_error(x, values(codes, [scale], s), scale, s)
    for size in (1e-37, 1e37):
        x = torch.linspace(-size, size, 96)[None]
        (codes, scale), (wanted, wanted_scale) = rows(x, [], spelling), reference(x, [], spelling)
        assert torch.equal(scale, wanted_scale) and float((codes.float() != wanted.float()).sum()) <= 1


@pytest.mark.parametrize("spelling", ROWS)
def test_rows_of_a_gpu_that_are_zero_or_not_finite(spelling):
    x = torch.randn(7, 96)
    x[1] = 0
    x[2, 5], x[4, 0], x[5, 95] = float("nan"), float("inf"), -float("inf")
    y = values(*(lambda codes, scale: (codes, [scale]))(*rows(x, [], spelling)), Scheme.parse(spelling))
    assert bool((y[1] == 0).all()) and bool(y[[2, 4, 5]].isnan().all()) and bool(y[[0, 3, 6]].isfinite().all())


def test_which_are_traced_as_rows():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for spelling in ROWS:
        assert OP.choose(Activations(gpu, Scheme.parse(spelling), 96))[0] is OP.kernels[0]
        assert OP.choose(Activations(cpu, Scheme.parse(spelling), 96))[0] is None
    for spelling in ("int8.row.point", "uint8.row", "int8.g32", "e4m3.tensor", "int8.tensor.static", "nf4.row", "e2m1.row"):
        kernel, reason = OP.choose(Activations(gpu, Scheme.parse(spelling), 96))
        assert kernel is None and reason is not None and spelling in str(reason)
    assert OP.choose(Activations(gpu, Scheme.parse("int8.row"), 0))[0] is None
