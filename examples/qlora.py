"""QLoRA in one line more than LoRA: the base in 4 bits, adapters beside it. `python examples/qlora.py`

The shipped language model knows Python code. Here it learns the prose of docstrings, by LoRA adapters that PEFT puts beside its linears, while the linears themselves hold 4-bit codes (NF4 with
quantized scales; Dettmers et al. 2023). What requires grad trains in its own dtype; what does not is packed, and with `"release": True` gives its own storage back as soon as it is:

    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    fast = torch.compile(model, backend="qcompile", options={"weight": "nf4.g64/int8.g256", "train": "lora", "release": True})
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    for batch in batches:
        fast(**batch).loss.backward()                    # gradients of the adapters alone, through the dequantized base
        ...
    with torch.no_grad():
        fast(**batch)                                    # the same codes, by the kernels of inference

    model.save_pretrained(folder)                        # the adapter, as PEFT saves it
    qcompile.restore_weights(model)                      # released weights get their dequantized values, which the adapters were trained beside
    merged = model.merge_and_unload()                    # plain linears; quantize them again with qcompile.quantize

Names in the report, in `ignore` and in rules are PEFT's: `...q_proj.base_layer`. With gradient checkpointing take `use_reentrant=False`, and call `model.disable_input_require_grads()` after
`gradient_checkpointing_enable`: the hook that it removes serves reentrant checkpoints only, and Dynamo cannot capture it.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm

import qcompile
from qcompile.data import stdlib_lm

WEIGHT = "nf4.g64/int8.g256"
CONTEXT = 192


def docstrings(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of tokens of the docstrings of this Python's standard library: (to train on, to judge by); every eighth module is for judging."""
    texts: tuple[list[str], list[str]] = ([], [])
    for i, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        tree = ast.parse(path.read_text("utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        texts[i % 8 == 0].extend(text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 200)
    tokens = [tokenizer("\n\n".join(part), return_tensors="pt").input_ids[0] for part in texts]
    train, judge = (t[: len(t) // CONTEXT * CONTEXT].view(-1, CONTEXT) for t in tokens)
    return train, judge


@torch.no_grad()
def loss_of(model, windows: torch.Tensor) -> float:
    """Mean loss of the next token."""
    return float(model(input_ids=windows, labels=windows, use_cache=False).loss)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--steps", type=int, default=40)
    cli.add_argument("--batch", type=int, default=2)
    cli.add_argument("--rank", type=int, default=16)
    cli.add_argument("--lower", default="inductor", help="eager: run the quantized graphs by their references, nothing is compiled to C++")
    args = cli.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()

    base, tokenizer = stdlib_lm()
    train, judge = docstrings(tokenizer)
    judge = judge[:8]
    print(f"loss on docstrings, fp32: {loss_of(base, judge):.3f}")
    model = get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")).train()
    for layer in model.get_base_model().model.layers:  # one small graph for all layers: compiled in seconds. torch.compile(model, ...) makes one large graph, faster once it is there
        layer.compile(backend="qcompile", options={"weight": WEIGHT, "train": "lora", "lower": args.lower})
    model.enable_input_require_grads()  # what the first layer reads requires grad, as what the others read does: else it is compiled once more
    print(f"loss on docstrings, {WEIGHT}: {loss_of(model, judge):.3f}")

    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / args.steps))
    bar = tqdm(range(args.steps), mininterval=2.0)
    for _ in bar:
        ids = train[torch.randint(len(train), (args.batch,))]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    trained = loss_of(model, judge)
    print(f"loss on docstrings, with the adapters: {trained:.3f}")
    packed = qcompile.explain(model, input_ids=judge, labels=judge, use_cache=False).sites
    before, after, sizes = sum(row.bytes_before for row in packed), sum(row.bytes_after for row in packed), sum(p.nbytes for p in adapters)
    freed = qcompile.release_weights(model)
    print(f"the base's linears: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB of codes and scales, {freed / 1e6:.1f} MB released; the adapters: {sizes / 1e6:.1f} MB, and twice that in the optimizer")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = sum(path.stat().st_size for path in Path(folder).iterdir())
        filled = qcompile.restore_weights(model)
        merged = model.merge_and_unload()
        with torch.compiler.set_stance("force_eager"):  # other layers than those that were compiled
            print(f"merged into {filled / 1e6:.1f} MB of dequantized weights: loss {loss_of(merged.eval(), judge):.3f}")
        again = PeftModel.from_pretrained(stdlib_lm()[0], folder)
        print(f"the adapter, {saved / 1e6:.1f} MB of files, beside the base in fp32: loss {loss_of(again, judge):.3f}")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
