"""Time the CPU kernels against what torch offers. `python benchmarks/cpu_kernels.py [--quick]` -> a table, and JSON under results/cpu/.

Every instruction set and thread count runs in a process of its own, torch's own kernels held to the same instruction set (but for
fbgemm, which knows no such switch and uses VNNI where there is any: its avx2 rows flatter it). All candidates of a row take turns, so
that a busy machine hurts them alike; each is called twice to warm its weight, then timed once. The table shows the fastest turn (on a
shared machine the one statistic that others do not move much); the JSON also has the medians, the CPU's name and the load before.
`W8A8` is what the backend makes of an nn.Linear, a call of the compiled module from float x to float y; `fbgemm` starts from float x, too, and takes one scale and 7 bits for all of it. `int8` is the kernel
alone. `g128`: 128 columns per scale, else one scale per row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cpu"
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ROWS = (1, 4, 16, 64, 512)


def candidates(m: int, n: int, k: int) -> dict:
    import torch
    import torch.nn.functional as F

    from qcompile.kernels import cpu

    w, x = torch.randn(n, k) * 0.02, torch.randn(m, k)
    xq, wq = torch.randint(-127, 128, (m, k)).to(torch.int8), torch.randint(-128, 128, (n, k)).to(torch.int8)
    packed = torch.randint(0, 256, (n, k // 2)).to(torch.uint8)
    sx, row, grouped = torch.rand(m), torch.rand(n, 1), torch.rand(n, k // 128)
    table, e4m3 = torch.randn(16), torch.randn(n, k).to(torch.float8_e4m3fn)
    per_channel = torch.quantize_per_channel(w, (w.abs().amax(1) / 127).double(), torch.zeros(n, dtype=torch.long), 0, torch.qint8)
    fbgemm = torch.ops.quantized.linear_prepack(per_channel, None)
    onednn = torch.ops.onednn.qlinear_prepack(wq.t(), [m, k])
    zeros, unsigned = torch.zeros(n, dtype=torch.int), (xq.int() + 128).to(torch.uint8)

    linear = torch.nn.Linear(k, n, bias=False).eval()
    linear.weight.data = w
    torch.compiler.reset()
    fast = torch.compile(linear, backend="qcompile", dynamic=False, options={"recipe": "W8A8"})

    return {
        "fp32": lambda: F.linear(x, w),
        "fbgemm": lambda: torch.ops.quantized.linear_dynamic(x, fbgemm, True),
        "onednn": lambda: torch.ops.onednn.qlinear_pointwise(unsigned, 0.1, 128, onednn, row[:, 0], zeros, None, 1.0, 0, torch.float32, "none", [], ""),
        "_int_mm": lambda: torch._int_mm(xq, wq.t()),
        "W8A8": lambda: fast(x),
        "int8": lambda: cpu.int8_linear(xq, sx, wq, row),
        "int8 g128": lambda: cpu.int8_linear(xq, sx, wq, grouped, 128),
        "int4 x int8": lambda: cpu.int4_int8_linear(xq, sx, packed, row),
        "int4 x int8 g128": lambda: cpu.int4_int8_linear(xq, sx, packed, grouped, 128),
        "4-bit g128": lambda: cpu.table_linear(x, packed, table, grouped, None, 128),
        "int8 weight": lambda: cpu.table_linear(x, wq, None, row),
        "e4m3 weight": lambda: cpu.table_linear(x, e4m3, None, row),
    }


def runs(function: Callable[[], object]) -> bool:
    try:
        function()
        return True
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return False


def times(functions: dict, seconds: float) -> dict[str, dict[str, float]]:
    """Name -> the fastest turn and the median, in milliseconds. What torch refuses to run here (onednn, some shapes) is left out."""
    functions, slow = {name: function for name, function in functions.items() if runs(function)}, set()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(taken["fp32"]) < 15:
        for name, function in functions.items():
            if name in slow:
                continue
            function(), function()
            begin = time.perf_counter()
            function()
            taken[name].append((time.perf_counter() - begin) * 1e3)
            if taken[name][0] > 10 * taken["fp32"][0]:  # ten times slower than fp32: once is enough
                slow.add(name)
        if time.perf_counter() - start > 8 * seconds:
            break
    return {"ms": {name: min(values) for name, values in taken.items()}, "median": {name: statistics.median(values) for name, values in taken.items()}}


def measure(threads: int, shapes: list, rows: list, seconds: float) -> dict:
    import torch

    from qcompile.kernels import cpu

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        results = [{"m": m, "n": n, "k": k, **times(candidates(m, n, k), seconds)} for n, k in shapes for m in rows]
    return {"isa": cpu.isa(), "threads": threads, "torch": torch.__version__, "torch_isa": torch.backends.cpu.get_cpu_capability(), "results": results}


def show(report: dict) -> None:
    print(f"\n## {report['isa']}, {report['threads']} thread(s), torch {report['torch']} ({report['torch_isa']}): ms (times as fast as fp32)")
    names = list(report["results"][0]["ms"])
    print("| N x K | M | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
    for row in report["results"]:
        ms = row["ms"]
        cells = [f"{ms[name]:.3f} ({ms['fp32'] / ms[name]:.2f})" if name in ms else "-" for name in names]
        print(f"| {row['n']} x {row['k']} | {row['m']} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape, one thread")
    parser.add_argument("--isa", nargs="*", default=["native", "avx2"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return
    from run import machine

    where = {key: value for key, value in machine().items() if key in ("cpu", "load_before")}  # threads and torch are the child's
    RESULTS.mkdir(parents=True, exist_ok=True)
    for isa in arguments.isa:
        environment = {**os.environ, **({} if isa == "native" else {"QCOMPILE_CPU_ISA": isa, **(AVX2_ONLY if isa == "avx2" else {})})}
        for threads in (1,) if arguments.quick else (1, 2):
            shapes = [(2048, 2048)] if arguments.quick else [(2048, 2048), (4096, 11008)]
            plan = json.dumps({"threads": threads, "shapes": shapes, "rows": ROWS, "seconds": 0.5 if arguments.quick else 1})
            child = subprocess.run([sys.executable, __file__, "--child", plan], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            report = {**where, **json.loads(child.stdout.splitlines()[-1])}
            show(report)
            (RESULTS / f"kernels_{report['isa']}_{threads}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
