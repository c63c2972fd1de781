"""``scaled_linear``: quantized activations times a quantized weight, against float64 and, for integers, against int64."""

from __future__ import annotations

import itertools

import pytest
import torch

from qcompile.core.errors import OptionError
from qcompile.core.qtensor import dequantize, quantize, unpack, value
from qcompile.core.scheme import Scheme
from qcompile.kernels.op import target
from qcompile.kernels.quantize import reference as quantized
from qcompile.kernels.scaled_linear import parse, spell, values

INPUTS = ["int8.row", "int8.row.point", "uint8.row.point", "int8.tensor", "int8.tensor.point", "int8.g32", "uint8.g48.point", "e4m3.row", "e5m2.tensor", "e2m1.g32", "int4.row"]
STATIC = ["int8.tensor.static", "uint8.tensor.static.point", "e4m3.tensor.static"]
WEIGHTS = ["int8.row", "int4.g32", "uint4.g48.point", "uint4.g32.min", "e4m3.b16x32", "nf4.g64/int8.row"]


def activations(spelling: str, *shape: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Codes and scales of random rows; a static range comes back as it was given."""
    s = Scheme.parse(spelling)
    x = torch.randn(shape) + (0.3 if s.zero != "none" else 0)
    given = [torch.tensor([3 / s.fmt.hi]), *([torch.tensor([100.0])] if s.zero != "none" else [])] if s.static else []
    codes, *scales = quantized(x, given, spelling)
    return codes, given or scales


def wide(codes: torch.Tensor, scales: list[torch.Tensor], s: Scheme) -> torch.Tensor:
    """The activations in float64, computed without the op's own code."""
    k = codes.shape[-1]
    c = s.group[1] or k
    spread = [t.double() if t.shape[-1] == 1 else t.double().repeat_interleave(c, -1)[..., :k] for t in scales]
    y = codes.float().double() if s.fmt.kind == "int" or s.fmt.native else quantity(codes, s)
    return (y - spread[1] if len(spread) > 1 else y) * spread[0]


def quantity(codes: torch.Tensor, s: Scheme) -> torch.Tensor:
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    assert s.fmt.name == "e2m1"
    return torch.cat([e2m1, -e2m1])[codes.long()]


@pytest.mark.parametrize(("x", "w"), [*itertools.product(INPUTS + STATIC, ["int8.row", "uint4.g48.point"]), *itertools.product(["int8.row"], WEIGHTS)], ids=str)
def test_float64(x, w):
    sx, sw = Scheme.parse(x), Scheme.parse(w)
    for n, k in ((17, 129), (1, 1), (33, 300)):
        q = quantize(torch.randn(n, k), sw)
        w64 = dequantize(q).double()
        for shape in ((1, k), (3, k), (2, 3, k), (0, k)):
            codes, scales = activations(x, *shape)
            y = target("scaled_linear")(codes, scales, q.flatten(), spell(sx, sw))
            x64 = wide(codes, scales, sx)
            assert y.shape == (*shape[:-1], n) and y.dtype == torch.float32
            bound = 3e-6 * (x64.abs() @ w64.abs().T) + 1e-30
            assert bool(((y.double() - x64 @ w64.T).abs() <= bound).all())


@pytest.mark.parametrize(
    ("x", "w"), [("int8.row", "int8.row"), ("int8.tensor", "int4.row"), ("int8.row", "uint4.row.point"), ("uint8.row.point", "int8.row"), ("int8.row", "int2.row")]
)
def test_integers_are_exact(x, w):
    """With unit scales and sums below 2**24 the float32 result is the integer; the largest codes included."""
    sx, sw = parse(f"{x} @ {w}")
    k, n = 500, 9
    q = quantize(torch.randn(n, k), sw)
    q.scale.fill_(1)
    codes = torch.randint(int(sx.fmt.lo), int(sx.fmt.hi) + 1, (6, k)).to(sx.fmt.dtype)
    codes[0] = int(sx.fmt.lo)
    zeros = [torch.full((6, 1) if sx.group == (1, 0) else (1,), 7.0)] if sx.zero != "none" else []
    scales = [torch.ones_like(z) for z in zeros] or [torch.ones((6, 1) if sx.group == (1, 0) else (1,))]
    exact = (codes.long() - (7 if zeros else 0)) @ (unpack(q).long() - (q.zero.long() if q.zero is not None else 0)).T
    assert int(exact.abs().max()) < 2**24
    y = target("scaled_linear")(codes, [*scales, *zeros], q.flatten(), f"{x} @ {w}")
    assert torch.equal(y.long(), exact) and torch.equal(y, y.round())


def test_scales_multiply_exact_sums():
    """Powers of two as scales change exponents only."""
    s = Scheme.parse("int8.row")
    q = quantize(torch.randn(5, 200), s)
    q.scale.copy_(2.0 ** torch.arange(-2.0, 3.0)[:, None])
    codes = torch.randint(-128, 128, (3, 200)).to(torch.int8)
    scale = torch.tensor([[0.5], [1.0], [4.0]])
    exact = (codes.long() @ q.codes.long().T).double() * scale.double() * value(q.scale).double().T
    assert torch.equal(target("scaled_linear")(codes, [scale], q.flatten(), "int8.row @ int8.row").double(), exact)


@pytest.mark.parametrize("spelling", INPUTS + STATIC)
def test_values(spelling):
    s = Scheme.parse(spelling)
    codes, scales = activations(spelling, 2, 3, 100)
    torch.testing.assert_close(values(codes, scales, s).double(), wide(codes, scales, s), rtol=1e-6, atol=1e-30)


def test_spelling():
    assert parse("int8.row @ int4.g128") == (Scheme.parse("int8.row"), Scheme.parse("int4.g128"))
    assert spell(*parse("INT8 @ int4.g128.planes")) == "int8.row @ int4.g128.planes"
    with pytest.raises(OptionError, match="takes 'input @ weight'"):
        parse("int8.row")
    with pytest.raises(OptionError, match="unknown format"):
        parse("int8.row @ int9")
