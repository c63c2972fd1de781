"""Ask for what has to be calibrated (static ranges, vectors that smooth, solved codes), and look at what sites read when a graph runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.core.recipe import Choice

from . import experts
from .infra import graph_pass
from .sites import Site


@graph_pass(after=("match",))
def observe(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Ask ``context.calibrate`` for solutions that are missing, and write what they found into the plan; a graph that needs none passes as it is."""
    if needs := solved_sites(gm):
        gm.meta["note"], choices = context.calibrate(gm, needs)
        gm.meta["plan"] = {**gm.meta["plan"], **choices}
    return gm


def solved_sites(gm: fx.GraphModule) -> list[Site]:
    """Sites that read a solution: their input range is fixed by calibration, or their recipe has methods."""
    plan = gm.meta["plan"]
    return [gm.meta["sites"][name] for name, c in plan.items() if isinstance(c, Choice) and (c.methods or (c.input is not None and c.input.static))]


def input_of(node: fx.Node) -> fx.Node:
    """What a site reads."""
    product = experts.resolve(node)
    x = product.x if isinstance(product, experts.Experts) else node.args[0]
    assert isinstance(x, fx.Node)
    return x


class Observer(fx.Interpreter):
    """Interprets a captured graph and hands the input of every named site to ``see(site name, x, which)``: rows of stacked experts (S, K) with the expert of each, ``which`` (S,); else x as it is, and None."""

    def __init__(self, gm: fx.GraphModule, names: set[str], see: Callable[[str, Tensor, Tensor | None], None]) -> None:
        super().__init__(gm)
        self._names, self._see = names, see
        self._products = {n: product for n in gm.graph.nodes if n.meta.get("site") in names and isinstance(product := experts.resolve(n), experts.Experts)}
        self._indices: dict[fx.Node, Any] = {product.index: None for product in self._products.values() if product.index is not None}
        """Whose expert each row is: read where the weights are taken, which may be long before the product."""

    def run_node(self, n: fx.Node) -> Any:
        if n.meta.get("site") in self._names:
            x, which, product = self.env[input_of(n)], None, self._products.get(n)
            if product is not None:
                x, which = experts.rows(product, x, None if product.index is None else self._indices[product.index])
            self._see(n.meta["site"], x, which)
        out = super().run_node(n)
        if n in self._indices:
            self._indices[n] = out
        return out


def run_observed(gm: fx.GraphModule, args: Sequence[Any], names: set[str], see: Callable[[str, Tensor, Tensor | None], None]) -> None:
    """Interpret ``gm`` once on real ``args``. What the graph writes to (caches, buffers) is cloned first and the random state restored: the model is as before."""
    devices = sorted({a.device.index or 0 for a in args if isinstance(a, Tensor) and a.is_cuda})
    placeholders = gm.graph.find_nodes(op="placeholder")
    with compat.no_dispatch_modes(), torch.no_grad(), torch.random.fork_rng(devices=devices):
        private = [a.clone() if isinstance(a, Tensor) and "param" not in p.meta else a for p, a in zip(placeholders, args)]
        Observer(gm, names, see).run(*private)
