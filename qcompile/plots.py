"""Plots with matplotlib, which is loaded only here: what linears read while calibrating, and bars of a ranking. Figures are made without pyplot, so nothing global changes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompile.core.errors import QcompileError
from qcompile.core.stats import centres
from qcompile.gate import OUTLYING

if TYPE_CHECKING:
    from qcompile.report import Calibrated
    from qcompile.solve import Observed
    from qcompile.statistics import Calibration

BLUE, RED, GREY = "#54aeff", "#cf222e", "#8c959f"
POINTS = 400
"""Steps of a histogram: neighbouring bins are drawn together."""


def canvas(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """(figure, its axes side by side), inches. Raises QcompileError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QcompileError("plots need matplotlib: pip install matplotlib. Everything else works without it.") from error
    figure = Figure(figsize=(width, height), layout="constrained" if columns == 1 else None)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    if columns > 1:  # a layout that is known beforehand takes half the time
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.19, top=0.96, wspace=0.15)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, list(axes)


def png(figure: Any, dpi: int = 100) -> bytes:
    """The figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def inline(figure: Any) -> str:
    """The figure as the address of an image that a page holds itself."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()


def outlying(peak: Tensor) -> Tensor:
    """Indices (C,) of channels whose absolute maximum is ``gate.OUTLYING`` times the median one, zeros apart."""
    alive = peak[peak > 0]
    return (peak >= OUTLYING * alive.median()).nonzero().flatten() if alive.numel() else torch.zeros(0, dtype=torch.int64)


def inputs(calibration: Calibration, found: dict[str, Calibrated]) -> list[tuple[str, str, str]]:
    """(names of the linears that read it, what it shows in words, image) of each input that a calibration saw; ``found`` is what calibration gave linears, by name."""
    kin: dict[tuple[bytes, int], list[str]] = {}
    seen = calibration.statistics()
    for name, one in seen.items():
        kin.setdefault((one.stats["absmax"]["absmax"].numpy().tobytes(), one.tokens), []).append(name)
    shown = []
    for names in kin.values():
        figure, words = statistics(seen[names[0]], next((found[n] for n in names if n in found), None))
        shown.append((", ".join(names), words, inline(figure)))
    return shown


def statistics(seen: Observed, found: Calibrated | None = None) -> tuple[Any, str]:
    """(figure, words) of one input: the range of each channel with outliers marked, and the histogram of all values with the clip that was chosen."""
    peak = seen.stats["absmax"]["absmax"].float().cpu()
    chosen = torch.tensor(found.outliers, dtype=torch.int64) if found is not None and found.outliers else None
    marked = outlying(peak) if chosen is None else chosen
    figure, (left, right) = canvas(11, 2.6, 2)
    wide = max(0.4, min(3.0, 400 / max(len(peak), 1)))
    left.vlines(range(len(peak)), 0, peak.tolist(), color=BLUE, linewidth=wide)
    left.vlines(marked.tolist(), 0, peak[marked].tolist(), color=RED, linewidth=max(1.5, wide))
    left.set_xlabel("channel", fontsize=8)
    left.set_ylabel("largest |x|", fontsize=8)
    if marked.numel():
        left.set_yscale("symlog", linthresh=max(float(peak[peak > 0].median()), 1e-30))
    what = "outlier columns in 16 bits" if chosen is not None else f"channels {OUTLYING:.0f} times above the median one"
    words = f"{seen.tokens} tokens, {len(peak)} channels, largest |x| {float(peak.max()):.4g}, {marked.numel()} {what}"
    clip = found.clip if found is not None else None
    _histogram(right, seen, clip if found is not None and found.place is None else None)
    if found is not None and clip is not None:
        words += f", clipped to [{clip[0]:.4g}, {clip[1]:.4g}]" + (" once smoothed" if found.place is not None else "")
    return figure, words


def _histogram(ax: Any, seen: Observed, clip: tuple[float, float] | None) -> None:
    """Counts of values on a logarithmic axis; red lines where values are clipped."""
    state = seen.stats["histogram"]
    x, counts = centres(state).cpu(), state["counts"].cpu()
    used = counts.nonzero().flatten()
    if used.numel():
        low, high = int(used[0]), int(used[-1]) + 1
        width = float(x[1] - x[0])
        step = max(1, -(-(high - low) // POINTS))
        parts = counts[low:high].split(step)
        ax.stairs([float(p.sum()) for p in parts], [float(x[low]) + (i * step - 0.5) * width for i in range(len(parts) + 1)], fill=True, color=BLUE)
        ax.set_yscale("log")
    for edge in clip or ():
        ax.axvline(edge, color=RED, linewidth=1)
    ax.set_xlabel("value", fontsize=8)
    ax.set_ylabel("count", fontsize=8)


def bars(names: Sequence[str], values: Sequence[float | None], label: str, worst: int, line: float | None = None) -> Any:
    """A figure with a bar for each name, from top to bottom; the first ``worst`` in red; ``line`` marks a value for comparison. ``None`` is a bar of no length."""
    figure, (ax,) = canvas(9, max(1.6, 0.22 * len(names) + 0.8))
    ax.barh(range(len(names)), [v or 0.0 for v in values], color=[RED if i < worst else BLUE for i in range(len(names))], height=0.7)
    ax.set_yticks(range(len(names)), labels=list(names))
    ax.invert_yaxis()
    ax.set_xlabel(label, fontsize=8)
    if line is not None:
        ax.axvline(line, color=GREY, linewidth=1, linestyle="--")
    return figure


def page(title: str, figure: Any, text: str) -> str:
    """One HTML page with a figure and plain text below it."""
    import html

    title, text = html.escape(title), html.escape(re.sub(r"[ \t]+$", "", text, flags=re.M))
    style = "body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; } img { max-width: 100%; } pre { font-size: 12px; }"
    head = f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{style}</style>\n</head>\n'
    return head + f'<body>\n<h1>{title}</h1>\n<img alt="{title}" src="{inline(figure)}">\n<pre>{text}</pre>\n</body>\n</html>\n'
