"""``linear``: float activations times a quantized weight, against float64."""

from __future__ import annotations

import pytest
import torch

from qcompile.core.formats import FORMATS
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels.linear import flat_scales, unnested
from qcompile.kernels.op import target

WEIGHTS = [
    *(f"{name}.g32.min" for name in FORMATS), *(f"{name}.row" for name, fmt in FORMATS.items() if fmt.lo < 0), "int4.g128", "uint4.g48.point", "int8.tensor", "e4m3.b16x48",
    "nf4.g64/int8.row", "uint4.g32.min/uint6.g8", "e2m1.g16/e4m3.tensor",
]  # fmt: skip


def close64(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Within float32 rounding of the product in float64; the scale of the error is what the sums could have been."""
    x, w = x.double(), w.double()
    bound = 2e-6 * (x.abs() @ w.abs().mT) + 1e-30
    assert bool(((got.double() - x @ w.mT).abs() <= bound).all())


@pytest.mark.parametrize("spelling", WEIGHTS)
def test_float64(spelling):
    s = Scheme.parse(spelling)
    for n, k in ((17, 129), (1, 1), (33, 300)):
        q = quantize(torch.randn(n, k), s)
        for shape in ((1, k), (2, 3, k), (0, k), (k,)):
            x = torch.randn(shape)
            y = target("linear")(x, q.flatten(), spelling)
            assert y.shape == (*shape[:-1], n) and y.dtype == torch.float32
            close64(y, x, dequantize(q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_are_multiplied_in_float32(dtype):
    q = quantize(torch.randn(20, 200), Scheme.parse("int4.g64"))
    x = torch.randn(5, 200).to(dtype)
    y = target("linear")(x, q.flatten(), "int4.g64")
    assert y.dtype == torch.float32
    close64(y, x, dequantize(q))


@pytest.mark.parametrize("spelling", ["nf4.g64/int8.row", "uint4.g32.min/uint6.g8", "uint4.g32.point/int8.row", "nf4.g8/int8.g4/e4m3.tensor"])
def test_flat_scales(spelling):
    """Nested scales dequantized: another scheme, the same weight."""
    s = Scheme.parse(spelling)
    q = quantize(torch.randn(20, 200), s)
    x = torch.randn(5, 200)
    flat = flat_scales(q.flatten(), s, 200)
    assert unnested(s).scale is None and len(flat) == (2 if s.zero == "none" else 3)
    assert torch.equal(target("linear")(x, flat, str(unnested(s))), target("linear")(x, q.flatten(), spelling))
