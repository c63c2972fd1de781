"""What a replay takes of its rows, and the loss of a site on them."""

from __future__ import annotations

import pytest
import torch
from calibrated import rows

from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import Choice
from qcompile.core.scheme import Scheme
from qcompile.core.solution import Solution
from qcompile.passes.sites import Param, Site
from qcompile.solve import Member
from qcompile.watch import Watch, measured

CHOICE = Choice(Scheme.parse("int4.g16"))


def member(weight):
    experts = weight.shape[0] if weight.dim() == 3 else 1
    return Member(Site("a", "a", Param(0, "a.weight"), "", *weight.shape[-2:], experts=experts), CHOICE, weight)


def snr(exact, y):
    return 10 * float((exact.square().sum() / (exact - y).square().sum()).log10())


def test_sampled_rows_know_their_experts():
    """Far more rows than a sample keeps, in batches, dead ones of padding among them."""
    watch = Watch(("samples",), 8, 4, torch.device("cpu"), (), routed=True)
    for i in range(5):
        which = torch.randint(0, 5, (400,), generator=torch.Generator().manual_seed(i))
        watch.take(torch.cat([which[:, None].float(), rows(400, 7, seed=i)], 1), which, "a")
    kept, routes = watch.merged().stats["samples"]["rows"], watch.routes()
    assert len(kept) == 512 and torch.equal(kept[:, 0].long(), routes) and len(routes.unique()) == 5


def test_one_loss_of_all_experts():
    weight, x = rows(3, 16, 32), rows(50, 32, seed=1)
    q = quantize(weight, CHOICE.weight)
    routes = torch.arange(50) % 5 - 1  # expert 2 is the last one: what goes to 3 is padding
    routes = routes.where(routes >= 0, 0)
    exact, y = (torch.cat([x[routes == e] @ w[e].T for e in range(3)]) for w in (weight, dequantize(q)))
    for solution in (Solution(q=q), Solution()):
        assert measured(member(weight), solution, x, routes) == pytest.approx(snr(exact, y), abs=1e-3)
    assert measured(member(weight), Solution(q=q), x, None) is None
    assert measured(member(weight), Solution(q=q), x, torch.full((50,), 3)) is None


def test_the_loss_of_a_linear():
    weight, x = rows(16, 32), rows(50, 32, seed=1)
    y = x @ dequantize(quantize(weight, CHOICE.weight)).T
    assert measured(member(weight), Solution(), x, None) == pytest.approx(snr(x @ weight.T, y), abs=1e-3)
    assert measured(member(weight), Solution(), x[:0], None) is None
