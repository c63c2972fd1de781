"""Generated Triton kernels compiled for sm_90 with the ptxas that Triton brings: PTX, cubin, registers and spills, no GPU needed."""

import contextlib
import dataclasses
import importlib.util
import io
import re
import subprocess
import tempfile
import time
import unittest.mock as mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fake_cuda import Kernel
from h200 import fake_cuda

INSTRUCTIONS = (
    "wgmma.mma_async",
    "mma.sync",
    "wgmma.mma_async*.s8",
    "mma.sync*.s8",
    "wgmma.mma_async*.e4m3",
    "mma.sync*.e4m3",
    "dp4a",
    "cp.async",
    "ldmatrix",
    "ld.global",
    "ld.global*.v4",
    "st.global",
    "st.global*.v4",
    "atom.global",
    "ld.local",
    "st.local",
    "cvt",
)


@dataclasses.dataclass
class Compiled:
    """One compiled kernel with one launch config. `registers`, `stack` and `spills` (bytes per thread) are ptxas's own numbers; None where its log lacks them."""

    name: str
    config: str
    ptx: str
    cubin: bytes
    shared: int
    registers: int | None
    stack: int | None
    spills: int | None
    seconds: float


def count(ptx: str, opcode: str) -> int:
    """Instructions whose opcode starts with `opcode`; `*` stands for anything inside it, as in "ld.global*.v4"."""
    pattern = re.escape(opcode).replace(r"\*", r"\S*")
    return len(re.findall(rf"(?m)^\s*(?:\{{\s*)?(?:@!?%\w+\s+)?{pattern}(?=[.\s])", ptx))


def machine_instructions(binary: bytes) -> int:
    """Of the whole kernel, as the disassembler that Triton brings counts them."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"(?m)^\s+/\*[0-9a-f]+\*/\s+[^/]*;", text))


def compile_kernels(kernels: Sequence[Kernel], all_configs: bool = False) -> list[Compiled]:
    """Compile kernels as Inductor would (its launch configs, its pointer-alignment hints): the first config, which is the only one of a template without autotuning, or all."""
    with fake_cuda():
        return [compiled for kernel in kernels for compiled in _compile(kernel, all_configs)]


def _compile(kernel: Kernel, all_configs: bool) -> list[Compiled]:
    import triton

    binaries: list[Any] = []
    real = triton.compile

    def keep(*args: Any, **kwargs: Any) -> Any:
        binaries.append(real(*args, **kwargs))
        return binaries[-1]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kernel.name}.py"
        path.write_text(kernel.source)  # Triton reads the source of a function from its file
        spec = importlib.util.spec_from_file_location(kernel.name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = next(v for name, v in vars(module).items() if hasattr(v, "configs") and hasattr(v, "_precompile_config"))
        results = []
        for config in tuner.configs if all_configs else tuner.configs[:1]:
            start = time.perf_counter()
            log = io.StringIO()
            with mock.patch.object(triton, "compile", keep), ptxas_log(log):
                tuner._precompile_config(config)
            binary = binaries[-1]
            usage = resources(log.getvalue())
            results.append(Compiled(kernel.name, str(config), binary.asm["ptx"], binary.asm["cubin"], binary.metadata.shared, **usage, seconds=time.perf_counter() - start))
    return results


@contextlib.contextmanager
def ptxas_log(log: io.StringIO) -> Iterator[None]:
    """Triton prints what ptxas says; its cache is passed over, since a hit says nothing."""
    from triton import knobs

    with contextlib.redirect_stdout(log), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        yield


def resources(log: str) -> dict[str, int | None]:
    """Registers, stack bytes and spilled bytes in what `ptxas -v` printed. A stack without spills is an array in local memory (libdevice's sin and cos have one)."""
    patterns = (r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    registers, stack, stores, loads = (int(found[1]) if (found := re.search(pattern, log)) else None for pattern in patterns)
    return {"registers": registers, "stack": stack, "spills": stores + loads if stores is not None and loads is not None else None}
