"""Graphs for the tests of passes: a model captured by Dynamo, passes run on it with a small context, and its function compared before and after."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.capture import capture
from qcompile.core.recipe import Recipe, find_recipe
from qcompile.fill import shapes_of
from qcompile.passes import PASSES
from qcompile.passes.infra import Step, run, text

FOUND = ("normalize", "find_sites")
MATCHED = (*FOUND, "match")
LOWERED = (*MATCHED, "observe", "lower")


def captured(model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> tuple[fx.GraphModule, list[Any]]:
    """(the graph as ``capture`` gives it, Dynamo's inputs)."""
    found: list[Any] = []

    def keep(gm: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
        found.append((capture(gm, args), list(args), compat.fake_mode(args)))
        return gm

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*inputs)
    gm, args, mode = found[0]
    gm.meta["test_fake_mode"] = mode
    return gm, args


def context(gm: fx.GraphModule, args: Sequence[Any], recipe: str | Recipe = "W8A8") -> Any:
    """What passes ask of the backend. ``asked`` collects the sites that ``observe`` wants ranges of."""
    mode, asked = gm.meta["test_fake_mode"], []

    def tensors(slot: Any) -> list[Tensor]:
        with mode:
            return shapes_of(slot, args)

    def calibrate(_: Any, sites: Any) -> tuple[str, dict[str, Any]]:
        asked.extend(site.name for site in sites)
        return f"{len(sites)} ranges", {}

    return types.SimpleNamespace(recipe=find_recipe(recipe), tensors=tensors, calibrate=calibrate, asked=asked, fake_mode=mode)


def through(names: Sequence[str], model: Callable[..., Any], *inputs: Any, recipe: str | Recipe = "W8A8", steps: list[Step] | None = None) -> fx.GraphModule:
    """The model's graph after the named passes."""
    gm, args = captured(model, *inputs)
    return run([PASSES[name] for name in names], gm, context(gm, args, recipe), steps)


def texts(names: Sequence[str], model: Callable[..., Any], *inputs: Any, recipe: str | Recipe = "W8A8") -> str:
    return text(through(names, model, *inputs, recipe=recipe))


def refusals(gm: fx.GraphModule) -> list[str]:
    return [f"{left.path} {left.shape}: {left.reason}" for left in gm.meta["skipped"]]


def outputs(gm: fx.GraphModule, args: Sequence[Any]) -> list[Tensor]:
    with torch.no_grad():
        return list(gm(*args))
