"""Products of one input become one product: q, k and v, or gate and up, found as linears that read the same value and get the same schemes. The weights lie one behind the other in one
tensor (``qcompile/weights.py``), and each linear takes its columns of the output. Biases, too, are added
as one vector.

Fewer, larger kernels: what a GPU wants where there are few rows, and on a CPU fewer calls into C++.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qcompile.core.errors import Skip
from qcompile.core.recipe import Choice

from . import experts, outliers
from .glu import pairs
from .infra import graph_pass
from .match import chosen
from .sites import Site, example

DEVICES = ("cuda", "cpu")
"""Where products are merged: elsewhere references run."""


@graph_pass(after=("match",))
def merge(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Fill ``gm.meta["merged"]``: name of a site -> names of all sites of its product, itself included, in the order of the graph. Sites that stay alone are not in it."""
    keys: dict[str, tuple[object, ...]] = {}
    refused: dict[str, Skip] = {}
    nodes: dict[str, fx.Node] = {}
    halves = pairs(gm)
    for node, site, choice in chosen(gm):
        nodes[site.name] = node
        if (reason := _alone(node, site, choice, site.name in halves)) is not None:
            refused[site.name] = reason
        else:
            keys[site.name] = (node.args[0], example(node).dtype, choice.input, choice.weight, choice.methods, choice.smooth, choice.heads, site.k, site.dtype)
    gated = {name: pair for name, pair in halves.items() if all(p in keys and keys[p] == keys[name] for p in pair)}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, key in keys.items():
        given = gm.meta["plan"][name].input
        if name not in gated and given is not None and given.static and _requantized(nodes[name]):
            refused[name] = Skip("the next linear's quantization is in its store")
        else:
            groups.setdefault((*key, gated.get(name)), []).append(name)  # a pair is one kernel with its activation: nothing else may read it
    gm.meta["merged"] = {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}
    gm.meta["unmerged"] = refused
    gm.meta["note"] = f"{len(gm.meta['merged'])} linears in {len(set(gm.meta['merged'].values()))} products"
    return gm


def _alone(node: fx.Node, site: Site, choice: Choice, paired: bool) -> Skip | None:
    """Why a linear keeps a product of its own. ``paired``: it is a half of a gated unit, whose activation a bias would stand before."""
    if site.device.partition(":")[0] not in DEVICES:
        return Skip(f"products on {site.device} stay apart")
    if isinstance(experts.resolve(node), experts.Experts):
        return Skip("a stack of experts is one product already")
    if choice.weight.group[0] != 1 or (choice.weight.scale is not None and choice.weight.scale.group[0] != 1):
        return Skip(f"rows of {choice.weight} share scales")
    if choice.weight.fmt.learned:
        return Skip("its codebook is its own")
    if choice.outliers or outliers.dynamic(choice) is not None:
        return Skip("its outlier columns are its own")
    if site.stored is not None:
        return Skip("the module holds its codes")
    bias = bias_of(node)
    if choice.corrected or (bias is not None and (bias.op != "placeholder" or paired or tuple(example(bias).shape) != (site.n,))):
        return Skip("its bias is added in its own store")
    return None


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias of a canonical linear."""
    return node.args[2] if len(node.args) > 2 else None  # type: ignore[return-value]


POINTWISE = {"silu", "gelu", "relu", "mul", "add", "sigmoid", "tanh", "to", "view", "reshape"}


def _requantized(node: fx.Node) -> bool:
    """What is computed from the product alone, element by element, is the input of a linear."""
    front, seen = list(node.users), set()
    while front:
        user = front.pop()
        if user in seen:
            continue
        seen.add(user)
        if "site" in user.meta:
            return True
        if getattr(user.target, "__name__", user.target) in POINTWISE:
            front += list(user.users)
    return False
