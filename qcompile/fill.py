"""What each slot of a compiled graph reads for a live parameter, and the shapes of that before there are values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.qtensor import quantize
from qcompile.core.solution import Solution
from qcompile.joined import joined
from qcompile.passes.sites import shape_of, view
from qcompile.passes.slots import Slot
from qcompile.sequence import use
from qcompile.trained import KINDS, STATE
from qcompile.weights import GENERATION, TABLE


def tensors_of(slot: Slot, parameter: Tensor, *rest: Tensor) -> list[Tensor]:
    """What a slot reads for its parameters, in the order of ``slot.args``: always the same tensors, up to date."""
    if slot.rest and slot.what == "state":
        with compat.no_dispatch_modes(), torch.no_grad():
            whole, moved = STATE.stacked(list(zip((parameter, *rest), (slot, *slot.rest), strict=True)))
        GENERATION[0] += moved  # other graphs that read them take the views
        return [whole]
    if slot.rest:
        parts = [(s, p) for s, p in zip((replace(slot, rest=()), *slot.rest), (parameter, *rest))]
        return joined([(p, (s.what, s.view, s.scheme, (s.view, use(s.site), s.key) if s.key else None)) for s, p in parts], lambda: [tensors_of(s, p) for s, p in parts])
    if slot.what == "state":
        found = STATE.get(parameter, slot)
        assert found is not None, f"no {slot.key} was made for {slot.path}"
        return [found]
    key = (slot.view, use(slot.site), slot.key) if slot.key else None
    if slot.what in ("weight", "columns"):
        return TABLE.packed(parameter, slot.view, slot.scheme, slot.path, key, slot.what)
    assert key is not None
    given = TABLE.given(parameter, slot.what, key, slot.path)
    if slot.what == "range" and (learned := STATE.range(parameter, slot.site, slot.view, slot.scheme)):  # training goes on between calls
        for old, new in zip(given, learned, strict=True):
            old.copy_(new)
    return given


def shapes_of(slot: Slot, inputs: Sequence[Any]) -> list[Tensor]:
    """The same as tensors without values, under a fake mode."""
    if slot.rest:
        return [torch.cat(tensors) for tensors in zip(*(shapes_of(s, inputs) for s in (replace(slot, rest=()), *slot.rest)))]
    p = inputs[slot.arg]
    if slot.what == "state":
        kind = KINDS[slot.key]
        shape = kind.shape(slot, shape_of(p, slot.view))
        return [torch.empty(shape, dtype=kind.dtype, device=p.device, requires_grad=kind.learned)]
    record = TABLE.get(p)
    solution = record.solutions.get((slot.view, use(slot.site), slot.key)) if record is not None and slot.key else None
    if solution is not None and solution.live is not None:
        with compat.no_dispatch_modes():
            solution = solution.now()
        return _stored(slot, solution, p.device)
    w = view(torch.empty(p.shape, dtype=p.dtype, device=p.device), slot.view)
    return quantize(w, slot.scheme).flatten() if slot.what == "weight" else _beside(slot, w.shape, p.dtype, p.device)


def _stored(slot: Slot, solution: Solution, device: torch.device) -> list[Tensor]:
    """Shapes of what a module that holds codes gives."""
    assert solution.q is not None
    if slot.what == "weight":
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in solution.q.flatten()]
    return _beside(slot, solution.q.shape, solution.columns.dtype if solution.columns is not None else torch.float32, device)


def _beside(slot: Slot, weight: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What a slot other than the weight holds, for a weight of shape (..., N, K) whose outlier columns have ``dtype``."""
    n, k = weight[-2:]
    shape = {"range": (1,), "smooth": (k,), "mask": (k,), "outliers": (slot.count,), "columns": (n, slot.count), "bias": (n,), "missed": (1,)}[slot.what]
    kind = {"outliers": torch.int64, "missed": torch.int64, "columns": dtype}.get(slot.what, torch.float32)
    parts = 2 if slot.what == "range" and slot.scheme.zero != "none" else 1
    return [torch.empty(shape, dtype=kind, device=device) for _ in range(parts)]
