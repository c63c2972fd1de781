"""Run captured graphs again on recorded calls, site by site, with the sites before already quantized.

A *unit* is one captured graph with the parameters it ran with, and its calls. Units that read the same parameters (prefill and decode, graphs of several shapes) go forward together; a unit
that reads what an earlier one returned (a graph break) reads its quantized output. Between two sites the values that are still needed are carried, where few are; else the run starts again
at the last place where few were. One forward over the data serves all sites, with at most a few graphs' worth of values held.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.capture import VIEWS
from qcompile.core.errors import WeightError
from qcompile.core.recipe import Choice
from qcompile.passes import experts
from qcompile.passes.infra import called, written_by
from qcompile.passes.observe import input_of
from qcompile.passes.sites import Site
from qcompile.stored import values

Env = dict[fx.Node, Any]
NARROW = 1.5
"""A cut is narrow where it carries at most this many times the bytes of the lower quartile of the best cuts between neighbouring groups: in a transformer, the residual stream."""


@dataclass
class Call:
    """Arguments of one call of a unit, parameters left out; which of them are outputs of earlier calls; what is carried (``parked``: in host memory, and where it belongs), and what this call returned once it ran quantized."""

    args: dict[int, Any]
    links: dict[int, tuple[Call, int]] = field(default_factory=dict)
    env: Env = field(default_factory=dict)
    parked: dict[fx.Node, torch.device] = field(default_factory=dict)
    outputs: Any = None


@dataclass(frozen=True)
class Group:
    """Sites of a unit that read one input: the node of the input, where the first of them stands, their names."""

    x: fx.Node
    position: int
    names: tuple[str, ...]


class Unit:
    """A planned graph (sites found, schemes matched), its live parameters (held weakly) and its calls."""

    def __init__(self, gm: fx.GraphModule, args: Sequence[Any], autocast: tuple[str, torch.dtype] | None = None) -> None:
        self.gm, self.autocast = gm, autocast
        self._interpreter = fx.Interpreter(gm, garbage_collect_values=False)  # one for all runs: it is made from the whole graph, runs are short and drop values themselves
        self.nodes = list(gm.graph.nodes)
        self.placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.calls: list[Call] = []
        forget = self.calls.clear
        self._params = {i: weakref.ref(args[i], lambda _: forget()) for i, n in enumerate(self.placeholders) if "param" in n.meta}
        self.sites: dict[str, Site] = gm.meta["sites"]
        self.plan: dict[str, Any] = gm.meta["plan"]
        self._index = {node: i for i, node in enumerate(self.nodes)}
        self._last = {node: max((self._index[u] for u in node.users), default=self._index[node]) for node in self.nodes}
        for node in self.nodes:  # whose rows go to which expert is read when the product is replaced, not only where the graph picks weights by it
            product = experts.resolve(node) if "site" in node.meta else None
            if isinstance(product, experts.Experts) and product.index is not None:
                self._last[product.index] = max(self._last[product.index], self._index[node])
        self._live = self._find_live()
        self.groups = self._find_groups()
        self.cut = len(self.placeholders)
        ends = sorted({self.cut, *(g.position for g in self.groups)})
        between = sorted(self.best_cut(low + 1, high)[1] for low, high in pairwise(ends))
        self.narrow = NARROW * between[len(between) // 4] if between else 0.0

    def parameter(self, site: Site) -> Tensor:
        """The live weight of a site. Raises WeightError where the model is gone."""
        return self.live(site.param.index)

    def live(self, index: int) -> Tensor:
        """The live parameter at a position among the graph's inputs. Raises WeightError where the model is gone."""
        p = self._params[index]()
        if p is None:
            raise WeightError(f"the parameter {self.placeholders[index].meta['param'].path} that was calibrated no longer exists")
        return p

    def parameters(self) -> list[Tensor]:
        """All live parameters that the graph reads."""
        return [self.live(index) for index in self._params]

    def shares(self, other: Unit) -> bool:
        """Both read a weight of the same linear."""
        mine = {id(self._params[s.param.index]()) for s in self.sites.values()}
        return any(id(other._params[s.param.index]()) in mine for s in other.sites.values())

    def agrees(self, other: Unit) -> bool:
        """Both read a weight of the same linear, and get the same schemes and methods for it."""
        mine = {id(self.parameter(s)): self.plan[n] for n, s in self.sites.items()}
        plans = [(mine[id(other.parameter(s))], other.plan[n]) for n, s in other.sites.items() if id(other.parameter(s)) in mine]
        return bool(plans) and all(str(a) == str(b) and getattr(a, "key", "") == getattr(b, "key", "") for a, b in plans)

    @property
    def alive(self) -> bool:
        """All parameters still exist."""
        return all(ref() is not None for ref in self._params.values())

    def record(self, args: Sequence[Any], links: Mapping[int, tuple[Call, int]] | None = None, copied: Callable[[Tensor], Tensor] = lambda t: t.detach().clone()) -> Call:
        """Keep one call: its tensors are copied, so that what the model writes to later does not change them."""
        call = Call({i: copied(a) if isinstance(a, Tensor) else a for i, a in enumerate(args) if i not in self._params}, dict(links or {}))
        self.calls.append(call)
        return call

    def reset(self) -> None:
        """Forget what a run computed; the recorded arguments stay."""
        self.cut = len(self.placeholders)
        for call in self.calls:
            call.env, call.parked, call.outputs = {}, {}, None

    def _find_groups(self) -> list[Group]:
        found: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        for node in self.nodes:
            name = node.meta.get("site")
            if name is not None and isinstance(self.plan.get(name), Choice):
                found.setdefault((input_of(node), self.sites[name].k), []).append(node)
        return [Group(x, min(self._index[n] for n in nodes), tuple(n.meta["site"] for n in nodes)) for (x, _), nodes in found.items()]

    # --- running --------------------------------------------------------------------------------------------------------

    def begin(self, call: Call) -> None:
        """Fill a call's values with its arguments; those that an earlier unit returned are taken from its quantized run."""
        env = self.arguments(call)
        for i, (earlier, which) in call.links.items():
            if earlier.outputs is not None:
                env[self.placeholders[i]] = earlier.outputs[which]
        call.env = self.private(env, len(self.placeholders), len(self.nodes))

    def arguments(self, call: Call) -> Env:
        """The recorded arguments of a call and the live parameters."""
        given = [self._params[i]() if i in self._params else call.args[i] for i in range(len(self.placeholders))]
        return dict(zip(self.placeholders, values(self.gm, given)))

    def run(self, env: Env, start: int, stop: int, product: Callable[[Unit, fx.Node, Env], Any] | None) -> Any:
        """Execute nodes ``start`` to ``stop`` on ``env``, dropping values that nothing later needs; ``product`` computes sites that are quantized already (None: it is not)."""
        interpreter = self._interpreter
        interpreter.env = env
        try:
            for node in self.nodes[start:stop]:
                if node.op == "output":
                    return interpreter.run_node(node)
                value = product(self, node, env) if product is not None and "site" in node.meta else None
                env[node] = interpreter.run_node(node) if value is None else value
                for source in node.all_input_nodes:
                    if self._last[source] <= self._index[node]:
                        env.pop(source, None)
                if not node.users:
                    env.pop(node, None)
        finally:
            interpreter.env = {}
        return None

    def live_bytes(self, position: int) -> int:
        """Bytes of computed values that nodes from ``position`` on need."""
        return self._live[position]

    def _find_live(self) -> list[int]:
        change = [0] * (len(self.nodes) + 2)
        for node in self.nodes[len(self.placeholders) :]:
            if (last := self._last[node]) > (first := self._index[node]):
                size = _nbytes(node.meta.get("example_value", node.meta.get("val")))
                change[first + 1] += size
                change[last + 1] -= size
        return list(accumulate(change))

    def best_cut(self, low: int, high: int) -> tuple[int, int]:
        """(position, bytes) of the place in [low, high] where the fewest bytes are live; the last one of equals."""
        return min(((position, self.live_bytes(position)) for position in range(low, high + 1)), key=lambda c: (c[1], -c[0]))

    def private(self, env: Env, start: int, stop: int) -> Env:
        """A copy of ``env`` whose tensors may be written to by the nodes between: the storages that they write to are cloned, views of them along."""
        written: set[int] = set()
        for node in self.nodes[start:stop]:
            for root in written_by(node):
                while isinstance(root, fx.Node) and root not in env and _is_view(root):
                    root = root.args[0]  # type: ignore[assignment]
                if isinstance(root, fx.Node) and isinstance(env.get(root), Tensor):
                    written.add(env[root].untyped_storage().data_ptr())
        if not written:
            return dict(env)
        clones: dict[int, Tensor] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() not in written:
                return value
            key = value.untyped_storage().data_ptr()
            if key not in clones:
                clones[key] = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage().clone())  # type: ignore[call-overload]
            return clones[key].view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())

        return {node: copied(value) for node, value in env.items()}


def nbytes(units: Sequence[Unit]) -> int:
    """Bytes of the recorded tensors; calls may share some."""
    return sum({id(a): a.nbytes for unit in units for call in unit.calls for a in call.args.values() if isinstance(a, Tensor)}.values())


ALIASES = {"chunk", "split", "unbind", "tensor_split", "unflatten", "view_as", "expand_as", "swapaxes", "swapdims", "movedim", "contiguous", "to", "float", "type_as", "getattr", "T", "mT", "data"}
"""Further ops whose result may be a view of their input."""


def _is_view(node: fx.Node) -> bool:
    return bool(node.args) and (called(node) in VIEWS | ALIASES or node.args[0] in written_by(node))


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        count = 1
        for size in value.shape:
            count *= size if isinstance(size, int) else int(getattr(size.node, "hint", 1) or 1)
        return count * value.dtype.itemsize
    return sum(map(_nbytes, value)) if isinstance(value, (tuple, list)) else 0


@contextlib.contextmanager
def as_recorded(unit: Unit) -> Iterator[None]:
    """Outside any compile, without gradients, with the autocast that the calls ran under."""
    device, dtype = unit.autocast or ("cpu", torch.bfloat16)
    with compat.no_dispatch_modes(), torch.no_grad(), torch.autocast(device, dtype, enabled=unit.autocast is not None):
        yield


def advance(unit: Unit, group: Group, product: Callable[[Unit, fx.Node, Env], Any], see: Callable[[Env], None], budget: float, tick: Callable[[], None]) -> None:
    """Bring every call of ``unit`` to the input of ``group`` and show it: ``see(env)`` with the values there. What is carried on the way stays carried."""
    position, size = unit.cut, 0
    if group.position > unit.cut and unit.live_bytes(group.position) * len(unit.calls) <= budget:
        position = group.position
    elif group.position > unit.cut:
        position, size = unit.best_cut(unit.cut + 1, group.position)
    carry = position > unit.cut and (size * len(unit.calls) <= budget or size <= unit.narrow)
    start = position if carry else unit.cut
    over = unit.live_bytes(start) * len(unit.calls) > budget
    with as_recorded(unit):
        for call in unit.calls:
            if not call.env:
                unit.begin(call)
            fetch(call)
            if carry:
                unit.run(call.env, unit.cut, position, product)
            env = unit.private(call.env, start, group.position)
            unit.run(env, start, group.position, product)
            see(env)
            del env
            if over:
                park(unit, call)
            tick()
    if carry:
        unit.cut = position


def park(unit: Unit, call: Call) -> None:
    """Move carried values to host memory. Those that share their storage stay: what is written to one is written to all."""
    given = [*unit.parameters(), *call.args.values(), *call.env.values()]
    count = Counter(t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor))
    for node, value in call.env.items():
        if node.op != "placeholder" and isinstance(value, Tensor) and _far(value) and value.is_contiguous() and count[value.untyped_storage().data_ptr()] == 1:
            call.parked[node], call.env[node] = value.device, _to_host(value)


def fetch(call: Call) -> None:
    """Bring parked values back."""
    for node, device in call.parked.items():
        call.env[node] = call.env[node].to(device)
    call.parked.clear()


def _far(value: Tensor) -> bool:
    return value.device.type != "cpu"


def _to_host(value: Tensor) -> Tensor:
    return value.to("cpu")


def finish(unit: Unit, product: Callable[[Unit, fx.Node, Env], Any], see: Callable[[Call, Any], None] | None = None) -> None:
    """Run every call to its end, and keep its outputs for the units that read them."""
    with as_recorded(unit):
        for call in unit.calls:
            if not call.env:
                unit.begin(call)
            fetch(call)
            call.outputs = unit.run(call.env, unit.cut, len(unit.nodes), product)
            call.env = {}
            if see is not None:
                see(call, call.outputs)
    unit.cut = len(unit.placeholders)


def original(unit: Unit, call: Call) -> Any:
    """What the call returns unquantized, computed again on copies of its arguments."""
    with as_recorded(unit):
        env = unit.private(unit.arguments(call), len(unit.placeholders), len(unit.nodes))
        return unit.run(env, len(unit.placeholders), len(unit.nodes), None)


def rows_of(unit: Unit, node: fx.Node, env: Env) -> tuple[Tensor, Tensor | None]:
    """(rows (T, K) that a site's node reads, the expert of each row or None) from the values at its input."""
    product = experts.resolve(node)
    x = env[input_of(node)]
    if not isinstance(product, experts.Experts):
        return x.reshape(-1, x.shape[-1]).to(node.meta["example_value"].dtype), None  # autocast rounds what the product reads
    return experts.rows(product, x, None if product.index is None else env[product.index])
