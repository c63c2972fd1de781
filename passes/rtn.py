"""Round to nearest: every weight becomes the nearest value that its group's scale allows. What all other solvers start from and are measured against."""

from __future__ import annotations

from torch import Tensor

from qcompile.core.formats import encode
from qcompile.core.qtensor import QTensor, from_codes, grid, scaled
from qcompile.core.scheme import Scheme
from qcompile.core.stats import Stats

from .method import Solver


def solve(weight: Tensor, scheme: Scheme, stats: Stats | None = None, *, rule: str = "absmax", name: str = "") -> QTensor:
    """``weight`` (N, K), any float dtype. ``rule`` names a row of RANGES. Raises WeightError, naming ``name``, for what cannot be quantized, and OptionError for an unknown rule."""
    g = grid(weight, scheme, rule=rule, name=name)
    return from_codes(encode(scaled(weight, g), g.fmt), g)


SOLVER = Solver("rtn", solve, needs=())
