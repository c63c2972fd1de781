"""What each slot of a compiled graph reads for a live parameter, and the shapes of that before there are values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.qtensor import quantize
from qcompile.core.solution import Solution
from qcompile.passes.sites import view
from qcompile.passes.slots import Slot
from qcompile.sequence import use
from qcompile.weights import TABLE


def tensors_of(slot: Slot, parameter: Tensor) -> list[Tensor]:
    """What a slot reads for one parameter: always the same tensors, up to date."""
    key = (slot.view, use(slot.site), slot.key) if slot.key else None
    if slot.what in ("weight", "columns"):
        return TABLE.packed(parameter, slot.view, slot.scheme, slot.path, key, slot.what)
    assert key is not None
    return TABLE.given(parameter, slot.what, key, slot.path)


def shapes_of(slot: Slot, inputs: Sequence[Any]) -> list[Tensor]:
    """The same as tensors without values, under a fake mode."""
    p = inputs[slot.arg]
    record = TABLE.get(p)
    solution = record.solutions.get((slot.view, use(slot.site), slot.key)) if record is not None and slot.key else None
    if solution is not None and solution.live is not None:
        with compat.no_dispatch_modes():
            solution = solution.now()
        return _like(slot, solution)
    w = view(torch.empty(p.shape, dtype=p.dtype, device=p.device), slot.view)
    if slot.what == "weight":
        return quantize(w, slot.scheme).flatten()
    if slot.what == "range":
        return [torch.empty(1, device=p.device) for _ in range(1 if slot.scheme.zero == "none" else 2)]
    n, k = w.shape[-2:]
    shape = {"smooth": (k,), "mask": (k,), "outliers": (slot.count,), "columns": (n, slot.count), "bias": (n,), "missed": (1,)}[slot.what]
    dtype = {"outliers": torch.int64, "missed": torch.int64, "columns": p.dtype}.get(slot.what, torch.float32)
    return [torch.empty(shape, dtype=dtype, device=p.device)]


def _like(slot: Slot, solution: Solution) -> list[Tensor]:
    """Shapes of what a stored solution gives."""
    assert solution.q is not None
    n, k = solution.q.shape[-2:]
    if slot.what == "weight":
        real = solution.q.flatten()
    elif slot.what == "range":
        real = list(solution.range)
    elif slot.what == "columns":
        assert solution.columns is not None
        real = [solution.columns]
    else:
        shape = {"smooth": (k,), "mask": (k,), "outliers": (slot.count,), "bias": (n,), "missed": (1,)}[slot.what]
        return [torch.empty(shape, dtype=torch.int64 if slot.what in ("outliers", "missed") else torch.float32, device=solution.q.codes.device)]
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in real]
