"""Recipes are rows; rules choose linears by name, suffix, pattern or type."""

from __future__ import annotations

import pytest

from qcompile.core.errors import OptionError, Skip, unknown
from qcompile.core.recipe import DEFAULT, KEEP, RECIPES, Choice, Recipe, Rule, find_recipe, input_scheme
from qcompile.core.scheme import Scheme


@pytest.mark.parametrize("name", RECIPES)
def test_rows(name):
    row = RECIPES[name]
    assert row.name == name == name.upper() and row.doc
    for spelling in (row.weight, row.input, row.head, *(s for rule in row.rules for s in (rule.weight, rule.input))):
        if spelling not in (None, KEEP):
            assert str(Scheme.parse(spelling)) == spelling
    assert row.static == bool(row.input and Scheme.parse(row.input).static)
    assert name in str(row) and row.weight in str(row)


def test_default_exists():
    assert DEFAULT in RECIPES


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("spell", [str, str.lower, str.title, lambda n: n.replace("_", "-").lower()], ids=["as is", "lower", "title", "dashes"])
def test_find_in_any_case(name, spell):
    assert find_recipe(spell(name)) is RECIPES[name]


def test_find_takes_a_recipe():
    mine = Recipe("mine", "int4.g64")
    assert find_recipe(mine) is mine


@pytest.mark.parametrize("name", ["W4A61", 7, None, ["W4A16"]])
def test_unknown_recipe_lists_the_table(name):
    with pytest.raises(OptionError, match=r"unknown recipe.*Known: W8A8, "):
        find_recipe(name)


def test_unknown_recipe_suggests():
    with pytest.raises(OptionError, match="Did you mean 'W8A8_STATIC'"):
        find_recipe("w8a8_statc")


@pytest.mark.parametrize(
    ("pattern", "name", "kind", "matches"),
    [
        ("model.layers.0.fc", "model.layers.0.fc", "", True),
        ("layers.0.fc", "model.layers.0.fc", "", True),
        ("fc", "model.layers.0.fc", "", True),
        ("fc", "model.layers.0.fc1", "", False),
        ("fc", "model.layers.0.xfc", "", False),
        ("layers.0", "model.layers.0.fc", "", False),
        ("layers.0.fc", "model.layers.10.fc", "", False),
        ("Linear", "a.b", "Linear", True),
        ("Linear", "a.b", "Conv1D", False),
        ("re:.*fc", "model.fc", "", True),
        ("re:fc", "model.fc", "", False),
        ("re:model", "model.fc", "", True),
        (r"re:.*\.0\.(q|k)$", "layers.0.k", "", True),
        (r"re:.*\.0\.(q|k)$", "layers.0.kk", "", False),
        ("re:Linear", "a.b", "Linear", False),
        ("f.", "model.fc", "", False),
    ],
)
def test_rule(pattern, name, kind, matches):
    assert Rule(pattern, "int8.row").matches(name, kind) is matches


def test_bad_rules():
    with pytest.raises(OptionError, match=r"rule 're:\(' is not a regular expression"):
        Rule("re:(")
    with pytest.raises(OptionError, match="unknown format"):
        Rule("fc", "int9")
    with pytest.raises(OptionError, match="unknown part"):
        Rule("fc", "int8", "int8.colum")
    with pytest.raises(OptionError, match="unknown format"):
        Recipe("mine", "int9.row")
    with pytest.raises(OptionError, match="unknown format"):
        Recipe("mine", "int8.row", head="int9")


@pytest.mark.parametrize("spelling", ["int8.b2x32", "int8.row.min", "int8.g32/int8.row", "int4.row.planes"])
def test_inputs_are_not_weights(spelling):
    """What ``quantize`` cannot give is refused where it is asked for."""
    for ask in (lambda: Rule("fc", "int8.row", spelling), lambda: Recipe("mine", "int8.row", spelling), lambda: RECIPES["W8A16"].override(input=spelling)):
        with pytest.raises(OptionError, match=f"input scheme '{spelling}'.*for weights"):
            ask()
    assert str(input_scheme("uint8.g32.point")) == "uint8.g32.point"


def test_override():
    base = Recipe("base", "int8.row", "int8.row", rules=(Rule("fc", "int4.g64"),))
    assert base.override() == base
    other = base.override(weight="INT4.g128", input=KEEP, head="int8", ignore=["re:.*gate", "lm_head"])
    assert (other.weight, other.input, other.head) == ("int4.g128", None, "int8")
    assert [r.pattern for r in other.rules] == ["re:.*gate", "lm_head", "fc"] and other.rules[0].weight is None
    assert other.name == "custom" and base.override(ignore=["x"]).name == "base"
    assert base.override(input="int8.tensor.static").static and not base.static
    assert Recipe("r", "int8.row", rules=(Rule("fc", "int8.row", "int8.tensor.static"),)).static
    with pytest.raises(OptionError):
        base.override(weight="int9")


def test_steps_of_a_rule():
    """They take the place of the recipe's, an empty list as well; None leaves these."""
    recipe = Recipe("mine", "int8.row", "int8.row", rules=(Rule("a", "int8.row", passes=["smooth( alpha = 0.7 )"]), Rule("b", "int8.row", passes=()), Rule("c", "int8.row")), passes=("gptq",))
    assert recipe.rules[0].passes == ("smooth(alpha=0.7)",) and [r.methods for r in recipe.rules[1:]] == [(), None]
    assert [str(m) for m in recipe.steps] == ["gptq", "smooth(alpha=0.7)"] and hash(recipe)
    with pytest.raises(OptionError, match=r"rule 'd' leaves its linears in 16 bits.*it names gptq"):
        Rule("d", passes=("gptq",))
    with pytest.raises(OptionError, match="a step reads"):
        Rule("d", "int8.row", passes=("gptq(",))


def test_choice_and_skip():
    assert str(Choice(Scheme.parse("int4.g128"), Scheme.parse("int8.row"))) == "int8.row @ int4.g128"
    assert str(Choice(Scheme.parse("int4.g128"))) == "int4.g128"
    assert not Skip("too small") and str(Skip("too small")) == "too small"


def test_unknown_without_a_near_name():
    assert str(unknown("fruit", "zzz", ["apple", "pear"], "basket")) == "unknown fruit 'zzz' in basket. Known: apple, pear."
    assert "Did you mean 'Apple'?" in str(unknown("fruit", "aple", ["Apple"]))
