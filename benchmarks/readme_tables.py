"""The README's numbers and the picture of GPU speed, made from what the benchmarks left: `python benchmarks/readme_tables.py cpu|gpu|coverage|sweep|train [--write]`.

`results/cpu/coverage.json` is of `coverage.py`. `results/cpu/run.json`, `run-xeon.json` and `run-avx2.json` are of `run.py cpu` on three machines, `run-avx2-told.json` on one whose libraries and kernels were told to keep to AVX2, `demo.json` and `demo-xeon.json` of `make demo` (`out/demo.json`) on two; `results/<card>/gpu.json` are the rows of `run.py gpu`. Nothing is computed here but ratios and shares of the floor.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpu_plots
import gpu_tables
from cases import GPU_CASES, ROWS, SHAPE, GpuCase
from gpu_floor import floor_us

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"
CARDS = ("h200", "h100")
GOALS = "h200"
"""The card that goals and other libraries' numbers are of."""


def floor(case: GpuCase, m: int, n: int, k: int, machine: Mapping[str, Any]) -> float:
    """Microseconds to read the weight once, or to multiply, at the card's measured rates."""
    return floor_us(n * k * case.bits / 8, 2 * m * n * k, case.recipe in ("W4A8", "W8A8", "FP8"), machine)


def cpu() -> str:
    """Markdown of the CPU's numbers: three machines, the last of which has AVX2 alone, and whose goals are those of the project."""
    *reports, told, demo, other = (json.loads((RESULTS / "cpu" / name).read_text()) for name in ("run.json", "run-xeon.json", "run-avx2.json", "run-avx2-told.json", "demo.json", "demo-xeon.json"))
    latest = reports[-1]
    recipes, rows = list(dict.fromkeys(r["recipe"] for r in latest["linear"])), sorted({r["m"] for r in latest["linear"]})
    found = [{(r["recipe"], r["m"]): r["ratio"] for r in one["linear"]} for one in reports]
    overhead, times = latest["overhead"], latest["compile"]
    cold, warm = ([times[f"{recipe}_{when}"]["seconds"] for recipe in ("W8A8", "fp32")] for when in ("cold", "warm"))
    fp32 = [next(r["fp32_ms"] for r in one["linear"] if r["m"] == 1) for one in reports]
    names = " / ".join(f"{one['cpu']} ({'AVX-512 VNNI' if 'avx512_vnni' in one['flags'] else 'AVX2'}; fp32 at one row {ms:.2f} ms)" for one, ms in zip(reports, fp32))
    goals, later = (", ".join(f"{r['ratio']:.2f} at {r['m']} row{'s' * (r['m'] > 1)} ({'met' if r['met'] else 'missed'})" for r in one["linear"] if r.get("goal")) for one in (latest, told))
    lines = [
        f"An `nn.Linear` of 2048 x 2048, times as fast as compiled fp32 in the same run, {latest['threads']} threads, torch {latest['versions']['torch']}: {names}. With AVX2 alone the goal for W8A8 is twice as fast: {goals}; "
        f"later ({told['commit']}), on an {told['cpu']} with AVX-512 whose libraries, compiler and kernels were told to keep to AVX2, {later}.",
        "",
        "| M | " + " | ".join(recipes) + " |",
        "| --- |" + " --- |" * len(recipes),
        *(f"| {m} | " + " | ".join(" / ".join(f"{one[recipe, m]:.2f}" for one in found) for recipe in recipes) + " |" for m in rows),
        "",
        f"On the last of them, a call of a {overhead['layers']}-layer model takes {overhead['ratio']:.3f} times plain Inductor's with every linear ignored; checking {overhead['parameters']} weights takes {overhead['check_ms'] * 1e3:.0f} us. "
        f"The shipped model compiles under W8A8 in {times['cold_ratio']:.2f} times the CPU time of fp32 ({cold[0]:.1f} s against {cold[1]:.1f} s of wall time), and starts from warm caches in {warm[0]:.1f} s against {warm[1]:.1f} s. "
        f"`make demo` ({demo['cpu']}, {demo['threads']} threads, {demo['seconds']:.0f} s / {other['cpu']}, {other['seconds']:.0f} s, an older commit); the model's linears are small (256 x 640): where fp32 weights come out of a large cache, calls cost more than reading them:",
        "",
        "| | linears | bits/weight | perplexity | tokens/s against compiled fp32 |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {r['name']} | {r['linears_mb']:.1f} MB | {r['bits']:.2f} | {r['perplexity']:.3f} | {r['times_fp32']:.2f} / {o['times_fp32']:.2f} |" for r, o in zip(demo["rows"], other["rows"], strict=True)),
    ]
    return "\n".join(lines)


def beyond(card: str, report: gpu_tables.Report) -> list[str]:
    """All other tables that a card has rows for, and their pictures."""
    pictures = [line for name in gpu_plots.drawn(report) for line in ("", f"![{name}](benchmarks/results/{card}/{name}.png)")]
    return [*gpu_tables.markdown(report), *pictures]


def compiled(card: str) -> list[str]:
    """Whole compiled linears at all numbers of rows, beside bfloat16 in the same run and the best of other libraries, and what else `run.py gpu` measured on a card. Goals are those of an H200."""
    report = json.loads((RESULTS / card / "gpu.json").read_text())
    machine, linears = report["machine"], {(r["recipe"], r["m"]): r for r in gpu_tables.rows(report, "linear")}
    others = "in brackets the best of other libraries on such a card, and then the goal:" if card == GOALS else "in brackets the best of other libraries on an H200, whose memory is 1.4 times as fast:"
    lines = [
        f"**{machine['gpu']}**, torch {machine['torch']}; a reduction reads {machine['read_tb_s']} TB/s there, a large bfloat16 product runs at {machine['bf16_tflop_s']:.0f} TFLOP/s. Random weights, six in rotation so that L2 does not help, "
        f"launches in a CUDA graph, every output checked first. Microseconds of the whole compiled linear, 4096 -> 14336, quantization of the input included, by rows of activations; {others}",
        "",
        "| recipe | " + " | ".join(f"M = {m}" for m in ROWS) + " |",
        "| --- |" + " --- |" * len(ROWS),
        "| bfloat16 | " + " | ".join(f"{statistics.median(r['bf16_us'] for r in linears.values() if r['m'] == m):.1f}" for m in ROWS) + " |",
    ]
    for case in GPU_CASES:
        found = [linears.get((case.recipe, m)) for m in ROWS]
        cells = [f"{r['us']:.1f} ({dict(case.peer)[r['m']]:g})" + (f"; {gpu_tables.goal(format(r['goal_us'], 'g'), r['met'])}" if card == GOALS else "") if r is not None else "" for r in found]
        lines.append(f"| {case.recipe} | " + " | ".join(cells) + " |")
    if shapes := gpu_tables.rows(report, "shapes"):
        lines += ["", "Other linears of an 8B model:", "", "| recipe | N x K | rows | us | bfloat16 | times as fast |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {r['recipe']} | {r['n']} x {r['k']} | {r['m']} | {r['us']:.1f} | {r['bf16_us']:.1f} | {r['bf16_us'] / r['us']:.2f} |" for r in shapes]
    return [*lines, *beyond(card, report), ""]


def gpu() -> str:
    """Markdown of the GPUs' numbers."""
    return "\n".join(line for card in CARDS for line in compiled(card)).rstrip()


def picture(path: Path, card: str) -> None:
    """Microseconds against rows for each recipe, with the floor and the best of others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report = json.loads((RESULTS / card / "gpu.json").read_text())
    machine = report["machine"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex=True, sharey=True)
    for axis, case in zip(axes.flat, GPU_CASES):
        mine = sorted((r["m"], r["us"]) for r in gpu_tables.rows(report, "linear") if r["recipe"] == case.recipe)
        axis.plot(*zip(*mine), "o-", label="qcompile")
        axis.plot(*zip(*case.peer), "s:", color="gray", label="best of others, on an H200")
        axis.plot(ROWS, [floor(case, m, *SHAPE, machine) for m in ROWS], "k--", linewidth=0.8, label="floor: bandwidth, library's rate")
        axis.set(title=case.recipe, xscale="log", yscale="log")
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("rows of activations")
    figure.supylabel("microseconds, 4096 -> 14336")
    figure.suptitle(f"{machine['gpu']}, torch {machine['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def coverage() -> str:
    """Markdown of what is quantized of each architecture."""
    import coverage as measured

    return measured.markdown(json.loads(measured.RESULTS.read_text()))


def sweep() -> str:
    """Sentences about all types of models that transformers has: `results/cpu/sweep.json` of `sweep.py`."""
    from sweep import FAULTS, RIGHT
    from sweep import RESULTS as LEFT

    report = json.loads(LEFT.read_text())
    rows: dict[str, dict[str, Any]] = report["rows"]
    of = {status: [name for name, row in rows.items() if row["status"] == status] for status in dict.fromkeys(row["status"] for row in rows.values())}
    count = {status: len(names) for status, names in of.items()}
    untried = [name for status in ("not built", "too large", "eager is random") for name in of.get(status, ())]
    right = {name: row for name, row in rows.items() if row["status"] in RIGHT and row["linears"]}
    low = {name: row for name, row in right.items() if row["bytes"] < 0.95}
    experts = [row for row in right.values() if row["stacked"]]
    faults = [f"`{name}` ({row['status']}: {row.get('why', 'see the file')})" for name, row in rows.items() if row["status"] in FAULTS]
    below = [f"`{name}` {row['bytes']:.1%} ({_most(row)})" for name, row in low.items()]
    stacks, packed = (sum(row[key] for row in experts) for key in ("stacked", "stacked_quantized"))
    lines = [
        f"`python benchmarks/sweep.py` builds a tiny random model of each of the {report['types']} model types of transformers {report['versions']['transformers']}, by rules on the names of configuration fields, and runs it under W8A8. "
        f"{len(rows) - len(untried)} of them run in eager with the inputs that its rules make. {len(right)} of these are compiled and right: {count.get('ok', 0)} in one graph, {count.get('several graphs', 0)} in several, for Dynamo breaks them, and "
        f"{count.get('moved by rounding', 0)} that rounded activations move by more than the bound (three times what rounding the weights does), but that with 16-bit activations answer as the rounded weights do, up to what a millionth of the weights changes. {count.get('no linears', 0)} multiply by nothing but convolutions and matrices of fewer than 16 rows; "
        f"{count.get('Dynamo fails', 0)} fail or answer otherwise under Dynamo's own backend `eager`, too, and {count.get('timeout', 0)} take longer than the sweep waits. qcompile fails for {', '.join(faults) or 'none'}.",
        "",
        f"In {len(right) - len(low)} of the {len(right)} at least 95 % of the bytes of the linears and experts that eager multiplies by (a dispatch mode sees which) are quantized, heads and routers apart; {len(experts)} keep experts as stacked 3-D parameters, and {packed} of their {stacks} stacks are quantized."
        + (f" Below 95 %: {'; '.join(below)}." if below else ""),
    ]  # fmt: skip
    return "\n".join(lines)


def _most(row: dict[str, Any]) -> str:
    """The reasons that are neither a head's nor a convolution's."""
    if row["outside"]:
        return "the rest runs outside of every graph"
    reasons = [why for why in row["kept"] if why not in ("head", "router", "unread") and not why.startswith("a convolution with a kernel")]
    return ", ".join(reasons[:2])


def train() -> str:
    """Markdown of what training gave: `results/h200/train.json` of `train.py`, `qlora.json` of `gpu_qlora.py`, `fp8_training.json` of `gpu_train.py`, and `fp8_curve.json` and `fp8_curve_dropout.json` of `fp8_curve.py`."""
    qat, qlora, fp8, curve, dropped = (json.loads((RESULTS / "h200" / f"{name}.json").read_text()) for name in ("train", "qlora", "fp8_training", "fp8_curve", "fp8_curve_dropout"))
    methods = list(dict.fromkeys(row["method"] for row in qat["rows"]))
    cases: dict[str, dict[str, Any]] = {}
    for row in qat["rows"]:
        cases.setdefault(row["case"], {})[row["method"]] = row
    settings = qat["settings"]
    lines = [
        f"Held-out perplexity of the shipped model (fp32 {qat['rows'][0]['fp32']:.3f}) after {settings['steps']} steps of {settings['batch']} x {settings['context']} tokens on one {qat['about']['device']}, and in brackets the share of the gap "
        "between rounding (PTQ) and fp32 that was closed. W2A16 is `int2.g64`. `qcompile.quantize` of each trained model was judged again and gave the same to 0.1 %:",
        "",
        "| | " + " | ".join(methods) + " |",
        "| --- |" + " --- |" * len(methods),
    ]
    for case, rows in cases.items():
        cells = [f"{r['perplexity']:.3f}" + (f" ({r['closed']:.0%})" if r["method"] != "PTQ" else "") if (r := rows.get(m)) else "" for m in methods]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines += [
        *(["", note + "."] if (note := qat.get("note")) else []),
        "",
        f"QLoRA on the 8B shape (rank {qlora['about']['rank']} on every linear, base `{qlora['about']['weight']}`, released), one step of batch 1 on one {qlora['about']['gpu']}, beside bitsandbytes {qlora['about']['bitsandbytes']} with PEFT, eager as people run it and with its layers compiled by Inductor. "
        "Milliseconds and peak GB:",
        "",
        "| tokens | checkpointing | qcompile | bitsandbytes | bitsandbytes, compiled |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in qlora["rows"]:
        cells = [f"{r['ms']:.0f} ms, {r['peak_gb']:.2f} GB" if (r := row.get(name)) else "" for name in ("ours", "bitsandbytes", "bitsandbytes_compiled")]
        lines.append(f"| {row['tokens']} | {'yes' if row['checkpointing'] else 'no'} | " + " | ".join(cells) + " |")
    shapes = {"blocks": "four blocks of the 8B shape", "1B": "the whole 1B shape"}
    timed = []
    for shape, said in shapes.items():
        plain, *others = [r for r in fp8["rows"] if r.get("model") == shape and "ms" in r]
        timed.append(f"of {said}, bf16 {plain['ms']:.1f} ms; " + "; ".join(f"{r['way']} scaling {r['ms']:.1f} ms ({r['faster']:.2f}x)" for r in others))
    ways = {"again": "bf16 over other windows", "lm": "delayed scaling and FP8-LM's AdamW", "te": "delayed scaling by the maximum alone"}
    curves, above = [], []
    for settings, (plain, *others) in ((one["settings"], one["rows"]) for one in (curve, dropped)):
        parts = [f"{ways.get(r['way'], r['way'] + ' scaling')} {r['losses'][-1]:.3f} ({r['losses'][-1] / plain['losses'][-1] - 1:+.1%}; at worst {r['worst']:+.1%} in the second half; perplexity {r['perplexity_apart']:+.1%})" for r in others]
        above += [f"{r['way']} scaling with dropout {settings['dropout']:g}" for r in others if r["way"] not in ways and max(r["worst"], r["perplexity_apart"]) > 0.01]
        curves.append(f"dropout {settings['dropout']:g}, bf16 {plain['losses'][-1]:.3f}, " + ", ".join(parts))
    lines += [
        "",
        f"FP8 training, 8,192 tokens, forward, backward and a step of fused AdamW on one {fp8['machine']['gpu']}: " + "; and ".join(timed) + (f" ({note})." if (note := fp8.get("note")) else "."),
        "",
        f"The small model from nothing, {settings['steps']:,} steps of {settings['batch']} x {settings['context']:,} tokens on one {curve['about']['device']} (`benchmarks/fp8_curve.py --corpus ...`), mean loss of the last {plain['span']} steps and held-out perplexity, beside bf16's: "
        + "; and with ".join(curves) + f". How far other windows alone move bf16 says how much of this is chance. More than 1 % above bf16: {', '.join(above) or 'none'}.",
    ]  # fmt: skip
    return "\n".join(lines)


SECTIONS = {"cpu": cpu, "gpu": gpu, "coverage": coverage, "sweep": sweep, "train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--write", action="store_true", help="put the section into the README, and draw its picture")
    given = parser.parse_args()
    text = SECTIONS[given.section]()
    print(text)
    if given.write:
        README.write_text(re.sub(rf"<!-- {given.section} -->\n.*?<!-- /{given.section} -->", lambda _: f"<!-- {given.section} -->\n{text}\n<!-- /{given.section} -->", README.read_text(), flags=re.S))
        if given.section == "gpu":
            picture(RESULTS / CARDS[-1] / "linear.png", CARDS[-1])
            for card in CARDS:
                gpu_plots.draw(json.loads((RESULTS / card / "gpu.json").read_text()), RESULTS / card)


if __name__ == "__main__":
    main()
