"""Statistics of the unquantized model's activations, by the names of its linears: taken on recorded calls, saved and loaded as safetensors."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

import torch

from qcompile import compat
from qcompile.core.errors import CalibrationError
from qcompile.core.recipe import Choice
from qcompile.core.stats import STATISTICS, Stats, from_tensors, to_tensors
from qcompile.passes.sites import Site
from qcompile.replay import Call, Group, Unit, as_recorded, rows_of
from qcompile.sequence import Outcome, Watch
from qcompile.solve import Observed, first_needs, then_needs

ALWAYS = ("absmax", "minmax", "moments", "histogram")
"""Statistics that a saved calibration always has: they are small."""
VERSION = 1


class Calibration:
    """What a calibration saw, by the path of each linear. ``outcome`` holds a line for each solved site and the quality of the model's output."""

    def __init__(self, units: Sequence[Unit] = (), outcome: Outcome | None = None, budget: int = 1 << 30, source: str = "") -> None:
        self._units, self._budget, self._source = list(units), budget, source
        self.outcome = outcome or Outcome()
        self._seen: dict[str, Observed] = {}

    def __str__(self) -> str:
        return f"calibration {self._source!r}" if self._source else "the calibration"

    def statistics(self, *names: str) -> dict[str, Observed]:
        """Statistics by site: those that are always taken, those that the recipe needs, and ``names``. Taken on the recorded calls, in as many replays as the memory allows."""
        wanted = dict.fromkeys((*ALWAYS, *names, *(n for u in self._units for c in u.plan.values() if isinstance(c, Choice) for n in (*first_needs(c), *then_needs(c)))))
        if self._units and any(set(wanted) - set(s.stats) for s in self._seen.values() or [Observed({}, 0)]):
            with compat.no_dispatch_modes():
                self._seen = collect(self._units, tuple(wanted), self._budget)
        return self._seen

    def of(self, site: Site, device: torch.device) -> Observed:
        """The statistics of one site's input. Raises CalibrationError where they are of another model, naming the site."""
        seen = self.statistics()
        if site.name not in seen:
            raise CalibrationError(f"{self} knows nothing of {site.name}; it is of another model, whose linears begin with {', '.join(list(seen)[:4]) or 'none'}")
        one = seen[site.name]
        width = next((t["absmax"].shape[0] for n, t in one.stats.items() if n == "absmax"), site.k)
        if width != site.k:
            raise CalibrationError(f"{self} is of another model: {site.path} has {site.k} input channels, there it has {width}")
        return one.to(device)

    def save(self, path: str | os.PathLike[str], *names: str) -> None:
        """Write statistics to one safetensors file; ``names`` adds to those that the recipe needs (``"hessian"``, ``"samples"``)."""
        from safetensors.torch import save_file

        seen = self.statistics(*names)
        tensors = {key: t.cpu() for site, one in seen.items() for key, t in to_tensors(one.stats, f"{site}/").items()}
        about = {"version": VERSION, "tokens": {site: one.tokens for site, one in seen.items()}}
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
        self._seen = {site: Observed(from_tensors(tensors, f"{site}/"), count) for site, count in about["tokens"].items()}
        return self

    def merge(self, other: Calibration) -> Calibration:
        """Both together, as if one had seen all."""
        from qcompile.core.stats import merge_all

        mine, theirs, out = self.statistics(), other.statistics(), Calibration(source=self._source)
        for site in {**mine, **theirs}:
            a, b = mine.get(site), theirs.get(site)
            out._seen[site] = Observed(merge_all(a.stats, b.stats), a.tokens + b.tokens) if a and b else (a or b)  # type: ignore[assignment]
        return out


def collect(units: Sequence[Unit], names: Sequence[str], budget: int) -> dict[str, Observed]:
    """Statistics of every group of the units on their recorded calls, unquantized: as many groups in one replay as ``budget`` bytes hold."""
    from qcompile.sequence import stages

    order = list(stages(units))
    chunks: list[list[int]] = [[]]
    size = 0
    for i, stage in enumerate(order):
        unit, group = stage[0]
        mine = sum(STATISTICS[name].nbytes(unit.sites[group.names[0]].k) for name in names)
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


def _watch(names: Sequence[str], unit: Unit, group: Group) -> Watch:
    site = unit.sites[group.names[0]]
    return Watch(names, site.k, 1, unit.parameter(site).device, ())


def _observe(unit: Unit, call: Call, points: Sequence[tuple[Group, Watch]]) -> None:
    with as_recorded(unit):
        env, at = unit.private(unit.arguments(call), len(unit.placeholders), len(unit.nodes)), len(unit.placeholders)
        for group, watch in points:
            unit.run(env, at, group.position, None)
            at = group.position
            watch.take(rows_of(unit, unit.nodes[at], env)[0], None, group.names[0])


__all__ = ["Calibration", "Stats", "collect"]
