"""``dequantize(weight, scheme, k, dtype)``: a packed weight as values (..., N, K). What a parametrized module computes; traced, so that Inductor fuses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.core.qtensor import QTensor
from qcompile.core.qtensor import dequantize as values
from qcompile.core.scheme import Scheme

from .op import Op


def reference(weight: Sequence[Tensor], scheme: str, k: int, dtype: torch.dtype) -> Tensor:
    """(..., N, K) in ``dtype``; ``weight`` as ``QTensor.flatten`` gives it."""
    return values(QTensor.unflatten(weight, Scheme.parse(scheme), k), dtype)


def fake(weight: Sequence[Tensor], scheme: str, k: int, dtype: torch.dtype) -> Tensor:
    """Shape and dtype of ``reference``."""
    return weight[0].new_empty((*weight[0].shape[:-1], k), dtype=dtype)


OP = Op("dequantize", "(Tensor[] weight, str scheme, int k, ScalarType dtype) -> Tensor", reference, fake)
