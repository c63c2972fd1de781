"""Runs the attention template in Triton's interpreter, in a process of its own: prints the error of each case, its parts combined by their template. Outputs are poisoned, sizes fill no tile."""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import math

import torch
from standalone import load, render

from qcompile.kernels import attention

# batch, heads, key heads, queries, keys, columns, kind of mask, parts
CASES = [
    (1, 4, 2, 1, 70, 32, "", 1), (2, 4, 2, 1, 70, 32, "prefix", 1), (2, 4, 2, 1, 70, 32, "prefix", 4), (1, 6, 2, 3, 45, 24, "random", 2), (2, 4, 4, 1, 33, 16, "float", 2), (1, 4, 1, 2, 1100, 32, "window", 4),
    (1, 4, 2, 5, 50, 40, "heads", 2), (2, 3, 1, 1, 20, 16, "nothing", 2), (1, 16, 1, 1, 40, 32, "random", 2), (1, 4, 2, 1, 16, 16, "padded", 4),
]  # fmt: skip


def mask_of(kind: str, b: int, h: int, q: int, s: int) -> torch.Tensor | None:
    at = torch.arange(s)
    if kind == "":
        return None
    if kind in ("float", "heads"):
        return torch.randn(b, h if kind == "heads" else 1, q, s).masked_fill(torch.rand(b, 1, q, s) < 0.3, -math.inf)
    seen = {"prefix": at < s // 3 + 1, "window": (at > s - 40) & (at < s - 5), "padded": at >= 7, "nothing": at < 0, "random": torch.rand(b, 1, q, s) < 0.4}[kind]
    return seen.expand(b, 1, q, s).clone()


def check(b: int, h: int, g: int, q: int, s: int, d: int, kind: str, split: int, looks: bool) -> float:
    tensors = {"Q": torch.randn(b, h, q, d).half(), "K": torch.randn(b, g, s, d).half(), "V": torch.randn(b, g, s, d).half()}
    mask = mask_of(kind, b, h, q, s)
    if mask is not None:
        tensors["MASK"] = mask
    case = attention.case(tensors["Q"], tensors["K"], tensors["V"], mask, 0.3)
    rows = case.rows
    assert rows is not None
    config = {"BLOCK": 16, "ROWS": max(16, 1 << rows.bit_length()), "COLUMNS": 1 << (d - 1).bit_length(), "SPLIT": split, "SCALE": 0.3 * math.log2(math.e)}
    shape = (split, b, g, rows + (split > 1), d)
    out = torch.full(shape, math.nan)
    template = attention.source(case, h, g, split > 1, kind == "heads", looks)
    run = load(render(template, {name: tuple(t.shape) for name, t in tensors.items()}, list(config), "tl.float32", shape[1:]))
    run[(split * b * g,)](*tensors.values(), out, **config)
    y = out[0]
    if split > 1:
        y = torch.full((b, g, rows, d), math.nan)
        combine = load(render(attention.COMBINE, {"PARTS": shape}, ["SPLIT", "COLUMNS"], "tl.float32", y.shape))
        combine[(b * g * rows,)](out, y, SPLIT=split, COLUMNS=config["COLUMNS"])
    exact = torch.nan_to_num(attention.reference(*(tensors[n].double() for n in "QKV"), mask if mask is None or mask.dtype == torch.bool else mask.double(), 0.3))
    y = y.reshape(b, h, q, d).double()
    return float((y - exact).norm() / max(float(exact.norm()), 1e-9)) if bool(exact.any()) else float(y.abs().max())


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps([[*case, looks, check(*case, looks)] for case in CASES for looks in ((False,) if case[6] in ("", "heads") else (True, False))]))
