"""Options are checked before anything runs; an error lists what exists."""

from __future__ import annotations

import pytest
import torch
from small import W8, Net, close, graphs, rounded, said
from torch import nn

from qcompile import OptionError, Recipe, Rule
from qcompile.options import HELP, LATER, Options

X = torch.ones(3, 32)

WRONG = {
    "option": ({"recipes": "W8A8"}, r"unknown option 'recipes'.*Did you mean 'recipe'\?.*Known: recipe, weight, .*inductor"),
    "recipe": ({"recipe": "W8A9"}, r"unknown recipe 'W8A9'.*W8A8.*W4A16.*NF4"),
    "recipe of another type": ({"recipe": 5}, r"unknown recipe 5.*W8A8"),
    "weight format": ({"weight": "int9.row"}, r"unknown format 'int9'.*int8.*nf4"),
    "scheme part": ({"weight": "int8.rows"}, r"unknown part 'rows'.*row"),
    "scheme of another type": ({"weight": 8}, r"a scheme is a string"),
    "input scheme": ({"weight": "int8.row", "input": "int8.b2x2"}, r"activations are scaled by"),
    "input format": ({"input": "float12.row"}, r"unknown format 'float12'"),
    "head": ({"head": "int8.colum"}, r"unknown part 'colum'"),
    "pass": ({"passes": ["smoooth"]}, r"unknown pass 'smoooth' in options\['passes'\]"),
    "pass that always runs": ({"passes": ["lower"]}, r"pass 'lower' always runs"),
    "passes as a string": ({"passes": "smooth"}, r"option 'passes'.*list"),
    "mode": ({"mode": "fastest"}, r"unknown mode 'fastest'.*reduce-overhead.*max-autotune"),
    "mode of another type": ({"mode": 3}, r"unknown mode 3.*reduce-overhead"),
    "inductor": ({"inductor": {"max_autotun": True}}, r"unknown Inductor option 'max_autotun'.*Did you mean 'max_autotune'"),
    "inductor of another type": ({"inductor": ["max_autotune"]}, r"option 'inductor'.*dict"),
    "lower": ({"lower": "triton"}, r"unknown value 'triton' in options\['lower'\].*inductor, eager"),
    "release": ({"release": "yes"}, r"option 'release'.*bool"),
    "strict": ({"strict": 1}, r"option 'strict'.*bool"),
    "root": ({"root": 3}, r"option 'root'.*str"),
    "dump": ({"dump": 3}, r"option 'dump'.*str"),
    "ignore": ({"ignore": 3}, r"option 'ignore'"),
    "ignore entry": ({"ignore": [3]}, r"a rule's pattern is a string, not 3|option 'ignore'"),
    "regular expression": ({"ignore": ["re:layers.(2"]}, r"rule 're:layers.\(2' is not a regular expression: .*"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    options, message = WRONG[case]
    with pytest.raises(OptionError, match=message):
        Options.parse(options)


@pytest.mark.parametrize("key", LATER)
def test_keys_whose_time_has_not_come(key):
    with pytest.raises(OptionError, match=rf"option '{key}'.*not available in this version"):
        Options.parse({key: "x"})


@pytest.mark.parametrize("case", WRONG)
def test_an_error_reaches_the_user_and_the_model_is_unharmed(case):
    options, message = WRONG[case]
    model = nn.Linear(32, 16)
    with torch.no_grad():
        before = model(X)
        with pytest.raises(Exception, match=rf"(?s)OptionError.*(?:{message})"):
            torch.compile(model, backend="qcompile", options={"lower": "eager"} | options)(X)
        assert torch.equal(model(X), before) and close(torch.compile(model, backend="qcompile", options=W8)(X), rounded(model)(X))


def test_defaults():
    opts = Options.parse(None)
    assert opts.recipe.name == "W8A8" and opts.lower == "inductor" and not opts.inductor and not opts.release and not opts.strict
    assert Options.parse({}) == opts == Options.parse({"recipe": "w8a8"})
    assert set(HELP) >= set(LATER)


@pytest.mark.parametrize("name", ["w8a8_static", "W8A8-STATIC", "W8a8_Static"])
def test_recipes_in_any_case(name):
    assert Options.parse({"recipe": name}).recipe.name == "W8A8_STATIC"


def test_weight_alone_is_weight_only():
    assert Options.parse({"weight": "int4.g32"}).recipe.input is None
    assert Options.parse({"weight": "int4.g32", "input": "int8.row"}).recipe.input == "int8.row"
    assert Options.parse({"recipe": "W8A8", "weight": "int4.g32"}).recipe.input == "int8.row"
    assert Options.parse({"recipe": "W8A8", "input": "16bit"}).recipe.input is None


def test_mode_comes_as_an_argument_or_as_an_option():
    assert Options.parse(None, "reduce-overhead").inductor == Options.parse({"mode": "reduce-overhead"}).inductor == {"triton.cudagraphs": True}
    assert Options.parse({"mode": "default"}).inductor == {} == Options.parse(None, "default").inductor
    with pytest.raises(OptionError, match="mode is given twice"):
        Options.parse({"mode": "max-autotune"}, "reduce-overhead")


def test_mode_beside_options_is_torch_s_error():
    model = Net()
    with torch.no_grad():
        before = model(X)
        with pytest.raises(RuntimeError, match=r"(?i)either mode or options"):
            torch.compile(model, backend="qcompile", mode="reduce-overhead", options=W8)
        assert torch.equal(model(X), before) and close(torch.compile(model, backend="qcompile", options=W8)(X), rounded(model)(X))


@pytest.mark.parametrize("how", ["mode", "option"])
def test_reduce_overhead(how):
    model = Net()
    given = {"mode": "reduce-overhead"} if how == "mode" else {"options": {"mode": "reduce-overhead"}}
    fast = torch.compile(model, backend="qcompile", **given)
    with torch.no_grad(), graphs() as seen:
        assert close(fast(X), model(X), 0.05)
    assert seen[0][0].options.inductor == {"triton.cudagraphs": True}


def test_inductor_options_are_handed_on():
    model = Net()
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A16", "inductor": {"max_fusion_size": 3}})
    with torch.no_grad():
        assert close(fast(X), rounded(model)(X))


def test_the_key_tells_what_changes_the_code():
    keys = {Options.parse(o).key() for o in ({}, {"recipe": "W4A16"}, {"ignore": ["up"]}, {"inductor": {"max_fusion_size": 3}}, {"head": "int8.row"}, {"lower": "eager"})}
    assert len(keys) == 6 and Options.parse({}).key() == Options.parse({"dump": "/tmp/x"}).key()


def test_a_recipe_object():
    recipe = Recipe("mine", "int8.row", rules=(Rule("down", "nf4.g64"),))
    model = Net()
    with torch.no_grad(), graphs() as seen:
        torch.compile(model, backend="qcompile", options={"recipe": recipe, "lower": "eager"})(X)
    assert {name: str(choice) for name, choice in seen[0][0].plan.items()} == {"up": "int8.row", "down": "nf4.g64"}


@pytest.mark.parametrize(("ignore", "kept"), [("up", {"up"}), (["re:.*"], {"up", "down"}), (["Linear"], {"up", "down"}), (["re:do", "up"], {"up", "down"}), ([], set())])
def test_ignore(ignore, kept):
    model = Net()
    with torch.no_grad(), graphs() as seen:
        y = torch.compile(model, backend="qcompile", options=W8 | {"ignore": ignore})(X)
        assert close(y, rounded(model, keep=tuple(kept))(X))
    assert set(seen[0][0].kernels) == {"up", "down"} - kept


def test_ignore_that_matches_nothing_is_said_once():
    with said() as texts, torch.no_grad(), graphs() as seen:
        fast = torch.compile(Net(), backend="qcompile", options=W8 | {"ignore": ["no.such.layer"]})
        fast(X)
        fast(torch.ones(2, 32))
    assert len(texts) == 1 and "matched no linear: 'no.such.layer'" in texts[0] and "down, up" in texts[0]
    assert "rule 'no.such.layer' matched nothing" in seen[0][0].notes


@pytest.mark.parametrize("pattern", ["table", "Embedding", "norm", "LayerNorm"])
def test_ignore_that_names_no_linear_is_said(pattern):
    """An embedding and a norm of the model are no linears."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.fc = nn.Embedding(40, 32), nn.LayerNorm([3, 32]), nn.Linear(32, 32)

        def forward(self, ids):
            return self.fc(self.norm(self.table(ids)))

    with said() as texts, torch.no_grad():
        torch.compile(Model(), backend="qcompile", options=W8 | {"ignore": [pattern]})(torch.zeros(2, 3, dtype=torch.long))
    assert len(texts) == 1 and f"matched no linear: {pattern!r}" in texts[0]


def test_a_calibration_that_is_not_there(tmp_path):
    """Under every recipe, those that need none of it, too."""
    for recipe in ("W8A8", "W4A16_GPTQ"):
        with pytest.raises(OptionError, match=r"there is no calibration file .*x\.safetensors"):
            Options.parse({"recipe": recipe, "calibration": str(tmp_path / "x.safetensors")})
