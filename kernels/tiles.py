"""Pieces of Triton source that the templates share: how a tile of codes is loaded, decoded and scaled. Each piece is text made from a Scheme, so that
a new format needs a row in ``core/formats.py`` and nothing here.

A weight tile covers BLOCK_N rows (``rn``, taken modulo N) and 64 columns (``kk``, absolute). 64 columns are one half of a packed block of 128, so that a plane of
4 bits needs one load and one constant shift for each half.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from textwrap import indent

import torch

from qcompile.core.formats import Format
from qcompile.core.layouts import BLOCK, planes
from qcompile.core.scheme import Scheme

SUB = 64
"""Columns of one sub-tile: what one ``tl.dot`` consumes."""
TRITON_DTYPES = {torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.int8: "tl.int8"}


def triton_dtype(dtype: torch.dtype) -> str:
    """Spelling of a dtype in Triton source."""
    return TRITON_DTYPES[dtype]


def template_name(*parts: object) -> str:
    """An identifier for a template made from its parameters; it shows in profiles and in generated code."""
    return "qcompile_" + re.sub(r"\W+", "_", "_".join(str(p) for p in parts)).strip("_")


def load_codes(scheme: Scheme, even_k: bool) -> str:
    """Statements that set ``code`` (BLOCK_N, 64): raw unsigned codes (int32) of packed layouts, the stored dtype of plain ones. Needs W, rn, kk, h (0 or 1), k, K."""
    if scheme.packing == "plain":
        mask = "" if even_k else f", mask=kk[None, :] < K, other={0 if scheme.fmt.kind == 'int' else 0.0}"
        return f"code = tl.load(W + rn[:, None] * stride_wn + kk[None, :]{mask})"
    bits = scheme.fmt.bits
    lines = [f"block = (k // {BLOCK}) * {BLOCK * bits // 8}", f"column = h * {SUB} + tl.arange(0, {SUB})"]
    for i, (width, shift, start) in enumerate(planes(bits)):
        span = 16 * width
        byte = f"block + {start} + column % {span}" if span != SUB else f"block + {start} + tl.arange(0, {SUB})"
        place = f"(column // {span} * {width})[None, :]" if span != SUB else f"h * {width}"
        lines.append(f"plane{i} = tl.load(W + rn[:, None] * stride_wn + ({byte})[None, :]).to(tl.int32)")
        lines.append(f"plane{i} = (plane{i} >> {place}) & {2**width - 1}")
        lines.append(f"code = plane{i}" if i == 0 else f"code = code | (plane{i} << {shift})")
    return "\n".join(lines)


def decode(scheme: Scheme, dtype: str) -> str:
    """Statements that turn ``code`` into ``w`` in the Triton dtype ``dtype`` ("tl.float32", "tl.int8", ...), scales not applied."""
    fmt = scheme.fmt
    packed = scheme.packing != "plain"
    if fmt.kind == "int":
        signed = f"code = (code ^ {2 ** (fmt.bits - 1)}) - {2 ** (fmt.bits - 1)}\n" if packed and fmt.signed else ""
        return f"{signed}w = code.to({dtype})"
    if fmt.native is not None:
        return f"w = code.to({dtype})"
    if fmt.kind == "table":
        return f"w = {_select(fmt.values, 0, fmt.bits - 1)}.to({dtype})"
    return _minifloat(fmt) + f"\nw = w.to({dtype})"


def _select(values: tuple[float, ...], start: int, bit: int) -> str:
    """A balanced tree of selections over the bits of ``code``: four levels for 16 values, no memory."""
    if bit < 0:
        return repr(float(values[start])) if start < len(values) else "0.0"
    low, high = _select(values, start, bit - 1), _select(values, start + 2**bit, bit - 1)
    return f"tl.where((code & {2**bit}) != 0, {high}, {low})"


def _minifloat(fmt: Format) -> str:
    """The code's magnitude moved to the exponent and mantissa fields of float32, then rescaled by 2**(127 - bias): subnormals come out right by themselves."""
    sign, magnitude = 2 ** (fmt.bits - 1), 2 ** (fmt.bits - 1) - 1
    return (
        f"wide = code.to(tl.int32)\n"
        f"w = ((wide & {magnitude}) << {23 - fmt.man}).to(tl.float32, bitcast=True) * {2.0 ** (127 - fmt.bias)!r}\n"
        f"w = tl.where((wide & {sign}) != 0, -w, w)"
    )


def group_index(scheme: Scheme, n: int, k: int, name: str, columns: str, rows: str = "rn") -> str:
    """Address of the scale of each weight row of ``rows`` at ``columns`` (a scalar or a row vector expression): ``name`` is the pointer, strides are ``stride_<name>n``, 1."""
    r, c = scheme.extent(n, k)
    row = rows if r == 1 else f"({rows} // {r})"
    column = "0" if c >= k else f"({columns}) // {c}"
    if columns == "kk":
        return f"{name} + {row}[:, None] * stride_{name}n + ({column} + tl.zeros_like(kk))[None, :]"
    return f"{name} + {row} * stride_{name}n + {column}"


def whole_subtiles(scheme: Scheme, k: int) -> bool:
    """A sub-tile never straddles two groups, so that its scale can be applied to the product instead of to the weight."""
    c = scheme.extent(1, k)[1]
    return c >= k or c % SUB == 0


def block(text: str, by: int) -> str:
    """Indent statements by ``by`` levels of four spaces."""
    return indent(text, " " * 4 * by)


@dataclass(frozen=True)
class Loop:
    """The part of a template between its header and its store: pointer names beside X, W and S, and statements that leave the float32 tile in ``acc``."""

    pointers: tuple[str, ...]
    text: str

    def kernel(self, header: str, footer: str, *more: str) -> str:
        """A whole template: arguments, header, this loop, footer."""
        names = ", ".join(f'"{name}"' for name in ("X", "W", "S", *self.pointers, *more))
        strides = "".join(f'    stride_{name}n = {{{{stride("{name}", -2)}}}}\n' for name in self.pointers if name == "Z")
        return f"\n{{{{def_kernel({names})}}}}\n{header.strip(chr(10))}\n{strides}{self.text}{footer}"


ROWS = """\
    rm = ((pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M).to(tl.int64)
    rn = ((pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
"""

SWIZZLE = """
    grid_m = (M + BLOCK_M - 1) // BLOCK_M
    grid_n = (N + BLOCK_N - 1) // BLOCK_N
    # neighbouring programs share rows of X and of W in L2
    width = GROUP_M * grid_n
    group_id = pid // width
    group_size = min(grid_m - group_id * GROUP_M, GROUP_M)
    pid_m = group_id * GROUP_M + (pid % group_size)
    pid_n = (pid % width) // group_size
""" + ROWS

SIZES = """
    M = {{size("X", 0)}}
    K = {{size("X", 1)}}
    N = {{size("W", 0)}}
    if M * N == 0:
        return
    stride_xm = {{stride("X", 0)}}
    stride_wn = {{stride("W", 0)}}
    stride_Sn = {{stride("S", 0)}}
"""

HEADER = SIZES + "    pid = tl.program_id(0)\n" + SWIZZLE.lstrip("\n")

FOOTER = """
    idx_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    idx_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (idx_m < M) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""
