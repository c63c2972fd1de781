"""Shared fixtures. GPU tests are skipped where there is no CUDA device, and say so."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not the keywords: a folder or a parameter may be called gpu
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Every test compiles from nothing and leaves nothing behind."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def built(monkeypatch):
    """Graphs that the backend builds, variants included."""
    from qcompile.backend import CompiledGraph

    made = []
    real = CompiledGraph._build
    monkeypatch.setattr(CompiledGraph, "_build", lambda self, inputs: (made.append(self), real(self, inputs))[1])
    return made
