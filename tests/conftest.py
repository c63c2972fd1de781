"""Shared fixtures. GPU tests are skipped where there is no CUDA device, and say so."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # before torch is imported: else each process that compiles starts another, which imports torch to wait for Triton kernels

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def link_fast() -> None:
    """Have g++ link with gold, where there is one: of the 1.6 seconds that each of some 600 kernels takes to build, ld would spend 0.4 in libtorch's symbols. Processes that tests start do so, too."""
    gold = shutil.which("ld.gold")
    if gold is None or "COMPILER_PATH" in os.environ:
        return
    folder = pathlib.Path(tempfile.mkdtemp(prefix="qcompile_ld_"))
    (folder / "ld").symlink_to(gold)
    os.environ["COMPILER_PATH"] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


link_fast()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rest_the_heap()
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not the keywords: a folder or a parameter may be called gpu
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def rest_the_heap() -> None:
    """What imports and collection left is no garbage and holds no weights that are compiled, but it is most of what there is: each graph that is compiled looks through all live objects for the
    owners of its weights, and the tracer makes the collector do so, too. A model that a test file makes while it is imported is not found as
    an owner afterwards: tests make theirs themselves."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # a run of many tests, which would import these one by one
        for name in ("torch._inductor.compile_fx", "transformers.modeling_utils"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


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
