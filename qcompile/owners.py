"""Which live module owns a parameter, and what it is called in the outermost one: looked up among all live objects, since a graph names a weight by where it was found only."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import nn

_LAST: dict[int, tuple[weakref.ref[nn.Module], str, str]] = {}
"""What the last scan found, by id(parameter)."""


def owners(tables: set[int] | None = None) -> dict[int, tuple[nn.Module, str, str]]:
    """id(parameter) -> (owning module, its full name in the outermost live module, name of the parameter). One scan of the live objects, a tenth of a second and more.

    This is how sites are called the same whether a whole model is compiled or each of its layers. ``tables`` gets the ids of the parameters of embeddings, whatever else owns them, too.
    """
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module) and not issubclass(type(o), torch.fx.GraphModule) and "_modules" in o.__dict__]
    parents: dict[int, tuple[nn.Module, str]] = {}
    for module in modules:
        for name, child in module._modules.items():
            if child is not None and (id(child) not in parents or parents[id(child)][1] == "_orig_mod"):  # the model's own link before a wrapper's
                parents[id(child)] = (module, name)

    def full_name(module: nn.Module) -> str:
        parts: list[str] = []
        for _ in range(100):
            above = parents.get(id(module))
            if above is None:
                break
            module, name = above
            parts.append(name)
        return ".".join(part for part in reversed(parts) if part != "_orig_mod")  # a compiled module wraps the one that the model holds

    names: dict[int, tuple[nn.Module, str, str]] = {}
    for module in modules:
        own = [(name, p) for name, p in module._parameters.items() if p is not None]
        if own:
            path = full_name(module)
            if tables is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                tables |= {id(p) for _, p in own}
            for name, p in own:
                if id(p) not in names or len(path) > len(names[id(p)][1]):
                    names[id(p)] = (module, path, name)
    _LAST.clear()
    _LAST.update((key, (weakref.ref(module), path, name)) for key, (module, path, name) in names.items())
    return names


def owns(module: nn.Module | None, name: str, p: nn.Parameter) -> TypeGuard[nn.Module]:
    """Whether a module, if there is one, has a parameter under a name still."""
    return module is not None and module._parameters.get(name) is p


def owners_of(values: Iterable[Any]) -> dict[int, tuple[nn.Module, str, str]]:
    """``owners()`` for the parameters among ``values``, as the last scan found them where all are still where they were: layers that share one compiled graph are told apart without a scan for
    each. A model that was put into another one since keeps the names that its graphs were compiled under."""
    found: dict[int, tuple[nn.Module, str, str]] = {}
    for p in values:
        if isinstance(p, nn.Parameter):
            ref, path, name = _LAST.get(id(p), (None, "", ""))
            module = ref() if ref is not None else None
            if not owns(module, name, p):
                return owners()
            found[id(p)] = (module, path, name)
    return found
