"""Give every site a scheme, or keep it in 16 bits with a reason. First rule that matches wins; rules that matched nothing are reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from qcompile.core.errors import Skip
from qcompile.core.recipe import KEEP, Choice, Method, Recipe
from qcompile.core.scheme import Scheme

from .infra import graph_pass
from .sites import Site

SMALLEST = 16
"""Linears with fewer rows or columns keep 16 bits: nothing to gain, and tensor cores take no less."""

Plan = dict[str, "Choice | Skip"]


@graph_pass(after=("find_sites",))
def match(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Fill ``gm.meta["plan"]`` (site name -> Choice or Skip) from ``context.recipe``; ``gm.meta["unused_rules"]`` lists rules that no site matched."""
    recipe: Recipe = context.recipe
    used: set[int] = set()
    gm.meta["plan"] = plan = plan_of(gm.meta["sites"], recipe, used)
    gm.meta["unused_rules"] = [rule.pattern for i, rule in enumerate(recipe.rules) if i not in used]
    gm.meta["note"] = f"{sum(isinstance(c, Choice) for c in plan.values())} of {len(plan)} linears get a scheme"
    return gm


def chosen(gm: fx.GraphModule) -> list[tuple[fx.Node, Site, Choice]]:
    """The sites with a Choice, in the graph's order; a list, so that the graph may be rewritten on the way."""
    found = [(node, gm.meta["plan"].get(node.meta.get("site", ""))) for node in gm.graph.nodes]
    return [(node, gm.meta["sites"][node.meta["site"]], choice) for node, choice in found if isinstance(choice, Choice)]


def plan_of(sites: Mapping[str, Site], recipe: Recipe, used: set[int] | None = None) -> Plan:
    """What every site gets. A model that holds codes already is left as it is by a recipe that nobody named."""
    done = recipe.implied and any(site.stored for site in sites.values())
    left = Skip("the model is quantized already; name a recipe to quantize what it left")
    return {name: left if done and site.stored is None else decide(site, recipe, used) for name, site in sites.items()}


def decide(site: Site, recipe: Recipe, used: set[int] | None = None) -> Choice | Skip:
    """What one site gets; indices of the rules that matched are added to ``used``."""
    for i, rule in enumerate(recipe.rules):
        if rule.matches(site.path, site.param.kind) or rule.matches(site.name):
            if used is not None:
                used.add(i)
            if rule.weight is None:
                return Skip(f"rule {rule.pattern!r} keeps 16 bits")
            if site.stored is not None:
                return replace(site.stored, why=f"stored; rule {rule.pattern!r} comes too late")
            return _choice(rule.weight, rule.input, f"rule {rule.pattern!r}", recipe.methods if rule.methods is None else rule.methods)
    if site.stored is not None:
        return site.stored
    if recipe.frozen and site.param.trained:
        return Skip("it is trained: its parameter requires grad")
    if site.role == "head":
        if recipe.head in (None, KEEP):
            return Skip("the head keeps 16 bits unless `head` names a scheme")
        return _choice(str(recipe.head), None, "head", ())
    if site.role == "router":
        return Skip("a router keeps 16 bits: its output chooses experts")
    if min(site.n, site.k) < SMALLEST:
        return Skip(f"{site.n} x {site.k} is smaller than {SMALLEST}")
    if not site.dtype.is_floating_point or site.dtype.itemsize < 2:
        return Skip(f"the weight is {site.dtype}, already quantized")
    if recipe.weight == KEEP:
        return Skip(f"recipe {recipe.name} keeps 16 bits")
    return _choice(recipe.weight, recipe.input, recipe.name, recipe.methods)


def _choice(weight: str, x: str | None, why: str, methods: tuple[Method, ...]) -> Choice:
    return Choice(Scheme.parse(weight), Scheme.parse(x) if x else None, why, methods)


def signature(gm: fx.GraphModule) -> tuple[str, ...]:
    """What a compiled graph depends on of its plan: the decision of each site and what was found for it, in order."""
    plan = gm.meta["plan"]
    return tuple(f"{c}: {c.key}" if isinstance(c := plan[name], Choice) and c.methods else str(c) for name in gm.meta["sites"])
