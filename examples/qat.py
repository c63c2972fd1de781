"""Two bits a weight: rounding breaks a model, a few steps of training begin to mend it. `python examples/qat.py`

The shipped language model is compiled with weights of two bits and trained as it will be quantized. The teacher is the model itself before it was rounded: token-scaled logit distillation
(TSLD, Kim et al. 2023) pulls the student's distribution of the next token toward the teacher's. In the end `qcompile.quantize` leaves a model whose weights are codes, with nothing lost.

    fast = torch.compile(model, backend="qcompile", options={"weight": "int2.g64", "train": "qat"})
    fast(**batch)                                                            # the first call makes what estimators learn (here: step sizes)
    optimizer = AdamW([*model.parameters(), *qcompile.parameters(fast)])
    for batch in batches:
        loss, parts = distill(fast(**batch), **batch)                       # grad mode: the graph that is trained
        ...
    with torch.no_grad():
        fast(**batch)                                                        # no grad: the packed weights, as inference multiplies them
"""

from __future__ import annotations

import argparse
import copy
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import qcompile
from qcompile.data import STDLIB_LM, stdlib_lm
from qcompile.train.distill import Distillation

CONTEXT = 256


def corpus(tokenizer, held: str) -> torch.Tensor:
    """Tokens of the first files of this Python's standard library that are not held out, one row."""
    texts = [path.read_text("utf-8", errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]]
    return tokenizer("\n\n".join(text for text in texts if text.strip() not in held), return_tensors="pt").input_ids[0]


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor) -> float:
    """Of windows side by side."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    logits = model(input_ids=windows, use_cache=False).logits
    return math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten()))


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--steps", type=int, default=30)
    cli.add_argument("--batch", type=int, default=4)
    cli.add_argument("--weight", default="int2.g64", help="the scheme of weights")
    cli.add_argument("--lower", default="inductor", help="eager: run the quantized graphs by their references, nothing is compiled to C++")
    args = cli.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    teacher, tokenizer = stdlib_lm()
    held = (STDLIB_LM / "heldout.txt").read_text("utf-8")
    judged = tokenizer(held, return_tensors="pt").input_ids[0][: 4 * CONTEXT]
    data = corpus(tokenizer, held)
    model = copy.deepcopy(teacher)
    for layer in model.model.layers:  # one small graph for all layers: compiled in seconds. torch.compile(model, ...) makes one large graph, faster once it is there
        layer.compile(backend="qcompile", options={"weight": args.weight, "train": "qat", "lower": args.lower})
    print(f"fp32                     perplexity {perplexity(teacher, judged):10.2f}")
    print(f"{args.weight}, rounded       perplexity {perplexity(model, judged):10.2f}")

    def window() -> dict[str, torch.Tensor]:
        starts = torch.randint(len(data) - CONTEXT, (args.batch, 1))
        ids = data[starts + torch.arange(CONTEXT)]
        return {"input_ids": ids, "labels": ids}

    model(input_ids=window()["input_ids"], use_cache=False)
    optimizer = torch.optim.AdamW([*model.parameters(), *qcompile.parameters(model)], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    distill = Distillation(teacher, "tsld")
    for _ in (bar := tqdm(range(args.steps), desc="training", mininterval=1.0)):
        batch = window()
        loss, parts = distill(model(input_ids=batch["input_ids"], use_cache=False), **batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix({name: f"{float(value):.3f}" for name, value in parts.items()}, refresh=False)

    trained = perplexity(model, judged)
    before = sum(p.nbytes for p in model.parameters())
    qcompile.quantize(model, weight=args.weight, input="16bit", data=[{"input_ids": judged[None, :32], "use_cache": False}], progress=False)
    after = sum(p.nbytes for p in model.parameters())
    with torch.compiler.set_stance("force_eager"):  # what it is now runs in eager PyTorch, too
        kept = perplexity(model, judged)
    print(f"{args.weight}, trained       perplexity {trained:10.2f}   ({args.steps} steps, {time.perf_counter() - began:.0f} s in all)")
    print(f"{args.weight}, as codes      perplexity {kept:10.2f}   {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB")
    if abs(kept / trained - 1) > 1e-3:
        raise SystemExit("the quantized model is not what was trained")


if __name__ == "__main__":
    main()
