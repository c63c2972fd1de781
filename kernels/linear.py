"""``linear(x, weight, scheme)``: 16- or 32-bit activations times a quantized weight; ``y = x @ dequantize(weight).T`` in float32.

On a GPU one template unpacks, decodes and scales the weight in registers; what follows (bias, activation, residual, the next layer's static quantization) fuses into its store.
With many rows the weight is dequantized once into the dtype of the activations, and the library's GEMM multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.layouts import BLOCK
from qcompile.core.qtensor import QTensor, dequantize, value
from qcompile.core.scheme import Scheme

from . import stream, tiles, tuned
from .cpu import ops as cpu
from .op import MIDDLE, Case, Kernel, Op, rows_of, target, two_dimensional


def reference(x: Tensor, weight: Sequence[Tensor], scheme: str) -> Tensor:
    """(..., K) -> (..., N), float32; ``weight`` as ``QTensor.flatten`` gives it."""
    return x.float() @ dequantize(QTensor.unflatten(weight, Scheme.parse(scheme), x.shape[-1])).T


def fake(x: Tensor, weight: Sequence[Tensor], scheme: str) -> Tensor:
    """Shape and dtype of ``reference``."""
    return x.new_empty((*x.shape[:-1], weight[0].shape[-2]), dtype=torch.float32)


def case(x: Any, weight: Sequence[Any], scheme: str) -> Case:
    """The case of one call; tensors and IR nodes alike."""
    shape, device = compat.sizes(x), compat.device_of(x)
    return Case(device, x.dtype, Scheme.parse(scheme), None, int(compat.sizes(weight[0])[-2]), int(shape[-1]), rows_of(shape[0], device))


def simplify(x: Tensor, weight: Sequence[Tensor], scheme: str) -> Any:
    """N-D activations to 2-D; quantized scales to float32 scales."""
    s = Scheme.parse(scheme)
    if x.dim() != 2:
        return target("linear")(two_dimensional(x), list(weight), scheme).reshape(*x.shape[:-1], weight[0].shape[-2])
    if s.scale is not None and not stream.takes_scales(case(x, weight, scheme)):
        return target("linear")(x, flat_scales(weight, s, x.shape[-1]), str(unnested(s)))
    return NotImplemented


def unnested(s: Scheme) -> Scheme:
    """The scheme with its scales stored as floats."""
    return Scheme(s.fmt, s.group, s.zero, s.static, None, s.layout)


def flat_scales(weight: Sequence[Tensor], s: Scheme, k: int) -> list[Tensor]:
    """Tensors of ``unnested(s)``: quantized scales (and minima) dequantized to float32."""
    q = QTensor.unflatten(weight, s, k)
    zero = [] if q.zero is None else [q.zero if isinstance(q.zero, Tensor) else value(q.zero)]
    return [q.codes, value(q.scale), *zero, *([q.codebook] if q.codebook is not None else [])]


def gpu_supports(c: Case) -> Skip | None:
    if c.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Skip(f"activations are {c.dtype}")
    if c.weight.fmt.learned:
        return Skip(f"no kernel decodes {c.weight.fmt}, whose values are an input: dequantized, then multiplied by cuBLAS")
    if c.weight.fmt.kind == "table" and len(c.weight.fmt.values) > 16:
        return Skip(f"{c.weight.fmt} has more than 16 table entries")
    if c.weight.fmt.native in (torch.float8_e4m3fn, torch.float8_e5m2) and c.compute_capability < (8, 9):
        return Skip(f"{c.weight.fmt} needs compute capability 8.9, this device has {c.compute_capability}")
    return None


def loop(s: Scheme, n: int, k: int, dot_dtype: str) -> tiles.Loop:
    """Products of 16- or 32-bit rows with decoded weights. Scales multiply the product of a sub-tile where a sub-tile lies in one group, else the weight itself."""
    even_k = k % BLOCK == 0
    after = s.zero != "min" and tiles.whole_subtiles(s, k)
    per_row = s.extent(n, k)[1] >= k and s.zero == "none"
    x_mask = "" if even_k else ", mask=kk[None, :] < K, other=0.0"
    first = f"k + h * {tiles.SUB}" if even_k else f"tl.minimum(k + h * {tiles.SUB}, K - 1)"  # addresses of scales stay inside a ragged last group
    precision = ', input_precision="tf32x3"' if dot_dtype == "tl.float32" else ""
    body = [f"kk = k + h * {tiles.SUB} + tl.arange(0, {tiles.SUB})", f"x = tl.load(X + rm[:, None] * stride_xm + kk[None, :]{x_mask})", tiles.load_codes(s, even_k)]
    if after:
        body.append(tiles.decode(s, "tl.float32" if s.zero == "point" else dot_dtype))
        if s.zero == "point":
            body.append(f"w = (w - tl.load({tiles.group_index(s, n, k, 'Z', first)}).to(tl.float32)[:, None]).to({dot_dtype})")
        part = f"tl.dot(x.to({dot_dtype}), tl.trans(w), out_dtype=tl.float32{precision})"
        body.append(f"acc += {part}" if per_row else f"acc += {part} * tl.load({tiles.group_index(s, n, k, 'S', first)}).to(tl.float32)[None, :]")
    else:
        body += ["" if even_k else "kk = tl.minimum(kk, K - 1)", tiles.decode(s, "tl.float32"), f"scale = tl.load({tiles.group_index(s, n, k, 'S', 'kk')}).to(tl.float32)"]
        zero = "" if s.zero == "none" else f"tl.load({tiles.group_index(s, n, k, 'Z', 'kk')}).to(tl.float32)"
        body.append({"none": "w = w * scale", "point": f"w = (w - {zero}) * scale", "min": f"w = w * scale - {zero}"}[s.zero])
        body.append(f"acc += tl.dot(x.to({dot_dtype}), tl.trans(w.to({dot_dtype})), out_dtype=tl.float32{precision})")
    lines = ["    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)", "    for k in range(0, K, 128):", "        for h in tl.static_range(2):", tiles.block("\n".join(body), 3)]
    if after and per_row:
        lines.append(f"    acc = acc * tl.load({tiles.group_index(s, n, k, 'S', '0')}).to(tl.float32)[None, :]")
    return tiles.Loop(() if s.zero == "none" else ("Z",), "\n".join(lines))


def blocks(m: int | None, scheme: Scheme, k: int) -> dict[str, int]:
    """Tile sizes for M rows (None: dynamic). Scales that are read for each column take shared memory for every stage, so such tiles stay small."""
    small = scheme.zero == "min" or not tiles.whole_subtiles(scheme, k)
    rows = 64 if m is None else next((b for b in (16, 32, 64) if m <= b), 64 if small else 128)
    wide = rows == 128
    return {"BLOCK_M": rows, "BLOCK_N": 128 if wide else 64, "GROUP_M": 8, "num_warps": 8 if wide else 4, "num_stages": 2 if small else 3}


def _gpu_lower(c: Case, x: Any, weight: Sequence[Any], scheme: str) -> Any:
    dot = tiles.triton_dtype(c.dtype)
    name = tiles.template_name("linear", scheme, c.n if c.weight.group[0] != 1 else 0, c.k, dot)
    return compat.lower_template(name, lambda: loop(c.weight, c.n, c.k, dot).kernel(tiles.HEADER, tiles.FOOTER), [x, *weight], (compat.sizes(x)[0], c.n), [blocks(c.m, c.weight, c.k)])


def _stream_lower(c: Case, x: Any, weight: Sequence[Any], scheme: str) -> Any:
    return stream.lower(c, "linear", [x, *weight], scheme, tuned.config(c))


def _many_rows(c: Case) -> Skip | None:
    if c.weight.fmt.learned:
        return None if c.dtype.itemsize == 2 else gpu_supports(c)
    if c.dtype.itemsize != 2 or c.m is None or c.m <= MIDDLE:
        return Skip(f"not more than {MIDDLE} rows of 16 bits")
    return gpu_supports(c)


def dequantized(x: Tensor, weight: Sequence[Tensor], scheme: str) -> Tensor:
    """The weight in the dtype of x, once, and the library's product."""
    w = dequantize(QTensor.unflatten(weight, Scheme.parse(scheme), x.shape[-1]), x.dtype)
    return torch.mm(x, w.t()).float()


def _cpu_supports(c: Case) -> Skip | None:
    return cpu.weight_support(c.weight, c.k)


def cpu_linear(x: Tensor, weight: Sequence[Tensor], scheme: str) -> Tensor:
    """The C++ kernel on (M, K) activations."""
    return cpu.weight_only(x, weight, Scheme.parse(scheme))


SCHEMA = "(Tensor x, Tensor[] weight, str scheme) -> Tensor"
OP = Op(
    "linear",
    SCHEMA,
    reference,
    fake,
    case,
    (
        Kernel("dequantize + cuBLAS", "cuda", _many_rows, None, dequantized),
        Kernel("triton stream", "cuda", stream.after(gpu_supports), _stream_lower),
        Kernel("triton linear", "cuda", gpu_supports, _gpu_lower),
        Kernel("c++ table", "cpu", _cpu_supports, cpu.define("linear", SCHEMA, cpu_linear, fake)),
    ),
    simplify,
)
