"""Frozen weights under trained adapters: every linear whose parameter does not require grad reads its packed codes, and what stands around it trains in its own dtype.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314, equation 5): ``Y = X dequantize(W) + X L1 L2``, with gradients for L1 and L2 alone. The adapters are whatever the model's own graph adds to a
linear: nothing here knows of LoRA, or of PEFT's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from qcompile.core.errors import OptionError, Skip
from qcompile.core.recipe import KEEP, Choice, Recipe
from qcompile.kernels.op import target

from .infra import graph_pass
from .lower import Builder, erase_unused_views, spelled
from .match import chosen
from .sites import Site
from .slots import leader, slot_inputs, slot_of, slots_of
from .training import Training

MARKS = ("recompute", "ac_graph_id")
"""What a node of a checkpointed body carries."""


@graph_pass(after=("match",))
def frozen(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Rewrite every site with a Choice; fills ``gm.meta["slots"]`` and ``gm.meta["kernels"]`` (site -> kernel name, or Skip), as ``lower`` does."""
    builder = _Frozen(gm, context)
    for node, site, choice in chosen(gm):
        builder.rewrite(node, site, choice)
    erase_unused_views(gm.graph)
    gm.meta["slots"], gm.meta["kernels"], gm.meta["merged"] = slots_of(gm), builder.kernels, {}
    gm.meta["note"] = f"{len(builder.kernels)} frozen linears read codes, {sum(isinstance(k, Skip) for k in builder.kernels.values())} without a kernel"
    return gm


class _Frozen(Builder):
    """As for inference, but a product takes its input as it is, and has a gradient for it."""

    def rewrite(self, node: fx.Node, site: Site, choice: Choice) -> None:
        """Replace one site's node. What takes the place of a node that is computed again in the backward is, too."""
        marks = {name: node.meta[name] for name in MARKS if name in node.meta}
        before, after = node.prev, node.next
        super().rewrite(node, site, choice)
        made = before.next
        while made is not after:
            if made.op != "placeholder":
                made.meta |= marks
            made = made.next

    def _product(self, graph: fx.Graph, x: fx.Node, site: Site, choice: Choice, weight: list[fx.Node]) -> fx.Node:
        """(..., N) float32."""
        return graph.call_function(target("frozen_linear"), (x, weight, self._range(site, choice), spelled(choice)))

    def _experts(self, graph: fx.Graph, x: fx.Node, index: fx.Node | None, site: Site, choice: Choice, weight: list[fx.Node], by_row: bool) -> fx.Node:
        """(S, N) float32."""
        return graph.call_function(target("frozen_grouped"), (x, index, weight, self._range(site, choice), spelled(choice), by_row))

    def _range(self, site: Site, choice: Choice) -> list[fx.Node]:
        static = choice.input is not None and choice.input.static
        return slot_inputs(self.gm, self.context, slot_of("range", *leader(self.gm, site, choice))) if static else []


def check(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """OptionError for a recipe that packs nothing."""
    if recipe.weight == KEEP and recipe.head in (None, KEEP) and not any(rule.weight for rule in recipe.rules):
        raise OptionError(f"recipe {recipe.name} keeps every weight in 16 bits, so that options['train'] = 'lora' has nothing to pack; name a scheme, such as 'NF4' or weight='nf4.g64/int8.g256'")


TRAINING = Training("lora", frozen, {}, check, frozen=True, doc="adapters on a quantized base (QLoRA): weights that do not require grad are packed, what requires grad trains in its own dtype")
