"""``columns``: some columns of a quantized weight are those of the whole weight, for every scheme."""

from __future__ import annotations

import pytest
import torch

from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels import OPS
from qcompile.kernels.op import target


@pytest.mark.parametrize("spelling", ["int8.row", "int4.g32", "uint4.g32.point", "uint3.g16.min", "nf4.g64/int8.g256", "e4m3.tensor", "e2m1.g16", "int8.b16x16"])
@pytest.mark.parametrize("index", [[], [0], [99, 3, 3, 50]], ids=str)
def test_columns(spelling, index):
    q = quantize(torch.randn(24, 100), Scheme.parse(spelling))
    got = target("columns")(q.flatten(), torch.tensor(index, dtype=torch.int64), spelling, 100)
    assert got.dtype == torch.float32 and torch.equal(got, dequantize(q, torch.float32)[:, index])


def test_compiled():
    q = quantize(torch.randn(24, 96), Scheme.parse("int4.g32"))
    parts, index = q.flatten(), torch.tensor([5, 90])
    fast = torch.compile(lambda parts, i: target("columns")(parts, i, "int4.g32", 96), fullgraph=True)
    assert torch.equal(fast(parts, index), dequantize(q, torch.float32)[:, [5, 90]])


def test_shape_without_values():
    q = quantize(torch.randn(24, 96), Scheme.parse("int4.g32"))
    out = OPS["columns"].fake([t.to("meta") for t in q.flatten()], torch.empty(7, dtype=torch.int64, device="meta"), "int4.g32", 96)
    assert out.shape == (24, 7) and out.dtype == torch.float32 and out.device.type == "meta"
