"""Statistics of the unquantized model's activations, by the names of its linears: taken on recorded calls, saved and loaded as safetensors."""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import CalibrationError, QcompileWarning
from qcompile.core.recipe import Choice
from qcompile.core.stats import STATISTICS, Stats, from_tensors, to_tensors
from qcompile.passes import SOLVERS
from qcompile.passes.sites import Site
from qcompile.replay import Call, Group, Unit, as_recorded, rows_of
from qcompile.sequence import Outcome
from qcompile.solve import Observed, first_needs, then_needs
from qcompile.watch import Watch, both
from qcompile.weights import fingerprint

ALWAYS = ("absmax", "minmax", "moments", "histogram")
"""Statistics that a saved calibration always has: they are small."""
VERSION = 2
FINGERPRINTED = 16
"""Rows of a weight, evenly spaced, that tell it from another one."""


def identity(p: Tensor) -> tuple[str, str]:
    """(dtype, a print of some rows): whether a weight is the one that was calibrated."""
    rows = p.detach().reshape(1, -1) if p.dim() < 2 else p.detach().flatten(0, -2)
    seen = fingerprint(rows[:: max(1, rows.shape[0] // FINGERPRINTED)])
    return str(p.dtype), " ".join(map(str, seen[2:]))


class Calibration:
    """What a calibration saw, by the path of each linear. ``outcome`` holds a line for each solved site and the quality of the model's output."""

    def __init__(self, units: Sequence[Unit] = (), outcome: Outcome | None = None, budget: int = 1 << 30, source: str = "") -> None:
        self._units, self._budget, self._source = list(units), budget, source
        self.outcome = outcome or Outcome()
        self._seen: dict[str, Observed] = {}
        self._weights: dict[str, tuple[tuple[int, ...], tuple[str, str]]] = {}
        """Shape and identity of each linear's weight."""

    def __str__(self) -> str:
        return f"calibration {self._source!r}" if self._source else "the calibration"

    def statistics(self, *names: str) -> dict[str, Observed]:
        """Statistics by site: those that are always taken, those that the recipe needs, and ``names``. Taken on the recorded calls, in as many replays as the memory allows.
        Raises WeightError where the model, or a parameter of it, is gone and they have not been taken."""
        wanted = dict.fromkeys((*ALWAYS, *names, *(n for u in self._units for c in u.plan.values() if isinstance(c, Choice) for n in (*first_needs(c), *then_needs(c)))))
        if self._units and any(set(wanted) - set(s.stats) for s in self._seen.values() or [Observed({}, 0)]):
            for unit in self._units:
                unit.parameters()  # calls are forgotten with the first parameter that is gone, however many are left
            with compat.no_dispatch_modes():
                self._seen = collect(self._units, tuple(wanted), self._budget)
            self._weights = {s.name: (s.shape, identity(u.parameter(s))) for u in self._units for s in u.sites.values() if s.name in self._seen}
        return self._seen

    def of(self, site: Site, device: torch.device | str) -> Observed:
        """The statistics of one site's input. Raises CalibrationError where they are of another model, naming the site."""
        seen = self.statistics()
        if site.name not in seen:
            raise CalibrationError(f"{self} knows nothing of {site.name}; it is of another model, whose linears begin with {', '.join(list(seen)[:4]) or 'none'}")
        return seen[site.name].to(device)

    def check(self, sites: Sequence[Site], inputs: Sequence[Any]) -> None:
        """Raises CalibrationError for the first site that is not known or whose shape is another one, and warns where weights are not those that were calibrated."""
        changed = []
        for site in sites:
            self.of(site, "cpu")
            shape, known = self._weights[site.name]
            if shape != site.shape:
                raise CalibrationError(f"{self} is of another model: {site.path} is {'x'.join(map(str, site.shape))}, there it is {'x'.join(map(str, shape))}")
            mine = identity(inputs[site.param.index])
            if mine[0] == known[0] and mine != known:  # after a cast they cannot be compared
                changed.append(site.path)
        if changed:
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            warnings.warn(f"qcompile: {self} was taken with other weights of {', '.join(changed[:4])}{more}: calibrate this model again for statistics of its own", QcompileWarning, stacklevel=3)

    def save(self, path: str | os.PathLike[str], *names: str) -> None:
        """Write statistics to one safetensors file; ``names`` adds to those that the recipe needs (``"hessian"``, ``"samples"``)."""
        from safetensors.torch import save_file

        seen = self.statistics(*names)
        parts = {f"{site}/": one for site, one in seen.items()} | {_of_expert(site, e): part for site, one in seen.items() for e, part in enumerate(one.experts)}
        tensors = {key: t.cpu() for prefix, one in parts.items() for key, t in to_tensors(one.stats, prefix).items()}
        counts = {site: one.tokens for site, one in seen.items()}
        about = {"version": VERSION, "tokens": counts, "experts": {site: [part.tokens for part in one.experts] for site, one in seen.items() if one.experts}, "weights": self._weights}
        save_file({k: t.clone() for k, t in tensors.items()}, os.fspath(path), metadata={"qcompile": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what ``save`` wrote. Raises CalibrationError for a file that it did not write."""
        from safetensors import SafetensorError, safe_open

        if not pathlib.Path(path).is_file():
            raise CalibrationError(f"there is no calibration file {os.fspath(path)!r}")
        try:
            with safe_open(os.fspath(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("qcompile", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CalibrationError(f"{os.fspath(path)!r} is no safetensors file: {error}") from error
        if about.get("version") != VERSION:
            raise CalibrationError(f"{os.fspath(path)!r} holds no calibration of this version of qcompile; Calibration.save writes one")
        self = cls(source=os.fspath(path))
        self._seen = {
            site: Observed(from_tensors(tensors, f"{site}/"), count, [Observed(from_tensors(tensors, _of_expert(site, e)), own) for e, own in enumerate(about.get("experts", {}).get(site, ()))])
            for site, count in about["tokens"].items()
        }
        self._weights = {site: (tuple(shape), tuple(known)) for site, (shape, known) in about["weights"].items()}
        return self

    def merge(self, other: Calibration) -> Calibration:
        """Both together, as if one had seen all."""
        mine, theirs, out = self.statistics(), other.statistics(), Calibration(source=self._source)
        out._weights = {**other._weights, **self._weights}
        for site in {**mine, **theirs}:
            a, b = mine.get(site), theirs.get(site)
            out._seen[site] = both(a, b) if a and b else (a or b)  # type: ignore[assignment]
        return out


def _of_expert(site: str, e: int) -> str:
    """Where the statistics of one of a site's experts lie in a file."""
    return f"{site}/expert.{e}/"


def collect(units: Sequence[Unit], names: Sequence[str], budget: int) -> dict[str, Observed]:
    """Statistics of every group of the units on their recorded calls, unquantized: as many groups in one replay as ``budget`` bytes hold."""
    from qcompile.sequence import stages

    order = list(stages(units))
    chunks: list[list[int]] = [[]]
    size = 0
    for i, stage in enumerate(order):
        unit, group = stage[0]
        k, count = unit.sites[group.names[0]].k, _experts(unit, group)
        mine = sum(STATISTICS[name].nbytes(k) for name in (*names, *(_solving(names) * count if count > 1 else ())))
        if chunks[-1] and size + mine > budget:
            chunks.append([])
            size = 0
        chunks[-1].append(i)
        size += mine
    seen: dict[str, Observed] = {}
    for chunk in chunks:
        watches = {i: _watch(names, *order[i][0]) for i in chunk}
        for unit in units:
            points = sorted(((group, watches[i]) for i in chunk for u, group in order[i] if u is unit), key=lambda p: p[0].position)
            for one in unit.calls:
                _observe(unit, one, points)
        for i, watch in watches.items():
            merged = watch.merged().to("cpu")
            seen |= {name: merged for _, group in order[i] for name in group.names}
    return seen


def _solving(names: Sequence[str]) -> tuple[str, ...]:
    """Those that solvers ask for, which each expert has of its own rows."""
    return tuple(name for name in names if any(name in solver.needs for solver in SOLVERS.values()))


def _experts(unit: Unit, group: Group) -> int:
    return max(unit.sites[name].experts for name in group.names)


def _watch(names: Sequence[str], unit: Unit, group: Group) -> Watch:
    site = unit.sites[group.names[0]]
    return Watch(names, site.k, _experts(unit, group), unit.parameter(site).device, _solving(names))


def _observe(unit: Unit, call: Call, points: Sequence[tuple[Group, Watch]]) -> None:
    with as_recorded(unit):
        env, at = unit.private(unit.arguments(call), len(unit.placeholders), len(unit.nodes)), len(unit.placeholders)
        for group, watch in points:
            unit.run(env, at, group.position, None)
            at = group.position
            watch.take(*rows_of(unit, unit.nodes[at], env), group.names[0])


__all__ = ["Calibration", "Stats", "collect"]
