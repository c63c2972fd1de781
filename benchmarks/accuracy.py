"""How much accuracy each method costs: qcompile's against the textbook's in float64, on three models. `python benchmarks/accuracy.py [--model encoder] [--rows w4-gptq ...] [--missing]`.

A row of `accuracy_rows.py` is a method twice: as `textbook.py` defines it, and as options of `torch.compile(backend="qcompile")`, run by the eager references so that the arithmetic is what is measured, not a kernel.
Models, their data and what judges them are in `accuracy_models.py`: KL divergence of the next token's distribution (lm, lm-outliers), 1 - cosine of sentence embeddings (encoder). The goals are judged at the end.

The results go to `benchmarks/results/cpu/accuracy.json`, row by row, with a plot for each model beside it; rows that are not run keep what the file has. `--missing` runs what the file lacks: a result
counts where model, data, options and the textbook's method are the same, whatever the commit. Exits with 1 where a goal that was measured is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import textbook
import torch
from accuracy_models import SUBJECTS, Subject, fingerprint
from accuracy_rows import GOALS, ROWS, SPLIT, SPLIT_COLUMNS, TEXTBOOK_RATIO, Goal, Row
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import qcompile
from qcompile.core.recipe import Choice
from qcompile.core.scheme import Scheme
from qcompile.options import Options
from qcompile.solve import first_needs, then_needs

RESULTS = Path(__file__).parent / "results" / "cpu" / "accuracy.json"
Result = dict[str, Any]


# --- one row on one model --------------------------------------------------------------------------------------------


def spared(row: Row) -> Callable[[str], bool]:
    return lambda name: name.endswith(row.spare) if row.spare else False


def needs_data(row: Row) -> bool:
    """Some step, or a static range, wants statistics."""
    recipe = Options.parse(row.options).recipe
    x = Scheme.parse(recipe.input) if recipe.input else None
    choice = Choice(Scheme.parse(recipe.weight), x, "", recipe.methods)
    return bool(first_needs(choice) or then_needs(choice))


def run_textbook(model: nn.Module, row: Row, subject: Subject, reference: Sequence[Tensor]) -> Result:
    start = time.perf_counter()
    assert row.method is not None
    quantized = textbook.quantize(model, row.method, subject.calibration, spared(row))
    solved = time.perf_counter()
    metrics = subject.metrics(reference, subject.read(quantized), subject.evaluation)
    return {**metrics, "int8": textbook.integer_share(quantized), "seconds": solved - start, "read_seconds": time.perf_counter() - solved}


def run_ours(model: nn.Module, row: Row, calibration: Sequence[dict[str, Any]]) -> Callable[..., Any]:
    """The model compiled by qcompile, calibrated where the row's method needs data; `equalize` changes the model itself, offline."""
    torch.compiler.reset()
    if any(m.name == "equalize" for m in Options.parse(row.options).recipe.methods):
        qcompile.quantize(model, Options.parse(row.options).recipe, calibration[:1], progress=False)
    fast: Callable[..., Any] = torch.compile(model, backend="qcompile", options=row.options)
    if needs_data(row):
        with torch.no_grad(), qcompile.calibrate(fast, progress=False):
            for batch in calibration:
                fast(**batch)
    return fast


def integer_share(model: nn.Module, row: Row, subject: Subject) -> float | None:
    """The share of multiplications in int8: of a dynamic split each linear has a fixed number of columns outside. None where calibration chose them."""
    if "outliers(" not in str(row.ours):
        return 1.0
    if SPLIT not in row.ours["passes"]:
        return None
    shapes = [m.weight.shape for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in subject.kept and not spared(row)(name)]
    return 1 - sum(n * min(SPLIT_COLUMNS, k) for n, k in shapes) / sum(n * k for n, k in shapes)


def measure_ours(row: Row, subject: Subject, reference: Sequence[Tensor]) -> Result:
    start = time.perf_counter()
    model = subject.build()
    fast = run_ours(model, row, subject.calibration)
    solved = time.perf_counter()
    metrics = subject.metrics(reference, subject.read(fast), subject.evaluation)
    return {**metrics, "int8": integer_share(model, row, subject), "seconds": solved - start, "read_seconds": time.perf_counter() - solved}


def cached(folder: Path | None, key: tuple[object, ...], make: Callable[[], Result]) -> Result:
    """`make()`, or what an earlier run with the same key and the same `textbook.py` left in `folder`."""
    if folder is None:
        return make()
    source = Path(textbook.__file__).read_text("utf-8")
    path = folder / (hashlib.sha256(repr((key, torch.__version__, source)).encode()).hexdigest()[:24] + ".json")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    result: Result = json.loads(path.read_text())
    return result


def there(old: Result, row: Row, column: str) -> bool:
    """Whether the rows `old` of the same data have this result, of the same options and method. (Files of before methods were written down count where the options are the same.)"""
    found = old.get("rows", {}).get(row.name, {})
    return column in found and found.get("options") == row.options and (column == "ours" or found.get("method", repr(row.method)) == repr(row.method))


def measure(subject: Subject, rows: Sequence[Row], columns: Sequence[str], cache: Path | None, console: Console, old: Result, missing: bool, keep: Callable[[Result], None]) -> Result:
    """All rows on one model; with `missing` those that `old` lacks. `keep` gets what there is after each row. A row that fails raises: nothing is left out in silence."""
    model = subject.build()
    reference = subject.read(model)
    data = fingerprint(subject)
    old = old if old.get("data") == data else {}
    out: Result = {"title": subject.title, "metric": subject.metric, "data": data, "fp32": subject.metrics(reference, reference, subject.evaluation), "rows": {}}
    for row in track(rows, subject.name, console=console, transient=True):
        key = (subject.name, data, row.method, row.spare)
        result: Result = {}
        wanted = [c for c in columns if (c == "ours" or row.method is not None) and not (missing and there(old, row, c))]
        if not wanted:
            continue
        if "textbook" in wanted:
            result["textbook"] = cached(cache, key, lambda row=row: run_textbook(model, row, subject, reference))  # type: ignore[misc]
        if "ours" in wanted:
            result["ours"] = measure_ours(row, subject, reference)
        out["rows"][row.name] = {"options": dict(row.options), "method": repr(row.method), **result}
        keep(out)
    return out


# --- goals -----------------------------------------------------------------------------------------------------------


def judge(models: Mapping[str, Result], which: str) -> list[Result]:
    """Goals whose rows were all measured, by the column `which` ("ours" or "textbook"): value, bound, met."""
    found: list[Result] = []

    def best(goal: Goal, names: Sequence[str]) -> float:
        rows = models[goal.model]["rows"]
        key = "int8" if goal.of == "int8" else models[goal.model]["metric"]
        values = [rows[name][which][key] for name in names]
        return math.nan if any(v is None or not math.isfinite(v) for v in values) else min(values)

    for goal in GOALS:
        rows = models.get(goal.model, {}).get("rows", {})
        if not all(which in rows.get(name, {}) for name in (*goal.rows, *goal.than)):
            continue
        value, bound = best(goal, goal.rows), goal.factor * (best(goal, goal.than) if goal.than else 1)
        found.append({"goal": str(goal), "value": value, "bound": bound, "met": value >= bound if goal.of == "int8" else value <= bound})
    if which == "ours":
        for model, bound in TEXTBOOK_RATIO.items():
            for name, row in models.get(model, {}).get("rows", {}).items():
                if "ours" in row and "textbook" in row:
                    value = ratio(row, models[model]["metric"])
                    found.append({"goal": f"{model}: {name} at most {bound:g} x the textbook's", "value": value, "bound": bound, "met": value <= bound})
    return found


def ratio(row: Result, metric: str) -> float:
    return row["ours"][metric] / row["textbook"][metric] if "ours" in row and "textbook" in row else math.nan


# --- output ----------------------------------------------------------------------------------------------------------


def show(model: Result, console: Console) -> None:
    metric, extra = model["metric"], next(key for key in model["fp32"] if key != model["metric"])
    table = Table("row", f"textbook {metric}", extra, "int8", "s", f"ours {metric}", extra, "s", "ratio", title=f"{model['title']}; fp32 {extra} {model['fp32'][extra]:.4f}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in model["rows"].items():
        t, o = row.get("textbook"), row.get("ours")
        theirs = [f"{t[metric]:.3e}", f"{t[extra]:.4f}", f"{t['int8']:.1%}", f"{t['seconds']:.0f}"] if t else ["", "", "", ""]
        ours = [f"{o[metric]:.3e}", f"{o[extra]:.4f}", f"{o['seconds']:.0f}", f"{ratio(row, metric):.3f}"] if o else []
        table.add_row(name, *theirs, *ours)
    console.print(table)


def show_goals(goals: Sequence[Result], which: str, console: Console) -> None:
    table = Table("goal", which, "bound", "", title=f"goals, judged by {which}")
    for g in goals:
        table.add_row(g["goal"], f"{g['value']:.3e}", f"{g['bound']:.3e}", "[green]met[/]" if g["met"] else "[red]missed[/]")
    console.print(table)


def plot(model: Result, path: Path) -> None:
    """Bars on a logarithmic axis: textbook and ours, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, metric = list(model["rows"]), model["metric"]
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.27 * len(names)), layout="constrained")
    columns = [(which, colour) for which, colour in (("textbook", "#8a8f98"), ("ours", "#2f6f9f")) if any(which in row for row in model["rows"].values())]
    for offset, (which, colour) in enumerate(columns):
        at = [i + (offset - (len(columns) - 1) / 2) * 0.4 for i in range(len(names))]
        axis.barh(at, [model["rows"][name].get(which, {}).get(metric, math.nan) for name in names], 0.4 if len(columns) > 1 else 0.7, color=colour, label=which)
    axis.set(xscale="log", yticks=range(len(names)), yticklabels=names, xlabel={"kl": "KL(fp32 || quantized), nats a token", "distance": "1 - mean cosine with fp32"}[metric], title=model["title"])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def markdown(models: Mapping[str, Result]) -> str:
    """The README's table: a line for each method, cosine (textbook beside it) on the encoder, KL divergence on the language models."""
    head = ["method", "options", "encoder: cosine", "textbook", "language model: KL", "with outlier channels: KL"]
    lines = [head, ["---"] * len(head)]
    for row in ROWS:
        found = {name: models.get(name, {}).get("rows", {}).get(row.name, {}) for name in SUBJECTS}
        if not any("ours" in r for r in found.values()):
            continue
        cells = [f"{r[which]['cosine']:.4f}" if which in (r := found["encoder"]) else "" for which in ("ours", "textbook")]
        cells += [f"{found[name]['ours']['kl']:.2g}" if "ours" in found[name] else "" for name in ("lm", "lm-outliers")]
        asked = ", ".join([row.ours.get("recipe", ""), row.ours.get("weight", ""), *(["input " + row.ours["input"]] if row.ours.get("input", "16bit") != "16bit" else []), *row.ours.get("passes", ())])
        lines.append([row.name, f"`{asked.strip(', ')}`", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def versions() -> dict[str, str]:
    import platform

    import numpy
    import tokenizers
    import transformers

    return {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, transformers, tokenizers, numpy, qcompile)}}


def merge(old: Result, new: Result) -> Result:
    """`new` with the rows of `old` that it lacks, where both were measured on the same data; in the order of ROWS."""
    if old.get("data") != new["data"]:
        return new
    rows = {name: {**old["rows"].get(name, {}), **new["rows"].get(name, {})} for name in {**old["rows"], **new["rows"]}}
    return {**new, "rows": {row.name: rows[row.name] for row in ROWS if row.name in rows}}


def main(arguments: Sequence[str] | None = None) -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    cli.add_argument("--rows", nargs="*", help="names of rows (default: all)", choices=[row.name for row in ROWS], metavar="ROW")
    cli.add_argument("--textbook-only", action="store_true", help="without qcompile's column")
    cli.add_argument("--ours-only", action="store_true", help="without the textbook's column, which takes longer")
    cli.add_argument("--missing", action="store_true", help="only what the file of results lacks")
    cli.add_argument("--out", type=Path, default=RESULTS)
    cli.add_argument("--cache", type=Path, help="a folder that keeps the textbook's results for the next run")
    cli.add_argument("--markdown", action="store_true", help="print the table of the results that are there, and run nothing")
    given = cli.parse_args(arguments)
    if given.markdown:
        print(markdown(json.loads(given.out.read_text())["models"]))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    torch.compiler.config.recompile_limit = 256  # every length of sentence may be a graph
    warnings.simplefilter("ignore", qcompile.QcompileWarning)
    before = json.loads(given.out.read_text()) if given.out.exists() else {}
    models: dict[str, Result] = dict(before.get("models", {}))
    which = "textbook" if given.textbook_only else "ours"
    columns = [which] if given.textbook_only or given.ours_only else ["textbook", "ours"]
    for name in given.model:
        rows = [row for row in ROWS if name in row.models and (not given.rows or row.name in given.rows)]
        old = models.get(name, {})

        def keep(new: Result, name: str = name, old: Result = old) -> None:
            models[name] = merge(old, new)
            report = {"versions": versions(), "threads": torch.get_num_threads(), "models": models, "goals": judge(models, which)}
            given.out.write_text(json.dumps(report, indent=1) + "\n")  # row by row: an interruption loses little

        keep(measure(SUBJECTS[name](), rows, columns, given.cache, console, old, given.missing, keep))
        show(models[name], console)
        plot(models[name], given.out.with_name(f"{given.out.stem}-{name}.png"))
    goals = judge(models, which)
    show_goals(goals, which, console)
    return 1 if any(not g["met"] for g in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
