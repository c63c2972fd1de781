"""Speed, overhead and compile time on this machine's CPU: checks first, times second. `python benchmarks/run.py cpu [--quick] [--json PATH]`. For a GPU, `run.py gpu`: see `gpu.py`.

linear    one nn.Linear through torch.compile(backend="qcompile") against the same one by plain Inductor in fp32, both in turns; medians, ratios of medians
overhead  what a call costs outside of kernels: a small transformer with every linear ignored against plain Inductor, and the weight table's check alone
compile   the shipped model's first call, cold (empty caches) and warm (a second process with the first one's caches), plain Inductor against W8A8
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import CASES, COLD_GOAL, OVERHEAD_GOAL, QUICK, WARM_GOAL, Case
from revision import commit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import qcompile

RESULTS = Path(__file__).parent / "results" / "cpu" / "run.json"
MODEL = Path(qcompile.__file__).parent / "data" / "stdlib_lm"
PARTS = ("linear", "overhead", "compile")


def take_turns(functions: Mapping[str, Callable[[], object]], seconds: float, least: int = 15) -> dict[str, float]:
    """Median milliseconds of each function; they alternate, each warmed by an untimed call, so that a busy machine hurts them alike."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    while len(taken[next(iter(taken))]) < least or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            function()
            begin = time.perf_counter()
            function()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def quantizing(model: nn.Module, recipe: str, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="qcompile", dynamic=False, options={"recipe": recipe, **options})


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- linear ----------------------------------------------------------------------------------------------------------


def linear(cases: Sequence[Case], seconds: float) -> list[dict[str, Any]]:
    """One row per recipe and M. `error` is the distance from the references, `rounding` that from fp32."""
    rows = []
    for case, m in track([(c, m) for c in cases for m in c.rows], "linear"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model, x = nn.Linear(case.k, case.n).eval(), torch.randn(m, case.k)
        plain, fast = torch.compile(model, dynamic=False), quantizing(model, case.recipe)
        exact, reference = model(x), quantizing(model, case.recipe, lower="eager")(x)
        y = fast(x)
        error = distance(y, reference)
        plain(x)
        kernel = qcompile.explain(fast, x).sites[0].kernel
        ms = take_turns({"fp32": lambda f=plain, x=x: f(x), case.recipe: lambda f=fast, x=x: f(x)}, seconds)
        goal = dict(case.goal).get(m)
        ratio = ms["fp32"] / ms[case.recipe]
        row = {"recipe": case.recipe, "m": m, "n": case.n, "k": case.k, "kernel": kernel, "error": error, "rounding": distance(y, exact), "right": error <= case.error}
        rows.append({**row, "fp32_ms": ms["fp32"], "ms": ms[case.recipe], "ratio": ratio, "goal": goal, "met": None if goal is None else ratio >= goal})
    return rows


# --- overhead --------------------------------------------------------------------------------------------------------


def small_transformer(layers: int) -> nn.Module:
    """A GPT-2 so narrow that kernels take little of a call."""
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_layer=layers, n_embd=64, n_head=4, vocab_size=256, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0)).eval()


def overhead(layers: int, seconds: float) -> dict[str, Any]:
    """Call times of both backends where nothing is quantized, and of the weight table's check in the quantized one."""
    from qcompile.backend import collecting

    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = small_transformer(layers), torch.arange(4)[None]
    plain, ignoring, fast = torch.compile(model, dynamic=False), quantizing(model, "W8A8", ignore=["re:.*"]), quantizing(model, "W8A8")
    error = distance(ignoring(x)[0], plain(x)[0])
    found: list[tuple[Any, list[Any]]] = []
    fast(x)
    with collecting(lambda graph, args: found.append((graph, list(args)))):
        fast(x)
    graph, args = found[0]

    def check() -> object:
        """The part of CompiledGraph.__call__ that finds the packed tensors."""
        parameters = [args[i] for i in graph._weights]
        return graph._bindings[tuple(map(id, parameters))].get(parameters)

    functions = {"inductor": lambda: plain(x), "ignoring": lambda: ignoring(x), "W8A8": lambda: fast(x), "check": check}
    ms = take_turns(functions, seconds, 100)
    share = ms["ignoring"] / ms["inductor"]
    numbers = {f"{name}_ms": value for name, value in ms.items()} | {"parameters": len(graph._weights), "check_share": ms["check"] / ms["inductor"]}
    return {"layers": layers, "error": error, "right": error < 1e-5, **numbers, "ratio": share, "goal": OVERHEAD_GOAL, "met": share + numbers["check_share"] <= OVERHEAD_GOAL}


# --- compile time ----------------------------------------------------------------------------------------------------


def first_call(recipe: str, layers: int | None) -> dict[str, Any]:
    """In a process of its own: seconds, and CPU seconds, of the shipped model's first compiled call, and whether Inductor's caches served it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qcompile.compat import counters

    config = AutoConfig.from_pretrained(MODEL, local_files_only=True)
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = AutoModelForCausalLM.from_pretrained(MODEL, config=config, dtype=torch.float32, local_files_only=True).eval()
    fast = torch.compile(model, dynamic=False) if recipe == "fp32" else quantizing(model, recipe)
    torch.compile(lambda x: x + 1)(torch.ones(8))  # Inductor's own imports and compiler probes, the same for all
    counters().clear()
    start, cpu = time.perf_counter(), os.times()
    with torch.no_grad():
        fast(input_ids=torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    end = os.times()
    used = sum(end[:4]) - sum(cpu[:4])  # this process and the compilers it waited for
    return {"seconds": time.perf_counter() - start, "cpu_seconds": used, "cache_hits": counters()["aot_autograd"]["autograd_cache_hit"]}


def compile_time(layers: int | None, repeats: int) -> dict[str, Any]:
    """Medians of fresh pairs of processes, the backends in turns. Goals are judged by CPU seconds: wall time depends on who else is busy."""
    runs: dict[str, list[dict[str, Any]]] = {f"{recipe}_{when}": [] for recipe in ("fp32", "W8A8") for when in ("cold", "warm")}
    for _ in track(range(repeats), "compile"):
        for recipe in ("fp32", "W8A8"):
            with tempfile.TemporaryDirectory() as cache:
                for when in ("cold", "warm"):
                    runs[f"{recipe}_{when}"].append(_child({"recipe": recipe, "layers": layers}, cache))
    out: dict[str, Any] = {name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    cold, warm = (out["W8A8_cold"]["cpu_seconds"] / out["fp32_cold"]["cpu_seconds"], out["W8A8_warm"]["cpu_seconds"] - out["fp32_warm"]["cpu_seconds"])
    walls = {"cold_wall_ratio": out["W8A8_cold"]["seconds"] / out["fp32_cold"]["seconds"], "warm_wall_beyond": out["W8A8_warm"]["seconds"] - out["fp32_warm"]["seconds"]}
    right = out["W8A8_warm"]["cache_hits"] > 0
    return {"layers": layers, "right": right, **out, "cold_ratio": cold, "warm_beyond": warm, **walls, "cold_met": cold <= COLD_GOAL, "warm_met": warm <= WARM_GOAL}


def _child(plan: Mapping[str, Any], cache: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, "child", json.dumps(plan)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- all of it -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Versions and what the CPU is, and which instructions libraries were told to keep to; no names of hosts, users or folders."""
    import transformers

    name, flags = platform.machine(), ""
    if (info := Path("/proc/cpuinfo")).exists():
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.read_text().splitlines())}
        name, flags = fields.get("model name", name), fields.get("flags", "")
    wanted = [flag for flag in flags.split() if flag.startswith(("avx", "fma", "f16c", "amx"))]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__, "qcompile": qcompile.__version__}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    told = {name: os.environ[name] for name in ("QCOMPILE_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA") if name in os.environ}
    return {"versions": versions, "commit": commit(), "cpu": name, "flags": wanted, **({"told": told} if told else {}), "threads": torch.get_num_threads(), "load_before": round(load, 2)}


def measure(quick: bool, parts: Sequence[str] = PARTS, repeats: int = 3) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    report: dict[str, Any] = {"quick": quick, **machine()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", qcompile.QcompileWarning)
        if "linear" in parts:
            report["linear"] = linear(QUICK if quick else CASES, 0.1 if quick else 1.5)
        if "overhead" in parts:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # kernels this small gain nothing from threads, and waiting for them is noise; before compiling, for Dynamo guards on it
            try:
                report["overhead"] = overhead(1 if quick else 12, 0.2 if quick else 5.0)
            finally:
                torch.set_num_threads(threads)
    if "compile" in parts:
        report["compile"] = compile_time(1 if quick else None, 1 if quick else repeats)
    return report


def show(report: Mapping[str, Any], console: Console) -> None:
    verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}
    if "linear" in report:
        table = Table("recipe", "M", "N x K", "kernel", "error", "fp32 ms", "ms", "times as fast", "goal", title=f"{report['cpu']}, {report['threads']} threads")
        for r in report["linear"]:
            error, goal = f"{r['error']:.1e}{'' if r['right'] else ' WRONG'}", f"{r['goal']} {verdict[r['met']]}" if r["goal"] else ""
            table.add_row(r["recipe"], str(r["m"]), f"{r['n']} x {r['k']}", r["kernel"], error, f"{r['fp32_ms']:.3f}", f"{r['ms']:.3f}", f"{r['ratio']:.2f}", goal)
        console.print(table)
    if "overhead" in report:
        r = report["overhead"]
        console.print(f"overhead{'' if r['right'] else ' WRONG'}: {r['ignoring_ms']:.3f} ms a call against {r['inductor_ms']:.3f} ({r['ratio'] - 1:+.1%}), and {r['check_ms'] * 1e3:.1f} us ({r['check_share']:.1%}) to check {r['parameters']} weights: {verdict[r['met']]}")
    if "compile" in report:
        r = report["compile"]
        table = Table("first call", "fp32 s", "W8A8 s", "fp32 CPU s", "W8A8 CPU s", "", title=f"compile time{'' if r['right'] else ' WRONG: the warm start compiled'}")
        for when, line in (("cold", f"{r['cold_ratio']:.2f}x, {verdict[r['cold_met']]}"), ("warm", f"{r['warm_beyond']:+.1f} s, {verdict[r['warm_met']]}")):
            cells = [f"{r[f'{recipe}_{when}'][key]:.1f}" for key in ("seconds", "cpu_seconds") for recipe in ("fp32", "W8A8")]
            table.add_row(when, *cells, line)
        console.print(table)


def wrong(report: Mapping[str, Any]) -> bool:
    """Some check failed (a missed speed goal is no failure)."""
    rows = [*report.get("linear", []), *(report[part] for part in ("overhead", "compile") if part in report)]
    return not all(row["right"] for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("device", choices=("cpu", "gpu"))
    cli.add_argument("--json", type=Path, help="where results go; by default into benchmarks/results")
    cli.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    cli.add_argument("--repeats", type=int, default=3, help="pairs of processes for the compile time")
    cli.add_argument("--parts", nargs="*", help="some of what the device has; on the CPU the others' results are kept as they are in the file")
    cli.add_argument("--case", nargs="*", default=(), help="recipes, on a GPU")
    cli.add_argument("--seconds", type=float, help="start nothing new after so long (480), on a GPU")
    given = cli.parse_args(arguments)
    other = {"cpu": {"--case": given.case, "--seconds": given.seconds is not None}, "gpu": {"--quick": given.quick, "--repeats": given.repeats != 3}}[given.device]
    if unused := [name for name, value in other.items() if value]:
        cli.error(f"{', '.join(unused)}: not for {given.device}")
    if given.device == "gpu":
        import gpu

        if unknown := set(given.parts or ()) - set(gpu.PARTS):
            cli.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(gpu.PARTS)}")
        parts = given.parts or gpu.PARTS
        there = gpu.recipes(parts)
        if unknown := sorted(set(given.case) - set(there)):
            cli.error(f"unknown cases {', '.join(map(repr, unknown))} of {', '.join(parts)}; there are {', '.join(there) or 'none'}, each an argument of its own")
        return 1 if gpu.measure(parts, given.case, given.json, 480 if given.seconds is None else given.seconds) else 0
    given.parts, given.json = tuple(given.parts or PARTS), given.json or RESULTS
    if unknown := set(given.parts) - set(PARTS):
        cli.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "told" in machine():  # Inductor's key to its caches lacks them
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    before = json.loads(given.json.read_text()) if given.json.exists() and set(given.parts) != set(PARTS) else {}
    report = {**before, **measure(given.quick, given.parts, given.repeats)}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    show(report, console if console.is_terminal else Console(width=120))
    return 1 if wrong(report) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(first_call(**json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
