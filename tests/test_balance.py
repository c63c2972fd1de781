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
    "gpt2": {("c_attn", "c_proj")},
    "bert": {("value", "dense")},
    "t5": {("v", "o"), ("wi_1", "wo")},
    "vit": {("v_proj", "o_proj")},
}


CHANGED = {"opt": 6, "llama": 4, "mixtral": 4, "gpt2": 3, "bert": 3, "t5": 16, "vit": 3}
"""Parameters that this scales: two weights of each link, and the first one's bias."""


@torch.no_grad()
@pytest.mark.parametrize("name", LINKS)
def test_a_model_keeps_its_function(name, monkeypatch):
    """In float64, before anything is rounded; v to o (of a fused q, k, v, too), up to down, experts. A run that fails takes it back."""
    float64 = {} if name == "mixtral" else {"dtype": torch.float64}  # grouped_mm takes none; powers of two are exact anyway
    model, inputs = tiny(name, num_hidden_layers=1, **float64)
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(torch.logspace(-1, 1, p.shape[-2])[torch.randperm(p.shape[-2])][:, None])
    inputs["use_cache"] = False
    exact, before = model(**inputs).logits, copy.deepcopy(model.state_dict())

    def then(links):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert len(changed) == CHANGED[name], changed
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


# --- high biases -----------------------------------------------------------------------------------------------------------------


class High(nn.Module):
    """A ReLU layer behind a norm, a quarter of whose values lie far above zero."""

    def __init__(self, norm=True, bias=True, between=torch.relu):
        super().__init__()
        self.norm, self.a, self.b, self.between = nn.LayerNorm(32) if norm else nn.Identity(), nn.Linear(32, 64), nn.Linear(64, 48, bias=bias), between
        with torch.no_grad():
            self.a.bias[::4] += 20
            for vector in self.norm.parameters():
                vector.add_(0.3 * torch.randn(32))

    def forward(self, x):
        return self.b(self.between(self.a(self.norm(x))))


ABSORB = {"passes": ["equalize(absorb=True)"], "progress": False}


@torch.no_grad()
def test_high_biases_are_absorbed():
    """Nagel et al. 2019, section 4.1.3: the input of the second layer needs a smaller range. An approximation, and the outcome says so."""
    model = High()
    x = 2 * rows(512, 32)
    exact, plain, before = model(x), copy.deepcopy(model), torch.relu(model.a(model.norm(x))).max()
    with said() as texts:
        outcome = qcompile.quantize(model, "W8A8_STATIC", [x], **ABSORB)
        qcompile.quantize(plain, "W8A8_STATIC", [x], progress=False, passes=["equalize"])
        good, poor = (torch.compile(m, backend="qcompile", options={"lower": "eager"})(x) for m in (model, plain))
    assert torch.relu(model.a(model.norm(x))).max() < 0.5 * before
    assert decibels(exact, good) > decibels(exact, poor) + 3 and decibels(exact, good) > 35
    notes = {line.name: line.notes for line in outcome.solved}
    assert "16 high biases" in notes["a"][0] and "an approximation" in notes["a"][0] and not notes["b"] and any("an approximation" in t for t in texts)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: High(norm=False), "no norm makes the input"),
        (lambda: High(bias=False), "has no bias of its own to take it"),
        (lambda: High(between=lambda y: y), "more, or less, than a ReLU lies between"),
        (lambda: High(between=lambda y: nn.functional.leaky_relu(y, 0.1)), "more, or less, than a ReLU lies between"),
    ],
    ids=["norm", "bias", "no relu", "leaky"],
)
def test_where_nothing_is_absorbed(model, reason):
    model = model()
    exact = model(X)
    with said():
        outcome = qcompile.quantize(model, "W8A16", [X], **ABSORB)
    assert reason in outcome.solved[0].notes[0] and decibels(exact, model(X)) > 30


@torch.no_grad()
def test_no_bias_is_high():
    model = High()
    model.a.bias.zero_()
    with said():
        assert "no channel has a mean" in qcompile.quantize(model, "W8A16", [X], **ABSORB).solved[0].notes[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absorbed_biases_come_back_exactly(dtype, monkeypatch):
    model, inputs = tiny("opt", dtype, num_hidden_layers=1, do_layer_norm_before=True)
    layer = model.model.decoder.layers[0]
    layer.fc1.bias[:8] += 30
    before = copy.deepcopy(model.state_dict())

    def then(_):
        assert float(layer.fc1.bias[:8].max()) < 15 and not torch.equal(layer.fc2.bias, before["model.decoder.layers.0.fc2.bias"])
        raise StrictError("stopped")

    spied(monkeypatch, then)
    with pytest.raises(StrictError), said():
        qcompile.quantize(model, "W8A16", [inputs], **ABSORB)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
