"""An H200 that exists only as answers to questions: what torch, Inductor and Triton ask about a GPU before they generate code for it."""

import contextlib
import hashlib
import os
import subprocess
import tempfile
import types
import unittest.mock as mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses import fake_tensor as fake_tensor_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CAPABILITY = (9, 0)
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    type="cuda",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    uuid="fake",
)
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


class FakeDriver:
    """What `triton.runtime.driver.active` answers where libcuda is absent."""

    binary_ext = "cubin"

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY[0] * 10 + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return CAPABILITY

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def register_device_guard() -> None:
    """Give a torch built without CUDA a do-nothing device guard: `x[:, 0]`, `.to`, `.copy_` on a fake cuda tensor ask for one. A CUDA build has its own way (`_ensureCUDADeviceGuardSet`)."""
    if torch.backends.cuda.is_built():
        return
    key = hashlib.sha256((GUARD + torch.__version__ + torch.__file__).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"qcompile_fake_cuda_guard_{os.getuid()}_{key}.so"
    if not library.exists():
        root = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            (Path(folder) / "guard.cpp").write_text(GUARD)
            flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", "-lc10", f"-Wl,-rpath,{root}/lib"]
            subprocess.run([os.environ.get("CXX", "g++"), "guard.cpp", "-o", "guard.so", *flags], cwd=folder, check=True)
            os.replace(Path(folder) / "guard.so", library)  # atomic: several test processes may race
    torch.ops.load_library(str(library))


def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *, scale: Any = None, enable_gqa: bool = False) -> Any:
    """The kernel that torch chooses on an H200: flash for half precision without a mask, memory-efficient otherwise, plain mathematics where neither applies."""
    aten = torch.ops.aten
    if query.device.type == "cuda" and query.dim() == 4:
        half = query.dtype in (torch.float16, torch.bfloat16)
        if attn_mask is None and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if not enable_gqa and query.shape[-1] % (8 if half else 4) == 0:
            if attn_mask is not None and attn_mask.dtype is torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
            mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]) if attn_mask is not None else None
            return aten._scaled_dot_product_efficient_attention(query, key, value, mask, False, dropout_p, is_causal, scale=scale)[0]
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


class FoldOnCpu(TorchDispatchMode):
    """Run an op that creates or moves a tensor to cuda on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda v: torch.device("cpu") if isinstance(v, torch.device) and v.type == "cuda" else v, (args, kwargs or {}))
        return func(*args, **kwargs)


def patches() -> list[tuple[Any, str, Any]]:
    """(object, attribute, value): every lie that Inductor must be told."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    def cheapest_first(self: Any, name: str, nodes: Any, layout: Any, gens: Any, key: Any, choices: Sequence[Any], *_: Any, **__: Any) -> dict[Any, float]:
        return {c: 1.0 + i for i, c in enumerate(sorted(choices, key=lambda c: not c.name.startswith("triton_")))}  # stable: first Triton choice wins

    def on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with FoldOnCpu():
                return method(*args, **kwargs)

        return run

    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    rng = torch.zeros(16, dtype=torch.uint8)
    table: list[tuple[Any, str, Any]] = [
        (torch.version, "cuda", "13.0"),  # gates of the "is this NVIDIA" kind
        (torch.cuda, "is_available", always(True)),  # otherwise no Triton scheduling
        (torch.cuda, "device_count", always(1)),
        (torch.cuda, "current_device", always(0)),
        (torch.cuda, "get_device_properties", always(H200)),  # SM count, shared memory
        (torch.cuda, "get_device_capability", always(CAPABILITY)),  # sm_90 features
        (torch.cuda, "_lazy_init", always(None)),  # raises without CUDA
        (torch.cuda, "_exchange_device", always(0)),  # `with torch.cuda.device(0)` around the compilation
        (torch.cuda, "_maybe_exchange_device", always(0)),
        (torch.cuda, "is_bf16_supported", always(True)),
        (torch.cuda, "get_rng_state", always(rng)),  # AOTAutograd preserves the generator's state
        (torch.cuda, "set_rng_state", always(None)),
        (torch.cuda.random, "get_rng_state", always(rng)),  # the same, imported by name
        (torch.cuda.random, "set_rng_state", always(None)),
        (CudaInterface, "current_device", staticmethod(always(0))),  # these hold torch.cuda's functions by value
        (CudaInterface, "device_count", staticmethod(always(1))),
        (CudaInterface, "get_device_properties", staticmethod(always(H200))),
        (CudaInterface, "synchronize", staticmethod(always(None))),
        (CudaInterface, "is_bf16_supported", staticmethod(always(True))),
        (CudaInterface.Worker, "get_device_properties", staticmethod(always(H200))),  # else cached for the process
        (fake_tensor_module, "init_gpu_context", always(None)),  # CUDA build without a driver: would touch the device
        (FakeTensorMode, "avoid_device_init", property(always(True))),  # else torch.tensor(1, device="cuda") allocates for real
        (fuse_attention, "_sfdp_init", always(None)),  # traces its patterns with tensors on cuda
        (pad_mm, "_pad_mm_init", always(None)),  # the same
        (misc_patterns, "_misc_patterns_init", always(None)),  # the same
        (UniformValueConstantFolder, "__init__", on_cpu(UniformValueConstantFolder.__init__)),  # computes small constants on their device
        (UniformValueConstantFolder, "_deduce_value", on_cpu(UniformValueConstantFolder._deduce_value)),  # the same
        (triton_helpers, "set_driver_to_gpu", always(None)),  # generated modules look for a driver when imported
        (sdpa, "py_kernels", {**sdpa.py_kernels, torch._C.DispatchKey.CompositeImplicitAutograd: attention}),  # a build without CUDA knows only the slow path
        (AlgorithmSelectorCache, "do_autotuning", cheapest_first),  # would run the candidates
    ]
    return [row for row in table if hasattr(row[0], row[1])]


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, Inductor sees one H200. Afterwards torch's own attributes are back, but caches and Triton's driver are not: one process per case."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime.hints import DeviceProperties

    register_device_guard()
    triton.runtime.driver.set_active(FakeDriver())
    device_interface.get_interface_for_device("cpu")  # fills the table, which otherwise overwrites ours at first use
    with contextlib.ExitStack() as stack:
        for target, attribute, value in patches():
            stack.enter_context(mock.patch.object(target, attribute, value))
        for name in ("cuda", "cuda:0"):
            device_interface.register_interface_for_device(name, device_interface.CudaInterface)
        from torch._inductor import utils as inductor_utils
        from torch.utils import _triton

        for cached in (DeviceProperties.create, getattr(inductor_utils, "get_gpu_type", None), getattr(_triton, "has_triton", None)):
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()  # answered "no GPU" before
        yield
