"""Where one step of decoding spends its time: the kernels of a replayed CUDA graph, seen by torch.profiler, in groups.

linear     products with weights: our templates and cuBLAS. Sums of products that were split are fused into the kernels that read them, so they count as rest; attention by cuBLAS would count here
attention  scores, softmax and values
cache      writing keys and values, and copying or repeating them
rest       norms, rotary embedding, activations, quantization, residuals
gaps       the step's time, of replays without a profiler, less the sum of all kernels

A kernel's time is what it adds to the step: from the end of all that came before it, or from its own start if that is later, to its own end. Kernels that begin while the one before ends
(programmatic dependent launch) spend their first microseconds waiting for it, which is counted once, as the time of the one before.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import Breakdown
from gpu_model import EARLY, Decoder, build, check, compiled

GROUPS = ("linear", "attention", "cache", "rest")
PATTERNS = (
    ("linear", r"triton_tem.*linear"),  # o's product has attention in its name, too, from what makes its input
    ("attention", r"flash|fmha|attention|sdpa|softmax|mha_"),
    ("linear", r"triton_tem|qcompile_|nvjet|gemm|gemv|cutlass|cublas|splitk|scaled_mm|gemvx|dot_kernel|reduce_1Block"),
    ("cache", r"index_copy|index_put|index_add|indexfunc|copyPlane|repeat|fused.*(clone|expand)|catarray|CatArray|memcpy|memset|DtoD"),
)
"""The first pattern that is found in a kernel's name, in any case, names its group; Inductor puts the ops that it fused into the names of its kernels."""
KINDS = {"kernel", "gpu_memcpy", "gpu_memset"}
REPLAYS = 5


def group(name: str) -> str:
    """The group of a kernel, by its name."""
    return next((found for found, pattern in PATTERNS if re.search(pattern, name, re.IGNORECASE)), "rest")


def kernels_of(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ran on the GPU, in order: name, ``us`` that it adds, ``gap`` before it, and ``long`` from its start to its end, of a Chrome trace."""
    events = sorted((e for e in trace["traceEvents"] if e.get("cat") in KINDS and "dur" in e), key=lambda e: float(e["ts"]))
    found, done = [], float(events[0]["ts"]) if events else 0.0
    for e in events:
        start, long = float(e["ts"]), float(e["dur"])
        found.append({"name": e["name"], "us": max(start + long - max(start, done), 0.0), "gap": max(start - done, 0.0), "long": long})
        done = max(done, start + long)
    return found


def profiled(replay: Any, rewind: Any, replays: int = REPLAYS) -> list[dict[str, Any]]:
    """Kernels of so many replays, each rewound outside of what is counted."""
    from torch.profiler import ProfilerActivity, profile

    rewind()
    replay()
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path, found = Path(folder) / "trace.json", []
        for _ in range(replays):
            rewind()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as p:
                replay()
                torch.cuda.synchronize()
            p.export_chrome_trace(str(path))
            found.append(kernels_of(json.loads(path.read_text())))
    return steadiest(found)


def steadiest(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The run with the median sum. Runs that lost events to the profiler, so that they have fewer than the most, do not count."""
    most = max(len(run) for run in runs)
    if not most:
        raise RuntimeError("the profiler saw no kernels")
    whole = sorted((run for run in runs if len(run) == most), key=lambda run: sum(k["us"] for k in run))
    return whole[len(whole) // 2]


def summary(kernels: Sequence[Mapping[str, Any]], step_us: float, layers: int) -> dict[str, Any]:
    """Groups and names with their counts and microseconds. The head is the last product of the step, and is not divided among layers."""
    products = [i for i, k in enumerate(kernels) if group(k["name"]) == "linear"]
    head = products[-1] if products else -1
    by_name: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for i, k in enumerate(kernels):
        by_name["head" if i == head else group(k["name"]), k["name"]].append(k)
    taken = {key: [k["us"] for k in alike] for key, alike in by_name.items()}
    names = [
        {"group": kind, "name": name[:160], "count": len(us), "us": round(sum(us), 2), "us_each": round(statistics.median(us), 2), "start_to_end_us": round(statistics.median(k["long"] for k in by_name[kind, name]), 2)}
        for (kind, name), us in sorted(taken.items(), key=lambda item: -sum(item[1]))
    ]
    totals = {kind: round(sum(sum(us) for (found, _), us in taken.items() if found == kind), 2) for kind in ("head", *GROUPS)}
    busy = sum(k["us"] for k in kernels)
    counts = {kind: sum(len(us) for (found, _), us in taken.items() if found == kind) for kind in ("head", *GROUPS)}
    between = [k["gap"] for k in kernels[1:]]
    return {
        "step_us": round(step_us, 2), "busy_us": round(busy, 2), "gaps_us": round(step_us - busy, 2), "gap_us_each": round(statistics.median(between), 2) if between else None, "launches": len(kernels),
        "groups_us": totals, "groups_count": counts, "per_layer_us": {kind: round(totals[kind] / layers, 2) for kind in GROUPS}, "kernels": names,
    }  # fmt: skip


def breakdown(case: Breakdown) -> dict[str, Any]:
    """One row."""
    torch.compiler.reset()
    model = build(case.model, num_hidden_layers=case.layers)
    decoder = Decoder(model, case.batch, case.context)
    exact = decoder.once(model)
    forward = compiled(model, case.recipe, case.head, **EARLY)
    row = {
        "model": case.model,
        "layers": case.layers,
        "recipe": case.recipe,
        "head": case.head,
        "batch": case.batch,
        "context": case.context,
        "cache": decoder.length,
        **check(decoder.once, model, case.recipe, case.head, decoder.once(forward), exact),
    }
    if not row["right"]:
        return row
    us = decoder.graph_us(forward)
    one = decoder.graph(forward, 1)
    return {**row, **summary(profiled(one.replay, decoder.rewind), us, case.layers)}


def table(row: Mapping[str, Any], names: int = 24) -> str:
    """Text of one row for people: groups, then the kernels that take longest."""
    if "groups_us" not in row:
        return json.dumps(row)
    head = f"{row['model']} x {row['layers']} layers, {row['recipe']}, head {row['head'] or '16 bits'}, batch {row['batch']}, context {row['context']} (cache {row['cache']}): "
    lines = [head + f"{row['step_us']:.1f} us a step, {row['launches']} kernels busy for {row['busy_us']:.1f}, gaps {row['gaps_us']:.1f}"]
    for kind, us in row["groups_us"].items():
        each = "" if kind == "head" else f", {row['per_layer_us'][kind]:.2f} a layer"
        lines.append(f"  {kind:10} {us:9.2f} us{each}, {row['groups_count'][kind]} kernels")
    lines += [f"    {k['us']:9.2f} us  {k['count']:4} x {k['us_each']:8.2f}  {k['group']:9} {k['name'][:110]}" for k in row["kernels"][:names]]
    return "\n".join(lines)
