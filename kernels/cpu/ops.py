"""The C++ kernels as torch ops that Inductor calls, and what they support. Each equals the op of the same name in ``qcompile`` in meaning.

They take the packed tensors as they are stored; scales are widened to float32 on each call, which for N x G of them costs microseconds.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.formats import table
from qcompile.core.scheme import Scheme

from . import NoCompiler, int4_int8_linear, int8_linear, integer_library, table_library, table_linear

if TYPE_CHECKING:
    from qcompile.kernels.op import Case

NAMESPACE = "qcompile_cpu"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, schema: str, fn: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Any]:
    """Define one op and return the lowering that calls it."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, fn, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

    def lower(case: Case, *args: Any) -> Any:
        _build_ahead(case.input is not None)
        return compat.fallback_kernel(getattr(getattr(torch.ops, NAMESPACE), name).default, *args)

    return lower


_AHEAD: set[bool] = set()


def _build_ahead(integer_products: bool) -> None:
    """Start compiling the C++ library that the graph will call, so that it is built beside Inductor's own kernels and not after them."""
    if integer_products in _AHEAD:
        return
    _AHEAD.add(integer_products)

    def build() -> None:
        with contextlib.suppress(NoCompiler):  # said when the kernel is called
            (integer_library if integer_products else table_library)()

    threading.Thread(target=build, daemon=True, name="qcompile-g++").start()


def weight_support(w: Scheme, k: int) -> Skip | None:
    """Whether the table kernels take a weight of this scheme."""
    if w.fmt.bits not in (4, 8):
        return Skip(f"the CPU kernels take codes of 4 or 8 bits, not {w.fmt.bits}")
    if w.scale is not None:
        return Skip("quantized scales are widened first")
    return _group_support(w, k)


def _group_support(w: Scheme, k: int) -> Skip | None:
    c = w.extent(1, k)[1]
    return None if c >= k or c % 16 == 0 else Skip(f"the CPU kernels take groups of a multiple of 16 columns, not {c}")


def product_support(x: Scheme, w: Scheme, k: int) -> Skip | None:
    """Whether the int8 kernels take this pair."""
    if x.fmt.name != "int8" or w.fmt.name not in ("int8", "int4"):
        return Skip(f"this CPU has no product of {x.fmt} and {w.fmt}")
    if x.zero != "none" or w.zero != "none":
        return Skip(f"the int8 kernels take no zero points ({x} @ {w})")
    if x.extent(1, k)[1] < k:
        return Skip(f"the int8 kernels take one activation scale for each row or tensor, not {x}")
    return _group_support(w, k)


def weight_only(x: Tensor, weight: Sequence[Tensor], w: Scheme) -> Tensor:
    """``linear`` by the table kernels, float32."""
    k = x.shape[-1]
    codes, n = weight[0], weight[0].shape[0]
    scale, zero = _by_row(weight[1], w, n), _by_row(weight[2], w, n) if w.zero != "none" else None
    offset = None if zero is None else -zero if w.zero == "min" else -zero * scale
    plain = codes.dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2) or w.fmt.name == "uint8"
    return table_linear(x.float(), codes, weight[-1].float() if w.fmt.learned else None if plain else _table(w.fmt.name), scale, offset, w.extent(n, k)[1])


def integer(x: Tensor, x_scale: Tensor, weight: Sequence[Tensor], w: Scheme) -> Tensor:
    """``scaled_linear`` by the int8 kernels, float32."""
    n, (m, k) = weight[0].shape[0], x.shape
    scale = x_scale.reshape(-1).expand(m).contiguous()
    kernel = int8_linear if w.fmt.bits == 8 else int4_int8_linear
    return kernel(x.contiguous(), scale, weight[0], _by_row(weight[1], w, n), w.extent(n, k)[1])


def _by_row(part: Tensor, w: Scheme, n: int) -> Tensor:
    """Scales or zeros as float32 (N, G): blocks of rows repeated."""
    part = part.float()
    if part.shape[0] != n:
        part = part.repeat_interleave(w.extent(n, 1)[0], 0)[:n]
    return part.contiguous()


@functools.cache
def _table(name: str) -> Tensor:
    from qcompile.core.formats import FORMATS

    return table(FORMATS[name]).nan_to_num(0.0).contiguous()
