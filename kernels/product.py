"""A quantized product of either kind, for ops that are built on one: ``linear`` where the scheme is that of the weight, ``scaled_linear`` where it reads ``input @ weight``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qcompile import compat

from . import grouped, linear, scaled_linear, stream
from .op import Case, Op, rows_of, target


def reference(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str) -> Tensor:
    """(..., K) -> (..., N), float32, by the reference of its op; ``x_scale`` is empty for 16-bit activations."""
    return linear.reference(x, weight, scheme) if grouped.parse(scheme)[0] is None else scaled_linear.reference(x, x_scale, weight, scheme)


def call(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str) -> Tensor:
    """The same by its op, and so by the kernel that the op has."""
    y: Tensor = target("linear")(x, list(weight), scheme) if grouped.parse(scheme)[0] is None else target("scaled_linear")(x, list(x_scale), list(weight), scheme)
    return y


def op_of(c: Case) -> Op:
    """The Op whose case this is."""
    return linear.OP if c.input is None else scaled_linear.OP


def case(x: Any, weight: Sequence[Any], scheme: str) -> Case:
    """The case of one call; tensors and IR nodes alike."""
    sx, sw = grouped.parse(scheme)
    shape, device = compat.sizes(x), compat.device_of(x)
    return Case(device, x.dtype, sw, sx, int(compat.sizes(weight[0])[-2]), int(shape[-1]), rows_of(shape[0], device))


def flattened(x: Tensor, weight: Sequence[Tensor], scheme: str) -> tuple[list[Tensor], str] | None:
    """The weight with quantized scales widened to float32, and its scheme; None where there are none, or a kernel reads them as they are."""
    sx, sw = grouped.parse(scheme)
    if sw.scale is None or stream.takes_scales(case(x, weight, scheme)):
        return None
    flat = str(linear.unnested(sw))
    return linear.flat_scales(weight, sw, x.shape[-1]), f"{sx} @ {flat}" if sx else flat
