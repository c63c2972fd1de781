"""Put the vectors that smooth inputs where they cost nothing: into the norm that makes the input, into the rows of the linear before, or beside the input as one multiply.

The vectors themselves were found by the recipe's transforms (``smooth``, ``awq``, ``aqas``) and are inputs of the graph: one graph serves many layers, each with its own.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qcompile.core.recipe import Choice

from .infra import graph_pass
from .observe import input_of
from .producers import Place, apply, place
from .slots import leader, slot_inputs, slot_of


@graph_pass(after=("observe",))
def transform(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Multiply the input of every smoothed site by the reciprocal of its vector, once for all kin; fills ``gm.meta["places"]`` (site -> where, and why)."""
    groups: dict[str, list[str]] = {}
    for name, choice in gm.meta["plan"].items():
        if isinstance(choice, Choice) and choice.smooth:
            groups.setdefault(leader(gm, gm.meta["sites"][name], choice)[0].name, []).append(name)
    places: dict[str, str] = {}
    kinds: dict[str, int] = {}
    for first, names in groups.items():
        spot = place(gm, names)
        repeated = spot.index is not None and len(set(spot.index)) < len(spot.index)
        if repeated and not gm.meta["plan"][first].heads:  # found where this place was not to be had: in calls with a cache, say
            spot = Place("multiply", f"kept as a multiply: in the rows of {spot.site} repeated heads would have to share its factors, which differ", (_input(gm, names[0]),))
        vector = slot_inputs(gm, context, slot_of("smooth", gm.meta["sites"][first], gm.meta["plan"][first]))[0]
        apply(gm, spot, names, vector)
        places |= dict.fromkeys(names, f"{spot.kind}: {spot.why}")
        kinds[spot.kind] = kinds.get(spot.kind, 0) + 1
    gm.meta["places"] = places
    gm.meta["note"] = ", ".join(f"{count} inputs by {kind}" for kind, count in kinds.items()) or "nothing to place"
    return gm


def _input(gm: fx.GraphModule, site: str) -> fx.Node:
    return input_of(next(n for n in gm.graph.nodes if n.meta.get("site") == site))
