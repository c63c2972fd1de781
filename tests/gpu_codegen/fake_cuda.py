"""Inductor's real CUDA code without a GPU.

Inputs are fake tensors on device "cuda"; `compile_fx` itself runs (AOTAutograd, Inductor's passes, lowering, scheduling, code generation) and only the loading of the generated module is cut off.
Three doors: `codegen` (a function), `compile_backend` (a torch.compile backend and a model), `codegen_graph` (a Dynamo-level graph). The mocks leak: one process per case, `run_case.isolated`.
"""

import ast
import contextlib
import copy
import dataclasses
import sys
import types
import unittest.mock as mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from h200 import fake_cuda
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

CONFIG = {
    "force_disable_caches": True,  # a cache hit would skip the code generation that is under test
    "compile_threads": 1,  # no worker pool: its children do not have the mocks
    "benchmark_epilogue_fusion": False,  # "fuse if faster" runs kernels
}


@dataclasses.dataclass
class Kernel:
    """One Triton kernel: its name and the module text that Inductor would write to disk."""

    name: str
    source: str


@dataclasses.dataclass
class Generated:
    """What Inductor produced: wrapper text (several graphs are joined), kernels, extern calls, and `calls`, both in the order of their launches."""

    source: str
    kernels: list[Kernel]
    externs: list[str]
    calls: list[str]
    graphs: int = 1
    sources: list[str] = dataclasses.field(default_factory=list, repr=False)
    """One text for each graph that reached Inductor, in order: `parse([text])` is that graph alone."""

    @property
    def names(self) -> list[str]:
        return [k.name for k in self.kernels]

    def __getitem__(self, name: str) -> str:
        return next(k.source for k in self.kernels if k.name == name)


class _Loaded(types.SimpleNamespace):
    """Stands for the generated module, which needs a driver to load."""

    __file__ = __name__ = "generated"

    @staticmethod
    def call(*_: Any) -> Any:
        raise RuntimeError("code for a fake GPU cannot run")


@contextlib.contextmanager
def capture_source() -> Iterator[list[str]]:
    """Collect the text of every generated module instead of loading it."""
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    def compile_to_module(graph: Any) -> Any:
        code = graph.codegen()[0]
        sources.append(getattr(code, "value", code))
        return _Loaded()

    with mock.patch.object(GraphLowering, "compile_to_module", compile_to_module):
        yield sources


def parse(sources: list[str]) -> Generated:
    """Read kernels, externs and launch order from the wrapper's syntax tree."""
    kernels: dict[str, Kernel] = {}
    calls: list[tuple[str, bool]] = []
    for source in sources:
        names = {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "async_compile.triton":
                names[ast.unparse(node.targets[0])] = Kernel(*(ast.literal_eval(a) for a in node.value.args[:2]))
        kernels.update(names)
        found = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                path = ast.unparse(node.func)
                if path.removesuffix(".run") in names and path.endswith(".run"):
                    found.append((node.lineno, path.removesuffix(".run"), False))
                elif path.startswith(("extern_kernels.", "torch.ops.", "aten.", "cpp_fused")):
                    found.append((node.lineno, path, True))
        calls += [(name, extern) for _, name, extern in sorted(found)]
    return Generated("\n".join(sources), list(kernels.values()), [n for n, extern in calls if extern], [n for n, _ in calls], len(sources), list(sources))


def _on_cuda(value: Any, mode: FakeTensorMode) -> Any:
    """A fake cuda tensor with the shape (also symbolic), strides and dtype of `value`; anything else unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda", requires_grad=value.requires_grad and value.is_leaf)
    return torch.nn.Parameter(fake, value.requires_grad) if isinstance(value, torch.nn.Parameter) else fake


def _retarget(gm: torch.fx.GraphModule, mode: FakeTensorMode) -> None:
    """Every mention of the CPU (or meta) in the graph becomes cuda, also in nested graphs and in Dynamo's example values."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type in ("cpu", "meta"):
            return torch.device("cuda", 0)
        return "cuda" if isinstance(value, str) and value in ("cpu", "meta") else value

    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = torch.fx.node.map_aggregate(node.args, leaf), torch.fx.node.map_aggregate(node.kwargs, leaf)
                if "example_value" in node.meta and node.op != "placeholder":
                    node.meta["example_value"] = tree_map(lambda v: _on_cuda(v, mode), node.meta["example_value"])
            module.recompile()


def _symbolic_float(node: torch.fx.Node, mode: FakeTensorMode) -> Any:
    """Dynamo passes a dynamic Python float as a 0-d CPU tensor that is only read by `.item()`: the same in `mode`, still on the CPU; None for other inputs."""
    traced = node.meta.get("example_value")
    if not isinstance(traced, FakeTensor) or traced.item_memo is None or mode.shape_env is not traced.fake_mode.shape_env:
        return None
    with mode:
        fake = torch.empty((), dtype=traced.dtype, device="cpu")
    fake.item_memo = traced.item_memo
    return fake


def to_fake_cuda(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], mode: FakeTensorMode | None = None) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A copy of a Dynamo-level graph that was captured on CPU, with its inputs, as if captured on cuda. Constant tensors become inputs; symbolic shapes stay when `mode` is the capturing one."""
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    new = torch.fx.GraphModule(gm, graph)
    for name, child in list(new.named_children()):
        if isinstance(child, torch.fx.GraphModule):
            setattr(new, name, copy.deepcopy(child))
    placeholders = graph.find_nodes(op="placeholder")
    inputs = []
    for node, value in zip(placeholders, example_inputs, strict=True):
        traced = node.meta.get("example_value")
        if (scalar := _symbolic_float(node, mode)) is not None:
            inputs.append(scalar)
            continue
        symbolic = isinstance(traced, torch.SymInt) or (isinstance(traced, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in traced.shape))
        inputs.append(_on_cuda(traced if symbolic and mode.shape_env is not None else value, mode))
    last = placeholders[-1] if placeholders else None
    for node in graph.find_nodes(op="get_attr"):
        constant = _attribute(new, str(node.target))
        if isinstance(constant, torch.Tensor):
            with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
                last = graph.placeholder(str(node.target).replace(".", "_") + "_lifted")
            inputs.append(_on_cuda(constant.detach(), mode))
            node.replace_all_uses_with(last)
            graph.erase_node(node)
    _retarget(new, mode)
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["example_value"] = value
    graph.lint()
    return new, inputs


def _attribute(module: torch.nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


@contextlib.contextmanager
def _inductor(config: dict[str, Any] | None, mode: FakeTensorMode) -> Iterator[list[str]]:
    """Everything around one run of `compile_fx` on fake cuda inputs of `mode`; yields the list that receives the sources."""
    with fake_cuda(), capture_source() as sources, inductor_config.patch({**CONFIG, **(config or {})}), tracing(TracingContext(mode)):
        yield sources


def codegen_graph(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    decompositions: dict[Any, Callable[..., Any]] | None = None,
    post_grad_pass: Callable[[torch.fx.Graph], Any] | None = None,
    config: dict[str, Any] | None = None,
    mode: FakeTensorMode | None = None,
) -> Generated:
    """Inference code for a Dynamo-level graph captured off the GPU. `decompositions` are added to Inductor's own; `post_grad_pass` runs first in the post-grad stage."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    config = {**({"post_grad_custom_pre_pass": post_grad_pass} if post_grad_pass else {}), **(config or {})}
    table = {**select_decomp_table(), **decompositions} if decompositions else None
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with _inductor(config, mode) as sources, torch.no_grad():
        compile_fx(*to_fake_cuda(gm, example_inputs, mode), decompositions=table)
    return parse(sources)


def compile_backend(
    backend: str | Callable[..., Any], model: Callable[..., Any], inputs: Any, config: dict[str, Any] | None = None, dynamic: bool | None = None, values: bool = True
) -> Generated:
    """`torch.compile(model, backend=backend)` called once with CPU (or meta) `inputs` (a dict, a tuple or a function that makes one), no gradients. Inductor sees cuda.

    values=True: the backend gets the real CPU tensors, and the model then runs eagerly, so calibrating and packing work. values=False: the backend itself gets fake cuda tensors.
    """
    import torch._inductor.compile_fx as entry
    from torch._dynamo import lookup_backend

    real, compiler = entry.compile_fx, lookup_backend(backend)
    collected: list[str] = []
    errors: list[Exception] = []

    def retarget(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        mode = TracingContext.get().fake_mode
        eager = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))  # compile_fx owns, and may edit, what it gets
        with _inductor(config, mode) as sources:
            real(*(to_fake_cuda(gm, example_inputs, mode) if values else (gm, example_inputs)), *args, **kwargs)
        collected.extend(sources)
        return eager

    def outer(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        try:
            if values:
                return compiler(gm, example_inputs, **kwargs)
            with fake_cuda():
                compiler(*to_fake_cuda(gm, example_inputs, TracingContext.get().fake_mode), **kwargs)
            return gm
        except Exception as error:
            if "Restart" not in type(error).__name__:  # Dynamo's own way to begin again
                errors.append(error)  # it turns some errors into graph breaks: they must be seen
            raise

    inputs = inputs() if callable(inputs) else inputs
    with contextlib.ExitStack() as stack:
        for module in [m for m in sys.modules.values() if getattr(m, "__dict__", {}).get("compile_fx") is real]:
            stack.enter_context(mock.patch.object(module, "compile_fx", retarget))  # also where it was imported by name
        stack.enter_context(torch.no_grad())
        compiled = torch.compile(model, backend=outer, dynamic=dynamic)
        compiled(**inputs) if isinstance(inputs, dict) else compiled(*inputs)
    if errors:
        raise errors[0]
    if not collected:
        raise AssertionError("the backend never reached torch._inductor.compile_fx.compile_fx")
    return parse(collected)


def codegen(fn: Callable[..., Any], make_inputs: Callable[[], Sequence[Any]], config: dict[str, Any] | None = None, dynamic: bool = False) -> Generated:
    """Code of plain `torch.compile(fn)`. `make_inputs` may say device="cuda": it runs under FakeTensorMode, and Dynamo then captures `fn` on meta tensors, which cost no memory.

    A constant tensor made inside `fn` (torch.tensor) needs CPU inputs and `compile_backend`: Dynamo has no constants on meta.
    """
    with fake_cuda(), FakeTensorMode(allow_non_fake_inputs=True):
        fakes = make_inputs()
    metas = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") if isinstance(v, torch.Tensor) else v for v in fakes]
    return compile_backend("inductor", fn, metas, config, dynamic)


def compile_training(backend: Callable[..., Any], model: Callable[..., Any], inputs: Sequence[Any], config: dict[str, Any] | None = None) -> Generated:
    """`torch.compile(model, backend=backend)` called once with gradients on CPU `inputs`; its `sources` are one for the forward and one for the backward of each graph.

    Autograd's engine asks a fake GPU for its streams, so AOTAutograd traces on the CPU, and the two graphs that it hands to Inductor are moved to cuda.
    """
    import torch._inductor.compile_fx as entry

    real, inner = entry.compile_fx, entry.compile_fx_inner
    collected: list[str] = []

    def moved(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        mode = TracingContext.get().fake_mode
        for node in gm.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map(lambda v: _on_cuda(v, mode), node.meta["val"])
        _retarget(gm, mode)
        inputs = [_on_cuda(v, mode) for v in example_inputs]
        with fake_cuda(), capture_source() as sources:
            inner(gm, inputs, **kwargs)
        collected.extend(sources)
        return _Loaded.call

    def retarget(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        with inductor_config.patch({**CONFIG, **(config or {})}):
            return real(*args, **{**kwargs, "inner_compile": moved})

    with mock.patch.object(entry, "compile_fx", retarget), functorch_config.patch(force_non_lazy_backward_lowering=True), contextlib.suppress(RuntimeError):
        torch.compile(model, backend=backend)(*inputs)  # the code that is made cannot run
    return parse(collected)
