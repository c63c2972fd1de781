"""One case in a process of its own: `isolated` runs it and returns what it generated, as plain data; as a script this file is the child.

A case is a function in a cases file: it returns a `Generated`, or (`Generated`, dict of extra results), or a dict of such parts, so that many graphs share one process.
"""

import argparse
import dataclasses
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class CaseError(AssertionError):
    """A case failed in its process; the message is the end of what it printed."""


def isolated(fn_name: str, cases: Path | str = HERE / "cases.py", compile: bool | str = True, timeout: float = 400, **kwargs: Any) -> dict[str, Any]:
    """Run case `fn_name` of file `cases` with JSON-able `kwargs`.

    Returns {"kernels": [{"name", "source", and if `compile`: "config", "cubin_bytes", "shared", "registers", "stack", "spills", "ptx": {opcode: count}, "seconds"}],
    "externs", "calls", "graphs", "source", "extra", "seconds": {"import", "codegen", "compile", "total"}}; of a case with several parts {"parts": {name: the same}, "seconds"}.
    `compile` is True, False, or the prefix of the names of the kernels to compile ("triton_tem"); equal kernels of several parts are compiled once.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [
            sys.executable,
            str(HERE / "run_case.py"),
            fn_name,
            str(cases),
            str(out),
            "--kwargs",
            json.dumps(kwargs),
            *(["--compile", "triton" if compile is True else compile] if compile else []),
        ]
        try:
            child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            raise CaseError(
                f"case {fn_name}: still running after {timeout} s\n{printed[-3000:].decode(errors='replace') if isinstance(printed, bytes) else printed[-3000:]}"
            ) from None
        if child.returncode or not out.exists():
            raise CaseError(f"case {fn_name} ended with {child.returncode}\n{child.stdout[-6000:]}\nrepeat: {shlex.join(command).replace(str(out), '/dev/stdout')}")
        result: dict[str, Any] = json.loads(out.read_text())
    result["seconds"]["total"] = round(time.perf_counter() - start, 2)
    return result


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _child(fn_name: str, cases: Path, out: Path, kwargs: dict[str, Any], compile: str) -> None:
    clock = [time.perf_counter()]
    import torch

    torch.set_num_threads(1)

    case = getattr(_load(cases), fn_name)
    clock.append(time.perf_counter())
    generated = case(**kwargs)
    clock.append(time.perf_counter())
    done: dict[str, Any] = {}
    result = {"parts": {name: _part(part, compile, done) for name, part in generated.items()}} if isinstance(generated, dict) else _part(generated, compile, done)
    clock.append(time.perf_counter())
    seconds = {name: round(b - a, 2) for name, a, b in zip(("import", "codegen", "compile"), clock[:-1], clock[1:], strict=True)}
    out.write_text(json.dumps({**result, "seconds": seconds}))


def _part(generated: Any, compile: str, done: dict[str, Any]) -> dict[str, Any]:
    """One graph as plain data; `done` holds what is compiled already, by the kernel's text without its name."""
    import cubin

    generated, extra = generated if isinstance(generated, tuple) else (generated, {})
    rows = [dataclasses.asdict(kernel) for kernel in generated.kernels]
    for row, kernel in zip(rows, generated.kernels, strict=True):
        if not compile or not kernel.name.startswith(compile):
            continue
        key = kernel.source.replace(kernel.name, "")
        if key not in done:
            fields = dataclasses.asdict(cubin.compile_kernels([kernel])[0])
            ptx, binary = fields.pop("ptx"), fields.pop("cubin")
            del fields["name"]
            done[key] = {**fields, "cubin_bytes": len(binary), "ptx": {opcode: cubin.count(ptx, opcode) for opcode in cubin.INSTRUCTIONS}}
        row.update(done[key])
    fields = dataclasses.asdict(generated)
    del fields["sources"]
    return {**fields, "kernels": rows, "extra": extra}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("fn_name")
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kwargs", type=json.loads, default={})
    parser.add_argument("--compile", default="")
    options = parser.parse_args()
    _child(options.fn_name, options.cases, options.out, options.kwargs, options.compile)
