"""The view behind a product sinks below pointwise ops; what needs three dimensions keeps them; the function stays. Then the 16-bit value behind a product owns its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.core.qtensor import quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels.op import target
from qcompile.passes.flatten import RESHAPES, flatten
from qcompile.passes.infra import text
from qcompile.passes.narrow import narrow

B, S, K, N = 2, 3, 32, 16
aten = torch.ops.aten
cast = torch.ops.prims.convert_element_type


def inputs() -> tuple[Tensor, ...]:
    """x (B, S, K), codes, scale, bias (N,), residual (B, S, N)."""
    return torch.randn(B, S, K), *quantize(torch.randn(N, K), Scheme.parse("int8.row")).flatten(), torch.randn(N), torch.randn(B, S, N)


def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """What a linear on (B, S, K) looks like after AOTAutograd."""
    return target("linear")(x.reshape(-1, x.shape[-1]), [codes, scale], "int8.row").reshape(*x.shape[:-1], codes.shape[0])


def traced(fn, *args) -> fx.GraphModule:
    return make_fx(fn, tracing_mode="fake")(*args)


def flattened(fn, *args) -> fx.GraphModule:
    """The graph after the pass; its outputs are compared with those before."""
    before, gm = traced(fn, *args), traced(fn, *args)
    flatten(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for a, b in zip(torch.utils._pytree.tree_leaves(before(*args)), torch.utils._pytree.tree_leaves(gm(*args)), strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    return gm


def dims(gm: fx.GraphModule) -> dict[str, int]:
    """Dimensions of the values that pointwise ops make."""
    return {n.target._opname: n.meta["val"].dim() for n in gm.graph.nodes if n.op == "call_function" and torch.Tag.pointwise in n.target.tags}


def test_bias_activation_residual():
    def fn(x, codes, scale, b, residual):
        return F.relu(product(x, codes, scale) + b) * 0.5 + residual

    assert_expected_inline(
        text(flattened(fn, *inputs())),
        """\
inputs: x_1: float32[2, 3, 32], codes_1: int8[16, 32], scale_1: float32[16, 1], b_1: float32[16], residual_1: float32[2, 3, 16]
view = aten.view(x_1, [-1, 32])
linear = qcompile.linear(view, [codes_1, scale_1], 'int8.row')
add_tensor = aten.add.Tensor(linear, b_1)
relu_default = aten.relu(add_tensor)
mul_tensor = aten.mul.Tensor(relu_default, 0.5)
reshape_default = aten.reshape(residual_1, [-1, 16])
add_tensor_1 = aten.add.Tensor(mul_tensor, reshape_default)
reshape_default_1 = aten.reshape(add_tensor_1, [2, 3, 16])
return reshape_default_1""",
    )


CHAINS = {
    "bias": lambda y, b, r: y + b,
    "bias of three dimensions": lambda y, b, r: y * b.reshape(1, 1, N),
    "column of rows": lambda y, b, r: y * r[..., :1],
    "scalar tensor": lambda y, b, r: (y / b[0]).round().clamp(-128, 127).to(torch.int8),
    "gelu": lambda y, b, r: F.gelu(y + b, approximate="tanh") + r,
    "written gelu": lambda y, b, r: 0.5 * y * (1.0 + torch.tanh(0.79 * (y + 0.04 * torch.pow(y, 3.0)))),
    "where": lambda y, b, r: torch.where(y > 0, y, r),
    "residual twice": lambda y, b, r: (y + r) * torch.sigmoid(r),
    "casts": lambda y, b, r: cast(cast(y + b, torch.float16) + r, torch.float32),
    "transposed residual": lambda y, b, r: y + r.transpose(0, 1).contiguous().transpose(0, 1),
    "view behind": lambda y, b, r: (y + b).reshape(B * S, N).exp(),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_two_dimensional_and_mean_the_same(name):
    gm = flattened(lambda x, codes, scale, b, r: CHAINS[name](product(x, codes, scale), b, r), *inputs())
    joined = dims(gm)
    assert joined and all(d == 2 for op, d in joined.items() if op not in ("clone", "sigmoid")), joined  # these two read the residual, not the product


def test_several_users():
    """A reduction and an output read the view; two chains and a product go on in two dimensions."""

    def fn(x, codes, scale, b, residual):
        y = product(x, codes, scale) + b
        return y.mean(-1), torch.relu(y), torch.exp(y) + residual, y.transpose(1, 2)

    gm = flattened(fn, *inputs())
    assert dims(gm) == {"add": 2, "relu": 2, "exp": 2}
    assert_expected_inline(
        text(gm),
        """\
inputs: x_1: float32[2, 3, 32], codes_1: int8[16, 32], scale_1: float32[16, 1], b_1: float32[16], residual_1: float32[2, 3, 16]
view = aten.view(x_1, [-1, 32])
linear = qcompile.linear(view, [codes_1, scale_1], 'int8.row')
add_tensor = aten.add.Tensor(linear, b_1)
reshape_default_1 = aten.reshape(add_tensor, [2, 3, 16])
mean = aten.mean.dim(reshape_default_1, [-1])
relu_default = aten.relu(add_tensor)
reshape_default_2 = aten.reshape(relu_default, [2, 3, 16])
exp_default = aten.exp(add_tensor)
reshape_default = aten.reshape(residual_1, [-1, 16])
add_tensor_1 = aten.add.Tensor(exp_default, reshape_default)
reshape_default_3 = aten.reshape(add_tensor_1, [2, 3, 16])
transpose = aten.transpose.int(reshape_default_1, 1, 2)
return (mean, reshape_default_2, reshape_default_3, transpose)""",
    )


def test_two_products_in_one_chain():
    """silu(gate) * up: what one region reads of the other is taken without a view."""

    def fn(x, codes, scale, b, residual):
        return F.silu(product(x, codes, scale)) * product(x + 1, codes, scale)

    gm = flattened(fn, *inputs())
    assert {d for op, d in dims(gm).items() if op != "add"} == {2}


def test_four_dimensions():
    def fn(x, codes, scale, b):
        return (product(x, codes, scale) + b).relu().movedim(-1, 1)

    args = inputs()
    gm = flattened(fn, torch.randn(2, 3, 2, K), *args[1:4])
    assert set(dims(gm).values()) == {2}


ALONE = {
    "reduction": lambda y, b, r: y.sum(-1),
    "row of positions": lambda y, b, r: y + r[0],  # (S, N) repeats over the batch
    "one of the batch": lambda y, b, r: y + r[:1],
    "transpose": lambda y, b, r: y.transpose(1, 2) + r.transpose(1, 2),
    "heads": lambda y, b, r: y.reshape(B, S, 4, 4) * 2,
    "softmax": lambda y, b, r: torch.softmax(y, -1),
    "concatenation": lambda y, b, r: torch.cat([y, r], 1),
}


@pytest.mark.parametrize("name", ALONE)
def test_left_alone(name):
    def fn(x, codes, scale, b, r):
        return ALONE[name](product(x, codes, scale), b, r)

    args = inputs()
    assert text(flattened(fn, *args)) == text(traced(fn, *args))


def test_a_chain_ends_where_it_must():
    def fn(x, codes, scale, b, residual):
        return (product(x, codes, scale) + b).relu() + residual[0]

    gm = flattened(fn, *inputs())
    assert [n.meta["val"].dim() for n in gm.graph.nodes if n.target in (aten.add.Tensor, aten.relu.default)] == [2, 2, 3]


def test_other_products_are_none_of_ours():
    def fn(x, w):
        return (x.reshape(-1, K) @ w).reshape(B, S, N).relu()

    args = torch.randn(B, S, K), torch.randn(K, N)
    assert text(flattened(fn, *args)) == text(traced(fn, *args))


def test_a_dynamic_batch():
    def fn(x, codes, scale, b, residual):
        return F.gelu(product(x, codes, scale) + b) + residual

    args = inputs()
    gm = make_fx(fn, tracing_mode="symbolic")(*args)
    flatten(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert {d for op, d in dims(gm).items() if op not in ("mul",)} == {2}
    x, residual = torch.randn(5, S, K), torch.randn(5, S, N)
    assert torch.equal(gm(x, *args[1:4], residual), fn(x, *args[1:4], residual))


def test_nothing_dead_is_left():
    gm = flattened(lambda x, codes, scale, b, r: (product(x, codes, scale) + b + r).reshape(-1, N).exp(), *inputs())
    assert all(n.users for n in gm.graph.nodes if n.op == "call_function")
    assert [n.target for n in gm.graph.nodes].count(aten.exp.default) == 1
    assert not any(n.target in RESHAPES and n.meta["val"].dim() == 3 for n in gm.graph.nodes if n.op == "call_function")


def half(x, codes, scale, b):
    y = target("linear")(x, [codes, scale], "int8.row")
    return torch.ops.prims.convert_element_type(y + b, torch.bfloat16).relu()


def test_narrow():
    """A cast behind a product, or behind its bias, is pinned, off the CPU."""
    args = torch.randn(4, K), *inputs()[1:4]
    gm = make_fx(half)(*(a.to("meta") for a in args))
    narrow(gm.graph)
    gm.recompile()
    assert torch.equal(gm(*args), half(*args))
    assert_expected_inline(
        text(gm).partition("\n")[2],
        """\
linear = qcompile.linear(x_1, [codes_1, scale_1], 'int8.row')
add = aten.add.Tensor(linear, b_1)
convert_element_type = prims.convert_element_type(add, bfloat16)
inductor_force_stride_order_default = prims.inductor_force_stride_order(convert_element_type, [16, 1])
relu = aten.relu(inductor_force_stride_order_default)
return relu""",
    )


def test_narrow_leaves_alone():
    """On the CPU, where the float32 value has other readers, where a residual comes before the cast, and float32 models."""
    args = torch.randn(4, K), *inputs()[1:4]
    meta = [a.to("meta") for a in args]

    def shared(x, codes, scale, b):
        y = target("linear")(x, [codes, scale], "int8.row")
        return y.sum(), torch.ops.prims.convert_element_type(y, torch.bfloat16)

    def residual(x, codes, scale, b):
        return torch.ops.prims.convert_element_type(target("linear")(x, [codes, scale], "int8.row") + x[:, :N], torch.bfloat16)

    def double(x, codes, scale, b):
        return torch.ops.prims.convert_element_type(target("linear")(x, [codes, scale], "int8.row"), torch.float64)

    for fn, given in ((half, args), (shared, meta), (residual, meta), (double, meta)):
        gm = make_fx(fn)(*given)
        before = text(gm)
        narrow(gm.graph)
        assert text(gm) == before
