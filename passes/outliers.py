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
from qcompile.kernels import outlier_columns
from qcompile.kernels.op import target

from .sites import example

THRESHOLD = 6.0
"""The paper's magnitude above which a value is an outlier."""


@dataclass(frozen=True)
class Split:
    """Nodes: ``dense`` is ``x`` with zeros in the outlier columns, ``index`` (C,) which they are; -1 is none."""

    dense: fx.Node
    x: fx.Node
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
    """Indices of the columns that a call with absolute maxima ``peak`` (K,) keeps, in order: what ``find`` puts into a graph, with sizes that may vary."""
    k, count = peak.numel(), min(how.columns, peak.numel())
    index = outlier_columns.reference(peak[None], count, how.threshold)[k : k + count]
    return index[index >= 0].long()


def dynamic(choice: Choice) -> Dynamic | None:
    """The settings of a dynamic split; None where there is none."""
    for method in choice.methods:
        if method.name == "outliers" and method.options.get("dynamic"):
            given = method.options
            return Dynamic(int(given["dynamic"]), float(given.get("threshold", THRESHOLD)), given.get("weights") == "codes")  # type: ignore[call-overload, arg-type]
    return None


def reads_weights(choice: Choice) -> bool:
    """Whether each call gathers columns of the 16-bit weight, which then stays beside its codes."""
    found = dynamic(choice)
    return found is not None and not found.codes


def given(graph: fx.Graph, x: fx.Node, mask: fx.Node, index: fx.Node) -> Split:
    """The split at columns that calibration chose."""
    dense = graph.call_function(torch.mul, (x, graph.call_method("to", (mask, example(x).dtype))))
    dense.meta["example_value"] = example(x)
    return Split(dense, x, index)


def find(graph: fx.Graph, x: fx.Node, how: Dynamic, missed: fx.Node) -> Split:
    """The split at this call's largest columns. ``missed`` counts calls in which one more column passed the threshold."""
    k = int(example(x).shape[-1])
    count = min(how.columns, k)
    found = graph.call_function(target("outlier_columns"), (x, count, how.threshold))
    more = graph.call_function(torch.gt, (graph.call_function(torch.narrow, (found, 0, k + count, 1)), 0))
    graph.call_method("add_", (missed, more))
    others = graph.call_function(torch.ne, (graph.call_function(torch.narrow, (found, 0, 0, k)), 0))
    dense = graph.call_function(torch.where, (others, x, 0))
    dense.meta["example_value"] = example(x)
    return Split(dense, x, graph.call_function(torch.narrow, (found, 0, k, count)))
