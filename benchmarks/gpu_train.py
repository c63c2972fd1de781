"""Training steps on the GPU at hand, in FP8 and in bfloat16: `python benchmarks/gpu_train.py [--models blocks 1B] [--ways bf16 tensor delayed row] [--seconds 230] [--json PATH] [--kernels]`.

Checks first: one linear, forward and backward, is compared with the references of the same graph, run eagerly. Then, for each model and way, forward + backward + one step of fused AdamW, all compiled whole:
milliseconds (median of events), peak memory, and the losses of the first steps beside bfloat16's, from equal weights on equal data. Every row is written as soon as it is measured.

blocks  four decoder layers of the 8B shape and a norm: hidden states in, the mean square of what comes out against a target (no table, no head)
1B      the whole 1B shape, table and head tied, cross entropy over the vocabulary
tiny    to see that this runs, also on a CPU

The weights are random and so are tokens (of Zipf's law, no batch twice); batch x sequence is 8,192 tokens. What is timed includes all casts, scales and histories.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import LLAMAS, VOCABULARY
from gpu_model import distance, settle
from torch import Tensor, nn

WAYS = {"bf16": None, "tensor": "fp8(scaling='tensor')", "delayed": "fp8(scaling='delayed')", "row": "fp8(scaling='row')"}
GOALS = {("blocks", "tensor"): 1.25, ("blocks", "delayed"): 1.3, ("1B", "tensor"): 1.1, ("1B", "delayed"): 1.1}
"""Times as fast as compiled bfloat16."""
FRESH = 64
"""Batches of tokens; more than steps are taken."""
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A row of `cases.LLAMAS` with other numbers in some places, and the tokens of a step. `head`: tokens in and a loss over the vocabulary, else hidden states in and out."""

    llama: str
    batch: int
    length: int
    head: bool
    other: tuple[tuple[str, Any], ...] = ()


SHAPES = {
    "blocks": Shape("8B", 4, 2048, False, (("num_hidden_layers", 4), ("vocab_size", 16))),
    "1B": Shape("1B", 4, 2048, True, (("vocab_size", VOCABULARY), ("tie_word_embeddings", True))),
    "tiny": Shape("tiny", 2, 64, True),
}


def zipf(vocabulary: int, sizes: tuple[int, int], device: str) -> Tensor:
    """Random tokens whose k-th most frequent has a probability of about 1 / (k ln vocabulary): a law that a model can learn from batches that it sees once."""
    return (vocabulary ** torch.rand(sizes, device=device, dtype=torch.float64)).long().clamp(1, vocabulary) - 1


class Steps:
    """A model, its optimizer, its batches (of tokens more than steps, of hidden states three and what they are compared with), and the compiled loss."""

    def __init__(self, shape: Shape, train: str | None, device: str, **options: Any) -> None:
        import transformers

        torch.compiler.reset()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{"vocab_size": VOCABULARY, **LLAMAS[shape.llama], **dict(shape.other)}, bos_token_id=None, eos_token_id=None, use_cache=False, attn_implementation="sdpa")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                self.model: Any = transformers.LlamaForCausalLM(config) if shape.head else transformers.LlamaModel(config)
        finally:
            torch.set_default_dtype(before)
        self.model.train()
        self.device = torch.device(device)
        sizes = (shape.batch, shape.length)
        if shape.head:
            self.data = [zipf(config.vocab_size, sizes, device) for _ in range(FRESH)]  # no batch twice: steps that learn batches by heart measure how fast they do, and any difference at all is multiplied
        else:
            *self.data, self.target = [torch.randn(*sizes, config.hidden_size, device=device, dtype=torch.bfloat16) for _ in range(4)]
        self.head = shape.head
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=self.device.type == "cuda")
        how: dict[str, Any] = {} if train is None else {"backend": "qcompile", "options": {"train": train, **options}}
        self.loss: Callable[..., Tensor] = torch.compile(self._loss, dynamic=False, **how)

    def _loss(self, x: Tensor, target: Tensor) -> Tensor:
        if self.head:
            logits = self.model(input_ids=x).logits
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten())
        return (self.model(inputs_embeds=x).last_hidden_state - target).float().square().mean()

    def forward_backward(self, i: int) -> Tensor:
        """Gradients of batch i; its loss."""
        x = self.data[i % len(self.data)]
        loss = self.loss(x, x if self.head else self.target)
        loss.backward()
        return loss.detach()

    def step(self, i: int) -> Tensor:
        """One step; the loss before it."""
        loss = self.forward_backward(i)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def check(way: str, device: str, m: int = 1000, n: int = 1024, k: int = 512) -> Row:
    """One linear: y, dx and dw of the compiled graph against those of its references, run eagerly. Codes are the same, so that only sums differ; the number of rows is no multiple of 16."""
    found: list[list[Tensor]] = []
    for options in ({}, {"lower": "eager"}):
        torch.compiler.reset()
        torch.manual_seed(0)
        layer = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16, requires_grad=True)
        y = torch.compile(layer, backend="qcompile", dynamic=False, options={"train": WAYS[way], **options})(x)
        y.backward(torch.randn_like(y) / 1000)
        assert x.grad is not None and layer.weight.grad is not None
        found.append([y.detach(), x.grad, layer.weight.grad])
        exact = [x.detach().float() @ layer.weight.detach().float().T]
    errors = [round(distance(a, b), 5) for a, b in zip(*found)]
    return {"check": way, "errors": errors, "y_of_fp8": round(distance(found[0][0], exact[0]), 5), "right": max(errors) < 6e-3}


def measure(model: str, way: str, device: str, count: int) -> Row:
    """One row: the first step's seconds (compilation), milliseconds a step, peak memory, losses."""
    steps = Steps(SHAPES[model], WAYS[way], device)
    begin = time.perf_counter()
    losses = [steps.step(0)]
    settle(steps.device)
    row: Row = {"model": model, "way": way, "compile_s": round(time.perf_counter() - begin, 1)}
    losses += [steps.step(i) for i in range(1, 5)]
    settle(steps.device)
    if steps.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for i in range(5, 5 + count):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if steps.device.type == "cuda" else []
        begin = time.perf_counter()
        if marks:
            marks[0].record()
        losses.append(steps.step(i))
        if marks:
            marks[1].record()
            marks[1].synchronize()
        times.append(marks[0].elapsed_time(marks[1]) if marks else 1e3 * (time.perf_counter() - begin))
    peak = torch.cuda.max_memory_allocated() / 2**30 if steps.device.type == "cuda" else 0.0
    return {**row, "ms": round(statistics.median(times), 3), "least_ms": round(min(times), 3), "peak_gib": round(peak, 2), "losses": [round(float(loss), 5) for loss in losses]}


def beside(row: Row, plain: Row | None) -> Row:
    """The row with what it is beside bfloat16's."""
    if plain is None or row is plain:
        return row
    apart = max(abs(a - b) / abs(b) for a, b in zip(row["losses"], plain["losses"], strict=True))
    ratio, goal = plain["ms"] / row["ms"], GOALS.get((row["model"], row["way"]))
    return {**row, "faster": round(ratio, 3), "goal": goal, "met": ratio >= goal if goal else None, "loss_apart": round(apart, 5), "right": apart < 0.02}


def kernels(model: str, way: str, device: str) -> str:
    """The kernels of one step by the time they take."""
    steps = Steps(SHAPES[model], WAYS[way], device)
    for i in range(3):
        steps.step(i)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps.step(3)
        settle(steps.device)
    rows = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows)
    lines = [f"{e.self_device_time_total / 1e3:9.3f} ms {e.count:5d}  {e.key[:150]}" for e in rows[:32]]
    return "\n".join([f"{model} {way}: {total / 1e3:.3f} ms in {sum(e.count for e in rows)} kernels", *lines])


def main() -> int:
    """All rows, in order, while there is time; returns the number that are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["blocks", "1B"], choices=SHAPES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seconds", type=float, default=230)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--no-checks", action="store_true")
    given = parser.parse_args()
    if given.steps + 5 > FRESH:
        parser.error(f"--steps {given.steps}: there are {FRESH} batches, and 5 steps come first")
    begun, rows = time.perf_counter(), []
    cuda = torch.device(given.device).type == "cuda"
    about = {"gpu": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}
    path = given.json or RESULTS / (about["gpu"].split()[1].lower() if cuda else "cpu") / "train_fp8.json"
    print(json.dumps(about), flush=True)
    work: list[tuple[str, str]] = [("", way) for way in given.ways if way != "bf16" and not given.no_checks] + [(m, w) for m in given.models for w in given.ways]
    for done, (model, way) in enumerate(work):
        if time.perf_counter() - begun > given.seconds:
            print(f"out of time; {len(work) - done} of {len(work)} rows were not run", flush=True)
            break
        start = time.perf_counter()
        try:
            row = measure(model, way, given.device, given.steps) if model else check(way, given.device)
            row = beside(row, next((r for r in rows if r.get("model") == model and r.get("way") == "bf16" and "ms" in r), None)) if model else row
        except Exception as error:
            row = {"model": model, "way": way, "failed": f"{type(error).__name__}: {str(error)[:400]}", "right": False}
        rows.append({**row, "took_s": round(time.perf_counter() - start, 1)})
        print(json.dumps(rows[-1]), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        if given.kernels and model:
            print(kernels(model, way, given.device), flush=True)
    return sum(not row.get("right", True) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
