"""Try every architecture of the installed transformers: `python benchmarks/sweep.py [type ...] [--resume [--again STATUS ...] [--stale]] [--minutes N]` -> `results/cpu/sweep.json`, which `readme_tables.py sweep` sums up for the README.

Each model type of transformers' AutoModel tables is built tiny and random (`sweep_models.py` shrinks its configuration by the names of its fields), run in eager, and compiled under W8A8. Its output must be as
near to eager's as rounding its weights lets it be. What eager multiplies by is seen by a dispatch mode, not by qcompile: every parameter among that is either quantized or reported with a reason.

A worker process does the work, so that none can hang or end the sweep; it starts anew after a crash, a timeout, and every fifty models. With `--resume`, types that the file has are kept, but for
those of other commits under `--stale`: a row says of which commit it is.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import multiprocessing
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sweep_models as models
import torch
from revision import commit
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results" / "cpu" / "sweep.json"
SECONDS = 100
"""Longest that one model may take."""
FACTOR, ROUTED, FLOOR = 3.0, 2.0, 1e-4
"""Times the error of rounded weights that the output may be off (activations are rounded, too); times more where routers choose; and what is always allowed. As in `tests/test_models.py`."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "linear", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
STATUSES = {
    "ok": "right, in one graph",
    "several graphs": "right, in several graphs or partly outside of them, for Dynamo breaks the model",
    "no linears": "every matrix that it multiplies by is left alone with a reason (convolutions, fewer than 16 rows)",
    "not built": "no configuration that the rules make can be built or run in eager with inputs that the rules make",
    "too large": "has no form below 1 GiB that can be built",
    "eager is random": "two eager calls differ",
    "Dynamo fails": "Dynamo fails or answers differently with the backend 'eager', too",
    "moved by rounding": "that of the rounded weights with 16-bit activations; rounded activations move it by more than the bound",
    "compile error": "qcompile fails",
    "wrong output": "the output is not that of the rounded weights",
    "nothing quantized": "linears run and none is quantized",
    "unexplained": "a matrix that eager multiplies by is neither quantized nor reported",
    "crash": "the process ended",
    "timeout": f"more than {SECONDS} s",
}
RIGHT = ("ok", "several graphs", "moved by rounding")
FAULTS = ("compile error", "wrong output", "nothing quantized", "unexplained", "crash")


class Multiplied(TorchDispatchMode):
    """Sees which parameters products read: by their storages, so through views."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if sum(size > 1 for size in p.shape) >= 2}  # a learned query is a vector
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        pointwise = name == "convolution" and args[1].shape[2:].numel() == 1 and args[8] == 1
        if name in PRODUCTS or pointwise:
            pointers = [a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
            self.found |= {self.names[p] for p in pointers if p in self.names}
        return func(*args, **kwargs or {})


def main_output(out: Any) -> Tensor:
    """The first floating point tensor of a model's output that has more than one element."""
    return next(v for v in tree_leaves(dict(out) if hasattr(out, "items") else out) if isinstance(v, Tensor) and v.is_floating_point() and v.numel() > 1)


def distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not torch.isfinite(a).all():
        return float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


def call(fast: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    return main_output(fast(**inputs)).clone()


def measure(kind: str) -> dict[str, Any]:
    """One row. Models that qcompile cannot be blamed for end early."""
    start = time.perf_counter()
    row: dict[str, Any] = {"class": models.class_names(kind)[0]}
    try:
        found = models.running(kind)
    except models.TooLarge as error:
        return row | {"status": "too large", "why": str(error)}
    except Exception as error:  # nothing of qcompile has run
        return row | {"status": "not built", "why": str(error) if isinstance(error, models.NotBuilt) else said(error)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row |= {"class": type(found.model).__name__, "shrunk": found.how, "inputs": sorted(found.inputs)}
        row |= judge(found.model, found.inputs)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def judge(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    truth = call(model, inputs)
    with Multiplied(model) as multiplied:
        again = call(model, inputs)
    if distance(again, truth) > 1e-5:
        return {"status": "eager is random"}
    try:
        row, allowed, error = quantized(model, inputs, "W8A8", truth, multiplied.found)
    except Exception as failure:
        return blame(model, inputs, truth) or {"status": "compile error", "why": said(failure)}
    row |= {"error": error, "allowed": allowed}
    if row["linears"] == 0:
        return row | {"status": "nothing quantized" if row["unexplained"] else "no linears"}
    if error > allowed:
        if blamed := blame(model, inputs, truth):
            return row | blamed
        _, least, off = quantized(model, inputs, "W8A16", truth, multiplied.found)
        return row | {"status": "moved by rounding" if off < least else "wrong output", "weights_only": [off, least]}
    if row["unexplained"]:
        return row | {"status": "unexplained"}
    return row | {"status": "ok" if row["graphs"] == 1 and not row["outside"] else "several graphs"}


def quantized(model: nn.Module, inputs: dict[str, Any], recipe: str, truth: Tensor, multiplied: set[str]) -> tuple[dict[str, Any], float, float]:
    """(row, error that is allowed, error). Under W8A16 nothing but weights is rounded: the error is the distance from the rounded weights' output, and what is allowed is what a millionth of the weights does."""
    import qcompile
    from qcompile.backend import collecting
    from qcompile.core.qtensor import dequantize, quantize
    from qcompile.passes.sites import view

    torch.compiler.reset()
    fast = torch.compile(model, backend="qcompile", options={"recipe": recipe, "lower": "eager"})
    torch.manual_seed(0)
    try:
        report = qcompile.explain(fast, **inputs)
    except qcompile.core.errors.QcompileError as error:
        if "no graph compiled by qcompile ran" not in str(error):
            raise
        return {"linears": 0, "graphs": 0, "multiplied": len(multiplied), "unexplained": sorted(multiplied)[:5]}, 0.0, 0.0
    calls: list[tuple[Any, Sequence[Any]]] = []
    with collecting(lambda graph, args: calls.append((graph, list(args)))):
        y = call(fast, inputs)
    row = counted(model, report, {id(args[graph.sites[name].param.index]) for graph, args in calls for name in graph.kernels}, multiplied)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    for graph, args in calls:
        for name in graph.kernels:
            site = graph.sites[name]
            matrix = view(args[site.param.index].data, site.view)
            matrix.copy_(dequantize(quantize(matrix, graph.plan[name].weight), matrix.dtype))
    rounded = call(model, inputs)
    for p in model.parameters():
        p.data.mul_(1 + 1e-6 * torch.randn_like(p))
    noise = distance(call(model, inputs), rounded)
    for name, p in model.named_parameters():
        p.data.copy_(exact[name])
    cost = distance(rounded, truth)
    if recipe == "W8A16":
        return row, FLOOR + 0.02 * cost + FACTOR * noise, distance(y, rounded)
    routed = any(site.role == "router" for graph, _ in calls for site in graph.sites.values())
    return row, FACTOR * (ROUTED if routed else 1) * cost + FLOOR, distance(y, truth)


def counted(model: nn.Module, report: Any, quantized: set[int], multiplied: set[str]) -> dict[str, Any]:
    """Shares and reasons, from the report and from what eager multiplied by."""
    parameters = dict(model.named_parameters())
    names: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).update((name, name.removesuffix(".weight")))

    def among(found: Sequence[Any]) -> set[str]:
        said = {row.name.partition("@")[0].partition("[")[0] for row in found}
        return {name for name in multiplied if names[id(parameters[name])] & said}

    known = among([row for row in (*report.sites, *report.kept) if row.role != "unread"]) | {name for name in multiplied if id(parameters[name]) in quantized}
    outside = among([row for row in report.kept if row.role == "unread"]) - known  # Dynamo left the code that reads them to Python
    counted = multiplied - among([row for row in report.kept if row.role in ("head", "router")])
    covered, all_bytes = (sum(parameters[n].nbytes for n in counted if which(n)) for which in (lambda n: id(parameters[n]) in quantized, lambda n: True))
    stacked = [n for n in counted if parameters[n].dim() == 3 and "expert" in n]
    kept = Counter(row.reason if row.role in ("linear", "experts", "other") else row.role for row in report.kept)
    return {
        "graphs": len(report.graphs), "linears": len(report.sites), "multiplied": len(multiplied), "bytes": round(covered / all_bytes, 4) if all_bytes else None, "bytes_with_convolutions": round(report.totals.coverage, 4),
        "stacked": len(stacked), "stacked_quantized": sum(id(parameters[n]) in quantized for n in stacked), "kept": dict(kept.most_common(12)), "outside": len(outside), "unexplained": sorted(multiplied - known - outside)[:5],
    }  # fmt: skip


def blame(model: nn.Module, inputs: dict[str, Any], truth: Tensor) -> dict[str, Any] | None:
    """Dynamo with torch's backend 'eager' on the same model: a failure, or another answer, is not ours."""
    torch.compiler.reset()
    try:
        off = distance(call(torch.compile(model, backend="eager"), inputs), truth)
    except Exception as error:
        return {"status": "Dynamo fails", "why": said(error)}
    return {"status": "Dynamo fails", "why": f"answers {off:.1e} away from eager"} if off > 1e-3 else None


def said(error: BaseException) -> str:
    """The first lines of a message, without paths of this machine and torch's advice."""
    lines = [line.strip() for line in str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].splitlines() if line.strip() and "/" not in line]
    return f"{type(error).__name__}: {' | '.join(lines)[:300]}"


def work(pipe: Connection) -> None:
    """The worker: types in, rows out."""
    import resource

    import transformers

    transformers.logging.set_verbosity_error()
    faulthandler.register(signal.SIGUSR1)  # kill -USR1 tells where a model spends its time
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    while (kind := pipe.recv()) is not None:
        try:
            row = measure(kind)
        except Exception as error:
            row = {"class": models.class_names(kind)[0], "status": "crash", "why": said(error)}
        pipe.send(row)
        torch.compiler.reset()
        gc.collect()


class Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.done = 0

    def ask(self, kind: str) -> dict[str, Any]:
        self.pipe.send(kind)
        self.done += 1
        try:
            if self.pipe.poll(SECONDS):
                row: dict[str, Any] = self.pipe.recv()
                return row
            status = "timeout"
        except EOFError:
            status = "crash"
        self.stop()
        return {"class": models.class_names(kind)[0], "status": status}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def main(arguments: Sequence[str] | None = None) -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("types", nargs="*", help="model types to try (default: all)")
    cli.add_argument("--resume", action="store_true", help="keep the rows that the file has, try the others")
    cli.add_argument("--again", nargs="*", default=[], metavar="STATUS", help="with --resume: try those rows again that have one of these")
    cli.add_argument("--stale", action="store_true", help="with --resume: try rows again that are not of the commit at hand")
    cli.add_argument("--minutes", type=float, default=1e9, help="start nothing new after so long")
    given = cli.parse_args(arguments)
    everything = models.kinds()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and (given.resume or given.types) else {}
    at = commit()
    wanted = given.types or [kind for kind in everything if kind not in rows or rows[kind]["status"] in given.again or (given.stale and rows[kind].get("commit") != at)]
    start, worker = time.monotonic(), None
    with Progress() as progress:
        task = progress.add_task("models", total=len(wanted))
        for kind in wanted:
            if time.monotonic() - start > 60 * given.minutes:
                break
            if worker is None or not worker.process.is_alive() or worker.done >= 50:
                if worker is not None:
                    worker.stop()
                worker = Worker()
            rows[kind] = worker.ask(kind) | {"commit": at}
            save(rows, everything)
            progress.update(task, advance=1, description=f"{kind}: {rows[kind]['status']}")
    if worker is not None:
        worker.stop()
    print(Counter(row["status"] for row in rows.values()))


def save(rows: dict[str, Any], everything: Sequence[str]) -> None:
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "types": len(everything), "rows": {kind: rows[kind] for kind in everything if kind in rows}}, indent=1)
    RESULTS.with_suffix(".tmp").write_text(text + "\n")
    RESULTS.with_suffix(".tmp").replace(RESULTS)


if __name__ == "__main__":
    sys.exit(main())
