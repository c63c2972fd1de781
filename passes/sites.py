"""Values that passes exchange: parameters, sites, and linears that were left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

Role = Literal["linear", "head", "router", "experts"]


@dataclass(frozen=True)
class Param:
    """A parameter among the graph's inputs: its position, its name in the model, the class name of its module."""

    index: int
    path: str
    kind: str = ""


@dataclass(frozen=True)
class Site:
    """A found linear. ``name`` is unique in the graph; ``path`` is what rules match (the module's name, or the parameter's where it is not called "weight").

    ``view`` says how the (experts,) N x K matrix is read off the parameter: "" as it is, "t" its last two axes swapped, "flat" everything after the first axis flattened.
    ``kin`` are the sites that read the same input; ``m`` the rows of the example input.
    """

    name: str
    path: str
    param: Param
    view: str
    n: int
    k: int
    experts: int = 1
    role: Role = "linear"
    m: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    kin: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), or (experts, N, K)."""
        return (self.experts, self.n, self.k) if self.experts > 1 else (self.n, self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight before quantization."""
        return self.experts * self.n * self.k * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Floating-point operations of one call on the example input."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class LeftAlone:
    """A matrix product with a parameter that is not a site, and why."""

    path: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str


def view(parameter: Tensor, how: str) -> Tensor:
    """The (experts,) N x K matrix of a site."""
    if how == "t":
        return parameter.transpose(-1, -2)
    return parameter.flatten(1) if how == "flat" else parameter


def example(node: Any) -> Any:
    """Dynamo's fake value of a node, or None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def rows(shape: Sequence[Any]) -> int:
    """Product of the leading sizes, symbolic ones by their hints."""
    m = 1
    for size in shape[:-1]:
        m *= int(getattr(getattr(size, "node", None), "hint", size) or 0) if not isinstance(size, int) else size
    return m
