"""``quantize(x, range, scheme)``: activations (..., K) to codes and scales.

Dynamic ranges are taken here; static ones come in as ``range = [scale]`` (and ``zero`` where the scheme has one). There is no kernel: the reference is traced, so that
Inductor fuses it into the norm or activation before (dynamic: it needs the row's maximum), or into the epilogue of the linear before (static).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.core.formats import encode
from qcompile.core.qtensor import tile
from qcompile.core.ranges import RANGES
from qcompile.core.scheme import GROUPS, Scheme

from .op import Op


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


OP = Op("quantize", "(Tensor x, Tensor[] range, str scheme) -> Tensor[]", reference, fake)
