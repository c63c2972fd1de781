"""Quantization-aware training: every site reads its weight, and its input where the recipe gives it a scheme, as inference will see them, by ``fake_quant``, whose gradient an estimator gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qcompile.core.errors import OptionError
from qcompile.core.estimators import find_estimator
from qcompile.core.recipe import Choice, Recipe
from qcompile.core.scheme import Scheme
from qcompile.kernels.op import target

from . import experts
from .infra import graph_pass
from .match import chosen
from .observe import input_of
from .sites import Site, cast_to, example, is_transpose
from .slots import leader, slot_inputs, slots_of, state_slot
from .training import Training, no_methods

MOMENTUM = 0.01
"""How much of a batch's range enters the moving range of a static input (Jacob et al. 2018, section 3.1)."""


@graph_pass(after=("match",))
def fake_quant(gm: fx.GraphModule, context: Any = None) -> fx.GraphModule:
    """Put ``fake_quant`` before every site with a Choice; fills ``gm.meta["slots"]`` with what estimators learn and ``gm.meta["kernels"]`` (site -> the estimators)."""
    builder = _Builder(gm, context)
    for node, site, choice in chosen(gm):
        builder.insert(node, site, choice)
    gm.meta["slots"], gm.meta["kernels"], gm.meta["merged"] = slots_of(gm), builder.kernels, {}
    gm.meta["note"] = f"{len(builder.kernels)} linears train as they will be quantized"
    return gm


class _Builder:
    """The state of one insertion: what was rounded so far."""

    def __init__(self, gm: fx.GraphModule, context: Any) -> None:
        self.gm, self.context, self.settings = gm, context, context.options.training
        self.kernels: dict[str, str] = {}
        self._weights: dict[tuple[fx.Node, str, str], fx.Node] = {}
        self._inputs: dict[tuple[Any, ...], fx.Node] = {}

    def insert(self, node: fx.Node, site: Site, choice: Choice) -> None:
        """Round what one site reads."""
        by_weight, by_input = estimators(choice.weight, choice.input, self.settings)
        self._weight(node, site, choice, by_weight)
        self.kernels[site.name] = f"fake_quant ({by_weight})"
        if choice.input is not None:
            self._input(node, site, choice, by_input)
            self.kernels[site.name] = f"fake_quant ({by_input} @ {by_weight})"

    def _weight(self, node: fx.Node, site: Site, choice: Choice, estimator: str) -> None:
        product = experts.resolve(node)
        stacked = isinstance(product, experts.Experts)
        source = product.weight if isinstance(product, experts.Experts) else node.args[1]
        assert isinstance(source, fx.Node)
        key = (source, site.view if stacked else "", str(choice.weight))
        if key not in self._weights:
            learns = find_estimator(estimator).learns
            learned = slot_inputs(self.gm, self.context, state_slot(learns, site, choice)) if learns else []
            swap = stacked and site.view == "t"  # experts lie as (E, K, N)
            readers = list(source.users)
            with self.gm.graph.inserting_before(node if not stacked else readers[0]):
                own = source if stacked else self._without_casts(source)
                w = self._call(torch.transpose, own, -1, -2) if swap else own
                out = self._call(target("fake_quant"), w, learned, str(choice.weight), estimator, False)
                out = self._call(torch.transpose, out, -1, -2) if swap else out
                self._weights[key] = cast_to(self.gm.graph, out, example(source).dtype)
            if stacked:  # whatever selects or transposes the experts on the way reads the rounded ones
                for reader in readers:
                    reader.replace_input_with(source, self._weights[key])
        if not stacked:
            node.args = (node.args[0], self._weights[key], *node.args[2:])
            self._erase(source)

    def _input(self, node: fx.Node, site: Site, choice: Choice, estimator: str) -> None:
        x, scheme = input_of(node), choice.input
        assert scheme is not None
        first, theirs = leader(self.gm, site, choice)
        product = experts.resolve(node)
        by_column = isinstance(product, experts.Experts) and product.form == "weight_first"  # rows are (S, K, 1)
        key = (x, str(scheme), estimator, first.name if scheme.static else "", by_column)
        if key not in self._inputs:
            with self.gm.graph.inserting_before(node):
                rows = self._call(torch.transpose, x, -1, -2) if by_column else cast_to(self.gm.graph, x, example(node).dtype)  # before the rounding, as in lower
                learned = self._range(rows, first, theirs, estimator) if scheme.static else []
                out = self._call(target("fake_quant"), rows, learned, str(scheme), estimator, True)
                self._inputs[key] = self._call(torch.transpose, out, -1, -2) if by_column else out
        node.replace_input_with(x, self._inputs[key])

    def _without_casts(self, weight: fx.Node) -> fx.Node:
        """A linear's weight as the parameter holds it, seen alike: codes are made of that, and a model may cast it on the way. The node itself where nothing is cast."""
        steps: list[fx.Node] = []
        node: Any = weight
        while node.op != "placeholder":
            steps.append(node)
            node = node.args[0]
        dtypes = [getattr(example(n), "dtype", None) for n in (*steps, node)]
        if None in dtypes or len(set(dtypes)) == 1:
            return weight
        for step, after, before in zip(reversed(steps), reversed(dtypes[:-1]), reversed(dtypes[1:]), strict=True):
            if after != before:
                continue
            value = example(step).to(dtypes[-1])
            node = self.gm.graph.create_node(step.op, step.target, (node, *step.args[1:]), dict(step.kwargs))
            node.meta["example_value"] = value
        made: fx.Node = node
        return made

    def _erase(self, node: Any) -> None:
        """Casts and views that nobody reads any more."""
        while node.op != "placeholder" and not node.users:
            unread, node = node, node.args[0]
            self.gm.graph.erase_node(unread)

    def _range(self, x: fx.Node, site: Site, choice: Choice, estimator: str) -> list[fx.Node]:
        """What fixes the range of a static input: learned, or a moving range of what came, ``[lo, hi]``, which this call enters first."""
        learns = find_estimator(estimator).learns
        if learns:
            return slot_inputs(self.gm, self.context, state_slot(f"input_{learns}", site, choice))
        (held,) = slot_inputs(self.gm, self.context, state_slot("input_range", site, choice))
        graph = self.gm.graph
        seen = graph.call_function(target("moving_range"), (self._call(torch.detach, x), held, MOMENTUM, self.settings["reduce"]))
        graph.call_method("copy_", (held, seen))
        return [seen]

    def _call(self, fn: Any, *args: Any) -> fx.Node:
        """A node with the value that its first argument's shape gives it."""
        node = self.gm.graph.call_function(fn, args)
        value = example(args[0])
        if value is not None:
            node.meta["example_value"] = value.transpose(-1, -2) if is_transpose(node) else value
        return node


def estimators(weight: Scheme, x: Scheme | None, settings: Mapping[str, Any]) -> tuple[str, str]:
    """(of a weight, of an input): those that were named, else lsq for integer weights of at most four bits and for static inputs, where it fits, and ste. Raises OptionError where a named one does not fit."""
    out = []
    for scheme, name, activation in ((weight, settings["weight"], False), (x, settings["input"], True)):
        if scheme is None:
            out.append("ste")
            continue
        row = find_estimator(name or ("lsq" if (scheme.static if activation else scheme.fmt.kind == "int" and scheme.fmt.bits <= 4) else "ste"))
        if (reason := row.refuses(scheme, activation)) is not None:
            if name:
                raise OptionError(f"options['train']: {reason}")
            row = find_estimator("ste")
            if (reason := row.refuses(scheme, activation)) is not None:
                raise OptionError(f"options['train']: {reason}")
        out.append(row.name)
    return out[0], out[1]


def check(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """OptionError for a recipe that solves for codes, or estimators that fit none of its schemes."""
    no_methods(recipe, "training")
    for weight, x in ((recipe.weight, recipe.input), *((rule.weight, rule.input) for rule in recipe.rules if rule.weight), *(((recipe.head, None),) if recipe.head else ())):
        if weight != "16bit" and weight is not None:
            estimators(Scheme.parse(weight), Scheme.parse(x) if x and x != "16bit" else None, settings)


TRAINING = Training(
    "qat",
    fake_quant,
    {
        "weight": ("", "the estimator of weights: ste, lsq or pact"),
        "input": ("", "the estimator of activations: ste, or for a static scheme lsq or pact"),
        "reduce": (True, "whether ranges and learned numbers are one over the process group"),
    },
    check,
    doc="quantization-aware training: weights and inputs are rounded as inference will round them, and an estimator gives the gradient",
)
