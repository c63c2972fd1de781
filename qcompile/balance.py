"""The step ``equalize`` of a recipe: cross-layer equalization of a model's own weights, in place, before they are solved (``passes/equalize.py``).

No data is needed and the function stays as it is, to the last bit: all factors are powers of two. A link is used only where every recorded graph that reads one of its weights has it, and
nothing else reads them. Only ``qcompile.quantize`` does this: compiling leaves the weights of a model alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from qcompile.passes.equalize import Link, balance, pairs, scale
from qcompile.passes.sites import CASTS, Site, view
from qcompile.replay import Unit
from qcompile.solve import equalized


class Balanced:
    """The links that were found in recorded graphs and applied; ``restore`` takes them back, exactly."""

    def __init__(self, model: nn.Module) -> None:
        self._shared = held_by_several(model)
        self.links: list[Link] = []
        self._done: list[tuple[Link, Tensor, dict[str, Tensor], Tensor | None]] = []

    @torch.no_grad()
    def apply(self, units: Sequence[Unit]) -> None:
        """Equalize the weights of all links."""
        biases, weights = _links(units, self._shared)
        self.links = list(biases)
        for link, s in balance(self.links, weights).items():
            mine = {name: weights[name] for name in (link.producer, *link.followers)}
            scale(link, s, mine, biases[link])
            self._done.append((link, s, mine, biases[link]))

    @torch.no_grad()
    def restore(self) -> None:
        """The weights as they were."""
        while self._done:
            link, s, weights, bias = self._done.pop()
            scale(link, 1 / s, weights, bias)

    def forget(self) -> None:
        """Let the weights go: they stay as they are."""
        self._done.clear()


def held_by_several(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module of a model holds."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return {key for key, count in held.items() if count > 1}


def _links(units: Sequence[Unit], shared: set[int]) -> tuple[dict[Link, Tensor | None], dict[str, Tensor]]:
    """Links that hold in every unit, with the producers' live biases, and the live weights of their linears as their sites read them. ``shared``: ids of parameters that several modules hold."""
    per_unit = [{(where.site, names): where for where, names in pairs(unit.gm) if where.index is not None} if any(map(equalized, unit.plan.values())) else {} for unit in units]
    links: dict[Link, Tensor | None] = {}
    weights: dict[str, Tensor] = {}
    taken: dict[str, int] = {}
    for unit, found in zip(units, per_unit):
        for (producer, followers), where in found.items():
            names = (producer, *followers)
            own = {name: unit.parameter(unit.sites[name]) for name in names}
            bias = _bias(unit, where.nodes[0])
            if bias is False or not all(_alone(unit, unit.sites[name]) and taken.get(name, id(own[name])) == id(own[name]) for name in names):
                continue
            ids = {id(p) for p in own.values()}
            if ids & shared or any((producer, followers) not in theirs for other, theirs in zip(units, per_unit) if ids & {id(p) for p in other.parameters()}):
                continue
            assert where.index is not None
            taken |= {name: id(p) for name, p in own.items()}
            links[Link(producer, followers, where.index)] = None if bias is None else bias.detach()  # type: ignore[union-attr]
            weights |= {name: view(p.detach(), unit.sites[name].view) for name, p in own.items()}
    return links, weights


def _alone(unit: Unit, site: Site) -> bool:
    """The site is to be equalized, has its 16-bit weight, and nothing else in the graph reads that."""
    if not equalized(unit.plan[site.name]) or site.stored is not None or site.view not in ("", "t"):
        return False
    front, readers = [unit.placeholders[site.param.index]], []
    while front:
        for user in front.pop().users:
            if "site" in user.meta:
                readers.append(user.meta["site"])
            elif user.op == "output" or (user.target not in CASTS | {"transpose", "t", "permute", getattr} and getattr(user.target, "__name__", "") not in ("transpose", "t", "permute")):
                return False
            else:
                front.append(user)
    return readers == [site.name]


def _bias(unit: Unit, node: fx.Node) -> Tensor | bool | None:
    """The live bias of a linear, None where it has none, False where it is no parameter of its own."""
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(bias, fx.Node):
        return None
    if "param" not in bias.meta or list(bias.users) != [node]:
        return False
    return unit.live(bias.meta["param"].index)
