"""AQAS, activation-quantization-aware scaling: the factor is chosen by the error of the outputs with activations *and* weights rounded, which is what W4A8 runs.

    min over s of ||X W^T - Q(X / s) Q(W s)^T||^2

Lee et al. 2023 (arXiv 2311.05161), equation 1. AWQ rounds the weights alone in its loss, SmoothQuant looks at ranges alone. The paper's own search space was not available to us:
the candidates here are those of both methods (AWQ's 20 powers, SmoothQuant's 21 alphas) and no scaling, so that the result is never worse than either on the sampled rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .awq import candidates as powers
from .awq import mean_magnitude
from .method import Linears, Transform
from .smooth import best, column_maxima, statistic
from .smooth import candidates as alphas


def aqas(linears: Linears, *, duo: bool = False) -> Tensor:
    """s (K,) float32, positive. ``duo``: AWQ's powers in their two-sided form. Reads "absmax", "moments" and "samples"; raises OptionError where they are absent or empty."""
    x = statistic(linears, "absmax", "aqas")["absmax"].float()
    factors = [torch.ones_like(x), *powers(linears, mean_magnitude(linears, "aqas"), duo), *alphas(x, column_maxima(linears.weights))]
    return best(linears, factors, "aqas")


TRANSFORM = Transform("aqas", aqas, needs=("absmax", "moments", "samples"))
