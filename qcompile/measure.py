"""``qcompile.explain``: run a compiled model once and measure what its graphs do, on their real arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qcompile import compat, memory
from qcompile.core.errors import QcompileError, Skip
from qcompile.core.qtensor import QTensor, dequantize
from qcompile.core.recipe import Choice
from qcompile.core.solution import Solution
from qcompile.histories import troubles
from qcompile.missed import LOOP, functions, limit, module_of, unread, why_nothing
from qcompile.passes.outliers import reads_weights
from qcompile.report import Calibrated, GraphRow, KeptRow, Report, SiteRow, StepRow, Totals, regime
from qcompile.sqnr import energy, output_db, ratio, sqnr
from qcompile.trained import STATE

if TYPE_CHECKING:
    from qcompile.backend import CompiledGraph
    from qcompile.passes.sites import Site

APART = ("head", "router")
"""Roles that ``coverage`` leaves out."""


def explain(fast: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Run ``fast(*args, **kwargs)`` once under ``torch.no_grad`` and report what its compiled graphs did.

    ``fast`` is a compiled module or function, a module compiled in place, a model with compiled layers, or anything that calls one (``model.generate``). Each graph is measured once for
    each set of parameters that it serves, at its first call. Raises QcompileError, with the likely reason, where no graph of qcompile ran.
    """
    from qcompile.backend import collecting

    collector = _Collector()
    with torch.no_grad(), collecting(collector):
        fast(*args, **kwargs)
    if not collector.uses:
        raise QcompileError(f"no graph compiled by qcompile ran in this call: {why_nothing(fast)}")
    return collector.report(fast)


@dataclass
class _Use:
    """One graph with one set of parameters."""

    graph: CompiledGraph
    parameters: list[nn.Parameter]
    """Held, so that their ids stay theirs."""
    sites: list[SiteRow] = field(default_factory=list)
    kept: list[KeptRow] = field(default_factory=list)
    calls: int = 1
    names: dict[str, str] = field(default_factory=dict)
    """Sites -> their names in the report."""
    counted: dict[int, Tensor] = field(default_factory=dict)
    """Arguments whose slots count, which is read when all calls have run."""


@dataclass
class _Weight:
    """How one parameter is stored and read."""

    parameter: Tensor
    quantized: dict[str, int] = field(default_factory=dict)
    """View -> bytes before, of the views that are read packed."""
    packed: dict[int, int] = field(default_factory=dict)
    """Bytes of the packed tensors, each once."""
    roles: set[str] = field(default_factory=set)
    kept: bool = False

    def covered(self) -> int:
        return min(self.parameter.nbytes, sum(self.quantized.values()))

    def after(self) -> int:
        return sum(self.packed.values()) + (self.parameter.nbytes if self.kept else self.parameter.nbytes - self.covered())


class _Collector:
    """What ``backend.collecting`` calls: measures each graph at its first call with each set of parameters."""

    def __init__(self) -> None:
        self.uses: dict[tuple[int, ...], _Use] = {}
        self.weights: dict[int, _Weight] = {}
        self.graphs: list[CompiledGraph] = []
        self._names: dict[int, tuple[nn.Module, str, str]] = {}
        self._scanned: set[int] = set()
        self._numbers: dict[int, int] = {}

    def __call__(self, graph: CompiledGraph, args: Sequence[Any]) -> None:
        parameters = [a for a in args if isinstance(a, nn.Parameter)]
        key = (id(graph), *map(id, parameters))
        if key in self.uses:
            self.uses[key].calls += 1
            return
        if graph not in self.graphs:
            self.graphs.append(graph)
        use = self.uses[key] = _Use(graph, parameters)
        with compat.no_dispatch_modes(), torch.no_grad():
            self._measure(use, args)

    def _measure(self, use: _Use, args: Sequence[Any]) -> None:
        graph, number = use.graph, self.graphs.index(use.graph)
        names = self._owners(use.parameters)
        measured = _Measured(graph, args)
        for site in graph.sites.values():
            parameter, choice = args[site.param.index], graph.plan[site.name]
            weight = self.weights.setdefault(id(parameter), _Weight(parameter))
            weight.roles.add(site.role)
            name, rows = _display(graph._renamed(site, args, names), site), measured.rows.get(site.name, site.m)
            flops = 2 * rows * site.n * site.k
            use.names[site.name] = name
            if isinstance(choice, Choice):
                weight.quantized[site.view] = site.nbytes
                tensors = [*measured.packed[site.name], *measured.columns(site)]
                weight.packed |= {id(t): t.nbytes for t in tensors}
                weight.kept |= (whole := reads_weights(choice))
                after = sum(t.nbytes for t in tensors) + whole * site.nbytes
                bits = 8 * after / max(site.nbytes // site.dtype.itemsize, 1)
                given = str(choice.input) if choice.input else None
                decibels = measured.weight_db(site), measured.output_db.get(site.name)
                sizes = site.nbytes, after, flops, self._number(parameter), number
                use.sites.append(SiteRow(name, site.shape, site.role, str(choice.weight), given, choice.why, bits, *decibels, _kernel(graph, site), rows, regime(rows), *sizes, measured.calibrated(site)))
            else:
                weight.kept = True
                use.kept.append(KeptRow(name, site.shape, site.role, str(choice), site.nbytes, self._number(parameter), rows, flops, number))
        use.counted = {slot.arg: args[slot.arg] for slot in graph.slots if slot.what == "missed"}
        self._left_alone(use, args, number, names)

    def _left_alone(self, use: _Use, args: Sequence[Any], number: int, names: dict[int, tuple[nn.Module, str, str]]) -> None:
        for entry in use.graph.planned.meta["skipped"]:
            parameter = args[entry.index]
            weight = self.weights.setdefault(id(parameter), _Weight(parameter))
            weight.roles.add("other")
            weight.kept = True
            _, path, name = names.get(id(parameter), (None, "", ""))
            use.kept.append(KeptRow(f"{path}.{name}".strip(".") or entry.path, entry.shape, "other", entry.reason, entry.nbytes, self._number(parameter), flops=entry.flops, graph=number))

    def _owners(self, parameters: Sequence[nn.Parameter]) -> dict[int, tuple[nn.Module, str, str]]:
        """One scan of the live modules serves the whole call, unless modules were made meanwhile."""
        from qcompile.owners import owners

        if any(id(p) not in self._scanned for p in parameters):
            self._names = owners()
            self._scanned = {*self._names, *map(id, parameters)}
        return self._names

    def _number(self, parameter: Tensor) -> int:
        return self._numbers.setdefault(id(parameter), len(self._numbers))

    def report(self, fast: Any) -> Report:
        """Rows of all graphs, the parameters that none of them read, and the sums."""
        from qcompile import calibrated

        module = module_of(fast)
        seen = {id(p) for use in self.uses.values() for p in use.parameters}
        missed = list(unread(module, seen, self._number)) if module is not None else []
        for row, parameter, counts in missed:
            if counts:
                self.weights[id(parameter)] = _Weight(parameter, roles={row.role}, kept=True)
        sites = [row for use in self.uses.values() for row in use.sites]
        kept = [row for use in self.uses.values() for row in use.kept] + [row for row, _, _ in missed]
        graphs = tuple(self._graph_row(i, graph) for i, graph in enumerate(self.graphs))
        notes = [f"graph {row.index}: {note}" for row in graphs for note in row.notes]
        notes += calibrated.notes({row.name: row.calibrated for row in sites})
        notes += [note for use in self.uses.values() for note in calibrated.missed(use.graph, use.counted, use.names)]
        if not any(row.sites for row in graphs):
            notes.append("no linear was found in the graphs that ran")
        if any(row.reason.endswith(LOOP) for row, *_ in missed):
            notes.append("FLOPs are those of the compiled graphs: what the experts compute in their Python loop is not among them")
        if missed and (full := compat.at_recompile_limit(functions(fast))):
            notes.append(limit(full))
        held = [p for use in self.uses.values() for p in use.parameters] + ([*module.parameters(), *module.buffers()] if module is not None else [])
        notes += memory.held(held)
        if module is not None:
            notes += [*troubles(STATE, module.named_parameters()), *STATE.repairs(module)]
        return Report(tuple(sites), tuple(kept), graphs, self._totals(held), tuple(dict.fromkeys(notes)))

    def _graph_row(self, index: int, graph: CompiledGraph) -> GraphRow:
        uses = [use for use in self.uses.values() if use.graph is graph]
        steps = tuple(StepRow(s.name, s.seconds, s.changed, s.note) for s in graph.steps)
        options = graph.options
        peers = [g for ran in self.graphs for g in (ran, *ran._variants.values()) if g.options.recipe == options.recipe]
        found = {f"rule {rule.pattern!r} matched nothing" for g in peers for rule in options.recipe.rules if rule.pattern not in g.unused}  # matched by another graph
        notes = tuple(note for note in graph.notes if note not in found)
        return GraphRow(index, str(options.recipe), options.lower, len(graph.sites), len(uses), sum(u.calls for u in uses), graph.kernel_count, steps, notes)

    def _totals(self, held: Sequence[Tensor]) -> Totals:
        from qcompile.weights import TABLE

        weights = list(self.weights.values())
        plain = [w for w in weights if not w.roles <= set(APART)]
        flops = {apart: [0, 0] for apart in (False, True)}
        for use in self.uses.values():
            pairs: list[tuple[Sequence[SiteRow] | Sequence[KeptRow], bool]] = [(use.sites, True), (use.kept, False)]
            for rows, quantized in pairs:
                for row in rows:
                    flops[row.role in APART][quantized] += row.flops * use.calls
        (kept, packed_flops), (kept_apart, packed_apart) = flops[False], flops[True]
        records = {id(r): r for p in held if (r := TABLE.get(p)) is not None}.values()
        packed = [t for record in records for entry in record.entries.values() for t in entry.tensors]
        return Totals(
            bytes_before=sum(w.parameter.nbytes for w in weights),
            bytes_after=sum(w.after() for w in weights),
            coverage=_share(sum(w.covered() for w in plain), sum(w.parameter.nbytes for w in plain)),
            coverage_all=_share(sum(w.covered() for w in weights), sum(w.parameter.nbytes for w in weights)),
            coverage_flops=_share(packed_flops, packed_flops + kept),
            coverage_flops_all=_share(packed_flops + packed_apart, packed_flops + packed_apart + kept + kept_apart),
            resident_bytes=_storages([*packed, *held]),
            released=sum(record.released is not None for record in records),
        )


class _Measured:
    """Rows, packed tensors and errors of the sites of one graph on one call's arguments."""

    def __init__(self, graph: CompiledGraph, args: Sequence[Any]) -> None:
        from qcompile.calibrate import concrete
        from qcompile.fill import tensors_of
        from qcompile.passes.observe import run_observed
        from qcompile.stored import values
        from qcompile.weights import TABLE

        self.graph, self.args = graph, args
        self._whole = values(graph.matched, [concrete(a) for a in args])  # weights in the place of stored codes
        self.rows: dict[str, int] = {}
        self.output_db: dict[str, float | None] = {}
        self._tensors_of = tensors_of
        self.packed = {name: self._tensors(graph.sites[name]) for name, choice in graph.plan.items() if isinstance(choice, Choice)}
        self._dtypes = {n.meta["site"]: n.meta["example_value"].dtype for n in graph.matched.graph.nodes if "site" in n.meta}
        records = {s.param.index: TABLE.get(args[s.param.index]) for s in graph.sites.values()}
        self._released = {index for index, record in records.items() if record is not None and record.released is not None}
        names = set(graph.sites)
        if self._released:  # the captured graph would read NaN: the lowered one still shows how many rows there are
            packed = [t for slot in graph.slots for t in tensors_of(slot, *(args[i] for i in slot.args))]
            run_observed(graph.lowered, [*(concrete(args[i]) for i in graph._kept), *packed], names, self._count)
            self.rows |= {name: self.rows[kin[0]] for name, kin in graph.merged.items()}  # one product, one node
        else:
            run_observed(graph.matched, self._whole, names, self._see)

    def weight_db(self, site: Site) -> float | None:
        """SQNR of a site's weight, one expert at a time."""
        from qcompile.passes.sites import view

        if site.param.index in self._released or site.stored is not None:
            return None
        solution = self._solution(site)
        exact, tensors, scheme = view(self.args[site.param.index].detach(), site.view), self.packed[site.name], self._choice(site).weight
        experts = range(exact.shape[0]) if exact.dim() == 3 else [...]
        signal = noise = 0.0
        for e in experts:
            part = exact[e].float()
            part = part if solution is None else solution.prepared(part)
            signal += energy(part)
            noise += energy(part - dequantize(QTensor.unflatten([t[e] for t in tensors], scheme, site.k)))
        return ratio(signal, noise)

    def calibrated(self, site: Site) -> Calibrated | None:
        """What calibration found for a site."""
        from qcompile import calibrated

        return calibrated.of(self.graph, site.name, self._solution(site))

    def _choice(self, site: Site) -> Choice:
        choice: Choice = self.graph.plan[site.name]
        return choice

    def _solution(self, site: Site) -> Solution | None:
        """What calibration found for the site, on the device of its weight."""
        from qcompile.sequence import solution_key
        from qcompile.weights import TABLE

        p, choice = self.args[site.param.index], self._choice(site)
        record = TABLE.get(p)
        solution = record.solutions.get(solution_key(site, choice)) if record is not None else None
        return solution.to(p.device) if solution is not None else None

    def _tensors(self, site: Site, what: str = "weight") -> list[Tensor]:
        from qcompile.passes.slots import slot_of

        return self._tensors_of(slot_of(what, site, self._choice(site)), self.args[site.param.index])

    def columns(self, site: Site) -> list[Tensor]:
        """The weight's columns beside the codes, in its own dtype, of a static split."""
        return self._tensors(site, "columns") if self._choice(site).outliers else []

    def _count(self, name: str, x: Tensor, which: Tensor | None) -> None:
        self.rows[name] = x.numel() // self.graph.sites[name].k

    def _see(self, name: str, x: Tensor, which: Tensor | None) -> None:
        from qcompile.passes.sites import view

        self._count(name, x, which)
        site, choice = self.graph.sites[name], self.graph.plan[name]
        if isinstance(choice, Choice) and x.numel():
            with torch.autocast(x.device.type, enabled=False):  # the graph runs as it was called, errors are taken in float32
                weight = view(self._whole[site.param.index], site.view)
                self.output_db[name] = output_db(choice, x.to(self._dtypes[name]), which, weight, self.packed[name], self._solution(site))


def _kernel(graph: CompiledGraph, site: Site) -> str:
    """The kernel's name, or "reference" with the reason."""
    if graph.options.lower == "eager":
        return "reference: options['lower'] is 'eager'"
    kernel = graph.kernels[site.name]
    return f"reference: {kernel}" if isinstance(kernel, Skip) else kernel


def _display(renamed: Site, site: Site) -> str:
    """A site's name in the model of the parameters it was called with; one of stacked weights carries its index, a second use of a weight its number."""
    element = site.view.partition("]")[0] + "]" if site.view.startswith("[") else ""
    again = site.name.rpartition("@")[2] if "@" in site.name and not element else ""
    return renamed.path + element + (f"@{again}" if again else "")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _storages(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    found = {(t.device, s.data_ptr()): s.nbytes() for t in tensors if t.device.type != "meta" for s in [t.untyped_storage()]}
    return sum(found.values())


__all__ = ["explain", "sqnr"]
