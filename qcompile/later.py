"""Graphs that come without their parameters: DistributedDataParallel's part of Dynamo splits a graph at the borders of its buckets and compiles the pieces for fakes.

What we decide (names, schemes, packed weights) hangs on live parameters, so that a piece is compiled in its first call, which brings them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat


class Later:
    """Compiles in its first call, and again for sizes that Dynamo left open and no guard looks at any more. ``fakes``: the inputs that Dynamo gave."""

    def __init__(self, fakes: Sequence[Any], build: Callable[[Sequence[Any]], Callable[..., Any]]) -> None:
        self._build = build
        self._code = compat.compiling()
        self._open = [i for i, x in enumerate(fakes) if isinstance(x, torch.SymInt) or (isinstance(x, Tensor) and any(isinstance(n, torch.SymInt) for n in (*x.shape, *x.stride())))]
        self._made: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._lock = threading.RLock()

    def __call__(self, *args: Any) -> Any:
        key = tuple((*a.shape, *a.stride()) if isinstance(a, Tensor) else a for a in (args[i] for i in self._open))
        made = self._made.get(key)
        if made is None:
            with self._lock, compat.compiling_for(self._code):
                made = self._made[key] = self._made.get(key) or self._build(args)
        return made(*args)
