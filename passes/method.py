"""What a method that needs data is: a transform finds the vector that divides an input (and multiplies the weights that read it), a solver turns a weight into codes.

Both are mathematics on plain tensors: they see the weights that share an input, their schemes and the statistics of that input, and know nothing of graphs. ``qcompile.solve`` wires them:
it runs the captured graph, takes the statistics that ``needs`` names, and calls them site by site.

Convention: ``x`` has K channels, a weight is (N, K) float32, ``y = x @ w.T``. ``H = sum(x x^T) / tokens`` is the second moment that GPTQ calls the Hessian, up to a factor of two that cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.core.qtensor import QTensor
from qcompile.core.scheme import Scheme
from qcompile.core.stats import Stats

Options = Mapping[str, object]


@dataclass(frozen=True)
class Linears:
    """Linears that read one input. ``weights``: (N_i, K) float32 each; ``schemes``: theirs; ``input``: the scheme of the activations, None for 16 bits; ``stats``: of the shared input."""

    weights: Sequence[Tensor]
    schemes: Sequence[Scheme]
    input: Scheme | None
    stats: Stats

    @property
    def k(self) -> int:
        """Channels of the input."""
        return int(self.weights[0].shape[-1])


@dataclass(frozen=True)
class Transform:
    """``fn(linears, **options) -> s`` of shape (K,), positive: ``x / s`` and ``w * s`` take the place of x and w. ``needs`` names statistics.

    ``about(linears, s, **options)`` says what a search settled on, for the notes of the sites; empty where nothing was searched.
    """

    name: str
    fn: Callable[..., Tensor]
    needs: tuple[str, ...]
    about: Callable[..., str] | None = None


@dataclass(frozen=True)
class Solver:
    """``fn(weight, scheme, stats, **options) -> QTensor``; ``weight`` (N, K) float32 as it is to be stored, ``stats`` of the input that meets it. ``needs`` names statistics."""

    name: str
    fn: Callable[..., QTensor]
    needs: tuple[str, ...]


def second_moment(stats: Stats) -> Tensor:
    """``H = sum(x x^T) / tokens``, (K, K) float32."""
    h = stats["hessian"]
    return h["sum"] / h["count"].clamp(min=1)


def output_error(delta: Tensor, h: Tensor) -> float:
    """Mean over tokens of ``||x @ delta.T||^2 = tr(delta H delta^T)``; ``delta`` (N, K)."""
    return float(torch.sum((delta @ h) * delta, dtype=torch.float64))
