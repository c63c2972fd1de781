"""When the value of a parameter changed; in particular of those that FSDP2 gathers from their shards before a forward.

The whole parameter, which graphs read, is one object for good, but its memory comes and goes, and gathering bumps no version: only the shard tells whether the value changed. So a weight is
packed once for each change, not for each time that it is gathered.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from qcompile import compat

REASON = "FSDP2 gathers it from its shards for every forward"
"""Why its 16-bit value cannot be released."""
_FOUND: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Any]]] = {}


def watch(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Find out which of these parameters FSDP2 gathers, and remember it; gives those."""
    sources = compat.gathered()
    found = [p for p in parameters if id(p) in sources]
    for p in found:
        _remember(p, sources[id(p)])
    return found


def _remember(p: Tensor, source: Any) -> None:
    key = id(p)
    _FOUND[key] = weakref.ref(p, lambda _: _FOUND.pop(key, None)), weakref.ref(source)


def is_gathered(p: Tensor) -> bool:
    """Whether ``watch`` found it to be gathered."""
    return id(p) in _FOUND and _FOUND[id(p)][0]() is p


def shard_state(p: Tensor) -> tuple[object, ...] | None:
    """What changes when the shard of a gathered parameter may have changed on this process; None for any other parameter."""
    if not is_gathered(p):
        return None
    source = _FOUND[id(p)][1]()
    return () if source is None else compat.shard_state(source)


def state_of(p: Tensor) -> tuple[object, ...]:
    """What changes when the value of a parameter may have changed. Inference tensors have no version: only their storage is watched. Of gathered ones, the shard is."""
    if (shard := shard_state(p)) is not None:
        return (*shard, p.stride(), p.device)
    return (-1 if p.is_inference() else p._version, p.data_ptr(), p.stride(), p.device)


def wholes(shards: Iterable[Tensor]) -> list[Tensor]:
    """The whole parameters of these shards, of those that are watched."""
    if not _FOUND:
        return []
    found: list[Tensor] = []
    ids = {id(p) for p in shards}
    for ref, held in list(_FOUND.values()):
        p, source = ref(), held()
        if p is not None and source is not None and id(compat.shard_of(source)) in ids:
            found.append(p)
    return found
