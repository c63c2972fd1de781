"""What an op is: a meaning in plain torch, a shape rule, and kernels in order of preference, each of which says what it supports.

An op takes tensors and one printable string (a scheme, or ``input @ weight``), so that graphs print, cache and diff. Every op is
 * eager: its reference, so that ``aot_eager`` and ``torch.export`` work and mean the same;
 * under Inductor: the first kernel that supports the case. Where none does, the reference is traced in its place and compiled by Inductor (the report says why).
N-dimensional activations are brought to two dimensions on the way in, at the ATen level, where ``passes/flatten`` can move the views.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.scheme import Scheme

NAMESPACE = "qcompile"


@dataclass(frozen=True)
class Case:
    """What decides which kernel runs: device, dtype of the activations, schemes, and sizes (``m`` None where dynamic, on a GPU the largest of its regime; ``experts`` above 1 for stacked weights)."""

    device: torch.device
    dtype: torch.dtype
    weight: Scheme
    input: Scheme | None
    n: int
    k: int
    m: int | None = None
    experts: int = 1
    capability: tuple[int, int] | None = None

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Of the CUDA device, or the one that was given to ask about a device that is not here."""
        return self.capability or compat.capability(self.device)


@dataclass(frozen=True)
class Kernel:
    """One way to run an op on one kind of device. ``supports`` returns a Skip, whose reason the report prints, or None; ``lower`` maps Inductor's IR to a kernel."""

    name: str
    device: str
    supports: Callable[[Any], Skip | None]
    lower: Callable[..., Any] | None
    trace: Callable[..., Any] | None = None
    """Torch ops that AOTAutograd traces in the op's place, where the kernel is a library's; ``lower`` is None then."""


@dataclass(frozen=True)
class Op:
    """One op; see the module's docstring. ``case`` reads a Case, or what else has a device, off the op's arguments (tensors or IR nodes alike)."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    case: Callable[..., Any] | None = None
    kernels: tuple[Kernel, ...] = ()
    simplify: Callable[..., Any] | None = None
    """A rewrite into simpler ops tried at trace time (N-D to 2-D, nested scales); returns NotImplemented where nothing is left to simplify."""
    overload: Any = field(default=None, compare=False)
    fallback: Callable[..., Any] | None = None
    """``lower`` for cases that no kernel supports, where the reference cannot be traced: it reads values, such as how many rows each expert has."""
    gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    """(backward, setup_context) as ``torch.library.register_autograd`` takes them, of an op that training graphs hold."""
    late: bool = False
    """AOTAutograd keeps the op whole, and with it in the half of a training graph that needs it; its reference is written out behind that (``passes/late.py``)."""

    def choose(self, case: Any) -> tuple[Kernel | None, Skip | None]:
        """The first kernel for the case, or None with the reason of the last refusal."""
        reason: Skip | None = Skip(f"{self.name} has no kernel for {case.device.type}")
        for kernel in self.kernels:
            if kernel.device == case.device.type:
                reason = kernel.supports(case)
                if reason is None:
                    return kernel, None
        return None, reason

    def decompose(self, *args: Any) -> Any:
        """What AOTAutograd traces in the op's place; NotImplemented keeps the op for its lowering."""
        if self.late:
            return NotImplemented
        if self.simplify is not None and (out := self.simplify(*args)) is not NotImplemented:
            return out
        kernel = self.choose(self.case(*args))[0] if self.case is not None else None
        if kernel is not None:
            return kernel.trace(*args) if kernel.trace is not None else NotImplemented
        if self.fallback is not None:
            return NotImplemented
        return self.reference(*args)


_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def target(name: str) -> Any:
    """The callable op, ``torch.ops.qcompile.<name>.default``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def install(ops: Mapping[str, Op]) -> None:
    """Define every op in torch's library and hand its lowering to Inductor."""
    for op in ops.values():
        _LIBRARY.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(op.name, _exact(op.reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=_LIBRARY)
        if op.gradient is not None:
            torch.library.register_autograd(f"{NAMESPACE}::{op.name}", op.gradient[0], setup_context=op.gradient[1], lib=_LIBRARY)
        if op.kernels or op.fallback is not None:
            compat.register_lowering(target(op.name), functools.partial(_lower, op))


def _exact(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference outside any autocast that surrounds the call: its float32 is part of its meaning."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.autocast(first.device.type, enabled=False):
            return reference(*args)

    return run


def decompositions(ops: Mapping[str, Op]) -> dict[Any, Callable[..., Any]]:
    """The table that AOTAutograd gets beside Inductor's own."""
    return {target(op.name): op.decompose for op in ops.values()}


def _lower(op: Op, *args: Any) -> Any:
    case = op.case(*args) if op.case is not None else None
    kernel, reason = op.choose(case) if case is not None else (None, None)
    if kernel is None and op.fallback is not None:
        return op.fallback(case, *args)
    if kernel is None or kernel.lower is None:  # decompose() keeps an op only where a kernel supports it
        raise AssertionError(f"{op.name} reached Inductor without a kernel: {reason}")
    return kernel.lower(case, *args)


FEW, MIDDLE = 64, 256
"""Rows of activations: up to FEW a product is bound by reading the weight, beyond MIDDLE by arithmetic. A dynamic number of rows is compiled for one of the three regimes, so that a growing
batch is compiled three times at most."""


def rows_of(size: Any, device: torch.device) -> int | None:
    """``Case.m`` of a size: itself where it is static. On a GPU the regime of a dynamic one is asked (and guarded), and stands for it."""
    known = compat.static_int(size)
    if known is not None or device.type != "cuda":
        return known
    return FEW if compat.at_most(size, FEW) else MIDDLE if compat.at_most(size, MIDDLE) else 4096


def two_dimensional(x: Tensor) -> Tensor:
    """(..., K) as (M, K)."""
    return x.reshape(-1, x.shape[-1])


def two_dimensional_scales(x: Tensor, x_scale: Sequence[Tensor]) -> list[Tensor]:
    """Scales of ``two_dimensional(x)``: those that have x's axes as (M, ...), those of a whole tensor as they are."""
    return [two_dimensional(s) if s.dim() == x.dim() else s for s in x_scale]


def always(c: Case) -> Skip | None:
    """``supports`` of what is no kernel of its own."""
    return None
