"""A quantized tensor as a plain value, and the two functions that define what quantization means here.

``dequantize(quantize(x, s))`` is the reference that every kernel, solver and exporter is tested against.
Shapes: ``x`` is (..., N, K); the leading axes are independent (the experts of a mixture), groups tile the last two, a ragged last group is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .codebooks import fit_many
from .errors import OptionError, WeightError, unknown
from .formats import Format, decode, encode, fitted
from .layouts import LAYOUTS
from .ranges import RANGES, TINY
from .scheme import FULL, Scheme

GROUP_SCALE = torch.bfloat16
"""Stored scales of groups of columns: the range of float32 in 16 bits. Rounded to nearest, and codes are taken against the rounded scale. (Rounding up keeps a maximum from being clipped,
by at most 2**-9 of it, and costs twice the error: 3.7 % more of it for NF4 on a sentence encoder.)"""


def stored_dtype(scheme: Scheme) -> torch.dtype:
    """Dtype of stored scales: float32 where one serves a whole row or more, and costs nothing; else GROUP_SCALE."""
    return torch.float32 if scheme.group[1] == FULL else GROUP_SCALE


@dataclass
class QTensor:
    """Packed ``codes``, ``scale`` (..., grid), ``zero`` (integer points as uint8 or int8, or minima), the scheme, and K, which packing may have padded; ``codebook`` (..., 2**bits) float32,
    the values of a learned format."""

    codes: Tensor
    scale: Tensor | QTensor
    zero: Tensor | QTensor | None
    scheme: Scheme
    k: int
    codebook: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape (..., N, K)."""
        return (*self.codes.shape[:-1], self.k)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(t.nbytes for t in self.flatten())

    def flatten(self) -> list[Tensor]:
        """The plain tensors, in the order that ``unflatten`` takes: codes, scale..., zero..., codebook."""
        return [self.codes, *_flat(self.scale), *(_flat(self.zero) if self.zero is not None else []), *([self.codebook] if self.codebook is not None else [])]

    @staticmethod
    def unflatten(tensors: Sequence[Tensor], scheme: Scheme, k: int) -> QTensor:
        """Inverse of ``flatten``; ``k`` is the logical length of the last axis."""
        return _build(iter(tensors), scheme, k)


def _flat(part: Tensor | QTensor) -> list[Tensor]:
    return part.flatten() if isinstance(part, QTensor) else [part]


def _build(tensors: Iterator[Tensor], scheme: Scheme, k: int) -> QTensor:
    codes = next(tensors)
    columns = scheme.extent(codes.shape[-2], k)[1]

    def nested() -> Tensor | QTensor:
        return _build(tensors, scheme.scale, -(-k // columns)) if scheme.scale else next(tensors)

    scale = nested()
    zero = None if scheme.zero == "none" else next(tensors) if scheme.zero == "point" else nested()
    return QTensor(codes, scale, zero, scheme, k, next(tensors) if scheme.fmt.learned else None)


def tile(x: Tensor, group: tuple[int, int]) -> Tensor:
    """(..., N, K) as (..., N/r, r, K/c, c); a ragged last group is filled with zeros, which leave every range that holds zero as it is."""
    r, c = group
    n, k = x.shape[-2:]
    if n % r or k % c:
        x = F.pad(x, (0, -k % c, 0, -n % r))
    t: Tensor = x.unflatten(-1, (-1, c)).unflatten(-3, (-1, r))
    return t


def untile(t: Tensor, n: int, k: int) -> Tensor:
    """Inverse of ``tile``; contiguous, as the ops' shape rules promise."""
    return t.flatten(-2).flatten(-3, -2)[..., :n, :k].contiguous()


def quantize(x: Tensor, scheme: Scheme, *, rule: str = "absmax", name: str = "", scale_dtype: torch.dtype | None = None) -> QTensor:
    """Round to nearest. ``x``: (..., N, K), any float dtype, at least 2-D. Raises WeightError, naming ``name``, where ``x`` is not finite or the format has no sign for it."""
    if scheme.fmt.learned:
        return _on_codebooks(x, scheme, rule, name, scale_dtype)
    if x.numel() > PIECE and len(x) > 1 and type(x) in (Tensor, torch.nn.Parameter) and (x.dim() > 2 or by_rows(scheme)):
        return _in_pieces(x, scheme, rule, name, scale_dtype)
    _check(x, scheme, f"parameter {name or '(unnamed)'} of shape {tuple(x.shape)}")
    t = tile(x.detach().float(), scheme.extent(*x.shape[-2:]))
    return assign(t, *RANGES[rule](t, scheme, (-3, -1)), scheme, x.shape, name, scale_dtype)


PIECE = 2**22
"""Elements that are quantized at a time where rows do not depend on each other: what is computed in float32 on the way is several times as large as a weight of 16 bits."""


def by_rows(scheme: Scheme) -> bool:
    """No group, and no group of scales, spans rows."""
    return scheme.group[0] == 1 and (scheme.scale is None or by_rows(scheme.scale))


def _in_pieces(x: Tensor, scheme: Scheme, rule: str, name: str, scale_dtype: torch.dtype | None) -> QTensor:
    """``quantize`` along the first axis, bit for bit the same; pieces go to their place as they are made."""
    whole: list[Tensor] = []
    try:
        for at in range(0, len(x), step := max(1, PIECE * len(x) // x.numel())):
            parts = quantize(x[at : at + step], scheme, rule=rule, name=name, scale_dtype=scale_dtype).flatten()
            whole = whole or [part.new_empty((len(x), *part.shape[1:])) for part in parts]
            for tensor, part in zip(whole, parts, strict=True):
                tensor[at : at + step] = part
    except WeightError:
        _check(x, scheme, f"parameter {name or '(unnamed)'} of shape {tuple(x.shape)}")  # names the place in all of it
        raise
    return QTensor.unflatten(whole, scheme, x.shape[-1])


def _on_codebooks(x: Tensor, scheme: Scheme, rule: str, name: str, scale_dtype: torch.dtype | None) -> QTensor:
    """``quantize`` for a learned format: each (N, K) has a codebook of its own. Of a tensor without values only shapes are asked for."""
    if type(x) not in (Tensor, torch.nn.Parameter):
        plain = quantize(x, replace(scheme, fmt=replace(scheme.fmt, kind="table", values=(-1.0, 1.0))), rule=rule, name=name, scale_dtype=scale_dtype)
        return QTensor(plain.codes, plain.scale, plain.zero, scheme, plain.k, x.new_empty((*x.shape[:-2], 2**scheme.fmt.bits), dtype=torch.float32))
    if x.dim() > 2 and x.numel():
        parts = [quantize(part, scheme, rule=rule, name=name, scale_dtype=scale_dtype) for part in x]
        return QTensor.unflatten([torch.stack(t) for t in zip(*(part.flatten() for part in parts))], scheme, parts[0].k)
    g = grid(x, scheme, rule=rule, name=name, scale_dtype=scale_dtype)
    return from_codes(encode(scaled(x, g), g.fmt), g)


def _check(x: Tensor, scheme: Scheme, what: str) -> None:
    if x.dim() < 2 or x.numel() == 0:
        raise WeightError(f"{what} cannot be quantized: a weight is (..., N, K) and holds values")
    if type(x) not in (Tensor, torch.nn.Parameter):  # a tensor without values: only shapes are asked for
        return
    if not bool(torch.isfinite(x).all()):
        bad = ~torch.isfinite(x)
        first = tuple(bad.nonzero()[0].tolist())
        raise WeightError(f"{what} has {int(bad.sum())} values that are NaN or infinite, the first at {first}; it cannot be quantized")
    if scheme.zero == "none" and scheme.fmt.lo == 0 and bool((x < 0).any()):
        raise WeightError(f"{what} has negative values, which {scheme} cannot hold; give the scheme a zero ('point' or 'min') or a signed format")


def assign(t: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, shape: Sequence[int], name: str = "", scale_dtype: torch.dtype | None = None) -> QTensor:
    """Codes of the tiled values ``t`` under a given scale and zero (both (..., N/r, 1, K/c, 1)); stores the scale first, so that codes match what is stored."""
    n, k = shape[-2:]
    stored = _store(scale, scheme, name, scale_dtype)
    s = value(stored).clamp(min=TINY)[..., :, None, :, None]  # a quantized scale may have become zero; its group then reads as zeros
    held: Tensor | QTensor | None = None
    if zero is None:
        y = t / s
    elif scheme.zero == "min":
        held = _store(zero, scheme, name, scale_dtype)
        y = (t + value(held)[..., :, None, :, None]) / s
    else:
        held = zero[..., :, 0, :, 0].to(scheme.fmt.dtype)
        y = t / s + zero
    codes = untile(encode(y, scheme.fmt), n, k)
    return QTensor(pack(codes, scheme), stored, held, scheme, k)


def _store(scale: Tensor, scheme: Scheme, name: str, dtype: torch.dtype | None) -> Tensor | QTensor:
    flat = scale[..., :, 0, :, 0]  # (..., N/r, K/c)
    if scheme.scale is not None:
        return quantize(flat, scheme.scale, name=f"scales of {name}", scale_dtype=dtype)
    dtype = dtype or stored_dtype(scheme)
    most = torch.finfo(dtype).max
    flat = flat.clamp(-most, most)
    if dtype == torch.bfloat16 and type(flat) not in (Tensor, torch.nn.Parameter):  # Inductor computes through casts to 16 bits and back as if they were not there
        flat = nearest(flat.float(), 16)
    return flat.to(dtype).contiguous()


def nearest(x: Tensor, drop: int) -> Tensor:
    """Finite float32 values rounded to the nearest one whose last ``drop`` bits are zero, ties to even: 16 for bfloat16, 13 for float16 above its subnormal values."""
    bits = x.view(torch.int32)
    return ((bits + ((1 << drop - 1) - 1) + ((bits >> drop) & 1)) & -(1 << drop)).view(torch.float32)


def pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes as ``encode`` gives them -> storage. Plain layouts keep the format's own dtype."""
    if scheme.packing == "plain":
        return codes.contiguous()
    bits = scheme.fmt.bits
    return LAYOUTS[scheme.packing].pack(codes.view(torch.uint8) & (2**bits - 1), bits)


def unpack(q: QTensor) -> Tensor:
    """Storage -> codes as ``encode`` gives them, (..., N, K)."""
    fmt = q.scheme.fmt
    if q.scheme.packing == "plain":
        return q.codes
    raw = LAYOUTS[q.scheme.packing].unpack(q.codes, fmt.bits, q.k)
    if fmt.kind == "int" and fmt.signed:
        return ((raw << (8 - fmt.bits)).view(torch.int8) >> (8 - fmt.bits)).contiguous()  # sign-extend
    return raw


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values, (..., N, K): ``q * s``, ``(q - z) * s`` or ``q * s - m``, computed in float32."""
    n, k = q.shape[-2:]
    r, c = group = q.scheme.extent(n, k)
    codes = unpack(q)
    t = decode(codes, q.scheme.fmt) if q.codebook is None else q.codebook.float().gather(-1, codes.flatten(-2).long()).view(codes.shape)
    ragged = n % r != 0 or k % c != 0
    if not ragged:
        t = tile(t, group)

    def by_element(part: Tensor | QTensor) -> Tensor:
        return spread(value(part), group, n, k) if ragged else value(part)[..., :, None, :, None]

    s = by_element(q.scale)
    if q.zero is None:
        t = t * s
    elif q.scheme.zero == "min":
        t = t * s - by_element(q.zero)
    else:
        t = (t - by_element(q.zero)) * s
    return t.to(dtype) if ragged else untile(t.to(dtype), n, k)  # cast before the copy: Inductor stores what a copy reads, and makes one kernel of this


def spread(part: Tensor, group: tuple[int, int], n: int, k: int) -> Tensor:
    """Scales or zeros (..., N/r, K/c) repeated for each element, (..., N, K), by index: padding and cutting a ragged last group is miscompiled by Inductor's C++ (seen in torch 2.13)."""
    r, c = group
    rows, columns = torch.arange(n, device=part.device) // r, torch.arange(k, device=part.device) // c
    return part.index_select(-2, rows).index_select(-1, columns)


def repeated(part: Tensor, group: tuple[int, int], n: int, k: int) -> Tensor:
    """``spread`` without an index, which a training graph would keep for its backward, where Inductor's C++ checks what lies beyond the end of a row, too; it miscompiles cutting a repeated last
    group as well (both seen in torch 2.13), so that this is put behind the whole ones."""
    for axis, size, step in ((-1, k, group[1]), (-2, n, group[0])):
        whole = size // step
        some, last = part.narrow(axis, 0, whole).unsqueeze(axis), part.narrow(axis, whole, part.shape[axis] - whole)
        parts = [some.expand(*(step if d == axis else -1 for d in range(-some.dim(), 0))).flatten(axis - 1, axis)] if whole else []
        if last.shape[axis]:
            parts.append(last.expand(*(size - whole * step if d == axis else -1 for d in range(-last.dim(), 0))))
        part = parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    return part.contiguous() if type(part) is Tensor else part  # as ``spread``, which owns its memory; a graph fuses the views


def value(part: Tensor | QTensor) -> Tensor:
    """Scales or zeros as float32, (..., N/r, K/c)."""
    return dequantize(part) if isinstance(part, QTensor) else part.float()


@dataclass(frozen=True)
class Grid:
    """Where the values of a tensor of ``shape`` (..., N, K) may lie: its scale and zero as they are stored (..., N/r, K/c), before codes are chosen.

    A solver takes codes against a grid and never against the scale that a rule asked for, so that what it weighs is what ``dequantize`` will give.
    """

    scale: Tensor | QTensor
    zero: Tensor | QTensor | None
    scheme: Scheme
    shape: tuple[int, ...]
    codebook: Tensor | None = None

    @property
    def fmt(self) -> Format:
        """The format of the codes: the scheme's, of a learned one with the values that were fitted."""
        return self.scheme.fmt if self.codebook is None else fitted(self.scheme.fmt, self.codebook)

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Scale (at least TINY, as ``assign`` divides by it) and zero, float32 (..., N/r, K/c)."""
        return value(self.scale).clamp(min=TINY), None if self.zero is None else value(self.zero)

    def elements(self) -> tuple[Tensor, Tensor | None]:
        """The same for each element, (..., N, K)."""
        n, k = self.shape[-2:]
        group = self.scheme.extent(n, k)
        scale, zero = self.parts()
        return repeated(scale, group, n, k), None if zero is None else repeated(zero, group, n, k)


def find_range(x: Tensor, scheme: Scheme, rule: str = "absmax") -> tuple[Tensor, Tensor | None]:
    """Scale and zero that ``rule`` asks for, float32 (..., N/r, K/c), before they are stored. Raises OptionError for an unknown rule."""
    if rule not in RANGES:
        raise unknown("range rule", rule, RANGES)
    scale, zero = RANGES[rule](tile(x.detach().float(), scheme.extent(*x.shape[-2:])), scheme, (-3, -1))
    return scale[..., :, 0, :, 0], None if zero is None else zero[..., :, 0, :, 0]


def grid_of(scale: Tensor, zero: Tensor | None, scheme: Scheme, shape: Sequence[int], name: str = "", scale_dtype: torch.dtype | None = None) -> Grid:
    """The grid that stores ``scale`` and ``zero``, float32 (..., N/r, K/c), for a tensor of ``shape``. Raises OptionError for a learned format: its values are fitted under scales that are settled."""
    if scheme.fmt.learned:
        raise OptionError(f"scheme '{scheme}': the values of {scheme.fmt} are fitted to the whole weight, so that its scales cannot be searched; take rtn, lloyd_max, adaround, or gptq without clip")
    return _grid(scale, zero, scheme, shape, name, scale_dtype)


def _grid(scale: Tensor, zero: Tensor | None, scheme: Scheme, shape: Sequence[int], name: str, scale_dtype: torch.dtype | None) -> Grid:
    stored = _store(scale[..., :, None, :, None], scheme, name, scale_dtype)
    held: Tensor | QTensor | None = None
    if zero is not None:
        held = _store(zero[..., :, None, :, None], scheme, name, scale_dtype) if scheme.zero == "min" else zero.to(scheme.fmt.dtype)
    return Grid(stored, held, scheme, tuple(shape))


def grid(x: Tensor, scheme: Scheme, *, rule: str = "absmax", name: str = "", scale_dtype: torch.dtype | None = None, importance: Tensor | None = None) -> Grid:
    """The grid on which ``quantize(x, scheme, rule=rule)`` rounds; raises the same errors. ``x`` (..., N, K), of a learned format (N, K), whose values are fitted here;
    ``importance`` (K,) then says what an error in each column counts."""
    _check(x, scheme, f"parameter {name or '(unnamed)'} of shape {tuple(x.shape)}")
    g = _grid(*find_range(x, scheme, rule), scheme, x.shape, name, scale_dtype)
    return replace(g, codebook=fit_many(scaled(x, g), scheme.fmt.bits, importance)) if scheme.fmt.learned else g


def scaled(x: Tensor, g: Grid) -> Tensor:
    """``x`` (..., N, K) in the units of the format, float32: ``encode`` of it is rounding to nearest, bit for bit as ``quantize`` rounds."""
    x = x.detach().float()
    s, z = g.elements()
    if z is None:
        return x / s
    return (x + z) / s if g.scheme.zero == "min" else x / s + z


def unscaled(y: Tensor, g: Grid) -> Tensor:
    """Inverse of ``scaled``, on values that codes mean: what ``dequantize`` gives for them, float32 (..., N, K)."""
    s, z = g.elements()
    if z is None:
        return y * s
    return y * s - z if g.scheme.zero == "min" else (y - z) * s


def rounded(x: Tensor, g: Grid) -> Tensor:
    """``x`` rounded to nearest on a grid, float32: what ``dequantize`` gives of its codes, without the packing."""
    return unscaled(decode(encode(scaled(x, g), g.fmt), g.fmt), g)


def from_codes(codes: Tensor, g: Grid) -> QTensor:
    """``codes`` (..., N, K) as ``encode`` gives them, on a grid."""
    return QTensor(pack(codes.contiguous(), g.scheme), g.scale, g.zero, g.scheme, g.shape[-1], g.codebook)


def split_rows(q: QTensor, sizes: Sequence[int]) -> list[QTensor]:
    """A QTensor whose groups do not span rows (at any level of its scales), cut along N into pieces of ``sizes`` rows that own their memory."""
    pieces = zip(*(t.split(list(sizes), -2) for t in q.flatten()))
    return [QTensor.unflatten([t.clone() for t in piece], q.scheme, q.k) for piece in pieces]
