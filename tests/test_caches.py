"""Inductor's caches: ours never mix with plain ones, with another recipe or with other sources of ours; a warm process hits."""

from __future__ import annotations

import json

import pytest
from small import ROOT, python

CODE = f"""
import sys, json
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
from torch._dynamo.utils import counters
from small import Net
from qcompile import backend

class Same(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2 + x.sum(-1, keepdim=True)

torch.manual_seed(0)
model, x = (Same if sys.argv[2] == "same" else Net)(), torch.randn(5, 32)
real, out = backend.sources, []
for what in sys.argv[1].split(","):
    torch._dynamo.reset()
    counters.clear()
    backend.sources = (lambda: b"another version") if what.endswith("*") else real
    recipe = what.rstrip("*")
    fast = torch.compile(model, backend="inductor") if recipe == "plain" else torch.compile(model, backend="qcompile", options={{"recipe": recipe}})
    with torch.no_grad():
        y = fast(x)
        error = float((y - model(x)).norm() / model(x).norm())
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    misses = counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]
    bypasses = counters["inductor"]["fxgraph_cache_bypass"] + counters["aot_autograd"]["autograd_cache_bypass"]
    out.append({{"what": what, "hits": hits, "misses": misses, "bypasses": bypasses, "error": error, "y": y.double().flatten().tolist()}})
print(json.dumps(out))
"""


def run(folder, *what, model="net", **environment):
    """One process that compiles these after one another with a private cache; ``model`` "same" has nothing to quantize, so that its graph is the same for all."""
    code = f"import sys; sys.argv = ['', {','.join(what)!r}, {model!r}]\n{CODE}"
    return json.loads(python(code, TORCHINDUCTOR_CACHE_DIR=str(folder), TORCHINDUCTOR_FX_GRAPH_CACHE="1", TORCHINDUCTOR_AUTOGRAD_CACHE="1", **environment).splitlines()[-1])


def in_bounds(row):
    low, high = {"plain": (0, 1e-5), "W8A8": (1e-3, 0.05), "W8A16": (1e-4, 0.03), "W4A16": (0.02, 0.4)}[row["what"].rstrip("*")]
    return low <= row["error"] <= high


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, run(folder, "W8A8", "plain", "W4A16", "W8A16", "W8A8*", "W8A8")


@pytest.mark.xdist_group("cold cache")
def test_nothing_is_shared_that_differs(cold):
    _, rows = cold
    for row in rows[:5]:
        assert row["hits"] == 0 and row["misses"] >= 1 and row["bypasses"] == 0, row["what"]
    assert all(map(in_bounds, rows))


@pytest.mark.xdist_group("cold cache")
def test_the_same_again_hits(cold):
    _, rows = cold
    assert rows[5]["hits"] >= 1 and rows[5]["misses"] == 0 and rows[5]["y"] == rows[0]["y"]


@pytest.mark.xdist_group("cold cache")
def test_a_warm_process_hits(cold):
    folder, rows = cold
    before = {row["what"]: row for row in rows}
    for row in run(folder, "W8A8", "plain", "W4A16"):
        assert row["hits"] >= 1 and row["misses"] == 0 and row["y"] == before[row["what"]]["y"] and in_bounds(row)


def test_one_graph_is_compiled_anew_for_each(tmp_path):
    """A graph without linears is one and the same to Inductor but for the key: plain, two recipes, ours of another version. What came before hits."""
    rows = run(tmp_path, "W8A8", "plain", "W4A16", "W8A8*", "plain", "W8A8", model="same")
    assert [row["hits"] >= 1 for row in rows] == [False] * 4 + [True] * 2
    assert [row["misses"] >= 1 for row in rows] == [True] * 4 + [False] * 2
    assert all(row["error"] < 1e-6 for row in rows)


def test_other_vector_instructions_compile_anew(tmp_path):
    """Inductor's own key lacks them: a cache from a machine with wider vectors gives code that leaves half of its outputs as they were, one with narrower ones code that writes behind them."""
    wide = run(tmp_path, "W8A8")
    narrow = run(tmp_path, "W8A8", "W8A8", ATEN_CPU_CAPABILITY="default")
    assert [row["hits"] >= 1 for row in (*wide, *narrow)] == [False, False, True]
    assert all(map(in_bounds, (*wide, *narrow)))


@pytest.mark.parametrize("changed", ["core/formats.py", "kernels/linear.py", "kernels/tuned.json", "kernels/cpu/integer.cpp", "passes/flatten.py", "compat_ir.py", "train/optim.py"])
def test_every_source_is_in_the_key(changed, monkeypatch):
    """Kernels of another version of any file never come out of Inductor's caches."""
    import pathlib

    from qcompile import backend

    before = backend.sources.__wrapped__()
    assert len(before) == 32 and before == backend.sources()
    read = pathlib.Path.read_bytes
    touched = []

    def reading(self):
        if self.as_posix().endswith(f"/{changed}"):
            touched.append(self)
        return read(self) + b" " * (self in touched)

    monkeypatch.setattr(pathlib.Path, "read_bytes", reading)
    assert backend.sources.__wrapped__() != before and len(touched) == 1
