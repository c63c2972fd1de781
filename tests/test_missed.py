"""What ran outside qcompile is listed, and a call in which nothing ran says why."""

from __future__ import annotations

import types

import pytest
import torch
from explained import EAGER
from small import close, rounded, said
from tiny_models import tiny
from torch import nn

import qcompile
from qcompile.core.errors import QcompileError
from qcompile.missed import GROUPED, LOOP


class Loop(nn.Module):
    """Stacked experts that a Python loop runs, outside every graph."""

    def __init__(self, implementation: str | None) -> None:
        super().__init__()
        if implementation is not None:
            self.config = types.SimpleNamespace(_experts_implementation=implementation)
        self.fc, self.experts = nn.Linear(32, 32), nn.Parameter(torch.randn(4, 32, 32))

    @torch.compiler.disable
    def loop(self, x: torch.Tensor) -> torch.Tensor:
        return sum(x @ w for w in self.experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loop(self.fc(x))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", None])
def test_experts_in_a_python_loop(implementation):
    """Only where the model's configuration says so does the hint name the method that changes it."""
    report = qcompile.explain(torch.compile(Loop(implementation), backend="qcompile", options=EAGER), torch.randn(2, 32))
    (row,) = report.kept
    assert row.name.endswith("experts") and row.reason.startswith("no compiled graph reads it in this call")
    assert ("set_experts_implementation('grouped_mm')" in row.reason) == (implementation == "eager")
    assert report.totals.coverage == 1 / 5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_transformers_eager_experts(name):
    """Dynamo breaks the graph where their loop begins; before it comes to the loop, the configuration is told to run them grouped: nothing is left in 16 bits, in the first call already."""
    model, inputs = tiny(name)
    twin, _ = tiny(name)
    twin.load_state_dict(model.state_dict())
    twin.set_experts_implementation("grouped_mm")
    model.set_experts_implementation("eager")
    options = EAGER | {"recipe": "W8A16", "strict": True}
    with torch.no_grad(), said() as texts:
        fast = torch.compile(model, backend="qcompile", options=options)
        first, second = fast(**inputs).logits, fast(**inputs).logits
        wanted = torch.compile(twin, backend="qcompile", options=options)(**inputs).logits
        assert close(first, wanted, 1e-5) and close(second, wanted, 1e-5)
        report = qcompile.explain(fast, **inputs)
    assert [text for text in texts if "Python loop" in text] == [f"qcompile: {GROUPED}"], "once, not for each layer"
    assert model.config._experts_implementation == "grouped_mm" and report.totals.coverage == 1.0
    assert len([row for row in report.sites if row.name.endswith(("experts.gate_up_proj", "experts.down_proj"))]) == 4
    assert any(note.endswith(GROUPED) for note in report.notes)


@pytest.mark.parametrize("how", ["calibrate", "quantize"])
def test_transformers_eager_experts_are_calibrated(how):
    """The recording, too, tells them to run grouped before Dynamo comes to their loop: ranges of their inputs are those of the data, not of the next call."""
    model, inputs = tiny("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("eager")
    inputs["use_cache"] = False
    options = EAGER | {"recipe": "W8A8_STATIC"}
    with torch.no_grad(), said() as texts:
        if how == "quantize":
            outcome = qcompile.quantize(model, "W8A8_STATIC", [inputs], progress=False)
            assert {line.name.rpartition(".")[2] for line in outcome.solved} >= {"gate_up_proj", "down_proj"}
        fast = torch.compile(model, backend="qcompile", options=options)
        if how == "calibrate":
            qcompile.calibrate(fast, [inputs], progress=False)
        report = qcompile.explain(fast, **inputs)
    assert [text for text in texts if "Python loop" in text] == [f"qcompile: {GROUPED}"], "once"
    assert not [text for text in texts if "first call" in text], "nothing is left to calibrate"
    assert {row.name.rpartition(".")[2] for row in report.sites} >= {"gate_up_proj", "down_proj"}


def looped() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Mixtral whose experts know no other form than the loop."""
    model, inputs = tiny("mixtral")
    model.set_experts_implementation("eager")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.__class__ = type("Plain", (type(experts),), {"forward": type(experts).forward.__wrapped__})
    return model, inputs


def test_experts_that_know_no_other_form():
    """The rest is quantized, and nobody is left to think that the experts are."""
    model, inputs = looped()
    with torch.no_grad(), said() as texts:
        fast = torch.compile(model, backend="qcompile", options=EAGER | {"recipe": "W8A16"})
        y = fast(**inputs).logits
        assert close(y, rounded(model, keep=("gate", "lm_head"))(**inputs).logits, 1e-4)
        report = qcompile.explain(fast, **inputs)
    assert [text for text in texts if "Python loop" in text] == [f"qcompile: {LOOP}"], "once, not for each layer"
    assert model.config._experts_implementation == "eager"
    rows = [row for row in report.kept if row.reason.endswith(LOOP)]
    assert len(rows) == 4 and all("experts" in row.name for row in rows) and report.totals.coverage < 0.3
    assert any("FLOPs are those of the compiled graphs" in note for note in report.notes)
    assert {row.name.rpartition(".")[2] for row in report.sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="eager Python loop"):
        torch.compile(model, backend="qcompile", options=EAGER | {"recipe": "W8A16", "strict": True})(**inputs)


def test_experts_that_a_rule_leaves_alone_stay_in_their_loop():
    model, inputs = tiny("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("eager")
    with torch.no_grad(), said() as texts:
        torch.compile(model, backend="qcompile", options=EAGER | {"recipe": "W8A16", "ignore": ["re:.*experts.*"]})(**inputs)
    assert model.config._experts_implementation == "eager" and not [text for text in texts if "Python loop" in text]


@pytest.mark.parametrize("what", ["module", "other backend", "function", "grad", "disabled"])
def test_nothing_ran(what):
    layer = nn.Linear(32, 32)
    fast, message = {
        "module": lambda: (layer, r"this Linear is not compiled; .*backend='qcompile'"),
        "other backend": lambda: (torch.compile(layer, backend="eager"), r"compiled with backend 'eager', not 'qcompile'"),
        "function": lambda: (lambda x: layer(x), r"the function calls nothing that is compiled"),
        "grad": lambda: (torch.enable_grad()(torch.compile(layer, backend="qcompile", options=EAGER)), r"turns grad mode on"),
        "disabled": lambda: (torch.compile(layer, backend="qcompile"), r"set_stance\('force_eager'\)"),
    }[what]()
    stance = "force_eager" if what == "disabled" else "default"
    with torch.compiler.set_stance(stance), pytest.raises(QcompileError, match=message):
        qcompile.explain(fast, torch.randn(2, 32))


class Numbered(nn.Module):
    """Each instance needs a graph of its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.fc = number, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.number


def test_recompile_limit():
    model = nn.Sequential(*(Numbered(i) for i in range(5))).eval()
    for layer in model:
        layer.compile(backend="qcompile", options=EAGER, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3):
        report = qcompile.explain(model, torch.randn(2, 32))
        assert [row.name for row in report.kept] == ["3.fc", "4.fc"] and report.totals.coverage == 3 / 5
        assert any("recompile limit (3) is reached for Numbered.forward" in note for note in report.notes)
        with pytest.raises(QcompileError, match=r"recompile limit \(3\) is reached for Numbered.forward"):
            qcompile.explain(model[4], torch.randn(2, 32))


def test_errors_of_the_model_are_its_own():
    fast = torch.compile(nn.Linear(32, 32), backend="qcompile", options=EAGER)
    with pytest.raises(Exception, match=r"shape|size"):
        qcompile.explain(fast, torch.randn(2, 31))
    from qcompile.backend import _COLLECTORS

    assert not _COLLECTORS
