"""Einsum as a linear: which equations are, the same numbers, and why others are not."""

from __future__ import annotations

import doctest
import sys

import pytest
import torch
from captured import through
from small import W8, close, rounded
from torch import nn

from qcompile.core.errors import Skip
from qcompile.passes.einsum import Terms, terms

SIZES = dict(zip("bsmhdknp", (2, 3, 4, 4, 16, 32, 40, 5)))
LINEARS = {
    "bsk,nk->bsn": "", "bsk,kn->bsn": "t", "sbk,khd->sbhd": "flat.t", "sbhd,khd->sbk": "flat", "bshd,hdk->bsk": "rows.t", "bsk,hdk->bshd": "rows", "bk,nk->nb": "", "bks,nk->bns": "", "bsk,hdk->bhsd": "rows",
    "k,kn->n": "t", "bdhs,hdk->skb": "rows.t", "bshmd,hmdk->bsk": "rows.t", "bsk,khmd->bshmd": "flat.t",
}  # fmt: skip
REFUSED = {
    "bsk,skn->bsn": "a matrix for each s", "bk,kn": "all labels written out", "...k,kn->...n": "all labels written out", "bkk,kn->bn": "a diagonal", "bs,kn->bskn": "an outer product", "bsk,kn->bn": "sums what one operand has alone",
    "bk,kn->b": "sums what one operand has alone", "bhd,hkd->bk": "lie between others", "bkm,kmhd->bhd": "lie between others",
}  # fmt: skip


class Einsum(nn.Module):
    def __init__(self, equation: str, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        x, w = equation.partition("->")[0].split(",")
        self.equation, self.first = equation if not first else f"{w},{x}->{equation.partition('->')[2]}", first
        self.weight = nn.Parameter(torch.randn([SIZES[c] for c in w]) / 8)
        self.x = [SIZES[c] for c in x]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, self.weight, x) if self.first else torch.einsum(self.equation, x, self.weight)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("equation", LINEARS)
def test_the_same_numbers(equation: str, first: bool) -> None:
    model = Einsum(equation, first)
    x = torch.randn(model.x)
    gm = through(("normalize", "find_sites"), model, x)
    (site,) = gm.meta["sites"].values()
    assert site.view == LINEARS[equation] and not gm.meta["skipped"] and not gm.graph.find_nodes(op="call_function", target=torch.einsum)
    gm.recompile()
    values = [dict(model.named_parameters())[n.meta["param"].path] if "param" in n.meta else x for n in gm.graph.find_nodes(op="placeholder")]
    (y,) = gm(*values)
    exact = model(x)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous() or not exact.is_contiguous()


@pytest.mark.parametrize("equation", REFUSED)
def test_refusals(equation: str) -> None:
    found = terms(equation, True)
    assert isinstance(found, Skip) and REFUSED[equation] in str(found)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("equation", ["sbk,khd->sbhd", "bshd,hdk->bsk"])
def test_quantized(equation: str, lower: str) -> None:
    """Of three axes the weight is packed as a matrix, and given back as it was."""
    import qcompile

    model = Einsum(equation)
    x = torch.randn(model.x)
    how = model.weight.detach().clone()
    axes = 1 if equation.startswith("sbk") else 2
    matrix = nn.Linear(1, 1)
    matrix.weight = nn.Parameter(how.flatten(0, axes - 1).flatten(1).t().contiguous())
    wanted = rounded(matrix).weight.detach().t().reshape(how.shape)
    fast = torch.compile(model, backend="qcompile", options={**W8, "lower": lower})
    with torch.no_grad():
        assert close(fast(x), torch.einsum(equation, x, wanted), 1e-4)
        (row,) = qcompile.explain(fast, x).sites
    assert tuple(row.shape) == tuple(matrix.weight.shape)
    assert qcompile.release_weights(model) == how.nbytes
    kept = model.state_dict()["weight"]
    assert kept.shape == how.shape and close(kept, wanted, 1e-6)


def test_examples() -> None:
    assert isinstance(terms("ibh,hnd->ibnd", True), Terms)
    assert doctest.testmod(sys.modules["qcompile.passes.einsum"]).failed == 0
