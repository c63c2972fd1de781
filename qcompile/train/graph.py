"""A graph that is trained: Dynamo's graph with the ops of a training recipe in it, compiled by Inductor forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.backend import CompiledGraph
from qcompile.calibrate import concrete
from qcompile.core.digest import digest
from qcompile.core.errors import WeightError
from qcompile.core.recipe import Choice
from qcompile.owners import owners_of
from qcompile.passes import TRAININGS
from qcompile.passes.match import Plan
from qcompile.passes.observe import run_observed
from qcompile.passes.sites import Site, shape_of, view
from qcompile.passes.slots import Slot
from qcompile.trained import KINDS, STATE, key_of
from qcompile.weights import GENERATION, TABLE


class TrainingGraph(CompiledGraph):
    """One captured graph under one plan, with gradients. Callable with Dynamo's arguments."""

    pipeline = ("checkpoints", *(name for name in CompiledGraph.pipeline if name != "observe"))

    def _rewrite(self, matched: fx.GraphModule, context: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self.options.train is not None
        matched.meta["plan"] = self._kept_out(matched.meta["sites"], matched.meta["plan"])
        self.planned = matched
        return matched, self._run([TRAININGS[self.options.train.name].insert], matched, context)

    def _kept_out(self, sites: Mapping[str, Site], plan: Plan) -> Plan:
        assert self.options.train is not None
        keeps = TRAININGS[self.options.train.name].keeps
        return {name: (keeps(sites[name], c) or c) if isinstance(c, Choice) else c for name, c in plan.items()}

    def _engine(self, gm: fx.GraphModule) -> Callable[..., Any]:
        return gm  # eager, with gradients

    def _key(self) -> bytes:
        return digest(super()._key(), repr(compat.world_size()).encode())  # an all-reduce is in the graph where there are several processes

    def calibrate(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[str, dict[str, Choice]]:
        return "", {}

    def _ready(self, args: Sequence[Any]) -> None:
        """Make the state that these parameters do not have yet: an estimator's first values, those of inputs from what sites read in this call."""
        missing: list[Slot] = []
        homeless = [p for site in self.sites.values() if STATE.home(p := args[site.param.index]) is None]
        names = owners_of(homeless)
        for p in homeless:
            if id(p) in names:
                STATE.adopt(p, names[id(p)][0], names[id(p)][2])
        for slot in (part for s in self.slots if s.what == "state" for part in (s, *s.rest)):
            p = args[slot.arg]
            if STATE.home(p) is None:
                raise WeightError(f"parameter {slot.path} belongs to no live module, which is where training keeps what it learns; make it a module's parameter, or train with estimators that learn nothing")
            found = STATE.get(p, slot)
            if found is None or tuple(found.shape) != KINDS[slot.key].shape(slot, shape_of(p, slot.view)) or found.device != p.device:
                missing.append(slot)
        if not missing:
            return
        read = {slot.site for slot in missing if KINDS[slot.key].needs_input}
        seen: dict[str, Tensor] = {}
        together = self.options.training.get("reduce", True)
        if read:
            run_observed(self.matched, [concrete(a) for a in args], read, lambda site, x, _: seen.__setitem__(site, x.detach().clone()))
        for slot in missing:
            p = args[slot.arg]
            with compat.no_dispatch_modes(), torch.no_grad():
                first = KINDS[slot.key].initial(slot, view(p.detach(), slot.view), seen.get(slot.site)).to(KINDS[slot.key].dtype)
                first = compat.all_reduce(first, "max") if KINDS[slot.key].learned and together else first  # processes start alike; of ranges, the greatest is that of all that came
                home = STATE.home(p)
                assert home is not None
                kept = STATE.put(home[0], key_of(slot, home[1]), first)
                (STATE.alone.discard if together else STATE.alone.add)(id(kept))

    def __call__(self, *args: Any) -> Any:
        if any(slot.key == "input_range" for slot in self.slots):
            GENERATION[0] += 1  # this call moves ranges that graphs for inference read
        return super().__call__(*args)


def _stepped(parameters: Any) -> None:
    """After an optimizer's step: what it spoiled is repaired, and weights whose steps moved are packed again."""
    parameters = list(parameters)
    STATE.repair(parameters)
    TABLE.forget(STATE.weights(parameters))


compat.on_optimizer_step(_stepped)
