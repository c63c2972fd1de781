"""Counters that step on together."""

from __future__ import annotations

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from qcompile.passes.counters import counters

ATEN = torch.ops.aten


def graph_of(*steps: tuple[object, torch.Tensor], read: bool = False) -> fx.Graph:
    """Inputs that each gain a step, as AOTAutograd writes it: the sums, then their copies back. ``read``: the first sum is returned, too."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"count{i}") for i in range(len(steps))]
    sums = []
    for node, (step, value) in zip(inputs, steps):
        node.meta["val"] = value
        sums.append(graph.call_function(ATEN.add.Tensor, (node, step)))
        sums[-1].meta["val"] = value + step
    copies = [graph.call_function(ATEN.copy_.default, (node, added)) for node, added in zip(inputs, sums)]
    graph.output((copies[0], sums[0]) if read else (copies[0],))
    return graph


def zero(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def targets(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_counters_of_a_step_are_joined() -> None:
    graph = graph_of((1, zero()), (2, zero(1)), (1, zero(3, dtype=torch.int32)), (1, zero()))
    counters(graph)
    graph.lint()
    assert_expected_inline(
        str(graph).strip(),
        """\
graph():
    %count0 : [num_users=2] = placeholder[target=count0]
    %count1 : [num_users=2] = placeholder[target=count1]
    %count2 : [num_users=2] = placeholder[target=count2]
    %count3 : [num_users=2] = placeholder[target=count3]
    %add_tensor_1 : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%count1, 2), kwargs = {})
    %_foreach_sub_scalar : [num_users=3] = call_function[target=torch.ops.aten._foreach_sub.Scalar](args = ([%count0, %count2, %count3], -1), kwargs = {})
    %getitem : [num_users=1] = call_function[target=operator.getitem](args = (%_foreach_sub_scalar, 0), kwargs = {})
    %getitem_1 : [num_users=1] = call_function[target=operator.getitem](args = (%_foreach_sub_scalar, 1), kwargs = {})
    %getitem_2 : [num_users=1] = call_function[target=operator.getitem](args = (%_foreach_sub_scalar, 2), kwargs = {})
    %copy__default : [num_users=1] = call_function[target=torch.ops.aten.copy_.default](args = (%count0, %getitem), kwargs = {})
    %copy__default_1 : [num_users=0] = call_function[target=torch.ops.aten.copy_.default](args = (%count1, %add_tensor_1), kwargs = {})
    %copy__default_2 : [num_users=0] = call_function[target=torch.ops.aten.copy_.default](args = (%count2, %getitem_1), kwargs = {})
    %copy__default_3 : [num_users=0] = call_function[target=torch.ops.aten.copy_.default](args = (%count3, %getitem_2), kwargs = {})
    return (copy__default,)""",
    )
    values = [torch.tensor(5), torch.tensor([5]), torch.arange(3, dtype=torch.int32), torch.tensor(7)]
    fx.Interpreter(fx.GraphModule({}, graph)).run(*values)
    assert [v.tolist() for v in values] == [6, [7], [1, 2, 3], 8]


@pytest.mark.parametrize(
    "steps",
    [
        [(1, zero()), (2, zero())],  # other steps
        [(1, zero(17)), (1, zero(17))],  # more than a few numbers
        [(1, zero(dtype=torch.float32)), (1, zero(dtype=torch.float32))],
        [(1.5, zero(dtype=torch.float32)), (1.5, zero(dtype=torch.float32))],
        [(True, zero(dtype=torch.bool)), (True, zero(dtype=torch.bool))],
    ],
)
def test_others_are_left_alone(steps: list[tuple[object, torch.Tensor]]) -> None:
    graph = graph_of(*steps)
    before = str(graph)
    counters(graph)
    assert str(graph) == before


def test_a_sum_that_is_read_stays() -> None:
    graph = graph_of((1, zero()), (1, zero()), (1, zero()), read=True)
    counters(graph)
    assert targets(graph).count(ATEN.add.Tensor) == 1 and targets(graph).count(operator.getitem) == 2


class Counting(nn.Module):
    """Layers that count their calls, and read their counts before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        for i in range(4):
            self.register_buffer(f"count{i}", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(4):
            count = getattr(self, f"count{i}")
            x = self.fc(x) + count
            count.add_(2)
        return x + self.count3


def test_counts_are_right_when_compiled() -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    x = torch.randn(3, 64)
    fast, plain = torch.compile(model, backend="qcompile", options={"recipe": "W8A16"}), torch.compile(model, backend="qcompile", options={"recipe": "W8A16", "lower": "eager"})
    with torch.no_grad():
        for calls in range(1, 4):
            before = {name: count.clone() for name, count in model.named_buffers()}
            y = fast(x)
            assert [int(count) for count in model.buffers()] == [2 * calls] * 4
            model.load_state_dict(before, strict=False)
            torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
