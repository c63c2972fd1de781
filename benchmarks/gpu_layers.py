"""A model that does not fit in 16 bits: built on the meta device, and filled layer by layer by ``qcompile.load_weights``, on a card of which it may use less than its 16-bit weights take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from cases import ERRORS, Layers
from gpu_decode import allocated, packed_bytes
from gpu_model import EARLY, Decoder, config, distance, settle
from torch import Tensor, nn

import qcompile
from qcompile.compat import compile_in_place


class Made(Mapping[str, Tensor]):
    """Weights by name, made on the device when they are asked for: the same ones whenever that is."""

    def __init__(self, like: Mapping[str, Tensor], device: str) -> None:
        self.shapes = {name: tuple(value.shape) for name, value in like.items()}
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        generator = torch.Generator(self.device).manual_seed(sorted(self.shapes).index(name))
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, 1 / math.sqrt(shape[-1]), generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def build(name: str, **other: Any) -> nn.Module:
    """A Llama of that shape of which nothing but buffers exists."""
    import transformers

    with init_empty_weights():
        return transformers.LlamaForCausalLM(config(name, **other)).eval()


def layers(case: Layers, device: str = "cuda", **other: Any) -> dict[str, Any]:
    """One row: seconds of the call that reads, packs and frees all layers, the most memory that took, what stayed, and tokens a second afterwards, each layer a graph of its own in one CUDA graph.

    ``error``: the distance of the logits from those of the same quantized layers run by their references.
    """
    torch.compiler.reset()
    model = build(case.model, **other)
    whole = 2 * sum(p.numel() for p in model.parameters())
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(case.gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.reset_peak_memory_stats()
    at = torch.device(device)
    before = allocated(at)
    options = {"recipe": case.recipe, **({"head": case.head} if case.head else {}), **EARLY}
    try:
        begin = time.perf_counter()
        names = qcompile.load_weights(model, Made(model.state_dict(), device), device=device, options=options, dynamic=False)
        decoder = Decoder(model, 1, case.context)  # its first call
        settle(at)
        seconds = time.perf_counter() - begin
        peak, after = allocated(at, peak=True) - before, allocated(at) - before - decoder.bytes
        y = decoder.once(model)
        us = decoder.graph_us(model) if cuda else decoder.eager_us(model, 2)
        for name in names:
            compile_in_place([model.get_submodule(name)], backend="qcompile", dynamic=False, options={**options, "lower": "eager"})
        error = distance(y, decoder.once(model))
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    packed = packed_bytes(case.model, case.recipe, case.head, whole, **other)
    sizes = {"bf16_gib": whole, "limit_gib": case.gib * 2**30, "peak_gib": peak, "after_gib": after, "packed_gib": packed}
    right = error < ERRORS[16] and bool(y.isfinite().all())
    return {
        "model": case.model, "recipe": case.recipe, "head": case.head, "context": case.context, "regions": len(names), "error": round(error, 4), "right": right, "ready_s": round(seconds, 1),
        **{key: round(value / 2**30, 3) for key, value in sizes.items()}, "tokens_s": round(1e6 / us, 1), "us": round(us, 1), "met": right and peak < whole,
    }  # fmt: skip
