"""Solve all sites of recorded calls in true sequential order: each sees its input as the quantized sites before it make it.

The order is read off the graph; kin (q, k, v; gate, up) share one input, one set of statistics and one vector. At the end the outputs are compared with those of the original graphs.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import stored
from qcompile.core.errors import CalibrationError, WeightError
from qcompile.core.qtensor import dequantize
from qcompile.core.recipe import Choice
from qcompile.core.solution import Solution
from qcompile.core.stats import check_finite
from qcompile.memory import is_released
from qcompile.owners import owners
from qcompile.passes import SOLVERS, experts, producers
from qcompile.passes.norms import mean_before
from qcompile.passes.sites import Site, view
from qcompile.quality import Quality, compared, head_of
from qcompile.replay import Call, Env, Group, Unit, advance, finish, original, rows_of
from qcompile.solve import Member, Observed, Product, analytical, complete, equalized, first_needs, inverse, needs_data, prepare, refuse_equalize, spread, then_needs
from qcompile.watch import Watch, measured
from qcompile.weights import TABLE, fingerprint

HELD = 1 << 30
"""Bytes of dequantized weights that are kept beside the model, those of the sites last used."""
AFRESH = ("histogram", "moving")
"""Statistics that cannot be rescaled: taken again once the input is smoothed."""


@dataclass(frozen=True)
class Solved:
    """One line of the outcome: a site, what it was solved as, the SQNR of its output in dB, rows seen, seconds, and what was done instead of what was asked for.

    ``asked`` is the choice before anything was found, ``spread`` how far the largest channel of its input stands out of the median one.
    """

    name: str
    choice: str
    decibels: float | None
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()
    asked: Choice | None = None
    spread: float | None = None


@dataclass
class Outcome:
    """What a sequence did."""

    solved: list[Solved] = field(default_factory=list)
    quality: Quality = field(default_factory=Quality)
    """Of the model's output. Where code outside of the graphs makes later ones from earlier ones, these read what was recorded, and the quality is that of the graph whose own output is worst."""
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of recording, solving and, offline, installing."""


class Run:
    """The state of one run: products of solved sites, results."""

    def __init__(self, units: Sequence[Unit], budget: float, tick: Callable[[], None], said: Callable[[Solved], None], folder: Any = None) -> None:
        self.units, self.budget, self.tick, self.said, self.folder = units, budget, tick, said, folder
        self.outcome = Outcome(tokens=0)
        self._products: OrderedDict[tuple[Any, ...], Product] = OrderedDict()
        self._finished: set[int] = set()
        self._ends: list[Quality] = []  # of graphs, other than the last, whose outputs no later one reads as they are
        self._read = {id(earlier) for unit in units for call in unit.calls for earlier, _ in call.links.values()}
        self._names: dict[int, tuple[nn.Module, str, str]] = {}
        self._places: dict[tuple[int, tuple[str, ...]], producers.Place] = {}

    def run(self, again: bool) -> Outcome:
        """Solve every group, in the order of the graphs; ``again``: those, too, that have a solution."""
        if any(map(equalized, (choice for unit in self.units for choice in unit.plan.values()))):
            self._equalize()
        try:
            return self._run(again)
        finally:  # also after an error: the next run starts from the recorded arguments
            for unit in self.units:
                unit.reset()

    def judge(self) -> Outcome:
        """Measure what is solved already, each site and the output, on the calls of this process alone."""
        try:
            for unit in self.units:
                for group in unit.groups:
                    members = [self._member(unit, name) for name in group.names if unit.sites[name].stored is None]
                    known = [(m, s) for m in members if (s := self._solution(unit, m.site, m.choice)) is not None]
                    if known:
                        weight = known[0][0].weight
                        watch = self._watch([(unit, group)], group.names, Watch(("samples",), weight.shape[-1], 1, weight.device, (), routed=weight.dim() == 3, alone=True))
                        self._measure(known, watch, 0.0)
                self._finish(unit)
            self._worst()
        finally:
            for unit in self.units:
                unit.reset()
        return self.outcome

    def _measure(self, known: Sequence[tuple[Member, Solution]], watch: Watch, seconds: float) -> None:
        rows, routes = watch.merged().stats["samples"]["rows"].float(), watch.routes()
        for member, solution in known:
            solution.decibels = measured(member, solution, rows, routes)
            self._say(member, solution, seconds, spread(rows, solution, member.choice) if rows.numel() else None)

    def _equalize(self) -> None:
        if self.folder is None:
            refuse_equalize([m for unit in self.units for c in unit.plan.values() if isinstance(c, Choice) for m in c.methods], "options['passes']")
        else:
            self.folder.balanced.apply(self.units)

    def _run(self, again: bool) -> Outcome:
        if self.folder is not None:
            self.folder.begin(self.units)
        order = list(stages(self.units))
        last = {id(unit): i for i, stage in enumerate(order) for unit, _ in stage}
        maker = {id(call): unit for unit in self.units for call in unit.calls}
        for i, stage in enumerate(order):
            for unit, _ in stage:
                self._sources(unit, i, last, maker, set())
            self._group(stage, again)
            for unit, _ in stage:
                if last[id(unit)] == i:
                    self._finish(unit)
        for unit in self.units:
            self._sources(unit, len(order), last, maker, set())
            self._finish(unit)
        self._worst()
        return self.outcome

    def _sources(self, unit: Unit, stage: int, last: Mapping[int, int], maker: Mapping[int, Unit], seen: set[int]) -> None:
        """Finish the units whose outputs a unit reads, where all that they have is solved: those of a graph without linears, too."""
        seen.add(id(unit))
        for earlier in {id(e): maker.get(id(e)) for call in unit.calls for e, _ in call.links.values()}.values():
            if earlier is not None and id(earlier) not in seen and last.get(id(earlier), -1) < stage:
                self._sources(earlier, stage, last, maker, seen)
                self._finish(earlier)

    def _finish(self, unit: Unit) -> None:
        if id(unit) in self._finished:
            return
        self._finished.add(id(unit))
        last = unit is self.units[-1]
        head = head_of(unit)
        quality = self.outcome.quality if last or head is not None else Quality()

        def compare(call: Call, outputs: Any) -> None:
            if quality is self.outcome.quality or id(call) not in self._read:
                compared(quality, original(unit, call), outputs, head)

        finish(unit, self.product, compare)
        if quality is not self.outcome.quality:
            self._ends.append(quality)

    def _worst(self) -> None:
        """The quality of the worst end becomes the outcome's."""
        for quality in self._ends:
            known, own = quality.decibels, self.outcome.quality.decibels
            if not quality.finite or (known is not None and own is not None and known < own):
                self.outcome.quality = replace(quality, divergence=self.outcome.quality.divergence, positions=self.outcome.quality.positions)

    def _group(self, stage: Sequence[tuple[Unit, Group]], again: bool) -> None:
        unit, group = stage[0]
        all_of_it = [self._member(unit, name) for name in group.names if unit.sites[name].stored is None]
        members = [m for m in all_of_it if (again or self._solution(unit, m.site, m.choice) is None) and not self._resumed(unit, m)]
        for batch in _alike(members):
            self._solve(stage, unit, group, batch)
        if self.folder is not None:
            self.folder.passed([(m.site, m.choice, s, unit.parameter(m.site)) for m in all_of_it if (s := self._solution(unit, m.site, m.choice)) is not None])

    def _solve(self, stage: Sequence[tuple[Unit, Group]], unit: Unit, group: Group, members: list[Member]) -> None:
        start = time.perf_counter()
        choice, k, names = members[0].choice, members[0].site.k, [m.site.name for m in members]
        count, device, routed = max(m.site.experts for m in members), members[0].weight.device, members[0].weight.dim() == 3
        if not needs_data(choice):
            watch = self._watch(stage, names, Watch(("samples",), k, 1, device, (), routed=routed))  # to measure the output
            seen = watch.merged()
            solutions = complete(members, Solution(tokens=seen.tokens), Observed({}, 0))
        else:
            first, then = first_needs(choice), then_needs(choice)
            afresh = [name for name in then if name in AFRESH] if first else []
            watch = self._watch(stage, names, Watch(tuple(dict.fromkeys((*first, *(n for n in then if n not in afresh), "samples"))), k, count, device, then, routed=routed))
            seen = watch.merged()
            if seen.tokens == 0:
                raise CalibrationError(f"the calibration data gave {names[0]} no rows; call the model with data that is typical")
            spot = self._places.setdefault((id(unit), tuple(names)), producers.place(unit.gm, names)) if first else None
            shared = prepare(members, seen, lambda v: producers.shared(v, spot) if spot is not None else v)
            s = inverse(shared, k, device)
            at = seen if s is None else seen.rescaled(s)
            if afresh:
                second = self._watch(stage, names, Watch(tuple(afresh), k, 1, device, (), s)).merged()
                at = Observed({**at.stats, **second.stats}, at.tokens, at.experts)
            solutions = complete(members, shared, at)
        rows, routes = seen.stats["samples"]["rows"].float(), watch.routes()
        for member, solution in zip(members, solutions):
            self._keep(unit, member, solution)
            solution.decibels = measured(member, solution, rows, routes)
            self._settle(unit, member, solution)
            self._say(member, solution, (time.perf_counter() - start) / len(members), spread(rows, solution, member.choice) if rows.numel() else None)

    def _settle(self, unit: Unit, member: Member, solution: Solution) -> None:
        """Codes as they are kept; offline they wait until they take the weight's place: solved ones in host memory, rounded ones where they are, while there is room."""
        p, q = unit.parameter(member.site), solution.q
        keep_codes(solution, member.choice, p)
        if self.folder is None:
            return
        self.folder.save(member.site, member.choice, solution, p)
        if solution.q is not None:
            solution.q = solution.to(torch.device("cpu")).q
        elif q is not None and self.folder.bytes + q.nbytes <= self.budget:
            self.folder.bytes += q.nbytes
            self.folder.codes[id(p), *solution_key(member.site, member.choice)] = q

    def _say(self, member: Member, solution: Solution, seconds: float, spread: float | None = None) -> None:
        notes = (*solution.notes, *([n] if self.folder is not None and (n := self.folder.balanced.notes.get(member.site.name)) else []))
        line = Solved(member.site.path, str(found(member.choice, solution)), solution.decibels, solution.tokens, seconds, notes, member.choice, spread)
        self.outcome.solved.append(line)
        self.outcome.tokens = max(self.outcome.tokens, solution.tokens)
        self.said(line)

    def _watch(self, stage: Sequence[tuple[Unit, Group]], names: Sequence[str], watch: Watch) -> Watch:
        """Take statistics of a group's input in all units that have it."""
        for unit, group in stage:

            def see(env: Env, unit: Unit = unit, node: fx.Node = unit.nodes[group.position]) -> None:
                watch.take(*rows_of(unit, node, env), names[0])

            advance(unit, group, self.product, see, self.budget, self.tick)
        return watch

    def _member(self, unit: Unit, name: str) -> Member:
        site = unit.sites[name]
        p = unit.parameter(site)
        if is_released(p):
            raise CalibrationError(f"the 16-bit weight of {site.path} was released: load the model's weights again before it is calibrated")
        w = view(p.detach(), site.view)
        if bad := check_finite(w):
            raise WeightError(f"the weight of {site.path} has {bad} values that are NaN or infinite; it cannot be quantized, and the model is as it was. Keep it: ignore=[{site.path!r}]")
        return Member(site, unit.plan[name], w, mean_before(unit.gm, name, unit.live) if analytical(unit.plan[name]) else None)

    def _solution(self, unit: Unit, site: Site, choice: Choice) -> Solution | None:
        return TABLE.record(unit.parameter(site), site.path).solutions.get(solution_key(site, choice))

    def _resumed(self, unit: Unit, member: Member) -> bool:
        """The solution was kept by a run that was interrupted."""
        solution = self.folder.load(member.site, member.choice, unit.parameter(member.site)) if self.folder is not None else None
        if solution is None:
            return False
        self._keep(unit, member, solution)
        self._say(member, solution, 0.0)
        return True

    def _keep(self, unit: Unit, member: Member, solution: Solution) -> None:
        TABLE.solve(unit.parameter(member.site), solution_key(member.site, member.choice), solution, member.site.path)

    def product(self, unit: Unit, node: fx.Node, env: Env) -> Any:
        """The value of a solved site's node; None where the site keeps its bits or is not solved yet."""
        site, choice = unit.sites[node.meta["site"]], unit.plan[node.meta["site"]]
        if not isinstance(choice, Choice):
            return None
        p = unit.parameter(site)
        solution = self._solution(unit, site, choice) if site.stored is None else self._held(p)
        if solution is None:
            return None
        dtype = node.meta["example_value"].dtype
        key = (id(p), *solution_key(site, choice), dtype)
        made = self._products.get(key)
        if made is None:
            weight = view(p.detach(), site.view) if site.stored is None else dequantize(solution.q)  # type: ignore[arg-type]
            now = solution.now().to(p.device)
            if now.q is None and self.folder is not None:
                now.q = self.folder.codes.get(key[:-1])
            made = self._products[key] = Product(now, choice, weight, dtype)
            while sum(m.nbytes for m in self._products.values()) > HELD and len(self._products) > 1:
                self._products.popitem(last=False)
        self._products.move_to_end(key)
        how = experts.resolve(node)
        with torch.autocast(p.device.type, enabled=False):
            if isinstance(how, experts.Experts):
                return self._experts(unit, node, env, how, made)
            x, bias = env[node.args[0]], node.args[2] if len(node.args) > 2 else None  # type: ignore[index]
            y = made(x.to(dtype))
            return y if bias is None else y + env[bias].to(dtype)  # type: ignore[index]

    def _held(self, p: Tensor) -> Solution | None:
        """What a module holds that is quantized already."""
        self._names = self._names or owners()
        owner = stored.of(p, self._names)
        return owner[0].solution(stored.tensors_of(owner)) if owner is not None else None  # type: ignore[operator, no-any-return]

    def _experts(self, unit: Unit, node: fx.Node, env: Env, how: experts.Experts, made: Product) -> Tensor:
        x = env[how.x]
        rows, which = experts.rows(how, x, None if how.index is None else env[how.index])
        y = rows.new_zeros((rows.shape[0], made.dense.shape[-2]))
        for e in which.unique().tolist():
            if e < made.dense.shape[0]:
                y[which == e] = made(rows[which == e], e).to(y.dtype)
        return experts.shaped(how, y, x)


def stages(units: Sequence[Unit]) -> Iterator[list[tuple[Unit, Group]]]:
    """Groups in the order in which the units were first called; a group that several units read is one stage of all of them."""
    found: dict[tuple[Any, ...], list[tuple[Unit, Group]]] = {}
    for unit in units:
        for group in unit.groups:
            site = unit.sites[group.names[0]]
            found.setdefault((id(unit.parameter(site)), site.view, use(site.name)), []).append((unit, group))
    yield from found.values()


def use(site: str) -> str:
    """Which use of its parameter a site is: "" the first in its graph, "@2" the second."""
    return "@" + site.rpartition("@")[2] if "@" in site else ""


def solution_key(site: Site, choice: Choice) -> tuple[str, str, str]:
    """Key of a site's solution in the record of its parameter."""
    return site.view, use(site.name), choice.key


def keep_codes(solution: Solution, choice: Choice, p: Tensor) -> None:
    """Solved codes stay, with the value that they are of; codes that rounding to nearest gives again are not worth their memory."""
    if any(m.name in SOLVERS for m in choice.methods):
        solution.state = fingerprint(p)
    else:
        solution.q = None


def found(choice: Choice, solution: Solution) -> Choice:
    """The choice with what its solution decided."""
    columns = 0 if solution.outliers is None else int(solution.outliers.numel())
    return replace(choice, smooth=solution.smooth is not None, heads=solution.heads, outliers=columns, corrected=solution.bias is not None)


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """Members whose input is treated the same way."""
    sets: dict[Any, list[Member]] = {}
    for m in members:
        sets.setdefault((m.choice.input, m.choice.methods), []).append(m)
    return list(sets.values())
