"""Which norm makes a linear's input, in which writing, and the mean that it implies."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from captured import FOUND, captured, context
from tiny_models import tiny
from torch import nn

from qcompile.core.errors import Skip
from qcompile.passes import PASSES
from qcompile.passes.bias import mean_after_norm
from qcompile.passes.infra import run
from qcompile.passes.norms import Norm, before, mean_before, value

K = 32


class Behind(nn.Module):
    """A linear behind ``way(x, gamma, beta)``."""

    def __init__(self, way):
        super().__init__()
        self.gamma, self.beta, self.linear, self.way = nn.Parameter(1 + 0.3 * torch.randn(K)), nn.Parameter(torch.randn(K)), nn.Linear(K, 16), way

    def forward(self, x):
        return self.linear(self.way(x, self.gamma, self.beta))


def found(model, *inputs):
    gm, args = captured(model, *inputs)
    return run([PASSES[name] for name in FOUND], gm, context(gm, args)), args


def layer(x):
    return F.layer_norm(x, (K,))


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


WAYS = {
    "layer norm": lambda x, g, b: F.layer_norm(x, (K,), g, b),
    "written out": lambda x, g, b: g * ((x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)) + b,
    "in two": lambda x, g, b: layer(x) * g + b,
    "with casts": lambda x, g, b: (layer(x.double()).float() * g + b).reshape(-1, K),
    "relu": lambda x, g, b: torch.relu(layer(x) * g + b),
    "rms and shift": lambda x, g, b: g * rms(x) + b,
    "computed": lambda x, g, b: layer(x) * (g + 1) + b.float(),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_norm_and_its_mean(way):
    """Where z is normal the mean is that of the input, channel by channel."""
    model = Behind(WAYS[way])
    x = torch.randn(2, 4096, K)
    gm, args = found(model, x)
    norm = before(gm, "linear")
    assert isinstance(norm, Norm) and norm.relu == (way == "relu")
    assert torch.equal(value(norm.gamma, args.__getitem__), model.gamma + (way == "computed")) and torch.equal(value(norm.beta, args.__getitem__), model.beta)
    mean = mean_before(gm, "linear", args.__getitem__)
    torch.testing.assert_close(mean, model.way(x, model.gamma, model.beta).reshape(-1, K).mean(0), rtol=0, atol=0.08)
    assert torch.equal(mean, mean_after_norm(model.gamma + (way == "computed"), model.beta, 0.0 if way == "relu" else -torch.inf))


NONE = {
    "no norm": (lambda x, g, b: x * 2, "no norm makes the input"),
    "a scale alone": (lambda x, g, b: torch.tanh(x) * g + b, "no norm makes the input"),
    "another function": (lambda x, g, b: F.gelu(layer(x) * g + b), "gelu .* does not commute"),
    "two shifts": (lambda x, g, b: F.layer_norm(x, (K,), g, b) + b, "no norm makes the input"),
    "relu within": (lambda x, g, b: torch.relu(layer(x)) * g + b, "no norm makes the input"),
    "flipped": (lambda x, g, b: F.layer_norm(x, (K,), g, b).unflatten(-1, (2, K // 2)).transpose(-1, -2).reshape(-1, K), "reordered"),
    "no shift": (lambda x, g, b: g * rms(x), "no shift"),
}


@pytest.mark.parametrize("way", NONE)
def test_why_there_is_none(way):
    gm, args = found(Behind(NONE[way][0]), torch.randn(2, 3, K))
    mean = mean_before(gm, "linear", args.__getitem__)
    assert isinstance(mean, Skip) and re.search(NONE[way][1], str(mean)), mean


MODELS = {"opt": {"fc2", "out_proj"}, "gpt2": {"mlp.c_proj", "attn.c_proj"}, "t5": {"o", "wo"}, "vit": {"mlp.fc2", "o_proj"}}


@pytest.mark.parametrize("name", MODELS)
def test_in_models(name):
    """Linears behind a norm, and those that are not; RMS norms have no shift."""
    model, inputs = tiny(name)
    names = list(inputs)
    gm, args = found(lambda *values: model(**dict(zip(names, values))), *inputs.values())
    without = {site for site in gm.meta["sites"] if isinstance(before(gm, site), Skip)}
    assert {site for site in gm.meta["sites"] if any(site.endswith("." + n) for n in MODELS[name])} <= without
    assert len(without) < len(gm.meta["sites"]) / 2 + 2
    mean = {site: mean_before(gm, site, args.__getitem__) for site in gm.meta["sites"] if site not in without}
    assert all(isinstance(m, Skip) for m in mean.values()) == (name == "t5"), mean
