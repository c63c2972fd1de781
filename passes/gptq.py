"""GPTQ / OPTQ (Frantar et al. 2022): round one input channel after the other, and let the channels that are still open make up for the error.

With ``H = E[x x^T]`` and the columns in order, the error of a row, ``d H d^T``, is least if, once column j is rounded, the open columns change by
``-(w_j - q_j) * U_jj' / U_jj``, where U is the upper Cholesky factor of the inverse of H: ``H^-1 = U^T U`` (section 3.3, equations 2 to 5).

Here the rows ``T_j = U_j / U_jj`` are found directly. Reversing both axes turns a lower Cholesky factor of H into an upper one, ``H = R R^T``, whose inverse is U;
so ``T = diag(R) R^-1`` is the inverse of a unit triangle: one factorization and one triangular solve, where the usual route factors twice and squares the condition number.

The work is stored transposed, (K, N), so that a column is contiguous. In a block of columns each takes a handful of elementwise kernels and one rank-1 update of the block;
the rest of the matrix is updated by one product for each block. Nothing in the loop waits for the device, and no step depends on timing: results are bit-identical from run to run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from qcompile.core.errors import OptionError, WeightError
from qcompile.core.formats import Format, encode, numbers
from qcompile.core.qtensor import Grid, QTensor, find_range, from_codes, grid, grid_of
from qcompile.core.scheme import Scheme
from qcompile.core.stats import Stats

from .method import Solver
from .sequential_mse import clip_search, hessian

log = logging.getLogger("qcompile.passes")


def solve(
    weight: Tensor, scheme: Scheme, stats: Stats, *, block: int = 128, damping: float | None = None, damp: str = "channel", act_order: bool = True, static_groups: bool = False,
    clip: bool = False, rule: str = "absmax", name: str = "",
) -> QTensor:  # fmt: skip
    """``weight`` (N, K) float32, unchanged. Every scheme; groups may be ragged.

    ``damping``: share of H's diagonal that is added to it, times ten (up to 1) as often as the factorization asks for it; logged. Where none is given it is ``shrinkage``: 1 % on much data,
    more where few tokens leave the correlations uncertain. ``damp="channel"`` adds to each channel of its own
    diagonal: the solution then does not depend on how channels are scaled (smoothed, say). ``damp="mean"`` adds of the mean diagonal, as the paper does: outlier channels, which make the
    mean, then drown the correlations of all others (error 0.81 of round to nearest's where 0.58 is possible, on a language model with six channels 300 times larger).
    ``act_order``: columns with the greatest H_jj first. Scales are then found before (static groups), so that storage keeps the order of the channels.
    Otherwise a group's scale is found from the updated weights when its first column comes up, unless ``static_groups``, ``clip``, quantized scales or a codebook need all scales at once.
    ``clip``: start from AWQ's clipped ranges. ``block`` trades nothing but time. A channel that is always zero (H_jj = 0) is rounded to nearest.
    Raises WeightError, naming ``name``, where the weight or H is not finite or H is no second moment; OptionError for options out of range.
    """
    damping = shrinkage(stats, weight.shape[-1]) if damping is None else damping
    if block < 1 or damping < 0 or damp not in ("channel", "mean"):
        raise OptionError(f"gptq needs block >= 1, damping >= 0 and damp 'channel' or 'mean', not {block}, {damping} and {damp!r}")
    h = hessian(stats, weight, name)
    fixed: Grid | None = grid(weight, scheme, rule=rule, name=name)  # raises for what cannot be quantized
    if clip:
        fixed = clip_search(weight, scheme, h, rule=rule, name=name)
    elif not (act_order or static_groups or scheme.scale is not None or scheme.fmt.learned):
        fixed = None
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(h), device=h.device)
    if act_order:
        h = h.index_select(0, order)
        h = h.index_select(1, order)  # two steps, so that no more than two of these matrices live at once: with K = 14,336 each takes 0.8 GiB
    moves, used = propagation(h, damping, name, damp, own=True)
    del h
    if used != damping:
        log.warning("gptq: %s: H is too near to singular; damping raised from %g to %g of its diagonal", name or "(unnamed)", damping, used)
    work = weight.detach().float().t().index_select(0, order)
    scales: _Fixed | _Found = _Found(scheme, rule, weight.shape) if fixed is None else _Fixed(fixed, order)
    codes = _columns(work, moves, scheme.fmt if fixed is None else fixed.fmt, scales, spans(len(order), block, scales.whole))
    codes = codes.index_select(0, torch.argsort(order)).t().contiguous()
    return from_codes(codes.view(scheme.fmt.dtype), scales.grid())


def shrinkage(stats: Stats, k: int) -> float:
    """Share of the diagonal that is added to H: 1 %, and K / (4 tokens) where that is more, at most 1.

    Correlations of K channels on T tokens are off by about sqrt(1 / T) each, and the solution trusts all of them: with few tokens it fits noise. On a sentence encoder with 1,077 tokens for
    384 to 1,536 channels this leaves 0.83 of the error that 1 % leaves.
    """
    return min(max(0.01, k / (4 * max(float(stats["hessian"]["count"]), 1.0))), 1.0)


def stackable(schemes: Sequence[Scheme]) -> bool:
    """Linears that read the same input may be solved in one call, rows stacked: the schemes are equal, and rows share neither a scale (nor quantized scales one) nor a codebook."""
    levels = list(schemes[:1])
    while levels and levels[-1].scale is not None:
        levels.append(levels[-1].scale)
    return len(set(schemes)) == 1 and not schemes[0].fmt.learned and all(level.group[0] == 1 for level in levels)


def propagation(h: Tensor, damping: float, name: str = "", damp: str = "channel", own: bool = False) -> tuple[Tensor, float]:
    """``T`` (K, K) float32, upper triangular with ones on its diagonal: an error e in column j moves column l > j by ``-e T_jl``. And the damping that was used.

    Tried with ten times the damping (from 1e-4 where it was zero) up to 1, each in float32 first and in float64 then. Raises WeightError where no damping makes H positive definite.
    """
    diagonal = h.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    if not bool(mean > 0):
        log.warning("gptq: %s: the calibration saw only zeros, so that no rounding is better than the nearest", name or "(unnamed)")
        return torch.eye(len(h), device=h.device), damping
    if damp == "channel":  # the same on channels of unit size: H = S C S gives T = S T_C S^-1
        size = torch.where(dead, 1.0, diagonal).sqrt()
        moves, share = propagation((h if own else h.clone()).div_(size).div_(size[:, None]), damping, name, "mean")
        return moves.mul_(size[:, None]).div_(size), share
    share = damping
    while share <= 1 or share == damping:
        filled = torch.where(dead, mean, diagonal) + share * mean  # a dead channel is coupled to nothing: any positive value will do
        for dtype in (torch.float32, torch.float64):
            found = _unit_inverse(h.to(dtype), filled.to(dtype))
            if found is not None:
                return found.float(), share
        share = share * 10 if share else 1e-4
    raise WeightError(f"the second moment (hessian) of the input of {name or '(unnamed)'} is not positive definite even with {share / 10:g} of its mean diagonal added; take the statistics again")


def _unit_inverse(h: Tensor, diagonal: Tensor) -> Tensor | None:
    """``diag(R) R^-1`` for ``R R^T`` = h with another diagonal, R upper triangular; None where a pivot is within rounding of zero."""
    reversed_ = h.flip(0, 1)
    reversed_.diagonal().copy_(diagonal.flip(0))
    lower, info = torch.linalg.cholesky_ex(reversed_)
    del reversed_
    pivots = lower.diagonal().square()
    floor = 4 * torch.finfo(h.dtype).eps * len(h) ** 0.5 * diagonal.amax()
    if not bool((info == 0) & (pivots.amin() > floor)):
        return None
    upper = lower.flip(0, 1)
    del lower
    upper.div_(upper.diagonal().clone())
    out = torch.linalg.solve_triangular(upper, torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True, unitriangular=True)
    return out if bool(torch.isfinite(out).all()) else None


def spans(k: int, block: int, whole: int) -> Iterator[tuple[int, int]]:
    """Blocks (start, stop) of at most ``block`` columns. A group of ``whole`` columns lies within one, or begins with one: its columns are up to date when its scale is found.

    >>> list(spans(100, 40, 16))
    [(0, 32), (32, 64), (64, 96), (96, 100)]
    >>> list(spans(100, 40, 64))
    [(0, 40), (40, 64), (64, 100)]
    """
    stride = whole if whole > block else block // whole * whole
    for outer in range(0, k, stride):
        for start in range(outer, min(outer + stride, k), block):
            yield start, min(start + block, outer + stride, k)


def _columns(work: Tensor, moves: Tensor, fmt: Format, scales: _Fixed | _Found, blocks: Iterator[tuple[int, int]]) -> Tensor:
    """Codes (K, N), as bytes, of the weights ``work`` (K, N) in solving order, which are consumed. ``moves`` (K, K) as ``propagation`` gives them."""
    k, n = work.shape
    codes = torch.empty((k, n), dtype=torch.uint8, device=work.device)
    nearest = rounding(fmt, work.device)
    for start, stop in blocks:
        rows, y, errors = work[start:stop], torch.empty_like(work[start:stop]), torch.empty_like(work[start:stop])
        local = moves[start:stop, start:stop]
        for j, (w, value, error) in enumerate(zip(rows.unbind(), y.unbind(), errors.unbind())):
            s, z, is_min = scales.column(start, stop, j, work)
            # the same operations in the same order as core.qtensor.scaled, so that a column without neighbours rounds as RTN does, bit for bit
            if z is not None and is_min:
                w = w.add_(z)
            torch.div(w, s, out=value)
            if z is not None and not is_min:
                value.add_(z)
            nearest(value)
            torch.addcmul(w, value if z is None or is_min else value - z, s, value=-1, out=error)
            if j + 1 < stop - start:
                rows[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1)
        codes[start:stop] = encode(y, fmt).view(torch.uint8)
        if stop < k:
            work[stop:].addmm_(moves[start:stop, stop:].t(), errors, alpha=-1)
    return codes


Column = tuple[Tensor, Tensor | None, bool]
"""Scale and zero of one column, (N,) float32 each, and whether the zero is a minimum."""


class _Fixed:
    """Scales known before: ``order`` says which channel is solved when."""

    whole = 1

    def __init__(self, g: Grid, order: Tensor) -> None:
        self._grid = g
        n, k = g.shape
        self._r, c = g.scheme.extent(n, k)
        self._group = order // c
        self._scale, self._zero = (None if part is None else part.t().contiguous() for part in g.parts())
        self._rows = torch.arange(n, device=order.device) // self._r
        self._at, self._block = -1, (list[Tensor](), list[Tensor]())

    def column(self, start: int, stop: int, j: int, work: Tensor) -> Column:
        if self._at != start:
            self._at, self._block = start, (self._gather(self._scale, start, stop), self._gather(self._zero, start, stop))
        return self._block[0][j], self._block[1][j] if self._block[1] else None, self._grid.scheme.zero == "min"

    def _gather(self, part: Tensor | None, start: int, stop: int) -> list[Tensor]:
        if part is None:
            return []
        rows = part.index_select(0, self._group[start:stop])
        return list((rows if self._r == 1 else rows.index_select(1, self._rows)).unbind())

    def grid(self) -> Grid:
        return self._grid


@dataclass
class _Found:
    """Scales found when a group's first column comes up, from the weights as they are then. Columns are solved in order."""

    scheme: Scheme
    rule: str
    shape: Sequence[int]
    found: list[Grid] = field(default_factory=list)
    now: tuple[Tensor, Tensor | None] | None = None

    @property
    def whole(self) -> int:
        return self.scheme.extent(self.shape[0], self.shape[1])[1]

    def column(self, start: int, stop: int, j: int, work: Tensor) -> Column:
        at = start + j
        if at % self.whole == 0:
            group = work[at : at + self.whole].t()
            g = grid_of(*find_range(group, self.scheme, self.rule), self.scheme, group.shape)
            self.found.append(g)
            rows = torch.arange(group.shape[0], device=work.device) // self.scheme.extent(group.shape[0], group.shape[1])[0]
            s, z = (None if part is None else part[:, 0].index_select(0, rows) for part in g.parts())
            assert s is not None
            self.now = s, z
        assert self.now is not None
        return *self.now, self.scheme.zero == "min"

    def grid(self) -> Grid:
        def joined(parts: list[Tensor | QTensor | None]) -> Tensor | None:
            plain = [part for part in parts if isinstance(part, Tensor)]
            return torch.cat(plain, 1) if plain else None

        scale = joined([g.scale for g in self.found])
        assert scale is not None
        return Grid(scale, joined([g.zero for g in self.found]), self.scheme, tuple(self.shape))


def rounding(fmt: Format, device: torch.device) -> Callable[[Tensor], object]:
    """``f(y)``: rounds y, float32 and contiguous, in place to the nearest value of the format: ``decode(encode(y))``, with its tables already on the device, for a loop that must not wait.

    For a minifloat the middles between neighbours are moved by one unit in the last place where the even code is the upper one, so that "at most the middle" decides ties as well.
    """
    if fmt.kind == "int":
        return lambda y: y.round_().clamp_(fmt.lo, fmt.hi)
    if fmt.native is not None:
        native = fmt.native
        return lambda y: y.copy_(y.clamp_(fmt.lo, fmt.hi).to(native))
    values = numbers(fmt)
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(values)], dtype=torch.float32)
    if fmt.kind == "float":
        down = torch.nextafter(middles, torch.zeros(()))
        middles = torch.where(torch.arange(len(middles)) % 2 == 1, down, middles)  # between codes i and i + 1: odd i loses the tie
    middles, table = middles.to(device), torch.tensor(values, dtype=torch.float32, device=device)

    def by_table(y: Tensor) -> None:
        if fmt.kind == "table":
            y.copy_(table[torch.bucketize(y, middles, out_int32=True)])
        else:
            y.copy_(table[torch.bucketize(y.abs(), middles, out_int32=True)].copysign_(y))

    return by_table


SOLVER = Solver("gptq", solve, needs=("hessian",))
