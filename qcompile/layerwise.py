"""Weights for a model that was built on the meta device, one layer at a time: what is in 16 bits at any moment is one layer and what stands outside of layers, whatever the model's size.

The repeated layers are found in the model (the entries of its ``nn.ModuleList``s, and linears outside of them), compiled each by itself, and read when they are first called: just then their
weights are packed, and given back ("release", site by site) before the next layer's are read.
"""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import compat
from qcompile.core.errors import OptionError, QcompileWarning, WeightError

Place = tuple[nn.Module, str]
"""A module and the name of one of its own parameters or buffers."""


def load_weights(
    model: nn.Module, source: Mapping[str, Tensor] | str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, regions: Sequence[str] = (), options: Mapping[str, Any] | None = None, dynamic: bool | None = None
) -> list[str]:
    """Fill what is on the meta device in ``model``, its repeated layers when they are first called, and compile each of them with ``backend="qcompile"``. Returns the names of these regions.

    ``source``: tensors by the names of the model's ``state_dict`` (some of transformers' checkpoints have others), or a safetensors file, or a folder of them. ``device``: where weights go (the default device of torch); what is not on the meta device moves there, too, where it is given. ``dtype``: of floating
    weights (as they are stored). ``regions``: names of modules to take in the place of those that are found. ``options`` and ``dynamic`` are those of ``torch.compile``; "release" is on unless it
    is said otherwise. Filled parameters are frozen (``requires_grad`` False). Layers that are alike share their compiled graphs where they can.

    Every name and shape is checked before anything is read. WeightError: a tensor that is missing or has another shape, a meta buffer that no checkpoint holds; OptionError: no such region, or none.
    A region that the model's first call did not reach is told by a warning, and is filled when it is called.
    """
    found = {name: model.get_submodule(name) for name in _checked(model, regions)} if regions else dict(_repeated(model))
    if not found:
        raise OptionError(f"{type(model).__name__} has no nn.ModuleList and no linear beside it: name the modules to fill one after another, regions=['layers.0', ...]; there are {', '.join(n for n, _ in model.named_children()) or 'none'}")
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()  # of transformers: making parameters on the meta device may have parted them
    if device is not None:
        _move(model, torch.device(device))
    reader = Reader(source, torch.get_default_device() if device is None else torch.device(device), dtype)
    places = [(*reader.find(names, *where[0]), where) for names, where in _places(model)]
    if unexpected := reader.names - {name for name, _ in _named(model)}:
        warnings.warn(f"qcompile: {len(unexpected)} tensors of the source have no place in the model: {', '.join(sorted(unexpected)[:5])}{' ...' if len(unexpected) > 5 else ''}", QcompileWarning, stacklevel=2)
    inside = {name: {id(m) for m in layer.modules()} for name, layer in found.items()}
    waiting: dict[str, list[tuple[str, list[Place]]]] = {name: [] for name in found}
    for key, kind, where in places:
        owner = next((region for region, modules in inside.items() if all(id(m) in modules for m, _ in where)), None)
        if owner is None:
            reader.fill(key, where)
        else:
            waiting[owner].append((key, where))
            _put(where, _own(*where[0]).to(kind))  # a model may look at the dtype of a layer before it calls it
    alike: dict[Any, list[nn.Module]] = defaultdict(list)
    for layer in found.values():
        alike[type(layer), tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())].append(layer)
    how: dict[str, Any] = {"backend": "qcompile", "dynamic": dynamic, "options": {"release": True, **(options or {})}}
    shared = {layer: group for layers in alike.values() for group in [Shared(layers, how)] for layer in layers}
    lock = threading.Lock()
    for name, layer in found.items():
        compat.on_first_call(layer, _first(layer, shared[layer], _filler(reader, waiting, name), lock))
    if not any(waiting.values()):
        reader.close()
    _tell(model, waiting)
    return list(found)


def _move(model: nn.Module, device: torch.device) -> None:
    """Buffers that were computed when the model was built (a rotary embedding's frequencies), and all else that has values."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # what is tied stays so
    for _, (module, name) in _named(model):
        value = getattr(module, name)
        if value.is_meta:
            continue
        if id(value) not in moved:
            there = value.detach().to(device)
            moved[id(value)] = value, value if there.device == value.device else nn.Parameter(there, value.requires_grad) if name in module._parameters else there
        setattr(module, name, moved[id(value)][1])


def _own(module: nn.Module, name: str) -> Tensor:
    value: Tensor = getattr(module, name)
    return value.detach()


def _put(where: Sequence[Place], value: Tensor) -> None:
    """One value in all its places, as what stood there: a frozen parameter, or a buffer."""
    held = nn.Parameter(value, requires_grad=False) if where[0][1] in where[0][0]._parameters else value
    for module, name in where:
        setattr(module, name, held)


class Shared:
    """Layers that are alike are compiled as one function: one graph serves them all. Where the first two need one each, for they hold what Dynamo takes for a constant (a cache's layer has a number),
    so will the others, and it keeps eight of a function: then each has a function to itself."""

    def __init__(self, layers: Sequence[nn.Module], how: Mapping[str, Any]) -> None:
        self.how, self.called, self.apart = how, list[nn.Module](), False
        self.code = compat.compile_in_place(layers, **how)

    def enter(self, layer: nn.Module) -> None:
        """Ahead of this layer's first call."""
        if not self.apart and len(self.called) > 1 and compat.graphs(self.code) >= len(self.called):
            self.apart = True
            for other in self.called[1:]:
                compat.compile_in_place([other], **self.how)
        if self.apart:
            compat.compile_in_place([layer], **self.how)
        self.called.append(layer)


def _first(layer: nn.Module, shared: Shared, fill: Callable[[], None], lock: threading.Lock) -> Callable[[], None]:
    def before() -> None:
        with lock:
            fill()
            if layer not in shared.called:
                shared.enter(layer)

    return before


def _filler(reader: Reader, waiting: dict[str, Any], name: str) -> Callable[[], None]:
    def fill() -> None:
        for key, where in waiting.get(name, ()):
            reader.fill(key, where)
        waiting.pop(name, None)
        if not any(waiting.values()):
            reader.close()

    return fill


def _tell(model: nn.Module, waiting: Mapping[str, Sequence[Any]]) -> None:
    """Behind the model's first call, a warning of what that did not reach."""

    def look(*_: Any) -> None:
        handle.remove()
        if left := [name for name, parts in waiting.items() if parts]:
            text = f"qcompile: the model's first call did not reach {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}: on the meta device until a call does"
            warnings.warn(text, QcompileWarning, stacklevel=2)

    handle = model.register_forward_hook(look)


def _checked(model: nn.Module, regions: Iterable[str]) -> list[str]:
    known = dict(model.named_modules())
    for name in regions:
        if name not in known or not name:
            near = get_close_matches(name, [n for n in known if n], 3)
            raise OptionError(f"no module is called {name!r}{'; did you mean ' + ', '.join(near) if near else ''}; model.named_modules() lists them")
    nested = [(a, b) for a in regions for b in regions if a != b and b.startswith(a + ".")]
    if nested:
        raise OptionError(f"region {nested[0][1]} is a part of region {nested[0][0]}: name one of them")
    return list(regions)


def _repeated(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The entries of the outermost lists of modules that have parameters, and linears outside of them, in the model's order."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{i}", layer) for i, layer in child.named_children() if any(True for _ in layer.parameters()))
        elif isinstance(child, nn.Linear):
            yield path, child
        else:
            yield from _repeated(child, f"{path}.")


def _named(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Every name of every parameter and buffer, tied ones under each of theirs."""
    for path, module in model.named_modules():
        for name in (*module._parameters, *module._buffers):
            if getattr(module, name) is not None:
                yield f"{path}.{name}" if path else name, (module, name)


def _places(model: nn.Module) -> list[tuple[list[str], list[Place]]]:
    """What is on the meta device: its names and where it lies."""
    found: dict[int, tuple[list[str], list[Place]]] = {}
    for full, (module, name) in _named(model):
        value = getattr(module, name)
        if not value.is_meta:
            continue
        if name in module._non_persistent_buffers_set:
            raise WeightError(f"the buffer {full} is on the meta device, and no checkpoint holds it: build the model so that buffers are computed (accelerate.init_empty_weights() does), or set it by hand first")
        names, where = found.setdefault(id(value), ([], []))
        names.append(full)
        where.append((module, name))
    return list(found.values())


class Reader:
    """Tensors by name, from a mapping or from safetensors files, which are open until ``close``."""

    def __init__(self, source: Mapping[str, Tensor] | str | Path, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        self.about = "the mapping" if isinstance(source, Mapping) else str(source)
        self._stack = ExitStack()
        self._tensors: Mapping[str, Tensor] = source if isinstance(source, Mapping) else {}
        self._files: dict[str, Any] = {}
        for path in () if isinstance(source, Mapping) else _files(Path(source)):
            from safetensors import safe_open

            file = self._stack.enter_context(safe_open(path, "pt", device=str(device)))
            self._files |= dict.fromkeys(file.keys(), file)
        self.names = {*self._tensors, *self._files}

    def find(self, names: Sequence[str], module: nn.Module, name: str) -> tuple[str, torch.dtype]:
        """The one of a parameter's names that there is a tensor of, and the dtype that it will have. WeightError where there is none, or it has another shape."""
        key = next((n for n in names if n in self.names), None)
        if key is None:
            near = get_close_matches(names[0], self.names, 3)
            raise WeightError(f"{self.about} has no tensor {' or '.join(names)}{'; it has ' + ', '.join(near) if near else f' among its {len(self.names)}'}")
        if key in self._files:
            part = self._files[key].get_slice(key)
            shape = list(part.get_shape())
            some = part[:0] if shape else self._files[key].get_tensor(key)
        else:
            some = self._tensors[key]
            shape = list(some.shape)
        wanted = list(getattr(module, name).shape)
        if shape != wanted:
            raise WeightError(f"{key} is {wanted} in the model, and {shape} in {self.about}")
        return key, self._dtype(some)

    def _dtype(self, value: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and value.is_floating_point() else value.dtype

    def fill(self, key: str, where: Sequence[Place]) -> None:
        """Put one tensor in all its places."""
        value = self._files[key].get_tensor(key) if key in self._files else self._tensors[key]
        _put(where, value.detach().to(self.device, self._dtype(value)))

    def close(self) -> None:
        self._stack.close()
        self._files, self._tensors = {}, {}


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise WeightError(f"{path} is no safetensors file and no folder with one")
    return found
