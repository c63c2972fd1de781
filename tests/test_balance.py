"""The step ``equalize`` of ``qcompile.quantize``: which weights of a model it changes, that its function stays, and what that gains."""

from __future__ import annotations

import copy

import pytest
import torch
from calibrated import rows
from small import close, said
from tiny_models import tiny
from torch import nn

import qcompile
from qcompile import balance, sequence
from qcompile.core.errors import OptionError, StrictError

TENSOR = {"weight": "int8.tensor"}
X = rows(64, 32)


class Uneven(nn.Module):
    """ReLU layers whose rows differ by 100 times, which the columns behind undo."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 48, bias=False), nn.Linear(48, 16)
        with torch.no_grad():
            for first, second in ((self.a, self.b), (self.b, self.c)):
                by = torch.logspace(-1, 1, len(first.weight))[torch.randperm(len(first.weight))]
                first.weight.mul_(by[:, None])
                if first.bias is not None:
                    first.bias.mul_(by)
                second.weight.div_(by)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def decibels(exact, y):
    return float(10 * (exact.square().sum() / (y - exact).square().sum()).log10())


def spied(monkeypatch, then=lambda links: None):
    """The links of every run, as (producer, followers); ``then`` is called once they are applied."""
    found = []
    real = balance.Balanced.apply

    def apply(self, units):
        real(self, units)
        found.append({(link.producer.rpartition(".")[2], *(name.rpartition(".")[2] for name in link.followers)) for link in self.links})
        then(found[-1])

    monkeypatch.setattr(balance.Balanced, "apply", apply)
    return found


LINKS = {
    "opt": {("v_proj", "out_proj"), ("fc1", "fc2")},
    "llama": {("v_proj", "o_proj"), ("up_proj", "down_proj")},
    "mixtral": {("v_proj", "o_proj"), ("experts.gate_up_proj", "experts.down_proj")},
}


@torch.no_grad()
@pytest.mark.parametrize("name", LINKS)
def test_a_model_keeps_its_function(name, monkeypatch):
    """In float64, before anything is rounded; v to o, up to down, experts. A run that fails takes it back."""
    float64 = {} if name == "mixtral" else {"dtype": torch.float64}  # grouped_mm takes none; powers of two are exact anyway
    model, inputs = tiny(name, num_hidden_layers=1, **float64)
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(torch.logspace(-1, 1, p.shape[-2])[torch.randperm(p.shape[-2])][:, None])
    inputs["use_cache"] = False
    exact, before = model(**inputs).logits, copy.deepcopy(model.state_dict())

    def then(links):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert len(changed) == 2 * len(links) + (2 if name == "opt" else 0), changed
        assert float((model(**inputs).logits - exact).abs().max()) <= 1e-12 * float(exact.abs().max())
        raise StrictError("stopped")

    found = spied(monkeypatch, then)
    with pytest.raises(StrictError, match="stopped"), said():
        qcompile.quantize(model, "W8A16", [inputs], passes=["equalize"], progress=False)
    assert found == [{tuple(n.rpartition(".")[2] for n in link) for link in LINKS[name]}]
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("recipe", [TENSOR, {**TENSOR, "input": "int8.row"}], ids=["weights", "activations"])
def test_it_recovers_what_uneven_rows_cost(recipe):
    model = Uneven()
    exact, plain = model(X), copy.deepcopy(model)
    with said():
        qcompile.quantize(plain, "W8A8", [X], progress=False, **({"input": "16bit"} | recipe))
        qcompile.quantize(model, "W8A8", [X], progress=False, passes=["equalize"], **({"input": "16bit"} | recipe))
        fast = torch.compile(model, backend="qcompile", options={"lower": "eager"})
        poor = torch.compile(plain, backend="qcompile", options={"lower": "eager"})
        assert decibels(exact, model(X)) > decibels(exact, plain(X)) + 10
        assert decibels(exact, fast(X)) > decibels(exact, poor(X)) + (10 if "input" not in recipe else 5)
        if "input" not in recipe:
            assert close(fast(X), model(X))


@torch.no_grad()
def test_beside_other_steps():
    """Statistics are those of the equalized model."""
    model = Uneven()
    exact = model(X)
    with said():
        outcome = qcompile.quantize(model, "W8A8_SMOOTHQUANT", [X], progress=False, passes=["equalize", "smooth", "gptq", "bias"], **TENSOR)
    fast = torch.compile(model, backend="qcompile", options={"lower": "eager"})
    assert decibels(exact, fast(X)) > 25 and len(outcome.solved) == 3


class Shown(Uneven):
    """The first layer's output is shown, too."""

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(h))), h


class Twice(Uneven):
    """The first layer is called by itself once more."""

    def forward(self, x):
        return super().forward(x) + self.a(x).mean()


@torch.no_grad()
@pytest.mark.parametrize(("model", "options"), [(Shown, {}), (Twice, {}), (Uneven, {"ignore": ["a"]}), (Uneven, {"ignore": ["b"]})])
def test_what_something_else_reads_stays(model, options, monkeypatch):
    found, model = spied(monkeypatch), model()
    before = copy.deepcopy(model)
    with said():
        qcompile.quantize(model, "W8A16", [X], progress=False, passes=["equalize"], **options)
    assert found == [{("b", "c")} if options.get("ignore") != ["b"] else set()]
    y, exact = (m.c(torch.relu(m.b(torch.relu(m.a(X))))) for m in (model, before))
    assert torch.equal(model.a.bias, before.a.bias) and decibels(exact, y) > 15


@torch.no_grad()
def test_calls_that_disagree(monkeypatch):
    """A second path of the model, in another graph, reads what the first would change."""

    class Paths(Uneven):
        def forward(self, x, first=False):
            return self.a(x) if first else super().forward(x)

    found = spied(monkeypatch)
    with said():
        qcompile.quantize(Paths(), "W8A16", [{"x": X}, {"x": X, "first": True}], progress=False, passes=["equalize"])
    assert found == [{("b", "c")}]


@torch.no_grad()
def test_a_run_that_fails_takes_it_back(monkeypatch):
    model = Uneven()
    before = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), said():
        patch.setattr(sequence, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        qcompile.quantize(model, "W8A16", [X], progress=False, passes=["equalize"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@torch.no_grad()
def test_compiling_never_changes_weights():
    fast = torch.compile(Uneven(), backend="qcompile", options={"recipe": "W8A16", "passes": ["equalize"], "lower": "eager"})
    with pytest.raises(Exception, match="changes a model's weights in place"):
        fast(X)
    with pytest.raises(OptionError, match="changes a model's weights in place"):
        qcompile.calibrate(fast, [X], progress=False)


def test_no_data_is_needed():
    model, _ = tiny("opt", num_hidden_layers=1)
    with said():
        assert qcompile.quantize(model, "W8A16", passes=["equalize"], progress=False).solved
