"""Quantized linear layers on the CPU: C++ kernels on plain tensors, compiled at their first use.

Weights are logically (N, K), K contiguous. 8-bit codes: one byte each, (N, K). 4-bit codes: (N, KP / 2) bytes with KP = K rounded up
to 128; in every block of 128 columns, byte j holds column j in its low nibble and column j + 64 in its high one.
Scales are float32 (N, G): `group` columns each, a multiple of 16 (the last group may be shorter); G = 1 is one scale per row.
All functions raise NoCompiler where there is no C++ compiler.
"""

import functools
import os
from ctypes import CDLL, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .build import NoCompiler, load_cpp

__all__ = ["NoCompiler", "dequantize", "int4_int8_linear", "int8_linear", "isa", "table_linear"]

_FLAGS = {
    "avx512_vnni": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "scalar": (),
}
_KINDS = {torch.int8: 1, torch.uint8: 2, torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}  # enum Kind in table.cpp; 0 and 5 have a table
_FEW_ROWS = {"avx512_vnni": 64, "avx2": 24, "scalar": 8}  # up to here table_linear multiplies codes; beyond, it dequantizes blocks
_WAYS = {None: 0, "dot": 1, "panel": 2}  # of qc_int_linear
_BLOCK = 1 << 22  # weights that are dequantized at once, for many rows of x: 16 MB. (In smaller blocks threads meet too often on a busy machine.)


def supported() -> tuple[str, ...]:
    """The instruction sets that this machine has, best first."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        info = ""
    line = next((line for line in info.splitlines() if line.startswith("flags")), "")  # none: not x86
    has = {"-m" + flag.replace("avx512_", "avx512") for flag in line.split()}
    return tuple(name for name, flags in _FLAGS.items() if has.issuperset(flags))


@functools.cache
def isa() -> str:
    """The instruction set of the kernels: "avx512_vnni", "avx2" or "scalar" (any machine). QCOMPILE_CPU_ISA overrides."""
    forced = os.environ.get("QCOMPILE_CPU_ISA")
    if forced and forced not in _FLAGS:
        raise ValueError(f"QCOMPILE_CPU_ISA={forced}: known are {', '.join(_FLAGS)}")
    return forced or supported()[0]


@functools.cache
def integer_library() -> CDLL:
    """The int8 kernels, compiled at their first use."""
    library = load_cpp(_source("isa") + _source("integer"), (*_FLAGS[isa()], "-O3"))
    library.qc_int_linear.argtypes = [c_int, *[c_void_p] * 5, *[c_int64] * 4, c_int, c_int]
    library.qc_int_linear.restype = None
    return library


@functools.cache
def table_library() -> CDLL:
    """The table kernels, compiled at their first use."""
    library = load_cpp(_source("isa") + _source("table"), _FLAGS[isa()])
    library.qc_table_linear.argtypes = [c_int, *[c_void_p] * 6, *[c_int64] * 4, c_int]
    library.qc_dequantize.argtypes = [c_int, *[c_void_p] * 5, c_int, *[c_int64] * 3, c_int]
    library.qc_table_linear.restype = library.qc_dequantize.restype = None
    return library


def _source(name: str) -> str:
    return (Path(__file__).parent / f"{name}.cpp").read_text()


def _check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{name}: expected a contiguous {dtype} {shape} on the CPU, got {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}")


def _group(scale: Tensor, K: int, group: int | None) -> int:
    """How many columns share a scale; checked against the number of scales."""
    groups = scale.shape[1]
    if groups == 1:
        return K
    if group is None or group % 16 or -(-K // group) != groups:
        raise ValueError(f"{groups} scales per row of {K} columns do not fit group={group} (a multiple of 16)")
    return group


def _packed(K: int) -> int:
    return -(-K // 128) * 64


def _int_linear(bits: int, xq: Tensor, sx: Tensor, codes: Tensor, sw: Tensor, group: int | None, way: str | None) -> Tensor:
    M, K = xq.shape
    N, G = sw.shape
    _check("xq", xq, torch.int8, M, K)
    _check("sx", sx, torch.float32, M)
    if bits == 8:
        _check("codes", codes, torch.int8, N, K)
    else:
        _check("codes", codes, torch.uint8, N, _packed(K))
    _check("sw", sw, torch.float32, N, G)
    group = _group(sw, K, group)
    if group >= 1 << 17:
        raise ValueError(f"group={group}: a sum of 2**17 products of codes does not fit 32 bits")
    y = torch.empty((M, N), dtype=torch.float32)
    integer_library().qc_int_linear(bits, xq.data_ptr(), sx.data_ptr(), codes.data_ptr(), sw.data_ptr(), y.data_ptr(), M, N, K, group, torch.get_num_threads(), _WAYS[way])
    return y


def int8_linear(xq: Tensor, sx: Tensor, wq: Tensor, sw: Tensor, group: int | None = None, way: str | None = None) -> Tensor:
    """y[m,n] = sx[m] * sum_g sw[n,g] * sum_{k in g} xq[m,k] * wq[n,k], inner sums exact. -> float32 (M, N)

    xq: int8 (M, K); sx: float32 (M,); wq: int8 (N, K); sw: float32 (N, G). All codes from -128 to 127.
    way: "dot" (few rows) or "panel" (many); None chooses. "dot" needs G = 1 or groups that are multiples of 64, and is ignored elsewhere.
    """
    return _int_linear(8, xq, sx, wq, sw, group, way)


def int4_int8_linear(xq: Tensor, sx: Tensor, codes: Tensor, sw: Tensor, group: int | None = None, way: str | None = None) -> Tensor:
    """int8_linear with 4-bit weights: codes uint8 (N, KP / 2), every nibble a two's complement int4."""
    return _int_linear(4, xq, sx, codes, sw, group, way)


def _weight(codes: Tensor, table: Tensor | None, scale: Tensor, offset: Tensor | None, K: int, group: int | None) -> tuple[int, int, int, Tensor | None, Tensor | None]:
    """Check a weight in codes. -> kind (table.cpp), bytes per row, group, and the pointers to its table and offset."""
    N, G = scale.shape
    if table is not None and table.numel() == 16:
        kind, width = 0, _packed(K)
        _check("codes", codes, torch.uint8, N, width)
    else:
        kind, width = 5 if table is not None else _KINDS.get(codes.dtype, 0), K
        _check("codes", codes, torch.uint8 if table is not None or not kind else codes.dtype, N, K)
        if table is None and kind > 2 and isa() == "scalar":
            table = _values(codes.dtype)
    if table is not None:
        _check("table", table, torch.float32, 256 if kind else 16)
    _check("scale", scale, torch.float32, N, G)
    if offset is not None:
        _check("offset", offset, torch.float32, N, G)
    return kind, width, _group(scale, K, group), table, offset


@functools.cache
def _values(dtype: torch.dtype) -> Tensor:
    """The 256 values of an 8-bit float format."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def table_linear(x: Tensor, codes: Tensor, table: Tensor | None, scale: Tensor, offset: Tensor | None = None, group: int | None = None) -> Tensor:
    """y = x @ w.T with w[n,k] = scale[n,g] * value(code[n,k]) + offset[n,g], in float32. -> (M, N) in x's dtype

    x: (M, K), any float dtype. The codes are
      4-bit, packed uint8 (N, KP / 2): `table` holds the 16 values (for int4: 0..7, -8..-1);
      8-bit, uint8 (N, K):             `table` holds the 256 values;
      8-bit, (N, K), without a table:  int8 and uint8 mean integers; float8_e4m3fn and float8_e5m2 what they say.
    With few rows of x the codes are multiplied as they are read; with many, blocks of w are dequantized and given to torch.mm.
    """
    M, K = x.shape
    N, G = scale.shape
    kind, width, group, table, offset = _weight(codes, table, scale, offset, K, group)
    dtype, x = x.dtype, x.to(torch.float32).contiguous()
    y = torch.empty((M, N), dtype=torch.float32)
    values, threads = None if table is None else table.data_ptr(), torch.get_num_threads()
    if _FEW_ROWS[isa()] >= M:
        table_library().qc_table_linear(
            kind, x.data_ptr(), codes.data_ptr(), values, scale.data_ptr(), None if offset is None else offset.data_ptr(), y.data_ptr(),
            M, N, K, group, threads,
        )  # fmt: skip
        return y.to(dtype)
    rows = max(64, _BLOCK // K)
    w = torch.empty((min(rows, N), K), dtype=torch.float32)
    for n in range(0, N, rows):
        count = min(rows, N - n)
        table_library().qc_dequantize(
            kind, codes.data_ptr() + n * width, values, scale.data_ptr() + n * G * 4, None if offset is None else offset.data_ptr() + n * G * 4,
            w.data_ptr(), 0, count, K, group, threads,
        )  # fmt: skip
        torch.mm(x, w[:count].t(), out=y[:, n : n + count])
    return y.to(dtype)


def dequantize(
    codes: Tensor,
    table: Tensor | None,
    scale: Tensor,
    offset: Tensor | None = None,
    group: int | None = None,
    k: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of `table_linear` as float32 or bfloat16 (N, k). `k` is needed for 4-bit codes whose K is no multiple of 128."""
    N = scale.shape[0]
    four = table is not None and table.numel() == 16
    k = k or codes.shape[1] * (2 if four else 1)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dequantize to {dtype}: float32 or bfloat16")
    kind, _, group, table, offset = _weight(codes, table, scale, offset, k, group)
    out = torch.empty((N, k), dtype=dtype)
    table_library().qc_dequantize(
        kind, codes.data_ptr(), None if table is None else table.data_ptr(), scale.data_ptr(), None if offset is None else offset.data_ptr(),
        out.data_ptr(), dtype is torch.bfloat16, N, k, group, torch.get_num_threads(),
    )  # fmt: skip
    return out
