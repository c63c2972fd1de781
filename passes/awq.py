"""AWQ: scale up the channels of the weights that meet large activations, so that rounding spares them; activations stay in 16 bits.

    s = mean|x| ** r,  r = 0, 0.05 ... 0.95,  divided by sqrt(max s * min s)

Lin et al. 2023 (arXiv 2306.00978), equations 4 and 5: the r is taken that leaves the least error of the outputs. That error is exact for all calibration data here, since
``E ||x D^T||^2 = tr(D H D^T)`` for ``D = W - Q(W s) / s`` and the second moment H. No scaling is among the candidates, so that the result is never worse than it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.core.errors import OptionError

from .method import Linears, Transform, output_error, second_moment
from .smooth import rounded, statistic

LEAST = 1e-4
"""Smallest factor before normalization, as in the paper's code."""
STEPS = 20
"""r = i / STEPS of the search."""


def awq(linears: Linears, *, duo: bool = False) -> Tensor:
    """s (K,) float32, positive. ``duo`` divides by ``mean|w| ** (1 - r)``, each |w| relative to its group's largest. Reads "moments" and "hessian"; raises OptionError where they are absent or empty."""
    x = mean_magnitude(linears, "awq")
    h = second_moment({"hessian": statistic(linears, "hessian", "awq")}).float()
    factors = [torch.ones_like(x), *candidates(linears, x, duo)]
    losses = [loss(linears, h, s) for s in factors]
    return factors[min(range(len(factors)), key=losses.__getitem__)]


def loss(linears: Linears, h: Tensor, s: Tensor) -> float:
    """Mean over tokens of the squared error of all outputs with weights rounded under ``s``; activations are not rounded."""
    return sum(output_error(w.float() - rounded(w * s, scheme) / s, h) for w, scheme in zip(linears.weights, linears.schemes))


def mean_magnitude(linears: Linears, who: str) -> Tensor:
    """mean|x| of each channel, (K,) float32."""
    state = statistic(linears, "moments", who)
    if not int(state["count"]):
        raise OptionError(f"{who}: the statistic 'moments' has seen no tokens; run the model on data before the search")
    return (state["abs"] / state["count"]).float()


def candidates(linears: Linears, x: Tensor, duo: bool = False) -> list[Tensor]:
    """The factors of r = 0, 0.05 ... 0.95 for mean magnitudes ``x`` (K,). A channel that is always zero gets 1 and has no part in the normalization."""
    live = x > 0
    if not bool(live.any()):
        return []
    w = mean_weight(linears) if duo else None
    out = []
    for i in range(STEPS):
        r = i / STEPS
        s = x**r if w is None else x**r / (w ** (1 - r) + LEAST)
        s = s.clamp(min=LEAST)
        kept = s[live]
        out.append(torch.where(live, s / (kept.max() * kept.min()).sqrt(), 1.0))
    return out


def mean_weight(linears: Linears) -> Tensor:
    """Mean over the rows of all weights of |w| relative to the largest of its group of columns, (K,) float32."""
    parts = []
    for w, scheme in zip(linears.weights, linears.schemes):
        n, k = w.shape
        columns = scheme.extent(n, k)[1]
        t = F.pad(w.abs().float(), (0, -k % columns)).unflatten(-1, (-1, columns))
        parts.append((t / t.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).flatten(-2)[:, :k])
    return torch.cat(parts).mean(0)


TRANSFORM = Transform("awq", awq, needs=("moments", "hessian"))
