"""A model as eager PyTorch computes it with the rounding that a compiled graph does: quantized weights replaced by their rounded values, and every activation that meets one rounded as its scheme says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile.backend import CompiledGraph
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import Choice
from qcompile.core.scheme import Scheme
from qcompile.kernels.quantize import reference as quantize_input
from qcompile.kernels.scaled_linear import values
from qcompile.passes.sites import view

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution", "grouped_mm_fallback")
"""Operators that the dispatcher sees where a model multiplies; a bias comes first in two of them."""


def with_rounded_weights(model: nn.Module, graph: CompiledGraph, args: Any) -> nn.Module:
    """The model with each quantized weight replaced by its rounded value."""
    for name in graph.kernels:
        site = graph.sites[name]
        matrix = view(args[site.param.index].data, site.view)
        matrix.copy_(dequantize(quantize(matrix, graph.plan[name].weight), matrix.dtype))
    return model


class RoundedInputs(TorchDispatchMode):
    """Rounds what is multiplied by a quantized weight, wherever the weight is a view of its parameter. ``met`` are the addresses of the parameters that were multiplied.

    ``nudge``, in steps of the codes, is added before rounding: sums in another order move a value by some 1e-5 of a step, and one that lies so near to the middle between two codes goes to either.
    """

    def __init__(self, graph: CompiledGraph, args: Any, nudge: float = 0.0) -> None:
        super().__init__()
        self.nudge = nudge
        self.schemes: dict[int, Scheme] = {}
        for name in graph.kernels:
            choice = graph.plan[name]
            if isinstance(choice, Choice) and choice.input is not None:
                self.schemes[args[graph.sites[name].param.index].untyped_storage().data_ptr()] = choice.input
        self.met: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name in PRODUCTS:
            first = 1 if name in ("addmm", "baddbmm") else 0
            a, b = args[first : first + 2]
            x, w, axis = (a, b, 1 if name == "convolution" else -1) if b.untyped_storage().data_ptr() in self.schemes else (b, a, -2)
            if (address := w.untyped_storage().data_ptr()) in self.schemes:
                self.met.add(address)
                y = rounded_rows(x, self.schemes[address], axis, self.nudge)
                args = (*args[:first], *((y, b) if x is a else (a, y)), *args[first + 2 :])
        return func(*args, **(kwargs or {}))


def rounded_rows(x: Tensor, scheme: Scheme, axis: int, nudge: float = 0.0) -> Tensor:
    """The values of x, whose columns lie along ``axis``, as a kernel for quantized activations sees them; ``nudge``: of a step, in which the codes' values lie one apart."""
    rows = x.movedim(axis, -1)
    codes, *scale = quantize_input(rows, [], str(scheme))
    if nudge:
        codes, *scale = quantize_input(rows + nudge * scale[0], [], str(scheme))
    return values(codes, scale, scheme).to(x.dtype).movedim(-1, axis)
