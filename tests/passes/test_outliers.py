"""LLM.int8()'s split, static and dynamic, against the paper's definition computed plainly."""

from __future__ import annotations

import pytest
import torch
from small import close, graphs, said
from tiny_models import tiny
from torch import nn

from qcompile import explain
from qcompile.calibrate import calibrate
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import RECIPES, Choice, Method
from qcompile.core.scheme import Scheme
from qcompile.kernels.op import target
from qcompile.passes import outliers
from qcompile.weights import TABLE

K = 48
LLM = {"recipe": "LLM_INT8", "lower": "eager"}


def compiled(model, **options):
    return torch.compile(model, backend="qcompile", fullgraph=True, options=LLM | options)


def data(*shape, columns=(), by=30.0, seed=0):
    x = torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)
    x[..., list(columns)] *= by
    return x


def one(bias=True, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Linear(K, 32, bias=bias, dtype=dtype)


@torch.no_grad()
def paper(linear, x, columns, codes=False):
    """Section 3.2: the columns in full precision, the others in int8, row by row; ``codes``: with the weight of the columns read off its codes, as in bitsandbytes."""
    w = dequantize(quantize(linear.weight.detach(), Scheme.parse("int8.row")), torch.float32)
    rest = x.float().clone()
    rest[..., columns] = 0
    scale = rest.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (rest / scale.clamp(min=1e-30)).round(), 0.0)
    kept = w if codes else linear.weight.float()
    y = (rounded * scale) @ w.T + x.float()[..., columns] @ kept[:, columns].T
    return y if linear.bias is None else y + linear.bias.float()


def missed(linear):
    (tensors,) = [t for (what, _), t in TABLE.get(linear.weight).given.items() if what == "missed"]
    return int(tensors[0])


@pytest.mark.parametrize("weights", ["kept", "codes"])
@pytest.mark.parametrize("columns", [(), (5,), (0, 7, 47)], ids=str)
@pytest.mark.parametrize("shape", [(9,), (2, 5), (1,), (2, 3, 4)], ids=str)
def test_dynamic_is_the_papers_rule(columns, shape, weights):
    linear, x = one(), data(*shape, columns=columns)
    found = (x.abs().reshape(-1, K).amax(0) >= 6).nonzero().flatten().tolist()
    with torch.no_grad():
        y = compiled(linear, passes=[f"outliers(dynamic=8, weights={weights!r})"])(x)
        assert close(y, paper(linear, x, found, weights == "codes"), 1e-5)
        if found:
            plain = compiled(linear, passes=[])(x)
            assert float((y - linear(x)).norm()) < 0.5 * float((plain - linear(x)).norm())
    assert missed(linear) == 0


def test_columns_change_from_call_to_call():
    linear = one()
    fast = compiled(linear)
    with torch.no_grad(), graphs() as seen:
        for columns in ((1,), (2, 40), (), (46, 47, 0)):
            x = data(6, columns=columns, seed=len(columns))
            found = (x.abs().amax(0) >= 6).nonzero().flatten().tolist()
            assert close(fast(x), paper(linear, x, found), 1e-5)
    assert len({id(g) for g, _ in seen}) == 1


def test_what_does_not_fit_is_counted():
    """More outliers than columns: the largest are kept, and the call is counted."""
    linear, fast = one(), None
    x = data(9)
    x[:, :5] = torch.tensor([50.0, 40, 30, 20, 10]) * torch.sign(x[:, :5])
    fast = compiled(linear, passes=["outliers(dynamic=3)"])
    with torch.no_grad():
        assert close(fast(x), paper(linear, x, [0, 1, 2]), 1e-5) and missed(linear) == 1
        fast(x)
        assert missed(linear) == 2
        fast(data(9))
        assert missed(linear) == 2


def test_exactly_as_many_as_fit():
    linear, x = one(), data(9, columns=(1, 2, 3))
    with torch.no_grad():
        found = (x.abs().amax(0) >= 6).nonzero().flatten().tolist()
        assert len(found) == 3 and close(compiled(linear, passes=["outliers(dynamic=3)"])(x), paper(linear, x, found), 1e-5)
    assert missed(linear) == 0


@pytest.mark.parametrize("columns", [K, K + 5, 1000])
def test_more_columns_than_there_are(columns):
    linear, x = one(), data(9, by=30, columns=range(K))
    with torch.no_grad():
        y = compiled(linear, passes=[f"outliers(dynamic={columns})"])(x)
        assert close(y, paper(linear, x, list(range(K))), 1e-5)
    assert missed(linear) == 0


@pytest.mark.parametrize("threshold", [0.5, 2.0, 100.0])
def test_the_threshold(threshold):
    linear, x = one(), data(9)
    found = (x.abs().amax(0) >= threshold).nonzero().flatten().tolist()
    with torch.no_grad():
        assert close(compiled(linear, passes=[f"outliers(dynamic={K}, threshold={threshold})"])(x), paper(linear, x, found), 1e-5)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows(shape):
    linear = one()
    with torch.no_grad():
        for passes in (["outliers(dynamic=4)"],):
            assert compiled(linear, passes=passes)(torch.randn(*shape, K)).shape == (*shape, 32)


def test_rows_come_and_go():
    """An empty batch between others of a dynamic size."""
    linear = one()
    fast = torch.compile(linear, backend="qcompile", dynamic=True, options=LLM)
    with torch.no_grad():
        for n in (5, 0, 9, 1):
            x = data(n, columns=(2,))
            assert close(fast(x), paper(linear, x, [2] if n else []), 1e-5)


def test_bfloat16():
    linear, x = one(dtype=torch.bfloat16), data(9, columns=(4,)).bfloat16()
    with torch.no_grad():
        y = compiled(linear)(x)
        assert y.dtype == torch.bfloat16 and close(y.float(), paper(linear, x, [4]), 0.01)


@pytest.mark.parametrize("passes", [["outliers(dynamic=4)"], ["outliers(columns=3)"]])
def test_inductor_computes_the_same(passes):
    linear, x = one(), data(9, columns=(4, 9))
    found = []
    for lower in ("eager", "inductor"):
        torch._dynamo.reset()
        fast = compiled(linear, passes=passes, lower=lower)
        if "columns" in passes[0]:
            with calibrate(fast, progress=False):
                fast(x)
        with torch.no_grad():
            found.append([fast(x), fast(data(9, seed=4))])
    for a, b in zip(*found):
        assert close(a, b, 1e-5)


def test_inductor_counts():
    linear, x = one(), data(9, columns=(4, 9, 11))
    fast = compiled(linear, passes=["outliers(dynamic=2)"], lower="inductor")
    with torch.no_grad():
        for n in (1, 2, 3):
            fast(x)
            assert missed(linear) == n


# --- static ------------------------------------------------------------------------------------------------------------------


def sit(model, x, **options):
    fast = compiled(model, **options)
    with said(), calibrate(fast, progress=False) as sitting:
        fast(x)
    return fast, sitting


@pytest.mark.parametrize("columns", [(), (5,), (0, 7, 47)], ids=str)
def test_static_keeps_the_columns_in_16_bits(columns):
    linear, x = one(), data(9, columns=columns)
    fast, sitting = sit(linear, x, recipe="LLM_INT8_STATIC")
    found = (x.abs().amax(0) >= 6).nonzero().flatten().tolist()
    with torch.no_grad():
        y = fast(x)
        rest = linear.weight.clone()
        rest[:, found] = 0
        w = dequantize(quantize(rest, Scheme.parse("int8.row")), torch.float32)
        z = x.clone()
        z[:, found] = 0
        scale = z.abs().amax(-1, keepdim=True) / 127
        want = ((z / scale).round() * scale) @ w.T + x[:, found] @ linear.weight[:, found].T + linear.bias
        assert close(y, want, 1e-5)
    assert (f"{len(found)} outlier columns" in sitting.outcome.solved[0].choice) == bool(found)


@pytest.mark.parametrize("name", ["INT8_ABSMAX", "INT8_ZEROPOINT", "INT8_ROWWISE"])
def test_baselines_with_and_without_decomposition(name):
    """Each plain baseline of the paper has a twin that keeps outlier columns, and is better where there are any."""
    model, x = nn.Sequential(one()), data(64, columns=(5, 7))
    errors = []
    for recipe in (name, name + "_DECOMPOSED"):
        fast = torch.compile(model, backend="qcompile", options={"recipe": recipe, "lower": "eager"})
        with said(), calibrate(fast, progress=False), torch.no_grad():
            fast(x)
        with torch.no_grad():
            errors.append(float((fast(x) - model(x)).norm() / model(x).norm()))
    assert RECIPES[name + "_DECOMPOSED"].weight == RECIPES[name].weight and RECIPES[name + "_DECOMPOSED"].input == RECIPES[name].input
    assert errors[1] < 0.5 * errors[0], errors


def test_no_outliers_no_split():
    """Bit for bit the recipe without the step, and the same graph."""
    linear, x = one(), data(9)
    fast, _ = sit(linear, x, recipe="LLM_INT8_STATIC")
    with torch.no_grad():
        with graphs() as seen:
            y = fast(x)
        plain = torch.compile(linear, backend="qcompile", options={"recipe": "W8A8", "lower": "eager"})
        torch._dynamo.reset()
        assert torch.equal(y, plain(x))
    assert [slot.what for slot in seen[0][0].slots] == ["weight"]


@pytest.mark.parametrize("step", ["outliers(threshold=6.0)", "outliers(columns=2)"])
def test_the_split_is_of_x_as_the_steps_before_left_it(step):
    """Behind ``smooth`` the threshold is that of x / s; before it that of x."""
    x = data(200, columns=(5, 7, 9), by=10.0)
    x[:, 5] *= 0.5
    found = []
    for passes in ([step, "smooth(alpha=0.4)"], ["smooth(alpha=0.4)", step]):
        model = nn.Sequential(one())
        with torch.no_grad():
            model[0].weight[:, 5] *= 100
        fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "passes": passes, "lower": "eager"})
        with said(), calibrate(fast, progress=False):
            fast(x)
        (solution,) = TABLE.get(model[0].weight).solutions.values()
        found.append(solution)
        with torch.no_grad():
            assert close(fast(x), model(x), 0.02)
    peaks = [x.abs().amax(0), x.abs().amax(0) / found[1].smooth]
    want = [peak.topk(2).indices.sort().values if "columns" in step else (peak >= 6).nonzero().flatten() for peak in peaks]
    assert torch.equal(found[0].outliers, want[0]) and torch.equal(found[1].outliers, want[1]) and not torch.equal(*want)


def test_a_budget_of_columns():
    linear, x = one(), data(9, columns=(3, 30))
    sit(linear, x, recipe="LLM_INT8_STATIC", passes=["outliers(columns=2)"])
    (s,) = TABLE.get(linear.weight).solutions.values()
    assert s.outliers.tolist() == [3, 30]


def test_columns_of_statistics():
    stats = {"absmax": {"absmax": torch.tensor([1.0, 6.0, 5.999, 70.0])}}
    assert outliers.columns(stats).tolist() == [1, 3]
    assert outliers.columns(stats, threshold=1).tolist() == [0, 1, 2, 3] and outliers.columns(stats, threshold=99).numel() == 0
    assert outliers.columns(stats, columns=3).tolist() == [1, 2, 3] and outliers.columns(stats, columns=9).tolist() == [0, 1, 2, 3]


def test_dynamic_settings():
    def choice(*methods):
        return Choice(Scheme.parse("int8.row"), None, "", tuple(map(Method.parse, methods)))

    assert outliers.dynamic(choice("smooth", "outliers(dynamic=8)")) == outliers.Dynamic(8, 6.0)
    assert outliers.dynamic(choice("outliers(dynamic=8, threshold=2)")) == outliers.Dynamic(8, 2.0)
    assert outliers.dynamic(choice("outliers(threshold=2)")) is None and outliers.dynamic(choice()) is None


# --- in models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [["outliers(dynamic=4, threshold=1.0)"], ["outliers(columns=4)"]], ids=["dynamic", "static"])
def test_kin_share_one_split(passes):
    model, inputs = tiny("llama")
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "passes": passes, "lower": "eager"})
    with said(), calibrate(fast, progress=False):
        fast(**inputs)
    with torch.no_grad(), graphs() as seen:
        assert close(fast(**inputs).logits, model(**inputs).logits, 0.1)
    graph = seen[0][0].lowered.graph
    products = [n for n in graph.nodes if n.target is target("split_linear")]
    assert len(products) == 14 and len({n.args[0] for n in products}) == len({n.args[5] for n in products}) == 8  # q k v, o, gate up, down of two layers
    assert sum(slot.what in ("missed", "outliers") for slot in seen[0][0].slots) == 8


def test_a_kin_with_another_rule_has_no_split():
    from qcompile.core.recipe import Recipe, Rule

    class Kin(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = one(), one()

        def forward(self, x):
            return self.a(x), self.b(x)

    model, x = Kin(), data(9, columns=(3,))
    recipe = Recipe("mine", "int8.row", "int8.row", rules=(Rule("b", "int8.row"),), passes=("outliers(dynamic=4)",))
    fast = compiled(model, recipe=recipe)
    with torch.no_grad(), graphs() as seen:
        y, z = fast(x)
        w = dequantize(quantize(model.b.weight, Scheme.parse("int8.row")), torch.float32)
        assert close(y, paper(model.a, x, [3]), 1e-5)
        assert close(z, nn.functional.linear(x, w, model.b.bias), 5e-3)
    assert seen[0][0].plan["b"].input is None


@pytest.mark.parametrize("data", [True, False], ids=["calibrated", "compiled"])
@pytest.mark.parametrize("step", ["outliers(columns=4)", "outliers(dynamic=4)", "bias"])
def test_what_stacked_experts_do_not_get_is_said(step, data):
    """Of each site by name, in a warning and in the report; also where nothing has to be calibrated."""
    model, inputs = tiny("mixtral", num_hidden_layers=1)
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "passes": [step], "lower": "eager"})
    with said() as texts, torch.no_grad():
        if data:
            with calibrate(fast, progress=False):
                fast(**inputs)
        assert close(fast(**inputs).logits, model(**inputs).logits, 0.1)
        report = explain(fast, **inputs)
    what = "get no correction" if step == "bias" else "are not split"
    (text,) = [t for t in texts if "stacked experts" in t]
    assert text.count(f"stacked experts {what}") == 2 and "experts.gate_up_proj: stacked" in text and "experts.down_proj: stacked" in text
    assert any("experts.gate_up_proj" in note and "experts.down_proj" in note and what in note for note in report.notes)
