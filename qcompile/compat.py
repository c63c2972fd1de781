"""Every private or version-dependent import of torch, in one place (what concerns Dynamo and Inductor's IR is written in ``compat_dynamo`` and ``compat_ir``, and reached from here). Supported: torch 2.11 to 2.13.

Nothing else in the package imports ``torch._inductor``, ``torch._dynamo`` internals, ``torch._guards`` or ``torch._functorch``. Heavy modules are imported where they are used,
so that ``import qcompile`` stays light and works without triton.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from qcompile.compat_dist import all_reduce, gathered, shard_of, shard_state, world_size  # noqa: F401
from qcompile.compat_dynamo import (  # noqa: F401
    any_strides,
    at_recompile_limit,
    backend_name,
    compile_in_place,
    compiling,
    compiling_for,
    dynamo_is_off,
    graphs,
    guard_parameters,
    is_wrapper,
    on_first_call,
    original,
    recompile_limit,
    reset_code,
)
from qcompile.compat_ir import (  # noqa: F401  (one door for all that is private)
    at_most,
    capability,
    device_of,
    enables_grad,
    fallback_kernel,
    flush_lowerings,
    launches_early,
    lower_template,
    lowered,
    multiprocessors,
    narrow_casts,
    register_lowering,
    scaled_mm,
    sizes,
    static_int,
    storage_key,
    sum_first,
    transposed,
    whole_rows,
)  # fmt: skip

# --- Inductor: compiling ---------------------------------------------------------------------------------------------


def inductor(gm: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any], decompositions: Mapping[Any, Any] | None = None) -> Callable[..., Any]:
    """``compile_fx`` with config patches and, beside Inductor's own table, our decompositions."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    flush_lowerings()
    table = None
    if decompositions and not torch.__version__.startswith("2.12."):
        table = _Decompositions({**select_decomp_table(), **decompositions})
    elif decompositions and not decompositions.keys() <= select_decomp_table().keys():  # 2.12 makes a local function of a table that it is given, which no cache can pickle; ours are of our own ops
        torch._inductor.decomposition.decompositions.update(decompositions)
        torch._inductor.decomposition.fast_random_decomps.cache_clear()
    with whole_rows(), narrow_casts():
        compiled: Any = compile_fx(gm, list(inputs), config_patches=dict(patches), decompositions=table)
    return compiled


class _Decompositions(dict[Any, Any]):
    """A table that pickles as nothing. 2.13 pickles it into the cache keys, where its functions make it bypass both caches; what it adds is in ``graph_pass``'s key already."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _Decompositions, ()


def counters() -> Any:
    """Dynamo's own counts of what happened: cache hits, skipped CUDA graphs."""
    from torch._dynamo.utils import counters

    return counters


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor config of one of torch.compile's modes; raises ValueError for a mode that does not exist, with the list."""
    if mode is None or mode == "default":
        return {}
    known = torch._inductor.list_mode_options()
    if mode not in known:
        raise ValueError(f"{mode!r}; known modes: {', '.join(known)}")
    return dict(known[mode])


def inductor_options() -> set[str]:
    """Names of Inductor's config entries."""
    return set(torch._inductor.list_options())


def graph_pass(fn: Callable[[fx.Graph], None], key: bytes) -> Any:
    """A post-grad pass whose ``uuid`` enters both cache keys of Inductor (AOTAutograd's and FX's); composes with the pass a user has set."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    given: Any = config.post_grad_custom_pre_pass  # 2.13 also takes a list of passes
    before = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    keys = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in before]

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for other in before:
                other(graph)
            fn(graph)

        def uuid(self) -> Any:
            return None if None in keys else (key, *keys)  # a pass without a key cannot be cached

    return Pass()


def traced(fn: Callable[..., Any], args: Sequence[Any]) -> fx.GraphModule:
    """``fn(*args)`` on tensors without values as a graph of ATen ops, decomposed as Inductor decomposes; outside any autocast."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    device = next(a.device.type for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor))
    with torch.no_grad(), torch.autocast(device, enabled=False), fake_mode(torch.utils._pytree.tree_leaves(args)), enable_python_dispatcher():
        gm: fx.GraphModule = make_fx(fn, select_decomp_table(), tracing_mode="real")(*args)
    gm.graph.eliminate_dead_code()  # what decompositions tried and did not take
    return gm


def checkpoint_op() -> Any:
    """The op that holds a checkpointed body in a graph of Dynamo's."""
    from torch._higher_order_ops.wrap import tag_activation_checkpoint

    return tag_activation_checkpoint


def recompute_mark(number: int) -> dict[str, Any]:
    """What a node of checkpointed body ``number`` carries, so that AOTAutograd computes it again in the backward."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number}


def saved_mark() -> dict[str, Any]:
    """What a node carries whose value AOTAutograd keeps for the backward, and never computes again from inputs that may have changed meanwhile."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.MUST_SAVE}


def force_stride_order() -> Any:
    """Inductor's op that makes a value own its memory; it exists once Inductor's prims are imported."""
    import torch._inductor.inductor_prims

    return torch.ops.prims.inductor_force_stride_order.default


def grouped_mm() -> set[Any]:
    """torch's product of rows sorted by expert with stacked matrices: private first, public since 2.10."""
    return {getattr(owner, name) for owner, name in ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm")) if hasattr(owner, name)}


def kernel_count() -> int:
    """Kernels that Inductor has generated in this process; restored on cache hits, so differences count either way."""
    from torch._inductor import metrics

    return int(metrics.generated_kernel_count)


# --- Dynamo: what comes with a captured graph --------------------------------------------------------------------------


def fake_mode(inputs: Sequence[Any]) -> Any:
    """The FakeTensorMode of the compile under way, or a new one outside a compile."""
    from torch._guards import TracingContext, detect_fake_mode
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return detect_fake_mode(inputs) or FakeTensorMode(shape_env=ShapeEnv())


def is_fake(x: Any) -> bool:
    """Whether something is a tensor without values, as tracing makes them."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that owns its graph, its code generated when it is called (as Dynamo's own). Dynamo reads its own placeholders again after a backend returns, so its graph is never edited."""
    graph, seen = fx.Graph(), {}  # type: ignore[var-annotated]
    out = graph.graph_copy(gm.graph, seen)
    graph.output(out)
    for old, new in seen.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy: Any = torch.fx._lazy_graph_module._LazyGraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = dict(gm._param_name_to_source)  # type: ignore[arg-type]
    return copy


def add_static_input(gm: fx.GraphModule, name: str, tensor: torch.Tensor, like: fx.Node) -> fx.Node:
    """A placeholder after the last one, for a tensor (given as a fake one) that keeps its address from call to call (CUDA graphs then do not copy it)."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    node.target = node.name  # the graph makes names unique, generated code reads targets
    node.meta["example_value"] = tensor
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    source = getattr(like, "_dynamo_source", None)
    if source is not None:
        from torch._dynamo.source import AttrSource

        node._dynamo_source = AttrSource(source, node.name)  # type: ignore[attr-defined]
    return node


def mark_static(node: fx.Node) -> None:
    """Tell CUDA-graph trees that the address of this input rarely changes; they record anew when it does."""
    node.meta["tensor_dict"] = {**node.meta.get("tensor_dict", {}), "_dynamo_static_input_type": "unguarded"}


def source_name(node: fx.Node) -> str:
    """Dynamo's name for where a placeholder comes from, such as ``L['self']._modules['fc']._parameters['weight']``."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method in 2.11, a property in 2.13


def trace_artifact(name: str, payload: Callable[[], str], encoding: str = "string") -> None:
    """An artifact for tlparse, made and written where TORCH_TRACE is set."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


@contextlib.contextmanager
def no_dispatch_modes() -> Iterator[None]:
    """Run on real tensors inside a compile, outside Dynamo's fake mode and tracing context; and outside inference mode, whose tensors a later call under no_grad could not write to."""
    from torch._guards import tracing
    from torch.utils._python_dispatch import _disable_current_modes

    with tracing(None), _disable_current_modes(), torch.inference_mode(False):
        yield


def on_optimizer_step(fn: Callable[[Iterator[torch.Tensor]], Any]) -> None:
    """Call ``fn`` with the parameters of an optimizer after each of its steps."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda optimizer, *_: fn(p for group in optimizer.param_groups for p in group["params"]) and None)


def vector_isa(inputs: Sequence[Any]) -> bytes:
    """The vector instructions that Inductor writes C++ for, of graphs on a CPU: part of the key to what it compiled before, for its own key lacks them, and code for others writes beyond its outputs.
    (Folders of caches are carried to other machines.)"""
    if all(t.device.type != "cpu" for t in inputs if isinstance(t, torch.Tensor)):
        return b""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(pick_vec_isa()).encode()


@functools.cache
def has_cpp_compiler() -> str | None:
    """None where Inductor finds a C++ compiler, else what it said."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, FileNotFoundError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return None
