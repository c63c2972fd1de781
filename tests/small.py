"""Small models for the tests of the backend, and what they should compute: weight-only recipes equal eager with rounded weights."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from qcompile import backend
from qcompile.backend import CompiledGraph, collecting
from qcompile.core.errors import QcompileWarning
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme

W8 = {"recipe": "W8A16", "lower": "eager"}
"""Nothing but the weights is rounded, and everything runs by its reference: results are known to the last digits."""
ROOT = pathlib.Path(__file__).resolve().parent.parent


class Net(nn.Module):
    """Two linears with something between."""

    def __init__(self, k: int = 32, n: int = 48) -> None:
        super().__init__()
        self.up = nn.Linear(k, n)
        self.down = nn.Linear(n, k, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Tied(nn.Module):
    """An embedding whose table is the head, too."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.body = Net()
        self.head = nn.Linear(32, 64, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(ids)))


class Stack(nn.Module):
    """Equal layers."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Net() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@torch.no_grad()
def rounded(model: nn.Module, scheme: str = "int8.row", keep: tuple[str, ...] = ()) -> nn.Module:
    """A copy whose linears have rounded weights; ``keep`` are parts of the names of those that are left."""
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and not any(part in name for part in keep):
            module.weight.copy_(dequantize(quantize(module.weight.detach(), Scheme.parse(scheme)), module.weight.dtype))
    return twin


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-5) -> bool:
    """Equal up to the order of sums."""
    return a.shape == b.shape and a.dtype == b.dtype and float((a.double() - b.double()).norm()) <= rtol * float(b.double().norm()) + 1e-30


@contextmanager
def graphs():
    """Collects (CompiledGraph, arguments) of every call inside."""
    seen: list[tuple[CompiledGraph, tuple]] = []
    with collecting(lambda graph, args: seen.append((graph, tuple(args)))):
        yield seen


@contextmanager
def said():
    """Our warnings inside the context, as texts; those that come once come again."""
    backend._WARNED.clear()
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, QcompileWarning)]


def interpreted(script: pathlib.Path, *arguments: str) -> Any:
    """What a script beside the tests prints in its last line, as JSON: it runs kernels in Triton's interpreter, which must be chosen before Triton is imported, in a process of its own."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("this Triton's interpreter does not run with this NumPy (3.6 wants one before 2.4)")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def renumbered(text: str) -> str:
    """Graph text whose nodes are numbered anew, each kind of name from 0 in the order in which it comes: another version of a model numbers them otherwise, by nodes that are not shown."""
    seen: dict[str, dict[str, int]] = {}
    named = set(re.findall(r"(?m)^(\w+) = ", text))

    def anew(found: re.Match[str]) -> str:
        name = found[0]
        kind = re.sub(r"_\d+$", "", name)
        if name not in named and kind == name:
            return name
        known = seen.setdefault(kind, {})
        return f"{kind}_{known.setdefault(name, len(known))}"

    return re.sub(r"(?<![\w.%'])[a-z]\w*(?![\w('=])", anew, text)


def python(code: str, timeout: float = 240, **environment: str) -> str:
    """Output of a fresh interpreter that runs ``code``, started elsewhere than in the repository."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, cwd="/", env={**os.environ, **environment})
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
