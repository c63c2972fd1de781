"""Progress bars for long work: on a terminal a bar with the time left, elsewhere nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any


@contextlib.contextmanager
def bar(what: str, total: int, show: bool = True) -> Iterator[Callable[..., None]]:
    """``with bar("calibrating", 40) as step: step(1, "layer 3")``."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        yield lambda *_: None
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal), transient=True) as progress:
        task = progress.add_task(what, total=total)

        def step(count: int = 1, text: str | None = None) -> None:
            progress.update(task, advance=count, description=f"{what} {text}" if text else None)

        yield step


def track(values: Iterable[Any], what: str, show: bool = True) -> Iterator[Any]:
    """The values, with a bar."""
    total = len(values) if isinstance(values, Sized) else 0
    with bar(what, total, show) as step:
        for value in values:
            yield value
            step(1)
