"""Seconds of a model's first compiled step in a process of its own, with empty caches and with those that the process before left. `python benchmarks/gpu_start.py '{"recipe": "W4A16"}'` is one such process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from cases import Start
from gpu_model import Decoder, build, check, compiled, settle


def first_step(model: str, recipe: str, head: str | None, device: str = "cuda", **other: Any) -> dict[str, Any]:
    """In this process: seconds of the first call (capture, passes, packing, code, kernels, one step), and whether AOTAutograd's cache served it."""
    from qcompile.compat import counters

    with torch.no_grad():
        llama = build(model, torch.bfloat16, device, **other)
        decoder = Decoder(llama, 1, 128)
        exact = decoder.once(llama)
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))  # Inductor's own imports and compiler probes
        counters().clear()
        settle(exact.device)
        begin = time.perf_counter()
        y = decoder.once(compiled(llama, recipe, head, **({} if recipe == "bf16" else {"release": True})))
        settle(exact.device)
        seconds = time.perf_counter() - begin
        hits = counters()["aot_autograd"]["autograd_cache_hit"]
        return {"seconds": round(seconds, 2), **check(decoder.once, llama, recipe, head, y, exact), "cache_hits": hits}


def start(case: Start, **other: Any) -> dict[str, Any]:
    """One row, of two processes."""
    plan = {"model": case.model, "recipe": case.recipe, "head": case.head, **other}
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (child(plan, cache) for _ in range(2))
    right = cold["right"] and warm["right"]
    goals = {"cold_goal": case.cold, "warm_goal": case.warm, "met": cold["seconds"] <= case.cold and warm["seconds"] <= case.warm}
    return {**{key: value for key, value in asdict(case).items() if key in plan}, "right": right, "cold_s": cold["seconds"], "warm_s": warm["seconds"], "warm_cache_hits": warm["cache_hits"], "error": cold["error"], **goals}


def child(plan: Mapping[str, Any], cache: str) -> dict[str, Any]:
    """What a process of its own says, with its caches in that folder."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
    done = subprocess.run([sys.executable, __file__, json.dumps(plan)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-280:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    print(json.dumps(first_step(**json.loads(sys.argv[1]))))
