"""What the normalization before a linear says of its input, without data: ``x = gamma z + beta`` with z of mean 0 and deviation 1 in each channel, perhaps cut by a ReLU.

Read off the graph: layer norm and RMS norm as torch has them, or written out (a product with ``rsqrt``, a vector times that, a vector added). Nagel et al. 2019, sections 4.1.3 and 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile import compat
from qcompile.core.errors import Skip

from .bias import mean_after_norm
from .channels import ADD, DIV, MUL, SAME, VIEW, channels, is_vector, obstacle, vectors
from .observe import input_of

RELU = {F.relu, torch.relu, "relu"}
NEGATE = {"neg", torch.neg}
NORMS = {F.layer_norm, torch.layer_norm, F.rms_norm, getattr(torch, "rms_norm", F.rms_norm)}


@dataclass(frozen=True)
class Norm:
    """Nodes of the vectors gamma and beta (None: a norm without shift), and whether a ReLU follows."""

    gamma: fx.Node
    beta: fx.Node | None
    relu: bool = False


def back(x: fx.Node, through: Set[Any] = RELU) -> tuple[fx.Node, ...]:
    """From x backwards through what changes no value (casts, views, dropout that is off) and ``through``, in the order of the graph: the first is where this ends."""
    path = [x]
    while (node := path[0]).op in ("call_function", "call_method") and "site" not in node.meta:
        if node.target not in through | VIEW | SAME - NEGATE or (node.target in (F.dropout, torch.dropout) and not _off(node)):
            break
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            break
        path.insert(0, source)
    return tuple(path)


def before(gm: fx.GraphModule, site: str) -> Norm | Skip:
    """The norm that makes the input of a site, or why there is none."""
    x, k = input_of(next(n for n in gm.graph.nodes if n.meta.get("site") == site)), gm.meta["sites"][site].k
    path = back(x)
    node, beta = path[0], None
    if node.target in ADD and len(shifts := [v for v in node.all_input_nodes if is_vector(v, k)]) == 1 and len(node.all_input_nodes) == 2:
        beta, node = shifts[0], back(next(n for n in node.all_input_nodes if n is not shifts[0]), set())[0]
    found = vectors(node, k)
    if not found or (beta is not None and len(found) > 1) or not (node.target in NORMS or _normalized(next(n for n in node.all_input_nodes if n is not found[0]), k)):
        return Skip(f"no norm makes the input: {obstacle(path[0])}")
    with compat.no_dispatch_modes():
        index = channels(path, k, False)
    if index != tuple(range(k)):
        return Skip(str(index) if isinstance(index, Skip) else f"the channels of the norm {node.name} are reordered before x")
    return Norm(found[0], found[1] if len(found) > 1 else beta, any(n.target in RELU for n in path[1:]))


def mean_before(gm: fx.GraphModule, site: str, live: Callable[[int], Tensor]) -> Tensor | Skip:
    """E[x] (K,) float32 that the norm before a site implies; ``live(i)`` is the parameter at the graph's i-th input."""
    norm = before(gm, site)
    if isinstance(norm, Skip):
        return norm
    if norm.beta is None and not norm.relu:
        return Skip("the norm before has no shift, which makes the mean of its output zero")
    with compat.no_dispatch_modes():
        return mean_after_norm(value(norm.gamma, live), None if norm.beta is None else value(norm.beta, live), 0.0 if norm.relu else -math.inf)


def value(vector: fx.Node, live: Callable[[int], Tensor]) -> Tensor:
    """The live value (K,) of a vector that is computed from parameters alone."""

    def of(node: fx.Node) -> Tensor:
        if node.op == "placeholder":
            return live(node.meta["param"].index).detach()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), of)
        found: Tensor = node.target(*args, **kwargs) if callable(node.target) else getattr(args[0], node.target)(*args[1:], **kwargs)
        return found

    return of(vector).reshape(-1)


def _normalized(node: fx.Node, k: int) -> bool:
    """``h * rsqrt(v)`` or ``h / sqrt(v)``, or a norm without vectors."""
    node = back(node, set())[0]
    roots = {torch.rsqrt, "rsqrt"} if node.target in MUL else {torch.sqrt, "sqrt"} if node.target in DIV else set()
    return (node.target in NORMS and not vectors(node, k)) or any(back(n, set())[0].target in roots for n in node.all_input_nodes)


def _off(node: fx.Node) -> bool:
    return (node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))) is False
