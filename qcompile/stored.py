"""A weight kept as codes and scales in an ordinary module: what ``qcompile.quantize`` leaves, and how the backend recognizes it.

The parameter is parametrized (``torch.nn.utils.parametrize``): its tensors are plain parameters of the module, its value is computed by the op ``stored``, so that eager, ``state_dict``, ``torch.export``
and ``torch.save`` work. Modules of one class share one parametrized class (``_Shared``), so that Dynamo serves equal layers by one graph. In a compiled graph the op is seen as the weight itself, with its scheme decided and its codes ready.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from qcompile.core.errors import WeightError
from qcompile.core.qtensor import QTensor
from qcompile.core.recipe import Choice, Method
from qcompile.core.solution import Solution
from qcompile.kernels.op import target
from qcompile.passes.sites import Param


@dataclass(frozen=True)
class Spec:
    """How the tensors of a stored weight read: how many are codes and scales, whether a vector and outlier columns follow, the range's length, K, and whether the module holds it as (K, N)."""

    choice: Choice
    packed: int
    smooth: bool
    outliers: bool
    ranges: int
    k: int
    transposed: bool
    kind: str


class Stored(nn.Module):
    """The parametrization. Its tensors: codes, scales, zeros; s; outlier indices and columns; static range; an empty one, whose dtype is the weight's and is cast with the model."""

    def __init__(self, spec: Spec, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.spec = spec
        self.scheme = str(spec.choice.weight)  # made here: Dynamo cannot trace how
        self._first: list[Tensor] | None = list(tensors)

    def parts(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """(codes and scales, [s] or [], [indices, columns] or [], range) of the tensors."""
        rest, sizes = list(tensors), (self.spec.packed, int(self.spec.smooth), 2 * self.spec.outliers, self.spec.ranges)
        out = []
        for size in sizes:
            out.append(rest[:size])
            rest = rest[size:]
        return out[0], out[1], out[2], out[3]

    def forward(self, *tensors: Tensor) -> Tensor:
        """The weight in its own dtype and orientation."""
        weight, smooth, outliers, _ = self.parts(tensors)
        w: Tensor = target("stored")(weight, smooth, outliers, self.scheme, self.spec.k, tensors[-1].dtype)
        return w.transpose(-1, -2) if self.spec.transposed else w

    def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
        """The tensors, once; afterwards the weight cannot be assigned. Raises WeightError then."""
        if self._first is None:
            raise WeightError("this weight is stored as codes and cannot be assigned; torch.nn.utils.parametrize.remove_parametrizations gives a plain parameter back")
        first, self._first = self._first, None
        return tuple(first)

    def solution(self, tensors: Sequence[Tensor]) -> Solution:
        """The solution that these tensors stand for."""
        weight, smooth, outliers, ranges = self.parts([t.detach() for t in tensors])
        q = QTensor.unflatten(weight, self.spec.choice.weight, self.spec.k)
        index, columns = outliers or (None, None)
        return Solution(smooth=smooth[0] if smooth else None, range=tuple(ranges), q=q, outliers=index, columns=columns, heads=self.spec.choice.heads)


def install(module: nn.Module, name: str, choice: Choice, solution: Solution, transposed: bool) -> None:
    """Replace a parameter by its codes. ``solution.q`` holds them; a corrected bias is added to the module's."""
    p = module._parameters[name]
    assert p is not None and solution.q is not None
    kept = [solution.outliers, solution.kept(p.detach().transpose(-1, -2) if transposed else p.detach()).to(p.dtype)] if choice.outliers and solution.outliers is not None else []
    smooth = [solution.smooth] if solution.smooth is not None else []
    packed = solution.q.flatten()
    tensors = [t.to(p.device) for t in (*packed, *smooth, *kept, *solution.range, torch.empty(0, dtype=p.dtype))]
    if solution.bias is not None:
        _correct(module, solution.bias.to(p.device), p.dtype)
    marks = tuple(m for m in choice.methods if m.options.get("dynamic"))
    key = Method("stored", (("input", _digest([*smooth, *kept[:1], *solution.range])),))
    stays = replace(choice, methods=(key, *marks), corrected=False, why="stored")
    spec = Spec(stays, len(packed), bool(smooth), bool(kept), len(solution.range), solution.q.k, transposed, type(module).__name__)
    p.requires_grad_(False)
    parametrize.register_parametrization(module, name, Stored(spec, tensors), unsafe=True)
    if type(type(module)) in (type, _Shared):
        module.__class__ = _shared(type(module).__bases__[0], frozenset(module.parametrizations))  # type: ignore[arg-type]


class _Shared(type):
    """The class of all modules of one kind that have the same parametrized names.

    PyTorch makes a class for each module, puts properties into it and takes them away: Dynamo then captures equal layers one by one, and gives up after eight.
    Here a property stays where a module loses its parametrization, and finds the plain parameter; a module that is about to get a further one leaves for a class of its own.
    """

    def __delattr__(cls, name: str) -> None:
        if not isinstance(vars(cls).get(name), property):
            super().__delattr__(name)


_CLASSES: dict[tuple[type, frozenset[str]], type] = {}


def _shared(base: type, names: frozenset[str]) -> type:
    if (base, names) not in _CLASSES:
        body: dict[str, Any] = {name: _tolerant(name) for name in names}
        _CLASSES[base, names] = _Shared(f"Parametrized{base.__name__}", (base,), {**body, "__reduce_ex__": _reduced, "__delattr__": _leaves})
    return _CLASSES[base, names]


def _leaves(self: nn.Module, name: str) -> None:
    """``register_parametrization`` deletes the parameter, then puts a property into the class."""
    cls = type(self)
    if name in self._parameters and cls in _CLASSES.values():
        own: Any = _Shared(cls.__name__, cls.__bases__, {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")})
        self.__class__ = own
    nn.Module.__delattr__(self, name)


def _tolerant(name: str) -> property:
    """The value of a parametrization, in modules that have it."""

    def get(self: nn.Module) -> Any:
        held = self._modules.get("parametrizations")
        if held is None or name not in held:  # type: ignore[operator]
            raise AttributeError(name)  # nn.Module looks among the parameters then
        return held[name]()  # type: ignore[index]

    def put(self: nn.Module, value: Tensor) -> None:
        self.parametrizations[name].right_inverse(value)  # type: ignore[index, union-attr]

    return property(get, put)


def _reduced(self: nn.Module, protocol: Any) -> Any:
    """How a module is copied and pickled: by its plain class and the names, which make its class again."""
    return _rebuilt, (type(self).__bases__[0], tuple(sorted(self.parametrizations))), self.__dict__  # type: ignore[arg-type]


def _rebuilt(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls: Any = _shared(base, frozenset(names))
    made: nn.Module = cls.__new__(cls)
    return made


def _correct(module: nn.Module, by: Tensor, dtype: torch.dtype) -> None:
    bias = module._parameters.get("bias")
    with torch.no_grad():
        if bias is not None:
            bias.add_(by.to(bias.dtype))
        else:
            module.bias = nn.Parameter(by.to(dtype), requires_grad=False)


def _digest(tensors: Sequence[Tensor]) -> str:
    """Equal for linears whose input is treated the same way."""
    import hashlib

    return hashlib.sha256(b"".join(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()[:12]


def of(parameter: Tensor, names: dict[int, tuple[nn.Module, str, str]]) -> parametrize.ParametrizationList | None:
    """The parametrization whose codes a parameter holds."""
    owner, _, name = names.get(id(parameter), (None, "", ""))
    found = isinstance(owner, parametrize.ParametrizationList) and len(owner) == 1 and isinstance(owner[0], Stored) and name == "original0"
    return owner if found else None  # type: ignore[return-value]


def plain(path: str, name: str) -> str:
    """The name that a parameter had before it was parametrized: ``fc.parametrizations.weight`` and ``original0`` are ``fc.weight``."""
    full = f"{path}.{name}".strip(".")
    return full.replace("parametrizations.", "").removesuffix(".original0") if "parametrizations." in full else full


def live(owner: parametrize.ParametrizationList) -> Solution:
    """A solution that always reads the module's tensors as they are, wherever they were moved."""
    ref = weakref.ref(owner)

    def now() -> Solution:
        owner = ref()
        if owner is None:
            raise WeightError("the module that held these codes no longer exists")
        return owner[0].solution(tensors_of(owner))  # type: ignore[operator, union-attr]

    return replace(now(), q=None, live=now)


def tensors_of(owner: parametrize.ParametrizationList) -> list[Tensor]:
    """All tensors of a parametrization, in order."""
    return [getattr(owner, f"original{i}") for i in range(owner.ntensors)]


def fold(gm: fx.GraphModule, inputs: Sequence[Any], names: dict[int, tuple[nn.Module, str, str]]) -> None:
    """Let the placeholder of the codes stand for the weight itself: it gets the weight's name, shape and decided choice, and the op is gone. ``unfold`` puts it back.

    A module that is called twice, or that asks for the dtype of its weight, has the op several times.
    """
    for i, codes in enumerate(gm.graph.find_nodes(op="placeholder")):
        ops = [node for node in codes.users if node.target is target("stored")]
        owner = of(inputs[i], names) if ops and len(ops) == len(codes.users) and all(node.args == ops[0].args for node in ops) else None
        if owner is None:
            continue
        spec: Spec = owner[0].spec  # type: ignore[assignment]
        path = plain(*names[id(inputs[i])][1:])
        codes.meta |= {"param": Param(i, path, spec.kind), "stored": spec.choice, "codes": codes.meta["example_value"]}
        codes.meta["op"] = fx.map_arg(ops[0].args, lambda n: n.name)
        codes.meta["example_value"] = ops[0].meta["example_value"]
        for node in ops:
            node.replace_all_uses_with(codes)
            gm.graph.erase_node(node)
    gm.recompile()


def unfold(gm: fx.GraphModule) -> None:
    """Compute the stored weights that a graph still reads: linears that a rule keeps in 16 bits."""
    named = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    inputs = list(named.values())
    for codes in inputs:
        if "stored" in codes.meta and codes.users:
            readers = list(codes.users)
            with gm.graph.inserting_after(inputs[-1]):
                value = gm.graph.call_function(target("stored"), _nodes(codes.meta["op"], named))
            value.meta["example_value"] = codes.meta["example_value"]
            for reader in readers:
                reader.replace_input_with(codes, value)
            codes.meta["example_value"] = codes.meta["codes"]


def _nodes(args: Any, named: dict[str, fx.Node]) -> Any:
    if isinstance(args, (list, tuple)):
        return type(args)(_nodes(a, named) for a in args)
    return named.get(args, args) if isinstance(args, str) else args


def values(gm: fx.GraphModule, args: Sequence[Any]) -> list[Any]:
    """Arguments for running a folded graph as it is: weights in the place of their codes."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if not any("stored" in p.meta for p in placeholders):
        return list(args)
    named = {p.name: a for p, a in zip(placeholders, args)}

    def value(p: fx.Node, a: Any) -> Any:
        return target("stored")(*_values(p.meta["op"], named)) if "stored" in p.meta else a

    return [value(p, a) for p, a in zip(placeholders, args)]


def _values(args: Any, named: dict[str, Any]) -> Any:
    if isinstance(args, (list, tuple)):
        return [_values(a, named) for a in args]
    return named[args] if isinstance(args, str) and args in named else args
