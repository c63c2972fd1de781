"""``dequantize``: a packed weight as values."""

from __future__ import annotations

import pytest
import torch

from qcompile.core import qtensor
from qcompile.core.formats import FORMATS
from qcompile.core.scheme import Scheme
from qcompile.kernels.op import target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", [*(f"{name}.g32.min" for name in FORMATS), "int4.g32", "uint4.g32.point", "e4m3.b16x16", "nf4.g64/int8.row", "uint4.g32.min/uint6.g8"])
def test_is_the_qtensors_own(spelling, dtype):
    s = Scheme.parse(spelling)
    for shape in ((5, 100), (2, 3, 256)):
        q = qtensor.quantize(torch.randn(shape), s)
        y = target("dequantize")(q.flatten(), spelling, q.k, dtype)
        assert y.dtype == dtype and torch.equal(y, qtensor.dequantize(q, dtype))


def test_float32_scales_serve_as_well():
    """Kernels get nested scales flattened to float32; the op takes them as they are."""
    s = Scheme.parse("int4.g32")
    q = qtensor.quantize(torch.randn(5, 100), s, scale_dtype=torch.float32)
    assert q.scale.dtype == torch.float32
    assert torch.equal(target("dequantize")(q.flatten(), "int4.g32", 100, torch.float32), qtensor.dequantize(q))
