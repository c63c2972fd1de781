"""Calibration: record what a model is called with, replay it, and keep what the recipe's methods find.

``with qcompile.calibrate(fast): ...`` runs the model unquantized and records the calls of its graphs. On leaving, every site is solved on a replay in true sequential order
(``qcompile.sequence``) and Dynamo is asked to capture again: the next call compiles with what was learned. Recorded calls are kept, so that another sitting adds to them.
"""

from __future__ import annotations

import contextlib
import re
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import codes, compat, stored
from qcompile.capture import capture
from qcompile.core.errors import CalibrationError, QcompileError, QcompileWarning
from qcompile.core.solution import CHOSE
from qcompile.gate import enforce
from qcompile.missed import GROUPED, module_of, regroup
from qcompile.options import memory_of as budget
from qcompile.owners import owners, owns
from qcompile.passes import PASSES
from qcompile.passes.infra import run
from qcompile.replay import Call, Unit, nbytes
from qcompile.sequence import Outcome, Run, Solved
from qcompile.statistics import Calibration

KEPT: list[Unit] = []
"""Units whose calls were recorded, for sittings to come; those of dead models are dropped."""
KEEP_BYTES = 256 << 20
"""Recorded calls that are kept after they were used; larger recordings are dropped then."""
_SESSIONS: list[Session] = []


class Session:
    """One sitting. ``memory`` bounds the bytes of recorded calls, and of values carried from site to site in the replay."""

    def __init__(self, fast: Any, progress: bool = True, memory: str | int | None = None, folder: Any = None) -> None:
        self.fast, self.progress, self.folder = fast, progress, folder
        self.budget, self._bounded = budget(memory), memory is not None
        self.units: list[Unit] = []
        self.outcome = Outcome()
        self.strict = False
        """What is wrong with the quantized model is an error: some graph was compiled with options["strict"]."""
        self.calibration: Calibration | None = None
        self._bytes, self._left_out, self._start = 0, 0, 0.0
        self._fed, self._dropped = False, False
        self._read: set[int] = set()
        self._batch: list[tuple[Unit, Call]] = []
        self._copies: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self._made: dict[int, tuple[weakref.ref[Tensor], int, Call, int]] = {}
        self._names: dict[int, tuple[nn.Module, str, str]] = {}
        self.tables: set[int] = set()
        self._codes: list[Any] = []
        """Code objects that graphs were captured from while recording: also those of functions that read no parameter, which nothing else remembers."""
        self._told: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Session:
        codes.forget(self.fast)
        _SESSIONS.append(self)
        self._start = time.perf_counter()
        self._stack.enter_context(torch.no_grad())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        recorded = time.perf_counter()
        known = [u for u in _linked([u for u in KEPT if u.alive and u.sites], KEPT) if u not in self.units]
        mine = _linked([u for u in known if any(u.agrees(v) for v in self.units)], known)
        KEPT[:] = [*known, *self.units]
        if kind is not None:  # what was recorded is kept; the model is as it was
            return
        if not self.units and self._left_out:
            raise CalibrationError(f"{self.budget} bytes of memory hold no batch: raise memory= to at least what its inputs take")
        if not self.units:
            raise CalibrationError("no graph of qcompile ran while calibrating: call the compiled model (torch.compile(model, backend='qcompile', ...)) inside the context")
        if self._left_out:
            warnings.warn(f"qcompile: {self._left_out} batches were not recorded: the memory for calibration ({self.budget >> 20} MiB) was full", QcompileWarning, stacklevel=2)
        try:
            self.outcome = solve([*mine, *self.units], self.budget, self.progress, again=True, folder=self.folder)
        except CalibrationError:
            KEPT[:] = known  # what cannot be calibrated on does not come back in the next sitting
            raise
        self.outcome.seconds = {"recording": recorded - self._start, "solving": time.perf_counter() - recorded}
        self.calibration = Calibration([*mine, *self.units], self.outcome, self.budget)
        if (size := nbytes(self.units)) > KEEP_BYTES:
            KEPT[:] = known
            if self.folder is None:
                warnings.warn(f"qcompile: this sitting recorded {size >> 20} MiB, and {KEEP_BYTES >> 20} MiB are kept: another sitting begins anew, without its calls", QcompileWarning, stacklevel=2)
        warn_of(self.outcome)
        enforce(self.outcome, self.strict, [*mine, *self.units])

    def _close(self) -> None:
        _SESSIONS.remove(self)
        self._stack.close()
        codes.forget(self.fast, self._codes)
        self._codes.clear()
        self._made.clear()
        self._names.clear()
        self._copies.clear()
        self._batch.clear()

    def names(self, args: Sequence[Any]) -> dict[int, tuple[nn.Module, str, str]]:
        """``owners()``, scanned again only where a parameter among ``args`` is not known yet."""
        for p in args:
            owner, _, name = self._names.get(id(p), (None, "", ""))
            if isinstance(p, nn.Parameter) and not owns(owner, name, p):
                self.tables.clear()
                self._names = owners(self.tables)
                break
        return self._names

    def feed(self, batches: Iterable[Any]) -> None:
        """Call the model with each batch. Raises CalibrationError where there is none."""
        from qcompile.progress import track

        count = 0
        self._fed = True
        for count, batch in enumerate(track(batches, "recording", self.progress), 1):  # noqa: B007
            self._next()
            call(self.fast, batch)
        self._fed = False
        if not count:
            raise CalibrationError("the data is empty: it gave no batch (an iterator gives its batches once)")

    def heed(self, options: Any) -> None:
        """Options that a graph was compiled with: strictness, and the memory where the session was given none."""
        self.strict |= options.strict
        if options.calibration_memory is not None and not self._bounded:
            self.budget = options.calibration_memory

    def say(self, message: str) -> None:
        """Warn once a sitting."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(f"qcompile: {message}", QcompileWarning, stacklevel=2)

    def record(self, unit: Unit, args: Sequence[Any]) -> Call | None:
        """Keep a call. Where the memory is full its whole batch is left out: all linears see the same tokens. A batch that was not ``feed`` ends where the weight of a linear is read again."""
        weights = {id(unit.parameter(site)) for site in unit.sites.values()}
        if not self._fed and weights & self._read:
            self._next()
        self._read |= weights
        size = sum({id(a): a.nbytes for a in args if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and self._copy(a) is None}.values())
        if self._dropped or self._bytes + size > self.budget:
            self._drop()
            return None
        self._bytes += size
        if unit not in self.units:
            self.units.append(unit)
        links = {}
        for i, a in enumerate(args):
            made = self._made.get(id(a))
            if isinstance(a, Tensor) and made is not None and made[0]() is a and made[1] == _version(a):  # as it was returned: not written to since
                links[i] = made[2:]
        call = unit.record(args, links, self._copied)
        self._batch.append((unit, call))
        return call

    def undo(self, unit: Unit, call: Call | None) -> None:
        """Take back a call that failed."""
        unit.calls[:] = [c for c in unit.calls if c is not call]
        self._batch = [(u, c) for u, c in self._batch if c is not call]
        self.units = [u for u in self.units if u.calls]

    def _next(self) -> None:
        """Another batch begins."""
        self._read, self._batch, self._dropped = set(), [], False

    def _drop(self) -> None:
        """Leave the batch out, with what was recorded of it."""
        self._left_out += not self._dropped
        self._dropped = True
        out = {id(call) for _, call in self._batch}
        for unit, _ in self._batch:
            unit.calls[:] = [call for call in unit.calls if id(call) not in out]
        self.units = [unit for unit in self.units if unit.calls]
        self._made = {key: made for key, made in self._made.items() if id(made[2]) not in out}
        self._batch, self._copies, self._bytes = [], {}, nbytes(self.units)

    def _copy(self, value: Tensor) -> Tensor | None:
        """The copy of a tensor that was recorded before and not written to since: a buffer, or what every layer reads."""
        ref, version, copy = self._copies.get(id(value), (None, -1, value))
        return copy if ref is not None and ref() is value and version == _version(value) else None

    def _copied(self, value: Tensor) -> Tensor:
        copy = self._copy(value)
        if copy is None:
            copy = value.detach().clone()
            if not value.is_inference():  # these have no version
                self._copies[id(value)] = (weakref.ref(value), value._version, copy)
        return copy

    def returned(self, call: Call, outputs: Any) -> None:
        """Remember what a call returned: a later graph may read it."""
        for i, value in enumerate(outputs if isinstance(outputs, (tuple, list)) else [outputs]):
            if isinstance(value, Tensor):
                self._made[id(value)] = (weakref.ref(value), _version(value), call, i)


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version


def _linked(units: Sequence[Unit], among: Sequence[Unit]) -> list[Unit]:
    """The units, and those whose outputs they read (they may have no linear of their own), in the order of ``among``."""
    wanted, front = {id(u) for u in units}, list(units)
    maker = {id(c): u for u in among for c in u.calls}
    while front:
        for earlier, _ in (link for c in front.pop().calls for link in c.links.values()):
            unit = maker.get(id(earlier))
            if unit is not None and id(unit) not in wanted:
                wanted.add(id(unit))
                front.append(unit)
    return [u for u in among if id(u) in wanted]


class Recorder:
    """What Dynamo keeps for a graph while a session is open: runs it as it is, and records its calls."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], options: Any, session: Session) -> None:
        self._gm, self._options, self._session = gm, options, session
        session.heed(options)
        self._captured = capture(gm, inputs, options.root, session.names(inputs), session.tables)
        self._params = [i for i, n in enumerate(self._captured.graph.find_nodes(op="placeholder")) if "param" in n.meta]
        self._matched = self._match(self._captured)
        self._units: dict[tuple[int, ...], tuple[Unit, Session]] = {}
        """Models of one class share a graph, and may be in sittings of their own."""
        if (code := compat.compiling()) is not None:
            session._codes.append(code)
        self._code = code
        if GROUPED in regroup(self._matched.meta["sites"].values(), options.recipe.rules, inputs):  # what cannot be grouped is said when it is compiled
            session.say(GROUPED)

    def __call__(self, *args: Any) -> Any:
        if self._session not in _SESSIONS:
            raise QcompileError("this graph was captured for a calibration that has ended; call torch.compiler.reset() and the model again")
        key = tuple(id(args[i]) for i in self._params)
        if key not in self._units:
            self._units[key] = self._unit(args), session(args) or self._session
        unit, sitting = self._units[key]
        call = sitting.record(unit, [concrete(a) for a in args])
        try:
            with torch.no_grad():
                outputs = self._gm(*args)
        except Exception:  # of the model's own, as eager raises it: a replay would, too
            sitting.undo(unit, call)
            raise
        if call is not None:
            sitting.returned(call, outputs)
        return outputs

    def _unit(self, args: Sequence[Any]) -> Unit:
        gm = self._matched
        if self._units:
            codes.remember(args, self._code)
            gm = self._match(renamed(self._captured, args, self._session.names(args)))
        return Unit(gm, args, autocast_of(args))

    def _match(self, gm: fx.GraphModule) -> fx.GraphModule:
        return run([PASSES[name] for name in ("normalize", "find_sites", "match")], gm, self._options)


def autocast_of(args: Sequence[Any]) -> tuple[str, torch.dtype] | None:
    device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def renamed(captured: fx.GraphModule, args: Sequence[Any], names: Mapping[int, tuple[nn.Module, str, str]]) -> fx.GraphModule:
    """A copy of a captured graph whose parameters have the names of those among ``args``."""
    copy = compat.copy_graph(captured)
    for node, value in zip(copy.graph.find_nodes(op="placeholder"), args):
        if "param" in node.meta and id(value) in names:
            owner, path, name = names[id(value)]
            kind = node.meta["param"].kind if "stored" in node.meta else type(owner).__name__
            node.meta["param"] = replace(node.meta["param"], path=stored.plain(path, name), kind=kind)  # Dynamo guards what requires grad
    return copy


def session(inputs: Sequence[Any] = ()) -> Session | None:
    """The innermost open session; of several the innermost whose model has parameters among ``inputs``."""
    if len(_SESSIONS) > 1:
        read = {id(a) for a in inputs if isinstance(a, nn.Parameter)}
        for one in reversed(_SESSIONS):
            module = module_of(one.fast)
            if module is not None and any(id(p) in read for p in module.parameters()):
                return one
    return _SESSIONS[-1] if _SESSIONS else None


def calibrate(fast: Any, batches: Iterable[Any] | None = None, *, progress: bool = True, memory: str | int | None = None) -> Session | Calibration:
    """Calibrate a compiled model on typical data.

    As a context, ``with qcompile.calibrate(fast): for batch in loader: fast(**batch)``; with ``batches`` the loop is run here (a dictionary is keyword arguments, a tuple or list positional
    ones, anything else the only argument) and the Calibration is returned, which ``save`` writes to a file for ``options={"calibration": path}``. The model answers unquantized meanwhile.
    On leaving, the recipe's methods are run on what was seen, with a progress bar, and the next call compiles anew. Sittings add up. Several processes of torch.distributed merge their
    statistics; each must call with the same shapes in the same order. ``memory`` (``"4GiB"`` or bytes; default a third of what is free) bounds recorded calls and carried values.
    Raises CalibrationError for data that is not finite, or where nothing compiled ran.
    """
    here = Session(fast, progress, memory)
    if batches is None:
        return here
    with here:
        here.feed(batches)
    assert here.calibration is not None
    return here.calibration


def call(fast: Any, batch: Any) -> Any:
    """Call a model with one batch of data."""
    if isinstance(batch, Mapping):
        return fast(**batch)
    return fast(*batch) if isinstance(batch, (tuple, list)) else fast(batch)


def solve(units: Sequence[Unit], memory: int, progress: bool, again: bool, folder: Any = None) -> Outcome:
    """Solve all sites of the units on a replay of their calls; ``folder`` keeps what was solved and gives back what an interrupted run kept."""
    from qcompile.progress import bar

    total = sum(len(u.calls) * len(u.groups) for u in units)
    with bar("calibrating", total, progress) as step, compat.no_dispatch_modes():

        def said(line: Solved) -> None:
            step(0, f"{line.name}" + (f" {line.decibels:.1f} dB" if line.decibels is not None else "") + f" {line.seconds:.2f} s")

        return Run(units, memory, lambda: step(1), said, folder).run(again)


def warn_of(outcome: Outcome) -> None:
    """Warn of what was done instead of what was asked for, equal notes in one line."""
    notes: dict[str, list[str]] = {}
    for line in outcome.solved:
        for note in (n for n in line.notes if not n.startswith(CHOSE)):
            notes.setdefault(re.sub(r"\d+", "#", note), []).append(f"{line.name}: {note}")
    for lines in notes.values():
        more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        warnings.warn(f"qcompile: {'; '.join(lines[:4])}{more}", QcompileWarning, stacklevel=3)


def concrete(value: Any) -> Any:
    """Dynamo passes sizes as SymInts: their values, without a guard."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value
