"""The step ``equalize`` of a recipe: cross-layer equalization of a model's own weights, in place, before they are solved (``passes/equalize.py``).

No data is needed and the function stays as it is, to the last bit: all factors are powers of two. A link is used only where every recorded graph that reads one of its weights has it, and
nothing else reads them. ``equalize(absorb=True)`` also moves high biases over a ReLU into the biases behind it, which is an approximation; a note of the linear that lost them says so.
The outcome's quality compares with the model so changed: it holds the cost of rounding, not that of the approximation.
Only ``qcompile.quantize`` does this: compiling leaves the weights of a model alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from qcompile.core.errors import Skip
from qcompile.core.recipe import Choice
from qcompile.passes.equalize import Link, absorb, absorbing, balance, high_bias, pairs, scale
from qcompile.passes.norms import Norm, value
from qcompile.passes.producers import Place
from qcompile.passes.sites import CASTS, Site, view
from qcompile.replay import Unit
from qcompile.solve import equalized

Uses = list[tuple[Unit, Place]]
"""The graphs that have a link, and its place in each."""


class Balanced:
    """The links that were found in recorded graphs and applied; ``restore`` takes them back, exactly."""

    def __init__(self, model: nn.Module) -> None:
        self._shared = held_by_several(model)
        self.links: list[Link] = []
        self.notes: dict[str, str] = {}
        """What became of the high biases of a producer, where a recipe has them absorbed."""
        self._absorbed: list[tuple[Tensor, Tensor]] = []
        self._done: list[tuple[Link, Tensor, dict[str, Tensor], Tensor | None]] = []

    @torch.no_grad()
    def apply(self, units: Sequence[Unit]) -> None:
        """Equalize the weights of all links."""
        uses, biases, weights = _links(units, self._shared)
        self.links = list(biases)
        for link, s in balance(self.links, weights).items():
            mine = {name: weights[name] for name in (link.producer, *link.followers)}
            scale(link, s, mine, biases[link])
            self._done.append((link, s, mine, biases[link]))
        self._absorb(uses, biases, weights)

    def _absorb(self, links: Mapping[Link, Uses], biases: Mapping[Link, Tensor | None], weights: Mapping[str, Tensor]) -> None:
        for link, uses in links.items():
            if not any(_absorbs(unit.plan[link.producer]) for unit, _ in uses):
                continue
            found = _high(link, uses, biases[link], weights[link.producer], self._shared)
            if isinstance(found, Skip):
                self.notes[link.producer] = f"no high bias is absorbed: {found}"
                continue
            c, bias, behind = found
            self._absorbed += [(b, b.clone()) for b in (bias, *behind.values())]
            wide = torch.promote_types(bias.dtype, torch.float32)
            for name, b in behind.items():
                less, more = absorb(bias.to(wide), weights[name].to(wide), b.to(wide), c.to(wide))
                b.copy_(more)
            bias.copy_(less)
            self.notes[link.producer] = f"{int((c > 0).sum())} high biases, the largest {float(c.max()):.3g}, were absorbed by the linear behind: an approximation, exact where no value lies more than three deviations below its mean, whose cost the outcome's dB do not hold"

    @torch.no_grad()
    def restore(self) -> None:
        """The weights as they were."""
        while self._absorbed:
            live, before = self._absorbed.pop()
            live.copy_(before)
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


def _links(units: Sequence[Unit], shared: set[int]) -> tuple[dict[Link, Uses], dict[Link, Tensor | None], dict[str, Tensor]]:
    """Links that hold in every unit with their places there, the producers' live biases, and the live weights of their linears as their sites read them. ``shared``: ids of parameters that several modules hold."""
    per_unit = [{(where.site, names): where for where, names in pairs(unit.gm) if where.index is not None} if any(map(equalized, unit.plan.values())) else {} for unit in units]
    links: dict[Link, Tensor | None] = {}
    uses: dict[Link, Uses] = {}
    weights: dict[str, Tensor] = {}
    taken: dict[str, int] = {}
    for unit, found in zip(units, per_unit):
        for (producer, followers), where in found.items():
            names = (producer, *followers)
            own = {name: unit.parameter(unit.sites[name]) for name in names}
            bias = _bias(unit, where.nodes[0])
            if bias is False or not all(_alone(unit, unit.sites[name]) and taken.get(name, id(own[name])) == id(own[name]) for name in names):
                continue
            ids = {id(p) for p in (*own.values(), *([bias] if isinstance(bias, Tensor) else []))}
            if ids & shared or any((producer, followers) not in theirs for other, theirs in zip(units, per_unit) if ids & {id(p) for p in other.parameters()}):
                continue
            assert where.index is not None
            taken |= {name: id(p) for name, p in own.items()}
            link = Link(producer, followers, where.index)
            links[link] = bias.detach() if isinstance(bias, Tensor) else None
            uses.setdefault(link, []).append((unit, where))
            weights |= {name: view(p.detach(), unit.sites[name].view) for name, p in own.items()}
    return uses, links, weights


def _absorbs(choice: object) -> bool:
    return isinstance(choice, Choice) and any(m.name == "equalize" and m.options.get("absorb") for m in choice.methods)


def _high(link: Link, uses: Uses, bias: Tensor | None, weight: Tensor, shared: set[int]) -> tuple[Tensor, Tensor, dict[str, Tensor]] | Skip:
    """(c (N,) float32, the producer's bias, the followers' biases), all live, or why nothing can be absorbed. The channels of a normalized input count as independent."""
    if bias is None:
        return Skip("the first linear has no bias")
    behind: dict[str, Tensor] = {}
    norms: list[Norm] = []
    for unit, where in uses:
        norm = absorbing(unit.gm, where, link.followers)
        if isinstance(norm, Skip):
            return norm
        norms.append(norm)
        for node in unit.nodes:
            if node.meta.get("site") in link.followers:
                own = _bias(unit, node)
                if not isinstance(own, Tensor) or id(own) in shared:
                    return Skip(f"{node.meta['site']} has no bias of its own to take it")
                behind[node.meta["site"]] = own.detach()
    gamma, beta = (None if v is None else value(v, uses[0][0].live).float() for v in (norms[0].gamma, norms[0].beta))
    assert gamma is not None
    mean = bias.float() if beta is None else bias.float() + weight.float() @ beta
    c = high_bias(mean, (weight.float().square() @ gamma.square()).sqrt())
    return (c, bias, behind) if bool(c.any()) else Skip("no channel has a mean of three deviations or more above zero")


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
