"""Train the small language model that ships in `qcompile/data/stdlib_lm/`.

The corpus is the text of CPython's standard library (PSF licence); the tokenizer is a byte-level BPE of 4,096 tokens; the model is a Llama of 6.2 M parameters.
Files are split by a hash of their path: 94 % train, 2 % choose the checkpoint, 4 % are never looked at, and `heldout.txt` is whole files of the latter.

The shipped checkpoint was made in two steps: the corpus of CPython 3.13.0 was packed on a machine that has it, then an H200 read it (torch 2.11, 102 seconds).

    python benchmarks/train_lm.py --stdlib ~/.pyenv/versions/3.13.0/lib/python3.13 --pack .corpus/stdlib.json.xz
    python benchmarks/train_lm.py --corpus .corpus/stdlib.json.xz --out qcompile/data/stdlib_lm

The defaults are its settings: 6,000 steps of 65,536 tokens, 50 readings of the corpus. With `--dropout 0.1` it overfits (held-out perplexity 9.04, not 8.19).
The seed is fixed, so a second run repeats the first up to the GPU's rounding. `--seconds` bounds the whole program: after 40 steps the step time is known,
and the steps taken (the cosine's length) are `--steps` or what still fits. The folder's README.md is written by hand.
"""

import argparse
import hashlib
import json
import lzma
import math
import platform
import re
import sysconfig
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import tqdm
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.hooks import RemovableHandle
from transformers.integrations.sdpa_attention import sdpa_attention_forward

END = "<|endoftext|>"
VOCABULARY = 4096
LLAMA: dict[str, Any] = {  # every dimension is a multiple of 128: 6,229,248 parameters
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SKIP = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}  # the last two are tables, not code
MINIMUM = 8_000_000  # characters; a standard library without its sources (a zip, a stripped image) is not a corpus

Corpus = dict[str, str]  # path relative to the standard library -> text


def readable(text: str) -> bool:
    """Code and prose, not tables of numbers, escapes or generated lines."""
    return len(text) >= 200 and len(re.findall(r"[\d\\,]", text)) <= 0.10 * len(text) and max(map(len, text.splitlines())) <= 400


def read_stdlib(folder: Path) -> Corpus:
    corpus: Corpus = {}
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if SKIP & set(name.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").strip() + "\n"
        except UnicodeDecodeError:
            continue
        if readable(text) and text not in seen:
            seen.add(text)
            corpus[name.as_posix()] = text
    return corpus


def read_corpus(bundle: Path | None, stdlib: Path) -> Corpus:
    corpus: Corpus = json.loads(lzma.decompress(bundle.read_bytes())) if bundle else read_stdlib(stdlib)
    size = sum(map(len, corpus.values()))
    if size < MINIMUM:
        raise SystemExit(
            f"{bundle or stdlib} holds {size:,} characters of .py files, {MINIMUM:,} are needed: name a full one with --stdlib, or a packed one with --corpus"
        )
    return corpus


def rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"python/{name}".encode()).digest()[:4], "big")


def part(name: str) -> str:
    return "heldout" if rank(name) % 100 < 4 else "valid" if rank(name) % 100 < 6 else "train"


def excerpt(corpus: Corpus, size: int = 120_000) -> tuple[str, list[str]]:
    """About `size` characters of whole held-out library files (no tests), in the order of their hash."""
    chosen: list[str] = []
    total = 0
    for name in sorted(corpus, key=rank):
        fits = 1_500 <= len(corpus[name]) <= 48_000 and total + len(corpus[name]) <= 1.02 * size
        if part(name) == "heldout" and "test" not in name and fits:
            chosen.append(name)
            total += len(corpus[name])
    return "\n\n".join(corpus[name] for name in chosen), chosen


def train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False))
    if raw.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the corpus gave a vocabulary of {raw.get_vocab_size()}, not {VOCABULARY}")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False, padding_side="left"
    )


def tokens_of(tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str], device: str) -> torch.Tensor:
    """One row of tokens, each text closed by END."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids, device=device)


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor, context: int, batch: int = 16) -> float:
    """Windows of `context` tokens side by side, each read without what came before it; the ragged last one is dropped."""
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    total = 0.0
    for rows in windows.split(batch):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(windows) * (context - 1)))


def build_model(context: int, dropout: float, end: int) -> tuple[transformers.LlamaForCausalLM, list[RemovableHandle]]:
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=context, bos_token_id=end, eos_token_id=end, pad_token_id=end, **LLAMA)
    transformers.AttentionInterface.register("causal", sdpa_attention_forward)  # "sdpa" builds a mask under torch.compile, which rules flash attention out
    config._attn_implementation = "causal"
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return model, drop_branches(model, dropout) if dropout else []


def drop_branches(model: torch.nn.Module, dropout: float) -> list[RemovableHandle]:
    """The corpus is read dozens of times, and Llama has no dropout on its residual branches: hooks add it for the training."""

    def drop(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, dropout, module.training)

    branches = [module for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    return [module.register_forward_hook(drop) for module in branches]


def build_optimizer(model: torch.nn.Module, rate: float, device: str) -> torch.optim.AdamW:
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device == "cuda")


def next_token_loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Cross entropy of windows (B, context + 1), each read from its first token to its last but one."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def windows(data: torch.Tensor, context: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """(B, context + 1) tokens that begin anywhere."""
    starts = torch.randint(len(data) - context, (batch, 1), generator=generator, device=data.device)
    return data[starts + torch.arange(context + 1, device=data.device)]


def descend(loss: torch.Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> torch.Tensor:
    """One step at a learning rate, with gradients clipped to a norm of 1; the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def warmup_of(steps: int) -> int:
    return min(200, steps // 10 + 1)


def scale_at(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: transformers.LlamaForCausalLM, data: torch.Tensor, valid: torch.Tensor, args: argparse.Namespace, deadline: float) -> dict[str, float]:
    """Leaves the best weights, by perplexity on `valid`, in the model."""
    device, context = args.device, model.config.max_position_embeddings
    cast = torch.autocast(device, torch.bfloat16)
    optimizer = build_optimizer(model, args.rate, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    steps, probe, warmup = args.steps, 40, warmup_of(args.steps)
    best, recent = math.inf, math.nan
    kept: dict[str, torch.Tensor] = {}
    losses: list[torch.Tensor] = []
    started = mark = time.perf_counter()
    bar = tqdm.tqdm(total=steps, unit="step", mininterval=2.0)
    step = 0
    while step < steps:
        model.train()
        with cast:
            loss = loss_of(model, windows(data, context, args.batch, generator))
        losses.append(descend(loss, model, optimizer, args.rate * scale_at(step, steps, warmup)))
        step += 1
        bar.update()
        if step == probe // 2:
            loss.item()
            mark = time.perf_counter()
        if step == probe:
            loss.item()
            now = time.perf_counter()
            pace = (now - mark) / (probe - probe // 2)
            steps = bar.total = int(min(steps, probe + max(0.0, 0.95 * (deadline - now) / pace)))
            tqdm.tqdm.write(f"{pace * 1e3:.1f} ms a step, {steps} steps")
        if time.perf_counter() > deadline:
            steps = step
        if step % max(1, steps // 20) == 0 or step == steps:
            model.eval()
            with cast:
                measured = perplexity(model, valid, context)
            if measured < best:
                best, kept = measured, {name: p.detach().clone() for name, p in model.state_dict().items()}
            recent = torch.stack(losses[-50:]).mean().item()
            tqdm.tqdm.write(
                f"step {step:5d}  loss {recent:.3f}  valid perplexity {measured:.3f}{'  *' if measured == best else ''}  {time.perf_counter() - started:.0f} s"
            )
    bar.close()
    model.load_state_dict(kept)
    model.eval()
    seen, seconds = step * args.batch * context, time.perf_counter() - started
    return {"steps": step, "train_loss": recent, "valid_perplexity": best, "tokens_seen": seen, "train_seconds": seconds}


def report(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """The saved folder, loaded again in fp32: what a reader of `heldout.txt` will measure."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer((folder / "heldout.txt").read_text("utf-8"), return_tensors="pt").input_ids[0].to(args.device)
    prompt = tokenizer("import os\n\ndef ", return_tensors="pt").to(args.device)
    written = model.generate(**prompt, max_new_tokens=80, do_sample=False)
    print(tokenizer.decode(written[0]), flush=True)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_perplexity": perplexity(model, tokens, args.context),
        "heldout_tokens": len(tokens),
        "versions": {"python": platform.python_version(), **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
    }


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="the standard library to read (default: this Python's)")
    cli.add_argument("--corpus", type=Path, help="a corpus made by --pack, instead of --stdlib")
    cli.add_argument("--pack", type=Path, help="write the corpus to this .json.xz file and stop")
    cli.add_argument("--out", type=Path, default=Path("stdlib_lm"), help="the folder to write")
    cli.add_argument("--steps", type=int, default=6000)
    cli.add_argument("--seconds", type=float, help="bound on the whole program's time; fewer steps are taken if need be")
    cli.add_argument("--batch", type=int, default=64, help="windows a step")
    cli.add_argument("--context", type=int, default=1024)
    cli.add_argument("--rate", type=float, default=2e-3, help="the peak learning rate")
    cli.add_argument("--dropout", type=float, default=0.2)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cli.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return cli.parse_args()


def main() -> None:
    began, args = time.perf_counter(), arguments()
    corpus = read_corpus(args.corpus, args.stdlib)
    if args.pack:
        args.pack.parent.mkdir(parents=True, exist_ok=True)
        args.pack.write_bytes(lzma.compress(json.dumps(corpus).encode()))
        raise SystemExit(f"{args.pack}: {len(corpus)} files, {sum(map(len, corpus.values())):,} characters")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    texts = {which: [text for name, text in corpus.items() if part(name) == which] for which in ("train", "valid", "heldout")}
    tokenizer = train_tokenizer(texts["train"])
    data, valid = (tokens_of(tokenizer, texts[which], args.device) for which in ("train", "valid"))
    valid = valid[: 128 * args.context]  # library files come first
    print(f"{len(corpus)} files, {len(data):,} training tokens, {time.perf_counter() - began:.0f} s", flush=True)

    model, hooks = build_model(args.context, args.dropout, tokenizer.eos_token_id)
    result: dict[str, object] = {**train(model.to(args.device), data, valid, args, began + (args.seconds or math.inf) - 15)}
    for hook in hooks:
        hook.remove()
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    text, names = excerpt(corpus)
    (args.out / "heldout.txt").write_bytes(text.encode())
    settings = {key: getattr(args, key) for key in ("batch", "context", "rate", "dropout", "seed")}
    result |= report(args.out, args) | {"settings": settings, "train_tokens": len(data), "corpus_files": len(corpus), "heldout_files": names}
    result["seconds"] = time.perf_counter() - began
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for key in ("train_loss", "heldout_perplexity", "valid_perplexity", "tokens_seen", "steps", "seconds", "parameters"):
        print(f"{key:20s} {result[key]:,.4g}" if isinstance(result[key], float) else f"{key:20s} {result[key]:,}")


if __name__ == "__main__":
    main()
