"""Inputs that a compiled graph reads beside Dynamo's own: packed weights and what calibration found. Each is a placeholder behind Dynamo's, filled on every call from the weight table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qcompile import compat
from qcompile.core.recipe import Choice
from qcompile.core.scheme import Scheme

from .sites import Site

PARTS = {
    "weight": ("codes", "scale", *(f"part{i}" for i in range(2, 9))),
    "range": ("range", "range_zero"),
    "smooth": ("smooth",),
    "mask": ("mask",),
    "outliers": ("outliers",),
    "columns": ("columns",),
    "bias": ("correction",),
    "missed": ("missed",),
}
"""What a slot holds -> names of its placeholders, behind the name of its parameter.

``weight``: codes, scales...; ``range``: the static scale (and zero) of an input; ``smooth``: (K,) the reciprocal of the vector that multiplies the weight; ``mask``: (K,) zero at outlier
columns; ``outliers``: (C,) their indices; ``columns``: (N, C) the weight there, in 16 bits; ``bias``: (N,) its correction; ``missed``: (1,) a counter of calls with more outliers than columns;
``state``: what training keeps of the kind that ``key`` names, see ``qcompile/trained.py``.
"""


@dataclass(frozen=True)
class Slot:
    """One entry of the weight table that a compiled graph reads. ``scheme`` is the weight's, of the input for a range; ``key`` the choice whose solution it belongs to, empty where there is none;
    ``rest`` weights that lie behind this one in the same tensors (``merge``)."""

    what: str
    arg: int
    view: str
    scheme: Scheme
    site: str
    path: str
    key: str = ""
    count: int = 0
    rest: tuple[Slot, ...] = ()

    @property
    def args(self) -> tuple[int, ...]:
        """Positions of the parameters it is made from."""
        return self.arg, *(slot.arg for slot in self.rest)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal where one placeholder serves: a plain weight does not depend on the site that reads it."""
        return self.what, self.arg, self.view, self.scheme, self.key, self.site if self.key or self.what == "range" else "", *(slot.identity for slot in self.rest)


def slot_of(what: str, site: Site, choice: Choice) -> Slot:
    """The slot of one site."""
    scheme = choice.input if what == "range" and choice.input is not None else choice.weight
    return Slot(what, site.param.index, site.view, scheme, site.name, site.path, choice.key if choice.methods or what == "range" else "", choice.outliers)


def state_slot(kind: str, site: Site, choice: Choice) -> Slot:
    """The slot of what training keeps for one site: of its input where the kind says so, else of its weight."""
    scheme = choice.input if kind.startswith("input_") and choice.input is not None else choice.weight
    return Slot("state", site.param.index, site.view, scheme, site.name, site.path, kind)


def slot_inputs(gm: fx.GraphModule, context: Any, slot: Slot) -> list[fx.Node]:
    """The placeholders of a slot, made where the graph has none yet; ``context.tensors(slot)`` gives their shapes."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    found = [n for n in placeholders if "packed" in n.meta and n.meta["packed"].identity == slot.identity]
    if found:
        return found
    tensors: Sequence[Tensor] = context.tensors(slot)
    like = next(p for p in placeholders if "param" in p.meta and p.meta["param"].index == slot.arg)
    for i, tensor in enumerate(tensors):
        found.append(compat.add_static_input(gm, f"{like.name}_{slot.key if slot.what == 'state' else PARTS[slot.what][i]}", tensor, like))
        found[-1].meta["packed"] = slot
    return found


def slots_of(gm: fx.GraphModule) -> list[Slot]:
    """Slots in the order of their placeholders."""
    found: dict[tuple[object, ...], Slot] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if "packed" in node.meta:
            found.setdefault(node.meta["packed"].identity, node.meta["packed"])
    return list(found.values())


def leader(gm: fx.GraphModule, site: Site, choice: Choice) -> tuple[Site, Choice]:
    """The first of a site's kin whose input is treated the same way: it lends what belongs to the input (range, vector, outlier columns) to all."""
    plan = gm.meta["plan"]
    for other in gm.meta["sites"].values():
        theirs = plan[other.name]
        if other.name == site.name or (other.name in site.kin and isinstance(theirs, Choice) and (theirs.input, theirs.methods) == (choice.input, choice.methods)):
            return other, choice if other.name == site.name else theirs
    return site, choice
