"""Llamas of random weights on a device, transformers' own classes and StaticCache, and one step of decoding as a function that a CUDA graph can hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import ERRORS, LLAMAS, VOCABULARY
from torch import Tensor, nn

from qcompile.core.recipe import find_recipe

ROOM = 64
"""Tokens that the cache holds beyond the context: the longest stretch between two calls of ``Decoder.rewind``."""
STEPS = 8
"""Steps in one CUDA graph."""


def config(name: str, **other: Any) -> Any:
    """transformers' configuration of that shape in ``cases.LLAMAS``; ``other`` replaces sizes."""
    import transformers

    return transformers.LlamaConfig(**{**sizes(name), "max_position_embeddings": 8192, "bos_token_id": None, "eos_token_id": None, **other})


def build(name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **other: Any) -> nn.Module:
    """The model of that shape in ``cases.LLAMAS``, its weights made on the device. ``other`` replaces sizes."""
    import transformers

    shape = config(name, **other)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(shape).eval()
    finally:
        torch.set_default_dtype(before)


EARLY = {"inductor": {"triton.enable_pdl": True}}
"""What mode="reduce-overhead" adds: kernels in a CUDA graph begin while the one before ends. Here graphs are captured by hand."""


def compiled(model: nn.Module, recipe: str | None, head: str | None = None, **options: Any) -> Callable[..., Any]:
    """The model as it comes (``recipe`` None), by Inductor alone ("bf16"), or through our backend."""
    if recipe is None:
        return model
    if recipe == "bf16":
        return torch.compile(model, dynamic=False)
    return torch.compile(model, backend="qcompile", dynamic=False, options={"recipe": recipe, **({"head": head} if head else {}), **options})


def distance(y: Tensor, exact: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((y.float() - exact.float()).norm() / exact.float().norm())


def check(call: Callable[[Callable[..., Any]], Tensor], model: nn.Module, recipe: str, head: str | None, y: Tensor, plain: Tensor) -> dict[str, Any]:
    """Relative distances of ``y``, what ``call`` gave with the compiled model: ``error`` from the references of the same quantized graph, which decides whether it is ``right``, and
    ``error_16bit`` from ``plain``, the eager model's, which is what quantizing random weights costs."""
    apart = distance(y, plain)
    error = apart if recipe == "bf16" else distance(y, call(compiled(model, recipe, head, lower="eager")))
    return {"error": round(error, 4), "error_16bit": round(apart, 4), "right": error < ERRORS[16 if recipe == "bf16" or find_recipe(recipe).input is None else 8]}


class Decoder:
    """A static cache filled with random keys and values up to ``context`` tokens, and the step after them for ``batch`` sequences."""

    def __init__(self, model: Any, batch: int, context: int) -> None:
        import transformers

        self.batch, self.context, self.length = batch, context, context + ROOM
        device = model.device
        self.cache: Any = transformers.StaticCache(config=model.config, max_cache_len=self.length)
        self.token = torch.randint(0, model.config.vocab_size, (batch, 1), device=device)
        self.position = torch.tensor([context], device=device)
        model(self.token, past_key_values=self.cache, use_cache=True, cache_position=torch.zeros_like(self.position))  # it allocates its tensors at the first call
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind()

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def rewind(self) -> None:
        """Back to ``context`` tokens, for the cache counts those of every step itself."""
        for layer in self.cache.layers:
            if isinstance(count := getattr(layer, "cumulative_length", None), Tensor):
                count.fill_(self.context)

    def step(self, forward: Callable[..., Any]) -> Tensor:
        """(batch, 1, vocabulary) logits of the next token."""
        logits: Tensor = forward(self.token, past_key_values=self.cache, use_cache=True, cache_position=self.position).logits
        return logits

    def once(self, forward: Callable[..., Any]) -> Tensor:
        """A step from the start, its logits copied."""
        self.rewind()
        return self.step(forward).clone()

    def graph(self, forward: Callable[..., Any], steps: int = STEPS) -> Any:
        """A CUDA graph of so many steps. They all write to the same place of a pool of memory, as in a loop."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.once(forward)
        torch.cuda.synchronize()
        self.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(steps):
                self.step(forward)
        return graph

    def graph_us(self, forward: Callable[..., Any], replays: int = 11) -> float:
        """Microseconds of one step: median over replays of a graph of ``STEPS``, the first one left out."""
        graph, times = self.graph(forward), []
        for _ in range(replays):
            self.rewind()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / STEPS)
        return statistics.median(times[1:])

    def eager_us(self, forward: Callable[..., Any], steps: int = 24) -> float:
        """Microseconds of one step called from Python, launches included."""
        self.once(forward)
        self.rewind()
        settle(self.token.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(forward)
        settle(self.token.device)
        return (time.perf_counter() - begin) / steps * 1e6


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def sizes(name: str, **other: Any) -> dict[str, Any]:
    """The numbers of a shape."""
    return {"vocab_size": VOCABULARY, **LLAMAS[name], **other}


def linear_elements(name: str, **other: Any) -> tuple[int, int]:
    """Elements of the weights of all linears, and of the head alone, which is not among the former."""
    c = sizes(name, **other)
    head_size = c["hidden_size"] // c["num_attention_heads"]
    block = c["hidden_size"] * (2 * c["hidden_size"] + 2 * c["num_key_value_heads"] * head_size + 3 * c["intermediate_size"])
    return block * c["num_hidden_layers"], c["hidden_size"] * c["vocab_size"]
