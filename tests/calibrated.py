"""Calibrating small models, and what a solver should have seen: computed by running the eager model with the weights before replaced by what they were rounded to."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.core.qtensor import dequantize, unpack
from qcompile.core.solution import Solution
from qcompile.passes import SOLVERS
from qcompile.weights import TABLE

GPTQ = {"weight": "int4.g16", "passes": ["gptq"], "lower": "eager"}


class Mlp(nn.Module):
    """Three linears with something between."""

    def __init__(self, width: int = 32, **factory: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, 48, **factory), nn.Linear(48, 32, bias=False, **factory), nn.Linear(32, 16, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


class Broken(Mlp):
    """With a graph break between two linears."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        torch._dynamo.graph_break()
        return self.c(torch.tanh(self.b(h)))


def compiled(model: Any, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend="qcompile", dynamic=dynamic, options=GPTQ | options)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def solutions(model: nn.Module) -> dict[str, Solution]:
    """Name of a parameter -> its one solution, of those that have one."""
    found = {}
    for name, p in model.named_parameters():
        record = TABLE.get(p)
        if record is not None and record.solutions:
            (found[name.removesuffix(".weight")],) = record.solutions.values()
    return found


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: unpack(s.q).view(torch.uint8) for name, s in solutions(model).items()}


def same_codes(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = codes(a), codes(b)
    return bool(mine) and mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def spied(monkeypatch: Any, name: str = "gptq"):
    """(weight, stats) of every call of a solver."""
    seen: list[tuple[Tensor, Any]] = []
    real = SOLVERS[name]

    @functools.wraps(real.fn)
    def spy(weight: Tensor, scheme: Any, stats: Any, **given: Any) -> Any:
        seen.append((weight.clone(), {n: {k: t.clone() for k, t in s.items()} for n, s in stats.items()}))
        return real.fn(weight, scheme, stats, **given)

    with monkeypatch.context() as patch:
        patch.setitem(SOLVERS, name, replace(real, fn=spy))
        yield seen


@torch.no_grad()
def in_order(model: nn.Module, call: Callable[[nn.Module], Any]) -> list[list[str]]:
    """Names of the linears in the order of their inputs; those that read one tensor stand together."""
    order: list[tuple[Tensor, list[str]]] = []
    hooks = []
    for name, m in linears(model).items():

        def see(_: Any, args: Any, name: str = name) -> None:
            known = next((names for x, names in order if x is args[0]), None)
            if known is None:
                order.append((args[0], [name]))
            else:
                known.append(name)

        hooks.append(m.register_forward_pre_hook(see))
    call(model)
    for hook in hooks:
        hook.remove()
    return [names for _, names in order]


@torch.no_grad()
def expected(model: nn.Module, calls: Sequence[Callable[[nn.Module], Any]], solved: dict[str, Solution]) -> list[tuple[list[str], Tensor]]:
    """(names, sum of x x^T in float64) of every input, in order, with the sites before it replaced by what they were rounded to."""
    twin = copy.deepcopy(model)
    out = []
    for names in in_order(twin, calls[0]):
        if names[0] not in solved:
            continue
        seen: list[Tensor] = []
        hook = linears(twin)[names[0]].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
        for call in calls:
            call(twin)
        hook.remove()
        x = torch.cat(seen)
        out.append((names, x.T @ x))
        for name in names:
            linears(twin)[name].weight.copy_(dequantize(solved[name].q, torch.float32))
    return out


def check_hessians(model: nn.Module, calls: Sequence[Callable[[nn.Module], Any]], seen: Sequence[tuple[Tensor, Any]], rtol: float = 1e-4) -> None:
    """Every Hessian that the solver was given is the one of true sequential order."""
    want = expected(model, calls, solutions(model))
    assert len(want) == len(seen)
    for (names, h), (weight, stats) in zip(want, seen):
        own = linears(model)
        members = [names] if weight.shape[0] == sum(own[n].out_features for n in names) else [list(p) for p in itertools.permutations(names)]
        assert any(torch.equal(weight, torch.cat([own[n].weight for n in p])) for p in members), names
        got = stats["hessian"]["sum"].double()
        assert float((got - h).norm()) <= rtol * float(h.norm()), names
