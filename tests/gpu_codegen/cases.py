"""Cases that `run_case.isolated` runs by name. Each generates code for an H200 and returns it; the sizes cost nothing, since the tensors are fake."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from fake_cuda import Generated, codegen, codegen_graph, compile_backend

T = torch.Tensor


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> T:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def quantize_rows(x: T) -> tuple[T, T]:
    """Dynamic int8 codes and one scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-8) / 127
    return torch.clamp(torch.round(x / scale), -128, 127).to(torch.int8), scale


def swiglu_quantize(m: int = 64, k: int = 11008, dynamic: bool = False, config: dict[str, Any] | None = None) -> Generated:
    """silu(gate) * up and dynamic per-row quantization."""
    return codegen(lambda gate, up: quantize_rows(F.silu(gate) * up), lambda: (cuda(m, k), cuda(m, k)), config, dynamic)


def int8_gemm_autotuned(m: int = 256, n: int = 4096, k: int = 4096) -> Generated:
    """`_int_mm`, scales, bias and GELU under max_autotune: the first Triton candidate is taken as the fastest."""

    def fn(x: T, w: T, sx: T, sw: T, bias: T) -> T:
        return F.gelu((torch._int_mm(x, w.t()).float() * sx * sw + bias).bfloat16(), approximate="tanh")

    i8, f32 = torch.int8, torch.float32
    inputs = lambda: (cuda(m, k, dtype=i8), cuda(n, k, dtype=i8), cuda(m, 1, dtype=f32), cuda(n, dtype=f32), cuda(n, dtype=f32))  # noqa: E731
    return codegen(fn, inputs, {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON"})


def indexing(dynamic: bool = False) -> Generated:
    """What a KV cache and a mask need on fake cuda tensors: slices, index_select, index_copy_, arange, attention, an in-place write, a constant tensor."""

    def fn(x: T, cache: T, index: T) -> T:
        cache.index_copy_(2, index, x)
        positions = torch.arange(cache.shape[2], device=x.device)
        mask = positions[None, None, None, :] <= index[None, None, :, None]
        out = F.scaled_dot_product_attention(x, cache, cache, attn_mask=mask)
        out = out.index_select(1, torch.tensor([0, 1], device=x.device)).clone()
        out[:, 0] = 0
        return out[..., :8].view(-1, 8).to(torch.int8)

    x, cache, index = torch.randn(1, 4, 16, 64), torch.randn(1, 4, 32, 64), torch.arange(16)
    return compile_backend("inductor", fn, (x.bfloat16(), cache.bfloat16(), index), dynamic=dynamic)


def graph_level(decompose: bool = True, rows: int = 64) -> tuple[Generated, dict[str, Any]]:
    """`codegen_graph` on a graph that Dynamo captured on the CPU, with our op's reference as its decomposition (or none: then its lowering) and a post-grad pass that notes what it sees."""
    from qcompile import compat
    from qcompile.core.qtensor import quantize
    from qcompile.core.scheme import Scheme
    from qcompile.kernels import OPS
    from qcompile.kernels.op import target

    compat.flush_lowerings()
    captured: list[Any] = []
    seen: list[str] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        captured.extend((gm, example_inputs))
        return gm

    table = torch.randn(256)  # a closed-over tensor: an input of the graph, as weights are
    weight = quantize(torch.randn(64, 256), Scheme.parse("int4.g128")).flatten()
    torch.compile(lambda x, codes, scale: target("linear")(x[:, :] * table, [codes, scale], "int4.g128").relu(), backend=keep)(torch.randn(rows, 256), *weight)
    decompositions = {target("linear"): OPS["linear"].reference} if decompose else None
    generated = codegen_graph(*captured, decompositions, lambda graph: seen.extend(str(node.target) for node in graph.nodes))
    return generated, {"seen": seen}


def transformer(name: str, layers: int = 1, dynamic: bool | None = None, values: bool = True, backend: str = "inductor", options: dict[str, Any] | None = None) -> Generated:
    """A tiny GPT-2, OPT, BERT or Llama of transformers through a whole torch.compile backend, its prefill without a cache."""
    import transformers

    warnings.simplefilter("ignore")
    size = {"vocab_size": 96, "num_hidden_layers": layers, "hidden_size": 128, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=layers, n_embd=128, n_head=2, vocab_size=96, n_positions=64)
    elif name == "opt":
        config = transformers.OPTConfig(**size, ffn_dim=256, word_embed_proj_dim=128, max_position_embeddings=64)
    elif name == "bert":
        config = transformers.BertConfig(**size, intermediate_size=256)
    else:
        config = transformers.LlamaConfig(**size, intermediate_size=256, num_key_value_heads=1)
    head = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model = head.from_config(config).eval().to(torch.bfloat16)
    inputs = {"input_ids": torch.randint(0, 96, (2, 16)), **({} if name == "bert" else {"use_cache": False})}
    from torch._dynamo import lookup_backend

    chosen = (lambda gm, example_inputs: lookup_backend(backend)(gm, example_inputs, options=options)) if options else backend
    return compile_backend(chosen, model, inputs, dynamic=dynamic, values=values)
