"""A weight and the second moment of inputs whose channels depend on each other and differ in size, as those of trained models do."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = [(64, 96), (48, 200), (130, 64)]
"""(N, K): whole groups; a ragged last group; more rows than columns, no multiple of 16."""
SCHEMES = [
    "int4.g64", "uint4.g64.point", "uint3.g32.min", "int8.row", "uint4.tensor.point", "e4m3.tensor", "e2m1.g16", "e3m2.row", "e3m0.g32", "nf4.g64", "fp4.g48.min",
    "nf4.g64/int8.g256", "uint4.g32.min/uint6.g8", "e2m1.g16/e4m3.tensor", "int8.b16x16", "int4.b5x7", "int4.g64.plain",
]  # fmt: skip


def layer(n: int, k: int, tokens: int = 512, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight (n, k) float32 whose values ``dtype`` can hold, inputs (tokens, k))."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=random) * torch.linspace(1, 0.02, k)[:, None]
    sizes = torch.exp(torch.randn(k, generator=random) / 2)
    x = torch.randn(tokens, k, generator=random) @ mix * sizes / k**0.5
    return torch.randn(n, k, generator=random).to(dtype).float(), x


def second_moment(x: Tensor) -> dict[str, dict[str, Tensor]]:
    """Statistics of inputs (tokens, K) with the entry that solvers read."""
    return {"hessian": {"sum": x.T @ x, "count": torch.tensor(float(len(x)))}}


def from_h(h: Tensor) -> dict[str, dict[str, Tensor]]:
    """Statistics whose second moment is ``h``."""
    return {"hessian": {"sum": h, "count": torch.tensor(1.0)}}
