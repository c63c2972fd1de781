"""The graph of FP8 training: what is replaced, what keeps 16 bits and why, and where the histories are read and written."""

from __future__ import annotations

import re

import pytest
import torch
from captured import MATCHED, captured, context
from expecttest import assert_expected_inline
from torch import nn

from qcompile.core.errors import OptionError, Skip
from qcompile.core.recipe import Recipe, Rule
from qcompile.options import Options
from qcompile.passes import PASSES, TRAININGS
from qcompile.passes.fp8 import keeps
from qcompile.passes.infra import run, text
from qcompile.passes.sites import Param, Site


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False)
        self.small = nn.Linear(32, 8)

    def forward(self, x):
        return self.o(self.q(x) * self.k(x)) + self.small(x).sum()


def inserted(model, *inputs, **options):
    parsed = Options.parse(options)
    gm, args = captured(model, *inputs)
    ctx = context(gm, args, parsed.recipe)
    ctx.options = parsed
    return run([*(PASSES[name] for name in MATCHED), TRAININGS["fp8"].insert], gm, ctx)


def test_current_scaling():
    assert_expected_inline(
        text(inserted(Block(), torch.randn(2, 5, 32), train="fp8")),
        """\
inputs: l_x_: float32[2, 5, 32]
fp8_linear_default = qcompile.fp8_linear(l_x_, %q.weight, [], [], 0, 0, 'tensor')  # q: e4m3.row @ e4m3.row
getitem = getitem(fp8_linear_default, 0)
linear = add(getitem, %q.bias)
fp8_linear_default_1 = qcompile.fp8_linear(l_x_, %k.weight, [], [], 1, 0, 'tensor')  # k: e4m3.row @ e4m3.row
linear_1 = getitem(fp8_linear_default_1, 0)
mul = mul(linear, linear_1)
fp8_linear_default_2 = qcompile.fp8_linear(mul, %o.weight, [], [], 2, 2, 'tensor')  # o: e4m3.row @ e4m3.row
linear_2 = getitem(fp8_linear_default_2, 0)
linear_3 = linear(l_x_, %small.weight, %small.bias)  # small: 8 x 32 is smaller than 16
sum_1 = linear_3.sum()
add = add(linear_2, sum_1)
return (add,)""",
    )


def test_delayed_scaling_reads_first_and_writes_last():
    """One state tensor for all linears; q and k read the same x, whose scale is that of row 0."""
    gm = inserted(Block(), torch.randn(2, 5, 32), train="fp8(scaling='delayed', history=8)")
    assert_expected_inline(
        text(gm),
        """\
inputs: l_x_: float32[2, 5, 32], l_self_modules_q_parameters_weight__fp8_forward: float32[3, 2, 11], l_self_modules_q_parameters_weight__fp8_backward: float32[3, 1, 11]
fp8_scales_default = qcompile.fp8_scales(l_self_modules_q_parameters_weight__fp8_forward, l_self_modules_q_parameters_weight__fp8_backward, 0, True, 6)
fp8_linear_default = qcompile.fp8_linear(l_x_, %q.weight, [fp8_scales_default], [l_self_modules_q_parameters_weight__fp8_backward], 0, 0, 'delayed')  # q: e4m3.row @ e4m3.row
getitem = getitem(fp8_linear_default, 0)
getitem_1 = getitem(fp8_linear_default, 5)
linear = add(getitem, %q.bias)
fp8_linear_default_1 = qcompile.fp8_linear(l_x_, %k.weight, [fp8_scales_default], [l_self_modules_q_parameters_weight__fp8_backward], 1, 0, 'delayed')  # k: e4m3.row @ e4m3.row
linear_1 = getitem(fp8_linear_default_1, 0)
getitem_3 = getitem(fp8_linear_default_1, 5)
mul = mul(linear, linear_1)
fp8_linear_default_2 = qcompile.fp8_linear(mul, %o.weight, [fp8_scales_default], [l_self_modules_q_parameters_weight__fp8_backward], 2, 2, 'delayed')  # o: e4m3.row @ e4m3.row
linear_2 = getitem(fp8_linear_default_2, 0)
getitem_5 = getitem(fp8_linear_default_2, 5)
linear_3 = linear(l_x_, %small.weight, %small.bias)  # small: 8 x 32 is smaller than 16
sum_1 = linear_3.sum()
add = add(linear_2, sum_1)
fp8_record_default = qcompile.fp8_record(l_self_modules_q_parameters_weight__fp8_forward, fp8_scales_default, [getitem_1, getitem_3, getitem_5])
copy_ = copy_(l_self_modules_q_parameters_weight__fp8_forward, fp8_record_default)
return (add,)""",
    )
    slots = gm.meta["slots"]
    assert [(slot.key, len(slot.rest), slot.count) for slot in slots] == [("fp8_forward", 2, 8), ("fp8_backward", 2, 8)]
    assert [tuple(n.meta["example_value"].shape) for n in gm.graph.find_nodes(op="placeholder") if "packed" in n.meta] == [(3, 2, 11), (3, 1, 11)]


def test_why_it_is_emulated():
    gm = inserted(Block(), torch.randn(2, 5, 32), train="fp8")
    assert set(gm.meta["kernels"]) == {"q", "k", "o"} and all(isinstance(k, Skip) and "cpu" in str(k) for k in gm.meta["kernels"].values())


def test_rules_and_other_schemes():
    recipe = Recipe("mixed", "e4m3.row", "e4m3.row", (Rule("q"), Rule("k", "int8.row", "int8.row")))
    gm = inserted(Block(), torch.randn(2, 5, 32), recipe=recipe, train="fp8")
    assert "keeps 16 bits" in str(gm.meta["plan"]["q"])
    site, choice = gm.meta["sites"]["k"], gm.meta["plan"]["k"]
    assert "multiplies in e4m3" in str(keeps(site, choice))
    assert keeps(site, gm.meta["plan"]["o"]) is None


def test_experts_keep_16_bits():
    gm = inserted(Block(), torch.randn(2, 5, 32), train="fp8")
    site = Site("experts", "experts", Param(0, "experts"), "", 32, 32, experts=4)
    assert "experts train in 16 bits" in str(keeps(site, gm.meta["plan"]["o"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": "fp8(scaling='column')"}, "column.*tensor"),
        ({"train": "fp8(history=0)"}, "history=.*at least 1, not 0"),
        ({"train": "fp8(margin=-1)"}, "margin=.*at least 0"),
        ({"train": "fp8(leap=-1)"}, "leap=.*at least 0 and at most 64, not -1"),
        ({"train": "fp8(leap=2000)"}, "leap=.*at least 0 and at most 64, not 2000"),
        ({"train": "fp8(history='long')"}, "history"),
        ({"train": "fp8(depth=3)"}, "takes no argument 'depth'.*scaling"),
        ({"train": "fp8", "recipe": "W8A8"}, "e4m3, and recipe W8A8 quantizes weights to int8.row.*FP8"),
        ({"train": "fp8", "recipe": "W4A16_GPTQ"}, "gptq"),
    ],
)
def test_what_cannot_be(options, said):
    with pytest.raises(OptionError, match=re.compile(said, re.S)):
        Options.parse(options)


def test_the_recipe_where_none_is_named():
    """Evaluation of what was trained in FP8 runs the FP8 recipe; qat keeps the usual default."""
    assert Options.parse({"train": "fp8"}).recipe.name == "FP8" and Options.parse({"train": "fp8"}).recipe.implied
    assert Options.parse({"train": "fp8", "recipe": "FP8_TENSOR", "ignore": "q"}).recipe.name == "FP8_TENSOR"
    assert Options.parse({"train": "qat"}).recipe.name == Options.parse({}).recipe.name == "W8A8"
