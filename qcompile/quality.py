"""How near what a quantized model returns is to what it returned unquantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.replay import Unit
from qcompile.sqnr import level


@dataclass
class Quality:
    """Outputs of the quantized units against the original ones: SQNR in dB, mean KL divergence of next-token distributions where the model has a head, and whether all is finite."""

    signal: float = 0.0
    noise: float = 0.0
    divergence: float = 0.0
    positions: int = 0
    finite: bool = True

    def see(self, exact: Tensor, y: Tensor, logits: bool) -> None:
        """Add one output. What is not finite in the original itself (masked logits) does not count."""
        known = torch.isfinite(exact)
        self.finite &= bool(torch.isfinite(y[known]).all())
        self.signal += float(exact[known].double().square().sum())
        self.noise += float((y[known].double() - exact[known].double()).square().sum())
        if logits:
            for a, b in zip(exact.reshape(-1, exact.shape[-1]).split(1024), y.reshape(-1, y.shape[-1]).split(1024)):
                p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
                self.divergence += float(torch.where(p > -float("inf"), p.exp() * (p - q), 0).sum())
                self.positions += a.shape[0]

    @property
    def decibels(self) -> float | None:
        """SQNR of all outputs."""
        if not self.signal or not self.finite:
            return None
        return level(self.signal, self.noise)

    @property
    def kl(self) -> float | None:
        """Mean over positions, in nats; None without a head."""
        return self.divergence / self.positions if self.positions else None


def head_of(unit: Unit) -> int | None:
    """Size of the vocabulary where a unit has a head."""
    return next((s.n for s in unit.sites.values() if s.role == "head"), None)


def compared(quality: Quality, exact: Any, outputs: Any, head: int | None) -> None:
    """Add what a call returned, quantized, beside what it returns unquantized: the logits where there are any, else the first values that are not integers."""
    pairs = [(a, b) for a, b in zip(tensors(exact), tensors(outputs)) if a.is_floating_point() and a.numel()]
    chosen = [p for p in pairs if head is not None and p[0].shape[-1] == head] or pairs
    for a, b in chosen[:1]:
        quality.see(a, b, head is not None and a.shape[-1] == head)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    values: Sequence[Any] = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [t for v in values for t in tensors(v)]
