"""Range rules: from values to a scale and a zero, one signature for all.

``rule(t, scheme, axes, counts=None)`` reduces ``t`` (float32) over ``axes`` (kept as size 1) and returns ``(scale, zero)``: a positive float32 scale and, for schemes with one,
the float32 zero (integer-valued for "point"). A range of zero width gets the least scale that does not overflow, so that zero stays exactly zero.

``counts``, broadcastable to ``t``, says how often each value occurs: a histogram is ``t`` = centres of its bins, ``counts`` = what they hold; padding has 0. A value that does not occur is as if absent.
Granularity is ``axes``: all of them for one scale per tensor, the last for one per row or token, those of ``tile`` for groups; dynamic rules see values, static ones (``static_range``) a statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import OptionError, unknown
from .formats import Format, decode, encode
from .histogram import BINS, PIECE, bin_of, centres, covering
from .stats import Stats

if TYPE_CHECKING:
    from .scheme import Scheme

TINY = 2.0**-100
"""Least scale: its reciprocal is finite in float32, and its products with the ends of every format are exact in bfloat16, so that zeros stay zeros under a minimum, too."""

Range = tuple[Tensor, Tensor | None]
RangeRule = Callable[..., Range]
"""``rule(t, scheme, axes, counts=None, **options) -> (scale, zero)``."""


def absmax(t: Tensor, scheme: Scheme, axes: tuple[int, ...], counts: Tensor | None = None) -> Range:
    """The whole range: symmetric about zero without a zero point, else from the least to the greatest value, zero included.

    Symmetric: s = max|x| / q_max. With a zero: s = (r_max - r_min) / (q_max - q_min), Z = round(q_min - r_min / s) (asymmetric linear quantization).
    """
    if counts is not None:
        t = torch.where(counts > 0, t, 0.0)  # every range holds zero
    if scheme.zero == "none":
        return scale_of(t.abs().amax(axes, keepdim=True), scheme.fmt), None
    return affine(t.amin(axes, keepdim=True), t.amax(axes, keepdim=True), scheme)


def minmax(t: Tensor, scheme: Scheme, axes: tuple[int, ...], counts: Tensor | None = None) -> Range:
    """``absmax`` under the name by which observers of both ends are known. The range holds zero here, too: padding, and what a ReLU cuts, stay exact."""
    return absmax(t, scheme, axes, counts)


def moving_average(t: Tensor, scheme: Scheme, axes: tuple[int, ...], counts: Tensor | None = None) -> Range:
    """The whole range of ``t`` = (lo, hi), ends that the statistic "moving" has averaged over batches. On plain values, which are one batch, it is their range."""
    return absmax(t, scheme, axes, counts)


def scale_of(absolute_maximum: Tensor, fmt: Format) -> Tensor:
    """Symmetric scale that maps the absolute maximum to the greatest value of the format."""
    return (absolute_maximum / fmt.hi).clamp(min=TINY)


def affine(lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of the range [lo, hi], widened to hold zero."""
    fmt = scheme.fmt
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = ((hi - lo) / (fmt.hi - fmt.lo)).clamp(min=TINY)
    if scheme.zero == "min":
        return scale, fmt.lo * scale - lo  # q * s - m, so that q = lo of the format is the least value
    return scale, (fmt.lo - lo / scale).round().clamp(fmt.lo, fmt.hi)


def _ends(t: Tensor, axes: tuple[int, ...], counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and greatest value, or zero."""
    if counts is not None:
        t = torch.where(counts > 0, t, 0.0)
    return t.amin(axes, keepdim=True).clamp(max=0), t.amax(axes, keepdim=True).clamp(min=0)


def _fit(lo: Tensor, hi: Tensor, scheme: Scheme) -> Range:
    """Scale and zero of the range [lo, hi], which holds zero."""
    if scheme.zero == "none":
        return scale_of(torch.maximum(-lo, hi), scheme.fmt), None
    return affine(lo, hi, scheme)


def _flat(t: Tensor, axes: tuple[int, ...], counts: Tensor | None) -> tuple[Tensor, Tensor | None, list[int]]:
    """Values and counts as (groups, values of a group), and the shape that puts one number per group back."""
    reduced = {axis % t.dim() for axis in axes}
    order = [d for d in range(t.dim()) if d not in reduced] + sorted(reduced)
    back = [1 if d in reduced else size for d, size in enumerate(t.shape)]

    def flat(part: Tensor) -> Tensor:
        return part.expand_as(t).permute(order).reshape(math.prod(back), -1)

    return flat(t), None if counts is None else flat(counts), back


# percentile


def percentile(t: Tensor, scheme: Scheme, axes: tuple[int, ...], counts: Tensor | None = None, *, q: float = 99.99) -> Range:
    """The range that holds ``q`` percent of the values: of |x| without a zero, else half of what is cut is cut from either end.

    A percentile is the least value that no more than the rest exceed, never one between two (numpy's "inverted_cdf"), so that counts weigh. Groups of less than 100 / (100 - q) values keep their ends.
    """
    flat, weights, back = _flat(t, axes, counts)
    if scheme.zero == "none":
        return scale_of(_quantile(flat.abs(), weights, q).reshape(back), scheme.fmt), None
    cut = (100.0 - q) / 2
    return affine(-_quantile(-flat, weights, 100.0 - cut).reshape(back), _quantile(flat, weights, 100.0 - cut).reshape(back), scheme)


def _quantile(flat: Tensor, weights: Tensor | None, q: float) -> Tensor:
    """(G, V) -> (G,). The share asked for is a hair smaller, lest the rounding of q decides where it falls on a value exactly."""
    share = q / 100 * (1 - 1e-12)
    if weights is None:
        return flat.kthvalue(max(1, math.ceil(share * flat.shape[1])), 1).values
    values, order = flat.sort(1)
    below = weights.double().gather(1, order).cumsum(1)
    index = (below < share * below[:, -1:]).sum(1, keepdim=True).clamp(max=flat.shape[1] - 1)
    return torch.where(below[:, -1] > 0, values.gather(1, index)[:, 0], 0.0)


# mse and sqnr: search


def quantized(t: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """What ``t`` reads as after encode and decode under a scale and a zero, and where it lies outside of the range."""
    fmt = scheme.fmt
    y = t / scale if zero is None else (t + zero) / scale if scheme.zero == "min" else t / scale + zero
    out = decode(encode(y, fmt), fmt)
    value = out * scale if zero is None else out * scale - zero if scheme.zero == "min" else (out - zero) * scale
    return value, (y < fmt.lo) | (y > fmt.hi)


def _search(t: Tensor, scheme: Scheme, axes: tuple[int, ...], counts: Tensor | None, candidates: Iterator[Range], p: float, clipped: float) -> Range:
    """The candidate of the least ``sum(counts * |x - Q(x)|**p)``, for each group its own; of equals the first. What is clipped counts ``clipped`` times. One candidate at a time: memory is that of a few ``t``."""
    best: Tensor | None = None
    for scale, zero in candidates:
        if best is None:
            best_scale, best_zero, unit = scale, zero, scale  # errors in units of the first scale neither overflow nor vanish when raised to p
            best = torch.full_like(scale, float("inf"), dtype=torch.float64)
        value, outside = quantized(t, scale, zero, scheme)
        error = ((t - value) / unit).abs().pow(p)
        if clipped != 1:
            error = torch.where(outside, clipped * error, error)
        cost = (error if counts is None else error * counts).sum(axes, keepdim=True, dtype=torch.float64)
        better = cost < best
        best = torch.where(better, cost, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    assert best is not None
    return best_scale, best_zero


def mse(t: Tensor, scheme: Scheme, axes: tuple[int, ...], counts: Tensor | None = None, *, p: float = 2.0, least: float = 0.2, steps: int = 100) -> Range:
    """Of ``steps`` ranges, shrunk from the whole to ``least`` of it with both ends together, the one of the least ``sum |x - Q(x)|**p``.

    llm-compressor's observer searches so with p = 2.4 and 20 steps from 1 to 0.81; low bits want to shrink further (a normal distribution in 2 bits to about 0.4).
    """
    lo, hi = _ends(t, axes, counts)
    factors = (1 - i * (1 - least) / max(steps - 1, 1) for i in range(steps))
    return _search(t, scheme, axes, counts, (_fit(lo * f, hi * f, scheme) for f in factors), p, 1.0)


def sqnr(t: Tensor, scheme: Scheme, axes: tuple[int, ...], counts: Tensor | None = None, *, gamma: float = 3.0) -> Range:
    """Least squared error, where that of clipped values counts ``gamma`` times (AIMET's "tf_enhanced").

    Without a zero 100 scales, hundredths of the whole range's (AIMET counts the scale zero, too: 101). With one 17 scales, seventeenths, by 21 zeros: that of the whole range and 20 evenly over the codes.
    """
    return _search(t, scheme, axes, counts, _scales_and_zeros(*_ends(t, axes, counts), scheme), 2.0, gamma)


def _scales_and_zeros(lo: Tensor, hi: Tensor, scheme: Scheme) -> Iterator[Range]:
    fmt = scheme.fmt
    whole, zero = _fit(lo, hi, scheme)
    if zero is None:
        yield from (((whole * (i / 100)).clamp(min=TINY), None) for i in range(100, 0, -1))
        return
    own = zero / whole if scheme.zero == "min" else zero  # the code that zero gets
    spaced = [fmt.lo + (fmt.hi - fmt.lo) * i / 19 for i in range(20)]
    for i in range(17, 0, -1):
        scale = (whole * (i / 17)).clamp(min=TINY)
        for code in (own, *(torch.full_like(own, c) for c in spaced)):
            yield scale, code * scale if scheme.zero == "min" else code.round()


# kl


def kl(t: Tensor, scheme: Scheme, axes: tuple[int, ...], counts: Tensor | None = None, *, levels: int | None = None) -> Range:
    """The clipping of |x| that keeps most information (TensorRT's calibration: Migacz 2017): of the ranges that end with bin i = levels..BINS the one of the least KL divergence.

    Reference: bins [0, i), what lies farther added to the last. Against it: bins [0, i) without that, each of ``levels`` runs of bins spread evenly over its bins that are not empty.
    Bin 0 is taken to hold what bin 1 does, for exact zeros say nothing about a range. ``levels``: magnitudes of the format, 128 for int8. Ranges with a zero are clipped at both ends alike.
    """
    flat, weights, back = _flat(t, axes, counts)
    levels = levels or 2 ** (scheme.fmt.bits - (scheme.fmt.lo < 0 or scheme.zero != "none"))
    rows = [_kl_clip(v, w, levels) for v, w in zip(flat.split(1024), [None] * len(flat) if weights is None else weights.split(1024))]
    clip = torch.cat(rows).reshape(back)
    lo, hi = _ends(t, axes, counts)
    return _fit(torch.maximum(lo, -clip), torch.minimum(hi, clip), scheme)


def _kl_clip(flat: Tensor, weights: Tensor | None, levels: int) -> Tensor:
    """(G, V) -> (G,): where to clip. The last of the best ends, no farther than the greatest magnitude."""
    magnitude = (flat if weights is None else torch.where(weights > 0, flat, 0.0)).abs()
    greatest = magnitude.amax(1)
    limit = covering(greatest)[:, None]
    index = bin_of(magnitude, limit)
    held = torch.ones_like(flat, dtype=torch.float64) if weights is None else weights.double()
    bins = flat.new_zeros((len(flat), BINS), dtype=torch.float64).scatter_add_(1, index, held)
    bins[:, 0] = bins[:, 1]
    last = index.amax(1, keepdim=True) + 1  # ends beyond the last value would only be coarser
    best, clip = torch.full_like(held[:, 0], float("inf")), greatest
    sums = _Sums(bins)
    ends = torch.arange(min(levels, BINS), BINS + 1, device=flat.device)
    for i in ends.split(max(1, PIECE // 8 // (len(flat) * levels))):
        divergence = sums.divergence(i, levels)
        divergence = torch.where((i <= last) & torch.isfinite(divergence), divergence, float("inf"))
        least = divergence.amin(1)
        chosen = torch.where(divergence == least[:, None], i, 0).amax(1)
        better = torch.isfinite(least) & (least <= best)
        best = torch.where(better, least, best)
        clip = torch.where(better, torch.minimum(limit[:, 0] * (chosen / BINS), greatest), clip)
    return clip


class _Sums:
    """Running sums over bins (G, BINS), so that an end costs as many steps as there are levels, not bins."""

    def __init__(self, bins: Tensor) -> None:
        def running(x: Tensor) -> Tensor:
            return torch.cat([x.new_zeros(len(x), 1), x.cumsum(1)], 1)

        self.bins, self.count, self.filled, self.plogp = bins, running(bins), running((bins > 0).double()), running(torch.special.xlogy(bins, bins))

    def divergence(self, i: Tensor, levels: int) -> Tensor:
        """``sum p log(p / q)`` of the reference and of what is quantized, over bins [0, i) and normalized, for ends ``i`` (C,): (G, C); inf where p is not zero and q is, not finite where nothing is in range."""
        edge = (torch.arange(levels + 1, device=i.device) * i[:, None] + levels - 1) // levels  # (C, levels + 1); run k is the bins j with floor(j * levels / i) = k
        run = self.count[:, edge].diff(dim=2)
        spread = run / self.filled[:, edge].diff(dim=2).clamp(min=1)
        total, inside, last = self.count[:, -1:], self.count[:, i], self.bins[:, i - 1]
        outside = (total - inside).clamp(min=0)
        held = last + outside
        own = self.plogp[:, i - 1] + torch.special.xlogy(held, held)
        end = torch.where(last > 0, spread[:, :, -1], 0.0)
        cross = torch.special.xlogy(run, spread).sum(2) + torch.special.xlogy(outside, end)
        found: Tensor = (own - cross) / total - total.log() + inside.log()
        return found


RANGES: dict[str, RangeRule] = {"absmax": absmax, "minmax": minmax, "percentile": percentile, "moving_average": moving_average, "mse": mse, "kl": kl, "sqnr": sqnr}

NEEDS: dict[str, str] = {
    "absmax": "absmax", "minmax": "minmax", "percentile": "histogram", "moving_average": "moving", "mse": "histogram", "kl": "histogram", "sqnr": "histogram",
}  # fmt: skip
"""Rule -> the statistic that a static range by it is taken from; see ``needed``."""


def needed(rule: str, scheme: Scheme) -> str:
    """The statistic to collect for a static range. Both ends where the scheme has a zero. Raises OptionError on an unknown rule."""
    if rule not in NEEDS:
        raise unknown("range rule", rule, RANGES)
    return NEEDS["minmax" if rule == "absmax" and scheme.zero != "none" else rule]


def static_range(rule: str, stats: Stats, scheme: Scheme) -> Range:
    """Scale (1,) and zero (1,) or None of an input's fixed range, by what was observed. Raises OptionError where the statistic is absent or has seen nothing."""
    name = needed(rule, scheme)
    if rule in ("absmax", "minmax") and name not in stats and scheme.zero == "none":
        name = "minmax" if name == "absmax" else "absmax"  # either tells the greatest magnitude
    if name not in stats:
        there = ", ".join(stats) or "none"
        raise OptionError(f"range rule {rule!r} of scheme '{scheme}' needs the statistic {needed(rule, scheme)!r} of the input; there is: {there}. Collect it, or take another rule")
    state, counts = stats[name], None
    if name == "histogram":
        t, counts, empty = centres(state), state["counts"], not bool(state["counts"].any())
    elif name == "absmax":
        t, empty = state["absmax"], False
    else:
        t = torch.stack([state["lo"], state["hi"]]).flatten()
        empty = bool((state["lo"] > state["hi"]).any()) or ("batches" in state and not int(state["batches"]))
    if empty:
        raise OptionError(f"range rule {rule!r} of scheme '{scheme}': the statistic {name!r} has seen no values; run the model on data before fixing its ranges")
    return RANGES[rule](t, scheme, (-1,), counts)
