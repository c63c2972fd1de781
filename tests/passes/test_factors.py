"""Vectors of some columns of a merged product: part of its store, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from qcompile.passes import PASSES
from qcompile.passes.infra import text

SIZES = (6, 2, 4)
"""Rows of q, k and v."""


def lowered(*, vector: str = "v", cast: bool = True, more: bool = False, bias: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """What ``lower`` leaves: a product, with ``bias`` biases, cast once, its columns, one of them times a vector of float32 and cast back."""
    torch.manual_seed(0)
    values = {"x": torch.randn(3, 5).to(dtype), "codes": torch.randint(-8, 8, (sum(SIZES), 5), dtype=torch.int8), "scale": torch.rand(sum(SIZES), 1), "s": torch.rand(8) + 0.5}
    values |= {f"b{i}": torch.randn(sum(SIZES)) for i in range(bias)}
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in values}
    for name, value in values.items():
        nodes[name].meta["example_value"] = value
    y = graph.call_function(torch.ops.qcompile.linear.default, (nodes["x"], [nodes["codes"], nodes["scale"]], "int8.row"))
    y.meta["example_value"] = torch.empty(3, sum(SIZES))
    for i in range(bias):
        y = graph.call_function(torch.add, (y, nodes[f"b{i}"]))
        y.meta["example_value"] = torch.empty(3, sum(SIZES))
    whole = graph.call_method("to", (y, dtype))
    whole.meta["example_value"] = torch.empty(3, sum(SIZES), dtype=dtype)
    parts = []
    for i, n in enumerate(SIZES):
        parts.append(graph.call_function(torch.narrow, (whole, -1, sum(SIZES[:i]), n)))
        parts[-1].meta["example_value"] = torch.empty(3, n, dtype=dtype)
    s = graph.call_method("narrow", (nodes["s"], 0, 2, SIZES["qkv".index(vector)]))
    s.meta["example_value"] = torch.empty(SIZES["qkv".index(vector)])
    part = parts["qkv".index(vector)]
    scaled = graph.call_function(torch.mul, (part, s))
    scaled.meta["example_value"] = torch.empty(part.meta["example_value"].shape)
    if cast:
        scaled = graph.call_method("to", (scaled, dtype))
        scaled.meta["example_value"] = part.meta["example_value"]
    outs = [scaled if p is part else p for p in parts]
    graph.output(tuple([*outs, graph.call_function(torch.neg, (part,))] if more else outs))
    return fx.GraphModule(nn.Module(), graph), values


@pytest.mark.parametrize("vector", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [0, 1])
def test_the_whole_product_takes_the_vector(vector: str, bias: int, dtype: torch.dtype) -> None:
    """Behind the biases, which v's vector multiplies, too."""
    gm, values = lowered(vector=vector, bias=bias, dtype=dtype)
    before = gm(*values.values())
    PASSES["factors"].fn(gm, None)
    gm.graph.lint()
    gm.recompile()
    after = gm(*values.values())
    for name, a, b in zip("qkv", before, after, strict=True):
        if name == vector:  # rounded once, where it was twice
            torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(a, b)
    assert [n.target for n in gm.graph.nodes if n.target is torch.mul] == [torch.mul] and gm.meta["note"] == "1 merged products take a vector"


def test_graph() -> None:
    from expecttest import assert_expected_inline

    gm, _ = lowered()
    PASSES["factors"].fn(gm, None)
    assert_expected_inline(text(gm).split("\n", 1)[1], """\
linear_default = qcompile.linear(x, [codes, scale], 'int8.row')
new_ones = linear_default.new_ones((6,))
new_ones_1 = linear_default.new_ones((2,))
narrow_4 = s.narrow(0, 2, 4)
cat = cat([new_ones, new_ones_1, narrow_4])
mul_1 = mul(linear_default, cat)
to = mul_1.to(bfloat16)
narrow = narrow(to, -1, 0, 6)
narrow_1 = narrow(to, -1, 6, 2)
narrow_2 = narrow(to, -1, 8, 4)
return (narrow, narrow_1, narrow_2)""")


@pytest.mark.parametrize("case", [{"more": True}, {"cast": False}, {"bias": 2}])
def test_columns_that_something_else_reads_stay(case: dict[str, bool]) -> None:
    """Also where nothing rounds behind the vector: then the product of columns has another dtype. Two sums are not what ``lower`` leaves."""
    gm, _ = lowered(**case)
    before = text(gm)
    PASSES["factors"].fn(gm, None)
    assert text(gm) == before and gm.meta["note"] == "0 merged products take a vector"
