"""Training the shipped language model as it will be quantized: perplexity of fp32, of rounding after training, of QAT, and of QAT with distillation. `python benchmarks/train.py`.

Every row starts from the shipped checkpoint, sees the same windows of the training part of this Python's standard library (the split of train_lm.py: held-out files are never seen), and is judged on
`heldout.txt` by its evaluation graph, then once more by `qcompile.quantize` of what was trained: both must give the same perplexity, or the program exits with 1.
The teacher of distilled rows is the shipped model. Perplexities of windows of 1,024 tokens; losses of training are those of the next token, whatever the row minimizes.

    python benchmarks/train.py --steps 400 --json benchmarks/results/h200/train.json
    python benchmarks/train.py --plot benchmarks/results/h200/train.json

A row takes 25 seconds on an H200, one that is compiled a minute and more; on two CPU cores take `--batch 4 --context 256`, which is another experiment.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from train_lm import drop_branches, part, perplexity, read_stdlib, tokens_of

import qcompile
from qcompile.data import STDLIB_LM, stdlib_lm
from qcompile.train.distill import Distillation


@dataclass(frozen=True)
class Case:
    """One scheme: options of the backend, the training recipe, and the learning rates of weights: ``rate`` with a teacher, ``alone`` where the next token is all that is learned; how rounded and
    converted models are judged: by the references of their graphs, or by kernels as trained ones are, where tensor cores add up with fewer bits than float32 has."""

    name: str
    options: dict[str, Any]
    train: str = "qat"
    rate: float = 1e-4
    alone: float = 3e-5
    lower: str = "eager"


CASES = {
    row.name: row
    for row in (
        Case("W4A16", {"weight": "int4.g128"}),
        Case("W4A8", {"weight": "int4.g128", "input": "int8.row"}),
        Case("W2A16", {"weight": "int2.g64"}, rate=4e-4, alone=4e-4),
        Case("FP8", {"recipe": "FP8"}, lower="inductor"),
        Case("NF4", {"recipe": "NF4"}),
    )
}
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "QAT": lambda teacher: None,
    "QAT + logit": lambda teacher: Distillation(teacher, "logit"),
    "QAT + TSLD": lambda teacher: Distillation(teacher, "tsld"),
    "QAT + logit + ground truth": lambda teacher: Distillation(teacher, "logit", ground_truth=1.0),
}
"""Method -> its loss for a teacher; None: the next token's."""
DISTILLED = ("W4A16", "W4A8", "W2A16")
"""Cases that every method is run for; the others get the first."""


@dataclass
class Row:
    """What was measured of one case and method. ``closed``: how much of the gap between rounding and fp32 was closed. ``losses``: of the next token, every tenth step."""

    case: str
    method: str
    perplexity: float
    converted: float = math.nan
    fp32: float = math.nan
    closed: float = math.nan
    steps: int = 0
    seconds: float = 0.0
    repaired: int = 0
    rate: float = math.nan
    dropout: float = 0.0
    losses: list[float] = field(default_factory=list)


class Experiment:
    """The data and the fp32 model that all rows share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = stdlib_lm()
        self.model.to(args.device)
        corpus = read_stdlib(Path(args.stdlib))
        print(f"{time.perf_counter() - args.began:.0f} s: the corpus is read", flush=True)
        texts = [text for name, text in sorted(corpus.items()) if part(name) == "train"]
        self.data = tokens_of(self.tokenizer, texts[: args.files] if args.files else texts, args.device)
        held = self.tokenizer((STDLIB_LM / "heldout.txt").read_text("utf-8"), return_tensors="pt").input_ids[0].to(args.device)
        self.held = held[: args.windows * 1024] if args.windows else held
        self.fp32 = self.judge(self.model)
        print(f"{time.perf_counter() - args.began:.0f} s: {len(self.data):,} tokens to train on, {len(self.held):,} held out, perplexity of fp32 {self.fp32:.3f}", flush=True)

    def judge(self, model: nn.Module) -> float:
        """Held-out perplexity."""
        with torch.no_grad():
            return perplexity(model, self.held, 1024)

    def batches(self) -> Any:
        """The same windows for every row."""
        generator = torch.Generator(self.args.device).manual_seed(self.args.seed)
        reach = torch.arange(self.args.context, device=self.args.device)
        for _ in range(self.args.steps):
            yield self.data[torch.randint(len(self.data) - self.args.context, (self.args.batch, 1), generator=generator, device=self.args.device) + reach]

    def rounded(self, case: Case) -> Row:
        """Rounding to nearest, no training."""
        fast = torch.compile(copy.deepcopy(self.model), backend="qcompile", options={**case.options, "lower": case.lower})
        return Row(case.name, "PTQ", self.judge(fast), fp32=self.fp32)

    def trained(self, case: Case, method: str, before: float) -> Row:
        """One training from the shipped checkpoint."""
        torch._dynamo.reset()
        model = copy.deepcopy(self.model)
        distill = METHODS[method](self.model)
        hooks = drop_branches(model, self.args.dropout) if self.args.dropout and distill is None else []
        model.train()
        fast = torch.compile(model, backend="qcompile", options={**case.options, "train": case.train})
        rate = self.args.rate or (case.alone if distill is None else case.rate)
        start, losses = time.perf_counter(), []
        first = next(iter(self.batches()))
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.device == "cuda"):
            fast(input_ids=first, use_cache=False)  # makes what estimators learn
        groups = [{"params": list(model.parameters())}, {"params": qcompile.parameters(fast)}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=self.args.device == "cuda")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / self.args.steps))))
        for step, ids in enumerate(tqdm(self.batches(), total=self.args.steps, desc=f"{case.name} {method}", mininterval=2.0)):
            with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.device == "cuda"):
                out = fast(input_ids=ids, use_cache=False)
            truth = F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
            loss = truth if distill is None else distill(out, input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0:
                losses.append(truth.detach())
        seconds = time.perf_counter() - start
        for hook in hooks:
            hook.remove()
        after = self.judge(fast.eval())
        row = Row(case.name, method, after, fp32=self.fp32, steps=self.args.steps, seconds=seconds, rate=rate, dropout=self.args.dropout if hooks else 0.0, losses=[round(float(x), 4) for x in losses])
        row.closed = (before - after) / (before - self.fp32) if before > self.fp32 else math.nan
        row.repaired = sum(qcompile.train.repaired(fast).values())
        row.converted = self.converted(model, case)
        return row

    def converted(self, model: nn.Module, case: Case) -> float:
        """Perplexity of what ``qcompile.quantize`` makes of the trained model."""
        options = dict(case.options)
        recipe = options.pop("recipe", None)
        weight_only = {"input": "16bit"} if recipe is None and "input" not in options else {}
        qcompile.quantize(model, recipe or "W8A8", [{"input_ids": self.held[None, :64], "use_cache": False}], progress=False, **options, **weight_only)
        return self.judge(torch.compile(model, backend="qcompile", options={"lower": case.lower}))


def show(rows: Sequence[Row], console: Console) -> None:
    """The table of all rows."""
    table = Table("case", "method", "perplexity", "x fp32", "gap closed", "converted", "steps", "seconds")
    for r in rows:
        table.add_row(r.case, r.method, f"{r.perplexity:.3f}", f"{r.perplexity / r.fp32:.3f}", "" if math.isnan(r.closed) else f"{r.closed:.0%}", "" if math.isnan(r.converted) else f"{r.converted:.3f}", str(r.steps or ""), f"{r.seconds:.0f}" if r.seconds else "")
    console.print(table)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Perplexities as bars over fp32's line, and the curves of the next token's loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(r.case for r in rows))
    methods = list(dict.fromkeys(r.method for r in rows))
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(13, 4.5))
    for i, method in enumerate(methods):
        mine = {r.case: r.perplexity for r in rows if r.method == method}
        places = [cases.index(c) + (i - len(methods) / 2 + 0.5) * 0.8 / len(methods) for c in mine]
        bars.bar(places, list(mine.values()), 0.8 / len(methods), label=method)
    bars.axhline(rows[0].fp32, color="black", linewidth=1, label="fp32")
    bars.set_xticks(range(len(cases)), cases)
    bars.set_ylabel("held-out perplexity")
    bars.set_ylim(bottom=rows[0].fp32 * 0.95, top=max(r.perplexity for r in rows if r.method != "PTQ") * 1.15)
    bars.set_title("bars that leave the picture are PTQ")
    bars.legend(fontsize=8)
    for r in rows:
        if r.losses and r.case in DISTILLED:
            curves.plot([10 * i for i in range(len(r.losses))], r.losses, label=f"{r.case} {r.method}", linewidth=1)
    curves.set_xlabel("step")
    curves.set_ylabel("loss of the next token, training")
    curves.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    cli.add_argument("--method", nargs="*", choices=METHODS, help="default: all for W4A16, W4A8 and W2A16, plain QAT for the others")
    cli.add_argument("--steps", type=int, default=400)
    cli.add_argument("--batch", type=int, default=32)
    cli.add_argument("--context", type=int, default=512)
    cli.add_argument("--rate", type=float, help="the learning rate instead of the case's own")
    cli.add_argument("--dropout", type=float, default=0.2, help="on the residual branches, as the shipped model was trained, where the next token is all that is learned: a few hundred steps on windows that the model has seen are learned by heart otherwise")
    cli.add_argument("--files", type=int, default=0, help="read this many training files only")
    cli.add_argument("--windows", type=int, default=0, help="judge by this many held-out windows only")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--stdlib", default=sysconfig.get_path("stdlib"))
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cli.add_argument("--json", type=Path)
    cli.add_argument("--plot", type=Path, help="draw a JSON file of an earlier run beside it, and stop")
    return cli.parse_args()


def save(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Write what is known so far, and its picture. Rows of an earlier run with the same settings stay, unless they were measured again."""
    args = experiment.args
    about = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "torch": torch.__version__, "python": sys.version.split()[0]}
    settings = {key: getattr(args, key) for key in ("steps", "batch", "context", "dropout", "rate", "seed", "windows")} | {"train_tokens": len(experiment.data)}
    known = {(r.case, r.method): r for r in rows}
    if args.json.exists():
        earlier = json.loads(args.json.read_text())
        if (earlier["about"], earlier["settings"]) == (about, settings):
            known = {(r["case"], r["method"]): Row(**r) for r in earlier["rows"]} | known
    cases, methods = list(CASES), ["PTQ", *METHODS]
    every = sorted((r for r in known.values() if r.case in cases and r.method in methods), key=lambda r: (cases.index(r.case), methods.index(r.method)))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"about": about, "settings": settings, "rows": [asdict(r) for r in every]}, indent=1) + "\n")
    plot(every, args.json.with_suffix(".png"))


def main() -> int:
    args, console = arguments(), Console(width=140)
    args.began = time.perf_counter()
    if args.plot:
        rows = [Row(**row) for row in json.loads(args.plot.read_text())["rows"]]
        show(rows, console)
        plot(rows, args.plot.with_suffix(".png"))
        return 0
    torch.set_float32_matmul_precision("high")
    experiment, rows, wrong = Experiment(args), [], []
    for name in args.case:
        case = CASES[name]
        rows.append(experiment.rounded(case))
        before = rows[-1].perplexity
        for method in args.method or (METHODS if name in DISTILLED else ("QAT",)):
            row = experiment.trained(case, method, before)
            rows.append(row)
            if abs(row.converted / row.perplexity - 1) > 1e-3:
                wrong.append(f"{name} {method}: {row.perplexity} as trained, {row.converted} as converted")
            print(f"{time.perf_counter() - args.began:.0f} s: {json.dumps(asdict(row))}", flush=True)
            if args.json:
                save(experiment, rows)
    show(rows, console)
    for line in wrong:
        print(f"WRONG {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
