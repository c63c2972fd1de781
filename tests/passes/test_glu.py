"""Gate and up of one merged product and the activation between them become one op: the pattern, what is left alone and why, the same numbers. Whether a device has the kernel is patched."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured import LOWERED, captured, context
from expecttest import assert_expected_inline
from small import close
from torch import nn

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.passes import PASSES
from qcompile.passes.infra import run, text

GLU = sys.modules["qcompile.passes.glu"]  # the package's attribute of this name is the pass
NAMES = [*LOWERED[:-1], "merge", "lower", "glu"]
T = torch.Tensor


class Mlp(nn.Module):
    """``how(gate(x), up(x))``, then down."""

    def __init__(self, how: Callable[[T, T], T] = lambda g, u: F.silu(g) * u, bias: bool = False) -> None:
        super().__init__()
        self.how = how
        self.gate, self.up, self.down = nn.Linear(64, 48, bias=bias), nn.Linear(64, 48, bias=bias), nn.Linear(48, 64, bias=False)

    def forward(self, x: T) -> T:
        return self.down(self.how(self.gate(x), self.up(x)))


class Phi(nn.Module):
    """Gate and up are one linear, which the module cuts in two."""

    def __init__(self, order: int = 1, axis: int = -1) -> None:
        super().__init__()
        self.both, self.order, self.axis = nn.Linear(64, 96, bias=False), order, axis

    def forward(self, x: T) -> T:
        gate, up = self.both(x).chunk(2, dim=self.axis)[:: self.order]
        return up * F.silu(gate)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on the CPU, decisions of an H100."""
    monkeypatch.setattr(GLU, "device_of", lambda value: torch.device("cuda"))
    monkeypatch.setattr(compat, "capability", lambda device: (9, 0))


def after(model: nn.Module, x: T, recipe: str = "W8A8", dynamic: bool | None = None) -> torch.fx.GraphModule:
    torch._dynamo.reset()
    gm, args = captured(model, x, dynamic=dynamic)
    return run([PASSES[name] for name in NAMES], gm, context(gm, args, recipe))


def body(gm: torch.fx.GraphModule) -> str:
    return text(gm).partition("\n")[2].replace("l_self_modules_", "").replace("_parameters_weight_", "")


def half(*shape: int) -> T:
    return torch.randn(*shape, dtype=torch.bfloat16)


def test_dynamic_ranges(gpu):
    """One op, and the quantization of its row behind it."""
    assert_expected_inline(body(after(Mlp().bfloat16(), half(5, 64))), """\
quantize_default = qcompile.quantize(l_x_, [], 'int8.row')
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
linear_glu_default = qcompile.linear_glu(getitem, [getitem_1], [gate_codes, gate_scale], 'int8.row @ int8.row', 'silu', True)  # gate: int8.row @ int8.row
mul = linear_glu_default.to(bfloat16)
quantize_default_1 = qcompile.quantize(mul, [], 'int8.row')
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
scaled_linear_default_1 = qcompile.scaled_linear(getitem_2, [getitem_3], [down_codes, down_scale], 'int8.row @ int8.row')  # down: int8.row @ int8.row
linear_2 = scaled_linear_default_1.to(bfloat16)
return (linear_2,)""")


def test_static_ranges(gpu):
    """Gate and up are merged though down's quantization follows: it is in the op's store."""
    gm = after(Mlp().bfloat16(), half(2, 5, 64), "W8A8_STATIC")
    assert gm.meta["merged"] == {"gate": ("gate", "up"), "up": ("gate", "up")}
    assert_expected_inline(body(gm), """\
quantize_default = qcompile.quantize(l_x_, [gate_range], 'int8.tensor.static')
getitem = getitem(quantize_default, 0)
linear_glu_default = qcompile.linear_glu(getitem, [gate_range], [gate_codes, gate_scale], 'int8.tensor.static @ int8.row', 'silu', True)  # gate: int8.tensor.static @ int8.row
mul = linear_glu_default.to(bfloat16)
quantize_default_1 = qcompile.quantize(mul, [down_range], 'int8.tensor.static')
getitem_1 = getitem(quantize_default_1, 0)
scaled_linear_default_1 = qcompile.scaled_linear(getitem_1, [down_range], [down_codes, down_scale], 'int8.tensor.static @ int8.row')  # down: int8.tensor.static @ int8.row
linear_2 = scaled_linear_default_1.to(bfloat16)
return (linear_2,)""")


def test_16_bit_activations_and_up_first(gpu):
    model = Mlp(lambda g, u: g * F.gelu(u, approximate="tanh")).bfloat16()
    assert_expected_inline(body(after(model, half(5, 64), "W4A16")), """\
linear_glu_default = qcompile.linear_glu(l_x_, [], [gate_codes, gate_scale], 'int4.g128', 'gelu_tanh', False)  # gate: int4.g128
mul = linear_glu_default.to(bfloat16)
linear_default_1 = qcompile.linear(mul, [down_codes, down_scale], 'int4.g128')  # down: int4.g128
linear_2 = linear_default_1.to(bfloat16)
return (linear_2,)""")


def test_a_linear_that_its_module_cuts_in_two(gpu):
    gm = after(Phi().bfloat16(), half(2, 5, 64), "W8A8")
    assert gm.meta["glu"] == {"both": "silu"} and gm.meta["kernels"] == {"both": "triton stream, gated"}
    assert_expected_inline(body(gm), """\
quantize_default = qcompile.quantize(l_x_, [], 'int8.row')
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
linear_glu_default = qcompile.linear_glu(getitem, [getitem_1], [both_codes, both_scale], 'int8.row @ int8.row', 'silu', True)  # both: int8.row @ int8.row
mul = linear_glu_default.to(bfloat16)
return (mul,)""")
    assert "'silu', False)" in body(after(Phi(-1).bfloat16(), half(2, 5, 64), "W8A8"))


@pytest.mark.parametrize("recipe", ["W8A8_SMOOTHQUANT_STATIC", "W4A16_AWQ"])
def test_the_vector_of_the_next_input_multiplies_behind_the_op(gpu, built, recipe):
    """It stood between up and the product; in float32 there is no difference."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.RMSNorm(64), Mlp()

        def forward(self, x: T) -> T:
            return self.mlp(self.norm(x))

    with torch.no_grad():
        torch.compile(Normed().bfloat16(), backend="qcompile", options={"recipe": recipe, "lower": "eager"})(half(2, 5, 64))
    lines = text(built[-1].lowered).splitlines()
    at = next(i for i, line in enumerate(lines) if "linear_glu(" in line)
    y, scaled, cast = (line.partition(" = ") for line in lines[at : at + 3])
    assert scaled[2].startswith(f"mul({y[0]}, ") and scaled[2].endswith("_smooth)") and cast[2] == f"{scaled[0]}.to(bfloat16)"
    assert built[-1].lowered.meta["glu"] == {"mlp.gate": "silu"}


FOUND = {
    "silu": (lambda g, u: F.silu(g) * u, "silu"), "in place": (lambda g, u: F.silu(g, inplace=True) * u, "silu"), "gelu": (lambda g, u: F.gelu(g) * u, "gelu"),
    "gelu tanh": (lambda g, u: u * nn.GELU("tanh")(g), "gelu_tanh"), "relu": (lambda g, u: torch.mul(g.relu(), u), "relu"), "sigmoid": (lambda g, u: torch.sigmoid(g) * u, "sigmoid"),
    "relu squared": (lambda g, u: F.relu(g).square() * u, "relu_squared"), "pow": (lambda g, u: torch.relu(g).pow(2) * u, "relu_squared"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("recipe", ["W8A8", "W4A16"])
def test_activations(gpu, name, recipe):
    """Found, and the same function as before, but for the rounding of gate and up that is gone."""
    model, x = Mlp(FOUND[name][0]).bfloat16(), half(3, 5, 64)
    gm = after(model, x, recipe)
    assert gm.meta["glu"] == {"gate": FOUND[name][1]}
    assert gm.meta["kernels"]["gate"] == gm.meta["kernels"]["up"] == "triton stream, gated" != gm.meta["kernels"]["down"]


LEFT = {
    "tanh": lambda g, u: torch.tanh(g) * u, "written out": lambda g, u: g * torch.sigmoid(1.7 * g) * u, "gate read twice": lambda g, u: F.silu(g) * u + g, "no activation": lambda g, u: g * u,
    "up behind something": lambda g, u: F.silu(g) * (u + 1), "activation read twice": lambda g, u: F.silu(g) * u + F.silu(g), "twice": lambda g, u: F.silu(g) * u * u,
    "part of up": lambda g, u: F.silu(g)[..., :24] * u[..., :24], "sum": lambda g, u: F.silu(g) + u,
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(gpu, name):
    gm = after(Mlp(LEFT[name]).bfloat16() if name != "part of up" else Mlp(lambda g, u: F.pad(LEFT[name](g, u), (0, 24))).bfloat16(), half(5, 64))
    assert "linear_glu" not in text(gm)
    assert [str(a) for a in gm.meta["glu"].values()] == (["tanh is none of silu, gelu, gelu_tanh, relu, relu_squared, sigmoid"] if name == "tanh" else [])


REFUSED = [
    ("W4A16", 300, torch.bfloat16, "a product of 300 rows is left to dequantize + cuBLAS"), ("FP8", 300, torch.bfloat16, "a product of 300 rows is left to cuBLAS FP8"),
    ("W4A16", 5, torch.float32, "activations are torch.float32"), ("W3A16_AWQ_GPTQ", 5, torch.bfloat16, "codes of 3 bits are not streamed"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "rows", "dtype", "reason"), REFUSED)
def test_refusals(gpu, recipe, rows, dtype, reason):
    """The product stays, merged, and the reason is kept."""
    model = Mlp().to(dtype)
    if recipe.startswith("W3"):
        from qcompile.core.recipe import Recipe

        recipe = Recipe("three", "int3.g64", None, ())
    gm = after(model, torch.randn(rows, 64, dtype=dtype), recipe)
    assert "linear_glu" not in text(gm) and str(gm.meta["glu"]["gate"]) == reason and isinstance(gm.meta["glu"]["gate"], Skip)
    assert set(gm.meta["merged"]) == {"gate", "up"}


def test_other_devices_keep_the_product():
    gm = after(Mlp().bfloat16(), half(5, 64))
    assert "linear_glu" not in text(gm) and "on cpu" in str(gm.meta["glu"]["gate"]) and set(gm.meta["merged"]) == {"gate", "up"}
    static = after(Mlp().bfloat16(), half(5, 64), "W8A8_STATIC")
    assert static.meta["merged"] == {} and "is in its store" in str(static.meta["unmerged"]["gate"])


def test_biases_keep_the_products_apart(gpu):
    gm = after(Mlp(bias=True).bfloat16(), half(5, 64))
    assert "linear_glu" not in text(gm) and "bias" in str(gm.meta["unmerged"]["gate"])


@pytest.mark.parametrize(("rows", "fused"), [(5, True), (64, True), (65, False), (257, False)])
def test_a_dynamic_number_of_rows_is_guarded(gpu, rows, fused):
    """One graph for each of three regimes; the guard is Dynamo's to check."""
    model = Mlp().bfloat16()
    gm, args = captured(model, half(rows, 64), dynamic=True)
    env = gm.meta["test_fake_mode"].shape_env
    gm = run([PASSES[name] for name in NAMES], gm, context(gm, args, "W4A16"))
    assert ("linear_glu" in text(gm)) is fused
    assert any(str(64 if rows <= 64 else 256) in str(guard.expr) for guard in env.guards)


def test_q_and_k_of_the_same_input_are_not_in_the_pair(gpu):
    """A parallel block: gate and up are a product of their own, the others another."""

    class Parallel(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)

        def forward(self, x: T) -> T:
            return super().forward(x) + (self.q(x) + self.k(x)).mean()

    gm = after(Parallel().bfloat16(), half(5, 64))
    assert set(gm.meta["merged"].values()) == {("gate", "up"), ("q", "k")} and gm.meta["glu"] == {"gate": "silu"}


@pytest.mark.parametrize("recipe", ["W8A8", "W8A8_STATIC", "W4A16", "NF4", "FP8"])
@pytest.mark.parametrize("name", ["silu", "gelu tanh", "relu squared"])
def test_the_same_numbers(gpu, monkeypatch, recipe, name):
    """Through the whole backend, by references: no further from the graph without the pass than a rounding to 16 bits."""
    model, x = Mlp(FOUND[name][0]).bfloat16(), half(3, 5, 64)
    out = {}
    for on in (True, False):
        torch._dynamo.reset()
        if not on:
            monkeypatch.setattr(GLU, "device_of", compat.device_of)
        with torch.no_grad():
            out[on] = torch.compile(model, backend="qcompile", options={"recipe": recipe, "lower": "eager"})(x)
    assert close(out[True].float(), out[False].float(), 2e-2)


@pytest.mark.parametrize("recipe", ["W8A8", "W4A16"])
def test_where_there_is_no_kernel_the_product_is_one_of_its_own(gpu, recipe):
    """The op in a graph for a CPU, through Inductor: its product has the CPU's kernel."""
    model, x = Mlp().bfloat16(), half(2, 3, 64)
    out = []
    for lower in ("inductor", "eager"):
        torch._dynamo.reset()
        with torch.no_grad():
            out.append(torch.compile(model, backend="qcompile", options={"recipe": recipe, "lower": lower})(x))
    assert close(out[0].float(), out[1].float(), 2e-2)


def test_explain_has_a_row_for_each(gpu):
    import qcompile

    model, x = Mlp().bfloat16(), half(5, 64)
    fast = torch.compile(model, backend="qcompile", options={"lower": "eager"})
    with torch.no_grad():
        fast(x)
        qcompile.release_weights(model)
    assert {row.name: row.rows for row in qcompile.explain(fast, x).sites} == {"gate": 5, "up": 5, "down": 5}
