"""Every recipe on a real GPU: against the float32 reference on the same quantized values, at sizes that fit no tile, with poisoned memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile import RECIPES
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels.quantize import reference as quantize_activations
from qcompile.kernels.scaled_linear import values

pytestmark = pytest.mark.gpu
ROWS = (1, 3, 16, 63, 64, 257, 4096)
SHAPES = ((1024, 512), (200, 328), (77, 129))
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


def reference(layer: nn.Linear, x: torch.Tensor, weight: str, given: str | None, scale: torch.Tensor | None = None) -> torch.Tensor:
    """The layer in float64 on the quantized values."""
    if given is not None:
        s = Scheme.parse(given)
        codes, *scales = quantize_activations(x, [] if scale is None else [scale], given)
        x = values(codes, scales or [scale], s)
    w = dequantize(quantize(layer.weight, Scheme.parse(weight)))
    return x.double() @ w.double().T + (0 if layer.bias is None else layer.bias.double())


def poison() -> None:
    """Fill the allocator's free memory with NaN, so that an element that no kernel writes shows."""
    torch.full((64 << 20,), float("nan"), device="cuda")


def error(y: torch.Tensor, ref: torch.Tensor) -> float:
    assert torch.isfinite(y).all()
    return float((y.double() - ref).norm() / ref.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("recipe", [name for name, row in RECIPES.items() if not row.passes])
def test_recipe(recipe, shape, dtype):
    check(RECIPES[recipe].weight, RECIPES[recipe].input, shape, dtype, ROWS, {"recipe": recipe})


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        ("uint4.g64.point", None), ("uint4.g32.min/uint6.g8", None), ("int3.g128", None), ("int5.row", None), ("int6.g32", None), ("int7.row", None), ("int2.g16", None), ("e5m2.row", None),
        ("e3m4.row", None), ("e4m3b11.row", None), ("e2m3.g64", None), ("e2m1.g16/e4m3.tensor", None), ("nf4.g64/int8.row", None), ("int8.b64x128", None), ("uint8.g128.point", None), ("uint4.g128.point", "int8.row"),
        ("int8.g128", "int8.g128"), ("e4m3.b128x128", "e4m3.g128"), ("e5m2.row", "e4m3.row"), ("e4m3.row", None), ("e5m2.g64", None), ("e4m3.b64x128", None), ("int8.row", "uint8.row.point"), ("int3.g64", "int8.tensor"),
        ("lut4.g64", None), ("lut3.g32.min", None), ("lut4.row", "int8.row"),
    ],
)  # fmt: skip
def test_schemes(weight, given):
    check(weight, given, (200, 328), torch.bfloat16, (1, 63, 257), {"weight": weight, "input": given} if given else {"weight": weight})


def test_float32_activations():
    check("int4.g128", None, (200, 328), torch.float32, (3, 64), {"recipe": "W4A16"})


def check(weight, given, shape, dtype, rows, options):
    n, k = shape
    layer = nn.Linear(k, n, device="cuda", dtype=dtype)
    fast = torch.compile(layer, backend="qcompile", options=options, dynamic=False)
    with torch.no_grad():
        for m in rows:
            torch._dynamo.reset()
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            scale = None
            if given is not None and Scheme.parse(given).static:
                from qcompile.weights import TABLE

                record = TABLE.record(layer.weight)
                record.solutions.clear()
                record.given.clear()
                scale = (x.abs().amax().float() / Scheme.parse(given).fmt.hi).reshape(1)
            poison()
            y = fast(x)
            assert y.dtype == dtype and y.shape == (m, n)
            assert error(y, reference(layer, x, weight, given, scale)) < TOLERANCE[dtype], (m, n, k)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("n", "k"), [(1024, 512), (333, 200), (4096, 4096)])
def test_splits(n: int, k: int, dynamic: bool) -> None:
    """LLM.int8()'s two products in one kernel, at ugly sizes, against float64 on the same quantized values; over poisoned memory, the same bits twice."""
    torch.manual_seed(0)
    layer = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    large = torch.randperm(k, device="cuda")[:20]
    how = "outliers(dynamic=32)" if dynamic else "outliers(columns=20)"
    for rows in (1, 3, 16, 63, 64, 257, 2048):
        torch._dynamo.reset()
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16).clamp(-4, 4)
        x[:, large] = 20 + x[:, large].abs()
        fast = torch.compile(layer, backend="qcompile", dynamic=False, options={"recipe": "W8A8", "passes": [how]})
        if not dynamic:
            with qcompile.calibrate(fast, progress=False):
                fast(x)
        with torch.no_grad():
            fast(x)
            torch.full((64 << 20,), float("nan"), device="cuda")
            y = fast(x)
            assert torch.equal(y, fast(x))
        dense, w = x.clone(), layer.weight.detach().clone()
        dense[:, large] = 0
        if not dynamic:
            w[:, large] = 0
        codes, scale = quantize_activations(dense, [], "int8.row")
        weight = dequantize(quantize(w, Scheme.parse("int8.row")), torch.float64)
        exact = (codes.double() * scale.double()) @ weight.T + x[:, large].double() @ layer.weight[:, large].double().T + layer.bias.double()
        assert float((y.double() - exact).norm() / exact.norm()) < 5e-3, rows
