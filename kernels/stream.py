"""Products that stream the weight: its tile is the first operand of the dot, so that it goes from memory through registers, where it is decoded, to the tensor cores, and activations are the
second one. Each weight is decoded once for all rows of a tile, however few. ``y^T = W x^T``.

The K loop takes 128 columns a step: one packed block, whose halves are two operands of 64, or one plain tile. Scales of groups are fetched a step ahead.
``UNROLL`` steps make one turn of the loop. ``SPLIT`` programs may share a tile, each with its part of K: the output is then (SPLIT, M, N), and what reads it adds the parts up, in order.
With few rows of activations a program has little to do between two loads, and a single warp that takes all of K waits for itself. So K may also be cut in ``PARTS`` inside a program: tiles and sums
get a first axis, a warp works on each part (``tl.dot`` takes it as a batch), and the parts are added up once, behind the loop.

A *gated* loop (``kernels/linear_glu.py``) has two sums: rows ``rn`` of the weight and the rows as far behind them as half of all, which meet the same tile of activations. What has two of
everything, tiles of weights, scales, sums, is named with the endings ``GATED``.

A loop with columns *beside* it (``kernels/split_linear.py``) adds a second product to its sums, of some 16-bit columns of the activations and of the weight, which it gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.layouts import BLOCK
from qcompile.core.scheme import GROUPS, Scheme

from . import decode, tiles, tuned
from .beside import Beside
from .op import Case
from .tiles import SUB

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FEW = 64
"""Up to so many rows of activations tensor cores hand over FP8 sums after 128 columns: they keep about 14 bits, which shows in the sums of few rows (1e-2 at K = 2,048), and bandwidth is the limit there."""
BYTES = 8
"""Bits of a code that needs no unpacking."""


def supports(c: Case) -> Skip | None:
    """Whether ``loop`` covers a case that the general template covers."""
    w, x = c.weight, c.input
    if w.fmt.bits not in (4, BYTES):
        return Skip(f"codes of {w.fmt.bits} bits are not streamed")
    if w.fmt.learned:
        return Skip(f"the values of {w.fmt} are an input, and decoders have theirs in their text")
    if w.zero == "min" or not tiles.whole_subtiles(w, c.k) or (x is not None and not tiles.whole_subtiles(x, c.k)):
        return Skip(f"groups of {w} are not multiples of {SUB} columns")
    if w.scale is not None and not row_scales(w, c.n, c.k):
        return Skip(f"scales of {w} are not one for each row")
    if x is None and c.dtype.itemsize != 2:
        return Skip(f"activations are {c.dtype}")
    if w.fmt.bits == BYTES and (w.zero != "none" or (w.fmt.name != "int8" and w.fmt.native not in FP8)):
        return Skip(f"{w} is not int8 or FP8 without zero points")
    return None


def after(op: Callable[[Case], Skip | None]) -> Callable[[Case], Skip | None]:
    """``supports`` for an op that has refusals of its own, which come first."""

    def both(c: Case) -> Skip | None:
        refused = op(c)
        return supports(c) if refused is None else refused

    return both


def row_scales(w: Scheme, n: int, k: int) -> bool:
    """Quantized scales that plain 8-bit codes and one factor for each row (or one for all) give: the factor multiplies the sums."""
    s = w.scale
    return s is not None and s.scale is None and s.zero == "none" and s.packing == "plain" and w.zero == "none" and s.extent(1, w.grid_shape((n, k))[-1])[1] >= w.grid_shape((n, k))[-1] and s.group[0] in (0, 1)


def takes_scales(c: Case) -> bool:
    """Quantized scales that need not be widened first."""
    return c.device.type == "cuda" and supports(c) is None


HEADER = tiles.SIZES + """\
    part_k = tl.program_id(0) % SPLIT
    pid = tl.program_id(0) // SPLIT
"""

SPLIT_FOOTER = tiles.FOOTER.replace('("idx_m", "idx_n")', '("part_k", "idx_m", "idx_n")')
GATED_HEADER = HEADER.replace('N = {{size("W", 0)}}', 'N = {{size("W", 0)}} // 2')
PLAIN, GATED = ("",), ("", "_up")
"""Endings of the names of what belongs to one of the sums."""


@dataclass(frozen=True)
class Place:
    """Where a tile lies: statements that set ``rm`` and ``rn``, its rows of activations and of the weight, and which of the BLOCK_M rows of activations are its own."""

    text: str
    live: str


DENSE = Place(tiles.SWIZZLE.strip("\n"), "pid_m * BLOCK_M + tl.arange(0, BLOCK_M) < M")
ONE = Place(f"    pid_m = 0\n    pid_n = pid\n{tiles.ROWS.rstrip()}", DENSE.live)
"""All rows of activations are in every tile: nothing to divide by before the first load."""


def place(m: int | None, rows: int) -> Place:
    """Where tiles of ``rows`` rows lie among ``m`` (None: dynamic)."""
    return ONE if m is not None and m <= rows else DENSE


@dataclass(frozen=True)
class Gate:
    """What a gated loop makes of its two sums: ``text``, an expression of ``acc``, times the other. ``first``: the gate's rows are the first half of the weight's."""

    name: str
    text: str
    first: bool = True


def loop(x: Scheme | None, w: Scheme, n: int, k: int, dot: str, split: bool, whole: bool = False, gate: Gate | None = None, place: Place = DENSE, parts: int = 1, beside: Beside | None = None, paired: bool = False) -> tiles.Loop:
    """The K loop for activations of dtype ``dot`` ("tl.int8", "fp8", "tl.bfloat16" ...): sums in int32 or float32, scaled to float32. ``n``: rows of the weight, both halves where it is gated.

    ``whole``: every row of every tile is one of M. Rows that are not are masked: read from elsewhere, a single row of activations would be asked for sixteen times by every program.
    ``parts`` cut K, which is a multiple of 128 times as many, inside a program. ``paired``: codes are loaded two bytes at a time, see ``pairs``.
    """
    return _Text(x, w, n, k, dot, split, whole, gate, place, parts, beside, paired).loop()


class _Text:
    """The statements of one loop. A *piece* is what one dot takes: (columns, where they start in the step); pieces between two scales share a sum."""

    def __init__(self, x: Scheme | None, w: Scheme, n: int, k: int, dot: str, split: bool, whole: bool, gate: Gate | None, place: Place, parts: int, beside: Beside | None, paired: bool) -> None:
        assert gate is None or not split, "parts of sums cannot be added up before the activation"
        assert parts == 1 or (not split and k % (BLOCK * parts) == 0), f"{k} columns are not {parts} parts of whole blocks"
        self.x, self.w, self.n, self.k, self.dot, self.split, self.whole, self.gate, self.place, self.parts = x, w, n, k, dot, split, whole, gate, place, parts
        self.beside = beside
        self.span = k // parts
        self.sums = PLAIN if gate is None else GATED
        self.integer = dot == "tl.int8"
        self.out = "tl.int32" if self.integer else "tl.float32"
        self.packed = w.packing != "plain"
        group, self.x_group = w.extent(n, k)[1], k if x is None else x.extent(1, k)[1]
        self.by_group = min(group, self.x_group) < k
        self.fine = self.by_group and any(c < k and c % BLOCK for c in (group, self.x_group))
        """A scale for each half of a step."""
        self.decoder = decode.nibbles(w.fmt, dot) if self.packed else decode.wide(w.fmt, dot) if x is None else None
        self.factor = 1 if self.decoder is None else self.decoder.factor
        self.even = k % BLOCK == 0
        assert not paired or (self.decoder is not None and self.even and parts == 1), "only whole blocks of what is decoded are read in pairs"
        self.paired = paired

    def loop(self) -> tiles.Loop:
        step = [*self._weights(), *self._sums()]
        if self.by_group:
            step += self._fetch(f"k + {BLOCK}")
        live = [] if self.whole else [f"    live = ({self.place.live}){'[:, None]' if self.parts == 1 else '[None, :, None]'}"]
        early, late = self._beside()
        lines = [*self._range(), *early, *live, f"    column = tl.arange(0, {SUB})", f"    wide = tl.arange(0, {BLOCK})", *self._places()]
        kind = "tl.float32" if self.by_group else self.out
        shape = f"({'' if self.parts == 1 else f'{self.parts}, '}BLOCK_N, BLOCK_M)"
        lines += [f"    acc{u} = tl.zeros({shape}, dtype={kind})" for u in self.sums]
        if self.by_group:
            lines.append(tiles.block("\n".join(self._fetch("start")), 1))
        elif self.w.zero == "point":
            lines += [f"    z0{u} = tl.load({self._index('Z', '0', u)})" for u in self.sums]
        lines += [f"    for k in tl.range(start, stop, {BLOCK}, loop_unroll_factor=UNROLL):", tiles.block("\n".join(step), 2)]
        if self.parts > 1:
            lines += [f"    acc{u} = tl.sum(acc{u}, 0)" for u in self.sums]
        lines += [*self._scaled(), *late, "    acc = tl.trans(acc)"]
        pointers = (() if self.w.scale is None else ("SS",)) + (() if self.w.zero == "none" else ("Z",)) + (() if self.x is None else ("SX",)) + (() if self.beside is None else self.beside.pointers)
        return tiles.Loop(pointers, "\n".join(lines))

    def _index(self, name: str, columns: str, u: str) -> str:
        if self.parts == 1:
            return tiles.group_index(self.w, self.n, self.k, name, columns, f"rn{u}")
        return tiles.group_index(self.w, self.n, self.k, name, f"part[:, None] * {self.span} + {columns}", f"rn{u}[None, :]")

    def _range(self) -> list[str]:
        lines = self.place.text.splitlines()
        if self.gate is not None:
            lines += ["    rn_up = rn + N"] if self.gate.first else ["    rn_up = rn", "    rn = rn + N"]
        if self.parts > 1:
            return [*lines, f"    part = tl.arange(0, {self.parts})", "    start = 0", f"    stop = {self.span}"]
        if not self.split:
            return [*lines, "    start = 0", "    stop = K"]
        return [*lines, f"    span = (K + {BLOCK} * SPLIT - 1) // ({BLOCK} * SPLIT) * {BLOCK}", "    start = part_k * span", "    stop = tl.minimum(start + span, K)"]

    def _pieces(self) -> list[tuple[int, int]]:
        return [(SUB, 0), (SUB, SUB)] if self.packed or self.fine else [(BLOCK, 0)]

    def _places(self) -> list[str]:
        """Statements that set the addresses of the first step's tiles, ``x_at`` and ``w_at``: rows, the columns of one piece, of each part those that begin it."""
        columns = "column" if self._pieces()[0][0] == SUB else "wide"
        lines = [self._place("x_at", "X", "rm", "stride_xm", columns, self.span)]
        if self.paired:
            pair = f"tl.arange(0, {self._pieces()[0][0] // 2})"
            return lines + [self._place(f"w_at{u}", "W.to(tl.pointer_type(tl.int16), bitcast=True)", f"rn{u}", "(stride_wn // 2)", pair, 0) for u in self.sums]
        return lines + [self._place(f"w_at{u}", "W", f"rn{u}", "stride_wn", columns, self.span // 2 if self.packed else self.span) for u in self.sums]

    def _place(self, name: str, base: str, rows: str, stride: str, columns: str, span: int) -> str:
        if self.parts == 1:
            return f"    {name} = {base} + {rows}[:, None] * {stride} + {columns}[None, :]"
        return f"    {name} = {base} + {rows}[None, :, None] * {stride} + (part * {span})[:, None, None] + {columns}[None, None, :]"

    def _weights(self) -> list[str]:
        """Statements that set w0, w1 (or w0 alone) of dtype ``dot``, and x0, x1."""
        lines = []
        if self.packed:
            assert self.decoder is not None
            for u in self.sums:
                lines += [f"code{u} = tl.load(w_at{u} + k // {4 if self.paired else 2})", self.decoder.call(f"code{u}", f"w0{u}", f"w1{u}", paired=SUB if self.paired else 0)]
        for i, (columns, at) in enumerate(self._pieces()):
            step = f"k + {at}" if at else "k"
            inside = [] if self.even else [f"({step} + {'column' if columns == SUB else 'wide'} < K)[None, :]"]
            lines.append(f"x{i} = tl.load(x_at + {step}{_mask([*([] if self.whole else ['live']), *inside], self.integer)})")
            for u in self.sums if not self.packed else ():
                name = f"code{i}{u}" if self.decoder else f"w{i}{u}"
                lines.append(f"{name} = tl.load(w_at{u} + {f'({step}) // 2' if self.paired else step}{_mask(inside, self.w.fmt.kind == 'int')})")
                if self.decoder:
                    lines.append(self.decoder.call(name if self.paired else f"{name}.to(tl.uint8, bitcast=True)", f"w{i}{u}", paired=columns if self.paired else 0))
        return lines

    def _sums(self) -> list[str]:
        """Statements that add the step's products to ``acc``."""
        lines: list[str] = []
        point = self.w.zero == "point"
        pieces = range(len(self._pieces()))
        whole = self.parts == 1
        down, across = ("[:, None]", "[None, :]") if whole else ("[:, :, None]", "[:, None, :]")
        """Scales of rows of the weight and of activations (of each part) as an axis of the sums."""
        for i in pieces:
            s = i if self.fine else 0
            for u in self.sums:
                if point and not self.integer:
                    lines.append(f"w{i}{u} = w{i}{u} - z{s}{u}.to(tl.float32).to({self.dot}){down}")
                into = f"acc{u}" if not self.by_group else f"part{s}{u}"
                begun = not self.by_group or (i > 0 and not self.fine)
                turned = f"tl.trans(x{i})" if whole else f"tl.permute(x{i}, (0, 2, 1))"
                exact = f", max_num_imprecise_acc={BLOCK} if BLOCK_M <= {FEW} else None" if self.dot == "fp8" and not self.by_group else ""
                lines.append(f"{into} = tl.dot(w{i}{u}, {turned}, {f'{into}, ' if begun else ''}out_dtype={self.out}{exact})")
                if point and self.integer:  # z * sum(x) is what the codes have too much
                    lines += [f"sum{i} = tl.sum(x{i}.to(tl.int32), {1 if whole else 2})"] if u == self.sums[0] else []
                    lines.append(f"{into} -= z{s}{u}.to(tl.int32){down} * {self.factor} * sum{i}{across}")
        if self.by_group:
            for s in pieces if self.fine else (0,):
                for u in self.sums:
                    value = f"part{s}{u}.to(tl.float32) * s{s}{u}{down}" + (f" * sx{s}{across}" if self.x_group < self.k else "")
                    lines.append(f"acc{u} += {value}")
        elif self.packed:
            lines += [decode.settled(f"acc{u}", self.out) for u in self.sums]
        return lines

    def _fetch(self, at: str) -> list[str]:
        """Statements that load the scales (zero points, scales of groups of x) of the step that begins at column ``at``; past the end, those of the last one."""
        lines = []
        last = "K - 1" if self.parts == 1 else str(self.span - 1)
        for s in (0, 1) if self.fine else (0,):
            column = f"tl.minimum({at}{f' + {SUB}' if s else ''}, {last})"
            for u in self.sums:
                lines.append(f"s{s}{u} = tl.load({self._index('S', column, u)}).to(tl.float32)")
                if self.w.zero == "point":
                    lines.append(f"z{s}{u} = tl.load({self._index('Z', column, u)})")
            if self.x_group < self.k:
                rows, of_part = ("rm", column) if self.parts == 1 else ("rm[None, :]", f"(part[:, None] * {self.span} + {column})")
                lines.append(f"sx{s} = tl.load(SX + {rows} * {-(-self.k // self.x_group)} + {of_part} // {self.x_group})")
        return lines

    def _scaled(self) -> list[str]:
        """What multiplies the sums once: scales of whole rows, of the input, the decoder's factor. Then, where there are two, the activation of one times the other."""
        lines = []
        for u in self.sums:
            if self.integer and not self.by_group:
                lines.append(f"    acc{u} = acc{u}.to(tl.float32)")
            lines += [f"    acc{u} = acc{u} * {factor}" for factor in self._factors(u)]
        return lines if self.gate is None else [*lines, f"    acc = ({self.gate.text}) * acc_up"]

    def _beside(self) -> tuple[list[str], list[str]]:
        """Statements before the loop, and behind the scales: with few rows the columns are asked for first, since a load behind the loop would be waited for."""
        if self.beside is None:
            return [], []
        early = [f"    {line}" for line in self.beside.strides()]
        late: list[str] = []
        for c in range(0, self.beside.columns, self.beside.chunk):
            few = self.place is ONE and c < 64
            (early if few else late).extend(f"    {line}" for line in self.beside.loads(self.place.live, self.split, c))
            late.append(f"    acc = tl.dot(w16_{c}, tl.trans(x16_{c}), acc)")
        return early, late

    def _factors(self, u: str) -> list[str]:
        factors = [] if self.by_group else [f"tl.load({tiles.group_index(self.w, self.n, self.k, 'S', '0', f'rn{u}')}).to(tl.float32)[:, None]"]
        if self.w.scale is not None:
            factors.append(f"tl.load(SS + rn{u}).to(tl.float32)[:, None]" if self.w.scale.group[0] == 1 else "tl.load(SS).to(tl.float32)")
        if self.factor != 1:
            factors.append(repr(1 / self.factor))
        if self.x is not None and self.x.group == GROUPS["tensor"]:
            factors.append("tl.load(SX)")
        elif self.x is not None and self.x_group >= self.k:
            factors.append("tl.load(SX + rm)[None, :]")
        return factors


def _mask(conditions: Sequence[str], integer: bool) -> str:
    """Arguments of a load that is zero where a condition does not hold."""
    return f", mask={' & '.join(conditions)}, other={0 if integer else 0.0}" if conditions else ""


def grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """Programs of one tile's parts are neighbours."""
    return (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]) * meta["SPLIT"], 1, 1)


def split_grid(s: Any, m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """The same for an output of (SPLIT, M, N)."""
    return grid(m, n, meta, cdiv=cdiv)


def pairs(c: Case, config: dict[str, int]) -> bool:
    """Weights that are decoded to 16 bits for ``wgmma``, which takes whole tiles of 64 rows from registers of four warps each. Fewer rows of activations take ``mma``, for which lanes hold four columns in a row."""
    return c.input is None and config["BLOCK_M"] > 16 and config["BLOCK_N"] % 64 == 0 and config["num_warps"] % 4 == 0 and c.k % BLOCK == 0 and config["PARTS"] == 1


def operand(c: Case) -> str:
    """The dtype that a case's dots take, as ``loop`` names it."""
    return tiles.triton_dtype(c.dtype) if c.input is None else "tl.int8" if c.input.fmt.kind == "int" else "fp8"


def lower(c: Case, op: str, inputs: Sequence[Any], scheme: str, config: dict[str, int], gate: Gate | None = None, beside: Beside | None = None) -> Any:
    """Inductor's node: (M, N) float32, N half of the weight's rows where it is gated. ``inputs`` begin with x, and end with what stands beside the loop."""
    if compat.launches_early(c.device):
        config = tuned.spread(config, c, 1 if gate is None else 2)
    split, dot = config["SPLIT"] > 1, operand(c)
    m = compat.sizes(inputs[0])[0]
    rows = compat.static_int(m)
    whole = rows is not None and rows % config["BLOCK_M"] == 0
    about = (gate.name, "" if gate.first else "up first") if gate is not None else ()
    parts, where = config["PARTS"], place(rows, config["BLOCK_M"])
    name = tiles.template_name(op, "stream", "one" if where is ONE else "", "split" if split else "", f"parts {parts}" if parts > 1 else "", "whole" if whole else "", scheme, c.n if c.weight.group[0] != 1 else 0, c.k, dot, *about)
    paired = pairs(c, config)
    name += ("" if beside is None else f"_{beside.name}") + ("_paired" if paired else "")
    header, footer = HEADER if gate is None else GATED_HEADER, SPLIT_FOOTER if split else tiles.FOOTER
    source = lambda: loop(c.input, c.weight, c.n, c.k, dot, split, whole, gate, where, parts, beside, paired).kernel(header, footer)  # noqa: E731
    if not split:
        return compat.lower_template(name, source, inputs, (m, c.n if gate is None else c.n // 2), [config], grid)
    return compat.sum_first(compat.lower_template(name, source, inputs, (config["SPLIT"], m, c.n), [config], split_grid))
