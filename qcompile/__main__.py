"""``python -m qcompile recipes|formats|kernels|methods|training``: the tables, as Markdown."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence

import torch

from qcompile.core.estimators import ESTIMATORS
from qcompile.core.formats import FORMATS, LEARNED
from qcompile.core.ranges import RANGES
from qcompile.core.recipe import RECIPES, Choice, Method
from qcompile.core.scheme import Scheme
from qcompile.kernels import OPS
from qcompile.kernels.op import Case
from qcompile.passes import SOLVERS, TRAININGS, TRANSFORMS, outliers
from qcompile.solve import SETTINGS, check, first_needs, then_needs

CITED = re.compile(r"[A-Z]\w+ et al\. \d{4}(?: \(arXiv [\d.]+\))?|(?:(?<=: )|(?<=\())[A-Z]\w+ \d{4}|AIMET|llm-compressor")
"""Papers by author and year (a single author after a colon or in brackets), and programs that a method was taken from."""


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
    return table(("format", "bits", "kind", "least", "greatest"), [(f"`{f.name}`", f.bits, f.kind, f"{f.lo:g}", f"{f.hi:g}") for f in (*FORMATS.values(), *LEARNED.values())])


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


def methods() -> str:
    """Steps of recipes: kind, arguments with defaults, statistics of the input that they read, sources cited by the docstrings."""
    rows = [_step("transform", Method(name), _defaults(t.fn), _file(t.fn)) for name, t in TRANSFORMS.items()]
    rows += [_step("solver", Method(name), _defaults(s.fn), _file(s.fn)) for name, s in SOLVERS.items()]
    for name, arguments in SETTINGS.items():
        if name == "range":
            rows += [_step("range rule", Method(name, (("rule", rule),)), {}, inspect.getdoc(fn) or "") for rule, fn in RANGES.items()]
        else:
            file = importlib.import_module(f"qcompile.passes.{name}")
            known = _defaults(outliers.columns) if name == "outliers" else {}
            rows.append(_step("setting", Method(name), {key: known.get(key, "") for key in arguments}, inspect.getdoc(file) or ""))
    return table(("step", "kind", "arguments", "statistics", "source"), rows)


def _step(kind: str, method: Method, arguments: Mapping[str, str], docstring: str) -> tuple[str, ...]:
    check([method])
    choice = Choice(Scheme.parse("int8.row"), Scheme.parse("int8.tensor.static") if method.name == "range" else None, "", (method,))
    shown = ", ".join(key + value for key, value in arguments.items())
    needs = ", ".join(dict.fromkeys((*first_needs(choice), *then_needs(choice))))
    return f"`{method}`", kind, f"`{shown}`" if shown else "", needs or "none", sources(docstring) or "-"


def _defaults(fn: Callable[..., object]) -> dict[str, str]:
    """Arguments that have a default that says something -> `=default`; not those that a recipe cannot name."""
    given = {p.name: p.default for p in inspect.signature(fn).parameters.values() if p.default is not p.empty and p.name not in ("stats", "name")}
    return {name: f"={value!r}" for name, value in given.items()}


def _file(fn: Callable[..., object]) -> str:
    return inspect.getdoc(inspect.getmodule(fn)) or ""


def sources(docstring: str) -> str:
    """Papers and programs that a docstring cites, in order, each once and in its longest spelling."""
    found: dict[str, str] = {}
    for text in CITED.findall(" ".join(docstring.split())):
        key = text.partition(" (")[0]
        found[key] = max(found.get(key, ""), text, key=len)
    return "; ".join(found.values())


def training() -> str:
    """What ``options["train"]`` takes: training recipes with their arguments and defaults, and estimators."""
    rows = [(f"`{t.name}`", ", ".join(f"`{name}={default!r}`" for name, (default, _) in t.arguments.items()), t.doc) for t in TRAININGS.values()]
    rows += [(f"`{e.name}`", f"learns {e.learns or 'nothing'}", f"estimator of `qat`: {e.doc}") for e in ESTIMATORS.values()]
    return table(("name", "arguments", "what it is"), rows)


TABLES: dict[str, Callable[[], str]] = {"recipes": recipes, "formats": formats, "kernels": kernels, "methods": methods, "training": training}


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(prog="python -m qcompile", description=__doc__)
    parser.add_argument("table", choices=TABLES)
    print(TABLES[parser.parse_args().table]())


if __name__ == "__main__":
    main()
