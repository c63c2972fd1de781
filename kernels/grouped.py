"""``grouped_linear(x, x_scale, index, weight, scheme, by_row)``: rows of activations times the quantized weights of their own experts, for the 3-D parameters of mixtures of experts.

Rows sorted by expert (``by_row=False``): ``index`` (E,) int32 holds the end of each expert's rows, as ``torch._grouped_mm`` takes it; rows behind the last end give zeros.
One expert for each row (``by_row=True``): ``index`` (S,) names it, as transformers' ``batched_mm`` experts index their weights.
Only the experts that some row names are read; no expert is ever dequantized whole on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.qtensor import QTensor, dequantize
from qcompile.core.scheme import Scheme

from . import linear, scaled_linear, stream, tiles, tuned
from .cpu import ops as cpu
from .op import Case, Kernel, Op, target


def parse(scheme: str) -> tuple[Scheme | None, Scheme]:
    """(input or None, weight) of the op's string."""
    return scaled_linear.parse(scheme) if " @ " in scheme else (None, Scheme.parse(scheme))


def reference(x: Tensor, x_scale: Sequence[Tensor], index: Tensor, weight: Sequence[Tensor], scheme: str, by_row: bool) -> Tensor:
    """(S, K) -> (S, N), float32; ``weight`` as ``QTensor.flatten`` of an (E, N, K) tensor. One product for each expert that has rows."""
    sx, sw = parse(scheme)
    y = x.float() if sx is None else scaled_linear.values(x, x_scale, sx)
    out = torch.zeros((x.shape[0], weight[0].shape[-2]), dtype=torch.float32, device=x.device)
    for expert, rows in rows_by_expert(index, by_row, weight[0].shape[0]):
        out[rows] = y[rows] @ dequantize(QTensor.unflatten([t[expert] for t in weight], sw, x.shape[-1])).T
    return out


def rows_by_expert(index: Tensor, by_row: bool, experts: int) -> list[tuple[int, Any]]:
    """(expert, its rows) for each expert with rows."""
    if by_row:
        return [(e, (index == e).nonzero().flatten()) for e in sorted(set(index.tolist())) if 0 <= e < experts]
    ends = index.tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]


def fake(x: Tensor, x_scale: Sequence[Tensor], index: Tensor, weight: Sequence[Tensor], scheme: str, by_row: bool) -> Tensor:
    """Shape and dtype of ``reference``."""
    return x.new_empty((x.shape[0], weight[0].shape[-2]), dtype=torch.float32)


def case(x: Any, x_scale: Sequence[Any], index: Any, weight: Sequence[Any], scheme: str, by_row: bool) -> Case:
    """The case of one call; tensors and IR nodes alike."""
    sx, sw = parse(scheme)
    return Case(compat.device_of(x), x.dtype, sw, sx, int(compat.sizes(weight[0])[-2]), int(compat.sizes(x)[-1]), compat.static_int(compat.sizes(x)[0]), int(compat.sizes(weight[0])[0]))


def simplify(x: Tensor, x_scale: Sequence[Tensor], index: Tensor, weight: Sequence[Tensor], scheme: str, by_row: bool) -> Any:
    """Quantized weight scales to float32 scales."""
    sx, sw = parse(scheme)
    if sw.scale is None:
        return NotImplemented
    flat = str(linear.unnested(sw))
    return target("grouped_linear")(x, list(x_scale), index, linear.flat_scales(weight, sw, x.shape[-1]), f"{sx} @ {flat}" if sx else flat, by_row)


def _gpu_supports(c: Case) -> Skip | None:
    return linear.gpu_supports(c) if c.input is None else scaled_linear.gpu_supports(c)


BEGIN = """
    M = {{size("X", 0)}}
    K = {{size("X", 1)}}
    N = {{size("W", 1)}}
    if M * N == 0:
        return
    grid_n = (N + BLOCK_N - 1) // BLOCK_N
    pid_n = tl.program_id(0) % grid_n
"""

# A tile belongs to one expert. Programs count tiles expert by expert; the rows behind the last expert's end form one more group, which stores zeros.
SORTED = """\
    number = tl.program_id(0) // grid_n
    e = tl.arange(0, EXPERTS_2)
    ends = tl.load(INDEX + tl.minimum(e, EXPERTS - 1))
    ends = tl.where(e < EXPERTS, ends, M)
    starts = tl.where(e == 0, 0, tl.load(INDEX + tl.maximum(tl.minimum(e, EXPERTS) - 1, 0)))
    starts = tl.where(e > EXPERTS, M, starts)
    count = (ends - starts + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(count, 0) - count
    mine = (before <= number) & (number < before + count)
    if tl.sum(mine.to(tl.int32), 0) == 0:
        return
    expert = tl.sum(tl.where(mine, e, 0), 0)
    row = tl.sum(tl.where(mine, starts + (number - before) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    owned = expert < EXPERTS
    expert = tl.minimum(expert, EXPERTS - 1)
    rm = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
"""

BY_ROW = """\
    row = tl.program_id(0) // grid_n
    end = row + 1
    expert = tl.load(INDEX + row).to(tl.int32)
    owned = (expert >= 0) & (expert < EXPERTS)
    expert = tl.minimum(tl.maximum(expert, 0), EXPERTS - 1)
    rm = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
"""

COMMON = """
    rn = ((pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    stride_xm = {{stride("X", 0)}}
    stride_wn = {{stride("W", 1)}}
    stride_Sn = {{stride("S", 1)}}
    W = W + expert.to(tl.int64) * {{stride("W", 0)}}
    S = S + expert.to(tl.int64) * {{stride("S", 0)}}
"""

FOOTER = """
    acc = tl.where(owned, acc, 0.0)
    idx_m = (row + tl.arange(0, BLOCK_M))[:, None]
    idx_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (idx_m < end) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""


def sorted_grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """At most one ragged tile for each expert, and one for the rows behind them; never more tiles than rows."""
    count, rows = cdiv(m, meta["BLOCK_M"]) + meta["EXPERTS"] + 1, compat.static_int(m)
    return ((count if rows is None else min(int(count), rows)) * cdiv(n, meta["BLOCK_N"]), 1, 1)


def row_grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """One tile of columns of one row for each program."""
    return (m * cdiv(n, meta["BLOCK_N"]), 1, 1)


PLACE = stream.Place("", "row + tl.arange(0, BLOCK_M) < end")


def source(c: Case, by_row: bool, body: tiles.Loop) -> str:
    """The template around a K loop."""
    zero = '    Z = Z + expert.to(tl.int64) * {{stride("Z", 0)}}\n' if c.weight.zero != "none" else ""
    return body.kernel((BEGIN + (BY_ROW if by_row else SORTED)).rstrip("\n") + COMMON + zero, FOOTER, "INDEX")


def _config(c: Case, tile: dict[str, int]) -> dict[str, int]:
    return {**tile, "EXPERTS": c.experts, "EXPERTS_2": 1 << c.experts.bit_length()}


def _template(c: Case, by_row: bool, about: Sequence[object], body: Callable[[], tiles.Loop], inputs: Sequence[Any], tile: dict[str, int]) -> Any:
    name = tiles.template_name("grouped", "row" if by_row else "sorted", *about, c.n if c.weight.group[0] != 1 else 0, c.k)
    size = (compat.sizes(inputs[0])[0], c.n)
    return compat.lower_template(name, lambda: source(c, by_row, body()), inputs, size, [_config(c, tile)], row_grid if by_row else sorted_grid)


def _gpu_lower(c: Case, x: Any, x_scale: Sequence[Any], index: Any, weight: Sequence[Any], scheme: str, by_row: bool) -> Any:
    dot = "" if c.input is not None else tiles.triton_dtype(c.dtype)
    rows = 16 if by_row or c.m is None or c.m <= 8 * c.experts else 64
    tile = {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    body = lambda: linear.loop(c.weight, c.n, c.k, dot) if c.input is None else scaled_linear.loop(c.input, c.weight, c.n, c.k)  # noqa: E731
    return _template(c, by_row, (scheme, dot), body, [x, *weight, *x_scale[:1], index], tile)


def _stream_lower(c: Case, x: Any, x_scale: Sequence[Any], index: Any, weight: Sequence[Any], scheme: str, by_row: bool) -> Any:
    dot = stream.operand(c)
    tile = tuned.grouped(c, by_row)
    parts, paired = tile["PARTS"], stream.pairs(c, tile)
    body = lambda: stream.loop(c.input, c.weight, c.n, c.k, dot, False, place=PLACE, parts=parts, paired=paired)  # noqa: E731
    return _template(c, by_row, ("stream", f"parts {parts}" if parts > 1 else "", "paired" if paired else "", scheme, dot), body, [x, *weight, *x_scale[:1], index], tile)


def _cpu_supports(c: Case) -> Skip | None:
    return cpu.weight_support(c.weight, c.k) if c.input is None else cpu.product_support(c.input, c.weight, c.k)


def cpu_grouped(x: Tensor, x_scale: Sequence[Tensor], index: Tensor, weight: Sequence[Tensor], scheme: str, by_row: bool) -> Tensor:
    """The C++ kernels, one call for each expert that has rows."""
    sx, sw = parse(scheme)
    out = torch.zeros((x.shape[0], weight[0].shape[-2]), dtype=torch.float32)
    for expert, rows in rows_by_expert(index, by_row, weight[0].shape[0]):
        own = [t[expert] for t in weight]
        out[rows] = cpu.weight_only(x[rows], own, sw) if sx is None else cpu.integer(x[rows], x_scale[0] if x_scale[0].numel() == 1 else x_scale[0][rows], own, sw)
    return out


def _by_expert(c: Case, *args: Any) -> Any:
    """Schemes that no kernel takes run by the reference, as a call: one product for each expert that has rows. Right, but on a GPU it waits for the index."""
    return compat.fallback_kernel(target("grouped_linear"), *args)


SCHEMA = "(Tensor x, Tensor[] x_scale, Tensor index, Tensor[] weight, str scheme, bool by_row) -> Tensor"
OP = Op(
    "grouped_linear",
    SCHEMA,
    reference,
    fake,
    case,
    (
        Kernel("triton grouped stream", "cuda", stream.after(_gpu_supports), _stream_lower),
        Kernel("triton grouped", "cuda", _gpu_supports, _gpu_lower),
        Kernel("c++ grouped", "cpu", _cpu_supports, cpu.define("grouped_linear", SCHEMA, cpu_grouped, fake)),
    ),
    simplify,
    fallback=_by_expert,
)
