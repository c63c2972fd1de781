"""One kernel where there should be one, seen by the profiler on a real GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu


class Mlp(nn.Module):
    """fc1 + gelu + fc2 + residual."""

    def __init__(self, dim: int = 512, hidden: int = 2048) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def kernels(fn, *args) -> list[str]:
    for _ in range(3):
        fn(*args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        fn(*args)
        torch.cuda.synchronize()
    return [e.name for e in p.events() if e.device_type.name == "CUDA" and not e.name.startswith("Mem")]


COUNTS = [("W4A16", 2), ("W8A8_STATIC", 3), ("W8A8", 4), ("NF4", 2), ("FP8", 4)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("shape", [(64, 512), (4, 16, 512), (1, 64, 512), (4, 1, 512)], ids=str)
@pytest.mark.parametrize(("recipe", "count"), COUNTS)
def test_mlp(recipe, count, shape, dynamic):
    """Weight-only: one kernel a linear. Static ranges: one quantize in front, then two. Dynamic ranges: a quantize in front of each linear."""
    model = Mlp().to("cuda", torch.bfloat16).eval()
    fast = torch.compile(model, backend="qcompile", options={"recipe": recipe}, dynamic=dynamic)
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        names = kernels(fast, x)
        ref = model(x)
        assert float((fast(x) - ref).norm() / (ref - x).norm()) < 0.2
    assert len(names) == count, names
