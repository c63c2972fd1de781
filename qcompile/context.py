"""What passes may ask of the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from qcompile import compat
from qcompile.core.recipe import Choice
from qcompile.fill import shapes_of
from qcompile.options import Options
from qcompile.passes.sites import Site
from qcompile.passes.slots import Slot

if TYPE_CHECKING:
    from qcompile.backend import CompiledGraph


@dataclass
class Context:
    """What passes may ask of the backend."""

    options: Options
    inputs: Sequence[Any]
    graph: CompiledGraph
    fake_mode: Any = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = self.options.recipe
        self.fake_mode = compat.fake_mode(self.inputs)

    def tensors(self, slot: Slot) -> list[Tensor]:
        """Shapes of the tensors of a slot. Values are packed on the first call: Dynamo's guards then see the parameters as they were, also where ``release`` changes them."""
        with self.fake_mode:
            return shapes_of(slot, self.inputs)

    def calibrate(self, gm: fx.GraphModule, sites: Sequence[Site]) -> tuple[str, dict[str, Choice]]:
        return self.graph.calibrate(gm, self.inputs)
