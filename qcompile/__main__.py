"""``python -m qcompile recipes|formats|kernels``: the tables, as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from qcompile.core.formats import FORMATS
from qcompile.core.recipe import RECIPES
from qcompile.core.scheme import Scheme
from qcompile.kernels import OPS
from qcompile.kernels.op import Case


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def recipes() -> str:
    """Presets: schemes, bits of a 4096 x 4096 weight, what they are."""
    shape = (4096, 4096)
    rows = [(f"`{r.name}`", f"`{r.weight}`", f"`{r.input}`" if r.input else "16 bits", f"{Scheme.parse(r.weight).bits_per_weight(shape):.3f}", r.doc) for r in RECIPES.values()]
    return table(("recipe", "weight", "input", "bits/weight", "what it is"), rows)


def formats() -> str:
    """Number formats: bits, kind, range."""
    return table(("format", "bits", "kind", "least", "greatest"), [(f"`{f.name}`", f.bits, f.kind, f"{f.lo:g}", f"{f.hi:g}") for f in FORMATS.values()])


def kernels() -> str:
    """For each recipe, the kernel on a CPU and on an H200 (sm_90)."""
    rows = []
    for r in RECIPES.values():
        row: list[object] = [f"`{r.name}`"]
        for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
            row.append(_kernel(r.weight, r.input, device, dtype))
        rows.append(row)
    return table(("recipe", "CPU", "GPU (compute capability 9.0)"), rows)


def _kernel(weight: str, given: str | None, device: str, dtype: torch.dtype) -> str:
    x = Scheme.parse(given) if given else None
    op = OPS["scaled_linear" if x else "linear"]
    case = Case(torch.device(device), x.fmt.dtype if x else dtype, Scheme.parse(weight), x, 4096, 4096, 64, capability=(9, 0))
    kernel, reason = op.choose(case)
    return kernel.name if kernel is not None else f"reference: {reason}"


TABLES: dict[str, Callable[[], str]] = {"recipes": recipes, "formats": formats, "kernels": kernels}


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(prog="python -m qcompile", description=__doc__)
    parser.add_argument("table", choices=TABLES)
    print(TABLES[parser.parse_args().table]())


if __name__ == "__main__":
    main()
