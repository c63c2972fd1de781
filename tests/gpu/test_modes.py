"""What surrounds a call on a real GPU: autocast to both 16-bit types, outside of the model and inside, and the modes without gradients, one after the other, with and without CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import close, rounded
from torch import nn

import qcompile
from qcompile.core.recipe import RECIPES

pytestmark = pytest.mark.gpu
NAMES = ["W8A8", "W4A16", "FP8"]


class Net(nn.Module):
    """Two linears and what lies between; ``inside`` they run under autocast to that dtype, and what follows does not."""

    def __init__(self, inside: torch.dtype | None = None):
        super().__init__()
        self.a, self.b, self.inside = nn.Linear(256, 512), nn.Linear(512, 256), inside

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.inside is None:
            return self.b(torch.relu(self.a(x))), x + 1
        with torch.autocast("cuda", self.inside):
            y = self.b(torch.relu(self.a(x)))
        return y, x + 1


def bound(recipe: str) -> float:
    """Of the distance from the same weights with 16-bit activations: codes of 8 bits cost a percent, those of E4M3 four."""
    return {"W8A8": 3e-2, "FP8": 8e-2}.get(recipe, 1e-2)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["", "graphs"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("recipe", NAMES)
def test_autocast(recipe: str, dtype: torch.dtype, where: str, options: dict[str, Any]) -> None:
    """A float32 model gives what eager gives, in its dtypes; and without autocast, afterwards, float32."""
    net = Net(dtype if where == "inside" else None).cuda().eval()
    fast = torch.compile(net, backend="qcompile", options={"recipe": recipe, **options})
    with torch.no_grad():
        twin = rounded(net, RECIPES[recipe].weight)
    for rows in (5, 64):
        x = torch.randn(rows, 256, device="cuda")
        with torch.no_grad():
            for _ in range(3):  # a warm-up, a recording and a replay
                with torch.autocast("cuda", dtype, enabled=where == "outside"):
                    (y, z), (truth, other) = fast(x), twin(x)
                    assert y.dtype == truth.dtype == dtype and z.dtype == torch.float32 and torch.equal(z, other)
                    assert close(y, truth, bound(recipe))
            if where == "outside":
                y, truth = fast(x)[0], twin(x)[0]
                assert y.dtype == torch.float32 and close(y, truth, bound(recipe))
    assert len(qcompile.explain(fast, x).sites) == 2


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}, {"release": True}], ids=["", "graphs", "released"])
@pytest.mark.parametrize("recipe", NAMES)
def test_modes_without_gradients(recipe: str, options: dict[str, Any], first: Any) -> None:
    """Whichever mode packed the weights, the other reads them, and one that was written to in between is packed anew (a released one cannot be)."""
    net = Net().cuda().bfloat16().eval()
    fast = torch.compile(net, backend="qcompile", options={"recipe": recipe, **options})
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    with torch.no_grad():
        truth = rounded(copy.deepcopy(net).float(), RECIPES[recipe].weight)(x.float())[0]
    for mode in (first, second, first, second):
        with mode():
            assert close(fast(x)[0].float(), truth, bound(recipe))
    if options.get("release"):
        return
    with torch.no_grad():
        net.b.weight.mul_(-2)
    for mode in (first, second):
        with mode():
            assert close(fast(x)[0].float(), -2 * (truth - net.b.bias) + net.b.bias, bound(recipe))
