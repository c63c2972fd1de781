"""Which tile a streamed product takes: rows measured by ``benchmarks/tune.py`` and kept as data (``tuned.json``), never searched at a user's first call.

A row belongs to an arithmetic, such as ``int8 @ int4``, a size (M, N, K) and a GPU. A case takes the row of its arithmetic whose M is the next one above its own and whose N and K are nearest.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from importlib import resources

from qcompile import compat
from qcompile.core.layouts import BLOCK

from .op import Case

FIELDS = ("BLOCK_M", "BLOCK_N", "SPLIT", "UNROLL", "num_warps", "num_stages", "PARTS")
GROUP_M = 8
"""Rows of tiles that share columns of the weight in L2."""
IDLE, LONG = 64, 4096
"""So few programs leave half of the multiprocessors idle: then K, where it is this long, is taken in four parts."""

SHARED, RESERVED = 228 << 10, 1 << 10
"""Bytes of shared memory of a multiprocessor of compute capability 9.0, and what each program of it takes beside its own (CUDA C++ Programming Guide, compute capabilities)."""

Tile = tuple[int, int, int, int, int, int, int]


def arithmetic(c: Case, gated: bool = False, grouped: bool = False) -> str:
    """``input @ weight``: what decides how fast a tile is, beside its size. Gated products and those of stacked experts have rows of their own."""
    w = c.weight.fmt
    kind = w.name if w.bits == 8 else f"{'int' if w.kind == 'int' else 'table'}{w.bits}"
    groups = [s.extent(1, c.k)[1] for s in (c.weight, c.input) if s is not None]
    by_group = " by group" if w.bits == 8 and min(groups) < c.k else ""  # two sums in registers; 4 bits are mostly by group
    return f"{c.input.fmt.name if c.input is not None else '16'} @ {kind}{by_group}{', gated' if gated else ', grouped' if grouped else ''}"


@cache
def rows() -> dict[str, dict[tuple[int, int, int], Tile]]:
    """The table: arithmetic -> (M, N, K) -> tile."""
    found: dict[str, dict[tuple[int, int, int], Tile]] = {}
    for row in json.loads(resources.files(__package__).joinpath("tuned.json").read_text())["rows"]:
        m, n, k = row["size"]
        found.setdefault(row["arithmetic"], {})[m, n, k] = (*row["tile"], 1)[: len(FIELDS)]  # parts are left out where there is one
    return found


def config(c: Case) -> dict[str, int]:
    """The tile of a case, as a template takes it."""
    known = rows().get(arithmetic(c), {})
    chosen = _fit(_nearest(known, c.m, c.n, c.k) if known else guess(c.m, c.n), c.k)
    if chosen["SPLIT"] == chosen["PARTS"] == 1 and _programs(chosen, c) <= IDLE and c.k >= LONG:
        chosen["SPLIT"] = 4
    return {**chosen, "GROUP_M": GROUP_M}


def gated(c: Case) -> dict[str, int]:
    """The tile of a product whose two halves of the weight's rows have a sum each (``c.n`` counts both). Nothing is split: parts of a sum mean nothing to the activation."""
    known = rows().get(arithmetic(c, True), {})
    tile = _fit(_nearest(known, c.m, c.n, c.k), c.k) if known else _halved(c, config(c))
    return {**tile, "SPLIT": 1, "GROUP_M": GROUP_M}


def grouped(c: Case, by_row: bool) -> dict[str, int]:
    """The tile of rows that are sorted by their experts, or of single rows. M is the number of rows that an expert has in the mean (``c.m`` counts all of them). K stays whole."""
    mean = 1 if by_row else 16 if c.m is None else max(1, -(-c.m // c.experts))
    known = rows().get(arithmetic(c, grouped=True), {})
    if known and not by_row:
        tile = _fit(_nearest(known, mean, c.n, c.k), c.k)
    else:
        tile = config(replace(c, m=mean))
        tile["BLOCK_M"] = tile["BLOCK_M"] if by_row else max(16, tile["BLOCK_M"])  # with a row each, an expert's weights would be read once for each of its rows
    return {**tile, "SPLIT": 1, "GROUP_M": GROUP_M}


def spread(tile: dict[str, int], c: Case, halves: int = 1) -> dict[str, int]:
    """The tile of a kernel that begins while the one before ends, with stages enough that no multiprocessor holds more programs than its even share.

    Such programs are placed where there is room beside those of the kernel before, as many as fit: on multiprocessors that have ended early, two or three of a tile that leaves two thirds of shared
    memory free, while others get none. A product of 64 rows then takes 27 us instead of 20. Each stage holds a tile of activations, and one of codes, which wait in registers for their last step
    where they are decoded. (Triton stages less of the codes of tiles of 32 columns, which then are spread less.)

    Tiles of 16 rows have small stages, and many of them cost more than they spread (an H200, 4096 -> 14336: W4A16 16.5 -> 21.4 us, W4A8 16.9 -> 18.8), but for W8A16's (23.4 -> 19.4).
    """
    few = tile["BLOCK_M"] < 16 or (tile["BLOCK_M"] == 16 and (c.input is not None or c.weight.fmt.bits != 8))
    if c.m is None or few or tile["PARTS"] > 1:
        return tile
    step = BLOCK * tile["UNROLL"]
    x = tile["BLOCK_M"] * step * (c.dtype.itemsize if c.input is None else 1)
    w = halves * tile["BLOCK_N"] * step * c.weight.fmt.bits // 8
    held = 0 if c.input is not None and c.weight.fmt.bits == 8 else 1
    share = -(-_programs(tile, c, halves) // compat.multiprocessors(c.device))
    stages, most = tile["num_stages"], c.k // (step * tile["SPLIT"])

    def room(stages: int) -> int:
        return SHARED // (stages * x + (stages - held) * w + RESERVED)

    while stages < most and room(stages) > share and room(stages + 1) > 0:
        stages += 1
    return {**tile, "num_stages": stages}


def _programs(tile: dict[str, int], c: Case, halves: int = 1) -> int:
    return -(-c.n // (halves * tile["BLOCK_N"])) * (1 if c.m is None else -(-c.m // tile["BLOCK_M"])) * tile["SPLIT"]


def _fit(tile: Tile, k: int) -> dict[str, int]:
    """A tile for ``k`` columns: parts of K are whole blocks, and each has its warps."""
    chosen = dict(zip(FIELDS, tile))
    while chosen["PARTS"] > 1 and k % (BLOCK * chosen["PARTS"]):
        chosen |= {"PARTS": chosen["PARTS"] // 2, "num_warps": max(1, chosen["num_warps"] // 2)}
    return chosen


def _halved(c: Case, tile: dict[str, int]) -> dict[str, int]:
    """Half of a plain product's tile, so that as many sums are kept.

    With few rows it has half as many columns, and each warp keeps sixteen of them, of both halves. With many it depends on who decodes: codes that go to the tensor cores as they are lose half
    of their columns, which loads as much as the plain tile does; where they are decoded, warps that share an operand would each decode it, so half of the rows of activations go.
    16-bit operands are held in registers, two tiles of them here, which leaves room for the sums of 64 rows, and what 4-bit tables need for half as many in a thread: compiled for sm_90,
    nothing spills (``tests/gpu_codegen``).
    """
    rows, columns, warps = tile["BLOCK_M"], tile["BLOCK_N"], tile["num_warps"]
    if tile["PARTS"] > 1:  # a warp keeps the sums of its part
        return {**tile, "BLOCK_N": max(8, columns // 2)}
    decoded = c.input is None or c.weight.fmt.bits != 8
    if rows > 64 and (decoded or rows > 128 or columns < 128):
        rows = 64 if c.input is None else rows // 2
    elif columns >= 32 and (rows < 64 or columns > 64):  # of 64 rows of weights each, which four warps take from registers
        columns //= 2
        warps = warps if rows >= 64 else min(warps, columns // 16)
    if rows == 64 and c.input is None and c.weight.fmt.kind != "int" and c.weight.fmt.bits == 4:
        warps = 8
    return {**tile, "BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps}


def _nearest(known: dict[tuple[int, int, int], Tile], m: int | None, n: int, k: int) -> Tile:
    most = max(size[0] for size in known)
    wanted = min((size[0] for size in known if m is not None and size[0] >= m), default=most)
    return known[min((size for size in known if size[0] == wanted), key=lambda size: abs(math.log(size[1] / n)) + abs(math.log(size[2] / k)))]


def guess(m: int | None, n: int) -> Tile:
    """A tile for what nobody measured: 16 rows of weights for each warp while there are few rows of activations, tensor-core tiles of 64 x 128 and more beyond."""
    if m is not None and m <= 16:
        return (16, 64, 1, 1, 4, 4, 1) if n >= 8192 else (16, 32, 1, 1, 2, 4, 1)
    if m is not None and m <= 64:
        return (_power(m), 64, 1, 1, 4, 4, 1)
    return (128, 128, 1, 1, 8, 3, 1)


def _power(m: int) -> int:
    return 1 << max(m - 1, 0).bit_length()
