"""Pictures of what `run.py gpu` measured, from its JSON and without a GPU: one for each table that has rows. Drawn by `python benchmarks/readme_tables.py gpu --write`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_tables import GROUPS, rows

Report = Mapping[str, Any]


def plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def label(row: Mapping[str, Any]) -> str:
    """Recipe and head."""
    return f"{row['recipe']}, head {row['head']}" if row.get("head") else str(row["recipe"])


def bars(axis: Any, names: Sequence[str], values: Sequence[float], marks: Sequence[float | None], title: str) -> None:
    """Horizontal bars with their values; a goal or a floor is a short black line."""
    axis.barh(range(len(names)), values, color=["lightgray" if name.startswith(("bf16", "eager")) else "tab:blue" for name in names])
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    for i, (value, mark) in enumerate(zip(values, marks)):
        axis.text(value, i, f" {value:,.0f}", va="center", fontsize=7)
        if mark is not None:
            axis.plot([mark, mark], [i - 0.4, i + 0.4], "k-", linewidth=1)
    axis.set_title(title, fontsize=9)
    axis.margins(x=0.15)


def model(report: Report) -> Any:
    """Tokens/s, with the speed at which the weights and the cache could be read as a line."""
    found = rows(report, "model")
    groups = sorted({(r["model"], r["batch"], r["context"]) for r in found})
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plots().subplots(lines, columns, figsize=(4.6 * columns, 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (name, batch, context) in zip(axes.flat, groups):
        mine = [r for r in found if (r["model"], r["batch"], r["context"]) == (name, batch, context)]
        marks = [batch * 1e6 / r["floor_us"] if "floor_us" in r else None for r in mine]
        bars(axis, [label(r) for r in mine], [r["tokens_s"] for r in mine], marks, f"{name}, batch {batch}, context {context}")
    figure.suptitle(f"{report['machine']['gpu']}: tokens/s; lines: the floor, weights and cache read once", fontsize=10)
    return figure


def breakdown(report: Report) -> Any:
    """Stacked microseconds of a step."""
    found = sorted(rows(report, "breakdown", "groups_us"), key=lambda r: (r["batch"], r["context"]))
    figure, axis = plots().subplots(figsize=(9, 0.5 + 0.4 * len(found)))
    left = [0.0] * len(found)
    for kind in (*GROUPS, "head", "gaps"):
        values = [max(r["gaps_us"], 0.0) if kind == "gaps" else r["groups_us"][kind] for r in found]
        axis.barh(range(len(found)), values, left=left, label=kind)
        left = [a + b for a, b in zip(left, values)]
    axis.set_yticks(range(len(found)), [f"{label(r)}, batch {r['batch']}, context {r['context']}" for r in found], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(f"microseconds of a step of {found[0]['layers']} layers")
    axis.legend(fontsize=7)
    axis.set_title(str(report["machine"]["gpu"]), fontsize=10)
    return figure


def moe(report: Report) -> Any:
    """Microseconds against tokens, with the floor and bfloat16."""
    found = [r for r in rows(report, "moe") if r["what"] == "product"] or rows(report, "moe")
    recipes = list(dict.fromkeys(r["recipe"] for r in found))
    figure, axes = plots().subplots(1, len(recipes), figsize=(3.4 * len(recipes), 3.4), sharey=True, squeeze=False)
    for axis, recipe in zip(axes.flat, recipes):
        mine = sorted((r for r in found if r["recipe"] == recipe), key=lambda r: r["m"])
        m = [r["m"] for r in mine]
        axis.plot(m, [r["us"] for r in mine], "o-", label="qcompile")
        axis.plot(m, [r["bf16_us"] for r in mine], "s:", color="gray", label="bfloat16 grouped_mm")
        axis.plot(m, [r["floor_us"] for r in mine], "k--", linewidth=0.8, label="floor")
        axis.set(title=recipe, xscale="log", yscale="log", xlabel="tokens")
    axes.flat[0].legend(fontsize=7)
    axes.flat[0].set_ylabel("microseconds")
    figure.suptitle(f"{report['machine']['gpu']}: experts, one grouped product", fontsize=10)
    return figure


def lines(report: Report) -> Any:
    """Microseconds against rows."""
    found = rows(report, "lines")
    figure, axis = plots().subplots(figsize=(5, 3.4))
    for name in dict.fromkeys(r["recipe"] for r in found):
        mine = sorted((r["m"], r["us"]) for r in found if r["recipe"] == name)
        axis.plot(*zip(*mine), "o-", label=name)
    axis.plot(*zip(*sorted({r["m"]: r["w8a8_us"] for r in found}.items())), "s:", color="gray", label="W8A8")
    axis.set(xscale="log", yscale="log", xlabel="rows of activations", ylabel="microseconds, 4096 -> 14336", title=str(report["machine"]["gpu"]))
    axis.legend(fontsize=7)
    return figure


def prefill(report: Report) -> Any:
    """Milliseconds, goals as lines."""
    found = rows(report, "prefill", "ms")
    figure, axis = plots().subplots(figsize=(6, 0.8 + 0.4 * len(found)))
    bars(axis, [r["recipe"] + (", graph" if r.get("graph") else "") for r in found], [r["ms"] for r in found], [r["goal_ms"] for r in found], f"{report['machine']['gpu']}: ms of {found[0]['tokens']} tokens, {found[0]['model']}; lines: goals")
    return figure


PICTURES: dict[str, tuple[Callable[[Report], Any], str]] = {"model": (model, "us"), "breakdown": (breakdown, "groups_us"), "moe": (moe, "us"), "lines": (lines, "us"), "prefill": (prefill, "ms")}


def drawn(report: Report) -> list[str]:
    """Names of the pictures that the report has rows for."""
    return [name for name, (_, key) in PICTURES.items() if rows(report, name, key)]


def draw(report: Report, folder: Path) -> None:
    """All of them, as PNG files named after their parts."""
    for name in drawn(report):
        figure = PICTURES[name][0](report)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=90)
        plots().close(figure)
