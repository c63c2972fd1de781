"""What is seen of a group's input while recorded calls are run again, and how near a solved site's output is to the exact one on a sample of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.core.errors import CalibrationError
from qcompile.core.qtensor import QTensor
from qcompile.core.solution import Solution
from qcompile.core.stats import check_finite, merge_all, new, update_all
from qcompile.solve import Member, Observed, Product, decibels


class Watch:
    """Takes statistics of the rows (T, K) that a group reads, for ``count`` stacked experts also those of each one's rows. ``routed``: which expert each sampled row went to is kept. ``alone``: of this process."""

    def __init__(
        self, names: Sequence[str], k: int, count: int, device: torch.device, per_expert: Sequence[str], by: Tensor | None = None, routed: bool = False, alone: bool = False
    ) -> None:
        self._alone, self._error = alone, ""
        self._names, self._k, self._by, self._per_expert = names, k, by, per_expert
        self.seen = Observed(new(names, k, device), 0, [Observed(new(per_expert, k, device), 0) for _ in range(count)] if count > 1 else ())
        self._routes = Observed(new(("samples",), 1, device), 0) if routed else None  # a sample keeps rows by their numbers: these are the same ones

    def take(self, rows: Tensor, which: Tensor | None, where: str) -> None:
        """Add rows (T, K). Raises CalibrationError where they are not finite; one of several processes waits with that until they merge, where all raise it and none is left waiting.
        Alone, which is no calibration, leaves those rows out."""
        if self._error:
            return
        if self._alone:
            finite = rows.isfinite().all(-1)
            rows, which = rows[finite], None if which is None else which[finite]
        if bad := check_finite(rows):
            self._error = f"{bad} values of the input of {where} are NaN or infinite in the calibration data, which cannot be calibrated on; the model is as it was"
            if not _several():
                raise CalibrationError(self._error)
            return
        if self._by is not None:
            rows = rows / self._by if rows.dtype == torch.float64 else rows.float() / self._by
        self.seen = Observed(update_all(self.seen.stats, rows, self._names), self.seen.tokens + rows.shape[0], self.seen.experts)
        if which is None:
            return
        if self._routes is not None:
            self._routes = Observed(update_all(self._routes.stats, which[:, None].float(), ("samples",)), self._routes.tokens + rows.shape[0])
        if self.seen.experts:
            for e in which.unique().tolist():
                if e < len(self.seen.experts):
                    one, mine = self.seen.experts[e], rows[which == e]
                    self.seen.experts[e] = Observed(update_all(one.stats, mine, self._per_expert), one.tokens + mine.shape[0])  # type: ignore[index]

    def merged(self) -> Observed:
        """The statistics of all processes. Raises CalibrationError in all where one has seen what is not finite."""
        return self.seen if self._alone else _across(self.seen, self._error)

    def routes(self) -> Tensor | None:
        """The expert of each sampled row (S,), of all processes; None where there are no experts."""
        if self._routes is None:
            return None
        return (self._routes if self._alone else _across(self._routes, self._error)).stats["samples"]["rows"][:, 0].long()


def _several() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def everyone(value: Any) -> list[Any]:
    """The values of all processes, by rank; its own alone where there is no process group."""
    if not _several():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _across(seen: Observed, error: str) -> Observed:
    """Merged over the process group, where there is one; an error of one process is that of all."""
    device = next((t.device for state in seen.stats.values() for t in state.values()), torch.device("cpu"))
    if not _several():
        return seen
    gathered = everyone(error or seen.to("cpu"))
    if errors := [f"process {rank}: {found}" for rank, found in enumerate(gathered) if isinstance(found, str)]:
        raise CalibrationError("; ".join(errors))
    return functools.reduce(both, gathered).to(device)


def both(a: Observed, b: Observed) -> Observed:
    """As if one had seen all; experts apart where both have them."""
    parts = [both(mine, theirs) for mine, theirs in zip(a.experts, b.experts)] if len(a.experts) == len(b.experts) else ()
    return Observed(merge_all(a.stats, b.stats), a.tokens + b.tokens, parts)


def measured(member: Member, solution: Solution, rows: Tensor, routes: Tensor | None) -> float | None:
    """SQNR in dB of a site's output on sampled rows (S, K); stacked experts on those that went to each (``routes`` (S,)), all together. None where there is nothing to measure."""
    if not rows.numel():
        return None
    if member.weight.dim() == 2:
        return decibels(rows @ member.weight.float().T, Product(solution, member.choice, member.weight, torch.float32)(rows))
    exact, y = [], []
    for e in (routes.unique().tolist() if routes is not None else ()):
        if e < member.weight.shape[0]:  # rows behind the last expert's are padding
            w, mine = member.weight[e], rows[routes == e]
            q = solution.q and QTensor.unflatten([t[e] for t in solution.q.flatten()], solution.q.scheme, solution.q.k)
            exact.append(mine @ w.float().T)
            y.append(Product(replace(solution, q=q), member.choice, w, torch.float32)(mine))
    return decibels(torch.cat(exact), torch.cat(y)) if exact else None
