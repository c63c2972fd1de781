"""The graph that is trained, as text: what is rounded, by which estimator, once for all readers; experts and checkpointed bodies too."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from tiny_models import tiny
from torch import nn

import qcompile
from qcompile.core.errors import OptionError, Skip
from qcompile.core.recipe import Method, Recipe
from qcompile.core.scheme import Scheme
from qcompile.passes import TRAININGS
from qcompile.passes.fake_quant import estimators
from qcompile.passes.infra import text
from qcompile.train.graph import TrainingGraph

DEFAULTS = TRAININGS["qat"].settings(Method("qat"))


class Gated(nn.Module):
    """Two readers of one input, then one of their product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def trained(monkeypatch):
    """Training graphs in the order in which they are built."""
    found: list[TrainingGraph] = []
    real = TrainingGraph._compile

    def compile_(self, gm, inputs):
        found.append(self)
        return real(self, gm, inputs)

    monkeypatch.setattr(TrainingGraph, "_compile", compile_)
    return found


def lines(graph: TrainingGraph) -> str:
    return text(graph.lowered).replace("l_self_modules_", "").replace("_parameters_weight_", "")


def fast(model, **options):
    return torch.compile(model, backend="qcompile", options={"train": "qat", "lower": "eager", **options}, fullgraph=True)


class Cast(nn.Module):
    """A weight that its model casts and transposes on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.w.to(x.dtype).t())


def test_a_weight_is_rounded_as_the_parameter_holds_it(trained):
    """Codes are made of the parameter, not of what is left of it in 16 bits; evaluation reads the same."""
    model, x = Cast(), torch.randn(5, 32, dtype=torch.bfloat16)
    f = fast(model, weight="int4.g32", recipe="W4A16")
    y = f(x).detach()
    assert_expected_inline(
        text(trained[0].lowered).replace("l_self_parameters_", ""),
        """\
inputs: l_x_: bfloat16[5, 32], w__step: float32[48, 1]
t_1 = %w.t()
fake_quant_default = qcompile.fake_quant(t_1, [w__step], 'int4.g32', 'lsq', False)
to_1 = fake_quant_default.to(bfloat16)
linear = linear(l_x_, to_1, None)  # w: int4.g32
return (linear,)""",
    )
    with torch.no_grad():
        assert float((f(x) - y).float().norm()) <= 4e-3 * float(y.float().norm())


def test_inputs_are_rounded_in_the_dtype_in_which_they_are_read(trained):
    model, x = Gated(), torch.randn(5, 32)
    f = fast(model, recipe="W4A8")
    with torch.autocast("cpu", torch.bfloat16):
        y = f(x).detach()
        with torch.no_grad():
            assert float((f(x) - y).float().norm()) <= 1.5e-2 * float(y.float().norm())
    assert "to = l_x_.to(bfloat16)\nfake_quant_default_1 = qcompile.fake_quant(to, [], 'int8.row', 'ste', True)" in lines(trained[0])


def test_graph(trained):
    fast(Gated(), recipe="W4A8")(torch.randn(5, 32))
    assert_expected_inline(
        lines(trained[0]),
        """\
inputs: l_x_: float32[5, 32], gate_step: float32[48, 1], up_step: float32[48, 1], down_step: float32[32, 1]
fake_quant_default = qcompile.fake_quant(%gate.weight, [gate_step], 'int4.g128', 'lsq', False)
fake_quant_default_1 = qcompile.fake_quant(l_x_, [], 'int8.row', 'ste', True)
linear = linear(fake_quant_default_1, fake_quant_default, None)  # gate: int8.row @ int4.g128
silu = silu(linear)
fake_quant_default_2 = qcompile.fake_quant(%up.weight, [up_step], 'int4.g128', 'lsq', False)
linear_1 = linear(fake_quant_default_1, fake_quant_default_2, None)  # up: int8.row @ int4.g128
mul = mul(silu, linear_1)
fake_quant_default_3 = qcompile.fake_quant(%down.weight, [down_step], 'int4.g128', 'lsq', False)
fake_quant_default_4 = qcompile.fake_quant(mul, [], 'int8.row', 'ste', True)
linear_2 = linear(fake_quant_default_4, fake_quant_default_3, %down.bias)  # down: int8.row @ int4.g128
return (linear_2,)""",
    )


def test_static_inputs_read_a_moving_or_a_learned_range(trained):
    fast(Gated(), recipe="W8A8_STATIC", train="qat(input='ste')", ignore=["up", "down"])(torch.randn(5, 32))
    torch._dynamo.reset()
    fast(Gated(), recipe="W8A8_STATIC", ignore=["up", "down"])(torch.randn(5, 32))
    assert_expected_inline(
        "\n\n".join("\n".join(line for line in lines(graph).splitlines() if "qcompile." in line or "copy_" in line or "detach" in line) for graph in trained),
        """\
fake_quant_default = qcompile.fake_quant(%gate.weight, [], 'int8.row', 'ste', False)
detach = detach(l_x_)
moving_range_default = qcompile.moving_range(detach, gate_input_range, 0.01, True)
copy_ = gate_input_range.copy_(moving_range_default)
fake_quant_default_1 = qcompile.fake_quant(l_x_, [moving_range_default], 'int8.tensor.static', 'ste', True)

fake_quant_default = qcompile.fake_quant(%gate.weight, [], 'int8.row', 'ste', False)
fake_quant_default_1 = qcompile.fake_quant(l_x_, [gate_input_step], 'int8.tensor.static', 'lsq', True)""",
    )


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen2_moe"])
def test_every_weight_that_inference_quantizes_is_trained(trained, name):
    """Conv1D, experts in the forms that models write, shared inputs: all sites get their ops, and all weights their gradients."""
    model, inputs = tiny(name)
    model.train()
    out = torch.compile(model, backend="qcompile", options={"train": "qat", "lower": "eager", "recipe": "W4A8"})(**inputs)
    next(iter(out.values())).float().square().mean().backward()
    graph = trained[0]
    chosen = [s for s, c in graph.plan.items() if not isinstance(c, Skip)]
    assert len(chosen) == len(graph.kernels) > 2 and all("fake_quant" in k for k in graph.kernels.values())
    by_name = dict(model.named_parameters())
    assert all(by_name[graph.sites[s].param.path].grad is not None for s in chosen)


def test_defaults():
    def of(weight, x=None):
        return estimators(Scheme.parse(weight), Scheme.parse(x) if x else None, DEFAULTS)

    assert of("int4.g128") == ("lsq", "ste") and of("int8.row", "int8.row") == ("ste", "ste") and of("nf4.g64") == ("ste", "ste")
    assert of("int8.row", "int8.tensor.static") == ("ste", "lsq") and of("uint4.g128.point", "uint8.tensor.point.static") == ("ste", "ste")


def test_check():
    with pytest.raises(OptionError, match="recipe W4A16_AWQ is for inference: awq, sequential_mse"):
        TRAININGS["qat"].check(qcompile.find_recipe("W4A16_AWQ"), DEFAULTS)
    TRAININGS["qat"].check(Recipe("mine", "int4.g128", head="int8.row"), DEFAULTS)
