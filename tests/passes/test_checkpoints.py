"""Checkpointed bodies are written out in place, marked to be computed again; nested ones and several results, too."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.utils.checkpoint import checkpoint

from qcompile import compat
from qcompile.passes import PASSES
from qcompile.passes.infra import text


class Model(nn.Module):
    """Two bodies, one inside the other, with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def inner(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.b(x))
        return y, y + 1

    def outer(self, x: torch.Tensor) -> torch.Tensor:
        p, q = checkpoint(self.inner, self.a(x), use_reentrant=False)
        return p * q

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(self.outer, x, use_reentrant=False)


def captured(model: nn.Module, x: torch.Tensor) -> torch.fx.GraphModule:
    found = []
    torch.compile(model, backend=lambda gm, inputs: found.append(gm) or gm, fullgraph=True)(x)
    return compat.copy_graph(found[0])


def test_graph():
    model, x = Model(), torch.randn(3, 8, requires_grad=True)
    gm = captured(model, x)
    assert any(n.target is compat.checkpoint_op() for n in gm.graph.nodes)
    out = PASSES["checkpoints"](gm)
    assert_expected_inline(text(out).replace("l_self_modules_", "").replace("_parameters_", "_"), """\
inputs: l_x_: float32[3, 8], a_weight_: float32[8, 8], a_bias_: float32[8], b_weight_: float32[8, 8], b_bias_: float32[8]
linear = linear(l_x_, a_weight_, a_bias_)
linear_1 = linear(linear, b_weight_, b_bias_)
y = relu(linear_1)
add_1 = add(y, 1)
mul = mul(y, add_1)
add = add(l_x_, mul)
return (add,)""")
    marked = [n.name for n in out.graph.nodes if n.meta.get("recompute") is not None]
    assert len(marked) == len([n for n in out.graph.nodes if n.op in ("call_function", "call_method")]) - 1  # all but the sum at the end
    args = [p.meta["example_value"] for p in out.graph.find_nodes(op="placeholder")]
    assert len(args) == 5
    by_name = {"l_x_": x, **{f"l_self_modules_{n}_parameters_{k}_": getattr(getattr(model, n), k) for n in "ab" for k in ("weight", "bias")}}
    assert torch.allclose(out(*(by_name[p.name] for p in out.graph.find_nodes(op="placeholder")))[0], model(x))
