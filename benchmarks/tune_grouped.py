"""Finds the tile of grouped products (stacks of experts, rows sorted by expert) on the GPU at hand: `python benchmarks/tune_grouped.py`, and puts its rows into `kernels/tuned.json`.

As `tune.py` does it: each candidate is the product's own template, compiled by a pool of processes, checked against float32 on the same codes, timed over weights and routings in rotation.
The size of a row is (rows of an expert in the mean, N, K).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import Moe
from gpu_moe import COPIES, Grouped, inputs, truth
from standalone import load, render
from tune import OUT, PARTS, RECIPES, TYPES, graphed, merged, row, save, tile_of, warm

from qcompile.core.qtensor import quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels import grouped, stream
from qcompile.kernels.op import Case
from qcompile.kernels.quantize import reference as quantize_activations
from qcompile.kernels.tuned import GROUP_M, Tile, arithmetic

EXPERTS, TOP, N, K = 128, 8, 768, 2048
TOKENS = (1, 64, 1024, 4096)
TUNED = ("W4A16", "W4A8", "W8A8", "FP8", "W8A16", "NF4")
CONSTANTS = ("BLOCK_M", "BLOCK_N", "GROUP_M", "UNROLL", "EXPERTS", "EXPERTS_2")


@dataclass(frozen=True)
class Job:
    recipe: str
    tokens: int
    tile: Tile

    @property
    def mean(self) -> int:
        """Rows of an expert in the mean, rounded up."""
        return max(1, -(-self.tokens * TOP // EXPERTS))


def candidates(tokens: int) -> Iterator[Tile]:
    """Tiles worth a try; K is never split among programs."""
    if tokens <= 64:
        shapes = ((16, 8, 1), (16, 16, 1), (16, 32, 2), (16, 64, 4))
        yield from ((*shape[:2], 1, unroll, shape[2], stages, 1) for shape in shapes for unroll, stages in ((1, 4), (1, 6), (2, 3), (4, 3)))
        yield from ((16, width, 1, unroll, parts, stages, parts) for width, parts in PARTS for unroll, stages in ((1, 3), (1, 4), (2, 3)))
    else:
        wide = ((64, 64, 4), (64, 128, 8), (64, 128, 4), (128, 64, 4), (128, 128, 8), (256, 64, 4), (256, 128, 8))
        yield from ((rows, width, 1, 1, warps, stages, 1) for rows, width, warps in wide if rows < 256 or tokens > 1024 for stages in (2, 3, 4))


def case(job: Job) -> Case:
    weight, given = RECIPES[job.recipe]
    x = Scheme.parse(given) if given else None
    w = grouped.linear.unnested(Scheme.parse(weight))
    return Case(torch.device("cuda"), x.fmt.dtype if x else torch.bfloat16, w, x, N, K, job.tokens * TOP, EXPERTS, capability=(9, 0))


def source(job: Job) -> tuple[str, dict[str, str]]:
    """The kernel's text and the Triton dtype of each pointer."""
    c = case(job)
    loop = stream.loop(c.input, c.weight, N, K, stream.operand(c), False, place=grouped.PLACE, parts=job.tile[6], paired=stream.pairs(c, tile_of(job)))
    shapes: dict[str, tuple[int, ...]] = {"X": (c.m or 0, K), "INDEX": (EXPERTS,)}
    types = {"X": TYPES[c.dtype], "INDEX": TYPES[torch.int32]}
    for name, t in zip(("W", "S"), quantize(torch.ones(1, 16, K), c.weight).flatten()):
        shapes[name], types[name] = (EXPERTS, N, *t.shape[2:]), TYPES[t.dtype]
    if c.input is not None:
        shapes["SX"], types["SX"] = (c.m or 0, 1), "fp32"
    return render(grouped.source(c, False, loop), shapes, CONSTANTS, "tl.bfloat16", (c.m or 0, N)), types | {"OUT": "bf16"}


def constants(job: Job) -> dict[str, int]:
    rows, width, _, unroll, warps, stages, _ = job.tile
    return {"BLOCK_M": rows, "BLOCK_N": width, "GROUP_M": GROUP_M, "UNROLL": unroll, "EXPERTS": EXPERTS, "EXPERTS_2": 2 * EXPERTS, "num_warps": warps, "num_stages": stages}


def compile_ahead(job: Job) -> tuple[Job, str]:
    """In a process of the pool. Returns what went wrong, if anything."""
    return job, warm(*source(job), constants(job))


class Problem:
    """Stacks in rotation, as many routings, and the truth of the first."""

    def __init__(self, recipe: str, tokens: int) -> None:
        _, given = RECIPES[recipe]
        about = Moe(recipe, tokens, 1.0, 8.0, experts=EXPERTS, n=N, k=K, top=TOP)
        module = Grouped(EXPERTS, N, K).to("cuda", torch.bfloat16)
        torch.nn.init.normal_(module.weight, std=1 / 64)
        c = case(Job(recipe, tokens, (16, 16, 1, 1, 1, 1, 1)))
        first = quantize(module.weight.detach(), c.weight).flatten()
        self.weights = [first, *([t.clone() for t in first] for _ in range(COPIES - 1))]
        rows = [inputs(about, seed, "cuda") for seed in range(COPIES)]
        self.ends = [ends for _, ends in rows]
        self.given = [(x, []) if given is None else (lambda codes, scale: (codes, [scale]))(*quantize_activations(x, [], given)) for x, _ in rows]
        self.truth = truth(about, module, rows[0])

    def microseconds(self, job: Job) -> float:
        """Median of one product; NaN where it is wrong."""
        kernel, given = load(source(job)[0]), constants(job)
        m = job.tokens * TOP
        outs = [torch.full((m, N), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
        grid = grouped.sorted_grid(m, N, given, cdiv=lambda a, b: -(-a // b))

        def once(i: int) -> torch.Tensor:
            i %= COPIES
            x, more = self.given[i]
            kernel[grid](x, *self.weights[i], *more, self.ends[i], outs[i], **given)
            return outs[i]

        y = once(0).float()
        return graphed(once) if float((y - self.truth).norm() / self.truth.norm()) < 1e-2 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TUNED)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    begun = time.perf_counter()
    todo = [Job(recipe, tokens, tile) for tokens in TOKENS for recipe in ((given.only,) if given.only else TUNED) for tile in candidates(tokens)]
    problems: dict[tuple[str, int], Problem] = {}
    best: dict[tuple[str, int], tuple[float, Tile]] = {}
    with ProcessPoolExecutor(max(2, (os.cpu_count() or 4) - 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(compile_ahead, job) for job in todo]):
            job, problem = future.result()
            key, us = (job.recipe, job.tokens), float("nan")
            if not problem:
                if key not in problems:
                    problems[key] = Problem(*key)
                try:
                    us = problems[key].microseconds(job)
                except Exception as error:
                    problem = f"{type(error).__name__}: {str(error)[:200]}"
            print(*key, job.tile, f"{us:.2f}", problem)
            if us == us and (key not in best or us < best[key][0]):
                best[key] = (us, job.tile)
    for key, (us, tile) in sorted(best.items()):
        print("best", *key, "->", tile, f"{us:.2f} us")
    write(given.out, best)
    print(f"{len(todo)} candidates, {time.perf_counter() - begun:.0f} s")


def write(path: Path, best: dict[tuple[str, int], tuple[float, Tile]]) -> None:
    """The rows of grouped products, in the place of what the table has of their sizes."""
    table: dict[str, Any] = json.loads(path.read_text())
    jobs = {key: Job(*key, tile) for key, (_, tile) in sorted(best.items())}
    mine = [row(arithmetic(case(job), grouped=True), (job.mean, N, K), job.tile, best[key][0]) for key, job in jobs.items()]
    save(path, table, merged(table.pop("rows"), mine))


if __name__ == "__main__":
    main()
