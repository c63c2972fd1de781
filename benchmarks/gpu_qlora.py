"""QLoRA on the 8B shape: one training step through qcompile and through bitsandbytes, peak memory and milliseconds, in one run. `python benchmarks/gpu_qlora.py --json benchmarks/results/h100/qlora.json`.

Both train PEFT's LoRA adapters of rank 64 on every linear but the head of `transformers.LlamaForCausalLM`, weights random in bfloat16 and made on the device, the base in NF4 with double quantization, by AdamW, on the
same random tokens. The head and the embedding keep 16 bits in both. Ours compiles each layer (one graph for all) and the loss; bitsandbytes runs as people run it, eagerly, and once more with its layers compiled by
Inductor. Checks come first: of two layers, gradients of the adapters against float32 on dequantized weights, beside eager bfloat16's; of whole models, that losses are finite and fall, and that the base has no gradient.

bitsandbytes and peft need not be installed: carried in a folder, `PYTHONPATH=folder`. Without bitsandbytes its rows are left out. `--model tiny --device cpu` runs anywhere.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_model import build, distance, settle
from torch import Tensor, nn

import qcompile
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme

NF4 = "nf4.g64/int8.g256"
"""Blocks of 64, whose scales are int8 in groups of 256: 4.127 bits, as in the paper's section 3."""
RANK, RATE = 64, 1e-3
TIMES = 1.5
"""How much farther than eager bfloat16 the worst gradient of an adapter may be from the exact one."""
CASES = ((512, False), (2048, True), (512, True))
"""(tokens, gradient checkpointing), the most important first."""
PEAK_GOAL, SPEED_GOAL = 1.0, 1.5
"""Ours over bitsandbytes' peak, and bitsandbytes' milliseconds over ours."""
STEPS = 8
Row = dict[str, Any]


def adapted(model: nn.Module, checkpointing: bool) -> nn.Module:
    """The model under LoRA. Adapters stay in bfloat16; B is not zero, so that every gradient says something."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=1e-3)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # only reentrant checkpoints need it
    return model.train()


def ours(model: nn.Module, checkpointing: bool, **options: Any) -> nn.Module:
    """Layers and loss compiled, the base packed and released on the first call of each layer."""
    model = adapted(model, checkpointing)
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="qcompile", dynamic=False, options={"weight": NF4, "train": "lora", "release": True, **options})
    compile_loss(model)
    return model


def compile_loss(model: Any) -> None:
    """The loss by Inductor: float32 logits are never stored."""
    inner = model.get_base_model()
    inner.loss_function = torch.compile(inner.loss_function, dynamic=False)


def theirs(model: nn.Module, checkpointing: bool, compiled: bool) -> nn.Module:
    """Every linear but the head as bitsandbytes' Linear4bit, NF4 with double quantization, computing in bfloat16."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for path, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta")
                new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new).cuda()
                layer.set_submodule(path, new)
    model.is_loaded_in_4bit = True  # what PEFT asks before it takes its layers for bitsandbytes
    model = adapted(model, checkpointing)
    if compiled:
        for layer in model.base_model.model.model.layers:
            layer.compile(dynamic=False)
        compile_loss(model)
    return model


def rounded(model: nn.Module) -> nn.Module:
    """The same model with dequantized weights, layer by layer."""
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.copy_(dequantize(quantize(module.weight, Scheme.parse(NF4)), module.weight.dtype))
    return model


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of one call, by name."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(args: argparse.Namespace, tokens: int, checkpointing: bool) -> Row:
    """Gradients of two layers: how far they are from those of the dequantized base in float32, beside how far eager PyTorch in bfloat16 is."""
    began = time.perf_counter()
    plain = build(args.model, torch.bfloat16, args.device, num_hidden_layers=2)
    ids = batch(plain, tokens, args.device)
    fast = gradients(ours(copy.deepcopy(plain), checkpointing), ids)
    twin = adapted(rounded(plain), False)
    eager = {name: g.float() for name, g in gradients(twin, ids).items()}
    exact = gradients(twin.zero_grad() or twin.float(), ids)
    errors = {name: (distance(fast[name], g), distance(eager[name], g)) for name, g in exact.items()} if set(fast) == set(exact) else {"": (math.inf, 0.0)}
    worst, others = max(mine for mine, _ in errors.values()), max(other for _, other in errors.values())
    return {"error": round(worst, 4), "bf16_error": round(others, 4), "right": worst < TIMES * others, "gradients": len(fast), "seconds": round(time.perf_counter() - began, 1)}


def batch(model: Any, tokens: int, device: str, seed: int = 0) -> Tensor:
    """One row of random tokens."""
    return torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator(device).manual_seed(seed), device=device)


def train(make: Callable[[nn.Module, bool], nn.Module], args: argparse.Namespace, tokens: int, checkpointing: bool) -> Row:
    """Milliseconds of a step (median), bytes at the peak and between steps once everything is compiled, and what the losses did."""
    release()
    began = time.perf_counter()
    model = make(build(args.model, torch.bfloat16, args.device), checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=args.device == "cuda")
    ids, times, losses = batch(model, tokens, args.device), [], []
    for step in range(STEPS + 2):  # the first compiles and packs, the second compiles what releasing changed
        if step == 2:
            release()
            seconds = time.perf_counter() - began
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        settle(ids.device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        settle(ids.device)
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(loss.item())
    peak, resident = (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if args.device == "cuda" else (0, 0)
    right = all(map(math.isfinite, losses)) and losses[-1] < losses[0] and not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    return {"ms": round(statistics.median(times[2:]), 2), "peak_gb": round(peak / 1e9, 3), "resident_gb": round(resident / 1e9, 3), "ready_s": round(seconds, 1), "losses": [round(losses[0], 3), round(losses[-1], 3)], "right": right}


def release() -> None:
    """Memory of what came before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def about(args: argparse.Namespace) -> Row:
    import peft
    import transformers

    found = importlib.util.find_spec("bitsandbytes") is not None and args.device == "cuda"
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    version = importlib.import_module("bitsandbytes").__version__ if found else None
    return {"gpu": card, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__, "bitsandbytes": version, "qcompile": qcompile.__version__, "model": args.model, "rank": RANK, "weight": NF4}


def case(args: argparse.Namespace, tokens: int, checkpointing: bool, peers: bool) -> Row:
    """One row: ours, bitsandbytes, and bitsandbytes compiled."""
    row: Row = {"tokens": tokens, "checkpointing": checkpointing}
    runs: dict[str, Callable[[nn.Module, bool], nn.Module]] = {"ours": ours}
    if peers:
        runs |= {"bitsandbytes": lambda m, c: theirs(m, c, False), "bitsandbytes_compiled": lambda m, c: theirs(m, c, True)}
    for name, make in runs.items():
        torch.compiler.reset()
        try:
            row[name] = train(make, args, tokens, checkpointing)
        except Exception as error:  # a row that fails is a row, too
            row[name] = {"right": False, "failed": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps({"tokens": tokens, "checkpointing": checkpointing, name: row[name]}), flush=True)
    mine, peer = row["ours"], row.get("bitsandbytes", {})
    if mine["right"] and peer.get("right"):
        row["peak_ratio"], row["speed"] = round(mine["peak_gb"] / peer["peak_gb"], 3), round(peer["ms"] / mine["ms"], 2)
        row["met"] = row["peak_ratio"] < PEAK_GOAL and row["speed"] >= SPEED_GOAL
    return row


def main(arguments: list[str] | None = None) -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="8B", help="a shape of cases.LLAMAS")
    cli.add_argument("--device", default="cuda")
    cli.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases, from the first")
    cli.add_argument("--seconds", type=float, default=230, help="no further case is begun after so many")
    cli.add_argument("--json", type=Path)
    args = cli.parse_args(arguments)
    began = time.perf_counter()
    result: Row = {"about": about(args), "goals": {"peak_ratio": PEAK_GOAL, "speed": SPEED_GOAL}, "check": check(args, *CASES[0]), "rows": []}
    print(json.dumps({"about": result["about"], "check": result["check"]}), flush=True)
    for tokens, checkpointing in CASES[: args.cases] if result["check"]["right"] else ():
        if time.perf_counter() - began > args.seconds:
            break
        result["rows"].append(case(args, tokens, checkpointing, result["about"]["bitsandbytes"] is not None))
        result["seconds"] = round(time.perf_counter() - began, 1)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["check"]["right"] and all(row["ours"]["right"] for row in result["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
