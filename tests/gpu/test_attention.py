"""Attention of few queries on a real GPU: against float64, ugly sizes and masks, the same from run to run, one kernel and one that combines; a Llama that decodes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.kernels.attention import reference, repeated

pytestmark = pytest.mark.gpu

# batch, heads, key heads, queries, keys, columns, mask
CASES = [
    (1, 8, 2, 1, 300, 64, "none"), (2, 8, 2, 1, 300, 64, "prefix"), (2, 7, 7, 1, 77, 128, "random"), (3, 12, 4, 3, 1030, 80, "float"), (2, 32, 8, 1, 513, 128, "random"), (1, 16, 1, 2, 2049, 256, "prefix"),
    (2, 8, 2, 5, 100, 96, "heads"), (64, 32, 8, 1, 1280, 128, "prefix"), (1, 32, 1, 1, 4000, 128, "none"), (1, 32, 8, 4, 2000, 128, "random"), (2, 60, 1, 1, 100, 128, "prefix"), (4, 8, 2, 1, 64, 64, "nothing"),
]  # fmt: skip


class Attention(nn.Module):
    """One call, and a linear, so that there is something to quantize."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.fc = nn.Linear(columns, columns, bias=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.scaled_dot_product_attention(q, repeated(k, q.shape[1]), repeated(v, q.shape[1]), attn_mask=mask, scale=0.1)
        return y, self.fc(y)


def mask_of(kind: str, b: int, h: int, q: int, s: int, dtype: torch.dtype) -> torch.Tensor | None:
    at = torch.arange(s, device="cuda")
    if kind == "none":
        return None
    if kind in ("float", "heads"):
        return torch.randn(b, h if kind == "heads" else 1, q, s, device="cuda", dtype=dtype).masked_fill(torch.rand(b, 1, q, s, device="cuda") < 0.3, -math.inf)
    return {"prefix": at < s // 3, "nothing": at < 0, "random": torch.rand(b, 1, q, s, device="cuda") < 0.5}[kind].expand(b, 1, q, s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_against_float64(shape, dtype):
    b, h, g, n, s, d, kind = shape
    q, k, v = (torch.randn(b, heads, rows, d, device="cuda", dtype=dtype) for heads, rows in ((h, n), (g, s), (g, s)))
    mask = mask_of(kind, b, h, n, s, dtype)
    fast = torch.compile(Attention(d).to("cuda", dtype).eval(), backend="qcompile", options={"recipe": "W8A16"}, dynamic=False)
    with torch.no_grad():
        first = fast(q, k, v, mask)[0]
        torch.empty(2**26, device="cuda", dtype=torch.uint8).fill_(255)  # what is freed next holds NaN
        again = fast(q, k, v, mask)[0]
    exact = torch.nan_to_num(reference(q.double(), k.double(), v.double(), mask.double() if mask is not None and mask.is_floating_point() else mask, 0.1))
    assert torch.equal(first, again)
    if kind == "nothing":
        assert not first.any(), "rows that see nothing are zero"
    else:
        assert float((first.double() - exact).norm() / exact.norm()) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("recipe", ["W4A16", "W8A8"])
@pytest.mark.parametrize("batch", [1, 5])
def test_decoding(recipe, batch):
    """Steps of a Llama with grouped queries and a static cache: what the model without the pass gives, captured in a CUDA graph, too."""
    import sys

    import transformers

    attend = sys.modules["qcompile.passes.attend"]
    config = transformers.LlamaConfig(vocab_size=512, num_hidden_layers=2, hidden_size=256, num_attention_heads=8, intermediate_size=512, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(0, 512, (batch, 37), device="cuda")
    logits = {}
    for name, most in (("ours", attend.MOST), ("torch's", 0)):
        torch._dynamo.reset()
        cache = transformers.StaticCache(config=config, max_cache_len=64)
        attend.MOST = most
        try:
            with torch.no_grad():
                model(ids, past_key_values=cache, use_cache=True)
                fast = torch.compile(model, backend="qcompile", options={"recipe": recipe}, dynamic=False)
                logits[name] = torch.stack([fast(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(4)])
        finally:
            attend.MOST = 63
    assert float((logits["ours"] - logits["torch's"]).norm() / logits["torch's"].norm()) < 2e-2
