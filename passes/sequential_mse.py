"""Choose scales by what they do to the output: shrink each group's range a little, at the price of clipping its largest weights, where that lowers the error of the product.

 * ``solve`` (SeqMSE of AIMET): one group after the other, each candidate weighed by ``tr(D H D^T)`` with the errors of all other groups of the row as they stand.
 * ``clip_search`` (AWQ, Lin et al. 2023, section "weight clipping"): the same search, every group alone, by the diagonal block of H that belongs to it.

``D = W - W_q`` is (N, K). If d are the columns of D in group g and o the others, the part of a row's error that the choice for g can change is ``d H_gg d^T + 2 d H_go o^T``.
The unshrunk range is always a candidate, so that no step raises the error. AIMET compares outputs on samples; with H the same error over all tokens of the calibration is exact.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.core.errors import OptionError, WeightError
from qcompile.core.formats import encode
from qcompile.core.qtensor import Grid, QTensor, dequantize, find_range, from_codes, grid, grid_of, rounded, scaled
from qcompile.core.scheme import Scheme
from qcompile.core.stats import Stats

from . import rtn
from .method import Solver, second_moment


def solve(
    weight: Tensor, scheme: Scheme, stats: Stats, *, candidates: int = 20, least: float | None = None, clip: bool = False, rule: str = "absmax", name: str = ""
) -> QTensor:
    """``weight`` (N, K) float32. ``candidates`` shrink factors from 1 down to ``least`` (AIMET's ``i / candidates`` by default); ``clip`` searches as AWQ does, each group alone, down to 0.5.

    The output error is never above that of rounding to nearest: scales that are quantized themselves move when they are stored, so the two results are compared at the end.
    """
    h, weight = hessian(stats, weight, name), weight.detach().float()
    plain = rtn.solve(weight, scheme, rule=rule, name=name)
    factors = shrinks(candidates, least if least is not None else 0.5 if clip else 1 / max(candidates, 1))
    g = grid_of(*search(weight, scheme, h, factors, rule=rule, alone=clip), scheme, weight.shape, name)
    found = from_codes(encode(scaled(weight, g), scheme.fmt), g)
    better = bool(row_error(weight - dequantize(found), h).sum() <= row_error(weight - dequantize(plain), h).sum())
    return found if better else plain


def clip_search(weight: Tensor, scheme: Scheme, h: Tensor, *, candidates: int = 20, least: float = 0.5, rule: str = "absmax", name: str = "") -> Grid:
    """AWQ's clipped grid of ``weight`` (N, K); ``h`` (K, K) is the second moment of its input. For a solver to start from (gptq's option ``clip``)."""
    grid(weight, scheme, rule=rule, name=name)  # raises for what cannot be quantized
    weight = weight.detach().float()
    return grid_of(*search(weight, scheme, h, shrinks(candidates, least), rule=rule, alone=True), scheme, weight.shape, name)


def shrinks(candidates: int, least: float) -> list[float]:
    """``candidates`` factors, evenly spaced from 1 down to ``least``."""
    if candidates < 1 or not 0 < least <= 1:
        raise OptionError(f"a search over shrink factors needs candidates >= 1 and 0 < least <= 1, not {candidates} and {least}")
    return [1 - (1 - least) * i / max(candidates - 1, 1) for i in range(candidates)]


def search(weight: Tensor, scheme: Scheme, h: Tensor, factors: list[float], *, rule: str = "absmax", alone: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of the best shrunk range of each group, float32 (N/r, K/c). Both ends of a range shrink by one factor: a minimum with the scale, an integer zero point stays.

    Scales are weighed as they are stored, those of a nested scheme before they are quantized.
    """
    flat = replace(scheme, scale=None)
    n, k = weight.shape
    c = scheme.extent(n, k)[1]
    scale, zero = find_range(weight, scheme, rule)
    scale, zero = scale.clone(), None if zero is None else zero.clone()
    delta = weight - rounded(weight, grid_of(scale, zero, flat, weight.shape))
    for i, start in enumerate(range(0, k, c)):
        w, d, own = weight[:, start : start + c], delta[:, start : start + c], h[start : start + c, start : start + c]
        others = torch.zeros_like(d) if alone else delta @ h[:, start : start + c] - d @ own
        z = None if zero is None else zero[:, i : i + 1]
        s, z, d = _best(w, scale[:, i : i + 1], z, flat, own, others, factors)
        scale[:, i : i + 1], delta[:, start : start + c] = s, d
        if zero is not None and z is not None:
            zero[:, i : i + 1] = z
    return scale, zero


def _best(w: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, own: Tensor, others: Tensor, factors: list[float]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of one column of groups ``w`` (N, c): the scale and zero (N/r, 1) of the best factor, and the error (N, c) that they leave. ``others`` (N, c) is what the rest of each row adds to the gradient."""
    least: Tensor | None = None
    r = scheme.extent(w.shape[0], w.shape[1])[0]
    out_scale, out_zero, out_delta = scale, zero, w
    for factor in factors:
        s, z = scale * factor, zero * factor if zero is not None and scheme.zero == "min" else zero
        d = w - rounded(w, grid_of(s, z, scheme, w.shape))
        error = torch.sum((d @ own + 2 * others) * d, -1)  # (N,)
        error = F.pad(error, (0, -len(error) % r)).view(-1, r).sum(-1, keepdim=True)  # rows that share a scale choose together
        if least is None:
            least, out_scale, out_zero, out_delta = error, s, z, d
            continue
        wins = error < least
        least, out_scale = torch.where(wins, error, least), torch.where(wins, s, out_scale)
        out_zero = torch.where(wins, z, out_zero) if z is not None and out_zero is not None else None
        out_delta = torch.where(wins.repeat_interleave(r, 0)[: len(d)], d, out_delta)
    return out_scale, out_zero, out_delta


def row_error(delta: Tensor, h: Tensor) -> Tensor:
    """``d H d^T`` of each row, (N,): its share of the output error."""
    return torch.sum((delta @ h) * delta, -1)


def hessian(stats: Stats, weight: Tensor, name: str = "") -> Tensor:
    """The second moment of the input, (K, K) float32 on the weight's device. Raises WeightError, naming ``name``, where it does not fit the weight or is none."""
    h = second_moment(stats).to(weight.device, torch.float32)
    what = f"the second moment (hessian) of the input of {name or '(unnamed)'}"
    if weight.dim() != 2 or h.shape != (weight.shape[-1], weight.shape[-1]):
        raise WeightError(f"{what} has shape {tuple(h.shape)}, which does not fit a weight of shape {tuple(weight.shape)}: (K, K) and (N, K) are wanted")
    diagonal = h.diagonal()
    finite, negative = torch.stack([torch.isfinite(h).all(), (diagonal < 0).any()]).tolist()
    if not finite:
        raise WeightError(f"{what} has {int((~torch.isfinite(h)).sum())} entries that are NaN or infinite: look for infinite activations in the calibration data")
    if negative:
        raise WeightError(f"{what} has negative values on its diagonal, which no sum of squares has; take the statistics again")
    return h


SOLVER = Solver("sequential_mse", solve, needs=("hessian",))
