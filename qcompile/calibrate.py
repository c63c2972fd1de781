"""Ranges of activations for static schemes. A range belongs to the parameter that reads the input, so that layers that share one compiled graph have each their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.core.errors import Skip, WeightError
from qcompile.core.ranges import scale_of
from qcompile.core.recipe import Choice
from qcompile.core.scheme import Scheme
from qcompile.passes.observe import run_observed
from qcompile.passes.sites import Site
from qcompile.weights import TABLE


def is_static(choice: Choice | Skip) -> bool:
    """The input's range is fixed by calibration."""
    return isinstance(choice, Choice) and choice.input is not None and choice.input.static


def calibrate(gm: fx.GraphModule, sites: Sequence[Site], inputs: Sequence[Any]) -> str:
    """Ranges of the inputs of ``sites`` from one real call, for parameters that have none yet. Returns a line for the report, empty where all were known."""
    missing = [s for s in sites if use(s.name) not in TABLE.record(inputs[s.param.index], s.path).ranges]
    if not missing:
        return ""
    seen: dict[str, Tensor] = {}
    tokens = 0

    def see(name: str, x: Tensor) -> None:
        nonlocal tokens
        if x.numel():
            peak = x.detach().abs().amax().float()
            seen[name] = torch.maximum(seen[name], peak) if name in seen else peak
            tokens = max(tokens, x.numel() // x.shape[-1])

    run_observed(gm, inputs, {s.name for s in missing}, see)
    for site in missing:
        if site.name not in seen:
            raise WeightError(f"the calibrating call gave {site.name} no rows; its range cannot be fixed. Call the model first with data that is typical.")
        if not bool(torch.isfinite(seen[site.name])):
            raise WeightError(f"the input of {site.name} has values that are NaN or infinite in the calibrating call; its range cannot be fixed")
    for site in missing:
        TABLE.record(inputs[site.param.index], site.path).ranges[use(site.name)] = seen[site.name]
    return f"calibrated {len(missing)} input ranges on the first call, which had {tokens} tokens"


def static_scale(parameter: Tensor, site: str, path: str, scheme: Scheme) -> Tensor:
    """The scale that a site's calibrated range gives a scheme: one tensor for each, which keeps its address."""
    ranges, key = TABLE.record(parameter, path).ranges, f"{site} {scheme}"
    if key not in ranges or ranges[key].device != parameter.device:
        ranges[key] = scale_of(ranges[use(site)], scheme.fmt).reshape(1).to(parameter.device)
    return ranges[key]


def use(site: str) -> str:
    """Which use of its parameter a site is: "range" the first, "range@2" the second in its graph."""
    return "range" + ("@" + site.rpartition("@")[2] if "@" in site else "")
