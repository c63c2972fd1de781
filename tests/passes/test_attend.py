"""Attention with few queries: which spellings are found, what is left to torch and why, the same numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from tiny_models import tiny
from torch import Tensor, fx

from qcompile.passes import PASSES
from qcompile.passes.infra import text

B, H, G, S, D = 2, 6, 2, 9, 8


def captured(fn: Callable[..., Tensor], *inputs: Tensor, dynamic: bool | None = None) -> fx.GraphModule:
    """Dynamo's graph of ``fn``, with the empty tables that the passes before leave."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs)
    graphs[0].meta.update(plan={}, sites={})
    return graphs[0]


def attended(fn: Callable[..., Tensor], *inputs: Tensor, dynamic: bool | None = None) -> fx.GraphModule:
    return PASSES["attend"].fn(captured(fn, *inputs, dynamic=dynamic), None)


def called(gm: fx.GraphModule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The graph's value; Dynamo orders inputs by their first use."""
    gm.recompile()
    values = {"l_q_": q, "l_k_": k, "l_v_": v}
    (y,) = gm(*(values.get(n.name.lower(), MASK) for n in gm.graph.find_nodes(op="placeholder")))
    return y


def inputs(queries: int = 1, groups: int = G) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, queries, D), torch.randn(B, groups, S, D), torch.randn(B, groups, S, D)


def spread(x: Tensor) -> Tensor:
    return x[:, :, None, :, :].expand(B, G, H // G, S, D).reshape(B, H, S, D)


MASK = torch.arange(S) < 5
SPELLINGS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "transformers": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), attn_mask=MASK[None, None, None, :], scale=0.3), 1),
    "unsqueeze": (lambda q, k, v: F.scaled_dot_product_attention(q, *(x.unsqueeze(2).expand(-1, -1, H // G, -1, -1).reshape(B, H, S, D) for x in (k, v))), 1),
    "repeat_interleave": (lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(H // G, 1), torch.repeat_interleave(v, H // G, dim=1)), 3),
    "enable_gqa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 2),
    "mask of two axes": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), torch.zeros(2, S).masked_fill(~MASK, -math.inf)), 2),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    fn, queries = SPELLINGS[name]
    given = inputs(queries)
    gm = attended(fn, *given)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.qcompile.attention.default)
    assert [n.op for n in node.args[1:3]] == ["placeholder"] * 2, "keys and values are read as they come"
    assert not gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    gm.graph.lint()
    torch.testing.assert_close(called(gm, *given), fn(*given))


def test_heads_of_their_own() -> None:
    given = inputs(groups=H)
    gm = attended(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *given)
    torch.testing.assert_close(called(gm, *given), F.scaled_dot_product_attention(*given))


def test_graph() -> None:
    gm = attended(SPELLINGS["transformers"][0], *inputs())
    gm.recompile()
    assert_expected_inline(
        text(gm).replace("l_", "").split("\n", 1)[1],
        """\
getitem_2 = getitem(g_mask_, (None, None, None, :))
attention_default = qcompile.attention(q_, k_, v_, getitem_2, 0.3)
return (attention_default,)""",
    )


REFUSED: dict[str, tuple[Callable[..., Tensor], int]] = {
    "more than 63 queries": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v)), 30),
    "causal without a mask": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), is_causal=True), 3),
    "differ in heads or columns": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v)[..., :4]), 1),
    "not (batch, heads": (lambda q, k, v: F.scaled_dot_product_attention(q[0], spread(k)[0], spread(v)[0]), 1),
    "a prompt, or an encoder": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v)), S),
    "change between": (lambda q, k, v: written(q, k, v), 1),
}


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The cache is cleared after its copy was taken."""
    keys, values = spread(k), spread(v)
    k.zero_()
    return F.scaled_dot_product_attention(q, keys, values)


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    fn, queries = REFUSED[reason]
    gm = attended(fn, *inputs(queries))
    (refusal,) = gm.meta["attention"].values()
    assert reason in str(refusal)
    assert gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)


def test_a_dynamic_number_of_queries_is_left_to_torch() -> None:
    gm = attended(lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v)), *inputs(4), dynamic=True)
    assert "dynamic" in str(*gm.meta["attention"].values())


class Scaled(torch.nn.Module):
    """As transformers spells it: the scale is the layer's own number, which ``dynamic=True`` makes an input of the graph."""

    scaling = 0.3

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, spread(k), spread(v), scale=self.scaling)


def test_a_scale_that_is_an_input() -> None:
    module, given = Scaled(), inputs()
    gm = captured(module, *given, dynamic=True)
    assert isinstance(gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)[0].kwargs["scale"], fx.Node)
    (node,) = PASSES["attend"].fn(gm, None).graph.find_nodes(op="call_function", target=torch.ops.qcompile.attention.default)
    assert node.args[4] == 0.3

    torch._dynamo.reset()
    fast = torch.compile(module, backend="qcompile", dynamic=True, options={"lower": "eager"})
    for module.scaling in (0.3, 0.7):  # the second is another graph, not the first one's scale
        torch.testing.assert_close(fast(*given), module(*given))


def test_decoding_with_a_static_cache(built) -> None:
    """The same logits as without the pass, step by step, with a cache that is written in place."""
    transformers = pytest.importorskip("transformers")
    model, given = tiny("llama")
    ids = given["input_ids"]
    cache = {name: transformers.StaticCache(config=model.config, max_cache_len=32) for name in ("plain", "fast")}
    with torch.no_grad():
        for c in cache.values():
            model(ids, past_key_values=c, use_cache=True)
        fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "ignore": "re:.*", "lower": "eager"})
        for step in range(3):
            token = ids[:, step : step + 1]
            wanted = model(token, past_key_values=cache["plain"], use_cache=True).logits
            torch.testing.assert_close(fast(token, past_key_values=cache["fast"], use_cache=True).logits, wanted, rtol=2e-4, atol=2e-4)
    assert "attention" in text(built[0].lowered) and not built[0].planned.meta["attention"]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers spells it: a mask of positions, which nothing but sizes decides."""
    at = torch.arange(S, device=q.device)
    return F.scaled_dot_product_attention(q, spread(k), spread(v), attn_mask=(at[None, :] <= at[:, None])[None, None], scale=0.3)


PROMPTS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "bool": (causal, True),
    "float": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), torch.full((S, S), torch.finfo(q.dtype).min).triu(1)), True),
    "window": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), torch.ones(S, S, dtype=torch.bool).tril().triu(-3)), False),
    "all": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), torch.ones(S, S, dtype=torch.bool)), False),
    "slopes": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), torch.full((S, S), -math.inf).triu(1) + torch.arange(S)), False),
    "of an input": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), torch.ones(S, S, dtype=torch.bool).tril() & (q[0, 0, 0, 0] < 1e9)), False),
    "by chance": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), torch.ones(S, S, dtype=torch.bool).tril() & (torch.rand(S, S) < 2)), False),
    "written": (lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v), torch.ones(S, S, dtype=torch.bool).tril().logical_or_(torch.eye(S).bool().roll(1, 1))), False),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_told_that_its_mask_is_causal(name: str) -> None:
    fn, told = PROMPTS[name]
    given = inputs(S)
    gm = attended(fn, *given)
    (node,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert bool(node.kwargs.get("is_causal")) is told
    assert ("1 with a causal mask" in gm.meta["note"]) is told
    if told:
        assert node.kwargs["attn_mask"] is None and "enable_gqa" not in node.kwargs, "on a CPU grouped queries would be computed step by step"
    gm.graph.lint()
    torch.testing.assert_close(called(gm, *given), fn(*given))


def test_a_mask_that_vmap_makes_stays() -> None:
    """Its levels are entered by calls that no value depends on, so its value is not known apart from the graph."""

    def masked(q: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.vmap(lambda row: torch.vmap(lambda column: column <= row)(at))(at))

    q = torch.randn(B, H, S, D)
    with torch.no_grad():
        y = torch.compile(masked, backend="qcompile", options={"lower": "eager"})(q)
    assert torch.equal(y, masked(q))


def test_a_prompt_on_a_gpu_repeats_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's GPU kernels of 16 bits share keys among heads themselves."""
    q, k, v = (x.bfloat16() for x in inputs(S))
    gm = captured(causal, q, k, v)
    monkeypatch.setattr(sys.modules["qcompile.passes.attend"], "shares_keys", lambda x: x.dtype.itemsize == 2)
    PASSES["attend"].fn(gm, None)
    (node,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert node.kwargs["enable_gqa"] is True and [node.kwargs[name].op for name in ("key", "value")] == ["placeholder"] * 2
    assert not gm.graph.find_nodes(op="call_method", target="expand")
    gm.graph.lint()
    torch.testing.assert_close(called(gm, q, k, v), causal(q, k, v), rtol=2e-2, atol=2e-2)


def test_a_prompt_of_a_real_model(built) -> None:
    pytest.importorskip("transformers")
    model, given = tiny("llama")
    ids = given["input_ids"]
    with torch.no_grad():
        fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "ignore": "re:.*", "lower": "eager"})
        torch.testing.assert_close(fast(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=2e-4, atol=2e-4)
    assert "is_causal=True" in text(built[0].planned) and not built[0].planned.meta["attention"]
