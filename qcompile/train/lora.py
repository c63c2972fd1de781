"""A graph with a frozen, packed base and adapters that train (``passes/frozen.py``): calibrated and transformed as for inference, with gradients for what requires them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from qcompile.backend import CompiledGraph
from qcompile.core.recipe import Choice
from qcompile.passes import PASSES
from qcompile.train.graph import TrainingGraph


class FrozenGraph(TrainingGraph):
    """One captured graph under one plan. Callable with Dynamo's arguments."""

    pipeline = ("checkpoints", *CompiledGraph.pipeline)

    def _rewrite(self, matched: fx.GraphModule, context: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        if any(isinstance(c, Choice) and c.smooth for c in matched.meta["plan"].values()):
            matched = self._run([PASSES["transform"]], matched, context)
        return super()._rewrite(matched, context)

    def calibrate(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[str, dict[str, Choice]]:
        """Frozen weights keep the codes that are solved for them: as at inference."""
        return CompiledGraph.calibrate(self, gm, inputs)

    def _ready(self, args: Sequence[Any]) -> None:
        """Nothing is learned beside the model."""
