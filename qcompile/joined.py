"""Packed weights that lie one behind the other, for products that ``passes/merge`` made one. Each weight's own packed tensors become views of the whole: there is one copy, and what packs a
weight again in place, releases it or counts its bytes needs to know nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.qtensor import QTensor
from qcompile.core.scheme import Scheme
from qcompile.weights import GENERATION, TABLE, SolutionKey, entry_of

Wanted = tuple[str, str, Scheme, "SolutionKey | None"]
"""(what, view, scheme, solution) that names an entry of a weight."""


def joined(wanted: Sequence[tuple[Tensor, Wanted]], packed: Callable[[], Sequence[Sequence[Tensor]]]) -> list[Tensor]:
    """Packed tensors of several weights, one behind the other: those that ``packed`` gives for each become views of the whole, so that there is one copy, packed again in place.

    ``wanted``: parameters and what names their entries. Weights are joined along their rows. The table is locked from before they are read: of two graphs of the same weights that come here
    at once, the second would else join what the first has replaced meanwhile, and each would read a copy of its own.
    """
    with TABLE.lock, compat.no_dispatch_modes(), torch.no_grad():
        parts = packed()
        first = TABLE.record(wanted[0][0])
        name = tuple((id(p), *about) for p, about in wanted)
        whole = first.joined.get(name, [])
        if not whole or not all(map(_behind, whole, zip(*parts))):
            first.joined[name] = whole = [torch.cat(tensors) for tensors in zip(*parts)]
            _replace(wanted, parts, whole)
    return whole


def _replace(wanted: Sequence[tuple[Tensor, Wanted]], parts: Sequence[Sequence[Tensor]], whole: Sequence[Tensor]) -> None:
    """Entries, and solutions whose codes they are, take their rows of the whole."""
    start = 0
    for (p, (what, how, scheme, key)), tensors in zip(wanted, parts):
        record, end = TABLE.record(p), start + tensors[0].shape[0]
        views = [t[start:end] for t in whole]
        kept = record.solutions.get(key) if key else None
        if kept is not None and kept.q is not None and kept.q.codes.data_ptr() == tensors[0].data_ptr():
            kept.q = QTensor.unflatten(views, kept.q.scheme, kept.q.k)
        record.entries[entry_of(what, how, scheme, key)].tensors = views
        start = end
    GENERATION[0] += 1  # graphs that read the weights one by one take the views


def _behind(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """The parts lie in the whole, in order."""
    at = whole.data_ptr()
    for part in parts:
        if part.data_ptr() != at:
            return False
        at += part.nbytes
    return True
