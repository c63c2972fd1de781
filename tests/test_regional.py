"""Layers compiled one by one: one graph for equal ones, a variant where the plan differs, never a silent reuse."""

from __future__ import annotations

import sys

import pytest
import torch
from small import W8, Net, Stack, close, graphs, rounded, said
from torch import nn

import qcompile
from qcompile.memory import is_released


def regional(model, layers, dynamic=None, **options):
    for layer in layers:
        layer.compile(backend="qcompile", dynamic=dynamic, options=W8 | options)
    return model


def uncompiled(model):
    """``rounded`` copies a model: without the compiled calls."""
    for module in model.modules():
        module._compiled_call_impl = None
    return model


def right(model, x, keep=(), scheme="int8.row"):
    calls = {m: m._compiled_call_impl for m in model.modules()}
    with torch.no_grad():
        y = model(x)
        truth = rounded(uncompiled(model), scheme, keep)(x)
    for module, call in calls.items():
        module._compiled_call_impl = call
    return close(y, truth)


@pytest.fixture
def x():
    return torch.randn(5, 32)


def test_one_compile_for_equal_layers(built, x):
    model = Stack(6)
    regional(model, model.layers)
    for _ in range(2):
        assert right(model, x)
    assert len(built) == 1


def test_calibrating_looks_for_names_once(x, monkeypatch):
    """A scan of all live objects."""
    from qcompile import calibrate as _  # noqa: F401

    module = sys.modules["qcompile.calibrate"]
    scans = []
    real = module.owners
    monkeypatch.setattr(module, "owners", lambda *tables: (scans.append(1), real(*tables))[1])
    model = regional(Stack(6), [])
    regional(model, model.layers, recipe="W8A8_STATIC")
    with said(), qcompile.calibrate(model, progress=False) as sitting:
        model(x)
    assert len(scans) == 1
    assert [line.name for line in sitting.outcome.solved][-1].startswith("layers.5.") and len(sitting.units) == 6


def test_layers_change_one_by_one(built, x):
    model = Stack(4)
    regional(model, model.layers)
    assert right(model, x)
    with torch.no_grad():
        model.layers[2].up.weight.mul_(-2)
    assert right(model, x) and len(built) == 1


@pytest.mark.parametrize("rule", ["re:layers.2.*", "layers.2.up", "re:layers.0.*", "re:.*down"])
def test_rules_by_name(built, x, rule):
    model = Stack(4)
    regional(model, model.layers, ignore=[rule])
    keep = {"re:layers.2.*": ("layers.2.",), "layers.2.up": ("layers.2.up",), "re:layers.0.*": ("layers.0.",), "re:.*down": ("down",)}[rule]
    for _ in range(3):
        assert right(model, x, keep)
    assert len(built) == (1 if rule == "re:.*down" else 2)


@pytest.mark.parametrize("dynamic", [True, None])
def test_rules_and_dynamic_shapes(built, dynamic):
    model = Stack(4)
    regional(model, model.layers, dynamic, ignore=["re:layers.[12].*"])
    for rows in (5, 9, 3, 5):
        assert right(model, torch.randn(rows, 32), ("layers.1.", "layers.2."))


def test_rules_and_dynamic_shapes_through_inductor():
    model = Stack(3)
    for layer in model.layers:
        layer.compile(backend="qcompile", dynamic=True, options={"recipe": "W8A16", "ignore": ["re:layers.1.*"]})
    for rows in (5, 9, 3):
        assert right(model, torch.randn(rows, 32), ("layers.1.",))


def test_two_rules_two_variants(built, x):
    from qcompile import Recipe, Rule

    recipe = Recipe("mixed", "int8.row", rules=(Rule("re:layers.1.*", "nf4.g64"), Rule("re:layers.3.up", None)))
    model = Stack(5)
    regional(model, model.layers, recipe=recipe)
    for _ in range(2):
        with torch.no_grad():
            y = model(x)
        want = rounded(uncompiled(model), "int8.row", ("layers.1.", "layers.3.up"))
        want.layers[1] = rounded(want.layers[1], "nf4.g64")
        with torch.no_grad():
            assert close(y, want(x))
        regional(model, model.layers, recipe=recipe)
    assert len(built) == 3


def test_no_rule_is_unused_because_another_layer_came_first(x):
    model = Stack(3)
    with said() as texts, torch.no_grad():
        regional(model, model.layers, ignore=["re:layers.2.*"])(x)
    assert not [t for t in texts if "matched no linear" in t]


def test_a_second_model_of_the_class(built, x):
    first, second = Stack(3), Stack(3)
    for model in (first, second):
        regional(model, model.layers, ignore=["re:layers.1.*"])
    for _ in range(2):
        assert right(first, x, ("layers.1.",)) and right(second, x, ("layers.1.",))
    assert len(built) == 2


def test_a_layer_that_dies(built, x):
    """Ids of dead parameters come again."""
    for _ in range(6):
        model = Stack(3)
        regional(model, model.layers, ignore=["re:layers.1.*"])
        assert right(model, x, ("layers.1.",))
        del model


def test_root(x):
    layer = Net()
    fast = torch.compile(layer, backend="qcompile", options=W8 | {"root": "model.layers.7", "ignore": ["model.layers.7.up"]})
    with torch.no_grad(), graphs() as seen:
        assert close(fast(x), rounded(layer, keep=("up",))(x))
    assert set(seen[0][0].sites) == {"model.layers.7.up", "model.layers.7.down"} and list(seen[0][0].kernels) == ["model.layers.7.down"]


def test_root_for_each_layer(built, x):
    """The user names the layers: rules go by these names."""
    model = Stack(3)
    for i, layer in enumerate(model.layers):
        layer.compile(backend="qcompile", options=W8 | {"root": f"block.{i}", "ignore": ["re:block.1.*"]})
    assert right(model, x, ("layers.1.",))


def test_static_ranges_differ(x):
    """Each layer is calibrated by what it sees."""
    model = nn.Sequential(*[Net() for _ in range(3)])
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.down.weight.mul_(10.0**i)
        truth = model(x)
        for layer in model:
            layer.compile(backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager"})
        with graphs() as seen:
            for _ in range(2):
                assert close(model(x), truth, 5e-2)
    assert len({id(g) for g, _ in seen}) == 1
    ranges = [float(s.range[0]) for layer in model for s in qcompile.weights.TABLE.get(layer.up.weight).solutions.values()]
    assert len(set(ranges)) == 3


def test_release(x):
    model = Stack(4)
    regional(model, model.layers, ignore=["re:layers.1.*"], release=True)
    with torch.no_grad():
        y = model(x)
        assert [is_released(layer.up.weight) for layer in model.layers] == [True, False, True, True]
        for _ in range(2):
            assert torch.equal(model(x), y)


def test_a_kept_layer_is_never_released_by_another(x):
    """The same layers in a graph that reads one of them in 16 bits."""
    model = Stack(3)
    whole = torch.compile(model, backend="qcompile", options=W8 | {"ignore": ["re:layers.1.*"]})
    with torch.no_grad():
        y = whole(x)
        regional(model, model.layers, release=True)
        model(x)
        uncompiled(model)
        assert not is_released(model.layers[1].up.weight)
        assert torch.equal(whole(x), y)
