"""One case in a process of its own: `isolated` runs it and returns what it generated, as plain data; as a script this file runs one case, too, or forks a process for each that it is told.

A case is a function in a cases file: it returns a `Generated`, or (`Generated`, dict of extra results), or a dict of such parts, so that many graphs share one process.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class CaseError(AssertionError):
    """A case failed in its process; the message is the end of what it printed."""


class Server:
    """A process that has imported torch, Inductor and Triton and has run nothing, and forks one for each case: each is as fresh as a new one, and saves what those imports take."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True)

    def run(self, job: dict[str, Any], timeout: float) -> int | None:
        """Exit status of a case; None if it took too long, and then this server has ended, and its children with it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            if not ready.select(timeout):
                os.killpg(self.process.pid, 9)
                self.process.wait()
                return None
        return int(self.process.stdout.readline() or self.process.wait())


_server: list[Server] = []


def isolated(fn_name: str, cases: Path | str = HERE / "cases.py", compile: bool | str = True, timeout: float = 400, **kwargs: Any) -> dict[str, Any]:
    """Run case `fn_name` of file `cases` with JSON-able `kwargs`.

    Returns {"kernels": [{"name", "source", and if `compile`: "config", "cubin_bytes", "instructions", "shared", "registers", "stack", "spills", "ptx": {opcode: count}, "seconds"}],
    "externs", "calls", "graphs", "source", "extra", "seconds": {"codegen", "compile", "total"}}; of a case with several parts {"parts": {name: the same}, "seconds"}.
    `compile` is True, False, or the prefix of the names of the kernels to compile ("triton_tem"); equal kernels of several parts are compiled once.
    """
    start = time.perf_counter()
    prefix = "triton" if compile is True else compile or ""
    if not _server or _server[-1].process.poll() is not None:
        _server.append(Server())
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        status = _server[-1].run({"fn_name": fn_name, "cases": str(cases), "out": str(out), "log": str(log), "kwargs": kwargs, "compile": prefix}, timeout)
        printed = log.read_text(errors="replace") if log.exists() else ""
        if status is None:
            raise CaseError(f"case {fn_name}: still running after {timeout} s\n{printed[-3000:]}")
        if status or not out.exists():
            command = [sys.executable, __file__, fn_name, str(cases), "/dev/stdout", "--kwargs", json.dumps(kwargs), *(["--compile", prefix] if prefix else [])]
            raise CaseError(f"case {fn_name} ended with {status}\n{printed[-6000:]}\nrepeat: {shlex.join(command)}")
        result: dict[str, Any] = json.loads(out.read_text())
    result["seconds"]["total"] = round(time.perf_counter() - start, 2)
    return result


def serve() -> None:
    """Jobs come in lines, and for each its exit status goes out. Nothing that differs between a CPU and the GPU that cases pretend to have may be computed here."""
    import torch
    import torch._inductor.codegen.triton
    import torch._inductor.compile_fx  # noqa: F401
    import transformers  # noqa: F401
    import triton.runtime.cache
    from torch._inductor.codecache import torch_key

    import qcompile.backend  # noqa: F401

    torch_key()  # hashes of what is installed: both read hundreds of megabytes
    triton.runtime.cache.triton_key()
    gc.collect()
    gc.freeze()  # each graph that is compiled looks through the live objects for the owners of its weights; what the imports left owns none
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(_forked(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _forked(fn_name: str, cases: str, out: str, log: str, kwargs: dict[str, Any], compile: str) -> int:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        _child(fn_name, Path(cases), Path(out), kwargs, compile)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _child(fn_name: str, cases: Path, out: Path, kwargs: dict[str, Any], compile: str) -> None:
    import torch
    import torch._inductor.config

    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # no pool of processes that wait for work

    case = getattr(_load(cases), fn_name)
    clock = [time.perf_counter()]
    generated = case(**kwargs)
    clock.append(time.perf_counter())
    done: dict[str, Any] = {}
    result = {"parts": {name: _part(part, compile, done) for name, part in generated.items()}} if isinstance(generated, dict) else _part(generated, compile, done)
    clock.append(time.perf_counter())
    seconds = {name: round(b - a, 2) for name, a, b in zip(("codegen", "compile"), clock[:-1], clock[1:], strict=True)}
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
            done[key] = {**fields, "cubin_bytes": len(binary), "instructions": cubin.machine_instructions(binary), "ptx": {opcode: cubin.count(ptx, opcode) for opcode in cubin.INSTRUCTIONS}}
        row.update(done[key])
    fields = dataclasses.asdict(generated)
    del fields["sources"]
    return {**fields, "kernels": rows, "extra": extra}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("fn_name", nargs="?")
    parser.add_argument("cases", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--kwargs", type=json.loads, default={})
    parser.add_argument("--compile", default="")
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        serve()
    else:
        _child(options.fn_name, options.cases, options.out, options.kwargs, options.compile)
