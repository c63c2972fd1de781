"""``scaled_linear(x, x_scale, weight, scheme)``: quantized activations times a quantized weight; ``y = dequantize(x) @ dequantize(weight).T`` in float32.

``scheme`` reads ``input @ weight``, as in ``int8.row @ int4.g128``. Integer codes meet in an int8 dot product with exact int32 sums, FP8 codes in an FP8 one;
scales multiply the sums. The store takes bias, activation, residual and the next layer's static quantization as an epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import OptionError, Skip
from qcompile.core.formats import decode
from qcompile.core.layouts import BLOCK
from qcompile.core.qtensor import QTensor, dequantize
from qcompile.core.scheme import GROUPS, Scheme

from . import stream, tiles, tuned
from .cpu import ops as cpu
from .linear import blocks, flat_scales, unnested
from .op import MIDDLE, Case, Kernel, Op, rows_of, target, two_dimensional, two_dimensional_scales


def spell(x: Scheme, weight: Scheme) -> str:
    """The op's string for an input and a weight scheme."""
    return f"{x} @ {weight}"


def parse(scheme: str) -> tuple[Scheme, Scheme]:
    """(input, weight) of the op's string; OptionError where it does not read ``input @ weight``."""
    x, at, weight = scheme.partition(" @ ")
    if not at:
        raise OptionError(f"scaled_linear takes 'input @ weight', such as 'int8.row @ int4.g128', not {scheme!r}")
    return Scheme.parse(x), Scheme.parse(weight)


def values(codes: Tensor, x_scale: Sequence[Tensor], s: Scheme) -> Tensor:
    """Quantized activations (..., K) as float32."""
    y = decode(codes, s.fmt)
    scale, zero = x_scale[0], x_scale[1] if len(x_scale) > 1 else None
    if s.group in GROUPS.values():
        return (y if zero is None else y - zero) * scale
    k = codes.shape[-1]
    columns = torch.arange(k, device=codes.device) // s.extent(1, k)[1]
    by_group = scale.index_select(-1, columns)
    return (y if zero is None else y - zero.index_select(-1, columns)) * by_group


def reference(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str) -> Tensor:
    """(..., K) codes -> (..., N), float32; ``x_scale`` as ``quantize`` gives it, ``weight`` as ``QTensor.flatten`` does."""
    sx, sw = parse(scheme)
    return values(x, x_scale, sx) @ dequantize(QTensor.unflatten(weight, sw, x.shape[-1])).T


def fake(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str) -> Tensor:
    """Shape and dtype of ``reference``."""
    return x.new_empty((*x.shape[:-1], weight[0].shape[-2]), dtype=torch.float32)


def case(x: Any, x_scale: Sequence[Any], weight: Sequence[Any], scheme: str) -> Case:
    """The case of one call; tensors and IR nodes alike."""
    sx, sw = parse(scheme)
    shape, device = compat.sizes(x), compat.device_of(x)
    return Case(device, x.dtype, sw, sx, int(compat.sizes(weight[0])[-2]), int(shape[-1]), rows_of(shape[0], device))


def simplify(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str) -> Any:
    """N-D activations to 2-D; quantized weight scales to float32 scales."""
    sx, sw = parse(scheme)
    if x.dim() != 2:
        return target("scaled_linear")(two_dimensional(x), two_dimensional_scales(x, x_scale), list(weight), scheme).reshape(*x.shape[:-1], weight[0].shape[-2])
    if sw.scale is not None and not stream.takes_scales(case(x, x_scale, weight, scheme)):
        return target("scaled_linear")(x, list(x_scale), flat_scales(weight, sw, x.shape[-1]), spell(sx, unnested(sw)))
    return NotImplemented


def gpu_supports(c: Case) -> Skip | None:
    assert c.input is not None
    x, w = c.input, c.weight
    if x.zero != "none":
        return Skip(f"activations with a zero point ({x}) have no kernel")
    if w.zero == "min":
        return Skip(f"weights with float minima ({w}) have no kernel for quantized activations")
    if not tiles.whole_subtiles(w, c.k) or not tiles.whole_subtiles(x, c.k):
        return Skip(f"groups must be multiples of {tiles.SUB} columns, found {x} and {w}")
    if x.fmt.native in stream.FP8 and w.fmt.native in stream.FP8:
        if c.compute_capability < (8, 9):
            return Skip(f"FP8 matmul needs compute capability 8.9, this device has {c.compute_capability}")
        return None
    if x.fmt.name == "int8" and w.fmt.kind == "int" and (w.fmt.signed or w.fmt.bits < 8) and not (w.zero == "point" and w.fmt.bits == 8):
        return None
    return Skip(f"no tensor-core product of {x.fmt} and {w.fmt}")


def loop(x: Scheme, w: Scheme, n: int, k: int) -> tiles.Loop:
    """Products of codes: int32 or float32 sums; group scales applied to each sub-tile, whole-row scales once at the end."""
    even_k = k % BLOCK == 0
    integer = x.fmt.kind == "int"
    x_columns = x.extent(1, k)[1]
    by_group = w.extent(n, k)[1] < k or x_columns < k
    mask = "" if even_k else f", mask=kk[None, :] < K, other={0 if integer else 0.0}"
    first = f"k + h * {tiles.SUB}" if even_k else f"tl.minimum(k + h * {tiles.SUB}, K - 1)"
    body = [f"kk = k + h * {tiles.SUB} + tl.arange(0, {tiles.SUB})", f"x = tl.load(X + rm[:, None] * stride_xm + kk[None, :]{mask})", tiles.load_codes(w, even_k)]
    body.append(tiles.decode(w, "tl.int8") if integer else "w = code")
    if w.zero == "point":
        body.append(f"w = (w - tl.load({tiles.group_index(w, n, k, 'Z', first)}).to(tl.int8)[:, None]).to(tl.int8)")
    out = "tl.int32" if integer else "tl.float32"
    scale = f"tl.load({tiles.group_index(w, n, k, 'S', first if by_group else '0')}).to(tl.float32)[None, :]"
    if by_group:
        body.append(f"part = tl.dot(x, tl.trans(w), out_dtype={out}).to(tl.float32) * {scale}")
        if x_columns < k:
            body.append(f"part = part * tl.load(SX + rm * {-(-k // x_columns)} + ({first}) // {x_columns})[:, None]")
        body.append("acc += part")
    else:
        body.append(f"acc = tl.dot(x, tl.trans(w), acc, out_dtype={out})")
    kind = "tl.float32" if by_group else out
    lines = [f"    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype={kind})", "    for k in range(0, K, 128):", "        for h in tl.static_range(2):", tiles.block("\n".join(body), 3)]
    if not by_group:
        lines.append(f"    acc = acc.to(tl.float32) * {scale}")
    if x.group == GROUPS["tensor"]:
        lines.append("    acc = acc * tl.load(SX)")
    elif x_columns >= k:
        lines.append("    acc = acc * tl.load(SX + rm)[:, None]")
    return tiles.Loop((() if w.zero == "none" else ("Z",)) + ("SX",), "\n".join(lines))


def _gpu_lower(c: Case, x: Any, x_scale: Sequence[Any], weight: Sequence[Any], scheme: str) -> Any:
    assert c.input is not None
    sx, sw = c.input, c.weight
    name = tiles.template_name("scaled_linear", scheme, c.n if sw.group[0] != 1 else 0, c.k)
    source = lambda: loop(sx, sw, c.n, c.k).kernel(tiles.HEADER, tiles.FOOTER)  # noqa: E731
    return compat.lower_template(name, source, [x, *weight, x_scale[0]], (compat.sizes(x)[0], c.n), [blocks(c.m, sw, c.k)])


def _many_rows(c: Case) -> Skip | None:
    """Where ``passes/library`` puts cuBLAS in the op's place, once it sees that bfloat16 is wanted; else the op is streamed."""
    assert c.input is not None
    whole = c.weight.scale is None and c.input.group == c.weight.group and c.input.group in GROUPS.values()
    if c.m is None or c.m <= MIDDLE or not whole or {c.input.fmt.name, c.weight.fmt.name} != {"e4m3"} or c.n % 16 or c.k % 16:
        return Skip(f"not more than {MIDDLE} rows of E4M3")
    return gpu_supports(c)


def _stream_lower(c: Case, x: Any, x_scale: Sequence[Any], weight: Sequence[Any], scheme: str) -> Any:
    return stream.lower(c, "scaled_linear", [x, *weight, x_scale[0]], scheme, tuned.config(c))


def _cpu_supports(c: Case) -> Skip | None:
    assert c.input is not None
    return cpu.product_support(c.input, c.weight, c.k)


def cpu_scaled_linear(x: Tensor, x_scale: Sequence[Tensor], weight: Sequence[Tensor], scheme: str) -> Tensor:
    """The C++ kernel on (M, K) codes."""
    return cpu.integer(x, x_scale[0], weight, parse(scheme)[1])


SCHEMA = "(Tensor x, Tensor[] x_scale, Tensor[] weight, str scheme) -> Tensor"
OP = Op(
    "scaled_linear",
    SCHEMA,
    reference,
    fake,
    case,
    (
        Kernel("cuBLAS FP8", "cuda", _many_rows, _stream_lower),
        Kernel("triton stream", "cuda", stream.after(gpu_supports), _stream_lower),
        Kernel("triton scaled", "cuda", gpu_supports, _gpu_lower),
        Kernel("c++ int8", "cpu", _cpu_supports, cpu.define("scaled_linear", SCHEMA, cpu_scaled_linear, fake)),
    ),
    simplify,
)
