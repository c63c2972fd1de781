"""``stored(weight, smooth, outliers, scheme, k, dtype)``: the value of a weight that ``qcompile.quantize`` left in a module as codes and scales.

Eager models, ``torch.export`` and plain Inductor run it as it is. Our backend reads the codes through it and never computes it: see ``passes/find_sites.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.core.qtensor import QTensor, dequantize
from qcompile.core.scheme import Scheme

from .op import Op


def reference(weight: Sequence[Tensor], smooth: Sequence[Tensor], outliers: Sequence[Tensor], scheme: str, k: int, dtype: torch.dtype) -> Tensor:
    """(..., N, K) of ``(codes, scales)``, with the outlier columns ``[indices (C,), values (N, C)]`` put back, divided by ``[s (K,)]``."""
    w = dequantize(QTensor.unflatten(weight, Scheme.parse(scheme), k))
    if outliers:
        w = w.index_copy(-1, outliers[0], outliers[1].to(w.dtype))
    return (w / smooth[0] if smooth else w).to(dtype)


def fake(weight: Sequence[Tensor], smooth: Sequence[Tensor], outliers: Sequence[Tensor], scheme: str, k: int, dtype: torch.dtype) -> Tensor:
    """Shape and dtype of ``reference``."""
    return weight[0].new_empty((*weight[0].shape[:-1], k), dtype=dtype)


OP = Op("stored", "(Tensor[] weight, Tensor[] smooth, Tensor[] outliers, str scheme, int k, ScalarType dtype) -> Tensor", reference, fake)
