"""Values that no input decides: which graphs have them, and which masks are causal."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from qcompile.passes.constant import LARGEST, constant, is_causal

S = 5
TRIL = torch.ones(S, S, dtype=torch.bool).tril()


def graph_of(build: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return build(graph, x)


def positions(graph: fx.Graph) -> fx.Node:
    return graph.call_function(torch.arange, (S,))


def causal(graph: fx.Graph, _: fx.Node) -> fx.Node:
    at = positions(graph)
    rows, columns = graph.call_method("unsqueeze", (at, 1)), graph.call_method("unsqueeze", (at, 0))
    return graph.call_function(operator.le, (columns, rows))


def test_a_mask_of_positions() -> None:
    assert torch.equal(constant(graph_of(causal)), TRIL)


UNKNOWN: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "an input": lambda g, x: g.call_function(operator.and_, (causal(g, x), x)),
    "a parameter": lambda g, x: g.call_function(operator.and_, (causal(g, x), g.get_attr("weight"))),
    "chance": lambda g, x: g.call_function(operator.lt, (g.call_function(torch.rand, (S, S)), 2.0)),
    "memory as it is": lambda g, x: g.call_function(torch.empty, (S, S)),
}


@pytest.mark.parametrize("why", UNKNOWN)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
def test_unknown(why: str) -> None:
    assert constant(graph_of(UNKNOWN[why])) is None


@pytest.mark.parametrize("write", ["setitem", "fill_"])
def test_what_is_written_to_is_unknown(write: str) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        value = causal(graph, x)
        graph.call_function(operator.setitem, (value, 0, True)) if write == "setitem" else graph.call_method("fill_", (value, True))
        return value

    assert constant(graph_of(build)) is None


def test_large_values_are_not_computed() -> None:
    node = graph_of(causal)
    node.meta["example_value"] = torch.empty(LARGEST + 1, device="meta")
    assert constant(node) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (TRIL, True), (TRIL[None, None].expand(2, 1, S, S), True), (torch.zeros(S, S).masked_fill(~TRIL, -math.inf), True), (torch.zeros(S, S).masked_fill(~TRIL, torch.finfo(torch.float32).min), True),
        (torch.zeros(S, S, dtype=torch.bfloat16).masked_fill(~TRIL, torch.finfo(torch.bfloat16).min), True), (torch.zeros(S, S).masked_fill(~TRIL, -1e4), False), (torch.zeros(S, S), False),
        (torch.ones(S, S, dtype=torch.bool), False), (TRIL.triu(-2), False), (TRIL.T, False), (TRIL[:-1], False), (TRIL.int(), False), (torch.zeros(S, S).masked_fill(~TRIL, math.nan), False),
        (None, False), (3, False), (TRIL[0], False), (torch.stack([TRIL, TRIL.triu(-2)]), False),
    ],
)  # fmt: skip
def test_causal_masks(value: object, expected: bool) -> None:
    assert is_causal(value) is expected
