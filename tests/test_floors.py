"""The house stands: imports go one way, private torch stays in compat.py, files stay short, and importing works where things are missing."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = {"qcompile": "qcompile", "kernels": "qcompile.kernels", "passes": "qcompile.passes"}
FLOORS = {"qcompile.core": 0, "qcompile.kernels": 1, "qcompile.compat": 1, "qcompile.compat_ir": 1, "qcompile.compat_dist": 1, "qcompile.compat_dynamo": 1, "qcompile.passes": 2, "qcompile": 3}
CORE_KNOWS_ONLY = ("torch", "qcompile.core")
CORE_NEVER = ("torch.fx", "torch._dynamo", "torch._inductor", "torch._subclasses", "torch.export", "triton")
PUBLIC_BY_CUSTOM = ("torch._ops", "torch._higher_order_ops")
"""Underscored, yet what the type of every op is called in torch's own documentation."""
LONGEST = 350
COMPAT = ("qcompile.compat", "qcompile.compat_ir", "qcompile.compat_dist", "qcompile.compat_dynamo")


def modules() -> Iterator[tuple[str, pathlib.Path]]:
    """(full module name, file) of everything that is installed."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"), path


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor(module: str) -> int | None:
    """The floor of a module of ours; None for anybody else's."""
    return next((level for package, level in FLOORS.items() if within(module, package)), None)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """(full name, line) of everything imported; ``from a import b`` counts as a and a.b, relative ones are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def private(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Underscored parts of torch, imported or read as attributes."""
    names = list(imports(tree, module, is_package))
    names += [(ast.unparse(node), node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr") and len(node.args) > 1]
    names += [(f"{ast.unparse(node.args[0])}.{node.args[1].value}", node.lineno) for node in calls if isinstance(node.args[1], ast.Constant)]
    for name, line in names:
        if name.startswith("torch._") and not name.startswith("torch.__") and not any(within(name, public) for public in PUBLIC_BY_CUSTOM):
            yield name, line


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What one file does that its floor forbids."""
    tree, mine, bad = ast.parse(source), floor(module), []
    assert mine is not None
    for name, line in imports(tree, module, is_package):
        level = floor(name)
        if name == "qcompile" or (name in COMPAT and mine > 0):  # the package itself, before one of its parts; compat serves every floor above 0
            continue
        if level is not None and level > mine:
            bad.append(f"line {line}: floor {mine} imports {name} of floor {level}")
        if mine == 0 and any(within(name, other) for other in CORE_NEVER):
            bad.append(f"line {line}: core imports {name}")
        if mine == 0 and level is None and name.split(".")[0] not in {"torch", *sys.stdlib_module_names}:
            bad.append(f"line {line}: core imports {name}; it knows {CORE_KNOWS_ONLY} and the standard library")
    if module not in COMPAT:
        bad += [f"line {line}: {name} belongs in compat.py" for name, line in private(tree, module, is_package)]
    return bad


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_one_way(module, path):
    bad = violations(path.read_text(), module, path.name == "__init__.py")
    assert not bad, f"{path.relative_to(ROOT)}:\n" + "\n".join(bad)


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("qcompile.core.x", "from qcompile.kernels import OPS", True),
        ("qcompile.core.x", "from ..kernels import OPS", True),
        ("qcompile.core.x", "def f():\n    import torch.fx", True),
        ("qcompile.core.x", "from torch import fx", True),
        ("qcompile.core.x", "import numpy", True),
        ("qcompile.core.x", "from qcompile import compat", True),
        ("qcompile.core.x", "from . import formats\nfrom .errors import Skip\nimport math", False),
        ("qcompile.kernels.x", "from qcompile.passes import sites", True),
        ("qcompile.kernels.x", "from qcompile.backend import backend", True),
        ("qcompile.kernels.x", "from qcompile import backend", True),
        ("qcompile.kernels.x", "from qcompile import compat\nfrom qcompile.core import formats", False),
        ("qcompile.passes.x", "from qcompile import weights", True),
        ("qcompile.passes.x", "import torch._inductor.ir", True),
        ("qcompile.passes.x", "torch._dynamo.reset()", True),
        ("qcompile.passes.x", "import torch\ngetattr(torch, '_grouped_mm', None)", True),
        ("qcompile.passes.x", "import torch\ngetattr(torch.nn.functional, 'linear', None)", False),
        ("qcompile.passes.x", "import torch\ntorch._ops.OpOverload", False),
        ("qcompile.backend", "from torch._guards import TracingContext", True),
        ("qcompile.backend", "from qcompile.passes import lower", False),
        ("qcompile.compat", "from torch._guards import TracingContext", False),
        ("qcompile.compat_ir", "from torch._inductor import ir", False),
        ("qcompile.compat", "from qcompile.passes import sites", True),
    ],
)
def test_the_test_itself(module, source, caught):
    assert bool(violations(source, module)) is caught


def test_files_are_short():
    files = [path for folder in (*FOLDERS, "benchmarks") for suffix in ("py", "cpp", "h") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    assert len(files) > 20
    long = {str(path.relative_to(ROOT)): lines for path in files if (lines := len(path.read_text().splitlines())) > LONGEST}
    assert not long, f"more than {LONGEST} lines: {long}"


@pytest.mark.parametrize("name", ["utils", "common", "base", "manager", "helper", "helpers", "misc"])
def test_no_file_without_a_subject(name):
    assert not [path for _, path in modules() if path.stem == name]


# --- importing, each in a process of its own -----------------------------------------------------------------------------


def python(code: str) -> str:
    """Output of ``code`` run from the repository's root, which is on ``sys.path`` as in an interactive session."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_bare_kernels_and_passes_are_empty():
    out = python(
        "import sys, kernels, passes\n"
        "print([n for m in (kernels, passes) for n in vars(m) if not n.startswith('__')], 'torch' in sys.modules)\n"
        "import qcompile.kernels\n"
        "print(len(qcompile.kernels.OPS) > 0, qcompile.kernels.__file__ == kernels.__file__)"
    )
    assert out.splitlines() == ["[] False", "True True"]


def test_transformers_imports_from_the_root():
    """transformers looks for a package called ``kernels`` and would find our folder."""
    pytest.importorskip("transformers")
    assert (
        python("import transformers; from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM; import qcompile; print(LlamaForCausalLM.__name__)")
        == "LlamaForCausalLM"
    )


def test_import_without_triton_and_without_inductor():
    """triton cannot be imported at all; and importing us loads neither Inductor nor anything optional."""
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('triton', 'transformers', 'matplotlib'):\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import qcompile, torch\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('triton', 'transformers', 'matplotlib')]\n"
        "assert 'torch._inductor.lowering' not in sys.modules and 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert 'qcompile' in torch._dynamo.list_backends()\n"
        "model = torch.nn.Linear(64, 64)\n"
        "x = torch.randn(4, 64)\n"
        "fast = torch.compile(model, backend='qcompile', options={'recipe': 'W8A8', 'lower': 'eager'})\n"
        "with torch.no_grad():\n"
        "    y = fast(x)\n"
        "    assert 0 < float((y - model(x)).norm() / y.norm()) < 0.05\n"
        "print('fine')"
    )
    assert python(code).splitlines()[-1] == "fine"


def test_public_names_exist_and_are_sorted():
    import qcompile

    assert sorted(qcompile.__all__) == sorted(set(qcompile.__all__))
    assert all(getattr(qcompile, name, None) is not None for name in qcompile.__all__)
