"""What training keeps beside a model: steps and clips that estimators learn, ranges, histories. One table, by the module that holds the weight and the weight's name in it.

The model itself stays as it is. An entry follows the module, not the Parameter: it survives a replaced or resharded one. ``named`` lists what belongs to a model, ``state_dict`` and
``load_state_dict`` make training resumable, and whoever packs a weight (inference, ``qcompile.quantize``) asks ``step`` whether its step was learned.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import compat, histories
from qcompile.core.errors import WeightError, unknown
from qcompile.core.estimators import ESTIMATORS, grid_under
from qcompile.core.formats import encode
from qcompile.core.qtensor import QTensor, from_codes, grid_of, scaled
from qcompile.core.scheme import Scheme
from qcompile.passes.sites import shape_of
from qcompile.passes.slots import Slot


@dataclass(frozen=True)
class Kind:
    """One sort of state. ``learned``: a parameter for the optimizer. ``shape(slot, weight shape)``; ``initial(slot, weight (..., N, K), input or None)`` its first value, where the input is what the
    site reads in the first call (``needs_input``). ``dtype`` is what it is kept in."""

    learned: bool
    shape: Callable[[Slot, tuple[int, ...]], tuple[int, ...]]
    initial: Callable[[Slot, Tensor, Tensor | None], Tensor]
    needs_input: bool = False
    dtype: torch.dtype = torch.float32


def _first(estimator: str) -> Callable[[Slot, Tensor, Tensor | None], Tensor]:
    def initial(slot: Slot, w: Tensor, x: Tensor | None) -> Tensor:
        row = ESTIMATORS[estimator]
        assert row.initial is not None
        of_input = slot.key.startswith("input_")
        t = x.reshape(-1, x.shape[-1]) if of_input and x is not None else w
        out = row.initial(t.detach(), slot.scheme)
        return out.reshape(1) if of_input else out

    return initial


KINDS: dict[str, Kind] = {
    "step": Kind(True, lambda s, shape: s.scheme.grid_shape(shape), _first("lsq")),
    "clip": Kind(True, lambda s, shape: s.scheme.grid_shape(shape), _first("pact")),
    "input_step": Kind(True, lambda s, shape: (1,), _first("lsq"), True),
    "input_clip": Kind(True, lambda s, shape: (1,), _first("pact"), True),
    "input_range": Kind(False, lambda s, shape: (2,), lambda slot, w, x: torch.zeros(2, device=w.device)),
    "fp8_forward": Kind(False, histories.shape, histories.first_forward, True),
    "fp8_backward": Kind(False, histories.shape, histories.first_backward),
}
"""``step``, ``clip``: (..., N/r, K/c) of a weight; ``input_step``, ``input_clip``: (1,) of a static input; ``input_range``: [lo, hi] of a static input whose range moves;
``fp8_forward``, ``fp8_backward``: (1, 2 or 1, 3 + history) of a linear, see ``kernels/fp8_history.py``."""

READ_BY = {"input_step": "lsq", "input_clip": "pact", "input_range": "ste"}
"""What fixes the range of a static input -> the estimator that reads it."""
Key = tuple[str, str, str]
"""(name of the weight in its module, use and view, kind)."""


class StateTable:
    """Module -> its entries; entries die with their modules."""

    def __init__(self) -> None:
        self._held: weakref.WeakKeyDictionary[nn.Module, dict[Key, Tensor]] = weakref.WeakKeyDictionary()
        self._homes: dict[int, tuple[weakref.ref[Tensor], weakref.ref[nn.Module], str]] = {}
        self.alone: set[int] = set()
        """Ids of what each process learns by itself (``reduce=False``)."""
        self._learned: dict[int, tuple[weakref.ref[Tensor], Tensor, Tensor]] = {}

    def adopt(self, p: Tensor, module: nn.Module, name: str) -> None:
        """Make it known which module holds a parameter."""
        key, homes = id(p), self._homes
        homes[key] = (weakref.ref(p, lambda _: homes.pop(key, None)), weakref.ref(module), name)

    def home(self, p: Tensor) -> tuple[nn.Module, str] | None:
        """(module, name of the parameter in it) of a parameter that was adopted."""
        ref, module, name = self._homes.get(id(p), (lambda: None, lambda: None, ""))
        found = module()
        return (found, name) if ref() is p and found is not None else None

    def knows(self, module: nn.Module) -> bool:
        """Some weight below a module was trained, or got its state from a file."""
        held = {id(m) for _, ref, _ in self._homes.values() if (m := ref()) is not None}
        return any(id(m) in held for m in module.modules())

    def get(self, p: Tensor, slot: Slot) -> Tensor | None:
        """The entry that a slot reads for a parameter; None where there is none."""
        home = self.home(p)
        return None if home is None else self._held.get(home[0], {}).get(key_of(slot, home[1]))

    def held(self, module: nn.Module, key: Key) -> Tensor | None:
        """The entry under a key; None where there is none."""
        return self._held.get(module, {}).get(key)

    def put(self, module: nn.Module, key: Key, value: Tensor) -> Tensor:
        """Keep a value: written into the tensor that is there where it fits, so that graphs and optimizers see it; else a new one, a Parameter where it is learned."""
        entries = self._held.setdefault(module, {})
        old = entries.get(key)
        if old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
            with torch.no_grad():
                old.copy_(value)
            self._remember(old)
            return old
        value = value.detach().clone()
        entries[key] = nn.Parameter(value) if KINDS[key[2]].learned else value
        if KINDS[key[2]].learned:
            entries[key].register_post_accumulate_grad_hook(_average)
            self._remember(entries[key])
        return entries[key]

    def stacked(self, wanted: Sequence[tuple[Tensor, Slot]]) -> tuple[Tensor, bool]:
        """(one tensor (S, ...) whose rows are the entries (1, ...) of S parameters and slots, whether they were moved there just now). Entries are views of it."""
        parts = [self.get(p, slot) for p, slot in wanted]
        held = [part for part in parts if part is not None]
        assert len(held) == len(parts), f"no {wanted[0][1].key} was made for {[slot.path for (_, slot), part in zip(wanted, parts) if part is None]}"
        if (whole := histories.together(held)) is not None:
            return whole, False
        whole = torch.cat(held)
        for i, (p, slot) in enumerate(wanted):
            module, name = self.home(p) or (None, "")
            assert module is not None
            self._held[module][key_of(slot, name)] = whole[i : i + 1]
        return whole, True

    def overflows(self, p: Tensor) -> dict[str, int]:
        """Of a parameter that trained in FP8 with delayed scaling: role ("input", "weight", "gradient") -> calls that met values beyond their scale, inf or NaN."""
        module, name = self.home(p) or (None, "")
        found: dict[str, int] = {}
        for (owner, _, kind), tensor in (self._held.get(module, {}) if module is not None else {}).items():
            for role, count in (histories.counts(kind, tensor) if owner == name and kind in histories.ROLES else {}).items():
                found[role] = found.get(role, 0) + count
        return found

    def _remember(self, learned: Tensor) -> None:
        """Keep a copy of healthy values of what an optimizer may spoil, and count (on the device) how often it did."""
        if isinstance(learned, nn.Parameter):
            key, table = id(learned), self._learned
            _, _, count = table.get(key, (None, None, None))
            count = torch.zeros((), dtype=torch.int64, device=learned.device) if count is None else count

            def forget(_: Any) -> None:
                table.pop(key, None)
                self.alone.discard(key)

            table[key] = (weakref.ref(learned, forget), learned.detach().clone(), count)

    def repair(self, parameters: Iterable[Tensor]) -> None:
        """After an optimizer's step: numbers that became negative, zero, infinite or NaN get their last healthy values back, and are counted."""
        with torch.no_grad():
            for p in parameters:
                ref, last, count = self._learned.get(id(p), (None, None, None))
                if ref is None or ref() is not p or last is None or count is None:
                    continue
                healthy = torch.isfinite(p) & (p > 0)
                count += (~healthy).sum()
                p.copy_(torch.where(healthy, p, last))
                last.copy_(p)

    def repaired(self, module: nn.Module) -> dict[str, int]:
        """Name of each learned entry below a module -> how many of its numbers were given back so far; those with none are left out."""
        counts = {name: int(self._learned[id(t)][2]) for name, t in self.named(module) if id(t) in self._learned}
        return {name: n for name, n in counts.items() if n}

    def repairs(self, module: nn.Module) -> list[str]:
        """A line for each entry of ``repaired``."""
        return [f"{name}: {n} learned numbers that a step of the optimizer had made zero, negative, infinite or NaN got their last healthy values back" for name, n in self.repaired(module).items()]

    def named(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all entries below a module, in the order of its modules: ``layers.0.up_proj.weight.step``."""
        for path, owner in module.named_modules():
            for (name, use, kind), tensor in self._held.get(owner, {}).items():
                yield f"{path}.{name}{use}.{kind}".replace("_orig_mod.", "").lstrip("."), tensor

    def step(self, p: Tensor, how: str, scheme: Scheme) -> Tensor | None:
        """The learned scale of a weight seen by ``how`` under a scheme, (..., N/r, K/c) float32; None where none was learned."""
        home = self.home(p)
        if home is None:
            return None
        for row in ESTIMATORS.values():
            if row.learns and (found := self._held.get(home[0], {}).get((home[1], _use("", how), row.learns))) is not None and tuple(found.shape) == scheme.grid_shape(shape_of(p, how)):
                return row.scale(found.detach().float(), scheme)
        return None

    def codes(self, p: Tensor, how: str, w: Tensor, scheme: Scheme, path: str) -> QTensor | None:
        """A weight ``w`` (..., N, K), ``p`` seen by ``how``, under its learned scales, as its training graph rounds it; None where none were learned."""
        scale = self.step(p, how, scheme)
        if scale is None:
            return None
        g = grid_of(scale.to(w.device), None, scheme, w.shape, path)
        return from_codes(encode(scaled(w, g), g.fmt), g)

    def range(self, p: Tensor, site: str, how: str, scheme: Scheme) -> tuple[Tensor, ...]:
        """The range of a static input as training left it: (scale (1,),) or (scale, zero), float32; empty where there is none."""
        home = self.home(p)
        entries = self._held.get(home[0], {}) if home is not None else {}
        for kind, estimator in READ_BY.items():
            found = entries.get((home[1] if home else "", _use(site, how), kind))
            if found is not None:
                g = grid_under(torch.empty(1, 1, device=found.device), [found.detach()], scheme, estimator, True)
                return tuple(t.reshape(1) for t in g.parts() if t is not None)
        return ()

    def weights(self, learned: Iterable[Tensor]) -> list[Tensor]:
        """The live parameters whose packed values depend on any of these entries."""
        ids = {id(t) for t in learned if id(t) in self._learned}
        modules = [module for module, entries in list(self._held.items()) if any(id(t) in ids for t in entries.values())] if ids else []
        return [p for module in modules for p in module._parameters.values() if p is not None]


def _average(p: Tensor) -> None:
    """The mean gradient of what is learned over all processes: DistributedDataParallel does not know it. Right under gradient accumulation, too: the mean of a mean is itself."""
    if p.grad is not None and id(p) not in STATE.alone:
        p.grad.copy_(compat.all_reduce(p.grad, "sum") / compat.world_size())


def _use(site: str, how: str) -> str:
    """What tells uses of one weight apart: the second call of a layer, one matrix of a stack."""
    at = site.rpartition("@")[2] if "@" in site else ""
    return (f"@{at}" if at.isdigit() else "") + (f":{how}" if how and how != "t" else "")


def key_of(slot: Slot, name: str) -> Key:
    """The key of a slot's entry in the module that calls the weight ``name``. A weight that is used twice has one step, and each of its uses a range."""
    return name, _use(slot.site if slot.key.startswith(("input_", "fp8_")) else "", slot.view), slot.key


STATE = StateTable()


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that training keeps beside a model, detached; to be saved beside ``model.state_dict()``."""
    return {name: t.detach() for name, t in STATE.named(model)}


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model what ``state_dict`` gave, before or after it was compiled: values are written in place where they are there. Raises WeightError for a name that the model does not have, or a
    kind that does not exist, before anything is written."""
    modules = {path.replace("_orig_mod.", "").replace("_orig_mod", ""): module for path, module in model.named_modules()}
    todo: list[tuple[nn.Module, Key, Tensor]] = []
    for full, value in state.items():
        front, _, kind = full.rpartition(".")
        if kind not in KINDS:
            raise unknown("kind of training state", kind, KINDS, repr(full))
        path, _, rest = front.rpartition(".")
        while path and path not in modules:  # a view such as ":[3].t" may hold dots
            path, _, more = path.rpartition(".")
            rest = f"{more}.{rest}"
        module = modules.get(path)
        cut = min((i for i in (rest.find("@"), rest.find(":")) if i >= 0), default=len(rest))
        name, use = rest[:cut], rest[cut:]
        if module is None or name not in module._parameters:
            raise WeightError(f"training state {full!r} belongs to parameter {f'{path}.{name}'.strip('.')!r}, which this {type(model).__name__} does not have; it was saved for another model")
        p: Any = module._parameters[name]
        old = STATE.held(module, (name, use, kind))
        if old is not None and old.shape != value.shape:
            raise WeightError(f"training state {full!r} is {tuple(value.shape)}, and this model trains with {tuple(old.shape)}: it was saved with other options (another scheme, or length of history)")
        todo.append((module, (name, use, kind), value.to(p.device)))
        STATE.adopt(p, module, name)
    for module, key, value in todo:
        STATE.put(module, key, value)


__all__ = ["KINDS", "STATE", "Kind", "StateTable", "key_of", "load_state_dict", "state_dict"]
