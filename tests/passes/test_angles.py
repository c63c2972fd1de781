"""Sines and cosines that several kernels read are stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.compat import force_stride_order
from qcompile.passes.angles import angles


def rotated(angle: Tensor, *heads: Tensor) -> list[Tensor]:
    """What a rotary embedding does to (B, H, S, D) heads, of (1, S, D) angles."""
    cos, sin = angle.cos().mul(0.5).to(torch.bfloat16).unsqueeze(1), angle.sin().to(torch.bfloat16).unsqueeze(1)
    return [x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin for x in heads]


def heads(count: int = 2, rows: int = 6) -> list[Tensor]:
    return [torch.randn(2, 3, rows, 16, dtype=torch.bfloat16) for _ in range(count)]


def traced(function, *args):
    """The graph that post-grad passes see."""
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*args)


def pinned(function, *args) -> list[tuple[str, list[int]]]:
    """What is pinned: the op whose value it is, and its strides."""
    gm = traced(function, *args)
    angles(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for got, wanted in zip(gm(*args), function(*args), strict=True):
        assert torch.equal(got, wanted)
    return [(str(node.args[0].target), node.args[1]) for node in gm.graph.find_nodes(op="call_function", target=force_stride_order())]


def test_the_graph() -> None:
    gm = traced(rotated, torch.randn(1, 6, 16), *heads())
    angles(gm.graph)
    assert_expected_inline(
        "\n".join(str(node.target) + " " + ", ".join(map(str, node.args)) for node in gm.graph.nodes if node.op == "call_function")[:520],
        """\
aten.cos.default arg0_1
aten.mul.Tensor cos, 0.5
prims.convert_element_type.default mul, torch.bfloat16
prims.inductor_force_stride_order.default convert_element_type, [96, 16, 1]
aten.unsqueeze.default inductor_force_stride_order_default, 1
aten.sin.default arg0_1
prims.convert_element_type.default sin, torch.bfloat16
prims.inductor_force_stride_order.default convert_element_type_1, [96, 16, 1]
aten.unsqueeze.default inductor_force_stride_order_default_1, 1
aten.mul.Tensor arg1_1, unsqueeze
aten.slice.Tensor arg1_""",
    )


def test_both_are_pinned_behind_their_casts() -> None:
    assert pinned(rotated, torch.randn(1, 6, 16), *heads()) == [("prims.convert_element_type.default", [96, 16, 1])] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_of_one_term_is_one_of_elements(dtype: torch.dtype) -> None:
    def targets(product: Callable[[Tensor, Tensor], Tensor], *batch: int, k: int) -> list[object]:
        a, b = torch.randn(*batch, 5, k, dtype=dtype), torch.randn(*batch, k, 7, dtype=dtype)
        gm = make_fx(product, tracing_mode="fake")(a, b)
        angles(gm.graph)
        gm.recompile()
        assert torch.equal(gm(a, b), product(a, b))
        return [node.target for node in gm.graph.nodes if node.op == "call_function"]

    aten = torch.ops.aten
    assert targets(torch.bmm, 2, k=1) == targets(torch.mm, k=1) == [aten.mul.Tensor]
    assert targets(torch.bmm, 2, k=2) == [aten.bmm.default] and targets(torch.mm, k=2) == [aten.mm.default]


def test_what_has_one_reader_or_is_no_angle_stays() -> None:
    assert not pinned(rotated, torch.randn(1, 6, 16), *heads(1))
    assert not pinned(lambda x, y: [x.exp() * y, x.exp() + y], torch.randn(4), torch.randn(4))
    assert len(pinned(lambda x, y: [x.cos() * y, x.cos() + y], torch.randn(4), torch.randn(4))) == 0  # two nodes, each with a reader
    assert len(pinned(lambda x, y: (lambda c: [c * y, c + y])(x.cos()), torch.randn(4), torch.randn(4))) == 1


class Rotary(nn.Module):
    """Two linears in a row, each behind a rotation by the same angles."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        for linear in (self.first, self.second):
            x = linear(x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin)
        return x


@pytest.mark.parametrize(("batch", "axis", "once"), [(1, None, True), (1, 1, True), (2, 1, False)])
def test_a_compiled_model_computes_each_once(batch: int, axis: int | None, once: bool) -> None:
    """Also where the number of rows is symbolic, unless the strides would be: those of a batch of angles."""
    torch._dynamo.reset()
    model, x, angle = Rotary().eval(), torch.randn(2, 6, 16), torch.randn(batch, 6, 16)
    if axis is not None:
        torch._dynamo.mark_dynamic(x, axis)
        torch._dynamo.mark_dynamic(angle, axis)
    with torch.no_grad():
        fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A16"})
        y, (code,) = run_and_get_code(fast, x, angle)
        exact = model(x, angle)
        assert float((y - exact).norm() / exact.norm()) < 0.02
    assert (sum("cos()" in part or "std::cos" in part for part in code.split("cpp_pybinding")) == 1) == once
