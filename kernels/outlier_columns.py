"""``outlier_columns(x, count, threshold)``: which columns of a call's activations are multiplied in 16 bits, LLM.int8()'s rule with static shapes (Dettmers et al. 2022, section 3.2).

Columns whose absolute maximum reaches the threshold; of more than ``count`` the largest, of equal ones those in front. On a GPU one program looks at all columns: where at most ``count`` pass, that
is all, else it finds the smallest maximum that is kept bit by bit (positive floats are ordered as their bits are).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import Skip

from . import tiles
from .op import Kernel, Op, target, two_dimensional

ROWS = 4
"""Up to so many rows the one program takes the maxima of columns itself; of more, Inductor's reduction gives it one row."""
LONGEST = 32768
"""Columns that one program holds."""


@dataclass(frozen=True)
class Columns:
    """What decides: the device, rows (None: dynamic), columns, and how many may be kept."""

    device: torch.device
    m: int | None
    k: int
    count: int


def reference(x: Tensor, count: int, threshold: float) -> Tensor:
    """(..., K) -> int32 (K + count + 1,): for each column 1 where it stays with the others and 0 where it is an outlier; the indices of the outliers in order, -1 behind the last; how many more reached ``threshold``."""
    k = x.shape[-1]
    peak = two_dimensional(x).abs().amax(0).float()
    over = peak >= threshold
    order = torch.where(over, peak, -1.0).sort(descending=True, stable=True).indices
    first = torch.zeros_like(over).index_fill(0, order[:count], True)
    kept = over & first
    place = torch.where(kept, kept.cumsum(0) - 1, count)
    columns = torch.arange(k, device=x.device, dtype=torch.int32)
    index = torch.full((count + 1,), -1, dtype=torch.int32, device=x.device).scatter(0, place, torch.where(kept, columns, -1))
    return torch.cat([(~kept).to(torch.int32), index[:count], (over.sum() - kept.sum()).to(torch.int32).reshape(1)])


def fake(x: Tensor, count: int, threshold: float) -> Tensor:
    """Shape and dtype of ``reference``."""
    return x.new_empty(x.shape[-1] + count + 1, dtype=torch.int32)


def case(x: Any, count: int, threshold: float) -> Columns:
    """The case of one call; tensors and IR nodes alike."""
    shape = compat.sizes(x)
    return Columns(compat.device_of(x), compat.static_int(shape[0]), int(shape[-1]), count)


def simplify(x: Tensor, count: int, threshold: float) -> Any:
    """N-D activations to 2-D; on a GPU many rows to their maxima."""
    if x.dim() != 2:
        return target("outlier_columns")(two_dimensional(x), count, threshold)
    rows = compat.static_int(x.shape[0])
    if x.device.type != "cuda" or not fits(x.shape[-1], count) or (rows is not None and rows <= ROWS):
        return NotImplemented
    return target("outlier_columns")(x.abs().amax(0, keepdim=True), count, threshold)


def fits(k: int, count: int) -> bool:
    """Columns that one program holds, of which some stay with the others: they fill the places of outliers that are not there."""
    return count < k <= LONGEST


def supports(c: Columns) -> Skip | None:
    if not fits(c.k, c.count):
        return Skip(f"{c.count} of {c.k} columns: one program takes up to {LONGEST}, and not all of them may be outliers")
    return None if c.m is not None and c.m <= ROWS else Skip(f"more than {ROWS} rows are reduced first")


SOURCE = """
{{def_kernel("X")}}
    stride_xm = {{stride("X", 0)}}
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    unknown = tl.zeros((BLOCK,), dtype=tl.int1)
    for r in tl.range(0, ROWS, loop_unroll_factor=UNROLL):
        x = tl.abs(tl.load(X + r * stride_xm + column, mask=inside, other=0.0).to(tl.float32))
        unknown = unknown | (x != x)
        peak = tl.maximum(peak, x)
    # bits of the maximum and one more, which orders as the maxima do; 0 for what stays below the threshold, and for NaN
    key = tl.where(inside & (peak >= THRESHOLD) & (unknown == 0), peak.to(tl.int32, bitcast=True) + 1, 0)
    passed = tl.sum((key > 0).to(tl.int32), 0)
    ones = (key > 0).to(tl.int32)
    total = passed
    if passed > COUNT:
        least = 0
        for bit in range(31):
            more = least | (1 << (30 - bit))
            if tl.sum((key >= more).to(tl.int32), 0) >= COUNT:
                least = more
        above = (key > least).to(tl.int32)
        equal = (key == least).to(tl.int32)
        room = COUNT - tl.sum(above, 0)
        ones = above + equal * (tl.cumsum(equal, 0) <= room).to(tl.int32)
        total = total * 0 + COUNT
    kept = ones > 0
    before = tl.cumsum(ones, 0)
    # others fill the places behind the outliers, and the last one with how many more passed
    place = tl.where(kept, before - 1, total + column - before)
    value = tl.where(kept, column, tl.where(place < COUNT, -1, passed - total))
    at = tl.join(column, COLUMNS + place)
    acc = tl.join(1 - ones, value)
    mask = tl.join(inside, inside & (place <= COUNT))
    {{store_output(("at",), "acc", "mask", val_shape=("BLOCK", "2"))}}
"""


def grid(size: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[int, int, int]:
    """One program."""
    return (1, 1, 1)


def blocks(c: Columns, threshold: float) -> dict[str, float]:
    """Sixteen columns and more for each thread."""
    assert c.m is not None
    block = 1 << (c.k - 1).bit_length()
    return {"BLOCK": block, "COLUMNS": c.k, "ROWS": c.m, "COUNT": c.count, "THRESHOLD": threshold, "UNROLL": min(c.m, 4), "num_warps": max(1, min(16, block // 512)), "num_stages": 1}


def _lower(c: Columns, x: Any, count: int, threshold: float) -> Any:
    return compat.lower_template(tiles.template_name("outlier_columns"), lambda: SOURCE, [x], (c.k + count + 1,), [blocks(c, threshold)], grid, dtype=torch.int32)


OP = Op("outlier_columns", "(Tensor x, int count, float threshold) -> Tensor", reference, fake, case, (Kernel("triton outlier columns", "cuda", supports, _lower),), simplify)
