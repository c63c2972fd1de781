"""What calibration found for one use of one live weight: plain tensors, and how a weight is prepared with them.

The linear ``y = x @ w.T + b`` becomes ``y = Q(x / s) @ Q(w s).T + x_o @ w_o.T + b + c``: ``s`` (K,) the smoothing vector, ``o`` the outlier columns, which are zero in both factors of the
first product and whole in the second, ``c`` (N,) the correction of the bias. Without quantization this is the linear as it was, for every s and every o.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .qtensor import QTensor

CHOSE = "chose"
"""How a note begins that says what a search settled on: nobody is warned of it."""


@dataclass
class Solution:
    """``smooth`` (K,) float32, ``outliers`` (C,) int64 sorted, ``bias`` (N,) float32, ``range`` [scale (1,)] or [scale, zero] of a static input, ``q`` the solved codes of the dense part.

    ``tokens`` is how many rows were seen; ``decibels`` the SQNR of the output on them; ``notes`` say what was done instead of what was asked for, and what a search chose.
    """

    smooth: Tensor | None = None
    outliers: Tensor | None = None
    bias: Tensor | None = None
    range: tuple[Tensor, ...] = ()
    q: QTensor | None = None
    tokens: int = 0
    decibels: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    heads: bool = False
    """``smooth`` is equal over the channels of heads that share a row (grouped-query attention): it may go into that row."""
    columns: Tensor | None = None
    """(N, C): the outlier columns times ``s``, where the weight itself is no longer there to read them from."""
    live: Callable[[], Solution] | None = field(default=None, repr=False)
    """Where the codes are those of a module: reads them as they are now."""
    state: tuple[object, ...] = field(default=(), repr=False)
    """What the weight was when ``q`` was solved: codes of another value are never used."""

    def now(self) -> Solution:
        """Itself, or what its module holds now."""
        return self.live() if self.live is not None else self

    def prepared(self, w: Tensor) -> Tensor:
        """The dense part of a weight (..., N, K), float32: ``w * s`` with zeros in the outlier columns."""
        w = w.float() if self.smooth is None else w.float() * self.smooth
        if self.outliers is not None and self.outliers.numel():
            w = w.clone() if self.smooth is None else w
            w[..., self.outliers] = 0
        return w

    def kept(self, w: Tensor) -> Tensor:
        """The outlier columns of a weight (N, K), (N, C) float32, times ``s``."""
        if self.columns is not None:
            return self.columns.float()
        assert self.outliers is not None
        w = w.index_select(-1, self.outliers).float()
        return w if self.smooth is None else w * self.smooth[self.outliers]

    def divided(self, x: Tensor) -> Tensor:
        """``x / s`` in x's dtype."""
        return x if self.smooth is None else (x.float() / self.smooth).to(x.dtype) if x.dtype != torch.float64 else x / self.smooth

    def to(self, device: torch.device) -> Solution:
        """The same tensors on another device."""
        moved = {name: t.to(device) if (t := getattr(self, name)) is not None else None for name in ("smooth", "outliers", "bias", "columns")}
        q = self.q and QTensor.unflatten([t.to(device) for t in self.q.flatten()], self.q.scheme, self.q.k)
        return Solution(**moved, range=tuple(t.to(device) for t in self.range), q=q, heads=self.heads, tokens=self.tokens, decibels=self.decibels, seconds=self.seconds, notes=self.notes, live=self.live, state=self.state)
