"""Tables and numbers as plain text, for reports: rich's tables in columns of ASCII, sizes with units, decibels."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

WIDTH = 120
"""Columns of the plain text."""
EXACT_DB = 200.0
"""SQNR that stands for "no error at all": infinity is no JSON."""
Cells = tuple[tuple[str, ...], list[list[str]]]
"""Names of columns, and rows."""

FOLDING = {"scheme": 12, "kernel": 10, "linear": 24, "why": 30, "kept as it is": 24, "calibrated": 24, "by": 20, "smoothing": 20}
"""Columns that may fold, in the order in which they give way, and the width that they keep; so may the last column where it has no name."""

RULE = "    \n    \n -- \n    \n    \n    \n    \n    \n"
"""A line under the header, in ASCII: logs and terminals of every encoding show it."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Any:
    """Columns that begin with ">" are set flush right; a table that is too wide takes the width back from the columns that may fold."""
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    names = [column.removeprefix(">") for column in columns]
    widths = [max(len(name), *(len(row[i]) for row in rows)) for i, name in enumerate(names)]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    for name, least in {**FOLDING, "": 30}.items():
        if name in names and excess > 0:
            i = len(names) - 1 - names[::-1].index(name)
            given = max(0, min(excess, widths[i] - least))
            widths[i] -= given
            excess -= given
    made = Table(box=Box(RULE, ascii=True), show_edge=False, show_header=any(names), pad_edge=False, padding=(0, 1, 0, 0))
    for column, name, columns_wide in zip(columns, names, widths):
        made.add_column(name, justify="right" if column.startswith(">") else "left", overflow="fold", width=columns_wide)
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def plain(parts: Iterable[Any], width: int = WIDTH) -> str:
    """What rich prints of the parts, without colours, in ``width`` columns."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def shape_text(shape: Iterable[int]) -> str:
    """``4096x11008``."""
    return "x".join(map(str, shape))


def decibels(value: float | None) -> str:
    """A number, "exact" or "n/a"."""
    return "n/a" if value is None else "exact" if value >= EXACT_DB else f"{value:.1f}"


def size(count: float, before: float | None = None) -> str:
    """Bytes with a decimal unit: ``14.8 kB``, or ``57.3 -> 14.8 kB``."""
    unit, scale, digits = next(u for u in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1), ("B", 1.0, 0)) if abs(count) >= u[1] or u[0] == "B")
    shown = [f"{c / scale:.{digits}f}" for c in (before, count) if c is not None]
    return f"{' -> '.join(shown)} {unit}"
