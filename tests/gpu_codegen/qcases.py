"""Cases that go through the whole backend: a model on the CPU, our passes and ops, Inductor's code for an H200. Each case has several parts, which share one process."""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from fake_cuda import Generated, compile_backend, compile_training, parse
from torch import nn

T = torch.Tensor
Parts = dict[str, tuple[Generated, dict[str, Any]]]


def quantized(model: Callable[..., Any], inputs: Any, options: Mapping[str, Mapping[str, Any]], dynamic: bool | None = None) -> Parts:
    """Code for each of `options`, from one capture by Dynamo."""
    from qcompile import backend, compat
    from qcompile.passes.infra import text

    warnings.simplefilter("ignore")
    glu = sys.modules["qcompile.passes.glu"]  # asks about the device before Inductor is told that it is an H200
    glu.device_of = lambda value: torch.device("cuda")  # type: ignore[attr-defined]
    compat.capability = lambda device: (9, 0)
    graphs: list[Any] = []

    def every(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.extend(backend.backend(gm, example_inputs, options=chosen) for chosen in options.values())
        return graphs[-1]

    generated = compile_backend(every, model, inputs, dynamic=dynamic)
    assert len(generated.sources) == len(graphs) == len(options), "one graph for each of the options"
    return {
        name: (parse([source]), {"text": text(graph.lowered), "kernels": len(graph.kernels), "plan": {site: str(choice) for site, choice in graph.plan.items()}})
        for name, source, graph in zip(options, generated.sources, graphs, strict=True)
    }


def bf16(*shape: int) -> T:
    return torch.randn(*shape, dtype=torch.bfloat16)


class Norm(nn.Module):
    """Residual add, RMSNorm, linear: the norm carries the dynamic quantization."""

    def __init__(self, k: int = 256, n: int = 256) -> None:
        super().__init__()
        self.norm, self.fc = nn.RMSNorm(k), nn.Linear(k, n)

    def forward(self, x: T, residual: T) -> tuple[T, T]:
        total = x + residual
        return total, self.fc(self.norm(total))


class Chain(nn.Module):
    """linear + bias + GELU + residual + static quantization of the next linear."""

    def __init__(self, k: int = 256, n: int = 512) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(k, n), nn.Linear(n, k)

    def forward(self, x: T, residual: T) -> T:
        return self.down(F.gelu(self.up(x), approximate="tanh") + residual)


class Gated(nn.Module):
    """The gated half of a SwiGLU MLP, or of one with another activation."""

    def __init__(self, k: int = 256, n: int = 512, activation: Callable[[T], T] = F.silu) -> None:
        super().__init__()
        self.gate, self.up, self.activation = nn.Linear(k, n, bias=False), nn.Linear(k, n, bias=False), activation

    def forward(self, x: T) -> T:
        return self.activation(self.gate(x)) * self.up(x)


class SwiGLU(nn.Module):
    def __init__(self, k: int = 256, n: int = 512) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(k, n, bias=False), nn.Linear(k, n, bias=False), nn.Linear(n, k, bias=False)

    def forward(self, x: T) -> T:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def requantized() -> dict[str, Any]:
    """int4 weights and 16-bit activations, then a linear with a static int8 input."""
    from qcompile.core.recipe import Recipe, Rule

    return {"recipe": Recipe("mixed", "int4.g128", None, (Rule("down", "int8.row", "int8.tensor.static"),))}


def chains() -> Parts:
    """Norm + quantize, SwiGLU + quantize, and the requantized chain on (M, K), (1, S, K), (B, S, K) and a dynamic batch."""
    parts: Parts = {}

    def add(model: nn.Module, inputs: tuple[T, ...], options: dict[str, Any], dynamic: bool | None = None) -> None:
        torch._dynamo.reset()
        parts.update(quantized(model.eval().to(torch.bfloat16), inputs, options, dynamic))

    add(Norm(), (bf16(64, 256), bf16(64, 256)), {"norm int8": {"recipe": "W8A8"}, "norm fp8": {"recipe": "FP8"}})
    add(SwiGLU(), (bf16(2, 128, 256),), {"swiglu": {"recipe": "W8A8"}})
    add(Chain(), (bf16(128, 256), bf16(128, 512)), {"requantized (M, K)": requantized(), "unfused": {**requantized(), "inductor": {"epilogue_fusion": False}}})
    add(Chain(), (bf16(1, 16, 256), bf16(1, 16, 512)), {"requantized (1, S, K)": requantized()})
    add(Chain(), (bf16(4, 16, 256), bf16(4, 16, 512)), {"requantized (B, S, K)": requantized(), "int8 (B, S, K)": {"recipe": "W8A8_STATIC"}})
    add(Chain(), (bf16(4, 16, 256), bf16(4, 16, 512)), {"requantized dynamic": requantized(), "norm": {"recipe": "W8A8"}}, True)
    return parts


def long_rows() -> Parts:
    """SwiGLU of the 8B shape's width, one row and so many that the library multiplies."""
    parts: Parts = {}
    for rows in (1, 2048):
        torch._dynamo.reset()
        options = {f"{recipe} {rows}": {"recipe": recipe} for recipe in ("W8A8", "FP8")}
        parts.update(quantized(SwiGLU(64, 14336).eval().to(torch.bfloat16), (bf16(rows, 64),), options))
    return parts


def transformer(name: str, layers: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    """A GPT-2, OPT or BERT of transformers, small, in bfloat16, and a prefill without a cache."""
    import transformers

    size = {"vocab_size": 512, "num_hidden_layers": layers, "hidden_size": 128, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=layers, n_embd=128, n_head=2, vocab_size=512, n_positions=64)
    elif name == "opt":
        config = transformers.OPTConfig(**size, ffn_dim=512, word_embed_proj_dim=128, max_position_embeddings=64)
    else:
        config = transformers.BertConfig(**size, intermediate_size=512)
    torch.manual_seed(0)
    head = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    ids = {"input_ids": torch.randint(3, 512, (2, 16))}
    return head.from_config(config).eval().to(torch.bfloat16), ids if name == "bert" else {**ids, "use_cache": False}


def static_models() -> Parts:
    """GPT-2, OPT (ReLU) and BERT under static int8, OPT also with smoothing vectors."""
    parts: Parts = {}
    for name in ("gpt2", "opt", "bert"):
        torch._dynamo.reset()
        parts.update(quantized(*transformer(name), {name: {"recipe": "W8A8_STATIC"}}))
    torch._dynamo.reset()
    return parts | quantized(*transformer("opt"), {"opt smoothed": {"recipe": "W8A8_SMOOTHQUANT_STATIC"}})


LAYERS = (
    "W8A8", "W8A8_STATIC", "W8A8_SMOOTHQUANT", "W8A8_SMOOTHQUANT_STATIC", "LLM_INT8_STATIC", "W8A16", "W4A16", "W4A16_AWQ", "W4A8", "FP8", "FP8_TENSOR", "NF4", "FP4",
)  # fmt: skip


def recipes() -> Parts:
    """A decoder layer of Llama under recipes that differ in their kernels. Vectors that smooth are those of the first call."""
    import transformers

    config = transformers.LlamaConfig(vocab_size=512, num_hidden_layers=1, hidden_size=128, num_attention_heads=2, intermediate_size=512, num_key_value_heads=2)
    layer = transformers.AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16).model.layers[0]
    inputs = {"hidden_states": bf16(2, 16, 128), "position_embeddings": (bf16(1, 16, 64), bf16(1, 16, 64))}
    return quantized(layer, inputs, {name: {"recipe": name} for name in LAYERS})


class Broadcast(nn.Module):
    """Attention whose values have one column, broadcast to all: a stride of zero on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64, bias=False)

    def forward(self, q: T, k: T, v: T) -> T:
        return self.fc(F.scaled_dot_product_attention(q, k, v.expand_as(k)))


def decoding() -> Parts:
    """A step of a small Llama with grouped queries and a static cache, one sequence and many."""
    import transformers

    config = transformers.LlamaConfig(vocab_size=512, num_hidden_layers=1, hidden_size=256, num_attention_heads=4, intermediate_size=512, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)
    parts: Parts = {}
    for batch in (1, 128):
        torch._dynamo.reset()
        cache = transformers.StaticCache(config=config, max_cache_len=1024)
        ids = torch.randint(0, 512, (batch, 8))
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        inputs = {"input_ids": ids[:, -1:], "past_key_values": cache, "use_cache": True}
        parts.update(quantized(model, inputs, {f"{recipe} {batch}": {"recipe": recipe} for recipe in ("W4A16", "W8A8", "W8A8_STATIC")}))
    torch._dynamo.reset()
    inputs = bf16(2, 4, 1, 64), bf16(2, 4, 128, 64), bf16(2, 4, 128, 1)
    return parts | quantized(Broadcast().eval().to(torch.bfloat16), inputs, {"broadcast": {"recipe": "W8A16"}})


class Filled(nn.Module):
    """A layer of a model's kind, and a kernel that reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)

    def forward(self, x: T) -> tuple[T, T]:
        y = self.down(F.silu(self.up(F.rms_norm(x, (256,)))))
        return y + x, torch.arange(512, device=x.device) * 3


class Counting(nn.Module):
    """Layers that count their calls, as a static cache's do; ``read`` names what else reads the counts of before."""

    def __init__(self, read: str = "") -> None:
        super().__init__()
        self.fc, self.read = nn.Linear(256, 256), read
        for name in ("first", "second", "third"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("positions", torch.zeros(8, dtype=torch.int64))

    def forward(self, x: T) -> Any:
        counts = (self.first, self.second, self.third)
        if self.read == "positions":
            y = self.fc(x) + self.first + self.second + self.third
            self.positions.copy_(torch.arange(8, device=x.device) + self.first)
        elif self.read == "outputs":
            y = self.fc(x), self.first.clone(), self.second * 2
        else:
            y = x
            for count in counts:
                y = self.fc(y) + count
        for count in counts:
            count.add_(1)
        return y


def counting() -> Parts:
    parts: Parts = {}
    for read in ("", "positions", "outputs"):
        torch._dynamo.reset()
        parts |= quantized(Counting(read).eval().to(torch.bfloat16), (bf16(4, 256),), {f"W4A16 {read}".strip(): {"recipe": "W4A16"}})
    return parts


class Growing(nn.Module):
    """Attention to keys that a call joins to those it was given, along their axis or that of the batch: strides of what it makes depend on a dynamic size."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.fc, self.axis = nn.Linear(512, 512, bias=False), axis

    def forward(self, q: T, k: T, v: T, more_q: T, more_k: T, more_v: T) -> T:
        k, v = torch.cat([k, more_k], self.axis), torch.cat([v, more_v], self.axis)
        q = torch.cat([q, more_q]) if self.axis == 0 else q
        b, g, n, d = k.shape
        k, v = (t[:, :, None].expand(b, g, 4, n, d).reshape(b, 4 * g, n, d) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.1)
        return self.fc(y.transpose(1, 2).reshape(b, 1, 512))


def growing() -> Parts:
    parts: Parts = {}
    for axis, name in ((2, "keys"), (0, "batch")):
        torch._dynamo.reset()
        given = [bf16(3, 8, 1, 64), bf16(3, 2, 300, 64), bf16(3, 2, 300, 64)]
        more = [bf16(1, 8, 1, 64), bf16(1, 2, 300, 64), bf16(1, 2, 300, 64)] if axis == 0 else [bf16(3, 8, 1, 64), bf16(3, 2, 1, 64), bf16(3, 2, 1, 64)]
        for t in given if axis == 0 else given[1:]:
            torch._dynamo.mark_dynamic(t, axis)
        parts |= quantized(Growing(axis).eval().to(torch.bfloat16), (*given, *more), {name: {"recipe": "W8A8"}})
    return parts


def early_rows() -> Parts:
    """Products of 64 rows that are launched early, of a size that was tuned."""
    layer = nn.Linear(4096, 14336, bias=False, dtype=torch.bfloat16)
    return quantized(layer, (bf16(64, 4096),), {name: {"recipe": name, "inductor": {"triton.enable_pdl": True}} for name in ("W4A8", "NF4")})


def early() -> Parts:
    """Kernels that begin while the one before ends, and, "plain", the same without."""
    pdl = {"inductor": {"triton.enable_pdl": True}}
    options = {"W8A8": {"recipe": "W8A8", **pdl}, "W4A16": {"recipe": "W4A16", **pdl}, "plain": {"recipe": "W8A8"}}
    return quantized(Filled().eval().to(torch.bfloat16), (bf16(1, 256),), options)


def experts() -> Parts:
    """Mixtral's experts with rows sorted by expert and with one expert for each row."""
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tiny_models import tiny

    parts: Parts = {}
    for form in ("grouped_mm", "batched_mm"):
        torch._dynamo.reset()
        model, inputs = tiny("mixtral", dtype=torch.bfloat16, experts_implementation=form, num_hidden_layers=1)
        parts.update(quantized(model, {**inputs, "use_cache": False}, {f"{form} {recipe}": {"recipe": recipe} for recipe in ("W8A8", "W4A16")}))
    return parts


def spilling() -> Generated:
    """A tile too large for its warps."""
    from qcompile.kernels import tuned

    tuned.config = lambda c: {"BLOCK_M": 128, "BLOCK_N": 256, "SPLIT": 1, "UNROLL": 1, "num_warps": 4, "num_stages": 2, "PARTS": 1, "GROUP_M": 8}
    ((generated, _),) = quantized(nn.Linear(128, 256).eval().to(torch.bfloat16), (bf16(128, 128),), {"spilling": {"recipe": "NF4"}}).values()
    return generated


def regimes() -> Parts:
    """One linear with few, some and many rows, K in parts, and a row count that is dynamic."""
    from qcompile.kernels import tuned

    parts: Parts = {}
    ways: dict[str, dict[str, Any]] = {name: {"recipe": name} for name in ("W4A16", "W4A8", "W8A8", "FP8", "NF4")} | {"FP8A16": {"weight": "e4m3.row"}}
    for rows, dynamic in ((1, None), (16, None), (4096, None), (48, True)):
        torch._dynamo.reset()
        layer = nn.Linear(256, 512, bias=False).eval().to(torch.bfloat16)
        parts.update(quantized(layer, (bf16(rows, 256),), {f"{name} {'dynamic' if dynamic else rows}": way for name, way in ways.items()}, dynamic))
    torch._dynamo.reset()
    tuned.config = lambda c: {"BLOCK_M": 16, "BLOCK_N": 32, "SPLIT": 4, "UNROLL": 1, "num_warps": 2, "num_stages": 4, "PARTS": 1, "GROUP_M": 8}
    parts.update(quantized(nn.Linear(1024, 512).eval().to(torch.bfloat16), (bf16(8, 1024),), {"split": {"recipe": "W4A16"}}))
    return parts


def parted() -> Parts:
    """K in parts inside a program, a warp for each: a batched dot of every arithmetic, for one row and for sixteen."""
    from qcompile.kernels import tuned

    parts: Parts = {}
    for rows in (1, 16):
        torch._dynamo.reset()
        tuned.config = lambda c, rows=rows: {"BLOCK_M": rows, "BLOCK_N": 16, "SPLIT": 1, "UNROLL": 1, "num_warps": 4, "num_stages": 3, "PARTS": 4, "GROUP_M": 8}
        ways: dict[str, dict[str, Any]] = {name: {"recipe": name} for name in ("W4A16", "W4A8", "W8A8", "FP8", "NF4", "W8A16")} | {"E5M2A16": {"weight": "e5m2.row"}}
        parts.update(quantized(nn.Linear(1024, 512, bias=False).eval().to(torch.bfloat16), (bf16(rows, 1024),), {f"{name} {rows}": way for name, way in ways.items()}))
    return parts


def gated() -> Parts:
    """Gate, up and SiLU with few, some and many rows, in the tiles of an 8B model, and with a row count that is dynamic."""
    import dataclasses

    from qcompile.kernels import tuned

    real = tuned.config
    tuned.config = lambda c: {**tuned._fit(tuple(real(dataclasses.replace(c, n=28672, k=4096))[name] for name in tuned.FIELDS), c.k), "GROUP_M": tuned.GROUP_M}
    parts: Parts = {}
    for rows, dynamic in ((1, None), (64, None), (200, None), (4096, None), (48, True), (1024, True)):
        torch._dynamo.reset()
        names = ("W4A16", "W8A8") if dynamic else ("W4A16", "W8A8", "FP8", "NF4")
        model = Gated().eval().to(torch.bfloat16)
        parts.update(quantized(model, (bf16(rows, 256),), {f"{name} {'dynamic ' if dynamic else ''}{rows}": {"recipe": name} for name in names}, dynamic))
    from qcompile.kernels.linear_glu import ACTIVATIONS

    for name in ("ragged", "gelu", "gelu_tanh", "relu_squared"):
        torch._dynamo.reset()
        model = Gated(192, 40, ACTIVATIONS[name if name in ACTIVATIONS else "silu"].fn).eval().to(torch.bfloat16)
        parts.update(quantized(model, (bf16(2, 33, 192),), {name: {"recipe": "W4A8" if name == "ragged" else "W8A8"}}))
    return parts


def codebooks() -> Parts:
    """Weights with values of their own, which no kernel decodes: one row and many."""
    parts: Parts = {}
    for rows in (1, 64):
        torch._dynamo.reset()
        parts |= quantized(nn.Linear(256, 512, bias=False).to(torch.bfloat16), [bf16(rows, 256)], {f"{rows} rows": {"weight": "lut4.g64", "recipe": "W4A16"}})
    return parts


class Normed(nn.Module):
    """A norm that two linears read, and one behind them: hidden states in and out."""

    def __init__(self, k: int = 256, n: int = 512) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.RMSNorm(k), nn.Linear(k, n, bias=False), nn.Linear(k, n, bias=False), nn.Linear(n, k, bias=False)

    def forward(self, x: T) -> T:
        x = torch.tanh(x)
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def fp8_training() -> Parts:
    """The forward and the backward of FP8 training, for each scaling, and of QAT."""
    from qcompile import backend, compat

    warnings.simplefilter("ignore")
    compat.capability, compat.device_of = (lambda device: (9, 0)), (lambda value: torch.device("cuda"))
    ways: dict[str, dict[str, Any]] = {scaling: {"train": f"fp8(scaling='{scaling}', history=16)"} for scaling in ("tensor", "row", "delayed")}
    ways["qat"] = {"train": "qat", "weight": "int4.g128", "input": "int8.row"}
    parts: Parts = {}
    for way, options in ways.items():
        torch._dynamo.reset()
        made = compile_training(lambda gm, args, options=options: backend.backend(gm, args, options=options), Normed().to(torch.bfloat16), (bf16(512, 256).requires_grad_(),))
        assert len(made.sources) == 2, "a forward and a backward"
        parts.update({f"{way} {which}": (parse([source]), {}) for which, source in zip(("forward", "backward"), made.sources, strict=True)})
    return parts


def optimizer() -> Parts:
    """A step of FP8-LM's optimizer for a bfloat16 parameter with an FP16 master."""
    from qcompile.train.optim import Rates, _fresh, whole

    p = nn.Parameter(bf16(300))
    state = _fresh(p, "fp16")
    made = compile_backend(
        "inductor", lambda param, grad, *values: whole(param, grad, dict(zip(state, values)), Rates(1e-3, 0.9, 0.95, 1e-8, 0.01, False)), [p.detach(), bf16(300), *state.values()]
    )
    return {"step": (parse(made.sources), {})}


def splits() -> Parts:
    """LLM.int8()'s split of a linear of an 8B model, static and dynamic, with one row, few and many."""
    parts: Parts = {}
    layer = nn.Linear(2048, 6144, bias=False).to(torch.bfloat16)
    for rows in (1, 64, 300):
        torch._dynamo.reset()
        options = {f"static {rows}": {"recipe": "W8A8", "passes": ["outliers(columns=40)"]}, f"dynamic {rows}": {"recipe": "LLM_INT8"}}
        parts |= quantized(layer, [bf16(rows, 2048)], options)
    return parts
