"""``attention(q, k, v, mask, scale)``: scaled dot-product attention of few queries, as in decoding, whose keys and values are read once for all heads that share them.

``y = softmax(q k^T * scale + mask) v`` with q (B, H, Q, D), k and v (B, G, S, D), H a multiple of G: head h reads keys h // (H / G), which nobody repeats. The kernel goes over the keys once with a
running maximum (Milakov and Gimelshein 2018; Dao et al. 2022). Programs share the keys of one (batch, key head) pair, as in Flash-Decoding (Dao et al. 2023), where there are too few pairs to fill the
GPU; each writes its average and the logarithm of its weight, and a second kernel combines them in order, a program for each query and head: a reduction that reads what they give, such as
the quantization of a row, would combine a whole row in one program. Where there are many keys, only those between the first and the last one that a query may see are read: the empty
end of a static cache costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import Skip

from . import tiles
from .op import Kernel, Op

ATEN = torch.ops.aten
MOST = 63
"""Queries times heads that share keys: what one tile holds, beside the row of logarithms."""
PROGRAMS, PARTS = 264, 16
"""Programs that fill a large GPU, and the most that share the keys of one pair."""
FEWEST = 32
"""Keys that are worth a program of their own: with few pairs a step of decoding waits for one program, whose every tile of keys waits for the one before."""
SMALL = 1 << 20
"""Elements of keys that are read faster than the mask is looked through for those that are seen."""


@dataclass(frozen=True)
class Attention:
    """What decides which kernel runs: ``rows`` = Q * H / G (None where Q is dynamic), ``pairs`` = B * G (None where B is), ``columns`` = D, and how the mask is given: "", "bool" or "float"."""

    device: torch.device
    dtype: torch.dtype
    rows: int | None
    pairs: int | None
    columns: int
    queries: int
    mask: str


def repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, G, S, D) once for every head, (B, H, S, D)."""
    b, g, s, d = x.shape
    return x if g == heads else x[:, :, None].expand(b, g, heads // g, s, d).reshape(b, heads, s, d)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, Q, D) in the dtype of q; ``mask`` broadcasts to (B, H, Q, S): False or -inf hides a key, floats are added to the products."""
    return F.scaled_dot_product_attention(q, repeated(k, q.shape[1]), repeated(v, q.shape[1]), attn_mask=mask, scale=scale)


def fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Shape and dtype of ``reference``."""
    return q.new_empty(q.shape)


def case(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Attention:
    """The case of one call; tensors and IR nodes alike."""
    (b, h, count, d), g = compat.sizes(q), int(compat.sizes(k)[1])
    queries, batch = compat.static_int(count), compat.static_int(b)
    kind = "" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    return Attention(compat.device_of(q), q.dtype, None if queries is None else queries * int(h) // g, None if batch is None else batch * g, int(d), queries or 0, kind)


def supports(c: Attention) -> Skip | None:
    """16-bit values, heads of up to 256 columns, few queries."""
    if c.dtype not in (torch.bfloat16, torch.float16):
        return Skip(f"attention of {c.dtype} is left to torch")
    if c.rows is None or not 0 < c.rows <= MOST:
        return Skip(f"more than {MOST} queries for one key head, or a dynamic number")
    if c.columns > 256 or c.columns % 8:
        return Skip(f"heads of {c.columns} columns are not multiples of 8 up to 256")
    if c.rows > c.columns:
        return Skip(f"{c.rows} queries for one key head are more than its {c.columns} columns")
    return None


def blocks(c: Attention, keys: int | None) -> dict[str, int]:
    """Keys of a tile, programs of a pair."""
    pairs, split = c.pairs or 64, 1
    while split < PARTS and pairs * split * 2 <= PROGRAMS and (keys is None or split * FEWEST < keys):
        split *= 2
    span = PARTS * 64 if keys is None else -(-keys // split)
    rows = max(16, 1 << (c.rows or 1).bit_length())  # with the row of logarithms
    block = 32 if span <= 32 and rows == 16 else 64
    return {"BLOCK": block, "ROWS": rows, "COLUMNS": 1 << (c.columns - 1).bit_length(), "SPLIT": split, "num_warps": 4, "num_stages": 3 if c.columns <= 128 and span > 2 * block else 2}


def looks(c: Attention, keys: int | None, by_head: bool) -> bool:
    """Whether programs look through the mask for the first and the last key that is seen, and read no others: not where there are few keys, or where the mask differs between heads."""
    return c.mask != "" and not by_head and (keys is None or c.pairs is None or c.pairs * keys * c.columns > SMALL)


def grid(split: Any, b: Any, g: Any, rows: Any, columns: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """One program for each part of each pair; parts are neighbours."""
    return (split * b * g, 1, 1)


def source(c: Attention, heads: int, groups: int, split: bool, by_head: bool, looks: bool) -> str:
    """The template. ``by_head``: the mask differs between heads. ``looks``: it is looked through first. Scores are in powers of two, which SCALE takes account of."""
    assert c.rows is not None
    share, queries, d = heads // groups, c.queries, c.columns
    whole = 1 << (d - 1).bit_length() == d
    inside = "" if whole else " & (column < D)[None, :]"
    row_mask = "" if whole else ", mask=(column < D)[None, :], other=0.0"
    look = [] if not looks else [
        "    wide = tl.arange(0, 1024)",
        "    low = wide * 0 + S",
        "    high = wide * 0",
        "    for start in range(0, S, 1024):",
        "        at = start + wide",
        f"        for i in tl.static_range({queries}):",
        "            seen = tl.load(MASK + b * stride_mb + i * stride_mq + at * stride_ms, mask=at < S, other=" + ("0) != 0" if c.mask == "bool" else "float('-inf')) > float('-inf')"),
        "            low = tl.minimum(low, tl.where(seen, at, S))",
        "            high = tl.maximum(high, tl.where(seen, at + 1, 0))",
        "    first = tl.min(low, 0)",
        "    stop = tl.max(high, 0)",
    ]  # fmt: skip
    bounds = look or ["    first = S * 0", "    stop = S + 0"]
    by = (" + head[:, None] * stride_mh" if by_head else "") + (" + query[:, None] * stride_mq" if queries > 1 else "")
    address = f"b * stride_mb{by} + at[None, :] * stride_ms"  # an axis of one may have any stride
    if c.mask == "bool":
        masked = [f"        seen = tl.load(MASK + {address}, mask=live[None, :], other=0) != 0", '        score = tl.where(seen & live[None, :], score, float("-inf"))']
    elif c.mask == "float":
        masked = [f"        score += tl.load(MASK + {address}, mask=live[None, :], other=0.0).to(tl.float32) * {math.log2(math.e)!r}", '        score = tl.where(live[None, :], score, float("-inf"))']
    else:
        masked = ['        score = tl.where(live[None, :], score, float("-inf"))']
    axes = {"Q": "bhq", "K": "bgs", "V": "bgs", **({"MASK": "bhqs"} if c.mask else {})}
    strides = [f'    stride_{name[0].lower()}{axis} = {{{{stride("{name}", {i})}}}}' for name in axes for i, axis in enumerate(axes[name])]  # names: one that depends on a dynamic size is a sum, written bare
    last = [
        "    logs = tl.sum(tl.where(column[None, :] == row[:, None], ((top + tl.log2(total)) * 0.6931471805599453)[:, None], 0.0), 0)",
        f"    acc = tl.where(row[:, None] == {c.rows}, logs[None, :], acc)",
    ] if split else []  # fmt: skip
    names = '"Q", "K", "V"' + (', "MASK"' if c.mask else "")
    return "\n".join([
        f"\n{{{{def_kernel({names})}}}}",
        "    S = {{size('K', 2)}}",
        f"    D: tl.constexpr = {d}",
        *strides,
        "    part = tl.program_id(0) % SPLIT",
        "    pair = tl.program_id(0) // SPLIT",
        f"    b = (pair // {groups}).to(tl.int64)",
        f"    g = (pair % {groups}).to(tl.int64)",
        "    row = tl.arange(0, ROWS)",
        f"    r = tl.minimum(row, {c.rows - 1})",
        f"    head = g * {share} + r // {queries}",
        f"    query = r % {queries}",
        "    column = tl.arange(0, COLUMNS)",
        f"    q = tl.load(Q + b * stride_qb + head[:, None] * stride_qh + query[:, None] * stride_qq + column[None, :]{row_mask})",
        "    keys = K + b * stride_kb + g * stride_kg",
        "    values = V + b * stride_vb + g * stride_vg",
        *bounds,
        "    span = (tl.maximum(stop - first, 0) + 16 * SPLIT - 1) // (16 * SPLIT) * 16",
        "    begin = first + part * span",
        "    end = tl.minimum(begin + span, stop)",
        '    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)',
        "    total = tl.zeros((ROWS,), dtype=tl.float32)",
        "    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)",
        "    for start in tl.range(begin, end, BLOCK):",
        "        at = start + tl.arange(0, BLOCK)",
        "        live = at < end",
        f"        k = tl.load(keys + at[:, None].to(tl.int64) * stride_ks + column[None, :], mask=live[:, None]{inside}, other=0.0)",
        "        score = tl.dot(q, tl.trans(k)) * SCALE",
        *masked,
        "        higher = tl.maximum(top, tl.max(score, 1))",
        '        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf) is what it should be',
        "        p = tl.exp2(score - level[:, None])",
        "        kept = tl.exp2(top - level)",
        f"        v = tl.load(values + at[:, None].to(tl.int64) * stride_vs + column[None, :], mask=live[:, None]{inside}, other=0.0)",
        "        total = total * kept + tl.sum(p, 1)",
        "        acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None])",
        "        top = higher",
        "    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]",
        *last,
        "    idx_r = row[:, None]",
        "    idx_d = column[None, :]",
        f"    mask = (idx_r < {c.rows + split}) & (idx_d < D)",
        '    {{store_output(("part", "b", "g", "idx_r", "idx_d"), "acc", "mask", val_shape=("ROWS", "COLUMNS"))}}',
        "",
    ])  # fmt: skip


COMBINE = """
{{def_kernel("PARTS")}}
    ROWS = {{size("PARTS", 3)}} - 1
    G = {{size("PARTS", 2)}}
    D = {{size("PARTS", 4)}}
    stride_part = {{stride("PARTS", 0)}}
    stride_b = {{stride("PARTS", 1)}}
    stride_g = {{stride("PARTS", 2)}}
    row = tl.program_id(0) % ROWS
    pair = tl.program_id(0) // ROWS
    b = pair // G
    g = pair % G
    part = tl.arange(0, SPLIT)
    column = tl.arange(0, COLUMNS)
    at = PARTS + part.to(tl.int64) * stride_part + b.to(tl.int64) * stride_b + g * stride_g
    logs = tl.load(at + ROWS * D + row)
    values = tl.load(at[:, None] + row * D + column[None, :], mask=(column < D)[None, :], other=0.0)
    top = tl.max(logs, 0)
    weights = tl.exp(logs - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    acc = (tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total))[None, :]
    idx_r = row + tl.zeros((1, 1), dtype=tl.int32)
    idx_d = column[None, :]
    mask = idx_d < D
    {{store_output(("b", "g", "idx_r", "idx_d"), "acc", "mask", val_shape=("1", "COLUMNS"))}}
"""
"""(SPLIT, B, G, rows + 1, D) parts, whose last row holds in its first columns the natural logarithm of each row's weight, as (B, G, rows, D). Rows that saw no key are zero."""


def each(b: Any, g: Any, rows: Any, columns: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """One program for each row of each pair."""
    return (b * g * rows, 1, 1)


def _combined(parts: Any, c: Attention, config: dict[str, int]) -> Any:
    _, b, groups, _, d = compat.sizes(parts)
    tile = {"SPLIT": config["SPLIT"], "COLUMNS": config["COLUMNS"], "num_warps": 4, "num_stages": 1}
    return compat.lower_template(tiles.template_name("attention_parts", tiles.triton_dtype(c.dtype)), lambda: COMBINE, [parts], (b, groups, c.rows, d), [tile], each, dtype=c.dtype)


def _lower(c: Attention, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    assert c.rows is not None
    b, heads, queries, d = compat.sizes(q)
    groups, keys = compat.sizes(k)[1:3]
    config = blocks(c, compat.static_int(keys))
    split, by_head = config["SPLIT"] > 1, mask is not None and compat.static_int(compat.sizes(mask)[1]) != 1
    look = looks(c, compat.static_int(keys), by_head)
    inputs = [q, k, v] if mask is None else [q, k, v, compat.lowered(ATEN.expand.default, mask, [b, compat.sizes(mask)[1], queries, keys])]
    name = tiles.template_name("attention", heads, groups, c.queries, d, c.mask, "heads" if by_head else "", "looks" if look else "", "split" if split else "", tiles.triton_dtype(c.dtype))
    text = lambda: source(c, int(heads), int(groups), split, by_head, look)  # noqa: E731
    parts = compat.lower_template(name, text, inputs, (config["SPLIT"], b, groups, c.rows + split, d), [{**config, "SCALE": scale * math.log2(math.e)}], grid, strided=True)
    y = _combined(parts, c, config) if split else compat.lowered(torch.ops.prims.convert_element_type.default, parts, c.dtype)
    return compat.lowered(ATEN.reshape.default, y, [b, heads, queries, d])


SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor"
OP = Op("attention", SCHEMA, reference, fake, case, (Kernel("triton attention", "cuda", supports, _lower),))
