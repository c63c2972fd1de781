"""How long quantizing a large model takes on a GPU, and how much memory: a Llama of the 8B shape with random weights made on the device. `python benchmarks/solve.py [--recipe W4A16_GPTQ ...]`.

First a check: the same recipes on a small model of the same classes, solved on the GPU and on the CPU, must agree in what they leave of the output. Then times: recording, solving, installing, seconds for each
kind of site, peak memory beyond the model. What the numbers do not say: weights and tokens are random, so that accuracy means nothing here; `benchmarks/accuracy.py` has that.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import VOCABULARY
from gpu_model import build
from revision import commit

import qcompile

RESULTS = Path(__file__).parent / "results" / "h200" / "solve.json"
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "num_hidden_layers": 2}
GOALS = {"W4A16_GPTQ": {"seconds": 360, "gib": 12.0}, "W4A16": {"seconds": 5}}
"""Of the whole 8B shape with 128 x 2,048 tokens."""


def tokens(count: int, length: int, vocabulary: int, device: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator).to(device)
    return [{"input_ids": row[None], "use_cache": False, "logits_to_keep": 1} for row in ids]


def check(recipe: str) -> dict[str, float | None]:
    """SQNR of the output of a small float32 model, solved on both devices."""
    found = {}
    for device in ("cpu", "cuda"):
        model = build("tiny", torch.float32, "cpu", **SMALL).to(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[device] = qcompile.quantize(model, recipe, tokens(8, 64, 512, device), progress=False).quality.decibels
        torch._dynamo.reset()
    a, b = found.values()
    if a is None or b is None or abs(a - b) > 1.0:
        raise SystemExit(f"{recipe}: the CPU leaves {a} dB and the GPU {b} dB; nothing is timed")
    return found


def measure(recipe: str, layers: int, count: int, length: int) -> dict[str, Any]:
    """Seconds and GiB of one run."""
    model = build("8B", num_hidden_layers=layers)
    if not qcompile.find_recipe(recipe).passes:
        count, length = 1, 8  # rounding to nearest reads the graph, not the data
    data = tokens(count, length, VOCABULARY, "cuda")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = qcompile.quantize(model, recipe, data, progress=True, memory="3GiB")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    by_kind: dict[str, float] = defaultdict(float)
    for line in outcome.solved:
        by_kind[line.name.rpartition(".")[2]] += line.seconds
    row = {
        "recipe": recipe, "layers": layers, "tokens": count * length, "seconds": round(seconds, 2),
        "seconds_by_step": {**{step: round(s, 2) for step, s in outcome.seconds.items()}, "installing": round(seconds - sum(outcome.seconds[s] for s in ("recording", "solving")), 2)},
        "seconds_by_linear": {k: round(v, 2) for k, v in by_kind.items()},
        "model_gib": round(held / 2**30, 2), "peak_beyond_model_gib": round((torch.cuda.max_memory_allocated() - held) / 2**30, 2), "sites": len(outcome.solved),
        "output_decibels": outcome.quality.decibels,
    }  # fmt: skip
    del model, outcome
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return row


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="*", default=list(GOALS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for recipe in given.recipe:
        checked = check(recipe)
        row = measure(recipe, given.layers, given.count, given.length) | {"check_decibels": checked, "commit": commit()}
        rows = [r for r in rows if r["recipe"] != recipe] + [row]
        print(json.dumps(row), flush=True)
        about = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(), "gpu": torch.cuda.get_device_name(), "goals": GOALS}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
