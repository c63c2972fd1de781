"""Weights on a real GPU: moved between devices after compiling, all of them or one, released, read after release, updated under a fused optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.core.errors import WeightError

pytestmark = pytest.mark.gpu
RECIPES = ["W8A8", "W4A16", "NF4"]


def model(device: str = "cuda") -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(device, torch.bfloat16)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()) < 0.2


@pytest.mark.parametrize("recipe", RECIPES)
def test_moved_to_the_gpu_and_back(recipe):
    net = model("cpu")
    fast = torch.compile(net, backend="qcompile", options={"recipe": recipe, "lower": "eager"})
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        truth = net(x)
        for device in ("cpu", "cuda", "cpu", "cuda"):
            net.to(device)
            y = fast(x.to(device))
            assert y.device.type == device and close(y, truth)


@pytest.mark.parametrize(("recipe", "name", "how"), [("W8A8", "weight", "data"), ("W8A8", "weight", "replaced"), ("W8A8", "bias", "data"), ("W4A16", "weight", "data")])
def test_one_parameter_moved_to_the_cpu(recipe, name, how):
    """The call names both devices, as eager's does, and no kernel was launched on what lies elsewhere; moved back the model is as before, and has the new value where it got one.

    A bias through ``.data`` is no weight of ours, and torch 2.11's guards do not see that it moved: there the driver refuses its address, without a word about devices.
    """
    net = model()
    fast = torch.compile(net, backend="qcompile", options={"recipe": recipe})
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)

    def put(value: torch.Tensor) -> None:
        if how == "data":
            getattr(net[0], name).data = value
        else:
            setattr(net[0], name, nn.Parameter(value))

    with torch.no_grad():
        y = fast(x)
        kept = getattr(net[0], name).detach().cpu()
        put(kept)
        for call in (net, fast, fast):
            words = r"(?s)cuda:0.*\bcpu\b|\bcpu\b.*cuda:0" + ("|invalid argument" if (name, how) == ("bias", "data") else "")
            with pytest.raises((RuntimeError, WeightError), match=words):
                call(x)
        torch.cuda.synchronize()
        put(kept.cuda())
        assert torch.equal(fast(x), y)
        put(-50 * kept.cuda())
        after = fast(x)
        assert close(after, net(x)) and not close(after, y)


@pytest.mark.parametrize("recipe", RECIPES)
def test_released(recipe):
    """Memory is given back, the output stays, and reading a released weight is NaN and no crash."""
    net = model()
    fast = torch.compile(net, backend="qcompile", options={"recipe": recipe})
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        truth, y = net(x), fast(x)
        before = torch.cuda.memory_allocated()
        freed = qcompile.release_weights(net)
        assert freed == 2 * 2 * 256 * 512 and before - torch.cuda.memory_allocated() >= 0.9 * freed
        assert torch.equal(fast(x), y)
        assert net(x).isnan().all()
        torch.cuda.synchronize()
        state = net.state_dict()
        net.load_state_dict(state)
        assert close(net(x), truth) and close(fast(x), truth)


def test_fused_optimizer_step():
    net = model()
    fast = torch.compile(net, backend="qcompile", options={"recipe": "W8A8"})
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=True)
    with torch.no_grad():
        before = fast(x)
    net(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = fast(x)
        assert not close(after, before) and close(after, net(x))
