"""A weight kept as codes and scales in an ordinary module: what ``qcompile.quantize`` leaves, and how the backend recognizes it.

The parameter is parametrized (``torch.nn.utils.parametrize``): its tensors are plain parameters of the module, its value is computed by the op ``stored``, so that eager, ``state_dict``, ``torch.export``
and ``torch.save`` work. In a compiled graph the op is seen as the weight itself, with its scheme decided and its codes ready.
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
        w: Tensor = target("stored")(weight, smooth, outliers, str(self.spec.choice.weight), self.spec.k, tensors[-1].dtype)
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
        return Solution(smooth=smooth[0] if smooth else None, range=tuple(ranges), q=q, outliers=index, columns=columns)


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
    """Let the placeholder of the codes stand for the weight itself: it gets the weight's name, shape and decided choice, and the op is gone. ``unfold`` puts it back."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    index = {node: i for i, node in enumerate(placeholders)}
    for node in gm.graph.find_nodes(op="call_function", target=target("stored")):
        codes = node.args[0][0]
        owner = of(inputs[index[codes]], names) if codes in index and len(codes.users) == 1 else None
        if owner is None:
            continue
        spec: Spec = owner[0].spec  # type: ignore[assignment, union-attr]
        path = plain(*names[id(inputs[index[codes]])][1:])
        codes.meta |= {"param": Param(index[codes], path, spec.kind), "stored": spec.choice, "codes": codes.meta["example_value"]}
        codes.meta["op"] = fx.map_arg(node.args, lambda n: n.name)
        codes.meta["example_value"] = node.meta["example_value"]
        node.replace_all_uses_with(codes)
        gm.graph.erase_node(node)
    gm.recompile()


def unfold(gm: fx.GraphModule) -> None:
    """Compute the stored weights that a graph still reads: linears that a rule keeps in 16 bits."""
    named = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    last = list(named.values())[-1]
    for codes in list(named.values()):
        if "stored" in codes.meta and codes.users:
            readers = list(codes.users)
            with gm.graph.inserting_after(last):
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
