"""FP8 training end to end on the CPU, where products are emulated: gradients of a model, histories over steps, resuming, accumulation, checkpointing, autocast, two graphs of one model, and what goes wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from small import Net, Stack, close, graphs, said
from torch import nn
from torch.utils.checkpoint import checkpoint

import qcompile
from qcompile import train
from qcompile.core.errors import StrictError, WeightError
from qcompile.kernels.fp8_history import OVERFLOWS, POSITION, RING, SCALE
from qcompile.kernels.fp8_linear import SCALINGS
from qcompile.trained import STATE

DELAYED = "fp8(scaling='delayed', history=4)"
SPELLED = {"tensor": "fp8", "row": "fp8(scaling='row')", "delayed": DELAYED}


def compiled(model, how="tensor", lower="eager", **options):
    return torch.compile(model, backend="qcompile", options={"train": SPELLED.get(how, how), "lower": lower, **options}, fullgraph=True)


def steps(model, fast, count, start=0, rows=9, optimizer=None):
    """Losses of some steps on data that depends on the number of the step alone."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for i in range(start, start + count):
        x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(i))
        loss = (fast(x) - 2 * x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("how", SCALINGS)
def test_it_trains_as_in_float32(how):
    torch.manual_seed(1)
    model = Stack(2)
    twin = copy.deepcopy(model)
    with said():
        losses = steps(model, compiled(model, how), 16, rows=64)
    plain = steps(twin, twin, 16, rows=64)
    assert losses[-1] < 0.9 * losses[0] and all(abs(a - b) < 0.03 * b for a, b in zip(losses, plain))
    assert losses != plain


@pytest.mark.parametrize("how", SCALINGS)
def test_inductor_gives_the_gradients_of_the_references(how):
    found = []
    for lower in ("eager", "inductor"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net(40, 56)
        with said():
            fast = compiled(model, how, lower)
            for i in range(3):
                model.zero_grad()
                y = fast(torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(i)))
                y.square().sum().mul(1e-3).backward()
        found.append([y.detach(), *(p.grad for p in model.parameters()), *train.state_dict(fast).values()])
    assert len(found[0]) == (8 if how == "delayed" else 4)
    assert all(map(lambda a, b: close(a, b, 1e-5), *found))


def test_histories_are_those_of_plain_python():
    """Scales of the first call are its own; then those of the last four."""
    model = Net()
    with said():
        fast = compiled(model, "delayed")
        seen: dict[str, list[float]] = {"x": [], "w": [], "g": []}
        for i in range(7):
            x = torch.randn(5, 32, generator=torch.Generator().manual_seed(i)) * (i + 1)
            seen["x"].append(float(x.abs().max()))
            seen["w"].append(float(model.up.weight.abs().max()))
            y = fast(x)
            g = torch.randn(5, 32, generator=torch.Generator().manual_seed(50 + i)) / 100
            seen["g"].append(float(g.abs().max()))
            y.backward(g)
            with torch.no_grad():
                model.up.weight.mul_(1.1)
            forward = STATE.held(model.up, ("weight", "", "fp8_forward"))
            last = seen["x"][max(i - 4, 0) : i] or seen["x"][:1]
            if i < 4:
                last = [*last, seen["x"][0]]  # what made the first scale is in the ring, too
            assert float(forward[0, 0, SCALE]) == pytest.approx(448 / max(last), rel=1e-6)
            assert sorted(forward[0, 0, RING:].tolist(), reverse=True)[: min(i + 1, 4)] == pytest.approx(sorted(seen["x"][max(i - 3, 0) : i + 1], reverse=True)[:4], rel=1e-6)
            assert float(forward[0, 1, SCALE]) == pytest.approx(448 / max(seen["w"][max(i - 4, 0) : i] or seen["w"][:1]), rel=1e-6)
            backward = STATE.held(model.down, ("weight", "", "fp8_backward"))  # its gradient is g itself
            expected = 57344 / max(seen["g"][max(i - 4, 0) : i]) if i else 2.0**16
            assert float(backward[0, 0, SCALE]) == pytest.approx(expected, rel=1e-6)
            assert float(forward[0, 0, POSITION]) == float(backward[0, 0, POSITION]) == (i + 1) % 4


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_two_forwards_before_their_backwards(lower):
    """Each backward enters the place of its own forward, under the scales of that forward."""
    model = Net()
    with said():
        fast = compiled(model, "delayed", lower)
        a, b = fast(torch.randn(5, 32)), fast(torch.randn(5, 32) * 2)
        g = torch.randn(5, 32)
        a.backward(g / 8)
        b.backward(g / 4)
    state = STATE.held(model.down, ("weight", "", "fp8_backward"))
    top = float(g.abs().max())
    assert state[0, 0, RING:].tolist() == pytest.approx([0, top / 8, top / 4, 0], rel=1e-6)


@pytest.mark.parametrize("lower", ["eager"])
def test_resumed_training_is_bit_exact(lower):
    def start():
        torch.manual_seed(0)
        model = Stack(2)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    with said():
        model, optimizer = start()
        fast = compiled(model, "delayed", lower)
        steps(model, fast, 3, optimizer=optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), train.state_dict(fast)))
        want = steps(model, fast, 3, 3, optimizer=optimizer)
        torch._dynamo.reset()
        other, optimizer = start()
        other.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        again = compiled(other, "delayed", lower)
        train.load_state_dict(again, saved[2])
        assert steps(other, again, 3, 3, optimizer=optimizer) == want
        assert all(map(torch.equal, other.parameters(), model.parameters()))
        assert all(torch.equal(v, train.state_dict(again)[k]) for k, v in train.state_dict(fast).items())
        train.load_state_dict(again, saved[2])  # once it is compiled: written in place
        other.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        assert steps(other, again, 3, 3, optimizer=optimizer) == want


def test_a_history_of_another_length_is_refused():
    model = Net()
    with said():
        fast = compiled(model, "delayed")
        fast(torch.randn(5, 32))
        saved = train.state_dict(fast)
        other = Net()
        again = compiled(other, "fp8(scaling='delayed', history=8)")
        again(torch.randn(5, 32))
    with pytest.raises(WeightError, match="length of history"):
        train.load_state_dict(again, saved)


@pytest.mark.parametrize("how", SCALINGS)
def test_gradients_accumulate(how):
    """Two backwards add up: the sum of what each gives alone, where scales are those of the call."""
    model, xs = Net(), torch.randn(2, 5, 32)
    with said():
        fast = compiled(model, how)
        alone = []
        for x in xs:
            model.zero_grad()
            fast(x).square().mean().backward()
            alone.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
        for x in xs:
            fast(x).square().mean().backward()
    tolerance = 0.2 if how == "delayed" else 1e-6
    assert all(close(p.grad, a + b, tolerance) for p, a, b in zip(model.parameters(), *alone))


class Checkpointed(nn.Module):
    def __init__(self, on=True):
        super().__init__()
        self.a, self.b, self.on = Net(), Net(), on

    def forward(self, x):
        body = lambda part, x: checkpoint(part, x, use_reentrant=False) if self.on else part(x)  # noqa: E731
        return body(self.b, body(self.a, x))


@pytest.mark.parametrize("how", ["delayed"])
def test_checkpointed_bodies(how):
    """Compiled by Inductor, the same losses, gradients and histories as without, by the references: what is computed again uses the scales of its forward."""
    found = []
    for on in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Checkpointed(on)
        with said():
            fast = compiled(model, how, "inductor" if on else "eager")
            losses = steps(model, fast, 3)
        found.append([torch.tensor(losses), *(p.detach() for p in model.parameters()), *train.state_dict(fast).values()])
    assert all(map(lambda a, b: close(a, b, 1e-5), *found))


@pytest.mark.parametrize("how", ["delayed"])
def test_autocast(how):
    """bfloat16 in and out, gradients of the float32 weights in float32."""
    model, x = Net(), torch.randn(5, 32)
    with said(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(model, how, "inductor")(x)
        plain = model(x)
    assert y.dtype is torch.bfloat16 and float((y - plain).float().norm() / plain.float().norm()) < 0.12
    y.float().square().mean().backward()
    assert all(p.grad.dtype is torch.float32 for p in model.parameters())


def test_parameters_that_are_frozen():
    model, x = Net(), torch.randn(5, 32)
    model.up.weight.requires_grad_(False)
    with said():
        compiled(model, "delayed", "inductor")(x).square().mean().backward()
    assert model.up.weight.grad is None and model.up.bias.grad is not None and model.down.weight.grad is not None


@pytest.mark.parametrize("lower", ["eager"])
def test_equal_layers_share_a_graph_and_keep_their_own_histories(lower):
    model = Stack(3)
    with said():
        for layer in model.layers:
            layer.compile(backend="qcompile", options={"train": DELAYED, "lower": lower})
        steps(model, model, 3)
    state = train.state_dict(model)
    assert len(state) == 3 * 2 * 2
    rows = [state[f"layers.{i}.up.weight.fp8_forward"] for i in range(3)]
    assert len({float(row[0, 1, SCALE]) for row in rows}) == 3 and all((row[0, :, POSITION] == 3).all() for row in rows)


def test_two_sizes_share_a_history():
    """Another batch size is another graph of the same weights."""
    model = Net()
    with said(), graphs() as seen:
        fast = torch.compile(model, backend="qcompile", options={"train": DELAYED, "lower": "eager"}, dynamic=False)
        for rows in (5, 7, 5, 7):
            fast(torch.randn(rows, 32)).square().mean().backward()
    assert len({id(graph) for graph, _ in seen}) == 2
    state = STATE.held(model.up, ("weight", "", "fp8_forward"))
    assert float(state[0, 0, POSITION]) == 0 and (state[0, 0, RING:] > 0).all()


def test_graphs_of_other_sites_take_the_histories_along():
    """Half of a model compiled alone reads a part of what the whole reads: entries move, both go on."""
    model = Stack(2)
    whole, x = compiled(model, "delayed"), torch.randn(5, 32)
    half = compiled(model.layers[1], "delayed")
    with said():
        for fast in (whole, half, whole, half, whole):
            fast(x).square().mean().backward()
    a, b = (STATE.held(layer.up, ("weight", "", "fp8_forward")) for layer in model.layers)
    assert (float(a[0, 0, POSITION]), float(b[0, 0, POSITION])) == (3, 1)  # 3 and 5 calls, modulo 4


def test_one_weight_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)) * 3)

    model = Twice()
    with said():
        fast = compiled(model, "delayed")
        for _ in range(2):
            fast(torch.randn(5, 32)).square().mean().backward()
    state = train.state_dict(fast)
    assert len(state) == 4 and len({float(v[0, 0, SCALE]) for k, v in state.items() if k.endswith("forward")}) == 2


def test_evaluation_runs_the_recipe():
    model, x = Net(), torch.randn(5, 32)
    with said():
        fast = compiled(model)
        fast(x).sum().backward()
    with torch.no_grad(), graphs() as seen:
        y = fast(x)
    (graph, _), = seen
    assert {str(c) for c in graph.plan.values()} == {"e4m3.row @ e4m3.row"} and close(y, model(x).detach(), 0.1)


def test_quantize_after_training_gives_what_evaluation_ran():
    model, x = Net(), torch.randn(5, 32)
    with said():
        fast = compiled(model, "delayed")
        steps(model, fast, 3)
        with torch.no_grad():
            y = fast(x)
        qcompile.quantize(model, "FP8", [x], progress=False)
        torch._dynamo.reset()
        with torch.no_grad():
            assert torch.equal(torch.compile(model, backend="qcompile", options={"lower": "eager"})(x), y)
    assert sum(p.element_size() == 1 for p in model.parameters()) == 2, "both are codes"


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e5])
def test_overflows_are_counted(bad):
    """Values beyond the scale saturate; inf and NaN stay; the histories survive both, and the report counts."""
    model = Net()
    with said():
        fast = compiled(model, "delayed")
        fast(torch.randn(5, 32)).square().mean().backward()
        before = STATE.held(model.up, ("weight", "", "fp8_forward")).clone()
        x = torch.randn(5, 32)
        x[2, 3] = bad
        y = fast(x)
        after = STATE.held(model.up, ("weight", "", "fp8_forward"))
        assert y[2].isfinite().all() == (bad == 1e5) and y[0].isfinite().all()
        assert float(after[0, 0, OVERFLOWS]) == 1 and float(after[0, 0, SCALE]) == float(before[0, 0, SCALE])
        assert train.overflows(fast)["up.weight"] == {"input": 1}
        assert fast(torch.randn(5, 32)).isfinite().all()
        with torch.no_grad():
            report = qcompile.explain(fast, torch.randn(5, 32))
    assert any("up.weight: FP8 training met" in note and "1 times in its input" in note for note in report.notes)


def test_emulation_is_said_once_and_refused_under_strict():
    with said() as texts:
        fast = compiled(Stack(2))
        fast(torch.randn(5, 32))
        fast(torch.randn(7, 32))
    assert len([t for t in texts if "emulated" in t]) == 1, texts
    with pytest.raises(Exception, match="emulated") as error:
        compiled(Net(), strict=True)(torch.randn(5, 32))
    assert isinstance(error.value, StrictError) or isinstance(error.value.__cause__, StrictError) or "StrictError" in str(error.value)
