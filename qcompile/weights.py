"""Live parameters and their packed tensors.

Compiled graphs take packed weights as inputs; this table finds them on each call. An entry belongs to one parameter object, one view of it and one scheme, and is valid while the parameter
has the same version and storage. When the value changed, it is packed again *into the same tensors*, so that addresses (and CUDA graphs) stay.

Detected: ``load_state_dict``, ``copy_`` and every in-place op, a replaced Parameter, ``p.data = t``, optimizer steps (a hook tells of fused ones, which bump no version), a move to another device.
Not detectable: ``p.data.mul_(2)`` and other writes behind autograd's back; ``qcompile.refresh(model)`` says so by hand.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.errors import QcompileWarning, WeightError
from qcompile.core.qtensor import QTensor, quantize
from qcompile.core.scheme import Scheme
from qcompile.core.solution import Solution
from qcompile.gathered import REASON, state_of, watch, wholes
from qcompile.passes.sites import view
from qcompile.trained import STATE

Key = tuple[str, str, str]
"""(what, view, scheme) of an entry."""
SolutionKey = tuple[str, str, str]
"""(view, use, choice) of a solution."""


def fingerprint(p: Tensor) -> tuple[object, ...]:
    """The same for the same values on every device: shape, dtype and two sums over the bits, which wrap around."""
    if p.is_meta:
        return ()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
    first = second = 0
    with compat.no_dispatch_modes(), torch.no_grad():
        rows = p.detach().reshape(1, -1) if p.dim() < 2 else p.detach().flatten(0, -2)
        for start in range(0, rows.shape[0], step := max(1, (1 << 24) // max(rows.shape[1], 1))):
            part = rows[start : start + step].contiguous().view(bits).to(torch.int64)
            first += int(part.sum())
            second += int((part * torch.arange(1 + start, 1 + start + part.numel(), device=p.device).view_as(part)).sum())
    return tuple(p.shape), str(p.dtype), first, second & ((1 << 64) - 1)


def collapse(p: Tensor) -> None:
    """One NaN seen through every index."""
    with compat.no_dispatch_modes(), torch.inference_mode(p.is_inference()), torch.no_grad():  # a parameter that was made in inference mode takes its own kind only
        p.data = torch.full((1,), float("nan"), dtype=p.dtype, device=p.device).expand(p.shape)


@dataclass
class Entry:
    """Packed tensors of one (parameter, view, scheme) and the state of the parameter that they were made from.

    ``source`` is the storage they were read from, held until they are packed again: its address cannot come back with other values.
    """

    scheme: Scheme
    k: int
    tensors: list[Tensor]
    state: tuple[object, ...] = ()
    source: object = None
    solution: Solution | None = None

    def qtensor(self) -> QTensor:
        return QTensor.unflatten(self.tensors, self.scheme, self.k)


@dataclass
class Record:
    """All that is known of one live parameter: packed entries, solutions of its sites, tensors that these give compiled graphs, the reasons why its 16-bit value is still needed,
    why it was held when it should have been released, and the dtype it had when it was (None: it was not)."""

    ref: weakref.ref[Tensor]
    path: str = ""
    entries: dict[Key, Entry] = field(default_factory=dict)
    solutions: dict[SolutionKey, Solution] = field(default_factory=dict)
    given: dict[tuple[str, SolutionKey], list[Tensor]] = field(default_factory=dict)
    joined: dict[tuple[object, ...], list[Tensor]] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    held: str = ""
    released: torch.dtype | None = None


class WeightTable:
    """id(parameter) -> Record; records die with their parameters."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self.lock = threading.RLock()

    def record(self, p: Tensor, path: str = "") -> Record:
        """The record of a parameter, made when first asked for."""
        found = self._records.get(id(p))
        if found is not None and found.ref() is p:
            found.path = found.path or path
            return found
        key = id(p)
        records = self._records

        def forget(ref: weakref.ref[Tensor]) -> None:
            if key in records and records[key].ref is ref:
                del records[key]

        with self.lock:
            found = self.get(p)
            if found is None:
                found = self._records[key] = Record(weakref.ref(p, forget), path)
        return found

    def get(self, p: Tensor) -> Record | None:
        """The record of a parameter, or None where it has none."""
        found = self._records.get(id(p))
        return found if found is not None and found.ref() is p else None

    def solve(self, p: Tensor, key: SolutionKey, solution: Solution, path: str) -> None:
        """Keep a solution. What graphs read of an earlier one is renewed in place where it has the same shapes."""
        record = self.record(p, path)
        record.solutions[key] = solution
        for entry in record.entries.values():
            entry.state = ()
        GENERATION[0] += 1
        for (what, whose), tensors in list(record.given.items()):
            if whose == key and what != "missed":
                fresh = given(solution, what, p, key[0])
                if [t.shape for t in tensors] != [t.shape for t in fresh]:
                    del record.given[what, whose]  # other columns: another graph reads them
                    continue
                for old, new in zip(tensors, fresh):
                    old.copy_(new)

    def packed(self, p: Tensor, how: str, scheme: Scheme, path: str, key: SolutionKey | None = None, what: str = "weight") -> list[Tensor]:
        """Packed tensors of ``view(p, how)`` under ``scheme``, up to date: as its solution says where ``key`` names one, else rounded to nearest.

        ``what="columns"`` gives the outlier columns in the weight's own dtype instead.
        """
        record = self.record(p, path)
        self.is_released(p)
        entry_key = entry_of(what, how, scheme, key)
        entry = record.entries.get(entry_key)
        if entry is not None and entry.state == state_of(p):
            return entry.tensors
        if record.released is not None and entry is not None:
            if not bool(p.isnan().all()):
                raise WeightError(f"the 16-bit weight of {path} was released, and written to since (fill_, zero_), which is lost: load the weights again, or give it a value by p.data = t")
            entry.state = state_of(p)  # moved as it is, by share_memory_
            return entry.tensors
        if record.released is not None:
            have = ", ".join(f"{k[2]}{' transposed' if k[1] == 't' else ''}" for k in record.entries)
            raise WeightError(f"the 16-bit weight of {path} was released and is packed as {have}; it cannot be packed as {scheme}. Load the weights again first.")
        with self.lock, compat.no_dispatch_modes(), torch.no_grad():
            if p.is_meta:
                raise WeightError(f"parameter {path} is on the meta device: load its values before the first call")
            state, source = state_of(p), p.untyped_storage()  # before the values are read: a change meanwhile is seen on the next call
            kept = record.solutions.get(key) if key else None
            solution = kept.now() if kept is not None else None
            w = view(p.detach(), how)
            k = int(w.shape[-1])
            if what == "weight" and kept is not None and kept.live is not None:  # the module holds the codes themselves
                assert solution is not None and solution.q is not None
                fresh, k = solution.q.flatten(), solution.q.k
            elif what == "columns":
                assert solution is not None
                fresh = [solution.to(p.device).kept(w).to(p.dtype if solution.columns is None else solution.columns.dtype)]
            else:
                fresh = _codes(p, w, how, scheme, path, solution).flatten()
            entry = record.entries.get(entry_key)
            if entry is not None:
                GENERATION[0] += 1
                if [(t.shape, t.dtype, t.device) for t in entry.tensors] == [(t.shape, t.dtype, t.device) for t in fresh]:
                    _keep_apart(kept, entry.tensors, fresh)
                    for old, new in zip(entry.tensors, fresh):
                        old.copy_(new)
                    fresh = entry.tensors
            record.entries[entry_key] = Entry(scheme, k, fresh, state, source, solution)
        return fresh

    def given(self, p: Tensor, what: str, key: SolutionKey, path: str) -> list[Tensor]:
        """What a graph reads of a solution beside the weight: tensors that keep their address."""
        record = self.record(p, path)
        if (what, key) not in record.given or record.given[what, key][0].device != p.device:
            with compat.no_dispatch_modes(), torch.no_grad():
                record.given[what, key] = [t.clone() for t in given(record.solutions[key].now(), what, p, key[0])]
        return record.given[what, key]

    def is_released(self, p: Tensor) -> bool:
        """Whether the value of ``p`` was given back. Where it was given another one since (``p.data = t``), the release is over;
        where it was cast or moved, which fills it with NaN, it is collapsed again and its packed tensors follow it."""
        record = self.get(p)
        if record is None or record.released is None:
            return False
        if p.untyped_storage().nbytes() > p.element_size():
            with self.lock, compat.no_dispatch_modes(), torch.no_grad():
                if bool(p.isnan().all()):
                    self.release(p)
                else:
                    record.released = None
                    self.forget([p])
        return record.released is not None

    def release(self, p: Tensor) -> None:
        """Collapse a parameter whose packed tensors stand for it from now on."""
        record = self.record(p)
        record.released = p.dtype
        collapse(p)
        for entry in record.entries.values():
            entry.tensors = [t.to(p.device) for t in entry.tensors]
            entry.state, entry.source = state_of(p), None

    def forget(self, parameters: Iterable[Tensor]) -> int:
        """Mark entries stale (in-place edits that PyTorch cannot see); they are packed again on the next call. Returns how many."""
        count, parameters = 0, list(parameters)
        for p in (*parameters, *wholes(parameters)):
            record = self.get(p)
            if record is not None and record.released is None:
                for entry in record.entries.values():
                    entry.state, entry.source, count = (), None, count + 1
        GENERATION[0] += bool(count)
        return count


def entry_of(what: str, how: str, scheme: Scheme, key: SolutionKey | None) -> Key:
    """The name of an entry of a record."""
    return what, how, " ".join([str(scheme), *(key[1:] if key else ())])


GENERATION = [0]
"""Grows when an entry was packed again or marked stale; bound graphs compare it."""

TABLE = WeightTable()
compat.on_optimizer_step(TABLE.forget)  # fused optimizers do not bump the versions of what they step


def _codes(p: Tensor, w: Tensor, how: str, scheme: Scheme, path: str, solution: Solution | None) -> QTensor:
    """The solved codes where the weight still has the value that they were solved for; else the weight prepared as its solution says and rounded to nearest."""
    if (solution is None or solution.q is None) and (learned := STATE.codes(p, how, w if solution is None else solution.prepared(w), scheme, path)) is not None:
        return learned
    if solution is None:
        return quantize(w, scheme, name=path)
    solution = solution.to(p.device)
    if solution.q is not None and solution.state == fingerprint(p):
        return solution.q
    if solution.q is not None:
        warnings.warn(f"qcompile: the weight {path} changed since it was calibrated: rounded to nearest now. Calibrate again for solved codes.", QcompileWarning, stacklevel=2)
    return quantize(solution.prepared(w), scheme, name=path)


def _keep_apart(solution: Solution | None, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """A graph reads the solved codes themselves. Before other codes are written to their place (the weight changed), the solution gets its own copy: the weight may change back."""
    if solution is None or solution.q is None:
        return
    mine = solution.q.flatten()
    if any(a.data_ptr() == b.data_ptr() for a, b in zip(mine, old)) and any(a.data_ptr() != b.data_ptr() for a, b in zip(mine, new)):
        solution.q = QTensor.unflatten([t.clone() for t in mine], solution.q.scheme, solution.q.k)


def given(solution: Solution, what: str, p: Tensor, how: str) -> list[Tensor]:
    """What a slot beside the weight reads (see ``passes/slots.py``): float32 or indices, also where the vectors that a module holds were cast with it."""
    device = p.device
    if what == "missed":
        return [torch.zeros(1, dtype=torch.int64, device=device)]
    if what == "range":
        return [t.to(device, torch.float32) for t in solution.range]
    if what == "smooth":
        assert solution.smooth is not None
        return [solution.smooth.to(device, torch.float32).reciprocal()]
    if what == "bias":
        assert solution.bias is not None
        return [solution.bias.to(device, torch.float32)]
    assert solution.outliers is not None
    if what == "outliers":
        return [solution.outliers.to(device)]
    k = solution.q.k if solution.columns is not None and solution.q is not None else view(p, how).shape[-1]
    mask = torch.ones(k, device=device)
    mask[solution.outliers.to(device)] = 0
    return [mask]


class Binding:
    """The tensors that one set of live parameters gives one compiled graph, and the state they were taken in: of those at the places ``read``. ``strides``: they are part of it, where Dynamo does not
    guard them. Parameters are held weakly."""

    def __init__(self, parameters: Sequence[Tensor], fetch: Callable[[Sequence[Tensor]], list[Tensor]], on_death: Callable[[], None], read: Sequence[int], strides: bool = False) -> None:
        self._refs = [weakref.ref(p, lambda _: on_death()) for p in parameters]
        self._fetch, self._read, self._strides = fetch, read, strides
        self._inference = any(p.is_inference() for p in parameters)
        self._gathered = bool(found := watch(parameters))
        for p in found:
            TABLE.record(p).pinned.add(REASON)
        self.tensors: list[Tensor] = []
        self._state: object = None

    def get(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Up-to-date tensors; the common case compares versions and addresses."""
        state = self._now(parameters)
        if state != self._state:
            self.tensors = self._fetch(parameters)
            self._state = state
        return self.tensors

    def _now(self, parameters: Sequence[Tensor]) -> object:
        read = [parameters[i] for i in self._read]  # not adapters, which an optimizer moves on every step
        if self._gathered:
            return [state_of(p) for p in read], GENERATION[0]
        versions = [] if self._inference else [p._version for p in read]
        return versions, [p.data_ptr() for p in read], [p.stride() for p in read] if self._strides else None, GENERATION[0]
