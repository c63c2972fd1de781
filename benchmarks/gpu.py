"""Speed on the GPU at hand: `python benchmarks/run.py gpu [--parts linear shapes model] [--case W4A16 ...]`. Checks first, times second; every row is written as soon as it is measured.

linear  bfloat16 in and out, one nn.Linear of 4096 -> 14336 through torch.compile(backend="qcompile"), six weights in rotation so that L2 does not help, launches in a CUDA graph
shapes  the same for the other linears of an 8B model, at one and sixteen rows
model   decoding with a Llama of random weights, transformers' own classes and StaticCache, batch 1, through a CUDA graph

What the numbers do not say: weights are random; the quantization of the input is included, and inside a model it is part of the norm before. `floor` is the time to read the weight once at the
bandwidth that a copy reaches here, or the operations at the rate of a large product of the library.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_breakdown
import torch
from cases import BREAKDOWNS, GPU_CASES, GPU_SHAPES, ROWS, SHAPE, GpuCase
from torch import Tensor, nn
from tune import ROTATE, graphed

import qcompile
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import find_recipe
from qcompile.core.scheme import Scheme
from qcompile.kernels.quantize import reference as quantize_activations
from qcompile.kernels.scaled_linear import values

RESULTS = Path(__file__).parent / "results"
PARTS = ("linear", "shapes", "model", "breakdown")
MODELS = {"1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}}
MODELS["8B"] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256


def machine() -> dict[str, Any]:
    """Versions, the card, and its two ceilings: a copy, and a large bfloat16 product."""
    a = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    b = torch.empty_like(a)
    copy = graphed(lambda i: b.copy_(a))
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = graphed(lambda i: x @ x)
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(), "qcompile": qcompile.__version__,
        "copy_tb_s": round(2 * a.numel() / copy / 1e6, 3), "bf16_tflop_s": round(2 * 8192**3 / product / 1e6, 1),
    }  # fmt: skip


def truth(layer: nn.Linear, x: Tensor, weight: str, given: str | None) -> Tensor:
    """The layer in float32 on the quantized values."""
    if given is not None:
        codes, *scales = quantize_activations(x, [], given)
        x = values(codes, scales, Scheme.parse(given))
    return x.float() @ dequantize(quantize(layer.weight, Scheme.parse(weight))).T


def linear(case: GpuCase, m: int, n: int, k: int, about: dict[str, Any]) -> dict[str, Any]:
    """One row: microseconds of the recipe and of bfloat16 in the same run."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = [nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(ROTATE)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    recipe = find_recipe(case.recipe)
    options = {"weight": case.weight} if case.weight else {"recipe": case.recipe}
    weight, given = case.weight or recipe.weight, recipe.input
    plain = graphed(lambda i: layers[i](x))
    fast = [torch.compile(layer, backend="qcompile", dynamic=False, options=options) for layer in layers]
    start = time.perf_counter()
    y = fast[0](x)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    error = float((y.float() - (exact := truth(layers[0], x, weight, given))).norm() / exact.norm())
    for f in fast:
        f(x)
    us = graphed(lambda i: fast[i](x)) if error < 1e-2 else float("nan")
    floor = max(n * k * case.bits / 8 / about["copy_tb_s"] / 1e6, 2 * m * n * k / about["bf16_tflop_s"] / 1e6 / (2 if given else 1))
    row = {"recipe": case.recipe, "m": m, "n": n, "k": k, "us": round(us, 2), "bf16_us": round(plain, 2), "floor_us": round(floor, 2), "of_floor": round(floor / us, 3), "error": error}
    goal = dict(case.goal).get(m) if (n, k) == SHAPE else None
    return {**row, "right": error < 1e-2, "goal_us": goal, "peer_us": dict(case.peer).get(m) if (n, k) == SHAPE else None, "met": us <= goal if goal else None, "compile_s": round(seconds, 2)}


def decode(name: str, recipe: str | None, head: str | None, dtype: torch.dtype = torch.bfloat16, context: int = 128, steps: int = 24, room: int = 256) -> dict[str, Any]:
    """Tokens a second of one sequence. ``recipe`` None is transformers' eager model as it comes, in ``dtype``; "bf16" the same compiled by Inductor."""
    import transformers

    torch.compiler.reset()
    config = transformers.LlamaConfig(**MODELS[name], vocab_size=VOCABULARY, max_position_embeddings=8192)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    cache = transformers.StaticCache(config=config, max_cache_len=context + room)  # the cache counts its tokens itself: warm-up, and all that is captured and replayed, must fit
    ids = torch.randint(0, VOCABULARY, (1, context), device="cuda")
    start = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, cache_position=torch.arange(context, device="cuda"))
    forward: Callable[..., Any] = model
    if recipe is not None:
        options = {"recipe": recipe, **({"head": head} if head else {})}
        forward = torch.compile(model, dynamic=False) if recipe == "bf16" else torch.compile(model, backend="qcompile", dynamic=False, options=options)
    token, position = ids[:, -1:].clone(), torch.tensor([context], device="cuda")

    def step(_: int) -> Tensor:
        return forward(token, past_key_values=cache, use_cache=True, cache_position=position).logits

    for i in range(3):
        step(i)
    torch.cuda.synchronize()
    ready = time.perf_counter() - start
    if recipe is None:
        begin = time.perf_counter()
        for i in range(steps):
            step(i)
        torch.cuda.synchronize()
        us = (time.perf_counter() - begin) / steps * 1e6
    else:
        us = graphed(step)
    row = {"model": name, "recipe": recipe or f"eager {str(dtype).removeprefix('torch.')}", "head": head, "context": context, "batch": 1, "tokens_s": round(1e6 / us, 1), "us": round(us, 1), "ready_s": round(ready, 1)}
    return {**row, "memory_gib": round(torch.cuda.memory_allocated() / 2**30, 2)}


RUNS = (("1B", None, None, torch.float32), ("1B", "bf16", None, torch.bfloat16), ("1B", "W4A16", "int4.g128", torch.bfloat16), ("1B", "W4A8", "int4.g128", torch.bfloat16), ("1B", "W8A8", None, torch.bfloat16))
RUNS += (("8B", "bf16", None, torch.bfloat16), ("8B", "W4A16", "int4.g128", torch.bfloat16), ("8B", "W4A8", "int4.g128", torch.bfloat16))


def measure(parts: Sequence[str], only: Sequence[str], path: Path | None, seconds: float) -> int:
    """All parts; returns the number of rows that were wrong."""
    about = machine()
    print(json.dumps(about), flush=True)
    report: dict[str, Any] = {"machine": about, "linear": [], "shapes": [], "model": [], "breakdown": []}
    path = path or RESULTS / about["gpu"].split()[1].lower() / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    begun, wrong = time.perf_counter(), 0
    cases = [c for c in GPU_CASES if not only or c.recipe in only]
    work: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if "linear" in parts:
        work += [("linear", lambda c=c, m=m: linear(c, m, *SHAPE, about)) for m in ROWS for c in cases]
    if "shapes" in parts:
        work += [("shapes", lambda c=c, m=m, s=s: linear(c, m, *s, about)) for s in GPU_SHAPES for c in cases[:3] for m in (1, 16)]
    if "model" in parts:
        work += [("model", lambda r=r: decode(*r)) for r in RUNS]
    if "breakdown" in parts:
        work += [("breakdown", lambda c=c: gpu_breakdown.breakdown(c)) for c in BREAKDOWNS if not only or c.recipe in only]
    for part, run in work:
        if time.perf_counter() - begun > seconds:
            print("out of time; the rest was not run", flush=True)
            break
        try:
            with torch.no_grad():
                row = run()
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        wrong += not row.get("right", "failed" not in row)
        report[part].append(row)
        gc.collect()
        torch.cuda.empty_cache()
        print(gpu_breakdown.table(row) if part == "breakdown" else json.dumps(row), flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    return wrong
