"""The small model from nothing, in bfloat16 and in FP8: loss curves of the same steps. `python benchmarks/fp8_curve.py [--ways bf16 again tensor delayed row lm te] [--steps 1000] [--json PATH]`.

The model, data, optimizer and schedule are those of train_lm.py (6.2 M parameters, the standard library of the Python at hand), every way from the same weights over the same windows. A curve is
the mean loss of 50 steps side by side; a way is right where no mean of its second half lies more than 1 % above bfloat16's and its held-out perplexity no more than 1 %. Noise of the comparison:
`again` is bfloat16 from the same weights over other windows. `again` and `te` are shown for comparison and judged by nothing.

bf16     autocast, torch.compile's own backend
tensor   E4M3 forward, E5M2 backward, scaled by the maximum of each tensor (current scaling)
delayed  scaled by a history of maxima that the compiled graph keeps
te       the same with `leap=0`, the rule of Transformer Engine: one call far beyond the others is believed for as long as it is in the history
row      scaled by the maximum of each row
lm       delayed, and FP8-LM's optimizer (first moment in E4M3, second in fp16)
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from train_lm import build_model, build_optimizer, descend, next_token_loss, part, perplexity, read_corpus, scale_at, tokens_of, warmup_of, windows

from qcompile.data import STDLIB_LM, stdlib_lm
from qcompile.train.optim import FP8AdamW

WAYS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "again": {},
    "tensor": {"train": "fp8(scaling='tensor')"},
    "delayed": {"train": "fp8(scaling='delayed')"},
    "row": {"train": "fp8(scaling='row')"},
    "te": {"train": "fp8(scaling='delayed', leap=0)"},
    "lm": {"train": "fp8(scaling='delayed')"},
}
GOAL = 0.01
"""A loss curve may lie this much above bfloat16's."""
SPAN = 50
"""Steps of a mean."""
Row = dict[str, Any]


def train(way: str, data: torch.Tensor, held: torch.Tensor, args: argparse.Namespace) -> Row:
    """One run: means of the loss over ``SPAN`` steps and the held-out perplexity at the end, by the uncompiled model."""
    torch.compiler.reset()
    torch.manual_seed(args.seed)
    model, hooks = build_model(args.context, args.dropout, 0)
    model.to(args.device).train()
    options = WAYS[way]
    how: dict[str, Any] = {"backend": "qcompile", "options": options} if options else {}
    if how and args.device == "cpu":
        how["options"] = {**options, "lower": "eager"}

    loss_of = torch.compile(next_token_loss, dynamic=False, **how)
    optimizer: torch.optim.Optimizer = build_optimizer(model, args.rate, args.device)
    if way == "lm":
        optimizer = FP8AdamW(optimizer.param_groups, lr=args.rate, betas=(0.9, 0.95), compile=args.device == "cuda")
    generator = torch.Generator(args.device).manual_seed(args.seed + (way == "again"))
    start, losses = time.perf_counter(), []
    for step in tqdm(range(args.steps), desc=way, mininterval=2.0):
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(model, windows(data, args.context, args.batch, generator))
        losses.append(descend(loss, model, optimizer, args.rate * scale_at(step, args.steps, warmup_of(args.steps))))
    every = torch.stack(losses).float().cpu()
    seconds = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    model.eval()
    with torch.autocast(args.device, torch.bfloat16):
        judged = perplexity(model, held, args.context)
    span = min(SPAN, max(1, args.steps // 4))
    return {"way": way, "losses": [round(float(part.mean()), 5) for part in every.split(span)], "span": span, "perplexity": round(judged, 4), "seconds": round(seconds, 1), "finite": bool(every.isfinite().all())}


def beside(row: Row, plain: Row) -> Row:
    """The row with how far its curve lies above bfloat16's in the second half, where it is worst and in the mean, and whether that is within the goal."""
    half = len(plain["losses"]) // 2
    apart = [a / b - 1 for a, b in zip(row["losses"][half:], plain["losses"][half:], strict=True)]
    above = row["perplexity"] / plain["perplexity"] - 1
    right = row["finite"] and (row["way"] in ("again", "te") or (max(apart) <= GOAL and above <= GOAL))
    return {**row, "worst": round(max(apart), 5), "mean": round(sum(apart) / len(apart), 5), "perplexity_apart": round(above, 5), "right": right}


def plot(rows: list[Row], path: Path) -> None:
    """The curves, and beside them how far each lies from bfloat16's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, apart) = plt.subplots(1, 2, figsize=(13, 4.5))
    plain = rows[0]
    for row in rows:
        steps = [(i + 0.5) * row["span"] for i in range(len(row["losses"]))]
        curves.plot(steps, row["losses"], label=row["way"], linewidth=1)
        if row is not plain:
            apart.plot(steps, [100 * (a / b - 1) for a, b in zip(row["losses"], plain["losses"])], label=row["way"], linewidth=1)
    for y in (-100 * GOAL, 100 * GOAL):
        apart.axhline(y, color="black", linewidth=0.7, linestyle="--")
    curves.set_ylabel(f"training loss, mean of {plain['span']} steps")
    apart.set_ylabel("% above bfloat16")
    for axes in (curves, apart):
        axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(rows: list[Row]) -> None:
    """The table of all ways."""
    table = Table("way", "last loss", "worst of the second half", "its mean", "perplexity", "beside bf16", "seconds", "within 1 %")
    for r in rows:
        more = [f"{r['worst']:+.2%}", f"{r['mean']:+.2%}"] if "worst" in r else ["", ""]
        table.add_row(r["way"], f"{r['losses'][-1]:.4f}", *more, f"{r['perplexity']:.3f}", f"{r['perplexity_apart']:+.2%}" if "worst" in r else "", f"{r['seconds']:.0f}", str(r.get("right", "")))
    Console(width=130).print(table)


def main() -> int:
    """All ways; returns how many are not within the goal."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    cli.add_argument("--steps", type=int, default=1000)
    cli.add_argument("--batch", type=int, default=64)
    cli.add_argument("--context", type=int, default=1024)
    cli.add_argument("--rate", type=float, default=2e-3)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--files", type=int, default=0, help="read this many training files only")
    cli.add_argument("--windows", type=int, default=0, help="judge by this many held-out windows only")
    cli.add_argument("--dropout", type=float, default=0.2, help="on the residual branches, as in train_lm.py; without it 1,000 steps learn a small corpus by heart, a large one (--corpus) not; masks differ between compiled graphs, which is a difference of its own")
    cli.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="the standard library to read (default: this Python's)")
    cli.add_argument("--corpus", type=Path, help="a corpus made by train_lm.py --pack, instead of --stdlib")
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cli.add_argument("--json", type=Path)
    args = cli.parse_args()
    torch.set_float32_matmul_precision("high")
    tokenizer = stdlib_lm()[1]
    texts = [text for name, text in sorted(read_corpus(args.corpus, args.stdlib).items()) if part(name) == "train"]
    data = tokens_of(tokenizer, texts[: args.files] if args.files else texts, args.device)
    held = tokenizer((STDLIB_LM / "heldout.txt").read_text("utf-8"), return_tensors="pt").input_ids[0].to(args.device)
    held = held[: args.windows * args.context] if args.windows else held
    about = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "torch": torch.__version__, "train_tokens": len(data), "corpus": args.corpus.name if args.corpus else "the standard library at hand"}
    settings = {key: getattr(args, key) for key in ("steps", "batch", "context", "rate", "dropout", "seed")}
    print(json.dumps({**about, **settings}), flush=True)
    rows: list[Row] = []
    for way in dict.fromkeys(["bf16", *args.ways]):
        row = train(way, data, held, args)
        rows.append(beside(row, rows[0]) if rows else row)
        print(json.dumps(rows[-1]), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"about": about, "settings": settings, "rows": rows}, indent=1) + "\n")
            plot(rows, args.json.with_suffix(".png"))
    show(rows)
    return sum(not row.get("right", True) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
