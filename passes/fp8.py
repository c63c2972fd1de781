"""FP8 training: every linear with a scheme becomes ``fp8_linear``, whose three products multiply in FP8; delayed scaling reads and writes one history for all linears of the graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.core.errors import OptionError, Skip, unknown
from qcompile.core.recipe import KEEP, Choice, Recipe
from qcompile.core.scheme import Scheme
from qcompile.kernels.fp8_history import E4M3, NUMBERS
from qcompile.kernels.fp8_linear import SCALINGS, kernel_for
from qcompile.kernels.op import target

from .infra import graph_pass
from .sites import Site, cast_to, example
from .slots import slot_inputs, slots_of, state_slot
from .training import Training, no_methods


@graph_pass(after=("match",))
def fp8(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Replace every linear with a Choice; fills ``gm.meta["slots"]`` with the histories and ``gm.meta["kernels"]`` (site -> what multiplies, or a Skip where it is emulated)."""
    builder = _Builder(gm, context)
    for node in list(gm.graph.nodes):
        if node.meta.get("site", "") in builder.rows:
            builder.replace(node, gm.meta["sites"][node.meta["site"]])
    builder.close()
    gm.meta["slots"], gm.meta["kernels"], gm.meta["merged"] = slots_of(gm), builder.kernels, {}
    gm.meta["note"] = f"{len(builder.kernels)} linears train in FP8, scaling {builder.how!r}"
    return gm


class _Builder:
    """The state of one insertion. Linears are numbered: that is their row in the histories."""

    def __init__(self, gm: fx.GraphModule, context: Any) -> None:
        self.gm, self.context, self.settings = gm, context, context.options.training
        self.how = str(self.settings["scaling"])
        named = {n.meta["site"] for n in gm.graph.nodes if "site" in n.meta}
        self.rows = {name: i for i, name in enumerate(name for name, c in gm.meta["plan"].items() if isinstance(c, Choice) and name in named)}
        self.kernels: dict[str, str | Skip] = {}
        self._first: dict[fx.Node, int] = {}
        self._amax: dict[int, fx.Node] = {}
        self._numbers: list[fx.Node] = []
        self._held: dict[str, fx.Node] = {}
        if SCALINGS[self.how].delayed and self.rows:
            self._open()

    def _open(self) -> None:
        """The histories, and the scales that they give: before everything else, and never computed again in the backward, which would see histories that moved."""
        for kind in ("fp8_forward", "fp8_backward"):
            first, *rest = (replace(state_slot(kind, self.gm.meta["sites"][name], self.gm.meta["plan"][name]), count=int(self.settings["history"])) for name in self.rows)
            (self._held[kind],) = slot_inputs(self.gm, self.context, replace(first, rest=tuple(rest)))
        last = [n for n in self.gm.graph.nodes if n.op == "placeholder"][-1]
        with self.gm.graph.inserting_after(last):
            numbers = self.gm.graph.call_function(target("fp8_scales"), (self._held["fp8_forward"], self._held["fp8_backward"], self.settings["margin"], self.settings["reduce"], self.settings["leap"]))
        numbers.meta |= {"example_value": example(self._held["fp8_forward"]).new_empty((len(self.rows), NUMBERS)), **compat.saved_mark()}
        self._numbers = [numbers]

    def replace(self, node: fx.Node, site: Site) -> None:
        """``fp8_linear`` and the bias in the place of one linear. Those that read the same input share its scale, so that it is cast once."""
        graph, value = self.gm.graph, example(node)
        x, weight, bias = (*node.args, None)[:3]
        assert isinstance(x, fx.Node)
        row = self.rows[site.name]
        first = self._first.setdefault(x, row)
        self.kernels[site.name] = _kernel(site, value)
        with graph.inserting_before(node):
            history = [self._held["fp8_backward"]] if self._held else []
            op = graph.call_function(target("fp8_linear"), (cast_to(graph, x, value.dtype), weight, self._numbers, history, row, first, self.how))
            op.meta = {**compat.saved_mark(), **{k: v for k, v in node.meta.items() if k != "example_value"}}  # a checkpointed body computes its codes again, nobody else does
            out = self._part(op, 0, value)
            if self._held:
                self._amax[row] = self._part(op, 5, value.new_empty(2, dtype=torch.float32))
            if isinstance(bias, fx.Node):
                out = graph.call_function(torch.add, (out, cast_to(graph, bias, value.dtype)))
        out.meta = {**node.meta, "example_value": value}
        out.meta.pop("site")
        name = node.name
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        out.name = name

    def close(self) -> None:
        """Enter what this call saw: one write for all linears."""
        if not self._held:
            return
        held, graph = self._held["fp8_forward"], self.gm.graph
        with graph.inserting_before(graph.output_node()):
            after = graph.call_function(target("fp8_record"), (held, self._numbers[0], [self._amax[row] for row in sorted(self._amax)]))
            after.meta["example_value"] = example(held)
            graph.call_function(torch.Tensor.copy_, (held, after))

    def _part(self, op: fx.Node, i: int, value: Tensor) -> fx.Node:
        part = self.gm.graph.call_function(operator.getitem, (op, i))
        part.meta |= {k: v for k, v in op.meta.items() if k in compat.recompute_mark(0)} | {"example_value": value}
        return part


def _kernel(site: Site, value: Tensor) -> str | Skip:
    found = [kernel_for(value.device, value.dtype, *size) for size in ((site.n, site.k), (site.k, site.n))]
    return next((f for f in found if isinstance(f, Skip)), found[0])


def keeps(site: Site, choice: Choice) -> Skip | None:
    """Why a linear with a scheme trains in 16 bits all the same, or None."""
    if site.experts > 1:
        return Skip("experts train in 16 bits: FP8 products of stacked weights are not built")
    if choice.weight.fmt.native is not E4M3:
        return Skip(f"its scheme is {choice.schemes}, and FP8 training multiplies in e4m3")
    return None


def check(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """OptionError for arguments out of range, a recipe that solves for codes, or one that is of another format."""
    if settings["scaling"] not in SCALINGS:
        raise unknown("scaling", settings["scaling"], SCALINGS, "options['train']")
    for name, least in (("history", 1), ("margin", 0), ("leap", 0)):
        if not least <= settings[name] <= MOST.get(name, settings[name]):
            most = f" and at most {MOST[name]}" if name in MOST else ""
            raise OptionError(f"options['train']: fp8({name}=...) is {TRAINING.arguments[name][1]}, at least {least}{most}, not {settings[name]}")
    no_methods(recipe, "training")
    if recipe.weight != KEEP and Scheme.parse(recipe.weight).fmt.native is not E4M3:
        raise OptionError(f"options['train']: fp8 multiplies in e4m3, and recipe {recipe.name} quantizes weights to {recipe.weight}; name no recipe, which means {TRAINING.recipe}, or one of e4m3 weights")


MOST = {"margin": 64, "leap": 64}
"""Powers of two beyond which a scale has no value in float32 any more."""
TRAINING = Training(
    "fp8",
    fp8,
    {
        "scaling": ("tensor", f"where scales come from: {', '.join(SCALINGS)}"),
        "history": (1024, "how many calls delayed scaling looks back"),
        "margin": (0, "how many powers of two delayed scaling leaves free above the history"),
        "leap": (6, "how many powers of two above the usual of the last 16 calls the greatest of the history may count; what is beyond saturates; 0: no limit"),
        "reduce": (True, "whether delayed scales are one over the process group"),
    },
    check,
    recipe="FP8",
    keeps=keeps,
    doc="linears multiply in FP8, forward (E4M3) and backward (E5M2; E4M3 by rows): " + "; ".join(f"{row.name}, {row.doc}" for row in SCALINGS.values()),
)
