"""Signal to quantization noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompile.core.qtensor import QTensor
from qcompile.core.recipe import Choice
from qcompile.tables import EXACT_DB

if TYPE_CHECKING:
    from qcompile.core.solution import Solution


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


def output_db(choice: Choice, x: Tensor, which: Tensor | None, weight: Tensor, packed: Sequence[Tensor], solution: Solution | None) -> float | None:
    """SQNR of the product of x (..., K) and a weight (N, K), quantized as ``choice`` and ``solution`` say; of rows (S, K) and a stack (E, N, K) of which ``which`` (S,) names one for each row, over
    all rows whose expert there is. None where x has no rows."""
    if which is None:
        exact = x.float() @ weight.float().T
        return sqnr(exact, _product(choice, x, weight, packed, solution))
    choice = replace(choice, methods=tuple(m for m in choice.methods if m.name != "outliers"))  # stacked experts are not split
    signal = noise = 0.0
    for e in sorted({int(e) for e in which.unique()} & set(range(weight.shape[0]))):
        rows = x[which == e]
        exact = rows.float() @ weight[e].float().T
        signal += energy(exact)
        noise += energy(exact - _product(choice, rows, weight[e], [t[e] for t in packed], solution).float())
    return ratio(signal, noise)


def _product(choice: Choice, x: Tensor, weight: Tensor, packed: Sequence[Tensor], solution: Solution | None) -> Tensor:
    """What the quantized linear gives, by its reference."""
    from qcompile.kernels import OPS, product
    from qcompile.passes.lower import spelled
    from qcompile.solve import Product

    if solution is not None:
        return Product(replace(solution, q=QTensor.unflatten(packed, choice.weight, x.shape[-1])), choice, weight, torch.float32)(x.float())
    codes, *scale = [x] if choice.input is None else OPS["quantize"].reference(x, [], str(choice.input))
    return product.reference(codes, scale, packed, spelled(choice))
