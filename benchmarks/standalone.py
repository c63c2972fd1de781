"""A template of ours as an ordinary Triton kernel: the source that Inductor gets, with sizes filled in and a plain store, to be timed, swept or run by Triton's interpreter on its own."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(tempfile.gettempdir()) / "qcompile_standalone"


def render(template: str, shapes: Mapping[str, Sequence[int]], constants: Sequence[str], out: str = "tl.bfloat16", columns: int | None = None) -> str:
    """Source of a module with one kernel ``run(*pointers, OUT, *constants)``. ``shapes``: name of a pointer -> shape of its contiguous tensor; the output is contiguous, (..., M, N).

    ``columns``: N, where it is not the number of the weight's rows.
    """
    names: list[str] = []
    sizes = {"M": shapes["X"][0], "N": columns or shapes["W"][-2]}

    def def_kernel(*given: str) -> str:
        names.extend(given)
        arguments = ", ".join([*given, "OUT", *(f"{c}: tl.constexpr" for c in constants)])
        return f"@triton.jit\ndef run({arguments}):"

    def stride(name: str, axis: int) -> int:
        value = 1
        for size in shapes[name][len(shapes[name]) + axis + 1 if axis < 0 else axis + 1 :]:
            value *= size
        return value

    def store_output(indices: Sequence[str], value: str, mask: str, **_: Any) -> str:
        *lead, m, n = indices
        first = f"{lead[0]} * {sizes['M'] * sizes['N']} + " if lead else ""
        return f"tl.store(OUT + {first}{m} * {sizes['N']} + {n}, {value}.to({out}), {mask})"

    text = jinja2.Template(template).render(def_kernel=def_kernel, size=lambda name, axis: shapes[name][axis], stride=stride, store_output=store_output)
    return f"import triton\nimport triton.language as tl\n\n\n{text.strip()}\n"


def load(source: str) -> Any:
    """The kernel of a rendered module. Triton reads sources from files, so it gets one."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"k{hashlib.sha256(source.encode()).hexdigest()[:20]}.py"
    if not path.exists():
        path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run
