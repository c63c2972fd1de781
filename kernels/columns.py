"""``columns(weight, index, scheme, k)``: some columns of a quantized weight, dequantized. The dynamic outlier split multiplies the largest columns of its input by them.

There is no kernel: the reference is traced, and Inductor reads the codes of these columns alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.core.qtensor import QTensor, dequantize
from qcompile.core.scheme import Scheme

from .op import Op


def reference(weight: Sequence[Tensor], index: Tensor, scheme: str, k: int) -> Tensor:
    """(N, C) float32 of the (N, K) weight; ``index`` (C,) int64."""
    return dequantize(QTensor.unflatten(weight, Scheme.parse(scheme), k)).index_select(-1, index)


def fake(weight: Sequence[Tensor], index: Tensor, scheme: str, k: int) -> Tensor:
    """Shape and dtype of ``reference``."""
    return weight[0].new_empty((weight[0].shape[-2], index.shape[0]), dtype=torch.float32)


OP = Op("columns", "(Tensor[] weight, Tensor index, str scheme, int k) -> Tensor", reference, fake)
