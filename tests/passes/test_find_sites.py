"""Names, roles, kin and views of the linears of a graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from captured import FOUND, captured, outputs, through
from expecttest import assert_expected_inline
from torch import nn

from qcompile.passes import PASSES
from qcompile.passes.infra import run
from qcompile.passes.sites import view


def table(gm) -> str:
    """One line for each site."""
    return "\n".join(f"{s.name}: {s.role} {s.shape} view={s.view!r} m={s.m} kin={list(s.kin)}" for s in gm.meta["sites"].values())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, n) for n in (64, 32, 32, 64))

    def forward(self, x):
        k = self.k(x)
        return self.o(self.q(x) * torch.cat([k, self.v(x)], -1))


def test_kin_read_the_same_input():
    assert_expected_inline(
        table(through(FOUND, Attention(), torch.randn(2, 3, 64))),
        """\
k: linear (32, 64) view='' m=6 kin=['q', 'v']
q: linear (64, 64) view='' m=6 kin=['k', 'v']
v: linear (32, 64) view='' m=6 kin=['k', 'q']
o: linear (64, 64) view='' m=6 kin=[]""",
    )


class Language(nn.Module):
    def __init__(self, tied: bool, name: str = "decoder"):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(96, 32), nn.Embedding(16, 32)
        self.fc = nn.Linear(32, 16)  # has the shape of the table of positions
        self.back = nn.Linear(16, 32)
        self.add_module(name, nn.Linear(32, 96, bias=False))
        self.last = getattr(self, name)
        if tied:
            self.last.weight = self.wte.weight

    def forward(self, ids):
        h = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        return self.last(h + self.back(self.fc(h)))


def test_a_tied_head():
    assert_expected_inline(
        table(through(FOUND, Language(tied=True), torch.zeros(2, 5, dtype=torch.long))),
        """\
fc: linear (16, 32) view='' m=10 kin=[]
back: linear (32, 16) view='' m=10 kin=[]
decoder: head (96, 32) view='' m=10 kin=[]""",
    )


def test_a_head_of_its_own():
    assert_expected_inline(
        table(through(FOUND, Language(tied=False), torch.zeros(2, 5, dtype=torch.long))),
        """\
fc: linear (16, 32) view='' m=10 kin=[]
back: linear (32, 16) view='' m=10 kin=[]
decoder: head (96, 32) view='' m=10 kin=[]""",
    )


class Mixture(nn.Module):
    """A router and experts in one of the three forms."""

    def __init__(self, form: str):
        super().__init__()
        self.form, self.gate = form, nn.Linear(32, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, 48, 32)), nn.Parameter(torch.randn(4, 32, 48))

    def forward(self, x):
        scores, chosen = self.gate(x).softmax(-1).topk(1, -1)
        chosen = chosen.flatten()
        if self.form == "sorted":
            order = chosen.argsort()
            ends = torch.bincount(chosen, minlength=4).cumsum(0).to(torch.int32)
            h = torch.relu(F.grouped_mm(x[order], self.up.transpose(-2, -1), offs=ends))
            return F.grouped_mm(h, self.down.transpose(-2, -1), offs=ends) * scores[order]
        if self.form == "weight first":
            h = torch.relu(torch.bmm(self.up[chosen], x.unsqueeze(-1)))
            return torch.bmm(self.down[chosen], h).squeeze(-1) * scores
        if self.form == "rows first":
            h = torch.relu(torch.bmm(x.unsqueeze(1), self.up[chosen].transpose(1, 2)))
            return torch.bmm(h, self.down[chosen].transpose(1, 2)).squeeze(1) * scores
        h = torch.relu(torch.bmm(x.expand(4, *x.shape), self.up.transpose(1, 2)))
        return torch.bmm(h, self.down.transpose(1, 2)).sum(0) * scores


def test_router_and_experts():
    lines = []
    for form in ("sorted", "weight first", "rows first", "dense"):
        torch._dynamo.reset()
        gm = through(FOUND, Mixture(form).bfloat16() if form == "sorted" else Mixture(form), torch.randn(6, 32, dtype=torch.bfloat16 if form == "sorted" else torch.float32))
        lines.append(f"{form}\n{table(gm)}")
    assert_expected_inline(
        "\n".join(lines),
        """\
sorted
gate: router (4, 32) view='' m=6 kin=[]
up: experts (4, 48, 32) view='' m=6 kin=[]
down: experts (4, 32, 48) view='' m=6 kin=[]
weight first
gate: router (4, 32) view='' m=6 kin=[]
up: experts (4, 48, 32) view='' m=6 kin=[]
down: experts (4, 32, 48) view='' m=6 kin=[]
rows first
gate: router (4, 32) view='' m=6 kin=[]
up: experts (4, 48, 32) view='' m=6 kin=[]
down: experts (4, 32, 48) view='' m=6 kin=[]
dense
gate: router (4, 32) view='' m=6 kin=[]
up: experts (4, 48, 32) view='' m=24 kin=[]
down: experts (4, 32, 48) view='' m=24 kin=[]""",
    )


CHOICES = {
    "max, gather": lambda y: y.gather(-1, y.max(dim=-1, keepdim=True)[1]),
    "max, scatter": lambda y: torch.scatter(y, -1, torch.max(y.softmax(-1), -1, True).indices, 0.0),
    "argmax, one_hot": lambda y: F.one_hot(torch.argmax(y.softmax(-1), dim=-1), 16) * y,
    "topk": lambda y: y.topk(2).indices,
    "pooled": lambda y: y.max(dim=0)[0],
    "greatest value": lambda y: y.max(dim=-1)[0],
    "label": lambda y: y.argmax(-1),
}


def test_a_router_is_what_chooses():
    class Choosing(nn.Module):
        def __init__(self, choose):
            super().__init__()
            self.choose, self.fc = choose, nn.Linear(32, 16)

        def forward(self, x):
            return self.choose(self.fc(x))

    roles = {name: through(FOUND, Choosing(choose), torch.randn(6, 32)).meta["sites"]["fc"].role for name, choose in CHOICES.items()}
    assert [name for name, role in roles.items() if role == "router"] == list(CHOICES)[:4]


def test_a_projection_of_parameters_alone_is_a_site_and_nothing_else():
    """As DeBERTa's positions: what multiplies them is a product of activations."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.proj, self.query = nn.Embedding(10, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return torch.matmul(self.query(x), self.proj(self.table.weight).transpose(0, 1)), torch.bmm(x[None], self.proj(self.table.weight)[None].mT)

    gm = through(FOUND, Positions(), torch.randn(6, 32))
    assert list(gm.meta["sites"]) == ["query", "proj", "proj@2"] and gm.meta["skipped"] == []


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 32, 64))

    def forward(self, x):
        return F.linear(x, self.w[0]) + x @ self.w[2].to(torch.float32).t() + F.linear(x, self.w[0])


def test_elements_of_stacked_parameters_and_repeated_use():
    gm = through(FOUND, Stacked(), torch.randn(4, 64))
    assert_expected_inline(
        table(gm),
        """\
w: experts (32, 64) view='[0]' m=4 kin=['w@2', 'w@3']
w@2: experts (32, 64) view='[2]' m=4 kin=['w', 'w@3']
w@3: experts (32, 64) view='[0]' m=4 kin=['w', 'w@2']""",
    )
    weight = torch.randn(3, 32, 64)
    assert torch.equal(view(weight, "[2]"), weight[2]) and torch.equal(view(weight, "[2].t"), weight[2].t())


def test_nothing_is_rewritten():
    gm, args = captured(Attention(), torch.randn(2, 3, 64))
    before = run([PASSES["normalize"]], gm)
    after = run([PASSES[name] for name in FOUND], gm)
    assert [n.name for n in before.graph.nodes] == [n.name for n in after.graph.nodes]
    assert all(torch.equal(a, b) for a, b in zip(outputs(gm, args), outputs(after, args), strict=True))
