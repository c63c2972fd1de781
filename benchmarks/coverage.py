"""How much of each architecture is quantized, in bytes and in FLOPs: `python benchmarks/coverage.py [name ...]` -> `results/cpu/coverage.json`, from which `readme_tables.py coverage` makes the README's table.

What is asked is `qcompile.explain` of one call under W8A8, nothing else: of the model that ships with the package and of the tiny random ones of `tests/tiny_models.py`. Their proportions are not those of
real models (heads are large, most of all): what the table tells is which matrices the backend finds. Rows of names that are not given stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import qcompile
from qcompile.data import stdlib_lm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "coverage.json"
SHIPPED = "the shipped model"
sys.path.insert(0, str(ROOT / "tests"))


def names() -> list[str]:
    """Rows in order."""
    from tiny_models import TINY

    return [SHIPPED, *TINY]


def model_of(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model and one call of it."""
    if name == SHIPPED:
        model, tokenizer = stdlib_lm()
        return model, {"input_ids": tokenizer("import os\n\ndef ", return_tensors="pt").input_ids, "use_cache": False}
    from tiny_models import tiny

    model, inputs = tiny(name)
    return model, inputs


def measure(name: str) -> dict[str, Any]:
    """One row: graphs, linears quantized, shares of bytes and FLOPs, and what keeps 16 bits, by role and by reason."""
    model, inputs = model_of(name)
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", qcompile.QcompileWarning)
        report = qcompile.explain(torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "lower": "eager"}), **inputs)
    t = report.totals
    kept = Counter(_why(row.role, row.reason) for row in report.kept if "embedding table" not in row.reason)
    shares = {"bytes": t.coverage, "flops": t.coverage_flops, "bytes_all": t.coverage_all, "flops_all": t.coverage_flops_all}
    return {"graphs": len(report.graphs), "linears": len(report.sites), **{key: round(value, 6) for key, value in shares.items()}, "kept": dict(sorted(kept.items()))}


def _why(role: str, reason: str) -> str:
    return role if role in ("head", "router") else reason


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The README's table."""
    head = ["model", "graphs", "linears", "bytes", "FLOPs", "bytes, all", "FLOPs, all", "kept in 16 bits"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        kept = ", ".join(f"{count} {why}{'s' if count > 1 else ''}" if " " not in why else why + (f" ({count} times)" if count > 1 else "") for why, count in row["kept"].items())
        lines.append([name, str(row["graphs"]), str(row["linears"]), *(f"{row[key]:.1%}" for key in ("bytes", "flops", "bytes_all", "flops_all")), kept or "-"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("names", nargs="*", help="rows to measure (default: all)")
    given = cli.parse_args(arguments)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in given.names or names():
        rows[name] = measure(name)
        print(name, rows[name], flush=True)
        RESULTS.write_text(json.dumps({n: rows[n] for n in names() if n in rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
