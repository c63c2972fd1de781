"""Graphs as files: ``options={"dump": folder}`` or ``QCOMPILE_DUMP=folder``, and the plan as an artifact for tlparse.

A folder ``graphNN`` for each compiled graph holds ``00_capture.txt``, the graph after each pass with what the pass changed (``01_normalize.txt``, ``01_normalize.diff`` ...), and
``kernels.txt``. Two runs write the same bytes.
"""

from __future__ import annotations

import json
import pathlib
import re
import threading
from collections.abc import Mapping, Sequence

from torch import fx

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.recipe import Choice
from qcompile.passes.infra import Step, text
from qcompile.passes.sites import Site

_OURS = re.compile(r"\d\d_\w+\.(txt|diff)|kernels\.txt")
_next: dict[pathlib.Path, int] = {}
_lock = threading.Lock()


Plan = Mapping[str, Choice | Skip]
Kernels = Mapping[str, str | Skip]


def dump(
    folder: str, captured: fx.GraphModule, steps: Sequence[Step], sites: Mapping[str, Site] | None = None, plan: Plan | None = None, kernels: Kernels | None = None
) -> pathlib.Path:
    """Write one graph; returns its folder. Graphs of one process are numbered in each folder; what an earlier process left under the same number is replaced.

    Without ``kernels`` (a pass failed) what the earlier passes gave is written.
    """
    root = pathlib.Path(folder).expanduser().resolve()
    with _lock:
        number = _next.get(root, 0)
        _next[root] = number + 1
    path = root / f"graph{number:02d}"
    path.mkdir(parents=True, exist_ok=True)
    for old in path.iterdir():
        if _OURS.fullmatch(old.name):
            old.unlink()
    _write(path / "00_capture.txt", steps[0].before if steps else text(captured))
    for step in steps:
        stem = f"{step.index + 1:02d}_{step.name}"
        _write(path / f"{stem}.txt", step.after)
        _write(path / f"{stem}.diff", step.diff())
    if sites is not None and plan is not None and kernels is not None:
        _write(path / "kernels.txt", kernel_lines(sites, plan, kernels))
    return path


def kernel_lines(sites: Mapping[str, Site], plan: Plan, kernels: Kernels) -> str:
    """A line for each site: its name, shape, scheme and kernel, or why it has none."""
    rows = [(name, "x".join(map(str, sites[name].shape)), *_decision(plan[name], kernels.get(name))) for name in sites]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip() for row in rows)


def _decision(choice: Choice | Skip, kernel: str | Skip | None) -> tuple[str, str]:
    """(scheme, kernel) in words."""
    if isinstance(choice, Skip):
        return "kept", choice.reason
    return str(choice), f"reference: {kernel.reason}" if isinstance(kernel, Skip) else kernel or "not lowered"


def trace_plan(sites: Mapping[str, Site], plan: Plan, kernels: Kernels) -> None:
    """The artifact ``qcompile_plan`` where TORCH_TRACE is set."""
    rows = {}
    for name, site in sites.items():
        choice, kernel = plan[name], kernels.get(name)
        row: dict[str, object] = {"shape": list(site.shape), "role": site.role, "rows": site.m}
        if isinstance(choice, Choice):
            row |= {"weight": str(choice.weight), "input": str(choice.input) if choice.input else None, "why": choice.why}
            row |= {"kernel": None, "reference": kernel.reason} if isinstance(kernel, Skip) else {"kernel": kernel}
        else:
            row |= {"kept": choice.reason}
        rows[name] = row
    compat.trace_artifact("qcompile_plan", lambda: json.dumps(rows, indent=1), "json")


def _write(path: pathlib.Path, content: str) -> None:
    path.write_text(content + "\n" if content else "", encoding="utf-8", newline="\n")
