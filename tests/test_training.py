"""Until a training recipe is asked for, training is plain Inductor, said once; then inference quantizes."""

from __future__ import annotations

import pytest
import torch
from small import W8, Net, close, graphs, rounded, said
from torch import nn


def gradients(model, fn, x):
    model.zero_grad()
    fn(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("options", [{"lower": "eager"}, {}, {"release": True}])
def test_gradients_are_the_plain_ones(options):
    model, x = Net(), torch.randn(5, 32)
    want = gradients(model, torch.compile(model, backend="inductor"), x)
    torch._dynamo.reset()
    with said() as texts, graphs() as seen:
        fast = torch.compile(model, backend="qcompile", options=options)
        assert all(map(torch.equal, gradients(model, fast, x), want))
        gradients(model, torch.compile(Net(), backend="qcompile", options=options), x)
    assert not seen and [t for t in texts if "requires grad and grad mode is on" in t] == texts and len(texts) == 1
    assert all(close(a, b, 1e-4) for a, b in zip(gradients(model, model, x), want))


def test_inference_after_training_and_back():
    model, x = Net(), torch.randn(5, 32)
    fast = torch.compile(model, backend="qcompile", options=W8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        y = fast(x)
        assert y.requires_grad and close(y.detach(), model(x).detach())
        with torch.no_grad(), graphs() as seen:
            assert close(fast(x), rounded(model)(x)) and len(seen) == 1
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_only_a_bias_trains():
    """Any parameter that requires grad makes it training."""
    model, x = Net().requires_grad_(False), torch.randn(5, 32)
    model.up.bias.requires_grad_(True)
    fast = torch.compile(model, backend="qcompile", options=W8)
    assert all(map(close, gradients(model, fast, x), gradients(model, model, x)))


def test_an_input_that_requires_grad():
    model, x = Net().requires_grad_(False), torch.randn(5, 32, requires_grad=True)
    y = torch.compile(model, backend="qcompile", options=W8)(x)
    y.sum().backward()
    got = x.grad.clone()
    x.grad = None
    model(x).sum().backward()
    assert close(got, x.grad, 1e-4)


def test_a_frozen_part_next_to_a_trained_one():
    model = nn.Sequential(Net().requires_grad_(False), nn.Linear(32, 16))
    x = torch.randn(5, 32)
    fast = torch.compile(model, backend="qcompile", options=W8)
    assert all(map(close, gradients(model, fast, x), gradients(model, model, x)))
