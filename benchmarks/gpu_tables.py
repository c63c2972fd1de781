"""Markdown of what `run.py gpu` measured beyond single linears, from its JSON; each table only where its rows exist. `python benchmarks/gpu_tables.py merge NEW.json... [--card h100]` puts the parts of other files into the committed one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Report = Mapping[str, Any]
GROUPS = ("linear", "attention", "cache", "rest")


def rows(report: Report, part: str, key: str = "us") -> list[dict[str, Any]]:
    """Rows that were right and timed."""
    return [r for r in report.get(part, []) if r.get("right", True) and key in r]


def missing(report: Report) -> list[str]:
    """Rows without a time, in words."""
    timed = {"prefill": "ms", "generate": "share", "start": "warm_s", "breakdown": "groups_us", "layers": "peak_gib"}
    found = []
    for part, part_rows in report.items():
        if isinstance(part_rows, list):
            bad = [r for r in part_rows if "failed" in r or not r.get("right", True) or timed.get(part, "us") not in r]
            found += [f"{part}: {r['case'] + ': ' + r['failed'] if 'failed' in r else ' '.join(str(r.get(k)) for k in ('model', 'recipe', 'm', 'batch', 'context') if k in r) + ' was wrong, and not timed'}" for r in bad]
    return found


def met(value: bool | None) -> str:
    """A goal's mark."""
    return {True: " (met)", False: " (missed)", None: ""}[value]


def goal(text: object, value: bool | None) -> str:
    """A goal and whether it was met; nothing where there is none."""
    return "" if text is None else f"{text}{met(value)}"


def table(head: Sequence[str], body: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table."""
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *("| " + " | ".join(map(str, row)) + " |" for row in body)]


def times(value: float, of: float | None) -> str:
    """How many times as fast."""
    return f"{of / value:.2f}" if of else ""


def model(report: Report) -> list[str]:
    """Decoding."""
    found = rows(report, "model")
    bf16 = {(r["model"], r["batch"], r["context"]): r["us"] for r in found if r["recipe"] == "bf16"}
    fp32 = {r["model"]: r["us"] for r in found if r["recipe"] == "eager float32"}
    head = ["model", "recipe", "head", "batch", "context", "tokens/s", "goal", "times compiled bf16", "times eager fp32", "of the floor", "peak / bf16", "after / packed"]
    body = []
    for r in sorted(found, key=lambda r: (r["model"], r["batch"], r["context"])):
        eager = fp32.get(r["model"]) if r["batch"] == 1 else None
        share = f"{r['of_floor']:.2f}" if "of_floor" in r else ""
        memory = [f"{r[key]:.2f}" if key in r else "" for key in ("peak_of_bf16", "after_of_packed")]
        numbers = [f"{r['tokens_s']:,.0f}", goal(r.get("goal"), r.get("met")), times(r["us"], bf16.get((r["model"], r["batch"], r["context"]))), times(r["us"], eager), share]
        body.append([r["model"], r["recipe"], r["head"] or ("" if r["recipe"] == "eager float32" else "16 bits"), r["batch"], r["context"], *numbers, *memory])
    text = "Decoding with a Llama of random weights (transformers' own classes, StaticCache), one CUDA graph, random keys and values up to the context. The floor is the time to read the linears, the head and these keys and values once. "
    text += "`peak`: memory while weights are packed and released, `after`: memory then, beside the cache:"
    return [text, "", *table(head, body)]


def breakdown(report: Report) -> list[str]:
    """Microseconds of one layer."""
    found = rows(report, "breakdown", "groups_us")
    plain = {(r["batch"], r["context"]): r["per_layer_us"]["linear"] for r in found if r["recipe"] == "bf16"}
    head = ["recipe", "head's scheme", "batch", "context", *GROUPS, "times bf16's linears", "head", "gaps", "step", "kernels"]
    body = []
    for r in sorted(found, key=lambda r: (r["batch"], r["context"])):
        each = [f"{r['per_layer_us'][kind]:.1f}" for kind in GROUPS]
        linears = times(r["per_layer_us"]["linear"], plain.get((r["batch"], r["context"]))) if r["per_layer_us"]["linear"] and not waiting(r) else ""
        body.append([r["recipe"], r["head"] or "16 bits", r["batch"], r["context"], *each, linears, f"{r['groups_us']['head']:.1f}", f"{r['gaps_us']:.1f}", f"{r['step_us']:.1f}", r["launches"]])
    layers = found[0]["layers"]
    text = f"Where a step goes: microseconds of one of {layers} layers of the 8B shape by kind of kernel, then the head, the gaps between kernels, and the whole step of these {layers} layers (kernels by torch.profiler in a replayed CUDA graph, the step without it; sums of split products count as rest). "
    text += "A kernel counts what it adds to the step, from the end of all before it to its own" + (". Rows whose gaps are negative are older: their kernels, which begin while the one before ends, count with their waiting:" if any(map(waiting, found)) else ":")
    return [text, "", *table(head, body)]


def waiting(row: Mapping[str, Any]) -> bool:
    """Kernels of an older row that began early, which count from their start to their end."""
    return row["gaps_us"] < 0 and not any("start_to_end_us" in kernel for kernel in row["kernels"])


def moe(report: Report) -> list[str]:
    """Grouped products."""
    found = rows(report, "moe")
    body = [
        [r["what"], r["recipe"], r["m"], f"{r['us']:.1f}", f"{r['bf16_us']:.1f}", f"{r['ratio']:.2f}", goal(r["goal"], r["met"]), f"{r['of_floor']:.2f}"] for r in sorted(found, key=lambda r: (r["what"], r["m"]))
    ]
    first = found[0]
    text = f"Experts: {first['experts']} matrices {first['k']} -> {first['n']}, {first['top']} for each token, sorted rows, against compiled bfloat16 `grouped_mm`, other experts on every call:"
    return [text, "", *table(["what", "recipe", "tokens", "us", "bfloat16", "times as fast", "goal", "of the floor"], body)]


def lines(report: Report) -> list[str]:
    """Splits."""
    body = [[r["recipe"], r["m"], f"{r['us']:.1f}", f"{r['w8a8_us']:.1f}", f"{r['ratio']:.2f}", goal(f"<= {r['goal']}", r["met"])] for r in rows(report, "lines")]
    return ["LLM.int8's split of large columns beside W8A8, 4096 -> 14336:", "", *table(["split", "M", "us", "W8A8", "times W8A8", "goal"], body)]


def prefill(report: Report) -> list[str]:
    """Milliseconds."""
    found = rows(report, "prefill", "ms")
    bf16 = {r.get("graph", False): r["ms"] for r in found if r["recipe"] == "bf16"}
    body = []
    for r in found:
        plain = bf16.get(r.get("graph", False))
        limit = r["goal_ms"] or (r["goal"] * plain if r["goal"] and plain else None)
        body.append([r["model"], r["recipe"], r["tokens"], "a CUDA graph" if r.get("graph") else "Python", f"{r['ms']:.1f}", goal(f"<= {limit:.1f}", r["ms"] <= limit) if limit else "", times(r["ms"], plain)])
    return ["Prefill of one sequence, logits of the last position, no cache:", "", *table(["model", "recipe", "tokens", "launched by", "ms", "goal", "times as fast as bf16"], body)]


def generate(report: Report) -> list[str]:
    """transformers' loop."""
    def cells(r: dict[str, Any]) -> list[str]:
        beside = [f"{r[name]:.0f}" if name in r else "" for name in ("call_us", "loop_us")]
        wanted = goal(f"{r['goal']:.0%}", r["met"]) if r["goal"] else ""
        return [r["model"], r["recipe"] + (", one cache for all calls" if r.get("own") else "") + ("" if r.get("guards", True) else ", modules not guarded"), r["head"] or "16 bits", f"{r['tokens_s']:,.0f}", f"{r['by_hand_tokens_s']:,.0f}", f"{r['share']:.0%}", wanted, *beside]

    body = [cells(r) for r in rows(report, "generate", "share")]
    text = '`model.generate(..., cache_implementation="static")` with our backend in `compile_config`, its prefill taken out, against the step captured by hand; no line of the log speaks of skipped CUDA graphs. Beside the step, a token takes time of the host in the compiled call and in the loop around it, which waits for each token:'
    return [text, "", *table(["model", "recipe", "head", "tokens/s", "by hand", "share", "goal", "call us", "loop us"], body)]


def start(report: Report) -> list[str]:
    """Seconds."""
    body = [[r["model"], r["recipe"], r["head"] or "16 bits", f"{r['cold_s']:.1f}", f"{r['warm_s']:.1f}", goal(f"{r['cold_goal']} / {r['warm_goal']}", r["met"])] for r in rows(report, "start", "warm_s")]
    return ["The first call in a process of its own, packing included; caches empty, then those of the process before:", "", *table(["model", "recipe", "head", "cold s", "warm s", "goals"], body)]


def layers(report: Report) -> list[str]:
    """Memory of a model that does not fit."""
    body = [[r["model"], r["recipe"], r["head"] or "16 bits", *(f"{r[f'{what}_gib']:.1f}" for what in ("bf16", "limit", "peak", "after")), f"{r['ready_s']:.0f}", f"{r['tokens_s']:,.0f}"] for r in rows(report, "layers", "peak_gib")]
    text = "Models that do not fit in 16 bits, built on the meta device and filled layer by layer (`qcompile.load_weights`); weights are made on the device. GiB, and seconds until the first token:"
    return [text, "", *table(["model", "recipe", "head", "bf16", "may use", "peak", "after", "seconds", "tokens/s"], body)]


TABLES: dict[str, tuple[Callable[[Report], list[str]], str]] = {
    "model": (model, "us"), "breakdown": (breakdown, "groups_us"), "prefill": (prefill, "ms"), "generate": (generate, "share"), "start": (start, "warm_s"), "layers": (layers, "peak_gib"), "moe": (moe, "us"), "lines": (lines, "us"),
}  # fmt: skip


def markdown(report: Report) -> list[str]:
    """Lines of all tables that have rows, and what is missing."""
    found: list[str] = []
    for part, (function, key) in TABLES.items():
        if rows(report, part, key):
            found += ["", *function(report)]
    if lost := missing(report):
        found += ["", "Not measured: " + "; ".join(text[:160].replace("|", "/").replace("\n", " ") for text in lost) + "."]
    if note := report.get("note"):
        found += ["", f"Of these numbers: {note}."]
    return found


def merge(target: Path, sources: Sequence[Path]) -> None:
    """Parts with rows replace the target's; the machine is the last one's."""
    report = json.loads(target.read_text()) if target.exists() else {}
    for source in sources:
        new = json.loads(source.read_text())
        report |= {key: value for key, value in new.items() if value}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["merge", "show"])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--card", default="h100")
    given = parser.parse_args()
    target = RESULTS / given.card / "gpu.json"
    if given.command == "merge":
        merge(target, given.files)
    for path in [target] if given.command == "merge" or not given.files else given.files:
        print("\n".join(markdown(json.loads(path.read_text()))))


if __name__ == "__main__":
    main()
