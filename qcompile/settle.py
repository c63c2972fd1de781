"""Solutions for the sites of a graph that is being compiled: known ones, those that a calibration gives, or those of recorded calls or of this call itself."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat, stored
from qcompile.calibrate import KEPT, autocast_of, concrete, solve, warn_of
from qcompile.core.errors import QcompileWarning
from qcompile.core.recipe import Choice
from qcompile.core.solution import Solution
from qcompile.gate import enforce
from qcompile.memory import is_released
from qcompile.options import memory_of as budget
from qcompile.owners import owners
from qcompile.passes import SOLVERS
from qcompile.passes.norms import mean_before
from qcompile.passes.producers import place, shared
from qcompile.passes.sites import Site, view
from qcompile.passes.slots import leader
from qcompile.replay import Unit
from qcompile.sequence import Outcome, Run, Solved, found, keep_codes, solution_key
from qcompile.solve import Member, analytical, from_statistics, inapplicable, needs_data
from qcompile.statistics import Calibration
from qcompile.trained import STATE
from qcompile.weights import TABLE

TRAINED = "range as it was trained"
JOINT = "solved on the rows of all experts together: the calibration file has no statistics of each"


def settle(gm: fx.GraphModule, inputs: Sequence[Any], options: Any) -> tuple[str, dict[str, Choice]]:
    """Solutions for all sites of a matched graph with these parameters. Returns a line for the report and the choices with what was found.

    What is not solved yet comes from ``options.calibration``, from calls that were recorded, or from this call itself.
    """
    sites = {name: (gm.meta["sites"][name], c) for name, c in gm.meta["plan"].items() if isinstance(c, Choice) and (c.methods or (c.input is not None and c.input.static))}
    missing, left, note = [], Outcome(), "known from an earlier call"
    names = owners() if any(site.stored for site, _ in sites.values()) else {}
    for site, choice in sites.values():
        record = TABLE.record(inputs[site.param.index], site.path)
        if solution_key(site, choice) not in record.solutions:
            if site.stored is not None:
                owner = stored.of(inputs[site.param.index], names)
                assert owner is not None
                TABLE.solve(inputs[site.param.index], solution_key(site, choice), stored.live(owner), site.path)
            elif not choice.methods and (learned := _learned(gm, inputs, site, choice)):
                TABLE.solve(inputs[site.param.index], solution_key(site, choice), Solution(range=learned, notes=(TRAINED,)), site.path)
            elif needs_data(choice):
                missing.append(site)
            else:
                notes = inapplicable(choice, view(inputs[site.param.index], site.view))
                TABLE.solve(inputs[site.param.index], solution_key(site, choice), Solution(notes=notes), site.path)
                left.solved.append(Solved(site.path, str(choice), None, 0, 0.0, notes, choice))
    warn_of(left)
    own = Unit(gm, inputs, autocast_of(inputs)) if missing else None
    if own is not None and options.calibration is not None:
        note = _from_calibration(own, inputs, options, [s.name for s in missing])
    elif own is not None:
        kept = [u for u in KEPT if u.alive and u.shares(own) and all(s.name in u.sites and u.plan[s.name] == gm.meta["plan"][s.name] for s in missing)]
        if not kept:
            own.record([concrete(a) for a in inputs])
        outcome = solve(kept or [own], budget(options.calibration_memory), progress=False, again=False)
        warn_of(outcome)
        enforce(outcome, options.strict, kept or [own])
        note = f"calibrated {len(missing)} linears on " + ("what was recorded" if kept else "the first call") + f", which had {outcome.tokens} tokens"
    choices = {name: found(choice, TABLE.record(inputs[site.param.index], site.path).solutions[solution_key(site, choice)]) for name, (site, choice) in sites.items()}
    return note if sites else "", choices


def _learned(gm: fx.GraphModule, inputs: Sequence[Any], site: Site, choice: Choice) -> tuple[Tensor, ...]:
    """The range of a site's input that training found; kin share it. Empty where there is none."""
    first, _ = leader(gm, site, choice)
    assert choice.input is not None
    return STATE.range(inputs[first.param.index], first.name, first.view, choice.input)


def _from_calibration(own: Unit, inputs: Sequence[Any], options: Any, names: Sequence[str]) -> str:
    """Solve what is missing from statistics, and measure it on this call: the gate judges it."""
    given, gm = options.calibration, own.gm
    calibration = given if isinstance(given, Calibration) else Calibration.load(given)
    calibration.check([gm.meta["sites"][name] for name in names], inputs)
    if others := [] if options.root else _of_no_live_linear(calibration, own.sites):
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        warnings.warn(f"qcompile: {calibration} has statistics of linears that no live model has: {', '.join(others[:4])}{more}", QcompileWarning, stacklevel=3)
    groups: dict[Any, list[Site]] = {}
    for name in names:
        site, choice = gm.meta["sites"][name], gm.meta["plan"][name]
        groups.setdefault((frozenset((name, *site.kin)), choice.input, choice.methods), []).append(site)
    for sites in groups.values():
        sites = sorted(sites, key=lambda s: list(gm.meta["sites"]).index(s.name))
        with compat.no_dispatch_modes(), torch.no_grad():
            _solved(gm, inputs, calibration, sites)
    if not any(map(is_released, own.parameters())):  # else there is nothing to compare with
        own.record([concrete(a) for a in inputs])
        outcome = Run([own], budget(options.calibration_memory), lambda: None, lambda line: None).judge()
        warn_of(outcome)
        enforce(outcome, options.strict, [own])
    return f"solved {len(names)} linears from {calibration}"


def _solved(gm: fx.GraphModule, inputs: Sequence[Any], calibration: Calibration, sites: Sequence[Site]) -> None:
    """Solutions of sites that share an input."""
    seen = calibration.of(sites[0], inputs[sites[0].param.index].device)
    means = [mean_before(gm, s.name, inputs.__getitem__) if analytical(gm.meta["plan"][s.name]) else None for s in sites]
    members = [Member(s, gm.meta["plan"][s.name], view(inputs[s.param.index].detach(), s.view), mean) for s, mean in zip(sites, means)]
    spot = place(gm, [s.name for s in sites])
    for member, solution in zip(members, from_statistics(members, seen, lambda v: shared(v, spot), str(calibration))):
        p = inputs[member.site.param.index]
        if member.weight.dim() == 3 and not seen.experts and any(m.name in SOLVERS and SOLVERS[m.name].needs for m in member.choice.methods):
            solution.notes = (*solution.notes, JOINT)
        keep_codes(solution, member.choice, p)
        TABLE.solve(p, solution_key(member.site, member.choice), solution, member.site.path)


def _of_no_live_linear(calibration: Calibration, mine: Mapping[str, Site]) -> list[str]:
    """Names that a calibration knows and no live model has: several graphs may share one file."""
    live = {stored.plain(path, name).removesuffix(".weight") for _, path, name in owners().values()} | set(mine)
    return [name for name in calibration.statistics() if name not in live and re.sub(r"@\d+$", "", name) not in live]
