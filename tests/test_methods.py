"""Every method on the shapes of seven architectures: what it promises holds site by site, in float32 and bfloat16. Each model is captured once, and its graph solved again and again."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from small import close, said
from tiny_models import one_layer, tiny

from qcompile import sequence
from qcompile.backend import CompiledGraph
from qcompile.capture import capture
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import Choice
from qcompile.fill import tensors_of
from qcompile.options import Options
from qcompile.passes import PASSES, SOLVERS
from qcompile.passes.infra import run
from qcompile.passes.method import output_error, second_moment
from qcompile.passes.sites import view
from qcompile.replay import Unit
from qcompile.sequence import Run, solution_key
from qcompile.weights import TABLE

pytestmark = pytest.mark.xdist_group("methods")  # a worker keeps what its cases gave

NAMES = ("llama", "opt", "gpt2", "bert", "t5", "mixtral", "vit")
DTYPES = (torch.float32, torch.bfloat16)


def models(*steps):
    """Each step on every architecture in both dtypes."""
    found = [(step, name, dtype) for step in steps for name in NAMES for dtype in DTYPES]
    return pytest.mark.parametrize(("step", "name", "dtype"), [pytest.param(*row, id=f"{row[0]}-{row[1]}-{str(row[2])[6:]}") for row in found])


@functools.cache
def captured(name, dtype):
    """(model, Dynamo's graph, its arguments) of one layer on some hundred tokens."""
    model, inputs = tiny(name, dtype, **one_layer(name))
    g = torch.Generator().manual_seed(0)
    tensors = {key: t for key, t in inputs.items() if isinstance(t, torch.Tensor) and "mask" not in key}
    many = {key: torch.randn(24, *t.shape[1:], generator=g).to(t.dtype) if t.is_floating_point() else torch.randint(3, 120, (24, 16), generator=g) for key, t in tensors.items()}
    many |= {key: value for key, value in inputs.items() if not isinstance(value, torch.Tensor)}
    found = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=lambda gm, args: found.append((gm, list(args))) or gm, fullgraph=True, dynamic=False)(**many)
    return model, *found[0]


@pytest.fixture(scope="module", autouse=True)
def let_go():
    """Models do not outlive this file."""
    yield
    captured.cache_clear()
    rounded_to_nearest.cache_clear()


def unit_of(gm, args, **options):
    """The graph under a recipe, with one call."""
    unit = Unit(run([PASSES[step] for step in ("normalize", "find_sites", "match")], capture(gm, args), Options.parse(options)), args)
    unit.record(args)
    return unit


def solved(name, dtype, *passes, weight="int4.g32"):
    """Site -> SQNR of its output in dB, once all are solved in order; None for stacked experts."""
    _, gm, args = captured(name, dtype)
    unit = unit_of(gm, args, weight=weight, passes=list(passes))
    with said(), torch.no_grad():
        outcome = Run([unit], 1 << 30, lambda: None, lambda line: None).run(again=True)
    return {line.name: line.decibels for line in outcome.solved}


@functools.cache
def rounded_to_nearest(name, dtype):
    """What every step is compared with."""
    return solved(name, dtype)


def mean(decibels):
    known = [db for db in decibels.values() if db is not None]
    return sum(known) / len(known)


def compiled(name, dtype, **options):
    """(the graph as the backend builds it, its outputs)."""
    _, gm, args = captured(name, dtype)
    with said(), torch.no_grad():
        graph = CompiledGraph(gm, args, Options.parse({"lower": "eager", **options}))
        return graph, [t for t in graph(*args) if isinstance(t, torch.Tensor)]


@models("gptq", "sequential_mse", "adaround(iterations=50)")
def test_no_solver_is_worse_than_rounding_to_nearest(step, name, dtype, monkeypatch):
    """At no site, in SQNR of its output; on one and the same input at no expert, either."""
    solver = SOLVERS[step.partition("(")[0]]

    @functools.wraps(solver.fn)
    def compare(weight, scheme, stats, **given):
        q = solver.fn(weight, scheme, stats, **given)
        mine, nearest = (output_error(weight - dequantize(codes), second_moment(stats)) for codes in (q, quantize(weight, scheme)))
        assert mine <= nearest
        gains.append(nearest / mine)
        return q

    gains = []
    monkeypatch.setitem(SOLVERS, solver.name, replace(solver, fn=compare))
    nearest, mine = rounded_to_nearest(name, dtype), solved(name, dtype, step)
    assert mine.keys() == nearest.keys() and all(db is None or db >= nearest[site] for site, db in mine.items())
    assert mean(mine) > mean(nearest) + 0.5 and min(gains) > 1.01 and len(gains) >= 4


@models("lloyd_max")
def test_codebooks_follow_the_inputs(step, name, dtype, monkeypatch):
    """What the fit minimizes, errors times the second moment of their columns, is less than without data; and values of a weight's own lose less than a grid's."""

    def compare(weight, scheme, stats, **given):
        q, seen = fit.fn(weight, scheme, stats, **given), stats["moments"]
        mine, plain = (float(((weight - dequantize(codes)).square() * seen["square"]).sum()) for codes in (q, quantize(weight, scheme)))
        gains.append(plain / mine)
        return q

    fit, gains = SOLVERS[step], []
    monkeypatch.setitem(SOLVERS, step, replace(fit, fn=functools.wraps(fit.fn)(compare)))
    mine, nearest = solved(name, dtype, step, weight="lut4.g32"), rounded_to_nearest(name, dtype)
    assert len(gains) >= 4 and min(gains) > 0.99 and sum(gains) > len(gains)
    assert mine.keys() == nearest.keys() and mean(mine) > mean(nearest)


@models("awq")
def test_awq_is_better_than_rounding_to_nearest(step, name, dtype):
    """On average over the sites: one with small weights for its large channels may lose a little to its kin."""
    nearest, mine = rounded_to_nearest(name, dtype), solved(name, dtype, step)
    assert mean(mine) >= mean(nearest) and all(db is None or db > nearest[site] - 0.3 for site, db in mine.items())


@models("outliers(threshold=1e9)")
def test_a_threshold_that_nothing_reaches_changes_no_bit(step, name, dtype):
    plain, split = (compiled(name, dtype, recipe="W8A8", passes=passes) for passes in ([], [step]))
    assert len(plain[1]) == len(split[1]) > 0 and all(torch.equal(a, b) for a, b in zip(plain[1], split[1]))
    assert all(c.outliers == 0 for c in split[0].plan.values() if isinstance(c, Choice))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", ["smooth", "awq"])
@torch.no_grad()
def test_smoothing_changes_nothing_before_it_is_rounded(name, step):
    """The graph with its vectors in their places, run on weights that are multiplied by them: what the model computes, within float32."""
    _, gm, args = captured(name, torch.float32)
    graph, _ = compiled(name, torch.float32, recipe="W8A8", passes=[step])
    given, smoothed = list(args), 0  # a search may choose a vector of ones
    for site, choice in ((graph.sites[n], c) for n, c in graph.plan.items() if isinstance(c, Choice)):
        p = args[site.param.index]
        s = TABLE.record(p, site.path).solutions[solution_key(site, choice)].smooth
        given[site.param.index] = twin = p.detach().clone()
        view(twin, site.view).mul_(s)
        smoothed += int(not torch.equal(s, torch.ones_like(s)))
    slots = [n.meta["packed"] for n in graph.planned.graph.find_nodes(op="placeholder") if "packed" in n.meta]
    given += [t for slot in dict.fromkeys(slots) for t in tensors_of(slot, args[slot.arg])]
    assert smoothed >= 4 and {slot.what for slot in slots} == {"smooth"}
    for exact, y in zip(gm(*args), graph.planned(*given)):
        if isinstance(exact, torch.Tensor) and exact.is_floating_point():
            assert close(y, exact, 2e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixtral"])  # its grouped product takes no float64
@torch.no_grad()
def test_a_split_keeps_the_function(name, monkeypatch):
    """In float64, with weights that int8 holds exactly: outlier columns apart from the others, through the whole model."""
    _, gm, args = captured.__wrapped__(name, torch.float64)  # of its own: its weights are changed
    unit = unit_of(gm, args, weight="int8.row", passes=["outliers(columns=4)"])
    for site in (unit.sites[n] for group in unit.groups for n in group.names):
        w = view(args[site.param.index].detach(), site.view)
        step = (w.abs().amax(-1, keepdim=True) / 127).log2().ceil().exp2()
        w.copy_((w / step).round() * step)
        w[:, 5:15] = 127 * step  # more than there are outlier columns: the greatest code stays in every row
    exact, kept = gm(*args), []
    real = sequence.finish
    monkeypatch.setattr(sequence, "finish", lambda unit, product, see: real(unit, product, lambda call, out: kept.append(out)))
    with said():
        outcome = Run([unit], 1 << 30, lambda: None, lambda line: None).run(again=True)
    assert all("4 outlier columns" in line.choice for line in outcome.solved) and len(outcome.solved) > 3
    floats = [(a, b) for a, b in zip(exact, kept[0]) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    assert floats and all(close(b, a, 1e-12) for a, b in floats)
