"""FP8 training in one line more than the loop had: forward in E4M3, backward in E5M2, Adam's moments in 8 and 16 bits. `python examples/fp8_training.py`

A small Llama learns Python from nothing, twice from the same start on the same tokens: once as it is (bf16 autocast on a GPU, fp32 elsewhere) with torch's AdamW, and once with every linear of its
layers multiplying in FP8, scaled by histories that the compiled graph itself keeps (delayed scaling; Micikevicius et al. 2022), and with FP8-LM's optimizer (Peng et al. 2023). Halfway the run is
saved; a second model takes it up and ends bit for bit where the first did:

    fast = torch.compile(model, backend="qcompile", options={"train": "fp8(scaling='delayed')"})    # or 'tensor', or 'row': the scales of now
    optimizer = FP8AdamW(model.parameters(), lr=1e-3)
    for batch in batches:
        fast(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "histories": qcompile.train.state_dict(fast)}, path)
    ...
    qcompile.train.load_state_dict(fast, saved["histories"])

On a GPU of compute capability 8.9 or more the products run on FP8 tensor cores. Elsewhere, as on a CPU, they are emulated: the same numbers, slower, and said in a warning. The head and
the embedding are as they were, since only the layers are compiled; `"ignore"` does the same for a model that is compiled whole.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qcompile
from qcompile.data import STDLIB_LM
from qcompile.train.optim import FP8AdamW

CONTEXT = 128


def corpus(tokenizer, device: str) -> torch.Tensor:
    """Tokens of some files of this Python's standard library, one row."""
    texts = [path.read_text("utf-8", errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]]
    return tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[0].to(device)


class Training:
    """One model, its optimizer, and the loop. ``train``: what the layers are compiled to train in; None: nothing, and torch's AdamW."""

    def __init__(self, train: str | None, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(STDLIB_LM, num_hidden_layers=args.layers)
        self.model, self.args, self.step = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(args.device).train(), args, 0
        for layer in self.model.model.layers if train else ():  # one small graph for all layers
            layer.compile(backend="qcompile", options={"train": train, "lower": args.lower})
        self.optimizer = (FP8AdamW if train else torch.optim.AdamW)(self.model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def run(self, data: torch.Tensor, steps: int, name: str) -> list[float]:
        """Go on by ``steps`` steps; the loss of each. What a step reads depends on its number alone."""
        losses = []
        for _ in (bar := tqdm(range(steps), desc=name, mininterval=1.0)):
            starts = torch.randint(len(data) - CONTEXT, (self.args.batch, 1), generator=torch.Generator().manual_seed(self.step)).to(data.device)
            ids = data[starts + torch.arange(CONTEXT, device=data.device)]
            with torch.autocast(data.device.type, torch.bfloat16, enabled=data.is_cuda):  # a CPU multiplies faster in float32
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        return losses

    def state_bytes(self) -> int:
        """What the optimizer keeps beside the weights."""
        return sum(t.nbytes for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t))

    def save(self, path: Path) -> None:
        """All that the next step depends on."""
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "histories": qcompile.train.state_dict(self.model), "step": self.step}, path)

    def load(self, path: Path) -> None:
        """Go on from there."""
        saved = torch.load(path)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        qcompile.train.load_state_dict(self.model, saved["histories"])
        self.step = saved["step"]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--steps", type=int, default=60)
    cli.add_argument("--batch", type=int, default=4)
    cli.add_argument("--layers", type=int, default=2)
    cli.add_argument("--lower", default="inductor", help="eager: run the quantized graphs by their references, nothing is compiled to C++")
    cli.add_argument("--scaling", default="delayed", help="delayed, tensor or row")
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = cli.parse_args()
    began = time.perf_counter()
    data = corpus(AutoTokenizer.from_pretrained(STDLIB_LM), args.device)
    half = args.steps // 2

    name = "bf16" if data.is_cuda else "fp32"
    plain = Training(None, args)
    plain_losses = plain.run(data, args.steps, name)
    how = f"fp8(scaling={args.scaling!r}, history=16)"
    with tempfile.TemporaryDirectory() as folder:
        first = Training(how, args)
        fp8_losses = first.run(data, half, "FP8")
        first.save(Path(folder) / "half.pt")
        fp8_losses += first.run(data, args.steps - half, "FP8, second half")
        second = Training(how, args)
        second.load(Path(folder) / "half.pt")
        resumed = second.run(data, args.steps - half, "FP8, resumed")

    last = max(1, args.steps // 6)
    mean, mean8 = (sum(losses[-last:]) / last for losses in (plain_losses, fp8_losses))
    print(f"loss of the first step {plain_losses[0]:.3f}; of the last {last}: {name} {mean:.3f}, FP8 {mean8:.3f} ({mean8 / mean - 1:+.1%})")
    print(f"state of the optimizer: AdamW {plain.state_bytes() / 1e6:.1f} MB, FP8AdamW {first.state_bytes() / 1e6:.1f} MB")
    met = {role: sum(counts.get(role, 0) for counts in qcompile.train.overflows(first.model).values()) for role in ("input", "weight", "gradient")}
    print(f"tensors with values beyond a scale that their history gave, in {args.steps} steps of {7 * args.layers} linears: {', '.join(f'{n} as {role}' for role, n in met.items())}; these saturate")
    print(f"resumed halfway: {'the same losses, bit for bit' if resumed == fp8_losses[half:] else 'OTHER losses'}; {time.perf_counter() - began:.0f} s in all")
    if resumed != fp8_losses[half:]:
        raise SystemExit("the resumed run is not the one that was saved")


if __name__ == "__main__":
    main()
