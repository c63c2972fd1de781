"""What the plots show, read off matplotlib's own objects."""

from __future__ import annotations

import pytest
import torch

from qcompile import plots
from qcompile.core.stats import new, update_all
from qcompile.report import Calibrated
from qcompile.solve import Observed

pytest.importorskip("matplotlib")


def observed(x: torch.Tensor) -> Observed:
    names = ("absmax", "minmax", "moments", "histogram")
    return Observed(update_all(new(names, x.shape[1]), x), len(x))


def found(**values: object) -> Calibrated:
    return Calibrated(**{**dict(solver="rtn", steps=(), place=None, outliers=(), clip=None, decibels=30.0, tokens=1), **values})


def marked(ax) -> list[int]:
    """Channels drawn in red: the second collection of lines."""
    return [int(segment[0][0]) for segment in ax.collections[1].get_segments()]


X = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
X[:, 5] *= 100


def test_outlying():
    assert plots.outlying(X.abs().amax(0)).tolist() == [5]
    assert plots.outlying(torch.zeros(4)).tolist() == [] and plots.outlying(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 7.9])).tolist() == []
    assert plots.outlying(torch.tensor([1.0, 1.0, 1.0, 7.9, 8.0])).tolist() == [4]


def test_channels_and_outliers():
    figure, words = plots.statistics(observed(X))
    left = figure.axes[0]
    assert [segment[1][1] for segment in left.collections[0].get_segments()] == pytest.approx(X.abs().amax(0).tolist())
    assert marked(left) == [5] and "50 tokens, 16 channels" in words and "1 channels 8 times" in words
    figure, words = plots.statistics(observed(X), found(outliers=(2, 5)))
    assert marked(figure.axes[0]) == [2, 5] and "2 outlier columns in 16 bits" in words


@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_histogram_counts_every_value(scale):
    right = plots.statistics(observed(X * scale))[0].axes[1]
    counts, edges, _ = right.patches[0].get_data()
    assert sum(counts) == X.numel() and len(counts) <= plots.POINTS
    assert edges[0] <= float((X * scale).min()) and float((X * scale).max()) <= edges[-1]


def test_clip_is_drawn_where_it_is_one_of_these_values():
    figure, words = plots.statistics(observed(X), found(clip=(-3.0, 3.5)))
    assert [line.get_xdata()[0] for line in figure.axes[1].lines] == [-3.0, 3.5] and words.endswith("clipped to [-3, 3.5]")
    figure, words = plots.statistics(observed(X), found(clip=(-3.0, 3.5), place="norm: in n"))
    assert not figure.axes[1].lines and words.endswith("once smoothed")


def test_nothing_global_changes():
    import sys

    before = set(sys.modules)
    plots.statistics(observed(X))
    assert "matplotlib.pyplot" not in set(sys.modules) - before
