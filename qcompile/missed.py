"""What a call did not run through qcompile, and why: parameters that no compiled graph reads, and calls in which no graph ran at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from qcompile import compat
from qcompile.core.errors import Skip
from qcompile.core.recipe import Rule
from qcompile.owners import owners
from qcompile.report import KeptRow

if TYPE_CHECKING:
    from qcompile.backend import CompiledGraph
    from qcompile.passes.sites import Site

TABLES = (nn.Embedding, nn.EmbeddingBag)
LOOP = "experts run in an eager Python loop, outside every graph and in 16 bits; model.set_experts_implementation('grouped_mm') lets them be compiled"
GROUPED = (
    "experts were configured to run one by one in a Python loop, which no graph can hold; the configuration now says 'grouped_mm', as model.set_experts_implementation('grouped_mm') sets it: the same sums, "
    "which a graph holds and qcompile quantizes. model.set_experts_implementation('eager') undoes it once the model is no longer compiled"
)


def refusals(graph: CompiledGraph) -> list[str]:
    """What a graph, as it is compiled, leaves without a kernel."""
    reasons = [str(kernel) for kernel in graph.kernels.values() if isinstance(kernel, Skip)]
    return [f"{reasons.count(reason)} linears are emulated by dequantize + matmul: {reason}" for reason in sorted(set(reasons))]


def regroup(sites: Iterable[Site], rules: Iterable[Rule], inputs: Sequence[Any]) -> tuple[str, ...]:
    """Experts that a graph's routers choose and that are told to run one by one run grouped from now on, in this call already: Dynamo has not come to them yet. What is to be said of it: ``GROUPED`` where
    some were told so, ``LOOP`` where some cannot be."""
    told = [_tell(owner) for owner in _looped(sites, rules, inputs)]
    return (GROUPED,) * any(told) + (LOOP,) * (not all(told))


def _tell(experts: nn.Module) -> bool:
    """Whether a configuration chooses between forms of one computation, and now says that they run grouped: transformers' dispatcher stands before the loop, whose class has what the forms read."""
    if not hasattr(type(experts).forward, "__wrapped__") or not hasattr(experts, "is_transposed"):
        return False
    try:
        experts.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    except (AttributeError, TypeError):  # a configuration of another kind
        return False
    return True


def _looped(sites: Iterable[Site], rules: Iterable[Rule], inputs: Sequence[Any]) -> list[nn.Module]:
    """Owners of stacks of experts that lie beside one of the graph's routers, are told to run one by one (transformers 5: the experts' own configuration), and are not in the graph."""
    routers = [inputs[site.param.index] for site in sites if site.role == "router"]
    if not routers:
        return []
    names, taken = owners(), {id(x) for x in inputs}
    left = [rule for rule in rules if rule.weight is None]
    beside = tuple(names[id(r)][1].rpartition(".")[0] + "." for r in routers if id(r) in names)
    return [
        owner
        for id_, (owner, path, name) in names.items()
        if path.startswith(beside) and id_ not in taken and owner._parameters[name].dim() == 3 and _one_by_one(owner) and not any(rule.matches(f"{path}.{name}", type(owner).__name__) for rule in left)  # type: ignore[union-attr]
    ]


def _one_by_one(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"


def module_of(fast: Any) -> nn.Module | None:
    """The model behind ``fast``: a module, or the owner of a bound method."""
    inner = compat.original(fast)
    inner = inner if isinstance(inner, nn.Module) else getattr(inner, "__self__", None)
    inner = compat.original(inner) if isinstance(inner, nn.Module) else None
    return inner if isinstance(inner, nn.Module) else None


def unread(module: nn.Module, seen: set[int], number: Callable[[nn.Parameter], int]) -> Iterator[tuple[KeptRow, nn.Parameter, bool]]:
    """(row, parameter, counts as a weight of products) of parameters with two or more axes that no graph took; ``number`` numbers them for the report."""
    found = set(seen)
    for path, owner in module.named_modules():
        for name, p in owner._parameters.items():
            if p is None or p.dim() < 2 or id(p) in found:
                continue
            found.add(id(p))
            table = isinstance(owner, TABLES)
            reason = "no compiled graph reads it in this call" + (" (an embedding table)" if table else "")
            if p.dim() == 3 and _eager_experts(module, path):
                reason += f": its {LOOP}"
            full = f"{path}.{name}".replace("_orig_mod.", "").strip(".").removesuffix(".weight")
            yield KeptRow(full, tuple(p.shape), "unread", reason, p.nbytes, number(p)), p, not table


def _eager_experts(module: nn.Module, path: str) -> bool:
    """The nearest configuration above a module says that its experts run one by one."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        config = getattr(module.get_submodule(".".join(parts[:depth])), "config", None)
        if config is not None:
            return _one_by_one(module.get_submodule(".".join(parts[:depth])))
    return False


def functions(fast: Any) -> list[Any]:
    """Functions that Dynamo may have compiled for ``fast``: its own, and the forwards of all modules below it."""
    inner, module = compat.original(fast), module_of(fast)
    own = [inner] if inspect.isroutine(inner) else []
    return own + ([type(m).forward for m in module.modules()] if module is not None else [])


def limit(full: Sequence[str]) -> str:
    """What Dynamo's recompile limit does to the functions that reached it."""
    return (
        f"Dynamo's recompile limit ({compat.recompile_limit()}) is reached for {', '.join(full)}: calls that need another graph run eagerly, unquantized. "
        "Raise torch._dynamo.config.recompile_limit, or compile the whole model"
    )


def why_nothing(fast: Any) -> str:
    """Why a call of ``fast`` ran no graph of ours: what can be seen from outside, else the reasons that are left."""
    from qcompile import backend

    module = module_of(fast)
    backends = {name for part in (fast, *(module.modules() if module is not None else ())) if (name := compat.backend_name(part)) is not None}
    if not backends and (module is not None or not hasattr(compat.original(fast), "__closure__")):
        return f"this {type(fast).__name__} is not compiled; give explain what torch.compile(model, backend='qcompile') returned."
    if backends and not backends & {"qcompile", ""}:
        return f"it is compiled with backend {', '.join(map(repr, sorted(backends)))}, not 'qcompile'."
    if off := compat.dynamo_is_off():
        return f"Dynamo is off: {off}."
    if full := compat.at_recompile_limit(functions(fast)):
        return limit(full) + "."
    reasons = ["Dynamo captured no tensor operation (everything is disabled, or runs in code that it skips)"]
    if "training" in backend._WARNED:
        reasons.insert(0, "the call turns grad mode on and a parameter requires grad, so the plain graph was compiled")
    if not backends:
        reasons.insert(0, "the function calls nothing that is compiled with backend='qcompile'")
    return "; or ".join(reasons) + "."


def of_no_live_linear(rules: Sequence[str]) -> list[str]:
    """Rules that name no live linear at all, tables and norms apart: where layers are compiled one by one, or a graph breaks, a rule may be for another graph."""
    live = [
        (f"{path}.{name}".strip(".").removesuffix(".weight"), type(owner).__name__)
        for owner, path, name in (owners().values() if rules else ())
        if owner._parameters[name].dim() > 1 and not isinstance(owner, TABLES) and "Norm" not in type(owner).__name__  # type: ignore[union-attr]
    ]
    return [rule for rule in rules if not any(Rule(rule).matches(*linear) for linear in live)]
