"""Runs the template that chooses outlier columns in Triton's interpreter, in a process of its own: prints for each case whether every number is the reference's. Outputs are poisoned."""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from standalone import load, render

from qcompile.kernels import outlier_columns

CASES = {
    "none": (1, 40, 8, 6.0, {}), "some": (1, 40, 8, 6.0, {3: 9.0, 39: -7.0, 0: 6.0}), "as many as fit": (1, 64, 3, 6.0, {5: 9, 1: 8, 63: 7}), "more": (1, 100, 3, 6.0, {99: 9, 50: 8, 7: 30, 2: -25, 0: 6.5}),
    "equal": (1, 33, 3, 6.0, {8: 9, 4: 9, 30: 9, 2: 9, 32: 9}), "equal behind larger": (1, 33, 3, 6.0, {8: 9, 4: 9, 30: 12, 2: -9}), "infinite": (1, 40, 2, 6.0, {8: float("inf"), 9: float("-inf"), 3: 50}),
    "not a number": (3, 40, 4, 6.0, {8: float("nan"), 9: 8}), "rows": (5, 70, 4, 1.5, {}), "many rows": (16, 50, 6, 2.0, {}), "all but one": (2, 40, 39, 0.0, {}), "no threshold": (1, 40, 5, 0.0, {}), "one": (1, 2, 1, 6.0, {1: 7}),
}  # fmt: skip


def check(rows: int, k: int, count: int, threshold: float, large: dict[int, float]) -> bool:
    x = torch.randn(rows, k).clamp(-3, 3).half()
    for column, value in large.items():
        x[rows // 2, column] = value
    c = outlier_columns.case(x, count, threshold)
    config = {name: value for name, value in outlier_columns.blocks(c, threshold).items() if name.isupper()}
    out = torch.full((k + count + 1,), -77, dtype=torch.int32)
    run = load(render(outlier_columns.SOURCE, {"X": (rows, k)}, list(config), "tl.int32", (k + count + 1,)))
    run[(1,)](x, out, **config)
    return torch.equal(out, outlier_columns.reference(x, count, threshold))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({name: check(*case) for name, case in CASES.items()}))
