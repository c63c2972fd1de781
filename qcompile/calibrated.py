"""What calibration found for the linears of a compiled graph, as values of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcompile.core.recipe import Choice
from qcompile.core.scheme import Scheme
from qcompile.core.solution import Solution
from qcompile.fill import tensors_of
from qcompile.passes import SOLVERS
from qcompile.passes.outliers import dynamic
from qcompile.report import Calibrated
from qcompile.tables import EXACT_DB

if TYPE_CHECKING:
    from qcompile.backend import CompiledGraph

NAMED = 4
"""Linears that one note lists."""


def of(graph: CompiledGraph, name: str, solution: Solution | None) -> Calibrated | None:
    """The row of one site; None where nothing was calibrated for it, nor left out."""
    choice = graph.plan[name]
    if solution is None or not (solution.tokens or solution.notes) or not isinstance(choice, Choice):
        return None
    solver = next((m.name for m in choice.methods if m.name in SOLVERS), "rtn")
    place = graph.planned.meta.get("places", {}).get(name)
    columns = tuple(solution.outliers.tolist()) if solution.outliers is not None else ()
    decibels = None if solution.decibels is None or solution.decibels != solution.decibels else max(-EXACT_DB, min(EXACT_DB, solution.decibels))
    return Calibrated(solver, tuple(map(str, choice.methods)), place, columns, clip_of(choice.input, solution), decibels, solution.tokens, solution.notes)


def clip_of(scheme: Scheme | None, solution: Solution) -> tuple[float, float] | None:
    """Least and greatest value of a static input range; None where the range is not fixed."""
    if scheme is None or not scheme.static or not solution.range:
        return None
    scale = float(solution.range[0])
    zero = float(solution.range[1]) if len(solution.range) > 1 else 0.0
    low = scheme.fmt.lo if scheme.zero != "none" else -scheme.fmt.hi  # a symmetric scale maps the clip to the greatest code
    return (low - zero) * scale, (scheme.fmt.hi - zero) * scale


def notes(rows: Mapping[str, Calibrated | None]) -> list[str]:
    """What was done instead of what was asked for, and what searches chose, linears with the same note together."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        for note in row.notes if row is not None else ():
            found.setdefault(note, []).append(name)
    return [f"{_listed(names)}: {note}" for note, names in found.items()]


def missed(graph: CompiledGraph, args: Mapping[int, Any], names: Mapping[str, str]) -> list[str]:
    """Inputs whose dynamic split was not enough in some calls so far; ``args`` holds the graph's arguments, ``names`` the sites' names in the report."""
    found: dict[str, list[str]] = {}
    for slot in graph.slots:
        if slot.what == "missed" and (count := int(tensors_of(slot, args[slot.arg])[0])):
            choice = graph.plan[slot.site]
            how = dynamic(choice) if isinstance(choice, Choice) else None
            assert how is not None
            calls = "1 call" if count == 1 else f"{count} calls"
            words = f"in {calls} more than {how.columns} columns of the input passed {how.threshold}, those beyond were quantized: outliers(dynamic={2 * how.columns}) keeps more"
            found.setdefault(words, []).append(names[slot.site])
    return [f"{_listed(sites)}: {words}" for words, sites in found.items()]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
