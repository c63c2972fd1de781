"""Put quantized ops in the place of linears. Weights come in as inputs: each op's tensors are placeholders behind Dynamo's own, filled on every call from the weight table.

A linear ``y = linear(x, w, b)`` of dtype T becomes ``quantize`` (once for all readers of x), ``scaled_linear`` or ``linear`` in float32, ``+ b`` and a cast to T: all that follows
the product is plain torch, which Inductor fuses into the product's store.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.core.errors import Skip
from qcompile.core.recipe import Choice
from qcompile.kernels import OPS
from qcompile.kernels.linear import unnested
from qcompile.kernels.op import Case, target
from qcompile.kernels.scaled_linear import spell

from . import experts, outliers
from .infra import graph_pass
from .match import chosen
from .merge import bias_of
from .parts import stays
from .sites import CASTS, Site, cast_to, example, is_transpose
from .slots import leader, slot_inputs, slot_of, slots_of


@graph_pass(after=("match",))
def lower(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Rewrite every site with a Choice; fills ``gm.meta["slots"]`` and ``gm.meta["kernels"]`` (site -> kernel name, or Skip)."""
    builder = Builder(gm, context)
    for node, site, choice in chosen(gm):
        builder.rewrite(node, site, choice)
    erase_unused_views(gm.graph)
    gm.meta["slots"] = slots_of(gm)
    gm.meta["kernels"] = builder.kernels
    gm.meta["note"] = f"{len(builder.kernels)} linears lowered, {sum(isinstance(k, Skip) for k in builder.kernels.values())} without a kernel"
    return gm


class Builder:
    """The state of one lowering: placeholders made so far, quantized inputs made so far."""

    def __init__(self, gm: fx.GraphModule, context: Any) -> None:
        self.gm, self.context = gm, context
        self.kernels: dict[str, str | Skip] = {}
        self._nodes = {node.meta["site"]: node for node in gm.graph.nodes if "site" in node.meta}
        self._quantized: dict[tuple[fx.Node, str, str], list[fx.Node]] = {}
        self._splits: dict[tuple[fx.Node, str], outliers.Split] = {}
        self._merged: dict[tuple[str, ...], tuple[fx.Node, fx.Node]] = {}
        """Products of merged sites, and the same cast."""

    def rewrite(self, node: fx.Node, site: Site, choice: Choice) -> None:
        """Replace one site's node."""
        graph = self.gm.graph
        kin = self.gm.meta.get("merged", {}).get(site.name)
        weight = [] if kin else slot_inputs(self.gm, self.context, slot_of("weight", site, choice))
        self.kernels[site.name] = kernel_for(site, choice, example(node))
        product = experts.resolve(node)
        with graph.inserting_before(node):
            if kin:
                y, out = self._part(graph, node, site, choice, kin)
            elif isinstance(product, experts.Experts):
                y, out = self._grouped(graph, node, site, choice, product, weight)
            else:
                y, out = self._linear(graph, node, site, choice, weight)
        out.meta = {**node.meta}
        if out is not y:
            out.meta.pop("site", None)
        if "site" not in y.meta:  # a merged product keeps the name of its first site
            own = {key: value for key, value in y.meta.items() if key == "example_value"}
            y.meta = {**{key: value for key, value in node.meta.items() if out is y or key != "example_value"}, **own}
        name = node.name
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        out.name = name

    def _linear(self, graph: fx.Graph, node: fx.Node, site: Site, choice: Choice, weight: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """(the product, what replaces the node)."""
        x, _, bias = (*node.args, None)[:3]
        assert isinstance(x, fx.Node)
        x = cast_to(graph, x, example(node).dtype)
        split = self._split(graph, x, site, choice)
        out = y = self._product(graph, x, site, choice, weight) if split is None else self._beside(graph, split, node, site, choice, weight)
        if bias is not None:
            out = graph.call_function(torch.add, (out, bias))
        if choice.corrected:
            out = graph.call_function(torch.add, (out, self._slot("bias", site, choice)))
        out.meta["example_value"] = example(node).to(torch.float32)  # AOTAutograd's cache passes over methods of untyped nodes
        return y, self._to(graph, out, example(node).dtype)

    def _product(self, graph: fx.Graph, x: fx.Node, site: Site, choice: Choice, weight: list[fx.Node]) -> fx.Node:
        """(..., N) float32."""
        if choice.input is None:
            return graph.call_function(target("linear"), (x, weight, str(choice.weight)))
        codes, scale = self._operand(graph, x, site, choice)
        return graph.call_function(target("scaled_linear"), (codes, scale, weight, spell(choice.input, choice.weight)))

    def _part(self, graph: fx.Graph, node: fx.Node, site: Site, choice: Choice, kin: tuple[str, ...]) -> tuple[fx.Node, fx.Node]:
        """(the product of all kin, made at the first of them, this site's columns of it). It is cast whole, so that it is stored in 16 bits."""
        sites = [self.gm.meta["sites"][name] for name in kin]
        if kin not in self._merged:
            first, *rest = (slot_of("weight", s, self.gm.meta["plan"][s.name]) for s in sites)
            x = node.args[0]
            assert isinstance(x, fx.Node)
            y = self._product(graph, cast_to(graph, x, example(node).dtype), site, choice, slot_inputs(self.gm, self.context, replace(first, rest=tuple(rest))))
            value = example(node)
            y.meta = {**node.meta, "example_value": value.new_empty((*value.shape[:-1], sum(s.n for s in sites)), dtype=torch.float32)}
            self._merged[kin] = y, self._to(graph, self._biased(graph, y, sites), value.dtype)
        y, whole = self._merged[kin]
        value, start, width = example(node), sum(s.n for s in sites[: kin.index(site.name)]), int(example(y).shape[-1])
        part = graph.call_function(torch.narrow, (whole, -1, start, site.n))  # a function: AOTAutograd's cache passes over methods of untyped nodes
        if not stays(node, value.new_empty((*value.shape[:-1], width)).narrow(-1, start, site.n)):
            part.meta["example_value"] = value
            part = graph.call_method("contiguous", (part,))
        return y, part

    def _biased(self, graph: fx.Graph, y: fx.Node, sites: list[Site]) -> fx.Node:
        """The product of all kin with their biases, zeros for those that have none."""
        biases = [bias_of(self._nodes[site.name]) for site in sites]
        if not any(biases):
            return y
        value = example(y)
        pieces = [b if b is not None else graph.call_function(torch.zeros, (site.n,), {"dtype": value.dtype, "device": value.device}) for b, site in zip(biases, sites)]
        bias = graph.call_function(torch.cat, (pieces,))
        bias.meta["example_value"] = value.new_empty((value.shape[-1],))
        out = graph.call_function(torch.add, (y, bias))
        out.meta["example_value"] = value
        return out

    def _slot(self, what: str, site: Site, choice: Choice) -> fx.Node:
        return slot_inputs(self.gm, self.context, slot_of(what, site, choice))[0]

    def _split(self, graph: fx.Graph, x: fx.Node, site: Site, choice: Choice) -> outliers.Split | None:
        """The outlier columns of x apart from the others, once for all kin."""
        dynamic = outliers.dynamic(choice)
        if (not choice.outliers and dynamic is None) or 0 in example(x).shape:  # no rows, nothing large
            return None
        first, theirs = leader(self.gm, site, choice)
        key = (x, first.name)
        if key not in self._splits:
            if dynamic is not None:
                self._splits[key] = outliers.find(graph, x, dynamic, self._slot("missed", first, theirs))
            else:
                self._splits[key] = outliers.given(graph, x, *(self._slot(what, first, theirs) for what in ("mask", "outliers")))
        return self._splits[key]

    def _beside(self, graph: fx.Graph, split: outliers.Split, node: fx.Node, site: Site, choice: Choice, weight: list[fx.Node]) -> fx.Node:
        """(..., N) float32, the outlier columns in 16 bits."""
        x, scale = self._operand(graph, split.dense, site, choice)
        columns, gather = self._columns(split, node, site, choice, weight)
        return graph.call_function(target("split_linear"), (x, scale, weight, split.x, columns, split.index, True, gather, spelled(choice)))

    def _columns(self, split: outliers.Split, node: fx.Node, site: Site, choice: Choice, weight: list[fx.Node]) -> tuple[fx.Node, bool]:
        """What multiplies the outlier columns, and whether they have to be gathered. Static ones were kept; dynamic ones are those of the 16-bit weight (N, K), or are read off the codes."""
        how, graph = outliers.dynamic(choice), self.gm.graph
        if how is None:
            return self._slot("columns", site, choice), False
        whole = node.args[1]
        while isinstance(whole, fx.Node) and whole.target in CASTS:  # the op casts what it reads
            whole = whole.args[0]
        if not how.codes and not choice.smooth:
            return whole, True  # type: ignore[return-value]
        index = graph.call_function(torch.clamp, (split.index, 0))
        if how.codes:
            return graph.call_function(target("columns"), (weight, index, str(choice.weight), site.k)), False
        columns = graph.call_function(torch.index_select, (node.args[1], -1, index))
        inverse = graph.call_function(torch.index_select, (self._slot("smooth", *leader(self.gm, site, choice)), 0, index))
        return graph.call_function(torch.div, (columns, inverse)), False  # x was divided by s, so that these columns are multiplied by it

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
        y = self._experts(graph, x, index, site, choice, weight, product.form in ("weight_first", "rows_first"))
        out = self._to(graph, y, example(node).dtype)
        if product.form == "dense":
            out = graph.call_method("unflatten", (out, 0, (site.experts, -1)))
        elif product.form != "sorted":
            out = graph.call_method("unsqueeze", (out, -1 if product.form == "weight_first" else 1))
        return y, out

    def _experts(self, graph: fx.Graph, x: fx.Node, index: fx.Node | None, site: Site, choice: Choice, weight: list[fx.Node], by_row: bool) -> fx.Node:
        """(S, N) float32."""
        codes, scale = self._operand(graph, x, site, choice)
        return graph.call_function(target("grouped_linear"), (codes, scale, index, weight, spelled(choice), by_row))

    def _to(self, graph: fx.Graph, y: fx.Node, dtype: torch.dtype) -> fx.Node:
        return y if dtype == torch.float32 else graph.call_method("to", (y, dtype))

    def _operand(self, graph: fx.Graph, x: fx.Node, site: Site, choice: Choice) -> tuple[fx.Node, list[fx.Node]]:
        """What a product reads, and its scales: x itself and none where activations stay in 16 bits."""
        if choice.input is None:
            return x, []
        codes, *scale = self._quantize(graph, x, site, choice)
        return codes, scale

    def _quantize(self, graph: fx.Graph, x: fx.Node, site: Site, choice: Choice) -> list[fx.Node]:
        scheme = choice.input
        assert scheme is not None
        static = slot_inputs(self.gm, self.context, slot_of("range", *leader(self.gm, site, choice))) if scheme.static else []
        key = (x, str(scheme), static[0].name if static else "")
        if key in self._quantized:
            return self._quantized[key]
        node = graph.call_function(target("quantize"), (x, static, str(scheme)))
        parts = [graph.call_function(operator.getitem, (node, 0))]
        parts += static or [graph.call_function(operator.getitem, (node, 1 + i)) for i in range(1 if scheme.zero == "none" else 2)]
        self._quantized[key] = parts
        return parts


def spelled(choice: Choice) -> str:
    """The string of an op that takes either: ``input @ weight``, or the weight's scheme alone."""
    return str(choice.weight) if choice.input is None else spell(choice.input, choice.weight)


def kernel_for(site: Site, choice: Choice, value: Tensor) -> str | Skip:
    """The kernel that Inductor will use, by the same rule that the op applies when it is traced: quantized scales have been widened by then."""
    op = OPS["grouped_linear" if site.experts > 1 else "linear" if choice.input is None else "scaled_linear"]
    dtype = value.dtype if choice.input is None else choice.input.fmt.dtype
    kernel, reason = op.choose(Case(value.device, dtype, unnested(choice.weight), choice.input, site.n, site.k, site.m, site.experts))
    if kernel is not None:
        return kernel.name
    assert reason is not None
    return reason


def erase_unused_views(graph: fx.Graph) -> None:
    """Transposes and casts of weights that nothing reads any more. Not ``eliminate_dead_code``: on a torch-level graph that would drop in-place calls whose result is unused."""
    for node in reversed(graph.nodes):
        if node.users or node.op not in ("call_method", "call_function") or not (node.target in CASTS | {"flatten", operator.getitem} or is_transpose(node)):
            continue
        source = node.args[0]
        while isinstance(source, fx.Node) and source.op in ("call_method", "call_function") and (source.target in CASTS | {"flatten", operator.getitem} or is_transpose(source)):
            source = source.args[0]
        if isinstance(source, fx.Node) and "param" in source.meta:
            graph.erase_node(node)
