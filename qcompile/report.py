"""What qcompile did to a model, as plain values: ``print(report)``, ``report.to_json()``, ``report.save_html(path)``.

``qcompile.explain`` (``qcompile/measure.py``) fills these in; nothing here looks at a graph.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qcompile.core.errors import QcompileError
from qcompile.tables import WIDTH, Cells, decibels, plain, shape_text, size, table

if TYPE_CHECKING:
    from qcompile.statistics import Calibration

SMALL = 64
"""Greatest number of rows that counts as a small batch: below it a linear is bound by reading its weight."""


@dataclass(frozen=True)
class Calibrated:
    """What calibration found for one linear."""

    solver: str
    steps: tuple[str, ...]
    """The recipe's methods with their arguments."""
    place: str | None
    """Where the vector that smooths its input went, and why; None where there is none."""
    outliers: tuple[int, ...]
    """Columns of the input that stay in 16 bits."""
    clip: tuple[float, float] | None
    """The fixed range of the (smoothed) input."""
    decibels: float | None
    """SQNR of its output on the calibration data, behind the quantized linears before it."""
    tokens: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteRow:
    """One quantized linear with the parameters of one call. ``None`` stands for "not available"."""

    name: str
    shape: tuple[int, ...]
    role: str
    weight: str
    input: str | None
    why: str
    bits: float
    """Bits per weight, of the packed tensors' real bytes."""
    weight_db: float | None
    """SQNR of the dequantized weight against the original; None for released weights."""
    output_db: float | None
    """SQNR of the op's reference on the real input against the linear with the original weight on the same input; None for stacked experts and released weights."""
    kernel: str
    rows: int
    regime: str
    bytes_before: int
    bytes_after: int
    flops: int
    parameter: int
    """Number of the parameter in this report: rows of several graphs may read the same one."""
    graph: int
    calibrated: Calibrated | None = None

    @property
    def scheme(self) -> str:
        """``input @ weight``, or the weight's scheme alone."""
        return f"{self.input} @ {self.weight}" if self.input else self.weight


@dataclass(frozen=True)
class KeptRow:
    """A weight that keeps its bits, and why. ``role`` is a site's role, "other" for a product that is no linear, or "unread" for a parameter that no compiled graph reads."""

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str
    nbytes: int
    parameter: int
    rows: int = 0
    flops: int = 0
    graph: int | None = None


@dataclass(frozen=True)
class StepRow:
    """What one pass did to one graph."""

    name: str
    seconds: float
    changed: int
    note: str = ""


@dataclass(frozen=True)
class GraphRow:
    """One compiled graph: how many sets of parameters it served in how many calls, kernels that Inductor generated, the passes that ran."""

    index: int
    recipe: str
    lower: str
    sites: int
    parameter_sets: int
    calls: int
    kernel_count: int
    steps: tuple[StepRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Totals:
    """Sums. Bytes count each weight once, whatever number of graphs reads it; FLOPs count each call.

    ``coverage`` is the quantized share of the bytes of weights in matrix products, heads and routers apart; ``coverage_all`` counts them in; ``*_flops`` are the same in the FLOPs
    of matrix products, convolutions included. A weight that no compiled graph reads counts as not quantized, embedding tables do not count.
    """

    bytes_before: int
    bytes_after: int
    coverage: float
    coverage_all: float
    coverage_flops: float
    coverage_flops_all: float
    resident_bytes: int
    """Bytes of all storages that are held: packed tensors, and parameters and buffers as they are now."""
    released: int
    """Parameters whose 16-bit storage was given back."""


Row = TypeVar("Row", SiteRow, KeptRow)


@dataclass(frozen=True)
class Group(Generic[Row]):
    """Rows that differ only in the indices within their names."""

    name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """The row that came first; all have its scheme, shape and kernel."""
        return self.rows[0]

    @property
    def weights(self) -> list[Row]:
        """A row for each weight, whatever number of graphs reads it."""
        return list({(row.parameter, row.name): row for row in self.rows}.values())

    @property
    def label(self) -> str:
        """``layers.*.up_proj  x32``."""
        return f"{self.name}  x{len(self.weights)}" if len(self.weights) > 1 else self.name

    def total(self, what: str) -> int:
        """Sum of a field over the weights."""
        return sum(getattr(row, what) for row in self.weights)

    def worst(self, what: str) -> float | None:
        """Least of a field, where it is known."""
        return min((getattr(row, what) for row in self.rows if getattr(row, what) is not None), default=None)

    @property
    def m(self) -> str:
        """Rows of the input, a range where they differ."""
        return _span([row.rows for row in self.rows])


INDEX = re.compile(r"(?<![^.\[@])\d+(?![^.\]@])")
NUMBER = re.compile(r"\d+")


def collapse(rows: Sequence[Row], same: Callable[[Row], Any]) -> list[Group[Row]]:
    """Group rows that are equal under ``same`` and whose names differ only in indices; an index that varies prints as ``*``."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((INDEX.sub("*", row.name), same(row)), []).append(row)
    return [Group(_pattern([row.name for row in members], INDEX), tuple(members)) for members in groups.values()]


def _pattern(names: Sequence[str], index: re.Pattern[str]) -> str:
    columns = zip(*(index.findall(name) for name in names))
    shown = iter([column[0] if len(set(column)) == 1 else "*" for column in columns])
    return index.sub(lambda _: next(shown), names[0])


def regime(rows: int) -> str:
    """One row is "decode", up to 64 are "small", more are "large"."""
    return "decode" if rows == 1 else "small" if rows <= SMALL else "large"


@dataclass(frozen=True)
class Report:
    """What one call of a compiled model ran. Made by ``qcompile.explain``."""

    sites: tuple[SiteRow, ...]
    kept: tuple[KeptRow, ...]
    graphs: tuple[GraphRow, ...]
    totals: Totals
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return self.table()

    def table(self, full: bool = False, width: int = WIDTH) -> str:
        """Plain text of ``width`` columns; ``full`` prints every linear, equal layers too."""
        return plain(self._parts(full, width), width)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from self._parts(False, options.max_width)

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """JSON of ``to_dict``; what is not available is null."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save_html(self, path: str | pathlib.Path, calibration: Calibration | None = None) -> None:
        """One HTML file that needs no other; with what a ``calibration`` saw of each input as plots, which need matplotlib."""
        try:
            from jinja2 import Environment, FileSystemLoader, StrictUndefined
        except ImportError as error:
            raise QcompileError("save_html needs jinja2: pip install jinja2. to_json() and print(report) work without it.") from error
        loader = FileSystemLoader(pathlib.Path(__file__).parent / "templates")
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters.update(size=size, db=decibels, shape=shape_text)
        inputs: list[tuple[str, str, str]] = []
        if calibration is not None:
            from qcompile import plots

            inputs = plots.inputs(calibration, {row.name: row.calibrated for row in self.sites if row.calibrated is not None})
        page = environment.get_template("report.html").render(report=self, groups=self.site_groups(), kept=self.kept_groups(), passes=self.passes(), summary=self.summary(), calibrated=self._calibrated_cells, inputs=inputs)
        pathlib.Path(path).write_text(page, encoding="utf-8")

    def site_groups(self, full: bool = False) -> list[Group[SiteRow]]:
        """Quantized linears, equal layers together."""
        if full:
            return [Group(row.name, (row,)) for row in self.sites]
        return collapse(self.sites, lambda r: (r.shape, r.role, r.scheme, r.bits, r.kernel, r.regime))

    def calibrated_groups(self, full: bool = False) -> list[Group[SiteRow]]:
        """Linears that were calibrated, equal layers together."""
        rows = [row for row in self.sites if row.calibrated is not None]
        if full:
            return [Group(row.name, (row,)) for row in rows]
        return collapse(rows, lambda r: (c := r.calibrated) and (c.solver, c.steps, NUMBER.sub("*", c.place or ""), c.clip is None))

    def kept_groups(self, full: bool = False) -> list[Group[KeptRow]]:
        """Weights that keep their bits, equal layers together."""
        if full:
            return [Group(row.name, (row,)) for row in self.kept]
        return collapse(self.kept, lambda r: (r.shape, r.role, r.reason))

    def passes(self) -> list[tuple[str, int, int, float, str]]:
        """(pass, graphs it ran on, lines changed, seconds, note of the only graph) over all graphs."""
        found: dict[str, list[StepRow]] = {}
        for graph in self.graphs:
            for step in graph.steps:
                found.setdefault(step.name, []).append(step)
        return [(name, len(s), sum(x.changed for x in s), sum(x.seconds for x in s), s[0].note if len(s) == 1 else "") for name, s in found.items()]

    def summary(self) -> list[tuple[str, str]]:
        """The totals in words."""
        t = self.totals
        smaller = f", {t.bytes_before / t.bytes_after:.2f} times smaller" if 0 < t.bytes_after < t.bytes_before else ""
        kernels = Counter(row.kernel for row in self.sites)
        served, calls, generated = ([getattr(g, what) for g in self.graphs] for what in ("parameter_sets", "calls", "kernel_count"))
        each = f" ({' + '.join(map(str, generated))})" if 1 < len(generated) <= 8 else ""
        return [
            ("weights", f"{size(t.bytes_before)} -> {size(t.bytes_after)}{smaller}"),
            ("quantized", f"{t.coverage:.1%} of the bytes, {t.coverage_flops:.1%} of the FLOPs; heads and routers counted: {t.coverage_all:.1%}, {t.coverage_flops_all:.1%}"),
            ("resident", f"{size(t.resident_bytes)} with all parameters and buffers, {t.released or 'no'} 16-bit weights released"),
            ("kernels", "; ".join(f"{count} {name}" for name, count in kernels.most_common()) or "none"),
            ("graphs", f"{_count(len(self.graphs), 'graph')}, {_count(sum(served), 'set')} of parameters, {_count(sum(calls), 'call')}, {_count(sum(generated), 'kernel')} generated by Inductor{each}"),
        ]

    # --- text ----------------------------------------------------------------------------------------------------------

    def _parts(self, full: bool, width: int) -> Iterator[Any]:
        from rich.text import Text

        yield Text("qcompile: " + ", ".join(dict.fromkeys(g.recipe for g in self.graphs)), style="bold")
        for columns, rows in (self._site_cells(full), self._calibrated_cells(full), self._kept_cells(full), self._sums(), self._pass_cells()):
            if rows:
                yield Text()
                yield table(columns, rows, width)
        if self.notes:
            yield Text()
        for note in self.notes:
            yield Text(f"note: {note}")

    def _site_cells(self, full: bool) -> Cells:
        rows = []
        for group in self.site_groups(full):
            row = group.first
            cells = [group.label, shape_text(row.shape), row.scheme, f"{row.bits:.2f}", decibels(group.worst("weight_db")), decibels(group.worst("output_db"))]
            rows.append([*cells, row.kernel.partition(":")[0], f"{group.m} {row.regime}", size(group.total("bytes_after"), group.total("bytes_before"))])
        return ("linear", "shape", "scheme", ">bits", ">dB", ">out dB", "kernel", "rows", ">bytes"), rows

    def _calibrated_cells(self, full: bool) -> Cells:
        rows = [[g.label, *calibrated_words(g)] for g in self.calibrated_groups(full)]
        columns = ("calibrated", "by", ">tokens", ">dB then", ">columns", "range", "smoothing")
        shown = [i for i in range(len(columns)) if i < 4 or any(row[i] != "-" for row in rows)]
        return tuple(columns[i] for i in shown), [[row[i] for i in shown] for row in rows]

    def _kept_cells(self, full: bool) -> Cells:
        rows = [[g.label, shape_text(g.first.shape), size(g.total("nbytes")), g.first.reason] for g in self.kept_groups(full)]
        return ("kept as it is", "shape", ">bytes", "why"), rows

    def _sums(self) -> Cells:
        return ("", ""), [list(row) for row in self.summary()]

    def _pass_cells(self) -> Cells:
        rows = [[name, str(graphs), str(changed), f"{seconds * 1e3:9.1f}", note] for name, graphs, changed, seconds, note in self.passes()]
        return ("pass", ">graphs", ">lines changed", ">ms", ""), rows


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def calibrated_words(group: Group[SiteRow]) -> list[str]:
    """Methods, tokens, least dB, outlier columns, the fixed range and the place of the smoothing vector of calibrated linears; ranges where they differ."""
    found = [row.calibrated for row in group.rows if row.calibrated is not None]
    first, known = found[0], [f.decibels for f in found if f.decibels is not None]
    clips = [f.clip for f in found if f.clip is not None]
    clip = f"{min(c[0] for c in clips):.3g} .. {max(c[1] for c in clips):.3g}" if clips else "-"
    counts = [len(f.outliers) for f in found]
    columns = "-" if not any(counts) else _span(counts)
    return [", ".join(first.steps) or first.solver, _span([f.tokens for f in found]), decibels(min(known, default=None)), columns, clip, _pattern([f.place or "-" for f in found], NUMBER)]


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
