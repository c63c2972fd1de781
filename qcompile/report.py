"""What qcompile did to a model, as plain values: ``print(report)``, ``report.to_json()``, ``report.save_html(path)``.

``qcompile.explain`` (``qcompile/measure.py``) fills these in; nothing here looks at a graph.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from qcompile.core.errors import QcompileError

WIDTH = 120
"""Columns of the plain text."""
EXACT_DB = 200.0
"""SQNR that stands for "no error at all": infinity is no JSON."""
SMALL = 64
"""Greatest number of rows that counts as a small batch: below it a linear is bound by reading its weight."""


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
    graph: int

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
    of linears. A weight that no compiled graph reads counts as not quantized, embedding tables do not count.
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
    def label(self) -> str:
        """``layers.*.up_proj  x32``."""
        return f"{self.name}  x{len(self.rows)}" if len(self.rows) > 1 else self.name

    def total(self, what: str) -> int:
        """Sum of a field."""
        return sum(getattr(row, what) for row in self.rows)

    def worst(self, what: str) -> float | None:
        """Least of a field, where it is known."""
        return min((getattr(row, what) for row in self.rows if getattr(row, what) is not None), default=None)

    @property
    def m(self) -> str:
        """Rows of the input, a range where they differ."""
        counts = [row.rows for row in self.rows]
        return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


INDEX = re.compile(r"(?<![^.\[@])\d+(?![^.\]@])")


def collapse(rows: Sequence[Row], same: Callable[[Row], Any]) -> list[Group[Row]]:
    """Group rows that are equal under ``same`` and whose names differ only in indices; an index that varies prints as ``*``."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((INDEX.sub("*", row.name), same(row)), []).append(row)
    return [Group(_pattern([row.name for row in members]), tuple(members)) for members in groups.values()]


def _pattern(names: Sequence[str]) -> str:
    columns = zip(*(INDEX.findall(name) for name in names))
    shown = iter([column[0] if len(set(column)) == 1 else "*" for column in columns])
    return INDEX.sub(lambda _: next(shown), names[0])


def regime(rows: int) -> str:
    """"decode" for one row, "small" up to 64, else "large"."""
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
        from rich.console import Console

        out = io.StringIO()
        console = Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False)
        for part in self._parts(full):
            console.print(part)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from self._parts(False)

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """JSON of ``to_dict``; what is not available is null."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save_html(self, path: str | pathlib.Path) -> None:
        """One HTML file that needs no other."""
        try:
            from jinja2 import Environment, FileSystemLoader, StrictUndefined
        except ImportError as error:
            raise QcompileError("save_html needs jinja2: pip install jinja2. to_json() and print(report) work without it.") from error
        environment = Environment(loader=FileSystemLoader(pathlib.Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters.update(size=size, db=decibels, shape=shape_text)
        page = environment.get_template("report.html").render(report=self, groups=self.site_groups(), kept=self.kept_groups(), passes=self.passes(), summary=self.summary())
        pathlib.Path(path).write_text(page, encoding="utf-8")

    def site_groups(self, full: bool = False) -> list[Group[SiteRow]]:
        """Quantized linears, equal layers together."""
        if full:
            return [Group(row.name, (row,)) for row in self.sites]
        return collapse(self.sites, lambda r: (r.shape, r.role, r.scheme, r.bits, r.kernel, r.regime))

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
        served = sum(g.parameter_sets for g in self.graphs)
        return [
            ("weights", f"{size(t.bytes_before)} -> {size(t.bytes_after)}{smaller}"),
            ("quantized", f"{t.coverage:.1%} of the bytes, {t.coverage_flops:.1%} of the FLOPs; heads and routers counted: {t.coverage_all:.1%}, {t.coverage_flops_all:.1%}"),
            ("resident", f"{size(t.resident_bytes)} with all parameters and buffers, " + (f"{t.released} 16-bit weights released" if t.released else "16-bit weights are not released")),
            ("kernels", "; ".join(f"{count} {name}" for name, count in kernels.most_common()) or "none"),
            ("graphs", f"{len(self.graphs)} for {served} sets of parameters, {sum(g.calls for g in self.graphs)} calls, {sum(g.kernel_count for g in self.graphs)} kernels generated by Inductor"),
        ]

    # --- text ----------------------------------------------------------------------------------------------------------

    def _parts(self, full: bool) -> Iterator[Any]:
        from rich.text import Text

        yield Text("qcompile: " + ", ".join(dict.fromkeys(g.recipe for g in self.graphs)), style="bold")
        if self.sites:
            yield self._site_table(full)
        if self.kept:
            yield self._kept_table(full)
        summary = _table("", "")
        for row in self.summary():
            summary.add_row(*map(_plain, row))
        yield summary
        passes = _table("pass", ">graphs", ">lines changed", ">ms", "")
        for name, graphs, changed, seconds, note in self.passes():
            passes.add_row(*map(_plain, (name, str(graphs), str(changed), f"{seconds * 1e3:.1f}", note)))
        yield passes
        for note in self.notes:
            yield Text(f"note: {note}")

    def _site_table(self, full: bool) -> Any:
        many = len(self.graphs) > 1 and full
        table = _table(*(["#"] if many else []), "linear", "shape", "scheme", ">bits", ">weight dB", ">output dB", "kernel", "rows", ">bytes")
        for group in self.site_groups(full):
            row = group.first
            cells = [group.label, shape_text(row.shape), row.scheme, f"{row.bits:.2f}", decibels(group.worst("weight_db")), decibels(group.worst("output_db"))]
            cells += [row.kernel.partition(":")[0], f"{group.m} {row.regime}", f"{size(group.total('bytes_before'))} -> {size(group.total('bytes_after'))}"]
            table.add_row(*map(_plain, [str(row.graph)] * many + cells))
        return table

    def _kept_table(self, full: bool) -> Any:
        table = _table("kept as it is", "shape", ">bytes", "why")
        for group in self.kept_groups(full):
            table.add_row(*map(_plain, (group.label, shape_text(group.first.shape), size(group.total("nbytes")), group.first.reason)))
        return table


def _table(*columns: str) -> Any:
    """Columns that begin with ">" are set flush right; long names fold, numbers do not."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    named = any(columns)
    table = Table(box=SIMPLE_HEAD if named else None, pad_edge=False, show_header=named, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        free = i == len(columns) - 1 or (i <= 1 and column in ("linear", "kept as it is"))
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold", no_wrap=not free or column.startswith(">"))
    return table


def _plain(cell: str) -> Any:
    from rich.text import Text

    return Text(cell)


def shape_text(shape: Iterable[int]) -> str:
    """``4096x11008``."""
    return "x".join(map(str, shape))


def decibels(value: float | None) -> str:
    """A number, "exact" or "n/a"."""
    return "n/a" if value is None else "exact" if value >= EXACT_DB else f"{value:.1f}"


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
