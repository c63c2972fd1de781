"""Histogram of a whole tensor that grows with it and merges exactly: the state of the statistic "histogram".

``{"counts": (2 * BINS,) float64, "limit": () float32}``: bins of equal width over [-limit, limit], mirrored about zero, each closed at its end nearer zero, which belongs to the positive side.
The limit is the least power of two above every magnitude seen. So a farther limit joins 2**n neighbours into one bin, and the counts are those of one histogram at the final limit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import OptionError

BINS = 2048
"""Bins of |x|; there are as many on either side of zero."""
LEAST = 2.0**-100
"""Limit of a histogram that has seen only zeros."""
PIECE = 2**22
"""Values converted at a time, so that float64 or indices of a long batch never exist at once."""


def pieces(x: Tensor) -> Iterator[Tensor]:
    """``x`` (T, K) by runs of rows of about PIECE values."""
    return iter(x.split(max(1, PIECE // max(1, x.shape[1]))))


def covering(absolute_maximum: Tensor) -> Tensor:
    """The least power of two above ``absolute_maximum`` (float32), from LEAST to 2**127. Strictly above, so that no value lies on the end of the last bin and bins of growing histograms nest exactly."""
    return ((_exponent(absolute_maximum) + 1).clamp(max=254) << 23).view(torch.float32).clamp(min=LEAST)


def _exponent(x: Tensor) -> Tensor:
    """Biased exponent of non-negative float32 values."""
    return x.contiguous().view(torch.int32) >> 23


def bin_of(magnitude: Tensor, limit: Tensor) -> Tensor:
    """Index in BINS bins over [0, limit] of non-negative float32 values; exact, for the limit is a power of two."""
    return (magnitude * (BINS / limit)).long().clamp(max=BINS - 1)


def init(k: int, device: torch.device | str) -> dict[str, Tensor]:
    """Empty; the number of channels ``k`` does not matter."""
    return {"counts": torch.zeros(2 * BINS, device=device, dtype=torch.float64), "limit": torch.full((), LEAST, device=device, dtype=torch.float32)}


def update(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The values of rows ``x`` (T, K) added. Raises OptionError where one is not finite in float32: no bin would show it."""
    if not len(x):
        return state
    lo, hi = torch.aminmax(x)
    greatest = torch.maximum(-lo, hi).float()
    if not bool(torch.isfinite(greatest)):
        raise OptionError(f"histogram: {int(x.numel() - torch.isfinite(x.float()).sum())} of the {x.numel()} values of an input are NaN or infinite in float32; leave their rows out, as update_all does")
    state = _grown(state, torch.maximum(state["limit"], covering(greatest)))
    for piece in pieces(x):
        value = piece.float().flatten()
        m = bin_of(value.abs(), state["limit"])  # bins mirror each other: counts of |x| are those of both signs, also where values lie on edges, as bfloat16's do
        state["counts"] += torch.bincount(torch.where(value < 0, BINS - 1 - m, BINS + m), minlength=2 * BINS)
    return state


def _grown(state: dict[str, Tensor], limit: Tensor) -> dict[str, Tensor]:
    """The same counts over a limit that is a power of two times as far: 2**n neighbours become one bin."""
    n = (_exponent(limit) - _exponent(state["limit"])).clamp(max=11)  # 2**11 bins, all of one sign, are one bin at most
    counts = state["counts"]
    index = ((torch.arange(2 * BINS, device=counts.device) - BINS) >> n) + BINS  # an arithmetic shift rounds down: the two signs never mix
    return {"counts": torch.zeros_like(counts).scatter_add_(0, index, counts), "limit": limit}


def merge(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both at the farther limit; exact."""
    limit = torch.maximum(a["limit"], b["limit"])
    return {"counts": _grown(a, limit)["counts"] + _grown(b, limit)["counts"], "limit": limit}


def centres(state: dict[str, Tensor]) -> Tensor:
    """Centres of the bins of a histogram, (2 * BINS,) float32, ascending."""
    i = torch.arange(-BINS, BINS, device=state["limit"].device, dtype=torch.float32)
    return (i + 0.5) * (state["limit"] / BINS)


def magnitudes(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A histogram folded to |x|: centres (BINS,) float32 and counts (BINS,) float64."""
    counts = state["counts"]
    return centres(state)[BINS:], counts[BINS:] + counts[:BINS].flip(0)
