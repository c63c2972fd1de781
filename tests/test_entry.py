"""From the outside: the name resolves without an import, and a machine without a C++ compiler runs by references."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
from small import ROOT, python

HEAD = f"""
import sys, json, warnings
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
torch.manual_seed(0)
"""


def test_the_name_alone_is_enough():
    out = python(
        HEAD
        + """
assert "qcompile" in torch._dynamo.list_backends()
model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32)).eval()
x = torch.randn(5, 32)
assert "qcompile" not in sys.modules
fast = torch.compile(model, backend="qcompile", options={"lower": "eager"})
with torch.no_grad():
    y, truth = fast(x), model(x)
assert "qcompile" in sys.modules
error = float((y - truth).norm() / truth.norm())
assert 0 < error < 0.05, error
print("fine")
"""
    )
    assert out.strip().endswith("fine")


WITHOUT = (
    HEAD
    + """
import os, qcompile
from qcompile.core.errors import QcompileWarning
model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32)).eval()
x = torch.randn(5, 32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with torch.no_grad():
        truth = model(x)
        errors = []
        for recipe in ("W8A8", "W4A16", "FP8"):
            torch._dynamo.reset()
            fast = torch.compile(model, backend="qcompile", options={"recipe": recipe})
            errors.append(float((fast(x) - truth).norm() / truth.norm()))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="qcompile")
    fast(x).sum().backward()
    trained = model[0].weight.grad is not None
try:
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="qcompile", options={"strict": True})(x)
    strict = ""
except Exception as error:
    strict = str(error)
from qcompile.kernels import cpu
try:
    cpu.int8_linear(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2), torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, 1))
    kernel = ""
except cpu.NoCompiler as error:
    kernel = str(error)
print(json.dumps({"errors": errors, "said": [str(w.message) for w in caught if issubclass(w.category, QcompileWarning)], "strict": strict, "kernel": kernel, "trained": trained}))
"""
)


def test_no_compiler(tmp_path):
    got = json.loads(python(WITHOUT, CXX="/nonexistent/g++", CC="/nonexistent/gcc", PATH="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).splitlines()[-1])
    assert [0 < e < bound for e, bound in zip(got["errors"], (0.05, 0.3, 0.1))] == [True] * 3
    said = [text for text in got["said"] if "no C++ compiler" in text]
    assert len(said) == 1 and "runs by its references, which is slow" in said[0] and "Install g++" in said[0]
    assert "no C++ compiler" in got["strict"] and "no C++ compiler" in got["kernel"]
    assert got["trained"]


@pytest.mark.parametrize("folder", [ROOT])
def test_from_the_repository_s_root(folder):
    """A folder ``kernels`` lies there, which transformers probes for under that name."""
    out = python(
        f"import os; os.chdir({str(folder)!r}); import sys; sys.path.insert(0, ''); import kernels, passes, qcompile, transformers; print(qcompile.__version__, hasattr(kernels, 'OPS'))"
    )
    assert out.split()[-1] == "False"


def test_the_wheel_has_every_file(tmp_path):
    """Modules, kernels, the table of tiles, C++ sources, templates and the shipped model, under the names that they are imported by; and the entry point by which torch finds the backend."""
    folders = {"qcompile": "qcompile", "passes": "qcompile/passes", "kernels": "qcompile/kernels"}
    source = tmp_path / "source"
    for name in folders:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    expected = {f"{installed}/{path.relative_to(source / name).as_posix()}" for name, installed in folders.items() for path in (source / name).rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("qcompile-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {name for name in names if ".dist-info/" not in name} == expected
    needed = ("kernels/tuned.json", "kernels/linear.py", "passes/gptq.py", "templates/report.html", "data/stdlib_lm/model.safetensors", "py.typed")
    assert {f"qcompile/{name}" for name in needed} <= expected
    assert "[torch_dynamo_backends]\nqcompile = qcompile.backend:backend" in entry
