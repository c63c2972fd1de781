"""Gated MLPs on a real GPU: every recipe against float64 on the same quantized values, and whole MLPs against their references; sizes that fit no tile, poisoned memory, the same bits twice."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile import RECIPES
from qcompile.core.errors import Skip
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels.linear_glu import ACTIVATIONS
from qcompile.kernels.quantize import reference as quantize_activations
from qcompile.kernels.scaled_linear import values

pytestmark = pytest.mark.gpu
GLU = sys.modules["qcompile.passes.glu"]  # the package's attribute of this name is the pass
ROWS = (1, 3, 16, 63, 64, 200, 256, 300)
SHAPES = (((344, 512), ROWS), ((77, 129), (1, 63, 300)))
"""(I, K), rows."""


class Gated(nn.Module):
    """activation(gate) * up; and with ``down`` a whole MLP."""

    def __init__(self, inner: int, k: int, activation: str = "silu", down: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        given = {"bias": False, "device": "cuda", "dtype": dtype}
        self.gate, self.up, self.fn = nn.Linear(k, inner, **given), nn.Linear(k, inner, **given), ACTIVATIONS[activation].fn
        self.down = nn.Linear(inner, k, **given) if down else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.fn(self.gate(x)) * self.up(x))


def poison() -> None:
    """Fill the allocator's free memory with NaN, so that an element that no kernel writes shows."""
    torch.full((64 << 20,), float("nan"), device="cuda")


def error(y: torch.Tensor, ref: torch.Tensor) -> float:
    assert torch.isfinite(y).all()
    return float((y.double() - ref.double()).norm() / ref.double().norm())


def twice(fast, x: torch.Tensor) -> torch.Tensor:
    """The output, which a second call repeats to the bit."""
    with torch.no_grad():
        poison()
        y = fast(x)
        poison()
        assert torch.equal(y, fast(x))
    return y


def truth(model: Gated, x: torch.Tensor, weight: str, given: str | None) -> torch.Tensor:
    """In float64 on the quantized values; nothing is rounded between the products and the end."""
    if given is not None:
        codes, *scales = quantize_activations(x, [], given)
        x = values(codes, scales, Scheme.parse(given))
    gate, up = (x.double() @ dequantize(quantize(layer.weight, Scheme.parse(weight))).double().T for layer in (model.gate, model.up))
    return model.fn(gate) * up


def check(recipe: str, weight: str, given: str | None, shape: tuple[int, int], rows, built, activation: str = "silu", dtype: torch.dtype = torch.bfloat16) -> None:
    model = Gated(*shape, activation, dtype=dtype)
    for m in rows:
        torch._dynamo.reset()
        x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
        y = twice(torch.compile(model, backend="qcompile", options={"recipe": recipe} if recipe else {"weight": weight, **({"input": given} if given else {})}, dynamic=False), x)
        assert y.dtype == dtype and y.shape == (m, shape[0])
        assert error(y, truth(model, x, weight, given)) < (1e-2 if dtype == torch.bfloat16 else 2e-3), (m, built[-1].lowered.meta["glu"])
        fused = built[-1].lowered.meta["glu"].get("gate")
        assert m > 64 or fused == activation or isinstance(fused, Skip) or fused is None, fused
        if recipe in ("W8A8", "W4A8"):
            assert fused == activation
        elif recipe in ("W4A16", "W8A16", "NF4", "FP8"):
            apart = (m > 256 and shape[0] % 8 == 0) if recipe == "FP8" else m > 64  # cuBLAS takes FP8 where N and K are multiples of 16; of 16 bits the plain product is faster
            assert (fused == activation) != apart, fused


PLAIN = [name for name, row in RECIPES.items() if not row.passes and not (row.input and Scheme.parse(row.input).static)]


@pytest.mark.parametrize(("shape", "rows"), SHAPES, ids=["344x512", "77x129"])
@pytest.mark.parametrize("recipe", PLAIN)
def test_recipe(built, recipe, shape, rows):
    check(recipe, RECIPES[recipe].weight, RECIPES[recipe].input, shape, rows, built)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recipe", ["W4A16", "W8A8"])
def test_activation(built, recipe, activation):
    check(recipe, RECIPES[recipe].weight, RECIPES[recipe].input, (344, 512), (3, 200), built, activation)


@pytest.mark.parametrize("recipe", ["W4A16", "W8A8", "FP8"])
def test_float16(built, recipe):
    check(recipe, RECIPES[recipe].weight, RECIPES[recipe].input, (344, 512), (1, 16, 64, 200), built, dtype=torch.float16)


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        ("uint4.g64.point", None), ("nf4.g64/int8.row", None), ("int8.g64", None), ("e5m2.g64", None), ("uint4.g128.point", "int8.row"), ("uint4.g64.point", "int8.row"), ("int8.g128", "int8.g128"),
        ("e5m2.row", "e4m3.row"), ("int4.row", "int8.tensor"),
    ],
)  # fmt: skip
def test_schemes(built, weight, given):
    check("", weight, given, (344, 328), (1, 16, 63, 200, 300), built)


MLPS = ("W8A8", "W8A8_STATIC", "W8A8_SMOOTHQUANT", "W8A8_SMOOTHQUANT_STATIC", "W4A16", "W4A16_AWQ", "W4A8", "W8A16", "FP8", "NF4", "FP4", "LLM_INT8_STATIC")


@pytest.mark.parametrize("recipe", MLPS)
def test_mlp(built, monkeypatch, recipe):
    """Against the references of the graph in which nothing is gated, with the same calibration: no further than roundings to 16 bits, and to the codes of down's input, go."""
    model = Gated(344, 512, down=True)
    for m in reversed(ROWS):  # what calibrates on its first call sees many rows
        torch._dynamo.reset()
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
        y = twice(torch.compile(model, backend="qcompile", options={"recipe": recipe}, dynamic=False), x)
        gated = built[-1].lowered.meta["glu"].get("gate")
        torch._dynamo.reset()
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(GLU, "device_of", lambda value: torch.device("cpu"))
            ref = torch.compile(model, backend="qcompile", options={"recipe": recipe, "lower": "eager"}, dynamic=False)(x)
        assert not any(isinstance(a, str) for a in built[-1].lowered.meta["glu"].values())
        assert error(y, ref) < 4e-2, (m, gated)
        assert gated == "silu" or m > 64


@pytest.mark.parametrize("recipe", ["W4A16", "W8A8", "W8A8_STATIC", "FP8"])
def test_a_batch_that_grows(built, recipe):
    """A dynamic number of rows: one graph for each of three regimes at most, all of them right."""
    model = Gated(344, 512, down=True)
    fast = torch.compile(model, backend="qcompile", options={"recipe": recipe}, dynamic=True)
    with torch.no_grad():
        for m in (16, 33, 100, 250, 300, 1000, 16):
            x = torch.randn(2, m // 2, 512, device="cuda", dtype=torch.bfloat16)
            poison()
            y = fast(x)
            ref = F.silu(model.gate(x)) * model.up(x)
            assert error(y, model.down(ref)) < 0.3, m  # the error of quantizing is in it
    assert len(built) <= 3
    assert len({str(graph.lowered.meta["glu"]) for graph in built}) == {"W4A16": 3, "FP8": 2}.get(recipe, 1)


def test_a_linear_that_its_module_cuts_in_two(built):
    class Phi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(512, 688, bias=False, device="cuda", dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, dim=-1)
            return up * F.silu(gate)

    model, x = Phi(), torch.randn(2, 9, 512, device="cuda", dtype=torch.bfloat16)
    y = twice(torch.compile(model, backend="qcompile", options={"recipe": "W4A8"}), x)
    assert built[-1].lowered.meta["glu"] == {"both": "silu"}
    assert error(y, model(x)) < 0.3
