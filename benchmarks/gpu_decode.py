"""Whole models on the GPU: decoding through a CUDA graph with its memory, prefill, and transformers' own generate. Weights are random, made on the device."""

from __future__ import annotations

import importlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from cases import BITS, Generate, Prefill, Run
from gpu_breakdown import profiled, summary
from gpu_floor import read_rate
from gpu_model import EARLY, ROOM, Decoder, build, check, compiled, linear_elements, settle
from torch import nn


def model_bytes(model: nn.Module) -> int:
    """Of all parameters."""
    return sum(p.nbytes for p in model.parameters())


def allocated(device: torch.device, peak: bool = False) -> int:
    """Bytes of the GPU held by tensors, or the most since the last reset; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def packed_bytes(name: str, recipe: str, head: str | None, bf16: int, **other: Any) -> float:
    """Of the model of ``bf16`` bytes once its linears are packed: what stays in 16 bits, and the others at their bits a weight."""
    linears, heads = linear_elements(name, **other)
    return bf16 - 2 * (linears + heads) + linears * BITS[recipe] / 8 + heads * BITS[head] / 8


def read_us(run: Run, about: Mapping[str, Any], cached: int, **other: Any) -> float:
    """Microseconds to read all linears, the head, and so many bytes of keys and values once."""
    linears, heads = linear_elements(run.model, **other)
    head = BITS["float32"] if run.recipe == "float32" else BITS[run.head]
    return (linears * BITS[run.recipe] / 8 + heads * head / 8 + cached) / read_rate(about) / 1e6


def decode(run: Run, about: Mapping[str, Any], device: str = "cuda", **other: Any) -> dict[str, Any]:
    """One row: tokens a second, the error of the logits, seconds until the first step was there, and memory. Weights are released as they are packed."""
    torch.compiler.reset()
    eager = run.recipe == "float32"
    model = build(run.model, torch.float32 if eager else torch.bfloat16, device, **other)
    decoder, dtype_bytes = Decoder(model, run.batch, run.context), model_bytes(model)
    at = decoder.token.device
    row: dict[str, Any] = {"model": run.model, "recipe": "eager float32" if eager else run.recipe, "head": run.head, "context": run.context, "cache": decoder.length, "batch": run.batch}
    forward: Callable[..., Any] = model
    if not eager:
        exact = decoder.once(model)
        settle(at)
        if at.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        beside = allocated(at) - dtype_bytes
        begin = time.perf_counter()
        forward = compiled(model, run.recipe, run.head, **({} if run.recipe == "bf16" else {"release": True, **EARLY}))
        y = decoder.once(forward)
        settle(at)
        ready = time.perf_counter() - begin
        packed = packed_bytes(run.model, run.recipe, run.head, dtype_bytes, **other)
        after, peak = allocated(at) - beside, allocated(at, peak=True) - beside
        memory = {"bf16_gib": dtype_bytes, "peak_gib": peak, "after_gib": after, "packed_gib": packed}
        row |= {**check(decoder.once, model, run.recipe, run.head, y, exact), "ready_s": round(ready, 1), **{key: round(value / 2**30, 3) for key, value in memory.items()}}
        if run.recipe != "bf16" and peak:
            row |= {"peak_of_bf16": round(peak / dtype_bytes, 3), "after_of_packed": round(after / packed, 3), "memory_met": peak <= 1.05 * dtype_bytes and after <= 1.1 * packed}
        if not row["right"]:
            return row
    us = decoder.eager_us(forward, 24 if at.type == "cuda" else 2) if eager or at.type != "cuda" else decoder.graph_us(forward)
    speed, floor = run.batch * 1e6 / us, read_us(run, about, decoder.bytes * run.context // decoder.length, **other)
    times = {"tokens_s": round(speed, 1), "us": round(us, 1), "floor_us": round(floor, 1), "of_floor": round(floor / us, 3)}
    return {**row, **times, "goal": run.goal, "met": speed >= run.goal if run.goal else None, "memory_gib": round(allocated(at) / 2**30, 2)}


def prefill(case: Prefill, device: str = "cuda", repeats: int = 7, **other: Any) -> dict[str, Any]:
    """One row: milliseconds of one sequence of tokens through all layers, without a cache; the logits of the last position only. On a GPU with its kernels, as in a breakdown."""
    torch.compiler.reset()
    model = build(case.model, torch.bfloat16, device, **other)
    ids = torch.randint(0, model.config.vocab_size, (1, case.tokens), device=device)  # type: ignore[union-attr]

    def call(function: Callable[..., Any]) -> Any:
        return function(ids, use_cache=False, logits_to_keep=1).logits

    exact = call(model).clone()
    if case.recipe == "bf16":
        forward: Callable[..., Any] = torch.compile(model, dynamic=False, mode="reduce-overhead" if case.graph else None)
    else:
        forward = compiled(model, case.recipe, None, release=True, **({"mode": "reduce-overhead"} if case.graph else {}))
    begin = time.perf_counter()
    y = call(forward).clone()  # a CUDA graph's outputs are its own
    settle(ids.device)
    ready = time.perf_counter() - begin
    row = {"model": case.model, "recipe": case.recipe, "tokens": case.tokens, "graph": case.graph, **check(call, model, case.recipe, None, y, exact), "ready_s": round(ready, 1)}
    if not row["right"]:
        return row
    for _ in range(3):  # a CUDA graph is recorded behind a call that warms up
        call(forward)
    times = []
    for _ in range(repeats):
        settle(ids.device)
        begin = time.perf_counter()
        call(forward)
        settle(ids.device)
        times.append((time.perf_counter() - begin) * 1e3)
    ms = statistics.median(times)
    row |= {"ms": round(ms, 2), "goal_ms": case.goal_ms, "goal": case.goal, "met": ms <= case.goal_ms if case.goal_ms else None}
    kernels = profiled(lambda: call(forward), lambda: None, 3) if ids.is_cuda else []
    return {**row, **(summary(kernels, ms * 1e3, int(model.config.num_hidden_layers)) if kernels else {})}  # type: ignore[union-attr, arg-type]


# --- generate --------------------------------------------------------------------------------------------------------

SKIPPED = "skipping cudagraphs"


class Heard(logging.Handler):
    """Lines of the log that speak of skipped CUDA graphs."""

    def __init__(self) -> None:
        super().__init__(0)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if SKIPPED in (text := record.getMessage()):
            self.lines.append(text)


@contextmanager
def listening() -> Iterator[Heard]:
    """All of Inductor's loggers that speak of CUDA graphs or of performance, whether or not they are on; nothing of it is printed."""
    importlib.import_module("torch._inductor.cudagraph_trees")  # they exist from then on
    heard = Heard()
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch._inductor") and name.endswith((".__cudagraphs", ".__perf_hints"))]
    before = [(logger := logging.getLogger(name), logger.level, logger.propagate, logger.disabled) for name in names]
    for logger, *_ in before:
        logger.addHandler(heard)
        logger.setLevel(logging.DEBUG)
        logger.propagate, logger.disabled = False, False
    try:
        yield heard
    finally:
        for logger, level, propagate, disabled in before:
            logger.removeHandler(heard)
            logger.setLevel(level)
            logger.propagate, logger.disabled = propagate, disabled


def timed(model: Any) -> list[float]:
    """Microseconds of the host in each call that ``generate`` makes of its compiled step from now on."""
    call, found = model._compiled_call, []

    def step(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        y = call(*args, **kwargs)
        found.append((time.perf_counter() - begin) * 1e6)
        return y

    model._compiled_call = step
    return found


def split(us: float, step: float, host: list[float]) -> dict[str, float]:
    """Where a token's time goes beside the step itself."""
    inside = statistics.median(host)
    return {"call_us": round(inside, 1), "loop_us": round(us - step - inside, 1)}


def generate(case: Generate, device: str = "cuda", steps: tuple[int, int] = (16, ROOM), repeats: int = 5, **other: Any) -> dict[str, Any]:
    """One row: tokens a second of ``model.generate``, its prefill taken out by the difference of two lengths, and of a step captured by hand. ``call_us``: of the host, inside the compiled call (the
    GPU goes on behind it); ``loop_us``: what neither that nor the step explains, transformers' own loop, which looks at each token before it goes on."""
    from transformers import CompileConfig, StaticCache

    from qcompile.compat import counters

    torch.compiler.reset()
    model = build(case.model, torch.bfloat16, device, **other)
    decoder = Decoder(model, 1, case.prompt)
    exact = decoder.once(model)
    forward = compiled(model, case.recipe, case.head, **EARLY)
    row = {"model": case.model, "recipe": case.recipe, "head": case.head, "prompt": case.prompt, **check(decoder.once, model, case.recipe, case.head, decoder.once(forward), exact)}
    if not row["right"]:
        return row
    cuda = decoder.token.device.type == "cuda"
    by_hand = decoder.graph_us(forward) if cuda else decoder.eager_us(forward, 2)
    del decoder
    torch.compiler.reset()
    ids = torch.randint(0, model.config.vocab_size, (1, case.prompt), device=device)  # type: ignore[union-attr]
    if case.recipe == "bf16":
        config = CompileConfig(backend="inductor", mode="reduce-overhead")
    else:
        unguarded = {} if case.guards else {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        config = CompileConfig(backend="qcompile", mode=None, options={"recipe": case.recipe, "mode": "reduce-overhead", **({"head": case.head} if case.head else {}), **unguarded})
    config._compile_all_devices = not cuda

    kept = StaticCache(config=model.config, max_cache_len=case.prompt + steps[1]) if case.own else None

    def seconds(count: int) -> float:
        if kept is not None:
            kept.reset()
        cache = {"cache_implementation": "static"} if kept is None else {"past_key_values": kept}
        settle(ids.device)
        begin = time.perf_counter()
        out = model.generate(ids, max_new_tokens=count, do_sample=False, compile_config=config, pad_token_id=0, **cache)  # type: ignore[operator]
        settle(ids.device)
        if out.shape[1] != case.prompt + count:
            raise RuntimeError(f"generate stopped after {out.shape[1] - case.prompt} of {count} tokens")
        return time.perf_counter() - begin

    counters().clear()
    with listening() as heard:
        for count in (steps[1], steps[1], *steps):  # the longest first: the cache keeps its length, and nothing is compiled again
            seconds(count)
    host = timed(model)  # nobody listens now: what is logged of each step takes longer than the step
    short, long = (statistics.median(seconds(count) for _ in range(repeats)) for count in steps)
    us = (long - short) / (steps[1] - steps[0]) * 1e6
    skips = counters()["inductor"]["cudagraph_skips"]
    numbers = {"tokens_s": round(1e6 / us, 1), "by_hand_tokens_s": round(1e6 / by_hand, 1), "share": round(by_hand / us, 3), **split(us, by_hand, host), "first_token_ms": round((short - (steps[0] - 1) * us / 1e6) * 1e3, 1)}
    quiet = not heard.lines and not skips
    return {**row, "right": quiet, "cudagraph_skips": skips, "log": heard.lines[:3], **numbers, "goal": case.goal, "met": quiet and by_hand / us >= case.goal if case.goal else None, "guards": case.guards, "own": case.own}
