"""LLM.int8(): columns of the input with large values are multiplied in 16 bits, all others in 8 (Dettmers et al. 2022, section 3.2).

``X W^T = Q(X_dense) Q(W)^T + X_o W_o^T``. Two ways to choose the columns:
 * static, ``outliers(threshold=6.0)`` or ``outliers(columns=64)``: those that calibration saw above the threshold (or the largest ones); the weight's columns are kept in 16 bits;
 * dynamic, ``outliers(dynamic=32, threshold=6.0)``, the paper's rule with static shapes: on every call the 32 largest columns, less those that stay below the threshold. No data is
   needed, nothing is synchronized; calls in which more columns pass the threshold are counted. W_o comes from the 16-bit weight, which then stays in memory;
   ``outliers(dynamic=32, weights="codes")`` takes it from the codes instead, as bitsandbytes does: half the memory, and the rounding of these columns of W is multiplied by outliers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.core.recipe import Choice
from qcompile.core.stats import Stats

from .sites import example

THRESHOLD = 6.0
"""The paper's magnitude above which a value is an outlier."""


@dataclass(frozen=True)
class Split:
    """Nodes: ``dense`` is x with zeros in the outlier columns, ``kept`` (..., C) the outlier columns, ``index`` (C,) which they are."""

    dense: fx.Node
    kept: fx.Node
    index: fx.Node


@dataclass(frozen=True)
class Dynamic:
    """How many columns a call may keep, from which magnitude on, and whether the weight's columns are read off its codes."""

    columns: int
    threshold: float
    codes: bool = False


def columns(stats: Stats, threshold: float = THRESHOLD, columns: int | None = None) -> Tensor:
    """Indices (C,) int64, sorted: channels whose absolute maximum reached ``threshold``, or the ``columns`` greatest ones."""
    peak = stats["absmax"]["absmax"]
    if columns is not None:
        return peak.topk(min(columns, peak.numel())).indices.sort().values
    return (peak >= threshold).nonzero().flatten()


def chosen(peak: Tensor, how: Dynamic) -> Tensor:
    """Indices of the columns that a call with absolute maxima ``peak`` (K,) keeps: the largest, less those below the threshold. What ``find`` puts into a graph, with sizes that may vary."""
    index = peak.topk(min(how.columns, peak.numel())).indices
    return index[peak[index] >= how.threshold]


def dynamic(choice: Choice) -> Dynamic | None:
    """The settings of a dynamic split; None where there is none."""
    for method in choice.methods:
        if method.name == "outliers" and method.options.get("dynamic"):
            given = method.options
            return Dynamic(int(given["dynamic"]), float(given.get("threshold", THRESHOLD)), given.get("weights") == "codes")  # type: ignore[call-overload, arg-type]
    return None


def given(graph: fx.Graph, x: fx.Node, mask: fx.Node, index: fx.Node) -> Split:
    """The split at columns that calibration chose."""
    dense = _multiply(graph, x, graph.call_method("to", (mask, example(x).dtype)))
    return Split(dense, graph.call_function(torch.index_select, (x, -1, index)), index)


def find(graph: fx.Graph, x: fx.Node, how: Dynamic, missed: fx.Node) -> Split:
    """The split at this call's largest columns: top-k by magnitude, then masked by the threshold. ``missed`` counts calls in which one more column passed it."""
    k = int(example(x).shape[-1])
    count = min(how.columns, k)
    flat = graph.call_method("reshape", (graph.call_function(torch.abs, (x,)), -1, k))
    peak = graph.call_function(torch.amax, (flat, 0))
    top = graph.call_function(torch.topk, (peak, min(count + 1, k)))
    values, index = (graph.call_function(getattr, (top, name)) for name in ("values", "indices"))
    if count < k:
        over = graph.call_function(torch.ge, (graph.call_method("narrow", (values, 0, count, 1)), how.threshold))
        graph.call_method("add_", (missed, over))
        values, index = (graph.call_method("narrow", (node, 0, 0, count)) for node in (values, index))
    keep = graph.call_function(torch.ge, (values, how.threshold))
    weight = graph.call_method("to", (keep, example(x).dtype))
    kept = graph.call_function(torch.mul, (graph.call_function(torch.index_select, (x, -1, index)), weight))
    rest = graph.call_function(torch.rsub, (weight, 1))
    ones = graph.call_function(torch.ones_like, (peak,))
    mask = graph.call_method("index_copy", (ones, 0, index, rest))
    return Split(_multiply(graph, x, mask), kept, index)


def product(graph: fx.Graph, weight: fx.Node, split: Split) -> fx.Node:
    """``x_o @ w_o.T`` in float32, with the factors in x's dtype."""
    kept = split.kept
    w = graph.call_method("to", (weight, graph.call_function(getattr, (kept, "dtype"))))
    return graph.call_method("float", (graph.call_function(torch.nn.functional.linear, (kept, w)),))


def _multiply(graph: fx.Graph, x: fx.Node, by: fx.Node) -> fx.Node:
    out = graph.call_function(torch.mul, (x, by))
    out.meta["example_value"] = example(x)
    return out
