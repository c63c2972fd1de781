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
    """Interprets a captured graph and hands the input of every named site to ``see(site name, x)``."""

    def __init__(self, gm: fx.GraphModule, names: set[str], see: Callable[[str, Tensor], None]) -> None:
        super().__init__(gm)
        self._names, self._see = names, see

    def run_node(self, n: fx.Node) -> Any:
        if n.meta.get("site") in self._names:
            self._see(n.meta["site"], self.env[input_of(n)])
        return super().run_node(n)


def run_observed(gm: fx.GraphModule, args: Sequence[Any], names: set[str], see: Callable[[str, Tensor], None]) -> None:
    """Interpret ``gm`` once on real ``args``. What the graph writes to (caches, buffers) is cloned first and the random state restored: the model is as before."""
    devices = sorted({a.device.index or 0 for a in args if isinstance(a, Tensor) and a.is_cuda})
    placeholders = gm.graph.find_nodes(op="placeholder")
    with compat.no_dispatch_modes(), torch.no_grad(), torch.random.fork_rng(devices=devices):
        private = [a.clone() if isinstance(a, Tensor) and "param" not in p.meta else a for p, a in zip(placeholders, args)]
        Observer(gm, names, see).run(*private)
