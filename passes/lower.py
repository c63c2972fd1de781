"""Put quantized ops in the place of linears. Weights come in as inputs: each op's tensors are placeholders behind Dynamo's own, filled on every call from the weight table.

A linear ``y = linear(x, w, b)`` of dtype T becomes ``quantize`` (once for all readers of x), ``scaled_linear`` or ``linear`` in float32, ``+ b`` and a cast to T: all that follows
the product is plain torch, which Inductor fuses into the product's store.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.recipe import Choice
from qcompile.core.scheme import Scheme
from qcompile.kernels import OPS
from qcompile.kernels.linear import unnested
from qcompile.kernels.op import Case, target
from qcompile.kernels.scaled_linear import spell

from . import experts
from .infra import graph_pass
from .sites import CASTS, Site, example, is_transpose


@dataclass(frozen=True)
class Slot:
    """One entry of the weight table that a compiled graph reads on each call: a packed weight, or (``what="range"``) the static scale of a site's input."""

    what: str
    arg: int
    view: str
    scheme: Scheme
    site: str
    path: str


_PARTS = {"weight": ["codes", "scale", *(f"part{i}" for i in range(2, 9))], "range": ["range"]}
"""Names of the placeholders of a slot, behind the name of its parameter."""


@graph_pass(after=("match",))
def lower(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Rewrite every site with a Choice; fills ``gm.meta["slots"]`` and ``gm.meta["kernels"]`` (site -> kernel name, or Skip)."""
    builder = _Builder(gm, context)
    for node in list(gm.graph.nodes):
        choice = gm.meta["plan"].get(node.meta.get("site", ""))
        if isinstance(choice, Choice):
            builder.rewrite(node, gm.meta["sites"][node.meta["site"]], choice)
    _erase_unused_views(gm.graph)
    gm.meta["slots"] = builder.slots
    gm.meta["kernels"] = builder.kernels
    gm.meta["note"] = f"{len(builder.kernels)} linears lowered, {sum(isinstance(k, Skip) for k in builder.kernels.values())} without a kernel"
    return gm


class _Builder:
    """The state of one lowering: placeholders made so far, quantized inputs made so far."""

    def __init__(self, gm: fx.GraphModule, context: Any) -> None:
        self.gm, self.context = gm, context
        self.slots: list[Slot] = []
        self.kernels: dict[str, str | Skip] = {}
        self._inputs: dict[tuple[int, str, str], list[fx.Node]] = {}
        self._quantized: dict[tuple[fx.Node, str, str], list[fx.Node]] = {}

    def rewrite(self, node: fx.Node, site: Site, choice: Choice) -> None:
        """Replace one site's node."""
        graph = self.gm.graph
        weight = self._placeholders(Slot("weight", site.param.index, site.view, choice.weight, site.name, site.path))
        self.kernels[site.name] = kernel_for(site, choice, example(node))
        product = experts.resolve(node)
        with graph.inserting_before(node):
            if isinstance(product, experts.Experts):
                y, out = self._grouped(graph, node, site, choice, product, weight)
            else:
                y, out = self._linear(graph, node, site, choice, weight)
        y.meta = {**node.meta}
        out.meta = {**node.meta}
        if out is not y:
            y.meta.pop("example_value", None)
            out.meta.pop("site", None)
        name = node.name
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        out.name = name

    def _linear(self, graph: fx.Graph, node: fx.Node, site: Site, choice: Choice, weight: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """(the product, what replaces the node)."""
        x, _, bias = (*node.args, None)[:3]
        assert isinstance(x, fx.Node)
        x = self._cast(graph, x, node)
        if choice.input is None:
            y = graph.call_function(target("linear"), (x, weight, str(choice.weight)))
        else:
            codes, *scale = self._quantize(graph, x, site, choice.input)
            y = graph.call_function(target("scaled_linear"), (codes, scale, weight, spell(choice.input, choice.weight)))
        out = graph.call_function(torch.add, (y, bias)) if bias is not None else y
        return y, self._to(graph, out, example(node).dtype)

    def _grouped(self, graph: fx.Graph, node: fx.Node, site: Site, choice: Choice, product: experts.Experts, weight: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """Rows to (S, K), the product, and back to the shape that the node had."""
        x, index = product.x, product.index
        if product.form == "dense":  # (E, T, K): expert e has the rows e * T .. (e + 1) * T
            rows = graph.call_method("size", (x, 1))
            ends = graph.call_function(torch.arange, (1, site.experts + 1), {"dtype": torch.int32, "device": example(x).device})
            index = graph.call_function(torch.mul, (ends, rows))
            flat = graph.call_method("flatten", (x, 0, 1))
            flat.meta["example_value"] = example(x).flatten(0, 1)
            x = flat
        elif product.form != "sorted":
            axis = -1 if product.form == "weight_first" else 1
            flat = graph.call_method("squeeze", (x, axis))
            flat.meta["example_value"] = example(x).squeeze(axis)
            x = flat
        codes, scale = x, []
        if choice.input is not None:
            codes, *scale = self._quantize(graph, x, site, choice.input)
        scheme = str(choice.weight) if choice.input is None else spell(choice.input, choice.weight)
        y = graph.call_function(target("grouped_linear"), (codes, scale, index, weight, scheme, product.form in ("weight_first", "rows_first")))
        out = self._to(graph, y, example(node).dtype)
        if product.form == "dense":
            out = graph.call_method("unflatten", (out, 0, (site.experts, -1)))
        elif product.form != "sorted":
            out = graph.call_method("unsqueeze", (out, -1 if product.form == "weight_first" else 1))
        return y, out

    def _to(self, graph: fx.Graph, y: fx.Node, dtype: torch.dtype) -> fx.Node:
        return y if dtype == torch.float32 else graph.call_method("to", (y, dtype))

    def _cast(self, graph: fx.Graph, x: fx.Node, node: fx.Node) -> fx.Node:
        """Under autocast a linear reads its input in another dtype than it gets; here that cast is written out."""
        given, wanted = example(x), example(node).dtype
        if given is None or given.dtype == wanted or not given.dtype.is_floating_point:
            return x
        cast = graph.call_method("to", (x, wanted))
        cast.meta["example_value"] = given.to(wanted)
        return cast

    def _quantize(self, graph: fx.Graph, x: fx.Node, site: Site, scheme: Scheme) -> list[fx.Node]:
        static: list[fx.Node] = []
        if scheme.static:  # kin read the same values: the first of them lends its range to all
            first = next(s for s in self.gm.meta["sites"].values() if s.name == site.name or (s.name in site.kin and _input_scheme(self.gm, s) == scheme))
            static = self._placeholders(Slot("range", first.param.index, first.view, scheme, first.name, first.path))
        made = self._quantized.get((x, str(scheme), static[0].name if static else ""))
        if made is not None:
            return made
        node = graph.call_function(target("quantize"), (x, static, str(scheme)))
        parts = [graph.call_function(operator.getitem, (node, 0))]
        if static:
            parts += static
        else:
            parts += [graph.call_function(operator.getitem, (node, 1 + i)) for i in range(1 if scheme.zero == "none" else 2)]
        self._quantized[x, str(scheme), static[0].name if static else ""] = parts
        return parts

    def _placeholders(self, slot: Slot) -> list[fx.Node]:
        key = (slot.arg, slot.view, f"{slot.what} {slot.scheme} {slot.site if slot.what == 'range' else ''}")
        if key not in self._inputs:
            tensors: Sequence[Tensor] = self.context.tensors(slot)
            like = next(p for p in self.gm.graph.find_nodes(op="placeholder") if "param" in p.meta and p.meta["param"].index == slot.arg)
            made = []
            for i, tensor in enumerate(tensors):
                made.append(compat.add_static_input(self.gm, f"{like.name}_{_PARTS[slot.what][i]}", tensor, like))
                made[-1].meta["packed"] = slot
            self._inputs[key] = made
            self.slots.append(slot)
        return self._inputs[key]


def kernel_for(site: Site, choice: Choice, value: Tensor) -> str | Skip:
    """The kernel that Inductor will use, by the same rule that the op applies when it is traced: quantized scales have been widened by then."""
    op = OPS["grouped_linear" if site.experts > 1 else "linear" if choice.input is None else "scaled_linear"]
    dtype = value.dtype if choice.input is None else choice.input.fmt.dtype
    kernel, reason = op.choose(Case(value.device, dtype, unnested(choice.weight), choice.input, site.n, site.k, site.m, site.experts))
    if kernel is not None:
        return kernel.name
    assert reason is not None
    return reason


def _input_scheme(gm: fx.GraphModule, site: Site) -> Scheme | None:
    choice = gm.meta["plan"][site.name]
    return choice.input if isinstance(choice, Choice) else None


def _erase_unused_views(graph: fx.Graph) -> None:
    """Transposes and casts of weights that nothing reads any more. Not ``eliminate_dead_code``: on a torch-level graph that would drop in-place calls whose result is unused."""
    for node in reversed(graph.nodes):
        if node.users or node.op not in ("call_method", "call_function") or not (node.target in CASTS | {"flatten", operator.getitem} or is_transpose(node)):
            continue
        source = node.args[0]
        while isinstance(source, fx.Node) and source.op in ("call_method", "call_function") and (source.target in CASTS | {operator.getitem} or is_transpose(source)):
            source = source.args[0]
        if isinstance(source, fx.Node) and "param" in source.meta:
            graph.erase_node(node)
