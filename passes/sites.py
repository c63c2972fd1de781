"""Values that passes exchange: parameters, sites, and linears that were left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from qcompile.core.recipe import Choice

Role = Literal["linear", "head", "router", "experts"]


@dataclass(frozen=True)
class Param:
    """A parameter among the graph's inputs: its position, its name in the model, the class name of its module, whether an embedding looks it up, in this graph or elsewhere, and whether it requires grad."""

    index: int
    path: str
    kind: str = ""
    table: bool = False
    trained: bool = False


@dataclass(frozen=True)
class Site:
    """A found linear. ``name`` is unique in the graph; ``path`` is what rules match (the module's name, or the parameter's where it is not called "weight").

    ``view`` says how the (experts,) N x K matrix is read off the parameter (see the function of that name).
    ``kin`` are the sites that read the same input; ``m`` the rows of the example input; ``stored`` is the choice of a weight that the module already holds as codes.
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
    stored: Choice | None = None

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
    """A matrix product with a parameter (or a buffer) that is not a site, and why. ``index`` is its position among the graph's inputs, ``flops`` those of the product on the example input."""

    path: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str
    index: int = -1
    flops: int = 0


CASTS = {"to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "detach"}
"""Methods that leave the meaning of a weight alone."""


def view(parameter: Tensor, how: str) -> Tensor:
    """The (experts,) N x K matrix of a site: steps "[3]" (one of stacked weights), "t" (last two axes swapped), "flat" (all axes but the first are columns) and "rows" (all but the last are rows), joined by dots."""
    for step in how.split(".") if how else ():
        if step == "t":
            parameter = parameter.transpose(-1, -2)
        elif step == "flat":
            parameter = parameter.flatten(1)
        elif step == "rows":
            parameter = parameter.flatten(0, -2)
        else:
            parameter = parameter[int(step[1:-1])]
    return parameter


def shape_of(parameter: Tensor, how: str) -> tuple[int, ...]:
    """Shape of ``view(parameter, how)``, of sizes alone."""
    return tuple(view(torch.empty(parameter.shape, device="meta"), how).shape)


def call_method(graph: fx.Graph, method: str, node: fx.Node, *args: Any) -> fx.Node:
    """``node.method(*args)`` with its example value."""
    made = graph.call_method(method, (node, *args))
    made.meta["example_value"] = getattr(example(node), method)(*args)
    return made


def is_transpose(node: fx.Node) -> bool:
    """The node swaps the last two axes of its input (the only two, for ``t`` and ``T``)."""
    value = example(node.args[0]) if node.args else None
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    if node.target in ("t", torch.t) or (node.target is getattr and node.args[1] in ("T", "mT")):
        return value.dim() == 2 or node.args[1:] == ("mT",)
    if node.target in ("transpose", torch.transpose, "swapaxes", torch.swapaxes):
        return sorted(int(d) % value.dim() for d in node.args[1:3]) == [value.dim() - 2, value.dim() - 1]  # type: ignore[arg-type]
    if node.target in ("permute", torch.permute):
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return value.dim() == 2 and [int(d) % 2 for d in order] == [1, 0]  # type: ignore[arg-type]
    return False


def example(node: Any) -> Any:
    """Dynamo's fake value of a node, or None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def cast_to(graph: fx.Graph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``x``, or a cast of it where it comes in another floating point dtype: what autocast does to the operands of a linear, written out."""
    given = example(x)
    if given is None or given.dtype == dtype or not given.dtype.is_floating_point:
        return x
    cast = graph.call_method("to", (x, dtype))
    cast.meta["example_value"] = given.to(dtype)
    return cast


def rows(shape: Sequence[Any]) -> int:
    """Product of the leading sizes, symbolic ones by their hints."""
    m = 1
    for size in shape[:-1]:
        m *= int(getattr(getattr(size, "node", None), "hint", size) or 0) if not isinstance(size, int) else size
    return m
