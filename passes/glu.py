"""Gated linear units: ``activation(gate) * up`` of one merged product becomes ``linear_glu``, one kernel where there were two, and the product of both halves is never stored.

Runs on the torch-level graph, behind ``lower``: there an activation is one node with a name, which ATen spells as arithmetic that differs between versions. Whether there is a kernel depends
on the number of rows. A dynamic one is asked for its regime (``rows_of``) and so guarded, as it is when the product itself is traced: a batch that grows past 64 and 256 rows is compiled
again, this pass included, and either graph is right for all rows that its guards let in.

``merge`` runs before and asks ``pairs``: where gate and up will be one kernel, they are merged even if the next linear's static quantization would sit in their store, since it sits in the
kernel's store as well.

Gate and up are no longer rounded to 16 bits between the product and the activation, as in every chain that Inductor fuses; the result is rounded once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.recipe import Choice
from qcompile.kernels import linear_glu
from qcompile.kernels.linear import unnested
from qcompile.kernels.op import Case, rows_of, target

from .infra import graph_pass, target_name
from .sites import Site, example

PRODUCTS = (target("linear"), target("scaled_linear"))
MULTIPLY = (operator.mul, torch.mul, "mul")
NAMES = {"silu": "silu", "relu": "relu", "sigmoid": "sigmoid"}
"""Functions and methods whose name says what they are -> activations of the op."""
UNKNOWN = ("tanh", "elu", "selu", "celu", "mish", "softplus", "hardswish", "hardsigmoid", "leaky_relu", "logsigmoid", "relu6", "hardtanh")
"""Functions of one value that the op does not know: the report says so."""


@dataclass(frozen=True)
class Gated:
    """``node = activation(gate) * up``, or ``activation(gate) * (up * vector)`` where the next linear's input is smoothed by way of up's columns. The activation is a row of
    ``linear_glu.ACTIVATIONS``, or the reason why it is none."""

    node: fx.Node
    gate: fx.Node
    up: fx.Node
    activation: str | Skip
    vector: fx.Node | None = None


@graph_pass(after=("lower",))
def glu(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Rewrite in the graph what ``find`` finds; fills ``gm.meta["glu"]``: name of the product's first site -> the activation, or Skip."""
    found: dict[str, str | Skip] = {}
    kernels = dict(gm.meta["kernels"])
    for node in list(gm.graph.nodes):
        gated = find(node, _is_half)
        halves = _halves(gated) if gated is not None else None
        if gated is None or halves is None:
            continue
        whole, gate_first = halves
        product = whole.args[0] if whole.target == "to" else whole
        assert isinstance(product, fx.Node)
        name = product.meta["site"]
        reason = gated.activation if isinstance(gated.activation, Skip) else refusal(gm.meta["sites"][name], gm.meta["plan"][name], example(gated.gate))
        if reason is not None:
            found[name] = reason
            continue
        found[name] = str(gated.activation)
        _rewrite(gm.graph, gated, product, gate_first)
        kernels |= dict.fromkeys(gm.meta.get("merged", {}).get(name, (name,)), linear_glu.OP.kernels[0].name)
    gm.meta["glu"], gm.meta["kernels"] = found, kernels
    fused = sum(isinstance(a, str) for a in found.values())
    left = ", ".join(sorted({str(a) for a in found.values() if isinstance(a, Skip)}))
    gm.meta["note"] = f"{fused} gated products" + (f", {len(found) - fused} left apart: {left}" if left else "")
    return gm


def pairs(gm: fx.GraphModule) -> dict[str, tuple[str, str]]:
    """Before ``lower``: names of sites whose linears are gate and up of one kernel, if they are merged -> both, gate first."""
    plan, sites = gm.meta["plan"], gm.meta["sites"]
    found: dict[str, tuple[str, str]] = {}
    for node in gm.graph.nodes:
        gated = find(node, lambda n: isinstance(plan.get(n.meta.get("site", "")), Choice))
        if gated is None or isinstance(gated.activation, Skip):
            continue
        names = gated.gate.meta["site"], gated.up.meta["site"]
        gate, up = (sites[name] for name in names)
        if gate.n == up.n and refusal(gate, plan[gate.name], example(gated.gate)) is None:
            found |= dict.fromkeys(names, names)
    return found


def refusal(site: Site, choice: Choice, gate: Tensor) -> Skip | None:
    """Why a product whose halves are like ``gate`` has no kernel with the activation in it."""
    device = device_of(gate)
    if device.type != "cuda":
        return Skip(f"on {device.type} the product is a call, and the activation a loop behind it")
    dtype = gate.dtype if choice.input is None else choice.input.fmt.dtype
    return linear_glu.supports(Case(device, dtype, unnested(choice.weight), choice.input, 2 * int(gate.shape[-1]), site.k, rows_of(math.prod(gate.shape[:-1]), device)))


def device_of(value: Tensor) -> torch.device:
    """Where a product runs."""
    return compat.device_of(value)


def find(node: fx.Node, is_half: Callable[[fx.Node], bool]) -> Gated | None:
    """The pattern: a product of two values, one of them behind an activation, none of them read by anything else."""
    if node.op not in ("call_function", "call_method") or node.target not in MULTIPLY or len(node.args) != 2:
        return None
    for a, b in (node.args, node.args[::-1]):
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b and _only(a, node) and _only(b, node):
            behind = _activation(a)
            up, vector = _unscaled(b)
            if behind is not None and is_half(behind[1]) and is_half(up):
                return Gated(node, behind[1], up, behind[0], vector)
    return None


def _unscaled(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Up without the vector that ``transform`` multiplied its columns by, in float32, and the vector."""
    product = node.args[0] if node.target == "to" else node
    if isinstance(product, fx.Node) and product.target in MULTIPLY and len(product.args) == 2 and (product is node or _only(product, node)):
        up, vector = product.args
        if isinstance(up, fx.Node) and isinstance(vector, fx.Node) and "packed" in vector.meta and vector.meta["packed"].what == "smooth" and _only(up, product):
            return up, vector
    return node, None


def _only(node: fx.Node, user: fx.Node) -> bool:
    return list(node.users) == [user]


def _activation(node: fx.Node) -> tuple[str | Skip, fx.Node] | None:
    """(the row of the op's table, what it is taken of)."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    name, x = target_name(node.target), node.args[0]
    if not _only(x, node):
        return None
    squared = name == "square" or (name in ("pow", "pow_") and node.args[1:] == (2,))
    if squared and target_name(x.target) == "relu" and x.args and isinstance(x.args[0], fx.Node) and _only(x.args[0], x):
        return "relu_squared", x.args[0]
    if name == "gelu":
        how = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return "gelu_tanh" if how == "tanh" else "gelu", x
    if name in NAMES:
        return NAMES[name], x
    return (Skip(f"{name} is none of {', '.join(linear_glu.ACTIVATIONS)}"), x) if name in UNKNOWN else None


def _is_half(node: fx.Node) -> bool:
    """Columns of a product of ours: a part of a merged one, or of a linear that its module cuts in two."""
    whole = _source(node)
    if whole is None:
        return False
    product = whole.args[0] if whole.target == "to" and whole.args else whole
    return isinstance(product, fx.Node) and product.target in PRODUCTS and "site" in product.meta


def _source(node: fx.Node) -> fx.Node | None:
    """What columns are taken from, by ``narrow`` or ``chunk``."""
    cut = node.args[0] if node.target is operator.getitem else node
    if not isinstance(cut, fx.Node) or (cut is node and node.target is not torch.narrow) or (cut is not node and cut.target not in ("chunk", torch.chunk)):
        return None
    whole = cut.args[0] if cut.args else None
    return whole if isinstance(whole, fx.Node) else None


def _halves(gated: Gated) -> tuple[fx.Node, bool] | None:
    """(the product or its cast, whether the gate comes first) where the two are its halves and nothing else reads it."""
    whole = _source(gated.gate)
    if whole is None or whole is not _source(gated.up):
        return None
    product = whole.args[0] if whole.target == "to" else whole
    if not isinstance(product, fx.Node) or product.target not in PRODUCTS:  # biases were added to it
        return None
    n, dims = example(product).shape[-1], example(product).dim()
    places = [_place(part, int(n), dims) for part in (gated.gate, gated.up)]
    readers = set(whole.users) if len(whole.users) > 1 else set(next(iter(whole.users)).users)
    if None in places or set(places) != {0, int(n) // 2} or readers != {gated.gate, gated.up} or (whole is not product and not _only(product, whole)):
        return None
    return whole, places[0] == 0


def _place(part: fx.Node, n: int, dims: int) -> int | None:
    """The first column of a half; None where it is not half of the last axis."""
    if part.target is torch.narrow:
        _, axis, start, size = part.args
        return int(start) if axis in (-1, dims - 1) and 2 * size == n else None  # type: ignore[operator,arg-type]
    cut, which = part.args
    assert isinstance(cut, fx.Node)
    given = {**dict(zip(("chunks", "dim"), cut.args[1:])), **cut.kwargs}
    if given.get("chunks") != 2 or given.get("dim") not in (-1, dims - 1) or n % 2 or which not in (0, 1):
        return None
    return n // 2 if which == 1 else 0


def _rewrite(graph: fx.Graph, gated: Gated, product: fx.Node, gate_first: bool) -> None:
    """The op where the product stood: what it reads may be changed in place before the activation comes."""
    assert isinstance(gated.activation, str)
    x, *scales, weight, scheme = product.args
    value, wanted = example(product), example(gated.node)
    with graph.inserting_before(product):
        y = graph.call_function(target("linear_glu"), (x, scales[0] if scales else [], weight, scheme, gated.activation, gate_first))
        out = y if gated.vector is None else graph.call_function(torch.mul, (y, gated.vector))
        y.meta = {**product.meta, "example_value": value.new_empty((*value.shape[:-1], value.shape[-1] // 2), dtype=torch.float32)}
        out.meta.setdefault("example_value", example(y))
        out = out if wanted.dtype == torch.float32 else graph.call_method("to", (out, wanted.dtype))
    if out is not y:
        out.meta = {**gated.node.meta}
    name = gated.node.name
    gated.node.replace_all_uses_with(out)
    dead = [gated.node]
    while dead:
        node = dead.pop()
        if not node.users and node.op != "placeholder":
            dead += node.all_input_nodes
            graph.erase_node(node)
    out.name = name
