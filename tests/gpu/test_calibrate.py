"""Calibrated recipes on the GPU: what Inductor compiles equals what the solver simulated, transforms add no kernel, and a dynamic outlier split lives in a CUDA graph."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import tiny
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import qcompile

pytestmark = pytest.mark.gpu
RECIPES = ("W8A8_SMOOTHQUANT", "W8A8_SMOOTHQUANT_STATIC", "W4A16_GPTQ", "W4A16_AWQ", "W4A16_AWQ_GPTQ", "W4A8_AQAS", "LLM_INT8", "LLM_INT8_STATIC", "W8A8_STATIC")


def model_and_batches(name="llama", dtype=torch.bfloat16):
    model, inputs = tiny(name, dtype=dtype)
    model, inputs = model.cuda(), {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, inputs["input_ids"].shape, generator=generator).cuda() for _ in range(4)]
    return model, [{**inputs, "input_ids": i, "use_cache": False} for i in ids]


def calibrated(model, batches, **options):
    torch._dynamo.reset()
    fast = torch.compile(model, backend="qcompile", dynamic=False, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fast, qcompile.calibrate(fast, batches, progress=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_compiled_model_is_the_simulated_one(recipe):
    """Through Inductor and by the references, with the same solutions: in float32, where two orders of a sum rarely round a code another way."""
    model, batches = model_and_batches(dtype=torch.float32)
    fast, calibration = calibrated(model, batches, recipe=recipe)
    by_reference = torch.compile(model, backend="qcompile", dynamic=False, options={"recipe": recipe, "lower": "eager"})
    with torch.no_grad():
        exact, y = model(**batches[0]).logits.float(), fast(**batches[0]).logits.float()
        torch._dynamo.reset()
        reference = by_reference(**batches[0]).logits.float()
    noise = float((reference - exact).norm() / exact.norm())
    assert float((y - reference).norm() / exact.norm()) < max(0.35 * noise, 2e-2)
    quality = calibration.outcome.quality
    assert quality.finite and quality.decibels is not None and abs(10 ** (-quality.decibels / 20) - noise) < 0.5 * noise + 1e-2


def kernels(model, batch, fast):
    with torch.no_grad():
        for _ in range(3):
            fast(**batch)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            fast(**batch)
            torch.cuda.synchronize()
    return sorted(e.name for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset")))


@pytest.mark.parametrize(("plain", "smoothed"), [("W8A8", "W8A8_SMOOTHQUANT"), ("W8A8_STATIC", "W8A8_SMOOTHQUANT_STATIC"), ("W4A16", "W4A16_AWQ")])
def test_transforms_add_no_kernel(plain, smoothed):
    model, batches = model_and_batches()
    counts = []
    for recipe in (plain, smoothed):
        fast, _ = calibrated(model, batches, recipe=recipe)
        counts.append(len(kernels(model, batches[0], fast)))
    assert counts[1] <= counts[0], counts


def test_a_dynamic_split_in_a_cuda_graph():
    """No synchronization, no graph break: one graph launch, right when the outliers move to other columns."""
    torch._dynamo.reset()
    counters.clear()
    layer = torch.nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16)
    fast = torch.compile(layer, backend="qcompile", fullgraph=True, options={"recipe": "LLM_INT8", "mode": "reduce-overhead"})
    with torch.no_grad():
        for shift in range(6):
            x = torch.randn(40, 256, device="cuda", dtype=torch.bfloat16)
            x[:, shift * 7 : shift * 7 + 5] *= 100
            y, exact = fast(x).float().clone(), layer(x).float()
            assert float((y - exact).norm() / exact.norm()) < 2e-2
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
            fast(x)
            torch.cuda.synchronize()
    assert "cudaGraphLaunch" in {e.name for e in p.events()} and counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("recipe", ["W4A16_GPTQ", "W8A8_SMOOTHQUANT", "LLM_INT8_STATIC"])
def test_quantized_in_place_and_moved(recipe):
    """Solved on the CPU, moved to the GPU, compiled there: the codes multiply."""
    model, batches = model_and_batches()
    model, cpu = model.cpu(), [{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]
    with torch.no_grad():
        exact = model(**cpu[0]).logits.float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            qcompile.quantize(model, recipe, cpu, progress=False)
        model.cuda()
        torch._dynamo.reset()
        fast = torch.compile(model, backend="qcompile", dynamic=False)
        y, eager = fast(**batches[0]).logits.float().cpu(), model(**batches[0]).logits.float().cpu()
        report = qcompile.explain(fast, **batches[0])
    assert float((eager - exact).norm() / exact.norm()) < 0.5
    assert float((y - eager).norm() / exact.norm()) < 5e-2
    assert report.sites and all("triton" in row.kernel for row in report.sites)
