"""Histories of FP8 training (``kernels/fp8_history.py``) beside a model: how they start, how those of one graph lie in one tensor, and what went wrong in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompile.core.ranges import TINY
from qcompile.kernels.fp8_history import E4M3, OVERFLOWS, RING, SCALE, highest
from qcompile.passes.slots import Slot

if TYPE_CHECKING:
    from qcompile.trained import StateTable

ROLES = {"fp8_forward": ("input", "weight"), "fp8_backward": ("gradient",)}
"""What the rows of a linear's history are of."""
START = 2.0**16
"""The first scale of gradients, which nobody has seen yet: from 2**-32 up to 0.875 none is lost, where the mean over some thousand tokens puts them. The second call uses what the first one saw."""


def shape(slot: Slot, weight: tuple[int, ...]) -> tuple[int, ...]:
    """Of one linear: (1, rows, columns)."""
    return 1, len(ROLES[slot.key]), RING + slot.count


def first_forward(slot: Slot, w: Tensor, x: Tensor | None) -> Tensor:
    """What the first call's input and weight would have left, so that the first scales are those of current scaling."""
    out = torch.zeros(shape(slot, tuple(w.shape)), device=w.device)
    amax = torch.stack([t.detach().abs().amax().float() if t is not None and t.numel() else out.new_zeros(()) for t in (x, w)])
    amax = torch.where(torch.isfinite(amax), amax, 0.0)
    out[0, :, RING] = amax
    out[0, :, SCALE] = torch.where(amax > 0, highest(E4M3) / amax.clamp(min=TINY), 1.0)
    return out


def first_backward(slot: Slot, w: Tensor, x: Tensor | None) -> Tensor:
    """An empty ring and the scale ``START``."""
    out = torch.zeros(shape(slot, tuple(w.shape)), device=w.device)
    out[..., SCALE] = START
    return out


def together(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose rows, in order, are these; None where they do not lie like that."""
    first = parts[0]
    at = [p.storage_offset() - i * first.numel() for i, p in enumerate(parts)]
    if any(p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for p in parts) or set(at) != {first.storage_offset()}:
        return None
    return first.as_strided((len(parts), *first.shape[1:]), first.stride(), first.storage_offset())


def troubles(table: StateTable, parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """A line for each (name, parameter) whose history met values that saturated, inf or NaN."""
    lines = []
    for name, p in parameters:
        counts = {role: n for role, n in table.overflows(p).items() if n}
        if counts:
            lines.append(f"{name}: FP8 training met values beyond its delayed scale, inf or NaN " + ", ".join(f"{n} times in its {role}" for role, n in counts.items()))
    return lines


def counts(kind: str, state: Tensor) -> dict[str, int]:
    """Role -> calls that overflowed, of one linear's history."""
    return dict(zip(ROLES[kind], map(int, state[0, :, OVERFLOWS].tolist())))
