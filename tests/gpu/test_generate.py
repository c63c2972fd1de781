"""transformers' generate with a static cache, CUDA graphs in decode, and ``mode="reduce-overhead"``."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu


def launches(fn) -> set[str]:
    """Names of the CUDA runtime calls that launch work."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        fn()
        torch.cuda.synchronize()
    return {e.name for e in p.events() if "Launch" in e.name}


@pytest.mark.parametrize("recipe", ["W4A16", "W8A8", "FP8"])
def test_reduce_overhead(recipe):
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4))).to("cuda", torch.bfloat16)
    fast = torch.compile(model, backend="qcompile", options={"recipe": recipe, "mode": "reduce-overhead"})
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    counters.clear()
    with torch.no_grad():
        ref = model(x)
        for _ in range(4):
            y = fast(x).clone()
        assert float((y - ref).norm() / ref.norm()) < 0.3
        assert "cudaGraphLaunch" in launches(lambda: fast(x))
        before = fast(x).clone()
        model[0].weight.mul_(2)  # packed again in place: the recorded graph stays valid and sees the new value
        after = fast(x).clone()
        ref = model(x)
        assert not torch.equal(before, after) and float((after - ref).norm() / ref.norm()) < 0.3
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("recipe", ["W4A16", "W8A8"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_generate_static_cache(name, recipe):
    """Prefill and decode compiled; decode is one CUDA graph; the tokens are those of the same graphs without CUDA graphs."""
    model, _ = tiny(name, dtype=torch.bfloat16)
    model.cuda()
    ids = torch.randint(3, 90, (2, 9), device="cuda")
    tokens = {}
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        counters.clear()
        model.forward = torch.compile(type(model).forward.__get__(model), backend="qcompile", options={"recipe": recipe, "mode": mode})
        with torch.no_grad():
            for _ in range(3):
                tokens[mode] = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static", disable_compile=True, pad_token_id=0).clone()
        if mode == "reduce-overhead":
            names = launches(lambda: model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static", disable_compile=True, pad_token_id=0))
            assert "cudaGraphLaunch" in names, (names, dict(counters["inductor"]))
    assert torch.equal(tokens["default"], tokens["reduce-overhead"])


def test_generate_compile_config():
    """transformers' own auto-compile: prefill runs eagerly, decode is ours."""
    from transformers import CompileConfig

    from qcompile.backend import collecting

    model, _ = tiny("llama", dtype=torch.bfloat16)
    model.cuda()
    ids = torch.randint(3, 90, (2, 9), device="cuda")
    config = CompileConfig(backend="qcompile", mode=None, options={"recipe": "W8A8", "mode": "reduce-overhead"})
    run = lambda: model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static", compile_config=config, pad_token_id=0)  # noqa: E731
    seen = []
    with torch.no_grad():
        first = run().clone()
        run()
        with collecting(lambda graph, _: seen.append(len(graph.kernels))):
            names = launches(run)
        assert torch.equal(first, run())
    assert seen and min(seen) > 0 and "cudaGraphLaunch" in names
