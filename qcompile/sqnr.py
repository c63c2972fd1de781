"""Signal to quantization noise."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.tables import EXACT_DB


def sqnr(exact: Tensor, approximate: Tensor) -> float | None:
    """10 log10(sum exact^2 / sum (exact - approximate)^2) in dB; 200 where they are equal, None where one of them is not finite or all is zero."""
    return ratio(energy(exact), energy(exact.float() - approximate.float()))


def energy(t: Tensor) -> float:
    """Sum of squares, in float64."""
    return float(torch.linalg.vector_norm(t.float(), dtype=torch.float64)) ** 2


def ratio(signal: float, noise: float) -> float | None:
    """Energies in dB; as ``sqnr``."""
    pair = torch.tensor([signal, noise], dtype=torch.float64)
    if not bool(torch.isfinite(pair).all()) or signal == 0:
        return None
    return min(EXACT_DB, level(signal, noise))


def level(signal: float, noise: float) -> float:
    """Energies in dB, ``signal`` positive; infinite where there is no noise."""
    return 10 * float(torch.tensor(signal / noise, dtype=torch.float64).log10()) if noise else float("inf")
