"""The vectors of a smoothing go where they cost nothing, and the function stays what it was: in float64 to 1e-12, on every architecture."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from captured import MATCHED, captured, context
from small import close, graphs, said
from tiny_models import few_layers, tiny
from torch import nn

from qcompile.calibrate import calibrate
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import Choice
from qcompile.core.scheme import Scheme
from qcompile.passes import PASSES
from qcompile.passes.infra import run
from qcompile.passes.producers import place, shared
from qcompile.passes.sites import view
from qcompile.passes.slots import leader
from qcompile.sequence import use
from qcompile.weights import TABLE


def flat(out):
    return [t.detach() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def smoothed(gm, args, keep=lambda site: True):
    """(the graph after ``transform`` with all vectors in it, its arguments with the weights multiplied)."""
    steps = []
    gm = run([PASSES[name] for name in (*MATCHED, "observe")], gm, context(gm, args), steps)
    gm.meta["plan"] = {name: replace(c, smooth=True) if isinstance(c, Choice) and keep(gm.meta["sites"][name]) else c for name, c in gm.meta["plan"].items()}
    sites, groups, vectors = gm.meta["sites"], {}, {}
    for name, choice in gm.meta["plan"].items():
        if isinstance(choice, Choice) and choice.smooth:
            groups.setdefault(leader(gm, sites[name], choice)[0].name, []).append(name)
    args = list(args)
    for i, (first, names) in enumerate(groups.items()):
        v = torch.exp(torch.randn(sites[first].k, dtype=torch.float64, generator=torch.Generator().manual_seed(i)))
        vectors[first] = shared(v, place(gm, names))
        for name in names:
            index = sites[name].param.index
            args[index] = args[index].detach().clone()
            view(args[index], sites[name].view).mul_(vectors[first])
    done = run([PASSES["transform"]], gm, context(gm, args), steps)
    extra = [1 / vectors[n.meta["packed"].site] for n in done.graph.find_nodes(op="placeholder") if "packed" in n.meta]
    assert len(extra) == len(groups) > 0
    return done, [*args, *extra]


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "gpt2", "mixtral", "t5", "vit", "qwen3", "gpt_neox", "phi3", "falcon", "whisper"])
def test_the_function_stays(name):
    model, inputs = tiny(name, torch.float64, **few_layers(name))
    with torch.no_grad():
        gm, args = captured(lambda: model(**inputs))
        want = flat(gm(*args))
        graph, changed = smoothed(gm, args)
        got = flat(graph(*changed))
    assert len(want) == len(got) and all(close(a, b, 1e-12) for a, b in zip(got, want))
    with torch.no_grad():
        ones = [torch.ones_like(t) if i >= len(args) else t for i, t in enumerate(changed)]
        assert not close(flat(graph(*ones))[0], want[0], 1e-3)  # the vectors matter


def places(name, **options):
    model, inputs = tiny(name)
    inputs["use_cache"] = False
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "passes": ["smooth"], "lower": "eager"} | options)
    with said(), calibrate(fast, progress=False), torch.no_grad():
        fast(**inputs)
    with torch.no_grad(), graphs() as seen:
        fast(**inputs)
    seen[0][0].model = model  # whose parameters live as long as the graph that is looked at
    return seen[0][0]


def test_places_are_told():
    graph = places("llama")
    found = graph.planned.meta["places"]
    layer = {n.rpartition(".")[2]: where for n, where in found.items() if ".layers.1." in n}
    assert layer["q_proj"] == layer["k_proj"] == layer["v_proj"] and layer["q_proj"].startswith("norm: folded into the norm model.layers.1.input_layernorm")
    assert layer["gate_proj"] == layer["up_proj"] and layer["gate_proj"].startswith("norm: ")
    assert layer["o_proj"].startswith("rows: in the rows of model.layers.1.self_attn.v_proj") and layer["down_proj"].startswith("rows: in the rows of model.layers.1.mlp.up_proj")


def test_one_vector_for_all_kin():
    graph = places("llama")
    assert sum(slot.what == "smooth" for slot in graph.slots) == 8
    vectors = {}
    for name, site in graph.sites.items():
        choice = graph.plan[name]
        if isinstance(choice, Choice):
            record = next(r for r in TABLE._records.values() if r.path == site.path and (site.view, use(name), choice.key) in r.solutions)
            vectors[name] = record.solutions[site.view, use(name), choice.key].smooth
    q, k, v = (vectors[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv")
    assert torch.equal(q, k) and torch.equal(q, v)
    o = vectors["model.layers.0.self_attn.o_proj"].view(4, 16)  # two heads of k and v for four of q
    assert torch.equal(o[0], o[1]) and torch.equal(o[2], o[3]) and not torch.equal(o[0], o[2])


def test_nothing_to_place():
    with torch.no_grad():
        gm, args = captured(nn.Sequential(nn.Linear(32, 32)), torch.randn(3, 32))
        gm = run([PASSES[name] for name in (*MATCHED, "observe", "transform")], gm, context(gm, args))
    assert gm.meta["places"] == {}


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_weight_only_is_exact(lower):
    """With 16-bit activations the compiled model is the model with weights ``Q(w s) / s``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    x = torch.randn(50, 32)
    fast = torch.compile(model, backend="qcompile", options={"weight": "int4.g16", "passes": ["awq"], "lower": lower})
    with said(), calibrate(fast, progress=False):
        fast(x)
    with torch.no_grad():
        y = fast(x)
        for m in (model[1], model[3]):
            (s,) = TABLE.get(m.weight).solutions.values()
            m.weight.data = dequantize(quantize(s.prepared(m.weight.detach()), Scheme.parse("int4.g16"))) / s.smooth
        for m in model.modules():
            m._compiled_call_impl = None
        assert close(y, model(x), 1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_no_multiply_is_left_where_vectors_fold(name):
    """All that is multiplied by a vector are vectors and producers' outputs; none where x itself is read."""
    graph = places(name)
    kinds = {where.partition(":")[0] for where in graph.planned.meta["places"].values()}
    assert kinds <= {"norm", "rows", "multiply"} and "norm" in kinds
    kept = [n for n, where in graph.planned.meta["places"].items() if where.startswith("multiply")]
    assert all("kept as a multiply" in graph.planned.meta["places"][n] for n in kept)


def test_a_vector_found_with_a_cache_stays_right_without_one():
    """With a cache the value projection's rows are no place, so that o_proj's channels get a factor each; a call without one must not put these into rows that repeated heads share."""
    model, inputs = tiny("llama", num_attention_heads=4, num_key_value_heads=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = torch.compile(model, backend="qcompile", dynamic=False, options={"recipe": "W8A8_SMOOTHQUANT", "lower": "eager"})
        calibrate(fast, [{**inputs, "use_cache": True}], progress=False)
        for cache in (True, False):
            y, exact = fast(**inputs, use_cache=cache).logits, model(**inputs, use_cache=cache).logits
            assert float((y - exact).norm() / exact.norm()) < 0.03
