"""Quantization-aware training end to end: gradients, both sides of the grad mode, what is learned, conversion, resumption, and what goes wrong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small import Net, Stack, close, graphs, said
from torch import nn

import qcompile
from qcompile import train
from qcompile.core.errors import OptionError, WeightError
from qcompile.core.qtensor import dequantize
from qcompile.core.scheme import Scheme
from qcompile.trained import STATE
from qcompile.weights import TABLE

OPTIONS = {
    "W4A16": {"recipe": "W4A16"},
    "W4A8": {"recipe": "W4A8"},
    "W2A16": {"weight": "int2.g16"},
    "ternary": {"weight": "ternary.g16"},
    "W8A8_STATIC lsq": {"recipe": "W8A8_STATIC"},
    "W8A8_STATIC pact": {"recipe": "W8A8_STATIC", "train": "qat(input='pact')"},
    "W8A8_STATIC ste": {"recipe": "W8A8_STATIC", "train": "qat(input='ste')"},
    "zero point": {"weight": "uint4.g16.point", "input": "uint8.row.point"},
    "NF4": {"recipe": "NF4"},
    "FP8": {"recipe": "FP8"},
}


def compiled(model: nn.Module, lower: str = "eager", **options):
    return torch.compile(model, backend="qcompile", options={"train": "qat", "lower": lower, **options}, fullgraph=True)


def steps(model: nn.Module, fast, x: torch.Tensor, y: torch.Tensor, count: int, optimizer=None) -> list[float]:
    if optimizer is None:
        fast(x)
        optimizer = torch.optim.SGD([*model.parameters(), *qcompile.parameters(fast)], lr=0.05)
    out = []
    for _ in range(count):
        loss = (fast(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(float(loss.detach()))
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_sees_what_training_saw(name):
    """The evaluation graph multiplies codes; the training graph rounds. Same outputs; and quantize gives the same codes."""
    model, x, y = Net(), torch.randn(24, 32), torch.randn(24, 32)
    fast = compiled(model, **OPTIONS[name])
    losses = steps(model, fast, x, y, 8)
    assert losses[-1] < losses[0]
    trained = fast(x).detach()
    with torch.no_grad(), graphs() as seen:
        evaluated = fast(x)
    (graph, args), *_ = seen
    assert close(evaluated, trained, 1e-5)
    packed = [t.clone() for t in graph._bindings[tuple(id(args[i]) for i in graph._weights)].tensors]
    options = {k: v for k, v in OPTIONS[name].items() if k != "train"}
    recipe = options.pop("recipe", None)
    qcompile.quantize(model, recipe or "W8A8", [x], progress=False, **options, **({} if recipe or "input" in options else {"input": "16bit"}))
    held = [t for module in model.modules() if hasattr(module, "parametrizations") for t in module.parametrizations.weight.parameters()]
    assert packed
    for t in packed:
        assert any(t.shape == h.shape and torch.equal(t, h.to(t.dtype)) for h in held), (name, t.shape)
    torch._dynamo.reset()
    with torch.no_grad():
        assert close(torch.compile(model, backend="qcompile", options={"lower": "eager"})(x), trained, 1e-5)


@pytest.mark.parametrize("name", ["W4A8", "W8A8_STATIC lsq"])
def test_inductor_gives_the_gradients_of_the_references(name):
    torch.manual_seed(3)
    model, x = Net(40, 56), torch.randn(9, 40)
    found = []
    for lower in ("eager", "inductor"):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        fast = compiled(twin, lower, **OPTIONS[name])
        fast(x).square().sum().backward()
        found.append([p.grad for p in (*twin.parameters(), *qcompile.parameters(fast))])
    assert len(found[0]) == len(found[1]) > 3
    assert all(a is not None and close(a, b, 1e-4) for a, b in zip(*found))


def test_gradients_are_those_of_the_definition_in_float64():
    """LSQ on int4 weights in groups of 16, written out with the straight-through trick."""
    model, x = Net(), torch.randn(7, 32)
    fast = compiled(model, weight="int4.g16")
    fast(x).square().sum().backward()
    learned = dict(train.named_parameters(fast))
    weights, by_name = {}, dict(model.named_parameters())
    want = {}
    for name in ("up", "down"):
        w = by_name[f"{name}.weight"].detach().double().requires_grad_()
        s = learned[f"{name}.weight.step"].detach().bfloat16().double().requires_grad_()
        g = 1 / math.sqrt(16 * 7)
        scaled = s * g + (s - s * g).detach()
        z = (w.unflatten(1, (-1, 16)) / scaled[..., None]).clamp(-8, 7)
        weights[name] = ((((z.round() - z).detach() + z) * scaled[..., None]).flatten(1), w, s)
    bias = model.up.bias.detach().double()
    out = torch.relu(x.double() @ weights["up"][0].T + bias) @ weights["down"][0].T
    out.square().sum().backward()
    for name, (_, w, s) in weights.items():
        want[f"{name}.weight"], want[f"{name}.weight.step"] = w.grad, s.grad
    for name, grad in want.items():
        got = by_name[name].grad if name in by_name else learned[name].grad
        assert float((got.double() - grad).norm() / grad.norm()) < 1e-5, name


def test_instances_of_one_class_learn_apart():
    model, x = Stack(3), torch.randn(5, 32)
    for layer in model.layers:
        layer.compile(backend="qcompile", options={"recipe": "W4A16", "train": "qat", "lower": "eager"})
    model(x).square().sum().backward()
    names = [name for name, _ in train.named_parameters(model)]
    assert names == [f"layers.{i}.{n}.weight.step" for i in range(3) for n in ("up", "down")]
    grads = [p.grad for p in qcompile.parameters(model)]
    assert len({float(g.sum()) for g in grads}) == 6


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Net(), Net()

    def forward(self, x: torch.Tensor, use: bool = True) -> torch.Tensor:
        if not use:
            return x + self.a(x) + self.b(x + self.a(x))
        x = x + torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False)
        return x + torch.utils.checkpoint.checkpoint(lambda t: self.b(t), x, use_reentrant=False)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_checkpointed_bodies_are_trained_and_give_the_same_gradients(lower):
    model, x = Checkpointed(), torch.randn(6, 32, requires_grad=True)
    found = []
    for use in (True, False):
        torch._dynamo.reset()
        model.zero_grad()
        fast = compiled(model, lower, recipe="W4A16")
        fast(x, use).square().sum().backward()
        found.append([p.grad.clone() for p in (*model.parameters(), *qcompile.parameters(fast))])
        for p in qcompile.parameters(fast):
            p.grad = None
    assert len(found[0]) == 10 and all(close(a, b, 1e-4) for a, b in zip(*found))


def test_gradient_accumulation_and_autocast():
    model, x = Net(), torch.randn(8, 32)
    fast = compiled(model, recipe="W4A16")
    fast(x).square().sum().backward()
    whole = [p.grad.clone() for p in (*model.parameters(), *qcompile.parameters(fast))]
    model.zero_grad()
    for p in qcompile.parameters(fast):
        p.grad = None
    for half in x.chunk(2):
        fast(half).square().sum().backward()
    assert all(close(a.grad, b, 1e-4) for a, b in zip((*model.parameters(), *qcompile.parameters(fast)), whole))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = fast(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(close(p.grad, w, 0.1) for p, w in zip(model.parameters(), whole))


def test_a_checkpoint_resumes_bit_exactly(tmp_path):
    torch.manual_seed(1)
    model, x, y = Net(), torch.randn(16, 32), torch.randn(16, 32)

    def optimizer(m, f):
        return torch.optim.AdamW([*m.parameters(), *qcompile.parameters(f)], lr=1e-2)

    fast = compiled(model, recipe="W8A8_STATIC", weight="int4.g16")
    fast(x)
    first = optimizer(model, fast)
    steps(model, fast, x, y, 3, first)
    torch.save({"model": model.state_dict(), "training": train.state_dict(fast), "optimizer": first.state_dict()}, tmp_path / "checkpoint.pt")
    whole = steps(model, fast, x, y, 3, first)
    saved = torch.load(tmp_path / "checkpoint.pt")
    again = Net()
    again.load_state_dict(saved["model"])
    train.load_state_dict(again, saved["training"])  # before it is compiled
    fast2 = compiled(again, recipe="W8A8_STATIC", weight="int4.g16")
    fast2(x)
    second = optimizer(again, fast2)
    second.load_state_dict(saved["optimizer"])
    assert steps(again, fast2, x, y, 3, second) == whole
    assert all(torch.equal(a, b) for a, b in zip(train.state_dict(fast).values(), train.state_dict(fast2).values(), strict=True))


def test_a_step_that_went_wrong_is_repaired_and_counted():
    model, x = Net(), torch.randn(8, 32)
    fast = compiled(model, weight="int4.g16")
    fast(x)
    step = qcompile.parameters(fast)[0]
    before = step.detach().clone()
    optimizer = torch.optim.SGD([step], lr=1.0)
    step.grad = torch.zeros_like(step)
    step.grad[0, 0], step.grad[0, 1], step.grad[1, 1], step.grad[2, 0] = 2 * float(step[0, 0]), float(step[0, 1]), math.nan, math.inf  # negative, zero, NaN, infinite
    optimizer.step()
    assert torch.equal(step.detach(), before)
    assert train.repaired(fast) == {"up.weight.step": 4}
    assert [note for note in qcompile.explain(fast, x).notes if "healthy" in note] == ["up.weight.step: 4 learned numbers that a step of the optimizer had made zero, negative, infinite or NaN got their last healthy values back"]
    assert math.isfinite(float(fast(x).square().sum()))


def test_a_weight_is_packed_again_when_only_its_step_moves():
    model, x = Net(), torch.randn(8, 32)
    fast = compiled(model, weight="int4.g16")
    fast(x)
    with torch.no_grad():
        before = fast(x)
    optimizer = torch.optim.SGD(qcompile.parameters(fast), lr=0.1)
    for p in qcompile.parameters(fast):
        p.grad = -p.detach()
    optimizer.step()
    after = fast(x).detach()
    with torch.no_grad():
        assert close(fast(x), after) and not close(before, after, 1e-3)


def test_a_moving_range_reaches_inference():
    model, x = Net(), torch.randn(64, 32)
    fast = compiled(model, **OPTIONS["W8A8_STATIC ste"])
    for scale in (1.0, 4.0):
        fast(x * scale)
        with torch.no_grad():
            out = fast(x)
        lo, hi = train.state_dict(fast)["up.weight.input_range"].tolist()
        assert hi <= float(x.max()) * (1 + 0.01 * 3) + 1e-5 and lo < 0
        assert close(out, model(x).detach(), 0.05)


def test_what_is_said_where_it_does_not_fit():
    model, x = Net(), torch.randn(8, 32)
    cases = {
        "W4A16_GPTQ is for inference: gptq": {"recipe": "W4A16_GPTQ"},
        "lsq learns one step for all calls": {"recipe": "W8A8", "train": "qat(input='lsq')"},
        "lsq learns a symmetric range": {"weight": "uint4.g16.point", "train": "qat(weight='lsq')"},
        "takes no argument 'wait'": {"train": "qat(wait=1)"},
        "the estimator of weights": {"train": "qat(weight=3)"},
        "unknown estimator 'lsx'": {"train": "qat(weight='lsx')"},
        "unknown training recipe 'qta'": {"train": "qta"},
        "fitted to a weight that stays": {"weight": "lut4.g16"},
    }
    for text, options in cases.items():
        torch._dynamo.reset()
        with pytest.raises(Exception) as error:
            compiled(model, **options)(x)
        assert text in str(error.value), (text, str(error.value))
    with pytest.raises(OptionError, match="call it once under grad mode"):
        qcompile.parameters(torch.compile(Net(), backend="qcompile"))
    fast = compiled(model, weight="int4.g16")
    fast(x)
    with pytest.raises(WeightError, match="does not have"):
        train.load_state_dict(Stack(1), train.state_dict(fast))
    with pytest.raises(OptionError, match="unknown kind of training state 'stop'"):
        train.load_state_dict(model, {"up.weight.stop": torch.ones(1)})


def test_rules_leave_linears_alone_and_nothing_is_said_about_plain_training():
    model, x = Net(), torch.randn(8, 32)
    with said() as texts:
        fast = compiled(model, weight="int4.g16", ignore=["down"])
        fast(x).sum().backward()
    assert [name for name, _ in train.named_parameters(fast)] == ["up.weight.step"] and texts == []


def test_state_dies_with_its_module():
    import gc

    model, x = Net(), torch.randn(8, 32)
    compiled(model, weight="int4.g16")(x)
    count = len(STATE._held)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert len(STATE._held) < count


def test_a_step_counts_for_its_scheme_alone():
    """Another scheme's grid has another shape: it rounds to nearest."""
    model, x = Net(), torch.randn(8, 32)
    compiled(model, weight="int4.g16")(x)
    p = model.up.weight
    assert STATE.step(p, "", Scheme.parse("int4.g16")) is not None and STATE.step(p, "", Scheme.parse("int4.g8")) is None
    q = TABLE.packed(p, "", Scheme.parse("int4.g16"), "up.weight")
    assert dequantize(TABLE.record(p).entries["weight", "", "int4.g16"].qtensor()).shape == p.shape and q


@pytest.mark.parametrize("reduce", [True, False])
def test_what_each_process_learns_by_itself(reduce, monkeypatch):
    """Two processes are pretended: the mean gradient of what is learned, unless ``reduce=False``."""
    from qcompile import compat

    model, x = Net(), torch.randn(8, 32)
    fast = compiled(model, weight="int4.g16", train=f"qat(reduce={reduce})")
    fast(x)
    monkeypatch.setattr(compat, "world_size", lambda: 2)
    monkeypatch.setattr(compat, "all_reduce", lambda t, op, group=None: 4 * t)
    fast(x).square().sum().backward()
    got = [p.grad.clone() for p in qcompile.parameters(fast)]
    monkeypatch.undo()
    for p in qcompile.parameters(fast):
        p.grad = None
    fast(x).square().sum().backward()
    assert all(close(g, p.grad * (2 if reduce else 1)) for g, p in zip(got, qcompile.parameters(fast), strict=True))
