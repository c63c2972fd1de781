"""Cross-layer equalization: where a linear follows another with at most a homogeneous activation between, give row i of the first and column i of the second one range. No data is needed.

    s = sqrt(r1 / r2),   W1 / s,   b1 / s,   W2 * s          (r1: max|row of W1|, r2: max|column of W2|; both become sqrt(r1 r2))

Nagel et al. 2019 (arXiv 1906.04721), section 4.1, equation 11, and high-bias absorption, section 4.1.3, equation 15. Which linears follow which is read off the graph (``pairs``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx

from qcompile.core.errors import OptionError, Skip

from .method import Linears, Transform
from .norms import RELU, Norm, back, before
from .observe import input_of
from .producers import Place, place
from .sites import Site
from .smooth import column_maxima

ROUNDS = 100
"""Sweeps over a chain at most."""
CLOSE = 1e-6
"""A sweep that changes no factor by more has converged."""
REACH = 10
"""Factors of a model's own weights lie within 2**-10 and 2**10, so that no bias and no activation leaves the range of 16 bits on their account."""
BLOCK = 1 << 24
"""Values that are read at a time."""


def equalize(linears: Linears, *, rows: Tensor | None = None, index: Sequence[int] | None = None) -> Tensor:
    """s (K,) float32, positive: ``x / s`` is put in the producer's rows. ``rows`` (N,): max|row| of the producer's weight; ``index``: channel -> row (``Place.index``), all in order by default.

    Raises OptionError where ``rows`` is absent: equalization is between two linears, and only the graph knows the first.
    """
    if rows is None:
        raise OptionError("equalize needs the row maxima of the producer's weight (rows=); for an input without a producer take 'smooth'")
    return factor(rows.float(), column_maxima(linears.weights), index)


def factor(rows: Tensor, columns: Tensor, index: Sequence[int] | None = None) -> Tensor:
    """sqrt(r1 / r2) for ``rows`` (N,) and ``columns`` (K,), (K,); 1 where either is zero. Channels that share a row share the factor: r2 is the largest of them."""
    row = torch.arange(len(columns), device=columns.device) if index is None else torch.tensor(index, device=columns.device)
    if len(row) != len(columns) or (index is None and len(rows) != len(columns)):
        raise OptionError(f"equalize: {len(rows)} rows, {len(columns)} columns and an index of {len(row)}; each column needs one row")
    r2 = columns.new_zeros(len(rows)).scatter_reduce(0, row, columns, "amax")[row]
    r1 = rows[row]
    return torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)


def row_maxima(weight: Tensor) -> Tensor:
    """max|row| of (N, K), or over all experts of (E, N, K): (N,)."""
    return weight.abs().amax(-1) if weight.dim() == 2 else weight.abs().amax((0, -1))


def chain(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Equalize W1 (N1, K), W2 (N2, N1) ... in turn until nothing changes. ``biases[i]`` (N_i,) or None. Returns new weights, new biases, and the total factor between each two.

    Between neighbours lie positively homogeneous functions (relu, the identity). Raises OptionError where shapes do not chain.
    """
    shapes = [tuple(w.shape) for w in weights]
    if len(biases) != len(weights) or any(a[0] != b[1] for a, b in pairwise(shapes)):
        raise OptionError(f"equalize: weights of {shapes} with {len(biases)} biases are no chain; the columns of each are the rows of the one before")
    w, b = list(weights), list(biases)
    total = [torch.ones_like(weight[:, 0]) for weight in w[:-1]]
    for _ in range(ROUNDS):
        moved = 0.0
        for i in range(len(w) - 1):
            s = factor(row_maxima(w[i]), w[i + 1].abs().amax(0))
            w[i], w[i + 1], total[i] = w[i] / s[:, None], w[i + 1] * s, total[i] * s
            bias = b[i]
            b[i] = None if bias is None else bias / s
            moved = max(moved, float(s.log().abs().max()))
        if moved < CLOSE:
            break
    return w, b, total


@dataclass(frozen=True)
class Link:
    """A producer and the kin that follow it, by their names; ``index[c]``: the producer's row that channel c comes from."""

    producer: str
    followers: tuple[str, ...]
    index: tuple[int, ...]


def balance(links: Sequence[Link], weights: Mapping[str, Tensor]) -> dict[Link, Tensor]:
    """s (K,) of every link, such that rows / s and columns * s have like ranges; weights are (N, K) or (E, N, K) and are not changed.

    Sweeps over all links until nothing moves, as ``chain`` does, with s rounded to powers of two in the end: scaling by these is exact in every floating dtype, so that the function
    stays as it is to the last bit, for at most sqrt(2) of range.
    """
    rows = {link.producer: weights[link.producer].new_ones(weights[link.producer].shape[-2], dtype=torch.float32) for link in links}
    columns = {name: weights[name].new_ones(weights[name].shape[-1], dtype=torch.float32) for link in links for name in link.followers}
    for _ in range(ROUNDS):
        moved = 0.0
        for link in links:
            r1 = _maxima(weights[link.producer], rows.get(link.producer), columns.get(link.producer))[0]
            r2 = torch.stack([_maxima(weights[name], rows.get(name), columns[name])[1] for name in link.followers]).amax(0)
            s = factor(r1, r2, link.index)
            by_row = torch.ones_like(r1)
            by_row[torch.tensor(link.index, device=s.device)] = s  # channels that share a row share their factor
            rows[link.producer] /= by_row
            for name in link.followers:
                columns[name] *= s
            moved = max(moved, float(s.log().abs().max()))
        if moved < CLOSE:
            break
    return {link: columns[link.followers[0]].log2().round().clamp(-REACH, REACH).exp2() for link in links}


def _maxima(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """(max|row| (N,), max|column| (K,)) of ``rows w columns``, float32, over all experts; a block of rows at a time."""
    flat = weight.reshape(-1, weight.shape[-1]) if weight.dim() == 3 else weight
    factors = None if rows is None else rows.repeat(flat.shape[0] // len(rows))
    by_row, by_column = [], []
    step = max(1, BLOCK // flat.shape[1])
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step].float().abs()
        part = part if columns is None else part * columns
        part = part if factors is None else part * factors[start : start + step, None]
        by_row.append(part.amax(1))
        by_column.append(part.amax(0))
    return torch.cat(by_row).reshape(-1, weight.shape[-2]).amax(0), torch.stack(by_column).amax(0)


def scale(link: Link, s: Tensor, weights: Mapping[str, Tensor], bias: Tensor | None) -> None:
    """In place: the producer's rows and ``bias`` (N,) are divided by s (K,), the followers' columns multiplied. ``1 / s`` undoes it, exactly for powers of two."""
    producer = weights[link.producer]
    by_row = s.new_ones(producer.shape[-2])
    by_row[torch.tensor(link.index, device=s.device)] = s
    producer.div_(by_row.to(producer.dtype)[:, None])
    if bias is not None:
        bias.div_(by_row.to(bias.dtype))
    for name in link.followers:
        weights[name].mul_(s.to(weights[name].dtype))


def high_bias(beta: Tensor, gamma: Tensor) -> Tensor:
    """c = max(0, beta - 3 |gamma|), (N,): how far a pre-activation of mean ``beta`` and deviation ``gamma`` lies above zero, but for 0.135 % of a normal distribution's values. An approximation."""
    return (beta - 3 * gamma.abs()).clamp(min=0)


def absorb(bias: Tensor, following: Tensor, following_bias: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
    """(b1 - c, b2 + W2 c): relu(y) = relu(y - c) + c for every y >= c. For smaller y the function changes, which is why ``high_bias`` takes three deviations."""
    moved = following @ c
    return bias - c, moved if following_bias is None else following_bias + moved


def absorbing(gm: fx.GraphModule, where: Place, followers: Sequence[str]) -> Norm | Skip:
    """The norm before a producer whose high biases its followers may absorb, or why they may not: between them lies nothing but a ReLU."""
    path = back(input_of(next(n for n in gm.graph.nodes if n.meta.get("site") == followers[0])))
    if path[0] is not where.nodes[0] or not any(n.target in RELU for n in path) or where.index != tuple(range(gm.meta["sites"][where.site].n)):
        return Skip("more, or less, than a ReLU lies between")
    norm = before(gm, where.site)
    return Skip("a ReLU makes the input of the first") if isinstance(norm, Norm) and norm.relu else norm


def pairs(gm: fx.GraphModule) -> list[tuple[Place, tuple[str, ...]]]:
    """(place in a producer's rows, the kin that read it) for all linears of a graph that can be equalized with the one before; in the order of the graph."""
    sites: dict[str, Site] = gm.meta["sites"]
    groups = dict.fromkeys(tuple(s for s in sites if s == name or s in sites[name].kin) for name in sites)
    found = [(place(gm, group), group) for group in groups]
    return [(where, group) for where, group in found if where.kind == "rows"]


TRANSFORM = Transform("equalize", equalize, needs=())
