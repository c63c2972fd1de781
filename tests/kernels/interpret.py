"""Runs streamed products in Triton's interpreter, in a process of its own (the variable must be set before Triton is imported): prints the largest error of each case. With the argument
"gated" it runs gated ones, with "grouped" those of stacked experts, with "parts" those that cut K inside a program, with "beside" those with 16-bit columns beside, with "paired" those that read codes two bytes at a time.

The interpreter has no inline PTX, so each decoder is replaced by Triton statements of the same meaning; `test_decode.py` runs the PTX itself. It has no bfloat16 dot either: float16 and int8.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from standalone import load, render

from qcompile.core.qtensor import quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels import decode, grouped, linear, linear_glu, scaled_linear, split_linear, stream, tiles
from qcompile.kernels.beside import Beside
from qcompile.kernels.op import Case
from qcompile.kernels.quantize import reference as quantize_activations

CASES = [
    ("int4.g128", None), ("int4.g64", None), ("uint4.g128.point", None), ("int4.row", None), ("int8.row", None), ("int8.g128", None), ("nf4.g64", None), ("nf4.g64/int8.row", None), ("fp4.g64", None),
    ("e2m1.g128/int8.tensor", None), ("int4.b64x128", None), ("int4.g128", "int8.row"), ("uint4.g128.point", "int8.row"), ("int4.g128.point", "int8.row"), ("int4.row", "int8.tensor"),
    ("uint4.row.point", None), ("uint4.row.point", "int8.row"), ("int8.row", "int8.row"), ("int8.g64", "int8.row"), ("int8.g128", "int8.g128"), ("int4.g128/int8.row", "int8.row"), ("uint4.row", "int8.row"), ("e4m3.row", "e4m3.row"), ("e4m3.b64x128", "e4m3.g128"), ("e5m2.row", "e4m3.row"), ("e4m3.row", None), ("e5m2.g64", None),
]  # fmt: skip
SIZES = [(1, 40, 256), (3, 33, 130), (32, 80, 520)]
"""Rows, N, K: K that ends inside a block of 128, N and rows that fill no tile."""
TILES = [(16, 32, 1), (16, 32, 2), (32, 16, 4)]

GATED = [(40, 33, 130), (1, 24, 256), (3, 17, 520)]
"""The same for gated products, N being that of the output: rows of two halves that fill no tile, and reach into each other's."""


def statements(self, source, *names, paired=0):
    """What ``Decoder.call`` stands for, without PTX; the format is put in by ``check``."""
    lines = [f"raw = {source}"]
    if paired:
        lines += ["raw = raw.to(tl.int32)", f"raw = tl.reshape(tl.join(raw & 255, (raw >> 8) & 255), (BLOCK_N, {paired})).to(tl.uint8)"]
    for i, name in enumerate(names):
        whole = {"e4m3": "tl.float8e4nv", "e5m2": "tl.float8e5"}.get(statements.scheme.fmt.name, "tl.int8")
        lines.append(f"code = (raw.to(tl.int32) >> {4 * i}) & 15" if len(names) == 2 else f"code = raw.to({whole}, bitcast=True)")
        lines += [tiles.decode(statements.scheme, "tl.float32"), f"{name} = (w * {self.factor}).to({self.dtype})"]
    return "\n".join(lines)


def check(weight, given, m, n, k, tile, gate=None, parts=1, beside=None, paired=False):
    w, x = Scheme.parse(weight), Scheme.parse(given) if given else None
    statements.scheme = w
    width = n if gate is None else 2 * n
    values = torch.randn(width, k)
    q = quantize(values.abs() if w.fmt.lo == 0 and w.zero == "none" else values, w)
    rows = torch.randn(m, k)
    dot = "tl.float16" if x is None else "tl.int8" if x.fmt.kind == "int" else "fp8"
    block_m, block_n, split = tile
    loop = stream.loop(x, w, width, k, dot, split > 1, m % block_m == 0, gate, stream.place(m, block_m), parts, beside, paired)
    tensors = {"X": rows.half(), **dict(zip(["W", "S", *(p for p in loop.pointers if p in ("SS", "Z"))], q.flatten()))}
    if given:
        codes, scale = quantize_activations(rows, [], given)
        tensors |= {"X": codes, "SX": scale}
        truth = scaled_linear.reference(codes, [scale], q.flatten(), f"{given} @ {weight}")
    else:
        truth = linear.reference(tensors["X"], q.flatten(), weight)
    if gate is not None:
        halves = truth[:, :n].double(), truth[:, n:].double()
        truth = linear_glu.ACTIVATIONS[gate.name].fn(halves[not gate.first]) * halves[gate.first]
    if beside is not None:
        index = torch.randperm(k)[: beside.columns].to(torch.int32)
        index[torch.rand(beside.columns) < 0.2] = -1
        x16, w16 = (torch.randn(rows, k if gather else beside.columns).half() for rows, gather in ((m, beside.gather_x), (n, beside.gather_w)))
        tensors |= {"X16": x16, "W16": w16, "INDEX": index}
        inside = (index >= 0) | (not beside.indexed)
        truth = truth + (split_linear.gathered_x(x16, index, beside.gather_x) * inside).float() @ split_linear.gathered_w(w16, index, beside.gather_w).float().T
    out = torch.full((split, m, n) if split > 1 else (m, n), float("nan"))
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP_M": 8, "SPLIT": split, "UNROLL": 1}
    template = loop.kernel(stream.HEADER if gate is None else stream.GATED_HEADER, stream.SPLIT_FOOTER if split > 1 else tiles.FOOTER)
    run = load(render(template, {name: tuple(t.shape) for name, t in tensors.items()}, list(constants), "tl.float32", (m, n)))
    run[(-(-m // block_m) * -(-n // block_n) * split,)](*(tensors[name].contiguous() for name in ("X", "W", "S", *loop.pointers)), out, **constants)
    y = out.sum(0) if split > 1 else out
    return float((y - truth).norm() / truth.norm())


ENDS = [[0, 5, 5, 40, 41], [3, 3, 3, 3, 3], [0, 0, 0, 0, 17]]
"""Where the rows of five experts end: experts without rows, with fewer than a tile and with more; rows behind the last end, one and many."""


def stacked(weight, given, ends, more, k, rows, by_row, parts, paired=False):
    """Largest error of a grouped product over output that starts as NaN; ``more`` rows belong to nobody."""
    w, x = Scheme.parse(weight), Scheme.parse(given) if given else None
    statements.scheme = w
    m, n, experts = ends[-1] + more, 24, len(ends)
    values = torch.randn(experts, n, k)
    q = quantize(values.abs() if w.fmt.lo == 0 and w.zero == "none" else values, w)
    flat = q.flatten() if w.scale is None else linear.flat_scales(q.flatten(), w, k)
    index = torch.tensor(ends, dtype=torch.int32)
    if by_row:  # the same owners, one for each row; those behind the end name an expert that is not there
        index = torch.searchsorted(index, torch.arange(m, dtype=torch.int32), right=True).to(torch.int32)
    tensors = {"X": torch.randn(m, k).half(), "INDEX": index}
    scales = []
    if given:
        codes, scale = quantize_activations(tensors["X"].float(), [], given)
        tensors |= {"X": codes, "SX": scale}
        scales = [scale]
    s = linear.unnested(w)
    dot = "tl.float16" if x is None else "tl.int8" if x.fmt.kind == "int" else "fp8"
    loop = stream.loop(x, s, n, k, dot, False, place=grouped.PLACE, parts=parts, paired=paired)
    tensors |= dict(zip(["W", "S", *(p for p in loop.pointers if p == "Z")], flat))
    c = Case(torch.device("cuda"), tensors["X"].dtype, s, x, n, k, m, experts)
    block_m, block_n = rows, 16
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "UNROLL": 1, "EXPERTS": experts, "EXPERTS_2": 1 << experts.bit_length()}
    run = load(render(grouped.source(c, by_row, loop), {name: tuple(t.shape) for name, t in tensors.items()}, list(constants), "tl.float32", (m, n)))
    grid = (grouped.row_grid if by_row else grouped.sorted_grid)(m, n, constants, cdiv=lambda a, b: -(-a // b))
    out = torch.full((m, n), float("nan"))
    run[grid](*(tensors[name].contiguous() for name in ("X", "W", "S", *loop.pointers, "INDEX")), out, **constants)
    truth = grouped.reference(tensors["X"], scales, index, flat, f"{given} @ {s}" if given else str(s), by_row)
    return float((out - truth).abs().max() / truth.abs().max().clamp(min=1))


def experts():
    cases = [("int4.g128", None), ("uint4.g128.point", None), ("nf4.g64/int8.row", None), ("int8.row", None), ("int4.g128", "int8.row"), ("uint4.row.point", "int8.row"), ("int8.row", "int8.row"), ("e4m3.row", "e4m3.row"), ("int8.g128", "int8.g128")]
    rows = []
    for i, (weight, given) in enumerate(cases):
        for by_row in (False, True):
            more, k, size = (0, 3, 20)[i % 3], (130, 256, 260)[i % 3], 1 if by_row and i % 2 else (16, 32, 16)[i % 3]
            rows.append([weight, given, by_row, stacked(weight, given, ENDS[i % 3], more, k, size, by_row, 2 if k == 256 else 1)])
    return rows


def parts():
    """K in parts inside a program: every format, some of them gated (not tables, two sums of which are twice as far from the values that are not rounded)."""
    rows = []
    for i, (weight, given) in enumerate(CASES):
        count, (m, n, _), (block_m, block_n, _) = (2, 4)[i % 2], SIZES[i % 3], TILES[i % 3]
        gate = stream.Gate("silu", linear_glu.ACTIVATIONS["silu"].text, first=i % 2 == 0) if i % 3 == 1 and weight[:3] not in ("nf4", "fp4") else None
        rows.append([weight, given, count, check(weight, given, m, n, 128 * count * (1 + i % 2), (block_m, block_n, 1), gate, count)])
    return rows


def paired():
    """Codes that are read two bytes at a time: every format that is decoded to 16 bits, plain and gated and stacked, split and not."""
    rows = []
    for i, (weight, given) in enumerate(CASES):
        if given is None:
            gate = stream.Gate("silu", linear_glu.ACTIVATIONS["silu"].text) if i % 3 == 1 and weight[:3] not in ("nf4", "fp4") else None
            (m, n, _), tile = SIZES[i % 3], TILES[i % 3]
            rows.append([weight, gate is None, m, check(weight, None, m, n, 256 * (1 + i % 2), tile if gate is None else (*tile[:2], 1), gate, paired=True)])
            if i % 2 and weight[:3] not in ("nf4", "fp4"):
                rows.append([weight, "stacked", stacked(weight, None, ENDS[i % 3], 3, 256, 16, False, 1, paired=True)])
    return rows


def beside():
    """Few columns and more than two chunks, gathered and not, split and in parts, all rows in a tile and not."""
    rows = []
    for i, (weight, given) in enumerate([("int8.row", "int8.row"), ("int4.g128", "int8.row"), ("e4m3.row", "e4m3.row"), ("int4.g128", None), ("int8.row", "int8.tensor")]):
        for j, count in enumerate((1, 32, 75)):
            (m, n, k), tile = SIZES[(i + j) % 3], TILES[(i + 2 * j) % 3]
            parts = 2 if tile[2] == 1 and (i + j) % 2 else 1
            rows.append([weight, given, count, m, check(weight, given, m, n, 256 if parts > 1 else k, tile, None, parts, Beside(count, i % 2 == 0, j != 1))])
    return rows


def plain():
    return [[weight, given, *size, *tile, check(weight, given, *size, tile)] for weight, given in CASES for size, tile in zip(SIZES, TILES)]


def gated():
    """Every format with one activation and either order, every activation with one format."""
    rows = []
    for i, (weight, given) in enumerate([*CASES, *[("int8.row", "int8.row")] * len(linear_glu.ACTIVATIONS)]):
        name = list(linear_glu.ACTIVATIONS)[i - len(CASES)] if i >= len(CASES) else "silu"
        gate = stream.Gate(name, linear_glu.ACTIVATIONS[name].text, first=i % 2 == 0)
        size, (block_m, block_n, _) = GATED[i % 3], TILES[i % 3]
        rows.append([weight, given, name, gate.first, *size, check(weight, given, *size, (block_m, block_n, 1), gate)])
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    decode.Decoder.call = statements
    decode.settled = lambda name, dtype: f"{name} = {name}"
    print(json.dumps({"plain": plain, "gated": gated, "grouped": experts, "parts": parts, "beside": beside, "paired": paired}[sys.argv[1]]()))
