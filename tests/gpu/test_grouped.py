"""Experts on a real GPU: sorted rows and one expert for each row, against the reference, with empty experts, rows behind the last end, and poisoned memory."""

from __future__ import annotations

import pytest
import torch

from qcompile.core.qtensor import quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels.grouped import reference
from qcompile.kernels.op import target
from qcompile.kernels.quantize import reference as quantize_activations

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("by_row", [False, True], ids=["sorted", "by_row"])
@pytest.mark.parametrize("scheme", ["int4.g128", "int8.row", "nf4.g64", "int8.row @ int8.row", "int8.row @ int4.g128", "e4m3.row @ e4m3.row", "uint4.g64.point", "nf4.g64/int8.row"])
def test_grouped(scheme, by_row):
    from qcompile import compat
    from qcompile.kernels import OPS
    from qcompile.kernels.op import decompositions

    experts, n, k = 6, 200, 328
    given, _, weight = scheme.rpartition(" @ ")
    w = quantize(torch.randn(experts, n, k, device="cuda"), Scheme.parse(weight)).flatten()

    def backend(gm, inputs):
        return compat.inductor(gm, inputs, {"fx_graph_cache": False}, decompositions(OPS))

    for rows in (1, 7, 300):
        torch._dynamo.reset()
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        codes, scales = (x, []) if not given else ((q := quantize_activations(x, [], given))[0], q[1:])
        counts = torch.tensor([0, 1, 2, 0, rows // 3, max(rows - rows // 3 - 5, 0)], device="cuda")
        index = torch.randint(0, experts, (rows,), device="cuda") if by_row else counts.cumsum(0).clamp(max=rows).to(torch.int32)
        fn = torch.compile(lambda c, s, i, ws: target("grouped_linear")(c, s, i, ws, scheme, by_row), backend=backend)
        torch.full((16 << 20,), float("nan"), device="cuda")
        with torch.no_grad():
            y, ref = fn(codes, scales, index, w), reference(codes, scales, index, w, scheme, by_row)
        assert torch.isfinite(y).all()
        assert float((y - ref).norm() / ref.norm().clamp(min=1e-9)) < 1e-2
