"""How one tensor is quantized, as a value with a spelling: ``Scheme.parse(str(s)) == s``.

A spelling reads ``format.group[.point|.min][.static][.layout][/scheme of the scales]``::

    int8.row                 one scale for each row (output channel, or token)
    int4.g128                one scale for each 128 columns of a row
    uint4.g128.point         the same with an integer zero point
    e4m3.b128x128            one scale for each block of 128 rows and 128 columns
    int8.tensor.static       one scale, fixed at calibration
    nf4.g64/int8.g256        scales themselves quantized ("double quantization")
    e2m1.g16/e4m3.tensor     NVFP4
    lut4.g64                 sixteen values of the tensor's own, fitted by Lloyd and Max's rule
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from .errors import OptionError, unknown
from .formats import FORMATS, Format, find
from .layouts import LAYOUTS

FULL = 0
"""A group that spans its whole axis."""
GROUPS = {"tensor": (FULL, FULL), "row": (1, FULL)}


@dataclass(frozen=True)
class Scheme:
    """Format, who shares a scale, zero point, static or dynamic range, quantized scales, and where the bits lie.

    ``group`` is (rows, columns) that share a scale; ``zero`` is "point" (integer zero point: ``(q - z) * s``) or "min" (``q * s - m``).
    ``layout`` empty means the default: packed where a code is narrower than a byte.
    """

    fmt: Format
    group: tuple[int, int] = (1, FULL)
    zero: Literal["none", "point", "min"] = "none"
    static: bool = False
    scale: Scheme | None = None
    layout: str = ""

    def __post_init__(self) -> None:
        if self.static and self.group != GROUPS["tensor"]:
            raise OptionError(f"scheme '{self}': a static range is one for the tensor; write '{self.fmt.name}.tensor.static'")
        if self.zero == "point" and self.fmt.kind != "int":
            raise OptionError(f"scheme '{self}': an integer zero point needs an integer format; 'min' works for every format")
        if self.layout == "planes" and self.fmt.bits == 8:
            raise OptionError(f"scheme '{self}': codes of 8 bits fill their bytes; 'planes' packs narrower ones")
        if self.scale is not None and self.scale.fmt.learned:
            raise OptionError(f"scheme '{self}': scales have no codebook of their own; {self.scale.fmt} is for weights")
        if self.scale is not None and self.scale.static:
            raise OptionError(f"scheme '{self}': scales have no static range; write '/{replace(self.scale, static=False)}'")
        if self.zero == "min" and self.fmt.lo != 0 and self.scale is not None and self.scale.fmt.lo == 0 and self.scale.zero == "none":
            raise OptionError(
                f"scheme '{self}': minima of {self.fmt} may be negative, which '{self.scale}' cannot hold; take an unsigned format for the weight or a signed one for the scales"
            )

    def __str__(self) -> str:
        named = next((name for name, group in GROUPS.items() if group == self.group), "")
        group = named or (f"g{self.group[1]}" if self.group[0] == 1 else f"b{self.group[0]}x{self.group[1]}")
        parts = [self.fmt.name, group, *([self.zero] if self.zero != "none" else []), *(["static"] if self.static else []), *([self.layout] if self.layout else [])]
        return ".".join(parts) + (f"/{self.scale}" if self.scale else "")

    @classmethod
    def parse(cls, spelling: str | Scheme) -> Scheme:
        """The scheme that a spelling names. Raises OptionError, which lists what exists."""
        if isinstance(spelling, Scheme):
            return spelling
        if not isinstance(spelling, str):
            raise OptionError(f"a scheme is a string such as 'int4.g128', not {spelling!r}")
        return _parse(spelling)

    @classmethod
    def _read(cls, spelling: str) -> Scheme:
        head, slash, tail = spelling.strip().lower().partition("/")
        name, *parts = head.split(".")
        fmt = find(name, where=f"scheme {spelling!r}")
        seen: dict[str, str] = {}
        changes: dict[str, Any] = {"scale": cls.parse(tail)} if slash else {}
        for part in parts:
            slot, change = _part(part, spelling)
            if slot in seen:
                raise OptionError(f"scheme {spelling!r} gives its {slot} twice: {seen[slot]!r} and {part!r}")
            seen[slot] = part
            changes |= change
        return cls(fmt, **changes)

    @property
    def packing(self) -> str:
        """Name of the layout in LAYOUTS that a stored weight of this scheme uses."""
        return self.layout or ("plain" if self.fmt.bits == 8 else "planes")

    def grid_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of ``shape`` (..., rows, columns); a ragged last group counts."""
        *lead, n, k = shape
        r, c = self.extent(n, k)
        return (*lead, math.ceil(n / r), math.ceil(k / c))

    def extent(self, n: int, k: int) -> tuple[int, int]:
        """The group in rows and columns on an (n, k) tensor: FULL resolved, a group larger than its axis cut to the axis."""
        r, c = self.group
        return min(r or n, n) or 1, min(c or k, k) or 1

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Bits that one element costs on a tensor of ``shape``: padding, scales (16 bits for groups, 32 for whole rows, unless quantized), zero points (8) and a codebook (32 a value) included, so that it is what memory holds."""
        grid = self.grid_shape(shape)
        meta = self.scale.bits_per_weight(grid) if self.scale else 32.0 if self.group[1] == FULL else 16.0
        zero = {"none": 0.0, "point": 8.0, "min": meta}[self.zero]
        stored = 8 * LAYOUTS[self.packing].row_bytes(shape[-1], self.fmt.bits) / max(shape[-1], 1)
        codebook = 32.0 * 2**self.fmt.bits / max(shape[-2] * shape[-1], 1) if self.fmt.learned else 0.0
        return stored + (meta + zero) * math.prod(grid) / max(math.prod(shape), 1) + codebook


@lru_cache(1024)  # ops parse their scheme on every call
def _parse(spelling: str) -> Scheme:
    return Scheme._read(spelling)


def _part(part: str, spelling: str) -> tuple[str, dict[str, Any]]:
    if part in GROUPS:
        return "group", {"group": GROUPS[part]}
    if m := re.fullmatch(r"g([1-9]\d*)", part):
        return "group", {"group": (1, int(m[1]))}
    if m := re.fullmatch(r"b([1-9]\d*)x([1-9]\d*)", part):
        return "group", {"group": (int(m[1]), int(m[2]))}
    if part in ("point", "min"):
        return "zero", {"zero": part}
    if part == "static":
        return "range", {"static": True}
    if part in LAYOUTS:
        return "layout", {"layout": part}
    raise unknown("part", part, ["tensor", "row", "g<columns>", "b<rows>x<columns>", "point", "min", "static", *LAYOUTS], f"scheme {spelling!r}")


__all__ = ["FORMATS", "FULL", "GROUPS", "Scheme"]
