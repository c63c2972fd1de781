"""Fit a codebook to each weight (Lloyd 1957, Max 1960; for language models by k-means as SqueezeLLM, Kim et al. 2023 (arXiv 2306.07629)): the 2**bits values of the least squared error.

A scheme of a learned format, ``lut4.g64`` say, stores them beside the codes: ``w_nk ~ s_g * c[q_nk]``. The values c are fitted to ``w / s``, s being the scales that the range rule asks for.
With data, an error in column k counts ``E[x_k^2]``: what it adds to the error of the output while errors of different columns are uncorrelated, H's diagonal. (SqueezeLLM weighs by the
loss's own second derivative, which needs gradients.) Without a step ``rtn`` fits the same, every weight counting alike, and needs no data.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.core.formats import encode
from qcompile.core.qtensor import QTensor, from_codes, grid, scaled
from qcompile.core.scheme import Scheme
from qcompile.core.stats import Stats

from .method import Solver


def solve(weight: Tensor, scheme: Scheme, stats: Stats, *, rule: str = "absmax", name: str = "") -> QTensor:
    """``weight`` (N, K), any float dtype; reads "moments". Fixed values (a head in int8 beside linears of a learned format) leave nothing to fit: rounded to nearest. Raises as rtn does."""
    seen = stats["moments"]
    g = grid(weight, scheme, rule=rule, name=name, importance=seen["square"] / seen["count"].clamp(min=1))
    return from_codes(encode(scaled(weight, g), g.fmt), g)


SOLVER = Solver("lloyd_max", solve, needs=("moments",))
