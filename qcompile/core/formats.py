"""Number formats as data: one row per format, one ``encode``, one ``decode``.

A format of at most 8 bits is an integer grid, a minifloat (five numbers describe it) or a table of values (NF4, FP4); or "learned", a table that every tensor brings its own values for
(``LEARNED``): ``fitted`` makes of it and of these values the format that codes are taken in.
A code is an integer; ``decode`` gives its value. Invariants, each tested for every row: ``encode(decode(c)) == c`` up to the sign of zero,
``encode`` is monotone, and what lies outside the range saturates. Ties go to the even code, as in IEEE 754; in a table to the lower one, as in bitsandbytes.
NaN stays NaN where a native format has a code for it and is zero elsewhere, on every device.

>>> int(encode(torch.tensor(300.0), FORMATS["int8"]))
127
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .codebooks import BNB_FP4, NF4
from .errors import unknown


@dataclass(frozen=True)
class Format:
    """One number format.

    ``specials`` counts the codes that a minifloat loses at its top: none, one NaN (``e4m3`` of OCP FP8) or a whole exponent (IEEE, ``e5m2``).
    ``native`` is the torch dtype that stores exactly these codes, if there is one. ``exponent_bias`` is None where a minifloat has IEEE 754's, ``2**(exp - 1) - 1``.
    """

    name: str
    bits: int
    kind: Literal["int", "float", "table", "learned"]
    signed: bool = True
    exp: int = 0
    specials: Literal["none", "nan", "ieee"] = "none"
    values: tuple[float, ...] = ()
    native: torch.dtype | None = None
    exponent_bias: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def man(self) -> int:
        """Mantissa bits of a minifloat."""
        return self.bits - self.signed - self.exp

    @property
    def bias(self) -> int:
        """Of a minifloat: a code with exponent bits ``e > 0`` and mantissa ``1.m`` is worth ``1.m * 2**(e - bias)``."""
        return 2 ** (self.exp - 1) - 1 if self.exponent_bias is None else self.exponent_bias

    @property
    def lo(self) -> float:
        """The least representable value."""
        if self.kind == "int":
            return -(2.0 ** (self.bits - 1)) if self.signed else 0.0
        if self.kind == "learned":
            return -1.0
        return self.values[0] if self.kind == "table" else -self.hi

    @property
    def hi(self) -> float:
        """The greatest representable value; a symmetric scale maps the absolute maximum here."""
        if self.kind == "learned":
            return 1.0
        return 2.0 ** (self.bits - self.signed) - 1 if self.kind == "int" else numbers(self)[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Storage of one unpacked code."""
        return self.native or (torch.int8 if self.kind == "int" and self.signed else torch.uint8)

    @property
    def learned(self) -> bool:
        """Each tensor has its own table of values, fitted to it after division by its scales: these map the absolute maximum to 1."""
        return self.kind == "learned"

    @property
    def integral(self) -> bool:
        """Codes are themselves the values, so that integer dot products apply."""
        return self.kind == "int"


def fitted(fmt: Format, codebook: Tensor) -> Format:
    """The table of one tensor: a learned format with its values, (2**bits,) float32, ascending."""
    return replace(fmt, kind="table", values=tuple(codebook.tolist()))


@lru_cache(1024)
def numbers(fmt: Format) -> tuple[float, ...]:
    """Representable values, ascending; of a minifloat only the non-negative half, so that index equals magnitude code."""
    if fmt.kind == "int":
        low = -(2 ** (fmt.bits - 1)) if fmt.signed else 0
        return tuple(float(low + i) for i in range(2**fmt.bits))
    if fmt.learned:
        raise AssertionError(f"{fmt} has no values before they are fitted")
    if fmt.kind == "table":
        return fmt.values
    bias, steps = fmt.bias, 2**fmt.man
    values = [m / steps * 2.0 ** (1 - bias) if e == 0 else (1 + m / steps) * 2.0 ** (e - bias) for e in range(2**fmt.exp) for m in range(steps)]
    lost = {"none": 0, "nan": 1, "ieee": steps}[fmt.specials]
    return tuple(values[: len(values) - lost])


def grid(fmt: Format) -> Tensor:
    """``numbers`` as a float32 tensor on the CPU."""
    return torch.tensor(numbers(fmt), dtype=torch.float32)


@lru_cache(1024)
def table(fmt: Format) -> Tensor:
    """Value of each code, (2**bits,) float32 on the CPU, indexed by the code read as unsigned. Codes that no value has (NaN, unused) read as NaN, or 0 in a table."""
    out = torch.zeros(2**fmt.bits)
    if fmt.kind == "int":
        out[grid(fmt).long() % 2**fmt.bits] = grid(fmt)
    elif fmt.kind == "table":
        out[: len(fmt.values)] = grid(fmt)
    else:
        half = torch.full((2 ** (fmt.bits - 1),), float("nan"))
        half[: len(grid(fmt))] = grid(fmt)
        if fmt.specials == "ieee":
            half[len(grid(fmt))] = float("inf")
        out = torch.cat([half, -half])
    return out


def encode(x: Tensor, fmt: Format) -> Tensor:
    """Nearest code of each value, in ``fmt.dtype``; ties to the even code, out of range saturates. ``x`` is any float dtype and any shape."""
    x = x.float()
    if fmt.kind == "float" and fmt.native is not None:
        return x.clamp(fmt.lo, fmt.hi).to(fmt.native)
    x = torch.where(x == x, x, 0.0)  # NaN is 0. Inductor makes vectors of this on a CPU, not of isnan
    if fmt.kind == "int":
        return x.round().clamp(fmt.lo, fmt.hi).to(fmt.dtype)
    if fmt.kind == "table":
        middle = [(a + b) / 2 for a, b in pairwise(fmt.values)]
        if type(x) is Tensor:
            return torch.bucketize(x.contiguous(), torch.tensor(middle, device=x.device)).to(torch.uint8)
        return sum(((x > m).to(torch.uint8) for m in middle), torch.zeros_like(x, dtype=torch.uint8))  # traced: pointwise, no constant tensor
    return _encode_minifloat(x, fmt)


def _encode_minifloat(x: Tensor, fmt: Format) -> Tensor:
    """code = n + (e - e_min) * 2**man, where n = |x| / 2**(e - man) rounded to even; below the least normal exponent e_min, e is e_min.

    A carry out of n moves on to the next binade by itself. Exponents are read and made in the bits of float32. Without mantissa bits the parity of n says
    nothing about the code's, so that ties (n = 1.5) are decided by the exponent.
    """
    magnitude = x.abs().clamp(max=fmt.hi)
    least = 1 - fmt.bias
    e = ((magnitude.view(torch.int32) >> 23) - 127).clamp(min=least)
    step = ((e - fmt.man + 127) << 23).view(torch.float32)
    ratio = magnitude / step
    n = ratio.round().to(torch.int32)
    if fmt.man == 0:
        n = n - ((ratio == 1.5) & ((e - least) % 2 == 1)).to(torch.int32)
    code = n + ((e - least) << fmt.man)
    sign = torch.signbit(x).to(torch.int32) << (fmt.bits - 1)
    return (code + sign).to(torch.uint8)


def decode(codes: Tensor, fmt: Format) -> Tensor:
    """Value of each code, float32. ``codes`` as ``encode`` gives them."""
    if fmt.kind == "int" or fmt.native is not None:
        return codes.float()
    if type(codes) is Tensor:
        return table(fmt).to(codes.device)[codes.int()]
    if fmt.kind == "table":  # traced: a tree of selections, no constant tensor
        return _select(codes, fmt.values, fmt.bits - 1)
    magnitude = (codes & (2 ** (fmt.bits - 1) - 1)).to(torch.int32)
    e, m = magnitude >> fmt.man, magnitude & (2**fmt.man - 1)
    power = ((e.clamp(min=1) - fmt.bias - fmt.man + 127) << 23).view(torch.float32)
    value = torch.where(e == 0, m, m + 2**fmt.man).float() * power
    return torch.where((codes >> (fmt.bits - 1)) > 0, -value, value)


def _select(codes: Tensor, values: Sequence[float], bit: int) -> Tensor:
    """``values[codes]`` by the bits of the codes, from ``bit`` down: half as many operations as a question for every code. Codes beyond the values give zero."""
    half, zero = 1 << bit, torch.zeros((), dtype=torch.float32, device=codes.device)
    low, high = (_select(codes, part, bit - 1) if bit and part else torch.full_like(zero, part[0]) if part else zero for part in (values[:half], values[half : 2 * half]))
    return torch.where((codes & half) != 0, high, low)


def find(name: str, where: str = "") -> Format:
    """The row called ``name``; raises OptionError with the list of rows."""
    if name not in FORMATS and name not in LEARNED:
        raise unknown("format", name, [*FORMATS, *LEARNED], where)
    return FORMATS.get(name) or LEARNED[name]


def _float(name: str, specials: Literal["none", "nan", "ieee"] = "none", native: torch.dtype | None = None) -> Format:
    """A row from its name: e<exponent bits>m<mantissa bits>, then b<bias> where that is not IEEE 754's."""
    exp, man = int(name[1]), int(name[3])
    return Format(name, 1 + exp + man, "float", exp=exp, specials=specials, native=native, exponent_bias=int(name[5:]) if name[4:] else None)


_ROWS = (
    *(Format(f"int{b}", b, "int", native=torch.int8 if b == 8 else None) for b in range(2, 9)),
    *(Format(f"uint{b}", b, "int", signed=False, native=torch.uint8 if b == 8 else None) for b in range(2, 9)),
    _float("e4m3", "nan", torch.float8_e4m3fn),  # OCP 8-bit floating point specification, 2022: both dtypes
    _float("e5m2", "ieee", torch.float8_e5m2),
    # HFP8 (Sun et al. 2019), forward: 1-4-3 with 4 added to the bias of 7, so that 30 is the greatest value. Its backward format, 1-5-2, is e5m2. Subnormals (down to 2**-13) as in
    # float8_e4m3b11fnuz of LLVM and ml_dtypes, which cites that paper and has NaN where -0 is here; IBM's fms-model-optimizer can also do without (its least is then 1.125 * 2**-11).
    _float("e4m3b11"),
    *map(_float, ("e3m4", "e2m5", "e3m2", "e2m3", "e2m1", "e1m2", "e3m0")),  # LLM-FP4 (Liu et al. 2023) and OCP MX v1.0: no code is lost
    Format("nf4", 4, "table", values=NF4),
    Format("fp4", 4, "table", values=BNB_FP4),
    Format("ternary", 2, "table", values=(-1.0, 0.0, 1.0)),  # Li et al. 2016 (arXiv 1605.04711); log2(3) bits of information in two of storage
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
LEARNED: dict[str, Format] = {f"lut{b}": Format(f"lut{b}", b, "learned") for b in (2, 3, 4)}
"""Formats of weights whose values are fitted to each tensor by Lloyd and Max's rule (``codebooks``), and stored beside its codes."""
