"""The shipped language model in fp32 and quantized by qcompile: size, perplexity, speed, text. `python benchmarks/demo.py` (or `make demo`).

Everything is measured in this one run: the same windows of `heldout.txt` for all, and greedy decoding against *compiled* fp32, the candidates taking turns, medians shown.
Exits with 1 where a quantized model's perplexity is out of bounds. Writes out/demo.html (the tables and the picture), out/demo.png and out/demo.json.
`--quick` does the same with W8A8 alone, on one window, with two tokens, and leaves fp32 eager, which takes as long to compile: it shows that all of it runs, and its speeds say nothing.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

import qcompile

MODEL = Path(qcompile.__file__).parent / "data" / "stdlib_lm"
RECIPES = ("W8A8", "W4A16", "NF4")
BOUND = {"W8A8": 1.02, "W4A16": 1.10, "NF4": 1.10}
"""Greatest perplexity, as a multiple of that of fp32."""
PROMPT = "import os\n\ndef "
CONTEXT = 1024


@dataclass
class Result:
    """What was measured of one candidate. Bytes of the linears before and after, of all that is resident, tokens/s turn by turn."""

    name: str
    linears_before: int
    linears: int
    resident: int
    bits: float
    perplexity: float = math.nan
    rates: list[float] = field(default_factory=list)
    text: str = ""
    report: str = ""

    @property
    def rate(self) -> float:
        """Median tokens/s."""
        return statistics.median(self.rates) if self.rates else math.nan


def load(folder: Path = MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer, from the package's own folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def held_out(tokenizer: PreTrainedTokenizerBase, count: int, context: int = CONTEXT) -> Tensor:
    """The first `count` windows of `heldout.txt`, side by side."""
    tokens = tokenizer((MODEL / "heldout.txt").read_text("utf-8"), return_tensors="pt").input_ids[0]
    return tokens[: len(tokens) // context * context].view(-1, context)[:count]


@torch.no_grad()
def perplexity(model: Callable[..., object], windows: Tensor, batch: int = 2, advance: Callable[[], object] = lambda: None) -> float:
    """exp of the mean loss of all predictions inside the windows, each read without what came before it."""
    total = 0.0
    for rows in windows.split(batch):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()  # type: ignore[attr-defined]
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        advance()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.no_grad()
def generate(model: PreTrainedModel, forward: Callable[..., object], prompt: Tensor, count: int) -> tuple[list[int], float]:
    """Greedy tokens, and decoded tokens/s. The prompt fills a StaticCache eagerly; each step after it is one call of `forward`."""
    cache = StaticCache(config=model.config, max_cache_len=128)
    first = model(input_ids=prompt, past_key_values=cache).logits[:, -1].argmax(-1)
    tokens = [int(first)]
    start = time.perf_counter()
    for position in range(prompt.shape[1], prompt.shape[1] + count):
        step = torch.tensor([[tokens[-1]]])
        logits = forward(input_ids=step, past_key_values=cache, position_ids=torch.tensor([[position]])).logits  # type: ignore[attr-defined]
        tokens.append(int(logits[0, -1].argmax()))
    return tokens, count / (time.perf_counter() - start)


def linear_bytes(model: nn.Module) -> int:
    return sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))


def fp32_result(model: nn.Module, name: str) -> Result:
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return Result(name, linear_bytes(model), linear_bytes(model), everything, 32.0)


def quantized_result(model: nn.Module, recipe: str, report: qcompile.Report) -> Result:
    """Sizes out of a report. Resident is what stays once `qcompile.release_weights` has given the weights that are packed back."""
    weights = {row.parameter: row for row in report.sites}.values()
    packed, before = sum(row.bytes_after for row in weights), sum(row.bytes_before for row in weights)
    all_linears, everything = linear_bytes(model), fp32_result(model, "").resident
    bits = 32 * packed / before
    return Result(recipe, all_linears, all_linears - before + packed, everything - before + packed, bits, report=str(report))


def compiled(model: PreTrainedModel, recipe: str | None) -> Callable[..., object]:
    """fp32 by Inductor where `recipe` is None, else by qcompile."""
    if recipe is None:
        return torch.compile(model, dynamic=False)
    return torch.compile(model, dynamic=False, backend="qcompile", options={"recipe": recipe})


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


def measure(windows: Tensor, recipes: Sequence[str], tokens: int, turns: int, compiler: bool, console: Console) -> list[Result]:
    """All candidates, fp32 first. Each has a model of its own, so that all can take turns."""
    names: list[str | None] = [None, *recipes]
    results: list[Result] = []
    runs: list[tuple[PreTrainedModel, Callable[..., object]]] = []
    with Progress(console=console, transient=True) as progress:
        work = progress.add_task("compile and read", total=len(names) * (len(windows.split(2)) + 2))
        for recipe in names:
            progress.update(work, description=f"{recipe or 'fp32'}: compile, read {windows.numel():,} tokens")
            model, tokenizer = load()
            forward = model if recipe is None and not compiler else compiled(model, recipe)
            prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
            value = perplexity(forward, windows, advance=lambda: progress.advance(work))
            progress.update(work, description=f"{recipe or 'fp32'}: compile the decode step, write")
            ids, _ = generate(model, forward, prompt, tokens)
            progress.advance(work)
            name = "fp32, compiled" if compiler else "fp32, eager"
            result = fp32_result(model, name) if recipe is None else quantized_result(model, recipe, _explain(forward, windows))
            result.perplexity, result.text = value, tokenizer.decode([*prompt[0], *ids])
            results.append(result)
            runs.append((model, forward))
            progress.advance(work)
        speed = progress.add_task(f"decode, {turns} turns of {tokens} tokens", total=turns * len(names))
        for _ in range(turns):
            for result, (model, forward) in zip(results, runs):
                result.rates.append(generate(model, forward, prompt, tokens)[1])
                progress.advance(speed)
    return results


def _explain(forward: Callable[..., object], windows: Tensor) -> qcompile.Report:
    return qcompile.explain(forward, input_ids=windows[:2], use_cache=False)


def table(results: Sequence[Result]) -> Table:
    """One row per candidate; ratios are against the first, fp32."""
    base, out = results[0], Table(title="stdlib_lm, 6.2 M parameters")
    for column in ("", "linears, MB", "resident, MB", "bits/weight", "perplexity", "x fp32", "tokens/s", "x fp32"):
        out.add_column(column, justify="right" if column else "left")
    for r in results:
        sizes = [f"{r.linears_before / 1e6:.1f} -> {r.linears / 1e6:.1f}", f"{r.resident / 1e6:.1f}", f"{r.bits:.2f}"]
        out.add_row(r.name, *sizes, f"{r.perplexity:.3f}", f"{r.perplexity / base.perplexity:.4f}", f"{r.rate:.0f}", f"{r.rate / base.rate:.2f}")
    return out


def failures(results: Sequence[Result]) -> list[str]:
    """Candidates whose perplexity is out of bounds (or not a number), in words."""
    base = results[0].perplexity
    bad = [r for r in results[1:] if not r.perplexity <= BOUND[r.name] * base]
    return [f"{r.name}: perplexity {r.perplexity:.3f} is more than {BOUND[r.name]} times fp32's {base:.3f}" for r in bad]


def picture(results: Sequence[Result], path: Path) -> None:
    """Bars of size, perplexity and tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (("linears, MB", [r.linears / 1e6 for r in results]), ("held-out perplexity", [r.perplexity for r in results]), ("greedy tokens/s", [r.rate for r in results]))
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for axis, (title, values) in zip(axes, panels):
        bars = axis.bar([r.name.partition(",")[0] for r in results], values, color=["#8a8f98", "#2f6f9f", "#c8553d", "#588157"][: len(results)])
        axis.bar_label(bars, fmt="%.4g")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(results: Sequence[Result], folder: Path, caption: str) -> Path:
    """demo.html, which needs no other file, and the picture beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    picture(results, folder / "demo.png")
    image = base64.b64encode((folder / "demo.png").read_bytes()).decode()
    console = Console(width=120, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(table(results))
    parts = [f"<h1>qcompile</h1><p>{html.escape(caption)}</p><img alt='size, perplexity and speed' src='data:image/png;base64,{image}'>", console.export_html(code_format="<pre>{code}</pre>", inline_styles=True)]
    for r in results:
        parts.append(f"<h2>{html.escape(r.name)}</h2><pre>{html.escape(r.text)}</pre>" + (f"<details open><summary>explain</summary><pre>{html.escape(r.report)}</pre></details>" if r.report else ""))
    path = folder / "demo.html"
    path.write_text("<!doctype html><meta charset='utf-8'><title>qcompile</title>" + "\n".join(parts), "utf-8")
    return path


def record(results: Sequence[Result], seconds: float) -> dict[str, object]:
    """What the README's table says, as it goes into a file."""
    rows = [{"name": r.name, "linears_mb": r.linears / 1e6, "bits": r.bits, "perplexity": r.perplexity, "times_fp32": r.rate / results[0].rate} for r in results]
    from run import machine

    return {"cpu": machine()["cpu"], "torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": round(seconds, 1), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--windows", type=int, default=8, help=f"windows of {CONTEXT} tokens to read, of 33")
    cli.add_argument("--tokens", type=int, default=48, help="tokens to write in each turn, at most 100")
    cli.add_argument("--turns", type=int, default=5)
    cli.add_argument("--recipes", nargs="*", default=RECIPES, choices=RECIPES)
    cli.add_argument("--out", type=Path, default=Path("out"))
    cli.add_argument("--quick", action="store_true", help="W8A8 on one window, two tokens, fp32 eager: does it run?")
    given = cli.parse_args(arguments)
    if given.quick:
        given.windows, given.tokens, given.turns, given.recipes = 1, 2, 1, RECIPES[:1]
    began, console = time.perf_counter(), Console()
    if not console.is_terminal:
        console = Console(width=120)
    torch.compiler.config.recompile_limit = 4 * len(RECIPES) + 4  # one process compiles the same class for every candidate, at two shapes
    warnings.simplefilter("ignore", DeprecationWarning)
    compiler = has_compiler()
    if not compiler:
        console.print("[bold yellow]No C++ compiler was found (CXX, g++, clang++): qcompile runs its eager references, which is slow, and fp32 is not compiled either.[/]")
    _, tokenizer = load()
    windows = held_out(tokenizer, given.windows)
    results = measure(windows, given.recipes, given.tokens if compiler else 8, given.turns if compiler else 1, compiler and not given.quick, console)
    for r in results[1:]:
        console.rule(r.name)
        console.print(r.report, markup=False, highlight=False, soft_wrap=True)
    for r in results:
        console.rule(f"{r.name} writes")
        console.print(r.text, markup=False, highlight=False)
    caption = f"Perplexity on {windows.numel():,} held-out tokens ({len(windows)} windows of {windows.shape[1]}), the same for all; tokens/s: medians of {len(results[0].rates)} turns, batch 1, {torch.get_num_threads()} threads. Resident: once qcompile.release_weights has run."
    console.print(table(results))
    console.print(caption)
    console.print(f"picture: {save(results, given.out, caption)}   ({time.perf_counter() - began:.0f} s)")
    (given.out / "demo.json").write_text(json.dumps(record(results, time.perf_counter() - began), indent=1) + "\n")
    problems = failures(results)
    for problem in problems:
        console.print(f"[bold red]{problem}[/]")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
