"""Stacks of experts on the GPU: one grouped product on sorted rows, as transformers' experts spell it, or these experts as they are; compiled bfloat16 `grouped_mm` in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from cases import Moe
from gpu_floor import floor_us
from gpu_linear import microseconds
from gpu_model import EARLY, distance
from torch import Tensor, nn
from tune import ROTATE

from qcompile.core.qtensor import quantize
from qcompile.core.recipe import find_recipe
from qcompile.core.scheme import Scheme
from qcompile.kernels.grouped import reference
from qcompile.kernels.quantize import reference as quantize_activations

COPIES = 3
"""Weights in rotation; every one of ROTATE calls has other tokens and other experts."""
grouped_mm: Callable[..., Tensor] = getattr(nn.functional, "grouped_mm", None) or torch._grouped_mm


class Grouped(nn.Module):
    """Rows sorted by expert times the stacked (E, N, K) weights of their experts; ``ends`` (E,) int32 is where each expert's rows end."""

    def __init__(self, experts: int, n: int, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, n, k))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x, self.weight.transpose(-2, -1), offs=ends)


def experts(case: Moe) -> nn.Module:
    """The module of a row, on the default device and in the default dtype; transformers' own where the row is whole."""
    if not case.whole:
        return Grouped(case.experts, case.n, case.k)
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=case.k, moe_intermediate_size=case.n, num_experts=case.experts, num_experts_per_tok=case.top)
    config._experts_implementation = "grouped_mm"
    module: nn.Module = Qwen3MoeExperts(config)
    return module


def inputs(case: Moe, seed: int, device: str) -> tuple[Tensor, ...]:
    """What the module is called with: tokens' rows and where they end, or tokens, their experts and weights."""
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.m, case.k, device=device, dtype=torch.bfloat16, generator=g)
    chosen = torch.rand(case.m, case.experts, device=device, generator=g).topk(case.top).indices
    if case.whole:
        return x, chosen, torch.full((case.m, case.top), 1 / case.top, device=device, dtype=torch.bfloat16)
    order = chosen.flatten().argsort(stable=True)
    ends = torch.bincount(chosen.flatten(), minlength=case.experts).cumsum(0).to(torch.int32)
    return x[order // case.top], ends


def truth(case: Moe, module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    """In float32 on the quantized values; of whole experts what bfloat16 gives."""
    if case.whole:
        y: Tensor = module(*given)
        return y
    recipe, (x, ends) = find_recipe(case.recipe), given
    codes, scales = x, []
    if recipe.input:
        codes, *scales = quantize_activations(x, [], recipe.input)
    weight = module.get_parameter("weight")
    return reference(codes, scales, ends, quantize(weight, Scheme.parse(recipe.weight)).flatten(), f"{recipe.input} @ {recipe.weight}" if recipe.input else recipe.weight, False)


def moe(case: Moe, about: Mapping[str, Any], device: str = "cuda") -> dict[str, Any]:
    """One row."""
    torch.compiler.reset()
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            modules = [experts(case).eval() for _ in range(COPIES)]
    finally:
        torch.set_default_dtype(before)
    for module in modules:
        for p in module.parameters():
            nn.init.normal_(p, std=0.02)
    given = [inputs(case, i, device) for i in range(ROTATE)]
    plain = [torch.compile(module, dynamic=False) for module in modules]
    bf16 = microseconds(lambda i: plain[i % COPIES](*given[i]), device) if prepare(plain, given) else 0.0
    torch.compiler.reset()
    fast = [torch.compile(module, backend="qcompile", dynamic=False, options={"recipe": case.recipe, **EARLY}) for module in modules]
    prepare(fast, given)
    error = distance(fast[0](*given[0]), truth(case, modules[0], given[0]))
    about_row = {"recipe": case.recipe, "what": "Qwen3 experts" if case.whole else "product", "m": case.m, "experts": case.experts, "top": case.top, "n": case.n, "k": case.k}
    row = {**about_row, "error": error, "right": error < case.error, "bf16_us": round(bf16, 2)}
    if not row["right"]:
        return row
    us = microseconds(lambda i: fast[i % COPIES](*given[i]), device)
    used = sum(g[1].unique().numel() if case.whole else int((g[1].diff(prepend=g[1].new_zeros(1)) > 0).sum()) for g in given) / len(given)
    elements = case.n * case.k * (3 if case.whole else 1)
    floor = floor_us(used * elements * case.bits / 8, 2 * case.m * case.top * elements, find_recipe(case.recipe).input is not None, about)
    return {**row, "experts_read": round(used, 1), "us": round(us, 2), "ratio": round(bf16 / us, 3), "floor_us": round(floor, 2), "of_floor": round(floor / us, 3), "goal": case.goal, "met": bf16 >= case.goal * us}


def prepare(functions: list[Callable[..., Any]], given: list[tuple[Tensor, ...]]) -> bool:
    """Compile all of them."""
    for f in functions:
        f(*given[0])
    return True
