"""Rounding with a gradient: how quantization-aware training sees a quantized tensor, and what gradient each estimator gives to the values and to what it learns.

``fake_quantize(x, learned, scheme, estimator)`` is ``dequantize(quantize(x, scheme))`` under the estimator's scale, bit for bit what inference multiplies; ``gradients`` is its backward.
With z = x / s (+ zero), Q(z) the nearest value of the format, [lo, hi] its range, and g the gradient of the output:

===== ============================================= ======================================= ==========================================
name  scale of a group                              gradient of x                           gradient of what is learned
===== ============================================= ======================================= ==========================================
ste   its range now, or a given one                 g where z rounds without being clipped  nothing is learned
lsq   s, learned: one number for each group         g where lo < z < hi                     sum of g (Q(z) - z) inside, g lo or g hi
                                                                                            outside; times 1 / sqrt(count hi)
pact  alpha / hi, alpha learned: where x is clipped  g where lo < z < hi                     sum of g above alpha, less that below
                                                                                            -alpha where the format has a sign
===== ============================================= ======================================= ==========================================

STE: Bengio et al. 2013, with the clipping of Hubara et al. 2016. LSQ: Esser et al. 2020 (arXiv 1902.08153), equations 1 to 5. PACT: Choi et al. 2018 (arXiv 1805.06085), equations 1 to 3, for
signed formats mirrored at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .errors import OptionError, Skip, unknown
from .formats import Format, decode, encode, numbers
from .qtensor import Grid, find_range, grid_of, rounded, scaled, tile
from .ranges import TINY, affine, scale_of
from .scheme import Scheme


@dataclass(frozen=True)
class Estimator:
    """One row. ``learns``: what it learns for each group, "" for nothing; ``scale(learned, scheme)`` the scale that this means; ``initial(x, scheme)`` where it starts, (..., N/r, K/c) float32;
    ``local(z, q, fmt, count)`` the factors by which g reaches x and, before the sum over a group of ``count`` values, what is learned."""

    name: str
    learns: str
    doc: str
    scale: Callable[[Tensor, Scheme], Tensor]
    local: Callable[[Tensor, Tensor, Format, float], tuple[Tensor, Tensor | None]]
    initial: Callable[[Tensor, Scheme], Tensor] | None = None

    def refuses(self, scheme: Scheme, activation: bool) -> Skip | None:
        """Why the estimator does not fit a scheme of a weight or of activations, or None."""
        if scheme.fmt.learned:
            return Skip(f"the values of {scheme.fmt} are fitted to a weight that stays as it is; take a format of fixed values, such as nf4 or int4")
        if not self.learns:
            return None
        if activation and not scheme.static:
            return Skip(f"{self.name} learns one {self.learns} for all calls, and '{scheme}' takes its range from every call: take ste, or a static scheme such as 'int8.tensor.static'")
        if scheme.zero != "none":
            return Skip(f"{self.name} learns a symmetric range, and '{scheme}' has a zero: take ste, or a scheme without '{scheme.zero}'")
        return None


@lru_cache(256)
def ends(fmt: Format) -> tuple[float, float]:
    """Values beyond these are clipped, not rounded: half a step outside the least and the greatest."""
    v = numbers(fmt)
    up = fmt.hi + (v[-1] - v[-2]) / 2
    return (-up if fmt.kind == "float" else fmt.lo - (v[1] - v[0]) / 2), up


def _ste(z: Tensor, q: Tensor, fmt: Format, count: float) -> tuple[Tensor, Tensor | None]:
    low, high = ends(fmt)
    return ((z >= low) & (z <= high)).float(), None


def _lsq(z: Tensor, q: Tensor, fmt: Format, count: float) -> tuple[Tensor, Tensor | None]:
    inside = (z > fmt.lo) & (z < fmt.hi)
    return inside.float(), torch.where(inside, q - z, q) / math.sqrt(count * fmt.hi)


def _pact(z: Tensor, q: Tensor, fmt: Format, count: float) -> tuple[Tensor, Tensor | None]:
    low = fmt.lo if fmt.lo == 0 else -fmt.hi  # int8 could hold -128: the range is mirrored at zero
    below = (z <= low).float() if fmt.lo < 0 else torch.zeros_like(z)
    return ((z > low) & (z < fmt.hi)).float(), (z >= fmt.hi).float() - below


def _whole(x: Tensor, scheme: Scheme) -> Tensor:
    return find_range(x, scheme)[0]


def _lsq_initial(x: Tensor, scheme: Scheme) -> Tensor:
    """2 mean|x| / sqrt(Qp), the paper's, where it does not exceed the whole range; formats that are no integers start from the whole range, which the formula is not made for."""
    whole = _whole(x, scheme)
    if scheme.fmt.kind != "int":
        return whole
    extent = scheme.extent(*x.shape[-2:])
    size = tile(torch.ones_like(x, dtype=torch.float32), extent).sum((-3, -1))  # a ragged last group is smaller
    mean = tile(x.detach().float().abs(), extent).sum((-3, -1)) / size
    return torch.minimum(2 * mean / math.sqrt(scheme.fmt.hi), whole).clamp(min=TINY)


def _itself(learned: Tensor, scheme: Scheme) -> Tensor:
    return learned


def _by_hi(learned: Tensor, scheme: Scheme) -> Tensor:
    return learned / scheme.fmt.hi


_ROWS = (
    Estimator("ste", "", "straight-through, with the gradient cut where values are clipped", _itself, _ste),
    Estimator("lsq", "step", "learned step size", _itself, _lsq, _lsq_initial),
    Estimator("pact", "clip", "parameterized clipping: a learned end of the range", _by_hi, _pact, lambda x, s: _whole(x, s) * s.fmt.hi),
)
ESTIMATORS: dict[str, Estimator] = {row.name: row for row in _ROWS}


def find_estimator(name: str) -> Estimator:
    """The row called ``name``; raises OptionError with the list of rows."""
    if name not in ESTIMATORS:
        raise unknown("estimator", name, ESTIMATORS)
    return ESTIMATORS[name]


def grid_under(x: Tensor, learned: Sequence[Tensor], scheme: Scheme, estimator: str, activation: bool = False) -> Grid:
    """The grid of ``x`` (..., N, K): from what was learned; of a given range, ``[lo, hi]`` (2,), for an estimator that learns nothing; else the range of x now, which is what ``quantize`` takes."""
    row = find_estimator(estimator)
    zero = None
    if not learned:
        scale, zero = find_range(x, scheme)
    elif row.learns:
        scale = row.scale(learned[0].float(), scheme)
    else:
        lo, hi = learned[0].float().unbind()
        scale, zero = affine(lo, hi, scheme) if scheme.zero != "none" else (scale_of(torch.maximum(-lo, hi), scheme.fmt), None)
    shape = scheme.grid_shape(tuple(x.shape))
    return grid_of(scale.reshape(shape), None if zero is None else zero.reshape(shape), scheme, x.shape, scale_dtype=torch.float32 if activation else None)


def fake_quantize(x: Tensor, learned: Sequence[Tensor], scheme: Scheme, estimator: str, activation: bool = False) -> Tensor:
    """``x`` as inference sees it: rounded, in its own shape and dtype. A weight is (..., N, K); activations are (..., K), whose leading axes are one. Raises OptionError for an estimator that does not fit the scheme."""
    if (reason := find_estimator(estimator).refuses(scheme, activation)) is not None:
        raise OptionError(f"estimator {estimator!r}: {reason}")
    if x.numel() == 0:
        return x.clone()
    flat = x.reshape(-1, x.shape[-1]) if activation else x
    return rounded(flat, grid_under(flat, learned, scheme, estimator, activation)).to(x.dtype).reshape(x.shape)


def gradients(grad: Tensor, x: Tensor, learned: Sequence[Tensor], scheme: Scheme, estimator: str, activation: bool = False) -> tuple[Tensor, list[Tensor | None]]:
    """Backward of ``fake_quantize``: the gradient of x in its dtype, and of each of ``learned`` (None where it is not trained)."""
    if x.numel() == 0:
        return grad, [None] * len(learned)
    flat = x.reshape(-1, x.shape[-1]) if activation else x
    g = grid_under(flat, learned, scheme, estimator, activation)
    z = scaled(flat, g)
    extent = scheme.extent(*flat.shape[-2:])
    row = find_estimator(estimator)
    count = float(extent[1] if activation else extent[0] * extent[1])  # of activations the features, not the rows: the same for a batch and its parts
    to_x, to_learned = row.local(z, decode(encode(z, scheme.fmt), scheme.fmt), scheme.fmt, count)
    out = grad.reshape(flat.shape).float()
    dx = (out * to_x).to(x.dtype).reshape(x.shape)
    if to_learned is None or not learned:
        return dx, [None] * len(learned)
    return dx, [_by_group(out * to_learned, extent).reshape(learned[0].shape).to(learned[0].dtype)]


def _by_group(t: Tensor, extent: tuple[int, int]) -> Tensor:
    """Sum of each group, (..., N, K) -> (..., N/r, K/c). A ragged last group is summed by products with indicators: padding it beside scales taken by index is miscompiled by Inductor's C++."""
    n, k = t.shape[-2:]
    r, c = extent
    if n % r == 0 and k % c == 0:
        return tile(t, extent).sum((-3, -1))
    rows, columns = (torch.arange(size, device=t.device) // step for size, step in ((n, r), (k, c)))
    by_row, by_column = (index[:, None] == torch.arange(-(-index.numel() // step), device=t.device) for index, step in ((rows, r), (columns, c)))
    return by_row.to(t.dtype).T @ t @ by_column.to(t.dtype)
