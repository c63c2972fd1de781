"""SmoothQuant: move the difficulty of quantizing activations into the weights, channel by channel.

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)          Y = (X / s) @ (W * s).T

Xiao et al. 2023 (arXiv 2211.10438), equation 4; the maximum of W runs over the rows of all weights that read X. alpha 0.5 shares evenly, 1 moves everything into the weights.
``alpha="auto"`` takes, of 0, 0.05 ... 1 and no smoothing, what leaves the least error of the outputs on sampled rows with both sides rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcompile.core.errors import OptionError
from qcompile.core.qtensor import grid
from qcompile.core.qtensor import rounded as on_grid
from qcompile.core.scheme import Scheme
from qcompile.core.stats import State, Stats

from .method import Linears, Transform

LEAST = 1e-5
"""Smallest factor, as in the paper's code."""
STEPS = 20
"""alpha = i / STEPS of the search."""


def smooth(linears: Linears, *, alpha: float | str = 0.5) -> Tensor:
    """s (K,) float32, positive. Reads "absmax", and for ``alpha="auto"`` "samples". Raises OptionError for an alpha outside 0..1 and for statistics that are absent or empty."""
    x = statistic(linears, "absmax", "smooth")["absmax"].float()
    w = column_maxima(linears.weights)
    if alpha == "auto":
        return best(linears, [torch.ones_like(w), *candidates(x, w)], "smooth")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise OptionError(f"smooth: alpha is a number from 0 to 1 or 'auto', not {alpha!r}")
    return factor(x, w, float(alpha))


def about(linears: Linears, s: Tensor, *, alpha: float | str = 0.5) -> str:
    """Which alpha a search settled on, by the vector ``s`` that it gave."""
    if alpha != "auto":
        return ""
    factors = candidates(statistic(linears, "absmax", "smooth")["absmax"].float(), column_maxima(linears.weights))
    found = next((i for i, one in enumerate(factors) if torch.equal(one, s)), None)
    return "no smoothing" if found is None else f"alpha {found / STEPS:g}"


def factor(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """Equation 4 for maxima ``x`` and ``w`` (K,) of the magnitudes; 1 where either is zero, for such a channel has nothing to share."""
    s = (x**alpha / w ** (1 - alpha)).clamp(min=LEAST)
    return torch.where((x > 0) & (w > 0) & s.isfinite(), s, 1.0)


def candidates(x: Tensor, w: Tensor) -> list[Tensor]:
    """The factors of alpha 0, 0.05 ... 1."""
    return [factor(x, w, i / STEPS) for i in range(STEPS + 1)]


def column_maxima(weights: Sequence[Tensor]) -> Tensor:
    """max|W_j| over the rows of all weights (N_i, K), (K,)."""
    return torch.stack([w.abs().amax(0) for w in weights]).amax(0).float()


def best(linears: Linears, factors: Sequence[Tensor], who: str) -> Tensor:
    """The one with the least ``joint_error``; of equals the first. Reads "samples"."""
    rows = statistic(linears, "samples", who)["rows"].float()
    if not len(rows):
        raise OptionError(f"{who}: the statistic 'samples' holds no rows; run the model on data before the search")
    truth = [rows @ w.float().T for w in linears.weights]
    errors = torch.stack([joint_error(linears, rows, truth, s) for s in factors])
    return factors[int(errors.argmin())]


def joint_error(linears: Linears, rows: Tensor, truth: Sequence[Tensor], s: Tensor) -> Tensor:
    """``sum ||x w^T - Q_in(x / s) Q_w(w s)^T||^2`` over sampled ``rows`` (R, K) and all weights, () float64; ``truth``: the products x w^T (R, N_i)."""
    x = rounded_input(rows / s, linears.input, linears.stats, s)
    return torch.stack([((y - x @ rounded(w * s, scheme).T).double() ** 2).sum() for w, scheme, y in zip(linears.weights, linears.schemes, truth)]).sum()


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """What rounding to nearest leaves of a weight (N, K), float32: ``dequantize(quantize(weight))`` without the packing."""
    return on_grid(weight, grid(weight, scheme))


def rounded_input(x: Tensor, scheme: Scheme | None, stats: Stats | None = None, s: Tensor | float = 1.0) -> Tensor:
    """What a kernel reads of the rows ``x`` (R, K), already divided by ``s``, under an input scheme: scales of float32. A static range spans all that was seen, not only these rows."""
    if scheme is None:
        return x
    ends = _ends(stats, scheme, s) if scheme.static and stats is not None else []
    seen = torch.cat([x, *(e[None].to(x) for e in ends)])
    dynamic = replace(scheme, static=False, layout="")
    return on_grid(seen, grid(seen, dynamic, scale_dtype=torch.float32))[: len(x)]


def _ends(stats: Stats, scheme: Scheme, s: Tensor | float) -> list[Tensor]:
    """Rows that hold the extremes of each channel, after the division by ``s``."""
    if "minmax" in stats:
        return [stats["minmax"][key] / s for key in ("lo", "hi")]
    return [stats["absmax"]["absmax"] / s] if "absmax" in stats and scheme.zero == "none" else []  # magnitudes say nothing of a range with a zero


def statistic(linears: Linears, name: str, who: str) -> State:
    """A statistic of the shared input, on the weights' device; OptionError where it was not collected or is of another width."""
    if name not in linears.stats:
        raise OptionError(f"{who} needs the statistic {name!r} of the input; there is: {', '.join(linears.stats) or 'none'}. Calibrate on data first")
    state = {key: t.to(linears.weights[0].device) for key, t in linears.stats[name].items()}
    widths = {int(t.shape[-1]) for t in state.values() if t.dim()}
    if widths != {linears.k} or any(int(w.shape[-1]) != linears.k for w in linears.weights):
        raise OptionError(f"{who}: the statistic {name!r} has {sorted(widths)} channels, the weights {[tuple(w.shape) for w in linears.weights]}; all that share an input have one K")
    return state


TRANSFORM = Transform("smooth", smooth, needs=("absmax", "samples"), about=about)
