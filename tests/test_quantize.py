"""``qcompile.quantize``: what it leaves is an ordinary module that holds codes, runs rounded in eager, and multiplies the codes once compiled."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref

import pytest
import torch
from calibrated import Mlp, rows, spied
from small import Net, Stack, Tied, close, graphs, rounded, said
from tiny_models import tiny
from torch import nn
from torch.nn.utils import parametrize

import qcompile
from qcompile import sequence
from qcompile.calibrate import KEPT
from qcompile.core.errors import CalibrationError, OptionError, QcompileError, Skip, StrictError, WeightError
from qcompile.core.recipe import Choice, Recipe, Rule
from qcompile.core.scheme import Scheme
from qcompile.kernels.quantize import reference as quantize_input
from qcompile.kernels.scaled_linear import values

X = rows(4, 6, 32)
G16 = {"weight": "int4.g16"}
GPTQ = {"recipe": "W4A16_GPTQ", "weight": "int4.g16"}
EAGER = {"lower": "eager"}


def quantized(model, recipe="W8A16", data=(X,), **options):
    qcompile.quantize(model, recipe, list(data), progress=False, **options)
    return model


def fast(model, **options):
    return torch.compile(model, backend="qcompile", options=EAGER | options)


@torch.no_grad()
def same(model, x=X, rtol=1e-5, **options):
    """Compiled equals eager, and what ran."""
    with graphs() as ran:
        assert close(fast(model, **options)(x), model(x), rtol)
    return [graph for graph, _ in ran]


def stored(model):
    return {name.replace("parametrizations.", "").removesuffix(".weight") for name, m in model.named_modules() if isinstance(m, parametrize.ParametrizationList)}


def bits(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the model afterwards --------------------------------------------------------------------------------------------------


def test_eager_is_the_rounded_model():
    model = Net()
    twin = rounded(model)
    outcome = qcompile.quantize(model, "W8A16", [X], progress=False)
    assert [line.name for line in outcome.solved] == ["up", "down"] and all(line.decibels > 35 for line in outcome.solved)
    assert torch.equal(model.up.weight, twin.up.weight) and torch.equal(model.down.weight, twin.down.weight) and torch.equal(model.up.bias, twin.up.bias)
    assert torch.equal(model(X), twin(X)) and isinstance(model.up, nn.Linear)
    assert not any(p.is_floating_point() and p.shape in ((48, 32), (32, 48)) for p in model.parameters())


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_compiled_reads_the_codes(lower):
    model = quantized(Net())
    (graph,) = {id(g): g for g in same(model, lower=lower)}.values()
    report = qcompile.explain(fast(model, lower=lower), X)
    assert [(row.name, row.scheme, row.why) for row in report.sites] == [("up", "int8.row", "stored"), ("down", "int8.row", "stored")]
    assert not report.kept and not graph.lowered.graph.find_nodes(op="call_function", target=torch.ops.qcompile.stored.default)
    inputs = [n.meta["example_value"] for n in graph.lowered.graph.find_nodes(op="placeholder")]
    assert not [t for t in inputs if t.is_floating_point() and t.dim() == 2 and t.shape in ((48, 32), (32, 48))]


def test_scales_that_are_quantized_too():
    """A scheme within a scheme: one graph, in which the codes are a linear's."""
    model, x = Net(), torch.randn(5, 32)
    qcompile.quantize(model, "NF4", [x], weight="nf4.g32/int8.g256", progress=False)
    with torch.no_grad(), graphs() as seen:
        y = torch.compile(model, backend="qcompile", options=EAGER, fullgraph=True)(x)
    ((graph, _),) = seen
    assert close(y, model(x), 1e-5) and [str(c.weight) for c in graph.plan.values()] == ["nf4.g32/int8.g256"] * 2


@torch.no_grad()
def simulated(model, inputs, scheme):
    """Eager, with the input of every stored linear rounded as a kernel would."""
    scheme = Scheme.parse(scheme)

    def rounds(_, args):
        codes, *scale = quantize_input(args[0], [], str(scheme))
        return (values(codes, scale, scheme).to(args[0].dtype), *args[1:])

    hooks = [m.register_forward_pre_hook(rounds) for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    out = model(**inputs)
    for hook in hooks:
        hook.remove()
    return out[0] if isinstance(out, tuple) else out.logits


MODELS = {
    "gpt2": dict(n_layer=1),
    "bert": dict(num_hidden_layers=1),
    "mixtral grouped": dict(num_hidden_layers=1, experts_implementation="grouped_mm"),
    "mixtral batched": dict(num_hidden_layers=1, experts_implementation="batched_mm"),
    "t5": dict(num_layers=1),
    "vit": dict(num_hidden_layers=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name):
    """Conv1D's K x N weights, stacked experts, modules that ask for their weight's dtype."""
    model, inputs = tiny(name.split()[0], **MODELS[name])
    with said():
        outcome = qcompile.quantize(model, "W4A16", [inputs], progress=False, weight="int4.g16")
    assert {line.name.removesuffix(".weight") for line in outcome.solved} == stored(model)
    with torch.no_grad(), graphs() as ran:
        assert close(fast(model)(**inputs).logits, model(**inputs).logits)
    plan = ran[0][0].plan
    assert {line.name for line in outcome.solved} == {site for site, c in plan.items() if isinstance(c, Choice)} and all(c.why == "stored" for c in plan.values() if isinstance(c, Choice))


def test_activations_are_rounded_once_compiled():
    model, inputs = tiny("bert", num_hidden_layers=1)
    with said():
        qcompile.quantize(model, "W8A8", [inputs], progress=False)
    with torch.no_grad():
        y, plain, found = fast(model)(**inputs).logits, model(**inputs).logits, simulated(model, inputs, "int8.row")
    assert float((y - plain).norm()) > 8 * float((y - found).norm())


def test_a_linear_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(32, 32)

        def forward(self, x):
            return self.one(torch.relu(self.one(x)))

    model = quantized(Twice())
    assert stored(model) == {"one"} and set(same(model)[0].plan) == {"one", "one@2"}
    with said() as texts:
        model = quantized(Twice(), **GPTQ)
    assert not stored(model) and "kept in 16 bits: one (several linears read it)" in texts[-1]


def test_two_graphs_read_one_weight():
    """Paths of the model that its data takes: each weight is replaced once."""

    class Paths(Net):
        def forward(self, x, first=False):
            return torch.relu(self.up(x)) if first else super().forward(x)

    data = [{"x": X}, {"x": X, "first": True}]
    model = quantized(Paths(), data=data)
    assert stored(model) == {"up", "down"}
    with torch.no_grad():
        assert all(close(fast(model)(**batch), model(**batch)) for batch in data)


# --- which linears -----------------------------------------------------------------------------------------------------------


def test_ties_ignored_linears_and_the_head():
    ids = torch.arange(8)[None]
    with said() as texts:
        model = quantized(Tied(), data=[ids], head="int8.row")
    assert stored(model) == {"body.up", "body.down"} and model.head.weight is model.table.weight and "kept in 16 bits" in texts[0] and "another module holds it, too" in texts[0]
    model = quantized(Tied(tied=False), data=[ids], head="int4.g16", ignore=["up"])
    assert stored(model) == {"body.down", "head"}
    assert str(same(model, ids)[0].plan["head"]) == "int4.g16"


class Borrowing(nn.Module):
    """Calls a linear that it does not hold."""

    def __init__(self, other):
        super().__init__()
        self.own = nn.Linear(32, 32)
        self.other = [other]

    def forward(self, x):
        return self.own(self.other[0](x))


def test_a_linear_of_another_model_is_left_alone():
    other = nn.Linear(32, 32)
    with pytest.warns(qcompile.QcompileWarning, match=r"kept in 16 bits: weight \(the model does not hold it\)"):
        model = quantized(Borrowing(other))
    assert stored(model) == {"own"} and type(other) is nn.Linear


def test_what_is_left_of_a_quantized_model():
    """The default recipe touches nothing more; one that is named does."""
    model = quantized(Net(), **G16, ignore=["down"])
    plan = same(model)[0].plan
    assert str(plan["up"]) == "int4.g16" and isinstance(plan["down"], Skip) and "quantized already" in str(plan["down"])
    with torch.no_grad(), graphs() as ran:
        fast(model, recipe="W8A16")(X)
    assert [str(c) for c in ran[0][0].plan.values()] == ["int4.g16", "int8.row"]
    before = model.up.parametrizations.weight.original0
    outcome = qcompile.quantize(model, "W8A16", [X], progress=False)
    assert [line.name for line in outcome.solved] == ["down"] and stored(model) == {"up", "down"} and model.up.parametrizations.weight.original0 is before


@pytest.mark.parametrize("recipe", ["W8A8_SMOOTHQUANT_STATIC", "LLM_INT8_STATIC"])
def test_what_calibration_found_is_stored(recipe):
    """Vectors, outlier columns and ranges: in eager the weight is as before, but for rounding."""
    model = Mlp()
    x = rows(64, 32)
    x[:, 3] *= 50
    exact, twin = model(x).detach(), copy.deepcopy(model)
    with said():
        quantized(model, recipe, [x])
        torch.testing.assert_close(model.a.weight, twin.a.weight, atol=0.02, rtol=0)
        with torch.no_grad(), graphs() as ran:
            y = fast(model)(x)
    first = ran[0][0].plan["a"]
    assert (first.smooth and first.input.static) or first.outliers == 1
    assert float((y - exact).norm()) < 0.03 * float(exact.norm())


def test_ranges_of_linears_that_read_one_input():
    """q, k and v share their range, which the first of them keeps; it is replaced before the others. The same as calibrating the model and leaving its weights."""
    model, given = tiny("llama", num_hidden_layers=1)
    twin, given = copy.deepcopy(model), {**given, "use_cache": False}
    with torch.no_grad(), said():
        calibrated = fast(twin, recipe="W8A8_STATIC")
        qcompile.calibrate(calibrated, [given], progress=False)
        wanted = calibrated(**given).logits
        quantized(model, "W8A8_STATIC", [given])
        assert stored(model) >= {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"}
        torch.testing.assert_close(fast(model, recipe="W8A8_STATIC")(**given).logits, wanted)


# --- an ordinary module ------------------------------------------------------------------------------------------------------


def test_state_dict_and_fresh_codes():
    """Other codes, loaded into a compiled model, are those that it uses."""
    a, b = quantized(Net()), quantized(Net())
    run = fast(b)
    with torch.no_grad():
        before = run(X)
        file = io.BytesIO()
        torch.save(a.state_dict(), file)
        file.seek(0)
        b.load_state_dict(torch.load(file, weights_only=True))
        assert equal(bits(a), bits(b)) and not close(before, run(X), 0.1) and close(run(X), a(X)) and close(b(X), a(X), 0)


def test_copies_and_pickles():
    model = quantized(Net(), **G16)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.up) is type(model.up) and torch.equal(other(X), model(X))
        with torch.no_grad():
            other.up.parametrizations.weight.original1.mul_(2)
        assert torch.equal(other.up.weight, 2 * model.up.weight)
        same(other)


def test_modules_share_a_class_and_lose_it_alone():
    a, b = quantized(Net()), quantized(Net())
    assert type(a.up) is type(b.up) is type(b.down)
    weight = a.up.weight
    parametrize.remove_parametrizations(a.up, "weight")
    assert type(a.up) is nn.Linear and torch.equal(a.up.weight, weight) and b.up.weight.shape == a.down.weight.T.shape
    parametrize.register_parametrization(b.up, "bias", nn.Identity())
    assert b.up.bias.shape == (48,) and b.down.bias is None and a.down.weight.shape == (32, 48)
    same(b)
    assert type(b.down) is not type(b.up) and "bias" not in vars(type(b.down))
    with pytest.raises(WeightError, match="stored as codes and cannot be assigned"):
        b.up.weight = torch.zeros(48, 32)


def test_export_casts_and_plain_inductor():
    model = quantized(Net(), **G16)
    with torch.no_grad():
        assert close(torch.export.export(model, (X,)).module()(X), model(X))
        assert close(torch.compile(model)(X), model(X))
        torch._dynamo.reset()
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert half.up.weight.dtype == torch.bfloat16 and half.up.parametrizations.weight.original0.dtype == model.up.parametrizations.weight.original0.dtype
        y = half(X.bfloat16())
        assert close(y.float(), model(X), 0.03) and close(fast(half)(X.bfloat16()), y, 0.02)


def test_one_graph_for_equal_layers():
    """Two instances; and more layers, compiled one by one, than Dynamo captures code."""
    a, b = quantized(Net()), quantized(Net())
    with torch.no_grad(), graphs() as ran:
        assert close(fast(a)(X), a(X)) and close(fast(b)(X), b(X))
    assert len(ran) == 2 and ran[0][0] is ran[1][0]
    torch._dynamo.reset()
    model = quantized(Stack(10))
    with torch.no_grad(), graphs() as ran:
        y = model(X)
        for layer in model.layers:
            layer.compile(backend="qcompile", options=EAGER)
        assert close(model(X), y)
    assert len(ran) == 10 and len({id(graph) for graph, _ in ran}) == 1


# --- runs --------------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_goes_on(monkeypatch, tmp_path):
    data, folder = [rows(40, 32, seed=i) for i in range(3)], tmp_path / "run"
    torch.manual_seed(3)
    model = Mlp()
    whole = quantized(copy.deepcopy(model), data=data, **GPTQ)
    again = quantized(copy.deepcopy(model), data=data, **GPTQ)
    assert equal(bits(whole), bits(again))
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        real = sequence.complete

        def fails(members, *rest):
            if members[0].site.name == "c":
                raise KeyboardInterrupt
            return real(members, *rest)

        patch.setattr(sequence, "complete", fails)
        with pytest.raises(KeyboardInterrupt):
            quantized(model, data=data, resume=folder, **GPTQ)
    assert not stored(model) and len(list(folder.iterdir())) == 2
    with spied(monkeypatch) as seen:
        quantized(model, data=data, resume=folder, **GPTQ)
    assert [tuple(w.shape) for w, _ in seen] == [(16, 32)]
    assert equal(bits(model), bits(whole))


def test_what_was_kept_for_other_weights_or_another_recipe_is_not_used(monkeypatch, tmp_path):
    data, model = [rows(40, 32)], Mlp()
    first = copy.deepcopy(model)
    quantized(first, data=data, resume=tmp_path, **GPTQ)
    with torch.no_grad():
        model.b.weight.mul_(1.5)
    with spied(monkeypatch) as seen:
        quantized(copy.deepcopy(model), data=data, resume=tmp_path, **GPTQ)
        assert [tuple(w.shape) for w, _ in seen] == [(32, 48), (16, 32)]  # c reads what b gives
        quantized(model, data=data, resume=tmp_path, **{**GPTQ, "weight": "int4.g8"})
    assert len(seen) == 5


def test_what_was_kept_for_other_data_is_not_used(monkeypatch, tmp_path):
    """Nor for another upstream: parameters that are not solved, and the choice of a linear before."""
    data, model = [rows(40, 32)], Mlp()
    kept = quantized(copy.deepcopy(model), data=data, resume=tmp_path, **GPTQ)

    def solved(data=data, model=model, **options):
        again = copy.deepcopy(model)
        with spied(monkeypatch) as seen:
            quantized(again, data=data, resume=tmp_path, **GPTQ, **options)
        return len(seen), bits(again)

    count, found = solved()
    assert count == 0 and equal(found, bits(kept))
    other = [rows(40, 32, seed=1)]
    count, found = solved(other)
    assert count == 3 and equal(found, bits(quantized(copy.deepcopy(model), data=other, **GPTQ)))
    assert solved(other)[0] == 0
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.a.bias.add_(1.0)
    assert solved(other, shifted)[0] == 3
    assert solved(other, shifted, ignore=["b"])[0] == 2
    with torch.no_grad():
        shifted.b.weight.add_(1.0)
    assert solved(other, shifted, ignore=["b"])[0] == 2
    assert solved(other, shifted, ignore=["b"])[0] == 0


def test_data_is_not_added_to_that_of_earlier_sittings():
    data, model = [rows(40, 32)], Mlp()
    alone = quantized(copy.deepcopy(model), data=data, **GPTQ)
    run = torch.compile(model, backend="qcompile", options={**GPTQ, **EAGER})
    qcompile.calibrate(run, [rows(50, 32, seed=7)], progress=False)
    outcome = qcompile.quantize(model, data=data, progress=False, **GPTQ)
    assert outcome.tokens == 40 and equal(bits(model), bits(alone))


@pytest.mark.parametrize("batch", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "dict"])
def test_forms_of_data(batch):
    model = Net()
    assert qcompile.quantize(model, "W8A16", iter([batch]), progress=False).solved[0].tokens == 24 and stored(model) == {"up", "down"}


def test_without_data():
    model, _ = tiny("gpt2", n_layer=1)
    outcome = qcompile.quantize(model, "W4A16", progress=False)
    assert outcome.solved and len(stored(model)) == 4
    assert list(outcome.seconds) == ["recording", "solving", "installing"]


def test_weights_are_rounded_once(monkeypatch):
    """Solving, the replay and the module read the same codes, while the memory holds them; what it does not hold is rounded again."""
    again = []
    for where, name in (("qcompile.solve", "quantize"), ("qcompile.quantize", "round_to_nearest")):
        module = sys.modules[where]
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, where=where, **k: (again.append(where), real(*a, **k))[1])
    model = Net()
    one = quantized(copy.deepcopy(model), data=[rows(1, 32)], **G16)
    assert not again
    two = quantized(model, data=[rows(1, 32)], memory=1400, **G16)
    assert set(again) == {"qcompile.solve", "qcompile.quantize"}
    assert equal(bits(one), bits(two))


def test_rules_with_steps_of_their_own():
    """What a rule's steps want is asked for as that of the recipe's."""
    model = Mlp()
    rules = (Rule("b", "int8.row", passes=("gptq",)), Rule("c", "int8.row", passes=("outliers(dynamic=4)",)))
    with pytest.raises(CalibrationError, match="recipe mine needs data"):
        qcompile.quantize(model, Recipe("mine", "int8.row", rules=rules[:1]), progress=False)
    with pytest.raises(OptionError, match="reads columns of the 16-bit weights"):
        qcompile.quantize(model, Recipe("mine", "int8.row", rules=rules), [X], progress=False)
    with said():
        outcome = qcompile.quantize(model, Recipe("mine", "int8.row", rules=rules[:1]), [X], progress=False)
    assert [[str(m) for m in line.asked.methods] for line in outcome.solved] == [[], ["gptq"], []]


def test_errors():
    model = Net()
    before = bits(model)
    with pytest.raises(CalibrationError, match="W4A16_GPTQ needs data"):
        qcompile.quantize(model, "W4A16_GPTQ")
    with pytest.raises(CalibrationError, match="the data is empty"):
        qcompile.quantize(model, "W4A16_GPTQ", [], progress=False)
    with pytest.raises(CalibrationError, match="W8A8_STATIC needs data"):
        qcompile.quantize(model, "W8A8_STATIC")
    with pytest.raises(CalibrationError, match="give it one batch"):
        qcompile.quantize(model, "W8A16")
    with pytest.raises(OptionError, match="no option 'release'; it takes weight"):
        qcompile.quantize(model, "W8A16", [X], release=True)
    with pytest.raises(OptionError, match="Take LLM_INT8_STATIC"):
        qcompile.quantize(model, "LLM_INT8", [X])
    with pytest.raises(OptionError, match=r"takes a torch\.nn\.Module, not function"):
        qcompile.quantize(lambda x: x, "W8A16", [X])
    with pytest.raises(QcompileError, match="NaN or infinite"):
        quantized(model, data=[X * float("nan")], **GPTQ)
    with pytest.raises(StrictError, match="collapsed"), said():
        quantized(model, weight="int2.row", strict=True)
    assert equal(bits(model), before) and not stored(model)


@pytest.mark.parametrize("options", [{}, GPTQ], ids=["rounded", "solved"])
def test_weights_that_are_not_finite_are_named(options):
    model = Net()
    with torch.no_grad():
        model.down.weight[3, 4] = float("nan")
    with pytest.raises(WeightError, match="the weight of down has 1 values that are NaN"):
        quantized(model, **options)
    assert not stored(model)
    assert stored(quantized(model, ignore=["down"], **options)) == {"up"}


def test_nothing_holds_the_weights():
    gc.collect()
    others, kept = {id(o) for o in gc.get_objects() if type(o) is nn.Parameter}, list(KEPT)  # models and calls of other tests
    model = Mlp()
    refs = [weakref.ref(m.weight) for m in (model.a, model.b, model.c)]
    quantized(model, data=[rows(40, 32)], **GPTQ)
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.is_floating_point() and o.device.type == "cpu" and o.shape in ((48, 32), (32, 48), (16, 32))]
    assert not [t for t in alive if type(t) is nn.Parameter and id(t) not in others]
    assert kept == KEPT
    codes = [weakref.ref(p) for p in model.parameters()]
    same(model, rows(40, 32))
    torch._dynamo.reset()
    del model, alive
    gc.collect()
    assert [ref() for ref in codes] == [None] * len(codes)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_vectors_and_ranges_of_a_model_that_was_cast(lower):
    """Graphs read them in float32, as they were compiled for, whatever dtype the module holds them in."""
    model = quantized(nn.Sequential(nn.LayerNorm(32), Net()), "W8A8_SMOOTHQUANT_STATIC", [rows(64, 32)])
    x = rows(64, 32)
    with torch.no_grad():
        truth = fast(model)(x)
        torch._dynamo.reset()
        y = fast(copy.deepcopy(model).to(torch.bfloat16), lower=lower)(x.bfloat16())
    assert y.dtype == torch.bfloat16 and close(y.float(), truth, 0.05)


def test_a_rule_for_one_of_many_stored_layers(built):
    """The graph that is built for a layer that a rule keeps knows it by its plain name."""
    model = nn.Sequential(*[Net() for _ in range(3)])
    quantized(model)
    with torch.no_grad():
        truth = model(X)
        for layer in model:
            layer.compile(backend="qcompile", options=EAGER | {"ignore": ["1.up"]})
        with said():
            assert close(model(X), truth, 1e-5)
    kept = {(site.path, isinstance(graph.plan[site.name], Skip)) for graph in built for site in graph.sites.values()}
    assert ("1.up", True) in kept and ("1.down", False) in kept and ("0.up", False) in kept
