"""Equalization of two linears and of chains: equal ranges, the same function, and which linears of a graph follow which."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from captured import FOUND, through
from torch import nn

from qcompile.core.errors import OptionError
from qcompile.core.scheme import Scheme
from qcompile.passes.equalize import TRANSFORM, Link, absorb, balance, chain, equalize, factor, high_bias, pairs, row_maxima, scale
from qcompile.passes.method import Linears


def weights(*sizes, seed=0):
    """(weights, biases) of a chain in float64, their rows and columns of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    w = [torch.randn(n, k, generator=g).double() * torch.rand(n, 1, generator=g).double().mul(6).exp() for k, n in pairwise(sizes)]
    return w, [torch.randn(len(m), generator=g).double() for m in w]


def forward(x, w, b):
    for i, (weight, bias) in enumerate(zip(w, b)):
        x = F.linear(x, weight, bias)
        x = F.relu(x) if i < len(w) - 1 else x
    return x


def test_two_linears_get_one_range():
    (a, b), _ = weights(13, 37, 9)
    s = factor(row_maxima(a), b.abs().amax(0))
    torch.testing.assert_close((a / s[:, None]).abs().amax(1), (b * s).abs().amax(0))
    torch.testing.assert_close((b * s).abs().amax(0), (a.abs().amax(1) * b.abs().amax(0)).sqrt())  # equation 11's r1 = r2 = sqrt(r1 r2)


@pytest.mark.parametrize("sizes", [(13, 37, 9), (8, 16, 16, 16, 5), (3, 1, 4)])
def test_a_chain_keeps_its_function_and_balances(sizes):
    w, b = weights(*sizes)
    new_w, new_b, total = chain(w, b)
    for before, after in pairwise(new_w):
        torch.testing.assert_close(before.abs().amax(1), after.abs().amax(0), rtol=1e-5, atol=0)
    x = torch.randn(7, sizes[0]).double()
    torch.testing.assert_close(forward(x, new_w, new_b), forward(x, w, b), rtol=1e-12, atol=1e-12 * float(forward(x, w, b).abs().max()))
    torch.testing.assert_close(new_w[0] * total[0][:, None], w[0])
    assert not torch.allclose(new_w[0], w[0])


def test_zero_rows_columns_and_missing_biases():
    w, b = weights(6, 8, 4)
    w[0][2], w[1][:, 5] = 0, 0
    new_w, new_b, total = chain(w, [None, b[1]])
    assert total[0][[2, 5]].tolist() == [1, 1] and new_b[0] is None
    assert all(bool(m.isfinite().all()) for m in new_w)


def test_rows_that_channels_share():
    """Grouped-query attention: the factor of a row answers to the largest of its columns."""
    rows, columns, index = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0, 4.0, 2.0]), (0, 1, 0, 1)
    torch.testing.assert_close(factor(rows, columns, index), torch.tensor([1.0, 1 / 3, 1.0, 1 / 3]))


def test_as_a_transform():
    (a, b), _ = weights(13, 37, 9)
    given = Linears([b.float(), 0.5 * b.float()], [Scheme.parse("int8.row")] * 2, None, {})
    torch.testing.assert_close(equalize(given, rows=row_maxima(a)), factor(row_maxima(a), b.abs().amax(0)).float())
    with pytest.raises(OptionError, match="needs the row maxima of the producer"):
        equalize(given)
    with pytest.raises(OptionError, match="each column needs one row"):
        equalize(given, rows=torch.ones(3))
    with pytest.raises(OptionError, match="are no chain"):
        chain([a, a], [None, None])
    assert TRANSFORM.fn is equalize and TRANSFORM.needs == ()


def test_experts_share_a_factor():
    w = torch.randn(3, 8, 5)
    assert torch.equal(row_maxima(w), w.abs().amax((0, 2)))


def test_high_biases_are_absorbed():
    """The function is kept for pre-activations within three deviations of their mean, and only there."""
    beta, gamma = torch.tensor([5.0, 1.0, -4.0]), torch.tensor([-1.0, 0.5, 1.0])
    c = high_bias(beta, gamma)
    assert c.tolist() == [2.0, 0.0, 0.0]
    z = torch.randn(400, 3).clamp(-3, 3)
    w2, b2, b1 = torch.randn(4, 3), torch.randn(4), beta
    new_b1, new_b2 = absorb(b1, w2, b2, c)
    torch.testing.assert_close(F.relu(z * gamma + new_b1) @ w2.T + new_b2, F.relu(z * gamma + b1) @ w2.T + b2)
    far = torch.full((1, 3), 6.0)
    assert not torch.allclose(F.relu(far * gamma + new_b1) @ w2.T + new_b2, F.relu(far * gamma + b1) @ w2.T + b2)
    assert torch.equal(absorb(b1, w2, None, c)[1], w2 @ c)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.gate = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 32)

    def forward(self, x):
        h = F.relu(self.b(F.relu(self.a(x))))
        return self.d(F.silu(self.gate(h)) * self.c(h))


def test_pairs_of_a_graph():
    found = pairs(through(FOUND, Mlp(), torch.randn(2, 5, 16)))
    assert {names: (where.site, where.homogeneous) for where, names in found} == {("b",): ("a", True), ("gate", "c"): ("b", True), ("d",): ("c", False)}


# --- a model's own weights ---------------------------------------------------------------------------------------------------


def test_balance_is_a_chain_in_powers_of_two():
    w, b = weights(8, 16, 16, 5)
    names = dict(zip("abc", (m.clone() for m in w)))
    links = [Link("a", ("b",), tuple(range(16))), Link("b", ("c",), tuple(range(16)))]
    found = balance(links, names)
    assert all(torch.equal(m, w[i]) for i, m in enumerate(names.values()))
    for s, exact in zip(found.values(), chain([m.float() for m in w], b)[2]):
        assert torch.equal(s.log2(), s.log2().round()) and float((s / exact).log2().abs().max()) <= 0.5 + 1e-3
    biases = [bias.clone() for bias in b]
    for link, bias in zip(links, biases):
        scale(link, found[link], names, bias)
    x = torch.randn(7, 8).double()
    assert torch.equal(forward(x, list(names.values()), [*biases[:2], b[2]]), forward(x, w, b))
    for link, bias in zip(links, biases):
        scale(link, 1 / found[link], names, bias)
    assert all(torch.equal(m, w[i]) for i, m in enumerate(names.values())) and all(map(torch.equal, biases, b))


def test_balance_of_shared_rows_fused_rows_and_experts():
    """Rows that no channel comes from keep their value; kin count together; channels of one row get one factor; experts share theirs."""
    a, b, c = torch.randn(6, 4) * torch.tensor([1.0, 64, 1, 8, 1, 1])[:, None], torch.randn(5, 4), torch.randn(3, 5, 4)
    link = Link("a", ("b", "c"), (1, 3, 1, 3))
    (s,) = balance([link], {"a": a, "b": b, "c": c}).values()
    assert s[0] == s[2] and s[1] == s[3]
    columns = torch.stack([b.abs().amax(0), c.abs().amax((0, 1))]).amax(0)
    assert float((s / factor(a.abs().amax(1), columns, link.index)).log2().abs().max()) <= 0.5
    before = a.clone()
    scale(link, s, {"a": a, "b": b, "c": c}, None)
    assert torch.equal(a[[0, 2, 4, 5]], before[[0, 2, 4, 5]]) and torch.equal(a[[1, 3]], before[[1, 3]] / s[:2, None])


def test_factors_are_bounded():
    s = balance([Link("a", ("b",), (0, 1))], {"a": torch.tensor([[1e9], [1.0]]), "b": torch.tensor([[1e-9, 1.0]])})
    assert next(iter(s.values())).tolist() == [1024, 1]
