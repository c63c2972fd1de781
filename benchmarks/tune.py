"""Finds the tile of every streamed product on the GPU at hand: `python benchmarks/tune.py [--seconds 200] [--only W4A16 FP8] [--rows 1 16] [--size 4096x14336] [--block-m 1] [--early] [--log LOG [--resume]]`, and writes
`kernels/tuned.json`.

Each candidate is the product's own template, rendered as an ordinary kernel (`standalone.py`), compiled by a pool of processes first, checked against float32 on the same codes, then timed:
six weights in rotation so that L2 does not help, launches in a CUDA graph, median of replays. Where parts of K are split, adding them up is timed with it. `--early`: each launch begins while the
one before ends (programmatic dependent launch), as with mode="reduce-overhead".
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from standalone import load, render

from qcompile.compat_ir import waiting
from qcompile.core.qtensor import quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels import linear, linear_glu, scaled_linear, stream, tiles
from qcompile.kernels.op import Case
from qcompile.kernels.quantize import reference as quantize_activations
from qcompile.kernels.tuned import FIELDS, GROUP_M, Tile, arithmetic

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the pool's processes: with a thread for each core in each of them nothing moves
OUT = Path(__file__).resolve().parents[1] / "kernels" / "tuned.json"
RECIPES = {"W4A8": ("int4.g128", "int8.row"), "W4A16": ("int4.g128", None), "W8A8": ("int8.row", "int8.row"), "FP8": ("e4m3.row", "e4m3.row"), "NF4": ("nf4.g64", None), "W8A16": ("int8.row", None), "FP8A16": ("e4m3.row", None)}
SHAPES = ((14336, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (28672, 4096), (128256, 4096), (3072, 2048), (2048, 8192))
"""N, K: the wide and the long linear of an 8B model, q, k and v in one, o, gate and up in one, the head; small ones of a 1B model. Other sizes take the nearest."""
GATED = ((28672, 4096), (16384, 2048))
"""Gate and up with their activation, as one kernel."""
EVERYWHERE = ("W4A8", "W4A16", "W8A8")
"""Recipes that are tuned for all shapes, the others so for one row of activations and for the first shape beyond."""
ROTATE, COPIES, REPLAYS = 6, 4, 7
TYPES = {torch.int8: "i8", torch.uint8: "u8", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32"}
CONSTANTS = ("BLOCK_M", "BLOCK_N", "GROUP_M", "SPLIT", "UNROLL")
PARTS = ((8, 4), (16, 4), (16, 8), (32, 4), (32, 8), (16, 2), (32, 2))
"""BLOCK_N and the parts that K is cut in, a warp for each."""
BY_WARPS = ((16, 1), (32, 2), (64, 4))
"""BLOCK_N and warps: sixteen rows of weights for each, so that no warp decodes what another does."""


Key = tuple[str, int, int, int, bool]
"""Recipe, M, N, K, whether it is gated: one row of the table."""


@dataclass(frozen=True)
class Job:
    recipe: str
    m: int
    n: int
    k: int
    tile: Tile
    gated: bool = False


def candidates(recipe: str, m: int, n: int, k: int, gated: bool = False) -> Iterator[Tile]:
    """Tiles worth a try: those of whole programs, then those whose programs cut K in parts."""
    yield from ((*tile, 1) for tile in _whole(recipe, m, n, gated))
    shapes = [(width, parts) for width, parts in PARTS if k % (128 * parts) == 0 and not (gated and width > 16)]
    if m == 1:
        yield from ((rows, width, 1, unroll, parts, stages, parts) for rows in (1, 16) for width, parts in shapes if parts > 2 for unroll, stages in ((1, 3), (1, 4), (1, 6), (2, 3)))
    elif m <= 16:
        yield from ((16, width, 1, unroll, parts, stages, parts) for width, parts in shapes if width > 8 for unroll, stages in ((1, 3), (1, 4), (2, 3)))


def _whole(recipe: str, m: int, n: int, gated: bool) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Few rows of weights want K in parts, to have enough programs. A gated product keeps two sums and is never split."""
    parts = (1,) if n > 8192 else (1, 2, 4)
    if gated:
        turns = ((1, 4), (2, 3), (4, 2))
        few = ((8, 1), (16, 1), (32, 2), (64, 4))
        if m <= 16:
            yield from ((rows, width, 1, unroll, warps, stages) for rows in ((1, 16) if m == 1 else (16,)) for width, warps in few for unroll, stages in turns)
        elif m <= 64:
            yield from ((64, width, 1, unroll, warps, stages) for width, warps in ((32, 4), (64, 4), (64, 8), (128, 8)) for unroll, stages in ((1, 3), (1, 4), (2, 3)))
        elif m <= 256 or recipe in ("W4A8", "W8A8", "FP8"):
            yield from ((rows, width, 1, 1, warps, stages) for rows, width, warps in ((64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8), (64, 64, 8)) for stages in (3, 4))
    elif m == 1:  # never split: K in parts inside of a program was faster everywhere
        turns = ((1, 6), (2, 3), (2, 5), (4, 2), (4, 3))
        shapes = (*BY_WARPS[:2], (8, 1))
        yield from ((rows, width, 1, unroll, warps, stages) for rows in (1, 16) for width, warps in shapes for unroll, stages in turns)
    elif m <= 16:
        shapes = (*BY_WARPS, (128, 4), (128, 8))
        yield from ((16, width, split, unroll, warps, stages) for width, warps in shapes for split in parts for unroll, stages in ((1, 5), (2, 3)))
    elif m <= 64:
        shapes = ((32, 4), (64, 4), (128, 4), (128, 8))
        yield from ((64, width, split, unroll, warps, stages) for width, warps in shapes for split in parts for unroll, stages in ((1, 3), (1, 4), (1, 5), (2, 3)))
    elif m <= 256:
        tiles_ = ((128, 64, 4), (128, 128, 8), (256, 64, 8), (256, 128, 8), (64, 128, 4), (64, 128, 8))
        yield from ((rows, width, split, unroll, warps, stages) for rows, width, warps in tiles_ for split in parts[:2] for unroll, stages in ((1, 3), (1, 4), (2, 3)))
    elif recipe in ("W4A8", "W8A8", "FP8"):  # the others dequantize once and call the library
        yield from ((rows, width, 1, 1, 8, stages) for rows, width in ((128, 128), (256, 128), (128, 256)) for stages in (3, 4))


def jobs(only: Sequence[str] = (), rows: Sequence[int] = (1, 16, 64, 256, 4096), sizes: Sequence[str] = (), block_m: int | None = None) -> list[Job]:
    """All that is to be timed; ``sizes`` ("4096x14336", N and K) and ``block_m`` (a tile's rows of activations) keep only theirs."""
    found = []
    for m in rows:
        for recipe in only or RECIPES:
            shapes = SHAPES if m == 1 or (recipe in EVERYWHERE and m <= 256) else SHAPES[:1]
            found += [Job(recipe, m, n, k, tile) for n, k in shapes if n < 50000 or m <= 16 for tile in candidates(recipe, m, n, k)]
            found += [Job(recipe, m, n, k, tile, True) for n, k in GATED if recipe in (*EVERYWHERE, "FP8") for tile in candidates(recipe, m, n, k, True)]
    return [job for job in found if (not sizes or f"{job.n}x{job.k}" in sizes) and block_m in (None, job.tile[0])]


def case(job: Job) -> Case:
    weight, given = RECIPES[job.recipe]
    x = Scheme.parse(given) if given else None
    return Case(torch.device("cuda"), x.fmt.dtype if x else torch.bfloat16, Scheme.parse(weight), x, job.n, job.k, job.m, capability=(9, 0))


def source(job: Job, early: bool = False) -> tuple[str, dict[str, str]]:
    """The kernel's text and the Triton dtype of each pointer. ``early``: it waits for the kernel before, as templates do that are launched early."""
    c = case(job)
    split = job.tile[2] > 1
    gate = stream.Gate("silu", linear_glu.ACTIVATIONS["silu"].text) if job.gated else None
    loop = stream.loop(c.input, c.weight, c.n, c.k, stream.operand(c), split, job.m % job.tile[0] == 0, gate, stream.place(job.m, job.tile[0]), job.tile[6], paired=stream.pairs(c, tile_of(job)))
    sample = quantize(torch.ones(16, job.k), c.weight).flatten()
    shapes: dict[str, tuple[int, ...]] = {"X": (job.m, job.k)}
    types = {"X": TYPES[c.dtype]}
    for name, t in zip(("W", "S"), sample):
        shapes[name], types[name] = (job.n, *t.shape[1:]), TYPES[t.dtype]
    if c.input is not None:
        shapes["SX"], types["SX"] = (job.m, 1), "fp32"
    template = loop.kernel(stream.GATED_HEADER if job.gated else stream.HEADER, stream.SPLIT_FOOTER if split else tiles.FOOTER)
    return render(waiting(template) if early else template, shapes, CONSTANTS, "tl.float32" if split else "tl.bfloat16", (job.m, job.n // 2 if job.gated else job.n)), types | {"OUT": "fp32" if split else "bf16"}


def tile_of(job: Job) -> dict[str, int]:
    """As the table of tiles gives it."""
    return dict(zip(FIELDS, job.tile))


def constants(job: Job) -> dict[str, Any]:
    return {"GROUP_M": GROUP_M, **{name: value for name, value in tile_of(job).items() if name != "PARTS"}}


def compile_ahead(job: Job, early: bool = False) -> tuple[Job, str]:
    """In a process of the pool. Returns what went wrong, if anything."""
    return job, warm(*source(job, early), launched(job, early))


def launched(job: Job, early: bool) -> dict[str, Any]:
    """The constants of a launch, and how it is launched."""
    return {**constants(job), **({"launch_pdl": True} if early else {})}


def warm(text: str, types: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """Compile a kernel into Triton's cache; what went wrong, if anything."""
    from triton.runtime.jit import MockTensor

    names = {name: dtype for dtype, name in TYPES.items()}
    try:
        kernel = load(text)
        kernel.warmup(*(MockTensor(names[types[a]]) for a in kernel.arg_names if a in types), grid=(1,), **given)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200] if str(error).strip() else ''}"
    return ""


class Problem:
    """Weights in rotation, one input, and the truth."""

    def __init__(self, recipe: str, m: int, n: int, k: int, gated: bool, early: bool = False) -> None:
        self.early = early
        weight, given = RECIPES[recipe]
        torch.manual_seed(0)
        w = torch.randn(n, k, device="cuda") / 64
        self.weights = [quantize(w, Scheme.parse(weight)).flatten()]
        self.weights += [[t.clone() for t in self.weights[0]] for _ in range(ROTATE - 1)]
        rows = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        if given:
            codes, scale = quantize_activations(rows, [], given)
            self.x, self.more = codes, [scale]
            self.truth = scaled_linear.reference(codes, [scale], self.weights[0], f"{given} @ {weight}")
        else:
            self.x, self.more = rows, []
            self.truth = linear.reference(rows, self.weights[0], weight)
        self.m, self.n = m, n
        if gated:
            gate, up = self.truth.chunk(2, -1)
            self.truth, self.n = torch.nn.functional.silu(gate) * up, n // 2

    def microseconds(self, job: Job) -> float:
        """Median of one product; NaN where it is wrong."""
        split = job.tile[2]
        kernel = load(source(job, self.early)[0])
        shape = (split, self.m, self.n) if split > 1 else (self.m, self.n)
        outs = [torch.full(shape, float("nan"), device="cuda", dtype=torch.float32 if split > 1 else torch.bfloat16) for _ in range(ROTATE)]
        given = launched(job, self.early)
        programs = -(-self.m // given["BLOCK_M"]) * -(-self.n // given["BLOCK_N"]) * split

        def once(i: int) -> torch.Tensor:
            kernel[(programs,)](self.x, *self.weights[i], *self.more, outs[i], **given)
            return torch.sum(outs[i], 0, dtype=torch.bfloat16) if split > 1 else outs[i]

        y = once(0).float()
        if not float((y - self.truth).norm() / self.truth.norm()) < 1e-2:
            return float("nan")
        return graphed(once)


def graphed(once: Any) -> float:
    """Microseconds of one of the rotating launches, in a CUDA graph."""
    stream_ = torch.cuda.Stream()
    with torch.cuda.stream(stream_):
        once(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream_):
        for _ in range(COPIES):
            for i in range(ROTATE):
                once(i)
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (COPIES * ROTATE))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop timing after so long")
    parser.add_argument("--only", nargs="+", default=(), choices=list(RECIPES))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 16, 64, 256, 4096), help="rows of activations")
    parser.add_argument("--size", nargs="+", default=(), help="sizes NxK; all where none is given")
    parser.add_argument("--block-m", type=int, help="only tiles of so many rows of activations")
    parser.add_argument("--early", action="store_true", help="launch each product while the one before ends")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--log", type=Path, help="every timing, one JSON list a line")
    parser.add_argument("--resume", action="store_true", help="times that the log holds count, and are not taken again: the log of a run with the same --early")
    given = parser.parse_args()
    begun = time.perf_counter()
    todo = jobs(given.only, given.rows, given.size, given.block_m)
    if not todo:
        parser.error(f"nothing to time: there are sizes {', '.join(sorted({f'{job.n}x{job.k}' for job in jobs(given.only)}))}, NxK")
    problems: dict[Key, Problem] = {}
    best: dict[Key, tuple[float, Tile]] = {}
    if given.resume:
        done = logged(given.log)
        for job, us in done.items():
            best[key_of(job)] = min(best.get(key_of(job), (us, job.tile)), (us, job.tile))
        todo = [job for job in todo if job not in done]
    log = given.log.open("a") if given.log else None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(2, (os.cpu_count() or 4) - 1), mp_context=context) as pool:
        for future in as_completed([pool.submit(compile_ahead, job, given.early) for job in todo]):
            job, problem = future.result()
            us = float("nan")
            if time.perf_counter() - begun > given.seconds:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            if not problem:
                key = key_of(job)
                if key not in problems:
                    problems[key] = Problem(*key, given.early)
                try:
                    us = problems[key].microseconds(job)
                except Exception as error:
                    problem = f"{type(error).__name__}: {str(error)[:200]}"
                problem = problem or ("" if us == us else "wrong")
                if us == us and (key not in best or us < best[key][0]):
                    best[key] = (us, job.tile)
            if log:
                log.write(json.dumps([*key_of(job), *job.tile, round(us, 2), problem]) + "\n")
                log.flush()
            write(given.out, best) if len(best) and not problem else None
    write(given.out, best)
    for key, (us, tile) in sorted(best.items()):
        print(*key, "->", tile, f"{us:.2f} us")
    print(f"{len(todo)} candidates, {time.perf_counter() - begun:.0f} s")


def logged(path: Path) -> dict[Job, float]:
    """Jobs of a log and their times, infinite where something went wrong."""
    rows = map(json.loads, path.read_text().splitlines())
    return {Job(*row[:4], (*row[5:-2], 1)[:7], row[4]): float("inf") if row[-1] else row[-2] for row in rows}


def key_of(job: Job) -> Key:
    return job.recipe, job.m, job.n, job.k, job.gated


def write(path: Path, best: dict[Key, tuple[float, Tile]]) -> None:
    """Rows of the table in the place of what it has of their sizes; what was not timed stays. Products of one arithmetic, such as W4A16's of any zero point, share theirs."""
    rows = [row(arithmetic(case(Job(*key[:4], tile)), key[4]), key[1:4], tile, us) for key, (us, tile) in sorted(best.items())]
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    save(path, {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}, merged(old, rows))


def merged(old: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A table's rows with ``rows`` in the place of those of their arithmetic and size, the others behind."""
    new = {(r["arithmetic"], *r["size"]): r for r in rows}
    return [*(new.pop((r["arithmetic"], *r["size"]), r) for r in old), *new.values()]


def row(name: str, size: Sequence[int], tile: Tile, us: float) -> dict[str, Any]:
    """One row of the table; parts are left out where there is one."""
    return {"arithmetic": name, "size": list(size), "tile": list(tile[: None if tile[6] > 1 else 6]), "us": round(us, 2)}


def save(path: Path, about: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """The table, a row a line."""
    text = ",\n ".join(json.dumps(r) for r in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n {text}\n]}}\n')


if __name__ == "__main__":
    main()
