"""Single linears on the GPU: one nn.Linear through torch.compile(backend="qcompile"), bfloat16 in and out, weights in rotation so that L2 does not help, launches in a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cases import SHAPE, GpuCase, Line
from gpu_floor import floor_us
from gpu_model import EARLY, distance, settle
from torch import Tensor, nn
from tune import ROTATE, graphed

import qcompile
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import find_recipe
from qcompile.core.scheme import Scheme
from qcompile.kernels.quantize import reference as quantize_activations
from qcompile.kernels.scaled_linear import values


def microseconds(once: Callable[[int], Any], device: str) -> float:
    """Of one of the rotating calls: of a CUDA graph's replays, or by the clock where there is no GPU, to see that a part runs."""
    if torch.device(device).type == "cuda":
        return graphed(once)
    begin = time.perf_counter()
    for i in range(ROTATE):
        once(i)
    return (time.perf_counter() - begin) * 1e6 / ROTATE


def truth(layer: nn.Linear, x: Tensor, weight: str, given: str | None) -> Tensor:
    """The layer in float32 on the quantized values."""
    if given is not None:
        codes, *scales = quantize_activations(x, [], given)
        x = values(codes, scales, Scheme.parse(given))
    return x.float() @ dequantize(quantize(layer.weight, Scheme.parse(weight))).T


def linear(case: GpuCase, m: int, n: int, k: int, about: Mapping[str, Any], device: str = "cuda") -> dict[str, Any]:
    """One row: microseconds of the recipe and of bfloat16 in the same run."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = [nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16) for _ in range(ROTATE)]
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    recipe = find_recipe(case.recipe)
    options = {"weight": case.weight} if case.weight else {"recipe": case.recipe}
    weight, given = case.weight or recipe.weight, recipe.input
    fast = [torch.compile(layer, backend="qcompile", dynamic=False, options={**options, **EARLY}) for layer in layers]
    start = time.perf_counter()
    y = fast[0](x)
    settle(x.device)
    seconds = time.perf_counter() - start
    error = distance(y, truth(layers[0], x, weight, given))
    row = {"recipe": case.recipe, "m": m, "n": n, "k": k, "error": error, "right": error < 1e-2, "compile_s": round(seconds, 2)}
    if not row["right"]:
        return row
    for f in fast:
        f(x)
    plain, us = microseconds(lambda i: layers[i](x), device), microseconds(lambda i: fast[i](x), device)
    floor = floor_us(n * k * case.bits / 8, 2 * m * n * k, given is not None, about)
    goal, peer = (dict(case.goal).get(m), dict(case.peer).get(m)) if (n, k) == SHAPE else (None, None)
    times = {"us": round(us, 2), "bf16_us": round(plain, 2), "floor_us": round(floor, 2), "of_floor": round(floor / us, 3)}
    return {**row, **times, "goal_us": goal, "peer_us": peer, "met": us <= goal if goal else None}


def line(case: Line, m: int, n: int, k: int, device: str = "cuda", copies: int = 3) -> dict[str, Any]:
    """One row: microseconds with some columns of large values split off, and of W8A8 on the same weights and data."""
    torch.manual_seed(0)
    layers = [nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    large = torch.randperm(k, device=device)[: case.columns]
    x[:, large] = 8 + x[:, large].abs()

    def compiled(options: Mapping[str, Any], calibrated: bool) -> list[Callable[..., Any]]:
        torch.compiler.reset()
        found = [torch.compile(layer, backend="qcompile", dynamic=False, options={**options, **EARLY}) for layer in layers]
        if calibrated:
            with qcompile.calibrate(found[0], progress=False):  # one sitting: they share their code
                for f in found:
                    f(x)
        for f in found:
            f(x)
        return found

    plain = compiled({"recipe": "W8A8"}, False)
    w8a8 = microseconds(lambda i: plain[i % copies](x), device)
    split = compiled(dict(case.options), case.calibrated)
    exact = x.float() @ layers[0].weight.float().T
    error, rounding = distance(split[0](x), exact), distance(plain[0](x), exact)
    row = {"recipe": case.name, "m": m, "n": n, "k": k, "error": error, "w8a8_error": rounding, "right": error < min(1.5e-2, rounding)}
    if not row["right"]:
        return row
    us = microseconds(lambda i: split[i % copies](x), device)
    return {**row, "us": round(us, 2), "w8a8_us": round(w8a8, 2), "ratio": round(us / w8a8, 3), "goal": case.goal, "met": us <= case.goal * w8a8}
