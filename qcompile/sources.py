"""A digest of our own sources, for Inductor's cache keys."""

from __future__ import annotations

import pathlib
from functools import cache

import torch

import qcompile
from qcompile.core.digest import digest


@cache
def sources() -> bytes:
    """Digest of all our sources and the version of torch: kernels of another version of ours never come out of Inductor's caches."""
    folder = pathlib.Path(qcompile.__file__).parent
    roots = [folder, *(pathlib.Path(p) for sub in (qcompile.kernels, qcompile.passes) for p in sub.__path__)]
    files = sorted({f for root in roots for f in root.rglob("*") if f.suffix in (".py", ".cpp", ".h", ".json") and "data" not in f.parts})
    return digest(torch.__version__.encode(), *(f.read_bytes() for f in files))
