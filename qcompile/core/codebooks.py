"""Tables of values: the formats that no formula describes."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import WeightError

# QLoRA (Dettmers et al. 2023), appendix E: quantiles of a normal distribution with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# bitsandbytes' FP4: E2M1 whose odd subnormal is 0.0625 instead of 0.5, over 12. Not OCP's E2M1, which is the format "e2m1".
_FP4_MAGNITUDES = tuple(v / 12 for v in (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
BNB_FP4 = (*(-v for v in reversed(_FP4_MAGNITUDES)), 0.0, *_FP4_MAGNITUDES)


def fit_codebook(t: Tensor, bits: int, counts: Tensor | None = None, iterations: int = 500, start: Tensor | None = None) -> Tensor:
    """The ``2**bits`` values of the least squared error on ``t``: Lloyd-Max (Lloyd 1957, Max 1960). (2**bits,) float32, ascending.

    ``t`` has any shape; ``counts``, broadcastable to it, says how often each value occurs. The result is a format, not a scale: rows for ``Format(values=...)``, to be fitted to values as they are
    after division by their scales. Alternates ``t_i = (c_i + c_i+1) / 2`` and ``c_i = mean of [t_i-1, t_i)``: first with what lies between two neighbouring values as a density, for on isolated values
    the iteration halts wherever no boundary passes one; then, which can only lower the error, on the values as they are. Each for ``iterations`` or until nothing moves.
    From ``start`` (2**bits,), ascending, only the second is done, and the error never grows. A code whose cell is empty goes to the worst cell, so that only fewer distinct values than codes
    leave equal ones. Raises WeightError where there is no finite value to fit.
    """
    x, order = t.detach().flatten().double().sort()
    w = torch.ones_like(x) if counts is None else counts.detach().expand_as(t).flatten().double()[order]
    x, w = x[w > 0], w[w > 0]
    if x.numel() == 0 or not bool(torch.isfinite(x[[0, -1]]).all()):
        raise WeightError(f"a codebook needs finite values; {t.numel()} were given, {x.numel()} of them counted and not all finite")
    x, same = torch.unique_consecutive(x, return_inverse=True)
    w = torch.zeros_like(x).index_add_(0, same, w)
    sums = torch.stack([_running(w * x**n) for n in range(3)])  # of w, w x and w x^2 over the values before each
    middle = (torch.arange(2**bits, device=x.device) + 0.5) / 2**bits * sums[0, -1]
    c = x[torch.searchsorted(sums[0, 1:], middle).clamp(max=len(x) - 1)]  # quantiles
    if start is not None:
        c = start.double()
    for between in (True, False) if start is None else (False,):
        for _ in range(iterations):
            moved = _step(c, x, sums, between)
            still = bool((moved - c).abs().max() <= 1e-9 * (x[-1] - x[0]))
            c = moved
            if still:
                break
    fitted: Tensor = c.float()
    return fitted


BINS, PIECE = 1 << 14, 1 << 24
"""Bins of a tensor's values, and how many of these are sorted into them at a time."""


def fit_many(x: Tensor, bits: int, importance: Tensor | None = None, iterations: int = 100) -> Tensor:
    """``fit_codebook`` of a whole weight ``x`` (..., K), float32, from a histogram of BINS equal bins between its least and its greatest value: at most 2**-15 of that range off, in a fraction of the time.

    ``importance`` (K,): what an error in each column counts, zero or more. The fit ends in one of many local optima: of that from the start and that from where every column counts alike, the
    better is taken. Counts are integers, whose sums no order changes: the same values from run to run, on a GPU, too.
    """
    plain = _values(x, None)
    every = fit_codebook(plain[0], bits, plain[1], iterations)
    if importance is None or bool(importance.amin() == importance.amax()):
        return every
    values, counts = _values(x, importance)
    assert counts is not None
    both = [fit_codebook(values, bits, counts, iterations, start) for start in (None, every)]
    return min(both, key=lambda c: float(((values - c[torch.bucketize(values, (c[1:] + c[:-1]) / 2)]).double().square() * counts).sum()))


def _values(x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What is fitted, and what each of it counts: all of a few values, the centres of bins of many."""
    each = None if importance is None else (importance.to(x.device).double() / importance.amax() * (1 << 20)).round().long()
    if x.numel() <= BINS:
        return x, None if each is None else each.expand_as(x)
    lo, hi = (float(end) for end in torch.aminmax(x))
    width = (hi - lo) / BINS or 1.0
    counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    for part in rows.split(max(1, PIECE // rows.shape[1])):
        bins = ((part - lo) / width).long().clamp_(0, BINS - 1)
        counts += torch.bincount(bins.flatten(), minlength=BINS) if each is None else torch.zeros_like(counts).index_add_(0, bins.flatten(), each.expand_as(bins).flatten())
    return lo + (torch.arange(BINS, device=x.device) + 0.5) * width, counts


def _running(v: Tensor) -> Tensor:
    return torch.cat([v.new_zeros(1), v.cumsum(0)])


def _step(c: Tensor, x: Tensor, sums: Tensor, between: bool) -> Tensor:
    """Means of the cells whose boundaries lie amid the values ``c``."""
    boundary = (c[1:] + c[:-1]) / 2
    edge = torch.searchsorted(x, boundary)  # x[edge - 1] < boundary <= x[edge]
    edge = torch.cat([edge.new_zeros(1), edge, edge.new_full((1,), len(x))])
    if not between or len(x) == 1:
        mass, first, second = sums[:, edge].diff(dim=1)
        mean = torch.where(mass > 0, first / mass.clamp(min=torch.finfo(mass.dtype).tiny), c)
        return _refill(mean, mass, second - first * mean, x, edge) if bool((mass == 0).any()) else mean
    i = edge[1:-1].clamp(1, len(x) - 1)
    part = ((boundary - x[i - 1]) / (x[i] - x[i - 1])).clamp(0, 1)
    middles = (sums[:2, 1:] + sums[:2, :-1]) / 2  # half of a value's own weight lies before it
    before = torch.lerp(middles[:, i - 1], middles[:, i], part)
    mass, first = torch.cat([sums[:2, :1], before, sums[:2, -1:]], 1).diff(dim=1)
    return torch.where(mass > 0, first / mass.clamp(min=torch.finfo(mass.dtype).tiny), c).sort().values


def _refill(c: Tensor, mass: Tensor, distortion: Tensor, x: Tensor, edge: Tensor) -> Tensor:
    """One code of an empty cell takes the last value of the cell with the greatest distortion, if one holds several."""
    distortion = torch.where(edge.diff() > 1, distortion, -1.0)
    worst = distortion.argmax()
    if bool(distortion[worst] < 0):
        return torch.where(mass == 0, x[torch.searchsorted(x, c).clamp(max=len(x) - 1)], c)  # every value is exact: codes that are left repeat one
    c = c.clone()
    c[(mass == 0).int().argmax()] = x[edge[worst + 1] - 1]
    return c.sort().values
