"""Speed on the GPU at hand: `python benchmarks/run.py gpu [--parts breakdown model ...] [--case W4A16 ...] [--seconds 480]`. Checks first, times second; every row is written as soon as it is measured, failures too.

breakdown  the kernels of one step of decoding, of four layers of an 8B model and its head (`gpu_breakdown.py`)
model      decoding with a Llama: tokens a second through a CUDA graph, memory while weights are packed and after (`gpu_decode.py`)
prefill    2,048 tokens through an 8B model
linear     one nn.Linear of 4096 -> 14336 through torch.compile(backend="qcompile"), bfloat16 in and out (`gpu_linear.py`)
moe        grouped products of 128 experts against compiled bfloat16 grouped_mm (`gpu_moe.py`)
lines      LLM.int8's splits against W8A8
generate   transformers' generate with a static cache against the same step captured by hand
layers     a model that does not fit in 16 bits, filled layer by layer (`gpu_layers.py`)
start      seconds of the first call in a new process, cold and warm (`gpu_start.py`)
shapes     the other linears of an 8B model, at one and sixteen rows

What the numbers do not say: weights are random, and so are keys and values; the quantization of the input is included, and inside a model it is part of the norm before. `floor` is the time to read the weights
once at the bandwidth that a reduction reaches here (a copy, which writes too, reaches less), or the operations at the rate of a large product of the library. In whole models it counts weights, and keys and values
up to the context. Rows of `cases.py` run in order until `--seconds` are over; parts and rows that are not run keep what the file has, and each row says of which commit it is (`QCOMPILE_COMMIT`, where there is
no repository to ask).
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_breakdown
import gpu_decode
import gpu_layers
import gpu_linear
import gpu_moe
import gpu_start
import torch
from cases import BREAKDOWNS, GENERATES, GPU_CASES, GPU_SHAPES, LAYERS, LINES, MOES, PREFILLS, ROWS, RUNS, SHAPE, STARTS
from revision import commit
from tune import graphed

import qcompile

RESULTS = Path(__file__).parent / "results"
PARTS = ("breakdown", "model", "prefill", "linear", "moe", "lines", "generate", "start", "layers", "shapes")
Row = dict[str, Any]
NAMES = ("recipe", "model", "what", "head", "batch", "context", "tokens", "graph", "layers", "m", "n", "k")
"""What tells the rows of a part apart."""


def put(rows: list[Row], row: Row) -> None:
    """In the place of the row of the same case, or behind all."""
    same = [i for i, old in enumerate(rows) if (old["case"] == row["case"] if "case" in old else all(old.get(name) == row.get(name) for name in NAMES))]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)


def machine() -> Row:
    """Versions, the card, and its ceilings: a copy (bytes read and written), a reduction of 4 GiB (bytes read), and a large bfloat16 product."""
    import transformers

    a = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    b = torch.empty_like(a)
    x = torch.ones(1 << 30, device="cuda", dtype=torch.float32)
    total = torch.compile(lambda t: t.sum(), dynamic=False)
    copy, read = graphed(lambda i: b.copy_(a)), graphed(lambda i: total(x))
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = graphed(lambda i: square @ square)
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(), "qcompile": qcompile.__version__,
        "copy_tb_s": round(2 * a.nbytes / copy / 1e6, 3), "read_tb_s": round(x.nbytes / read / 1e6, 3), "bf16_tflop_s": round(2 * 8192**3 / product / 1e6, 1),
    }  # fmt: skip


def rows_of(part: str, about: Row, only: Sequence[str] = ()) -> list[tuple[str, partial[Row]]]:
    """(what, how) of each row of a part, in order; ``only`` are recipes."""

    def wanted(cases: Sequence[Any]) -> list[Any]:
        return [c for c in cases if not only or c.recipe in only]

    linears = wanted(GPU_CASES)
    todo: dict[str, tuple[Callable[..., Row], list[tuple[Any, ...]]]] = {
        "linear": (gpu_linear.linear, [(c, m, *SHAPE, about) for m in ROWS for c in linears]),
        "shapes": (gpu_linear.linear, [(c, m, *s, about) for s in GPU_SHAPES for c in linears for m in (1, 16) if c.recipe in ("W4A8", "W4A16", "W8A8", "FP8")]),
        "lines": (gpu_linear.line, [(c, m, *SHAPE) for m in ROWS for c in LINES]),
        "moe": (gpu_moe.moe, [(c, about) for c in wanted(MOES)]),
        "model": (gpu_decode.decode, [(c, about) for c in wanted(RUNS)]),
        "prefill": (gpu_decode.prefill, [(c,) for c in wanted(PREFILLS)]),
        "generate": (gpu_decode.generate, [(c,) for c in wanted(GENERATES)]),
        "layers": (gpu_layers.layers, [(c,) for c in wanted(LAYERS)]),
        "start": (gpu_start.start, [(c,) for c in wanted(STARTS)]),
        "breakdown": (gpu_breakdown.breakdown, [(c,) for c in wanted(BREAKDOWNS)]),
    }
    how, rows = todo[part]
    return [(" ".join(str(value) for value in row if value is not about), partial(how, *row)) for row in rows]


def recipes(parts: Sequence[str]) -> list[str]:
    """Those that rows of these parts have, which ``only`` may name. The rows of `lines` have none: nothing leaves them out."""
    cases = [run.args[0] for part in parts for _, run in rows_of(part, {})]
    return list(dict.fromkeys(case.recipe for case in cases if hasattr(case, "recipe")))


def attempt(what: str, measure_row: Callable[[], Row]) -> Row:
    """A row, or what went wrong in words. Seconds that it took are noted."""
    begun = time.perf_counter()
    try:
        with torch.no_grad():
            row = measure_row()
    except Exception as error:
        row = {"case": what, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
    torch.compiler.reset()  # its caches hold models
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**row, "took_s": round(time.perf_counter() - begun, 1)}


def measure(parts: Sequence[str], only: Sequence[str], path: Path | None, seconds: float) -> int:
    """All parts; returns the number of rows that were wrong."""
    begun = time.perf_counter()
    about = machine()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    print(json.dumps(about), flush=True)
    path = path or RESULTS / about["gpu"].split()[1].lower() / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report: Row = {**(json.loads(path.read_text()) if path.exists() else {}), "machine": about}
    wrong, at = 0, commit()
    for part in parts:
        rows = report.setdefault(part, [])
        work = rows_of(part, about, only)
        for done, (what, run) in enumerate(work):
            if time.perf_counter() - begun > seconds:
                print(f"{part}: out of time; {len(work) - done} of {len(work)} rows were not run", flush=True)
                break
            row = {"case": what, **attempt(what, run), "commit": at}
            wrong += not row.get("right", "failed" not in row)
            put(rows, row)
            print(gpu_breakdown.table(row) if part == "breakdown" else f"{part} {json.dumps(row)}", flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    return wrong
