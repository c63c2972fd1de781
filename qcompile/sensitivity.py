"""Which linears cost a model its accuracy: quantize one at a time (or all but one), and measure the output of the whole model.

The model runs unquantized on the data once and its calls are recorded. Each linear is solved on statistics of the unquantized model; then, in the order of the graph, the values at its input
are carried forward, and only what comes after it runs again with that one linear changed. Nothing that a compiled model uses is touched.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import compat
from qcompile.calibrate import Session, call
from qcompile.core.errors import CalibrationError, OptionError
from qcompile.core.recipe import Choice, Recipe
from qcompile.core.solution import Solution
from qcompile.options import Options
from qcompile.passes.sites import Site
from qcompile.progress import bar, track
from qcompile.quality import Quality, compared, head_of, tensors
from qcompile.replay import Call, Env, Group, Unit, advance, as_recorded, original
from qcompile.sequence import Run, solution_key, stages
from qcompile.solve import Member
from qcompile.tables import EXACT_DB, decibels, plain, shape_text, size, table

MODES = ("one", "all-but-one")
Key = tuple[int, str, str, str]
"""A linear: the id of its parameter and its key there; the same in every graph that has it."""


@dataclass(frozen=True)
class Effect:
    """What one linear does to the model's output. ``decibels``: its SQNR, 200 where it is exact, None where it is not finite; ``kl``: nats, None without a head.

    ``reached``: the model's output was measured; where code outside of the captured graphs computes with what a graph returned, it is that graph's output instead.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    decibels: float | None
    kl: float | None
    finite: bool
    reached: bool = True


@dataclass(frozen=True)
class Sensitivity:
    """Linears ranked by what they cost, the most sensitive first. ``decibels`` and ``kl`` are those of the model with all of them quantized."""

    recipe: str
    mode: str
    rows: tuple[Effect, ...]
    decibels: float | None
    kl: float | None

    def __str__(self) -> str:
        return plain(self._parts(120))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from self._parts(options.max_width)

    def _parts(self, width: int) -> Iterator[Any]:
        from rich.text import Text

        what = "with one linear quantized" if self.mode == "one" else "with all linears but one quantized"
        yield Text(f"sensitivity to {self.recipe}: the model's output {what}", style="bold")
        yield Text()
        cells = [[str(i + 1), r.name, shape_text(r.shape), r.scheme, size(r.nbytes), decibels(r.decibels), _nats(r.kl)] for i, r in enumerate(self.rows)]
        yield table((">", "linear", "shape", "scheme", ">bytes", ">model dB", ">KL, nats"), cells, width)
        yield Text()
        yield Text(f"all quantized: {decibels(self.decibels)} dB" + (f", KL {_nats(self.kl)} nats" if self.kl is not None else ""))
        if broken := [r.name for r in self.rows if not r.finite]:
            yield Text(f"note: the output is NaN or infinite: {', '.join(broken)}")
        if apart := [r.name for r in self.rows if not r.reached]:
            yield Text(f"note: measured at the output of a captured graph, for code outside of the graphs computes the rest: {', '.join(apart)}")

    def to_json(self) -> str:
        """JSON of the fields; what is not available is null."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    def ignore(self, n: int | None = None, *, share: float | None = None) -> list[str]:
        """Names for ``options["ignore"]``: the ``n`` most sensitive linears; or, in the order of the ranking, each that still fits in ``share`` of the bytes of all."""
        if (n is None) == (share is None):
            raise OptionError("ignore takes a number of linears or share=, the part of their bytes that may keep 16 bits")
        if share is not None and not 0 <= share <= 1:
            raise OptionError(f"share is a part of all bytes, from 0 to 1, not {share}")
        if n is not None:
            return list(dict.fromkeys(row.name for row in self.rows))[:n]
        sizes: dict[str, int] = {}
        for row in self.rows:
            sizes[row.name] = sizes.get(row.name, 0) + row.nbytes
        left, names = float(share or 0) * sum(sizes.values()), []
        for name, nbytes in sizes.items():
            if nbytes <= left:
                names.append(name)
                left -= nbytes
        return names

    def plot(self, most: int = 40) -> Any:
        """A matplotlib figure: a bar for each of the ``most`` sensitive linears. Raises QcompileError without matplotlib."""
        from qcompile.plots import bars

        rows = self.rows[:most]
        noise = [10.0 ** (-r.decibels / 10) if r.decibels is not None else None for r in rows]
        kl = all(r.kl is not None for r in rows)
        label = "KL divergence of next tokens from the original model's, nats" if kl else "noise in the output, as a part of its energy"
        whole = self.kl if kl else 10.0 ** (-self.decibels / 10) if self.decibels is not None else None
        return bars([r.name for r in rows], [r.kl for r in rows] if kl else noise, label, 3, whole if self.mode != "one" else None)

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """The plot as a PNG file."""
        from qcompile.plots import png

        pathlib.Path(path).write_bytes(png(self.plot(), 150))

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """The plot and the table as one HTML file that needs no other."""
        from qcompile.plots import page

        pathlib.Path(path).write_text(page(f"sensitivity to {self.recipe}, {self.mode}", self.plot(), str(self)), encoding="utf-8")


def sensitivity(
    model: nn.Module, recipe: str | Recipe | Mapping[str, Any], data: Iterable[Any], *, mode: str = "one", progress: bool = True, memory: str | int | None = None
) -> Sensitivity:
    """Rank the linears of ``model`` by what quantizing them alone (or leaving them alone out, ``mode="all-but-one"``) does to its output on ``data``.

    ``recipe`` is a preset's name, a Recipe, or a dictionary of options; ``data`` batches as for ``qcompile.calibrate``; ``memory`` bounds recorded calls and carried values.
    The model is left as it is, whether it is compiled or not. Raises CalibrationError where nothing was recorded, where nothing is quantized, or where the model is not deterministic.
    """
    if mode not in MODES:
        raise OptionError(f"mode is {' or '.join(map(repr, MODES))}, not {mode!r}")
    options: dict[str, Any] = dict(recipe) if isinstance(recipe, Mapping) else {"recipe": recipe}
    named = str(Options.parse(options).recipe)
    plainly = compat.original(model)
    _check_random(plainly)
    session = Recording(torch.compile(plainly, backend="qcompile", options=options), progress, memory)
    with session:
        for batch in track(data, "recording", progress):
            session.end(call(session.fast, batch))
    if not session.units:
        raise CalibrationError("no linear ran: give sensitivity a model that torch.compile can capture, and at least one batch")
    total = sum(len(unit.calls) * len(unit.groups) for unit in session.units)
    with bar("sensitivity", 2 * total, progress) as step, compat.no_dispatch_modes():
        probe = Probe(session.units, session.budget, lambda: step(1), session.ends)
        probe.solve()
        rows, whole = probe.measure(mode)
    if not rows:
        raise CalibrationError("nothing to rank: under this recipe every linear keeps 16 bits")
    ranked = sorted(rows, key=_cost if mode == "one" else _gain)
    return Sensitivity(named, mode, tuple(ranked), _db(whole), _kl(whole))


class Recording(Session):
    """A sitting that only records: nothing is solved, and nothing of it is kept. ``ends`` holds the ids of the calls that made what the model returned."""

    def __init__(self, fast: Any, progress: bool, memory: str | int | None) -> None:
        super().__init__(fast, progress, memory)
        self.ends: set[int] = set()

    def end(self, value: Any) -> None:
        """Note which calls made what a batch returned."""
        for t in tensors(value):
            made = self._made.get(id(t))
            if made is not None and made[0]() is t:
                self.ends.add(id(made[-2]))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()

    def record(self, unit: Unit, args: Sequence[Any]) -> Call | None:
        """Keep a call. Raises CalibrationError where the memory is full: with part of the data the ranking would be another."""
        made = super().record(unit, args)
        if made is None:
            raise CalibrationError(f"the data does not fit in the memory for recorded calls ({self.budget >> 20} MiB): give fewer batches, or memory='8GiB'")
        return made


class Probe(Run):
    """Solves on the unquantized model, into a table of its own; then runs with some linears ``active``.

    ``_base`` holds what calls return under what is carried from linear to linear, where that is not the original and a later graph reads it.
    """

    def __init__(self, units: Sequence[Unit], budget: float, tick: Callable[[], None], ends: set[int]) -> None:
        super().__init__(units, budget, tick, lambda line: None)
        self.solutions: dict[Key, Solution] = {}
        self.active: Callable[[Key], bool] = lambda key: False
        self.ends = ends
        self._base: dict[int, Any] = {}
        self._exact: dict[int, Any] = {}
        self._room = budget

    def _keep(self, unit: Unit, member: Member, solution: Solution) -> None:
        self.solutions[_key(unit, member.site, member.choice)] = solution

    def _solution(self, unit: Unit, site: Site, choice: Choice) -> Solution | None:
        return self.solutions.get(_key(unit, site, choice))

    def product(self, unit: Unit, node: fx.Node, env: Env) -> Any:
        """The value of an active site; None for all others."""
        site, choice = unit.sites[node.meta["site"]], unit.plan[node.meta["site"]]
        return super().product(unit, node, env) if isinstance(choice, Choice) and self.active(_key(unit, site, choice)) else None

    def solve(self) -> None:
        """Solve every linear on statistics of the unquantized model."""
        for stage in stages(self.units):
            self._group(stage, again=True)
        for unit in self.units:
            unit.reset()

    def measure(self, mode: str) -> tuple[list[Effect], Quality]:
        """The effect of every linear, and the output with all of them quantized."""
        self.active = lambda key: True
        whole, read = Quality(), {id(earlier) for unit in self.units for one in unit.calls for earlier, _ in one.links.values()}
        done: set[int] = set()
        for unit in self.units:
            for one in unit.calls:
                if id(one) not in done:
                    done |= self._follow(unit, one, None, 0, whole, read if mode != "one" else ())[0]
        self.active = lambda key: mode != "one"  # what carries values to the next linear
        for unit in self.units:
            unit.reset()
            for one in unit.calls:
                one.outputs = self._base.get(id(one))
        return [row for stage in stages(self.units) for row in self._stage(stage, mode)], whole

    def _stage(self, stage: Sequence[tuple[Unit, Group]], mode: str) -> list[Effect]:
        """The effects of the linears that read one input."""
        unit, group = stage[0]
        sites = [(unit.sites[name], unit.plan[name]) for name in group.names]
        keys = [_key(unit, site, choice) for site, choice in sites]
        qualities = [Quality() for _ in sites]
        carrying, done, reached = self.active, set[int](), True
        for unit, group in stage:
            calls = iter(unit.calls)

            def see(env: Env, unit: Unit = unit, group: Group = group, calls: Iterator[Call] = calls) -> None:
                one = next(calls)
                nonlocal reached
                if id(one) in done:  # ran already, behind an earlier graph that has these linears
                    return
                touched: set[int] = set()
                far = True
                for key, quality in zip(keys, qualities):
                    self.active = (lambda k, key=key: k == key) if mode == "one" else (lambda k, key=key: k != key)  # type: ignore[misc]
                    touched, far = self._follow(unit, one, unit.private(env, group.position, len(unit.nodes)), group.position, quality)
                done.update(touched)
                reached &= far
                self.active = carrying

            advance(unit, group, self.product, see, self.budget, self.tick)
        return [Effect(site.name, site.shape, str(choice), site.nbytes, _db(q), _kl(q), q.finite, reached) for (site, choice), q in zip(sites, qualities)]

    def _follow(self, unit: Unit, one: Call, env: Env | None, start: int, quality: Quality, keep: Container[int] = ()) -> tuple[set[int], bool]:
        """Run a call from ``start`` on, then all calls of later graphs that read what it returned, and add the outputs of the model to ``quality``; those of ``keep`` become ``_base``.

        Returns the ids of these calls, and whether the end of the model was among them.
        """
        ran: dict[int, Call] = {}
        ends: list[tuple[Unit, Call]] = []
        for u in self.units[self.units.index(unit) :]:
            for c in [one] if u is unit else [c for c in u.calls if any(id(e) in ran for e, _ in c.links.values())]:
                with as_recorded(u):
                    if c is not one or env is None:
                        carried, c.env = c.env, {}
                        u.begin(c)
                        values, at, c.env = c.env, len(u.placeholders), carried
                    else:
                        values, at = env, start
                    c.outputs = u.run(values, at, len(u.nodes), self.product)
                ran[id(c)] = c
                ends.append((u, c))
        for u, c in self._measured(ends):
            compared(quality, self._original(u, c), c.outputs, head_of(u))
        for c in ran.values():
            if id(c) in keep:
                self._base[id(c)] = c.outputs
            c.outputs = self._base.get(id(c))
        return set(ran), not self.ends.isdisjoint(ran)

    def _measured(self, ends: list[tuple[Unit, Call]]) -> list[tuple[Unit, Call]]:
        """Calls whose outputs are the model's: those with logits, else those that the model returned; else of the last graph that was reached."""
        heads = [(u, c) for u, c in ends if head_of(u) is not None]
        return heads or [(u, c) for u, c in ends if id(c) in self.ends] or [(u, c) for u, c in ends if u is ends[-1][0]]

    def _original(self, unit: Unit, one: Call) -> Any:
        """What a call returns unquantized, kept while there is room for it."""
        if id(one) in self._exact:
            return self._exact[id(one)]
        value = original(unit, one)
        nbytes = sum(t.nbytes for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, Tensor))
        if nbytes <= self._room:
            self._room -= nbytes
            self._exact[id(one)] = value
        return value


def _key(unit: Unit, site: Site, choice: Choice) -> Key:
    return (id(unit.parameter(site)), *solution_key(site, choice))


def _db(quality: Quality) -> float | None:
    return None if quality.decibels is None else min(quality.decibels, EXACT_DB)


def _kl(quality: Quality) -> float | None:
    return quality.kl if quality.finite else None


def _cost(row: Effect) -> tuple[float, float]:
    """Sorts what does most harm first."""
    return (-(row.kl if row.kl is not None and row.finite else 0.0) if row.finite else -math.inf, row.decibels if row.decibels is not None else EXACT_DB)


def _gain(row: Effect) -> tuple[float, float]:
    """Sorts what helps most by being left alone first: the output is then closest to the original one."""
    return ((row.kl if row.kl is not None else 0.0) if row.finite else math.inf, -row.decibels if row.decibels is not None else EXACT_DB)


def _nats(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2e}"


def _check_random(model: Any) -> None:
    """Dropout would drown every effect."""
    if isinstance(model, nn.Module) and model.training:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
                raise CalibrationError(f"{name} drops values at random: call model.eval() first")
