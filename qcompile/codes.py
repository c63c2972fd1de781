"""Which code objects Dynamo compiled graphs of ours for, so that it can be made to capture them again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from qcompile import compat
from qcompile.missed import functions, module_of

_CODES: list[tuple[Any, list[weakref.ref[Tensor]]]] = []
"""Code objects that Dynamo compiled graphs for, and the parameters of these graphs."""


def remember(inputs: Sequence[Any], code: Any = None) -> None:
    """Note which code a graph belongs to, the one that is being compiled or ``code``, so that it can be captured again for the owner of the parameters among ``inputs``: instances share graphs."""
    if (code := code or compat.compiling()) is not None:
        _CODES.append((code, [weakref.ref(a) for a in inputs if isinstance(a, nn.Parameter)]))


def forget(fast: Any, more: Iterable[Any] = ()) -> None:
    """Make Dynamo capture anew what it has compiled for ``fast``, and for the code objects ``more``."""
    for fn in functions(fast):
        if hasattr(fn, "__code__"):
            compat.reset_code(fn.__code__)
    module = module_of(fast)
    mine = {id(p) for p in module.parameters()} if module is not None else None
    _CODES[:] = [(code, refs) for code, refs in _CODES if any(ref() is not None for ref in refs)]
    for code in (*more, *(code for code, refs in _CODES if mine is None or compat.is_wrapper(code) or any(id(ref()) in mine for ref in refs))):
        compat.reset_code(code)
