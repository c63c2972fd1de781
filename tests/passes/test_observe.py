"""Statistics are asked for where a static scheme needs them, and taken on real inputs without leaving a trace."""

from __future__ import annotations

import torch
from captured import MATCHED, captured, context, outputs
from torch import nn

from qcompile.core.recipe import Recipe, Rule
from qcompile.passes import PASSES
from qcompile.passes.infra import run, text
from qcompile.passes.observe import input_of, run_observed, solved_sites


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1)
        return self.o(torch.relu(self.q(x) * self.k(x))) + torch.rand(1)


X = torch.randn(4, 64)
MIXED = Recipe("mixed", "int8.row", None, (Rule("o", "int8.row", "int8.tensor.static"),))


def observed(recipe):
    gm, args = captured(Model(), X)
    asked = context(gm, args, recipe)
    return run([PASSES[name] for name in (*MATCHED, "observe")], gm, asked), args, asked


def test_static_inputs_are_asked_for_and_no_others():
    assert observed("W8A8_STATIC")[2].asked == ["q", "k", "o"]
    assert observed(MIXED)[2].asked == ["o"]
    assert observed("W8A8")[2].asked == []


def test_the_graph_stays():
    gm, args, _ = observed("W8A8_STATIC")
    before = run([PASSES[name] for name in MATCHED], gm, context(captured(Model(), X)[0], args, "W8A8_STATIC"))
    assert [line.split("  #")[0] for line in text(before).splitlines()] == [line.split("  #")[0] for line in text(gm).splitlines()]
    assert [site.name for site in solved_sites(gm)] == ["q", "k", "o"]


def test_what_a_site_reads():
    gm, _, _ = observed("W8A8_STATIC")
    reads = {n.meta["site"]: input_of(n).name for n in gm.graph.nodes if "site" in n.meta}
    assert reads["q"] == reads["k"] != reads["o"]


def test_values_are_those_of_the_model_and_nothing_is_left_behind():
    gm, args, _ = observed("W8A8_STATIC")
    seen: dict[str, torch.Tensor] = {}
    buffers = [a.clone() for a in args]
    state = torch.get_rng_state()
    run_observed(gm, args, {"q", "o"}, lambda name, x, which: seen.__setitem__(name, x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(args, buffers))
    assert set(seen) == {"q", "o"} and torch.equal(seen["q"], X)
    model = dict(zip(("q", "o"), (None, None)))
    assert set(model) == set(seen) and (seen["o"] >= 0).all()


def test_the_function_stays():
    gm, args = captured(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)), X)
    after = run([PASSES[name] for name in (*MATCHED, "observe")], gm, context(gm, args, "W8A8_STATIC"))
    assert all(torch.equal(a, b) for a, b in zip(outputs(gm, args), outputs(after, args), strict=True))
