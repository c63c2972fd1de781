"""True sequential order: every site is solved on the input that the quantized sites before it make, however the replay gets there."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from calibrated import GPTQ, Broken, Mlp, check_hessians, compiled, expected, rows, same_codes, solutions, spied
from small import Stack, close, graphs, said
from tiny_models import one_layer, tiny
from torch import fx, nn

from qcompile import replay, sequence
from qcompile.calibrate import KEPT, calibrate
from qcompile.core.qtensor import dequantize
from qcompile.core.recipe import Choice
from qcompile.replay import Unit
from qcompile.sequence import Quality, Run, stages
from qcompile.weights import TABLE


def once(x):
    return lambda model: model(x)


def sit(model, calls, monkeypatch, dynamic=None, fast=None, **options):
    """What the solver saw of one sitting."""
    fast = compiled(model, dynamic, **options) if fast is None else fast
    with spied(monkeypatch) as seen, said(), calibrate(fast, progress=False) as sitting:
        for call in calls:
            call(fast)
    return seen, sitting


def units_of(model, fast, calls):
    """Recorded units of a model, unsolved: the sitting is left by an error."""
    with pytest.raises(KeyboardInterrupt), calibrate(fast, progress=False) as sitting:
        for call in calls:
            call(fast)
        raise KeyboardInterrupt
    return sitting.units


def solved(units, budget):
    """Codes by site after a run with so much memory."""
    outcome = Run(units, budget, lambda: None, lambda line: None).run(again=True)
    out = {}
    for unit in units:
        for site in unit.sites.values():
            for s in TABLE.record(unit.parameter(site)).solutions.values():
                out[site.name] = [t.clone() for t in s.q.flatten()]
    return outcome, out


def equal(a, b):
    return bool(a) and a.keys() == b.keys() and all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def test_mlp(monkeypatch):
    model, calls = Mlp(), [once(rows(40, 32, seed=i)) for i in range(3)]
    seen, sitting = sit(model, calls, monkeypatch)
    check_hessians(model, calls, seen)
    assert [line.name for line in sitting.outcome.solved] == ["a", "b", "c"] and sitting.outcome.tokens == 120
    naive = expected(copy.deepcopy(model), calls, {name: s for name, s in solutions(model).items() if name == "c"})
    h = seen[2][1]["hessian"]["sum"].double()
    assert float((h - naive[0][1]).norm()) > 1e-3 * float(h.norm())  # the unquantized input would not have passed


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5"])
def test_language_models(monkeypatch, name):
    model, inputs = tiny(name)

    def changed(change):
        return {key: change(value) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}

    calls = [lambda m: m(**inputs), lambda m: m(**changed(lambda t: t.flip(0))), lambda m: m(**changed(lambda t: t.roll(3, 1)))]
    seen, sitting = sit(model, calls, monkeypatch)
    check_hessians(model, calls, seen, 1e-3)
    assert sitting.outcome.quality.finite and 10 < sitting.outcome.quality.decibels < 60


def test_kin_share_one_solve(monkeypatch):
    model, inputs = tiny("llama")
    seen, sitting = sit(model, [lambda m: m(**inputs)], monkeypatch)
    assert len(seen) == 8 and len(sitting.outcome.solved) == 14  # q k v, o, gate up, down of two layers
    assert seen[0][0].shape == (64 + 32 + 32, 64)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_memory_changes_nothing(name):
    """One byte recomputes from narrow cuts, much carries everything."""
    model, inputs = tiny(name)
    units = units_of(model, compiled(model), [lambda m: m(**inputs), lambda m: m(**{k: v.flip(0) for k, v in inputs.items()})])
    little, a = solved(units, 1)
    much, b = solved(units, 1 << 40)
    assert equal(a, b)
    assert little.quality.noise == much.quality.noise > 0
    assert [line.decibels for line in little.solved] == [line.decibels for line in much.solved]


def test_little_memory_computes_more(monkeypatch):
    """The two ways are two: with little memory wide values are not carried."""
    model = Stack(3)
    fast = compiled(model)
    units = units_of(model, fast, [once(rows(20, 32))])
    ran = []
    real = Unit.run
    monkeypatch.setattr(Unit, "run", lambda self, env, start, stop, product: (ran.append(stop - start), real(self, env, start, stop, product))[1])
    solved(units, 1 << 40)
    much = sum(ran)
    ran.clear()
    monkeypatch.setattr(replay, "NARROW", 0.0)
    solved(units, 1)
    assert sum(ran) > much


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_what_is_carried_over_the_budget_waits_on_the_host(name, monkeypatch):
    """A host that is elsewhere: what was moved is gone from where it was."""
    model, inputs = tiny(name)
    units = units_of(model, compiled(model), [lambda m: m(**inputs), lambda m: m(**{k: v.flip(0) for k, v in inputs.items()})])
    _, want = solved(units, 1 << 40)
    moved = []

    def to_host(value):
        moved.append(value.clone())
        value.fill_(0 if not value.is_floating_point() else torch.nan)
        return moved[-1]

    monkeypatch.setattr(replay, "_far", lambda value: True)
    monkeypatch.setattr(replay, "_to_host", to_host)
    _, got = solved(units, 1 << 40)
    assert not moved and equal(want, got)
    _, got = solved(units, 1)
    assert moved and equal(want, got)


def test_one_interpreter_for_a_unit(monkeypatch):
    """It is made from the whole graph: one for each site would take longer than the runs."""
    made = []
    real = fx.Interpreter.__init__
    monkeypatch.setattr(fx.Interpreter, "__init__", lambda self, *a, **k: (made.append(self), real(self, *a, **k))[1])
    units = units_of(model := Stack(6), compiled(model), [once(rows(20, 32))])
    solved(units, 1 << 40)
    assert len(made) == len(units) and all(not interpreter.env for interpreter in made)


def test_calls_of_other_shapes_add_up(monkeypatch):
    model, calls = Mlp(), [once(rows(*shape, 32, seed=i)) for i, shape in enumerate([(40,), (2, 30), (5, 4, 3)])]
    seen, sitting = sit(model, calls, monkeypatch, dynamic=False)
    assert len(sitting.units) == 3 and len(seen) == 3 and sitting.outcome.tokens == 160
    check_hessians(model, calls, seen)


def test_dynamic_shapes(monkeypatch):
    model, calls = Mlp(), [once(rows(n, 32, seed=n)) for n in (40, 30, 50)]
    seen, sitting = sit(model, calls, monkeypatch, dynamic=True)
    assert len(sitting.units) == 1 and len(sitting.units[0].calls) == 3
    check_hessians(model, calls, seen)


def test_automatic_dynamic_shapes(monkeypatch):
    model, calls = Mlp(), [once(rows(n, 32, seed=n)) for n in (40, 30, 50)]
    seen, sitting = sit(model, calls, monkeypatch)
    assert len(sitting.units) == 2
    check_hessians(model, calls, seen)


# --- graph breaks, regions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [[(40,)], [(40,), (30,)], [(40,), (2, 30), (50,)]])
def test_a_graph_break(monkeypatch, shapes):
    model, calls = Broken(), [once(rows(*shape, 32, seed=i)) for i, shape in enumerate(shapes)]
    seen, sitting = sit(model, calls, monkeypatch, dynamic=False)
    assert len(sitting.units) == 2 * len(shapes)
    check_hessians(model, calls, seen)


def test_a_graph_without_linears_between(monkeypatch):
    class Between(Mlp):
        def forward(self, x):
            h = self.a(x)
            torch._dynamo.graph_break()
            h = torch.relu(h)
            torch._dynamo.graph_break()
            return self.c(torch.tanh(self.b(h)))

    model, x = Between(), rows(50, 32)
    seen, sitting = sit(model, [once(x)], monkeypatch)
    assert len(sitting.units) == 3
    check_hessians(model, [once(x)], seen)
    again, sitting = sit(model, [once(rows(50, 32, seed=9))], monkeypatch, fast=sitting.fast)  # the graph between is still known in the second sitting
    check_hessians(model, [once(x), once(rows(50, 32, seed=9))], again)


def test_written_to_between_graphs(monkeypatch):
    """What Python does to a value after a graph returned it is not lost: the recorded value is read then."""

    class Written(Mlp):
        def forward(self, x):
            h = torch.relu(self.a(x))
            torch._dynamo.graph_break()
            h = outside(h)
            return self.c(torch.tanh(self.b(h)))

    @torch._dynamo.disable
    def outside(h):
        return h.mul_(5.0)

    model, x = Written(), rows(50, 32)
    seen, _ = sit(model, [once(x)], monkeypatch)
    with torch.no_grad():
        exact = torch.relu(model.a(x)).mul(5).double()
    h = seen[1][1]["hessian"]["sum"].double()
    assert float((h - exact.T @ exact).norm()) <= 1e-4 * float(h.norm())


def test_layers_compiled_one_by_one(monkeypatch):
    model, x = Stack(3), rows(60, 32)
    for layer in model.layers:
        layer.compile(backend="qcompile", options=GPTQ)
    with spied(monkeypatch) as seen, said(), calibrate(model, progress=False) as sitting:
        model(x)
    assert len(sitting.units) == 3 and len({name.split(".")[1] for name in solutions(model)}) == 3
    plain = Stack(3)
    plain.load_state_dict(model.state_dict())
    reference = expected(plain, [once(x)], solutions(model))
    for (_, h), (_, stats) in zip(reference, seen, strict=True):  # between layers Python adds: the recorded sum is read, layers are sequential within
        assert stats["hessian"]["count"] == 60 and stats["hessian"]["sum"].shape == h.shape
    with torch.no_grad(), graphs() as ran:
        y = model(x)
    assert len({id(g) for g, _ in ran}) == 1
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data.copy_(dequantize(solutions(model)[name].q, torch.float32))
    with torch.no_grad():
        assert close(y, plain(x), 1e-5)


# --- state ------------------------------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """A cache that is filled in place, a counter, and an activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 32)
        self.register_buffer("cache", torch.zeros(4, 48))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        h = self.a(x)
        h = nn.functional.leaky_relu(h, 0.5, inplace=True)
        self.cache[1:3] += h[:2]
        self.count.add_(1)
        second = h.chunk(2, -1)[1]
        second.mul_(3)
        return self.b(h + self.cache.sum(0) / self.count)


@pytest.mark.parametrize("memory", [1, 1 << 40])
def test_state_is_left_alone(memory, monkeypatch):
    """Replays work on copies; the model's buffers are those of its own calls, and a replay begins with what each call found."""
    model = Stateful()
    eager = copy.deepcopy(model)
    xs = [rows(30, 32, seed=i) for i in range(3)]
    fast = compiled(model)
    units = units_of(model, fast, [once(x) for x in xs])
    with torch.no_grad():
        outputs = [eager(x) for x in xs]
    assert torch.equal(model.cache, eager.cache) and int(model.count) == 3
    kept = model.cache.clone()
    with spied(monkeypatch) as seen:
        outcome, _ = solved(units, memory)
    assert torch.equal(model.cache, kept) and int(model.count) == 3
    check_state(model, seen, xs)
    exact = sum(float(y.double().square().sum()) for y in outputs)
    assert abs(outcome.quality.signal - exact) < 1e-4 * exact


def check_state(model, seen, xs):
    """Hessian of b by hand: the cache that each call found is that of the unquantized model."""
    weights = dequantize(solutions(model)["a"].q, torch.float32)
    total = torch.zeros(48, 48, dtype=torch.float64)
    with torch.no_grad():
        cache = torch.zeros(4, 48)
        for i, x in enumerate(xs):
            h = nn.functional.leaky_relu(nn.functional.linear(x, weights, model.a.bias), 0.5)
            mine = cache.clone()
            mine[1:3] += h[:2]
            h[:, 24:] *= 3
            h = (h + mine.sum(0) / (i + 1)).double()
            total += h.T @ h
            cache[1:3] += nn.functional.leaky_relu(model.a(x), 0.5)[:2]
    got = seen[1][1]["hessian"]["sum"].double()
    assert float((got - total).norm()) < 1e-4 * float(total.norm())


def test_a_static_cache(monkeypatch):
    """Prefill and decode of a tiny Llama with a static cache share one Hessian per site, and the cache is that of the model's own calls."""
    from transformers import StaticCache

    model, inputs = tiny("llama")
    ids = inputs["input_ids"]

    def run(m):
        cache = StaticCache(config=model.config, max_cache_len=16)
        m(input_ids=ids, past_key_values=cache, use_cache=True)
        for i in range(3):
            m(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        return cache

    with torch.no_grad():
        want = run(model)
    fast = compiled(model)
    caches = []
    seen, sitting = sit(model, [lambda m: caches.append(run(m))], monkeypatch, fast=fast)
    for a, b in zip(want.layers, caches[0].layers):
        assert close(b.keys, a.keys) and close(b.values, a.values)
    assert sum(len(u.calls) for u in sitting.units) == 4
    assert len(seen) == 8 and all(float(stats["hessian"]["count"]) == 20 + 3 * 2 for _, stats in seen)
    assert sitting.outcome.quality.finite and sitting.outcome.quality.decibels > 10


# --- autocast, sharing ------------------------------------------------------------------------------------------------------


def test_autocast_is_recorded(monkeypatch):
    """The replay runs under the autocast of the calls: what sites see is bfloat16."""
    model, x = Mlp(), rows(60, 32)

    def call(m):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    seen, sitting = sit(model, [call], monkeypatch)
    assert sitting.units[0].autocast == ("cpu", torch.bfloat16)
    low = x.bfloat16().double()
    assert close(seen[0][1]["hessian"]["sum"].double(), low.T @ low, 1e-5)
    check_hessians_roughly(model, call, seen)
    with torch.no_grad():
        assert call(sitting.fast).dtype == torch.bfloat16 and close(call(sitting.fast).float(), call(model).float(), 0.2)


def check_hessians_roughly(model, call, seen):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.a.weight.copy_(dequantize(solutions(model)["a"].q, torch.float32))
        found = []
        hook = twin.b.register_forward_pre_hook(lambda _, args: found.append(args[0].double()))
        call(twin)
        hook.remove()
    assert close(seen[1][1]["hessian"]["sum"].double(), found[0].T @ found[0], 1e-2)


def test_autocast_of_the_first_call():
    """Without a sitting the first call calibrates under its own autocast."""
    model, x = Mlp(), rows(60, 32)
    fast = compiled(model)
    with said(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = fast(x)
        assert y.dtype == torch.bfloat16 and close(y.float(), model(x).float(), 0.2)


def test_one_weight_in_two_places(monkeypatch):
    """Each use of a weight has its own solution."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.a(torch.tanh(self.b(torch.relu(self.a(x)))))

    model, x = Twice(), rows(50, 32)
    seen, sitting = sit(model, [once(x)], monkeypatch)
    assert len(seen) == 3 and len(sitting.outcome.solved) == 3
    found = TABLE.get(model.a.weight).solutions
    assert {key[1] for key in found} == {"", "@2"}
    with torch.no_grad():
        fast_y = sitting.fast(x)
        first, second = (dequantize(found[key].q, torch.float32) for key in sorted(found, key=lambda k: k[1]))
        middle = dequantize(solutions(nn.ModuleList([model.b]))["0"].q, torch.float32)
        linear = nn.functional.linear
        y = linear(torch.tanh(linear(torch.relu(linear(x, first, model.a.bias)), middle, model.b.bias)), second, model.a.bias)
    assert close(fast_y, y)


def test_stages_follow_the_calls():
    model = Broken()
    units = units_of(model, compiled(model, dynamic=False), [once(rows(4, 32)), once(rows(2, 3, 32))])
    order = list(stages(units))
    assert [[group.names for _, group in stage] for stage in order] == [[("a",)] * 2, [("b",)] * 2, [("c",)] * 2]
    assert [[units.index(unit) for unit, _ in stage] for stage in order] == [[0, 2], [1, 3], [1, 3]]


def test_what_a_run_computed_is_forgotten():
    model = Broken()
    units = units_of(model, compiled(model), [once(rows(40, 32))])
    solved(units, 1 << 30)
    for unit in units:
        assert unit.cut == len(unit.placeholders) and all(not c.env and c.outputs is None for c in unit.calls)


def test_an_error_in_a_run_leaves_the_units_usable(monkeypatch):
    model = Mlp()
    units = units_of(model, compiled(model), [once(rows(40, 32))])
    _, good = solved(units, 1 << 30)
    count = []

    def fail(*_):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        Run(units, 1 << 30, lambda: None, fail).run(again=True)
    _, again = solved(units, 1 << 30)
    assert equal(good, again)


# --- experts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_experts_one_by_one(monkeypatch, form):
    """Each expert is solved on its own rows."""
    model, _ = tiny("mixtral", experts_implementation=form)
    ids = torch.randint(3, 128, (8, 20), generator=torch.Generator().manual_seed(3))
    with spied(monkeypatch) as seen, said(), calibrate(fast := compiled(model), progress=False) as sitting:
        fast(input_ids=ids)
    weights = model.model.layers[0].mlp.experts.gate_up_proj
    mine = {e: stats for w, stats in seen for e in range(4) if torch.equal(w, weights[e])}
    assert mine
    want = routed(model, sitting, ids)
    for e, stats in mine.items():
        h = want[e].double().T @ want[e].double()
        assert int(stats["hessian"]["count"]) == len(want[e])
        assert close(stats["hessian"]["sum"].double(), h, 1e-3)
    silent = [e for e in range(4) if e not in mine]
    notes = [note for line in sitting.outcome.solved for note in line.notes if "layers.0.mlp.experts.gate_up" in line.name]
    assert [e for e in range(4) if any(f"expert {e} saw no token" in n for n in notes)] == silent


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("passes", [[], ["gptq"]])
def test_experts_are_measured(form, passes):
    """The gate sees them."""
    model, inputs = tiny("mixtral", experts_implementation=form)
    with said(), calibrate(fast := compiled(model, passes=passes), progress=False) as sitting:
        fast(**inputs)
    found = {line.name: line.decibels for line in sitting.outcome.solved}
    assert len([name for name in found if "experts" in name]) == 4
    assert all(db is not None and 5 < db < 40 for db in found.values())


@torch.no_grad()
def routed(model, sitting, ids):
    """Rows of each expert of layer 0, with q, k, v and o rounded as they were."""
    twin = copy.deepcopy(model)
    for name, s in solutions(model).items():
        if name.startswith("model.layers.0.self_attn"):
            twin.get_submodule(name).weight.copy_(dequantize(s.q, torch.float32))
    found = []
    hook = twin.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: found.append(args))
    twin(input_ids=ids)
    hook.remove()
    x, index = found[0][0], found[0][1]
    return [x[(index == e).any(-1)] for e in range(4)]


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_an_expert_that_saw_nothing(form):
    model, inputs = tiny("mixtral", experts_implementation=form)
    fast = compiled(model)
    with said() as texts, calibrate(fast, progress=False) as sitting:
        fast(input_ids=inputs["input_ids"][:1, :2])
    lines = {line.name: line.notes for line in sitting.outcome.solved if "experts" in line.name}
    assert any("saw no token: rounded to nearest" in n for notes in lines.values() for n in notes)
    assert any("saw no token" in t and "experts" in t for t in texts)
    few = {name: [n for n in notes if "fewer tokens" in n] for name, notes in lines.items()}
    assert all(len(notes) == 1 and re.match(r"[234] of 4 experts saw fewer tokens than the (64|48) input channels, one as few as [12]:", notes[0]) for notes in few.values())
    with torch.no_grad():
        out = fast(input_ids=inputs["input_ids"]).logits
    assert torch.isfinite(out).all() and close(out, model(input_ids=inputs["input_ids"]).logits, 0.5)


# --- the compiled graph computes what the replay did -----------------------------------------------------------------------


RECIPES = [
    {"weight": "int4.g16", "passes": ["gptq"]},
    {"weight": "int4.g16", "passes": ["awq", "gptq"]},
    {"recipe": "W8A8", "passes": ["smooth"]},
    {"recipe": "W8A8_STATIC", "passes": ["smooth(alpha=0.7)", "range(rule='mse')"]},
    {"recipe": "W8A8", "passes": ["outliers(columns=4)"]},
    {"recipe": "W8A8", "passes": ["smooth", "outliers(columns=4)", "gptq", "bias"]},
    {"weight": "int4.g16", "passes": ["bias"]},
    {"recipe": "W8A8", "passes": ["outliers(dynamic=4, threshold=1.0)"]},
]


@pytest.mark.parametrize("options", RECIPES, ids=lambda o: "+".join([o.get("recipe", "w"), *o["passes"]]))
def test_compiled_equals_replayed(options):
    model, inputs = tiny("llama", **one_layer("llama") if len(options["passes"]) == 1 else {})
    agrees(model, inputs, {**options, "lower": "eager"})


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "mixtral", "t5", "vit"])
def test_compiled_equals_replayed_elsewhere(name):
    model, inputs = tiny(name, **one_layer(name))
    agrees(model, inputs, {**RECIPES[1 if name == "mixtral" else 5], "lower": "eager"})  # a code that moves may send a token to another expert


@pytest.mark.parametrize("options", [RECIPES[3], RECIPES[5]], ids=["static", "all"])
def test_inductor_equals_replayed(options):
    model, inputs = tiny("llama", **one_layer("llama"))
    agrees(model, inputs, options)


def agrees(model, inputs, options):
    """Outputs after calibrating equal those of the sequence's last forward."""
    kept = []
    with pytest.MonkeyPatch.context() as patch, said():
        real = sequence.finish
        patch.setattr(sequence, "finish", lambda unit, product, see: real(unit, product, lambda call, out: (kept.append([t.clone() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]), see(call, out))))
        fast = torch.compile(model, backend="qcompile", options=options)
        with calibrate(fast, progress=False) as sitting:
            exact = fast(**inputs)
        with torch.no_grad(), graphs() as ran:
            out = fast(**inputs)
    assert len(ran) == 1 and len(kept) == 1 and sitting.outcome.quality.finite
    assert all(isinstance(c, Choice) for c in [ran[0][0].plan[line.name] for line in sitting.outcome.solved if line.name in ran[0][0].plan])
    wanted, exact = (out.logits, exact.logits) if hasattr(out, "logits") else (out[0], exact[0])
    replayed = next(t for t in kept[0] if t.shape == wanted.shape)
    if "int8" not in str(ran[0][0].options.recipe.input):
        assert close(wanted, replayed, 1e-4)
    assert float((wanted - exact).norm()) > 8 * float((wanted - replayed).norm())  # a last bit in front of the rounding of an activation moves a code, now and then


# --- quality ----------------------------------------------------------------------------------------------------------------


def test_quality_in_numbers():
    quality = Quality()
    exact, noise = rows(50, 16), rows(50, 16, seed=1) * 0.1
    quality.see(exact, exact + noise, logits=False)
    want = 10 * torch.log10(exact.square().sum() / noise.square().sum())
    assert abs(quality.decibels - float(want)) < 1e-3 and quality.kl is None
    quality.see(exact, exact + noise, logits=True)
    p, q = exact.log_softmax(-1), (exact + noise).log_softmax(-1)
    assert abs(quality.kl - float((p.exp() * (p - q)).sum(-1).mean())) < 1e-6
    quality.see(exact, exact * float("nan"), logits=False)
    assert not quality.finite and quality.decibels is None


def test_recorded_units_are_dropped_with_the_model():
    import gc

    model = Mlp()
    units = units_of(model, compiled(model), [once(rows(40, 32))])
    assert units[0] in KEPT and units[0].calls
    torch._dynamo.reset()
    del model
    gc.collect()
    assert not units[0].alive and not units[0].calls


def test_solutions_are_where_graphs_look(monkeypatch):
    """Same model, same data, another process order: codes equal from run to run."""
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        torch._dynamo.reset()
        model = Mlp()
        sit(model, [once(rows(64, 32))], monkeypatch)
        found.append(model)
    assert same_codes(*found)
