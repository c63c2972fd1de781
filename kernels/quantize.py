"""``quantize(x, range, scheme)``: activations (..., K) to codes and scales.

Dynamic ranges are taken here; static ones come in as ``range = [scale]`` (and ``zero`` where the scheme has one). It is traced, not a kernel of its own, so that Inductor fuses it into the norm or
activation before (dynamic: it needs the row's maximum), or into the epilogue of the linear before (static). What is traced is the reference, or on a GPU, for dynamic rows, ``rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.core.errors import Skip
from qcompile.core.formats import encode
from qcompile.core.qtensor import tile
from qcompile.core.ranges import RANGES, scale_of
from qcompile.core.scheme import GROUPS, Scheme

from .op import Kernel, Op


def reference(x: Tensor, range: Sequence[Tensor], scheme: str) -> list[Tensor]:
    """Codes (..., K) in the format's dtype and float32 scales: (..., 1) per row, (1,) per tensor, (..., G) per group; zeros of the same shape where the scheme has them."""
    s = Scheme.parse(scheme)
    y = x.float()
    if s.static:
        scale, zero = range[0], range[1] if len(range) > 1 else None
        z = y / scale if zero is None else y / scale + zero
        return [encode(z, s.fmt)]
    if s.group == GROUPS["row"]:
        scale, zero = RANGES["absmax"](y, s, (-1,))
    elif 0 in y.shape:
        return fake(x, range, scheme)
    elif s.group == GROUPS["tensor"]:
        scale, zero = RANGES["absmax"](y, s, tuple(-1 - i for i, _ in enumerate(y.shape)))
    else:
        return _grouped(y, s)
    codes = encode(y / scale if zero is None else y / scale + zero, s.fmt)
    shape = (1,) if s.group == GROUPS["tensor"] else scale.shape
    return [codes, *(t.reshape(shape) for t in (scale, zero) if t is not None)]


def _grouped(y: Tensor, s: Scheme) -> list[Tensor]:
    """One range for each group of columns of each row; the codes are taken by index, not by padding and cutting (see ``spread``)."""
    k = y.shape[-1]
    flat = y.reshape(-1, k)
    group = s.extent(1, k)
    scale, zero = (None if p is None else p[:, 0, :, 0] for p in RANGES["absmax"](tile(flat, group), s, (-3, -1)))
    assert scale is not None
    columns = torch.arange(k, device=y.device) // group[1]
    z = flat / scale.index_select(1, columns)
    codes = encode(z if zero is None else z + zero.index_select(1, columns), s.fmt)
    lead = y.shape[:-1]
    return [codes.reshape(y.shape), *(p.reshape(*lead, -1) for p in (scale, zero) if p is not None)]


def fake(x: Tensor, range: Sequence[Tensor], scheme: str) -> list[Tensor]:
    """Shapes and dtypes of ``reference``."""
    s = Scheme.parse(scheme)
    codes = torch.empty_like(x, dtype=s.fmt.dtype)
    if s.static:
        return [codes]
    groups = 1 if s.group[1] == 0 else -(-x.shape[-1] // min(s.group[1], x.shape[-1]))
    shape = (1,) if s.group == GROUPS["tensor"] else (*x.shape[:-1], groups)
    return [codes, *(x.new_empty(shape, dtype=torch.float32) for _ in ("scale",) + (("zero",) if s.zero != "none" else ()))]


NEAREST = 1.5 * 2.0**23
"""A float32 that is added to a smaller one has its nearest integer, ties to even, in its last bits."""


def rows(x: Tensor, range: Sequence[Tensor], scheme: str) -> list[Tensor]:
    """``reference`` of dynamic symmetric rows in a third of the instructions, which is what bounds a GPU there: one row keeps one of its multiprocessors busy, many rows all of them.

    Values are multiplied by the scale's reciprocal: where one lies between two codes, it may get the other. None is beyond the format's ends. Positive floats compare as their bits do, as integers,
    and NaN's are the greatest. A row with a value that is not finite gets NaN as its scale, so that it is NaN whatever its codes.
    """
    fmt = Scheme.parse(scheme).fmt
    y = x.float()
    top = (y.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True).view(torch.float32)
    scale = scale_of(top, fmt) + (top - top)
    z = y * scale.reciprocal()
    return [(z + NEAREST).view(torch.int32).to(fmt.dtype) if fmt.kind == "int" else z.to(fmt.dtype), scale]


@dataclass(frozen=True)
class Activations:
    """What decides how they are quantized."""

    device: torch.device
    scheme: Scheme
    k: int


def case_of(x: Tensor, range: Sequence[Tensor], scheme: str) -> Activations:
    return Activations(x.device, Scheme.parse(scheme), int(x.shape[-1]) if x.dim() else 1)


def supports(case: Activations) -> Skip | None:
    """Dynamic symmetric rows of signed integers or of a native float."""
    s = case.scheme
    if s.static or s.group != GROUPS["row"] or s.zero != "none" or s.fmt.lo >= 0 or not (s.fmt.kind == "int" or s.fmt.native) or not case.k:
        return Skip(f"{s} is not of dynamic symmetric rows of signed integers or native floats")
    return None


OP = Op("quantize", "(Tensor x, Tensor[] range, str scheme) -> Tensor[]", reference, fake, case_of, (Kernel("rows", "cuda", supports, None, rows),))
