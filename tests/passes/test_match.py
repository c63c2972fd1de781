"""The first rule that matches decides; what keeps 16 bits says why; rules that matched nothing are listed."""

from __future__ import annotations

import torch
from captured import MATCHED, captured, outputs, through
from expecttest import assert_expected_inline
from torch import nn

from qcompile.core.recipe import Recipe, Rule
from qcompile.passes import PASSES
from qcompile.passes.infra import run
from qcompile.passes.match import signature


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.block = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        self.gate, self.narrow, self.lm_head = nn.Linear(64, 20), nn.Linear(64, 8), nn.Linear(64, 100)

    def forward(self, ids):
        x = self.block(self.table(ids))
        return self.lm_head(x), self.gate(x).softmax(-1).topk(2).values, self.narrow(x)


IDS = torch.arange(10).reshape(2, 5)


def decisions(recipe) -> str:
    gm = through(MATCHED, Model(), IDS, recipe=recipe)
    rows = [f"{name}: {choice if getattr(choice, 'weight', None) else 'no: ' + str(choice)} ({getattr(choice, 'why', '')})" for name, choice in gm.meta["plan"].items()]
    return "\n".join([*rows, f"unused: {gm.meta['unused_rules']}"])


def test_a_preset():
    assert_expected_inline(
        decisions("W8A8"),
        """\
block.0: int8.row @ int8.row (W8A8)
block.2: int8.row @ int8.row (W8A8)
lm_head: no: the head keeps 16 bits unless `head` names a scheme ()
gate: no: a router keeps 16 bits: its output chooses experts ()
narrow: no: 8 x 64 is smaller than 16 ()
unused: []""",
    )


def test_first_rule_wins_and_unused_rules_are_listed():
    rules = (Rule("block.0", "int4.g32"), Rule("re:block", "int8.row", "int8.row"), Rule("Linear"), Rule("re:.*mlp", "int8.row"), Rule("block.2"))
    assert_expected_inline(
        decisions(Recipe("mine", "int8.row", None, rules)),
        """\
block.0: int4.g32 (rule 'block.0')
block.2: int8.row @ int8.row (rule 're:block')
lm_head: no: rule 'Linear' keeps 16 bits ()
gate: no: rule 'Linear' keeps 16 bits ()
narrow: no: rule 'Linear' keeps 16 bits ()
unused: ['re:.*mlp', 'block.2']""",
    )


def test_rules_reach_what_is_kept_otherwise():
    rules = (Rule("gate", "int8.row"), Rule("narrow", "int8.row"), Rule("lm_head", "int4.g32"))
    assert_expected_inline(
        decisions(Recipe("mine", "16bit", None, rules)),
        """\
block.0: no: recipe mine keeps 16 bits ()
block.2: no: recipe mine keeps 16 bits ()
lm_head: int4.g32 (rule 'lm_head')
gate: int8.row (rule 'gate')
narrow: int8.row (rule 'narrow')
unused: []""",
    )


def test_a_scheme_for_the_head():
    assert "lm_head: int8.row (head)" in decisions(Recipe("mine", "int4.g32", "int8.row", head="int8.row"))


def test_the_signature_is_the_decisions_in_order():
    gm = through(MATCHED, Model(), IDS, recipe="W4A16")
    assert len(signature(gm)) == 5 and signature(gm)[:2] == ("int4.g128", "int4.g128")
    assert signature(gm) != signature(through(MATCHED, Model(), IDS, recipe="W8A8"))


def test_nothing_is_rewritten():
    from captured import context

    gm, args = captured(Model(), IDS)
    after = run([PASSES[name] for name in MATCHED], gm, context(gm, args))
    assert all(torch.equal(a, b) for a, b in zip(outputs(gm, args), outputs(after, args), strict=True))
