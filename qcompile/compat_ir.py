"""The part of ``compat`` that reads tensors and graphs, and speaks to Inductor's IR: sizes, lowerings, templates. Reached through ``qcompile.compat``, like everything that is private in torch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

# --- reading tensors, Dynamo's graphs and Inductor's IR ---------------------------------------------------------------


def sizes(x: Any) -> Sequence[Any]:
    """Shape of a tensor or of an IR node."""
    return x.shape if isinstance(x, torch.Tensor) else x.get_size()


def device_of(x: Any) -> torch.device:
    """Device of a tensor or of an IR node."""
    device: torch.device = x.device if isinstance(x, torch.Tensor) else x.get_device()
    return device


def storage_key(value: torch.Tensor) -> int | None:
    """What tensors that share memory have in common, fake ones too; None where they have none that can be seen (inside transforms, sparse ones)."""
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def enables_grad(graph: fx.Graph) -> bool:
    """Whether Dynamo's graph turns grad mode on for some of its nodes."""
    return any(node.args and node.args[0] is True for node in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled))


def static_int(size: Any) -> int | None:
    """The value of a size that is known at compile time, None where it is symbolic."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt):
        return int(size) if size.node.is_constant() else None
    return int(size) if getattr(size, "is_number", False) else None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


# --- Inductor: lowerings and templates -------------------------------------------------------------------------------

_TEMPLATES: dict[str, Any] = {}
WAIT, LET = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"
"""Programmatic dependent launch: wait for the kernel before, whole, and let the one after begin. Whoever lets the next kernel begin has waited first, so that when a kernel runs, all but the last before it are done."""


def register_lowering(op: Any, fn: Callable[..., Any]) -> None:
    """Hand the lowering of one of our ops to Inductor when Inductor is first used."""
    _PENDING.append((op, fn))


_PENDING: list[tuple[Any, Callable[..., Any]]] = []


def flush_lowerings() -> None:
    """Register what ``register_lowering`` collected; called before every compile, so that importing us does not import Inductor."""
    if not _PENDING:
        return
    from torch._inductor.lowering import register_lowering as register

    always_wait()

    while _PENDING:
        op, fn = _PENDING.pop()
        register(op, type_promotion_kind=None)(fn)


def launches_early(device: torch.device) -> bool:
    """Kernels begin while the one before ends (Inductor's ``triton.enable_pdl``), which needs compute capability 9."""
    return bool(torch._inductor.config.triton.enable_pdl) and device.type == "cuda" and torch.version.hip is None and capability(device) >= (9, 0)


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device, as Inductor counts them."""
    from torch._inductor.runtime.hints import DeviceProperties

    return int(DeviceProperties.create(device).multi_processor_count or 1)


def always_wait() -> None:
    """Inductor's own kernels wait for the one before only where they read what it wrote, or load anything at all. One that only fills memory does not, and the kernel behind it, which waits for
    the fill alone, could run before what came before the fill is done. So that one waits, too."""
    from torch._inductor.codegen.triton import TritonKernel

    given = TritonKernel._filter_pdl
    if getattr(given, "waits", False):
        return

    def filtered(self: Any, code: Any) -> None:
        given(self, code)
        if self._enable_pdl_codegen() and not any(WAIT in line for line in code._lines if isinstance(line, str)):
            code._lines.insert(0, WAIT)

    filtered.waits = True  # type: ignore[attr-defined]
    TritonKernel._filter_pdl = filtered  # type: ignore[method-assign]


def waiting(source: str) -> str:
    """A template that waits before its first statement. Nothing is read earlier: asked for before the kernel ahead has ended, weights only take bandwidth from it (measured, by L2 prefetches)."""
    head, arguments, body = source.partition("}}\n")
    return f"{head}{arguments}    {WAIT}\n    {LET}\n{body}"


def lower_template(
    name: str, source: Callable[[], str], inputs: Sequence[Any], size: Sequence[Any], configs: Sequence[Mapping[str, float]], grid: Callable[..., Any] | None = None, strided: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    """One TritonTemplate call with output of ``size`` in ``dtype``. With a single config Inductor neither benchmarks nor refuses to fuse epilogues.

    ``grid(*size, meta, cdiv)`` gives the number of programs; the default is one for each BLOCK_M x BLOCK_N tile. ``strided``: the template reads any strides but the last, which is 1;
    other inputs are made contiguous.
    """
    from torch._inductor import ir
    from torch._inductor.kernel.mm_common import mm_grid
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm

    early = launches_early(inputs[0].get_device())
    name = f"{name}_early" if early else name
    if name not in _TEMPLATES:
        _TEMPLATES[name] = TritonTemplate(name=name, grid=SymbolicGridFn(grid) if grid is not None else mm_grid, source=waiting(source()) if early else source())
    nodes = [ir.ExternKernel.realize_input(node) for node in inputs]
    nodes = [node if strided and static_int(node.get_stride()[-1]) == 1 else ir.ExternKernel.require_contiguous(node) for node in nodes]
    layout = ir.FixedLayout(nodes[0].get_device(), dtype, list(size))  # type: ignore[arg-type]
    choices: list[Any] = []
    for config in configs:
        more: dict[str, Any] = {"triton_meta": {"launch_pdl": True}} if early else {}
        error = _TEMPLATES[name].maybe_append_choice(choices, input_nodes=tuple(nodes), layout=layout, **more, **config)
        if error is not None:
            raise error
    out = autotune_select_algorithm(name, choices, nodes, layout)
    return out[0] if isinstance(out, tuple) else out  # 2.13 returns (node, choice)


LONGEST = 16384
"""Elements of a row that a reduction keeps in registers, 32 in each of 512 threads."""


FEW = 1 << 14
"""Elements of a kernel that takes as long as it takes to start."""


def beside(a: Any, b: Any) -> bool:
    """Whether two pointwise kernels of as many, few, elements read other parts of one buffer, as the writes of a step's keys and values into their caches do. Inductor fuses what reads the same
    elements."""
    if any(node.is_reduction() or node.is_template() or node.is_extern() or node.is_foreach() for node in (a, b)):
        return False
    group = getattr(a, "group", None)
    if group is None or group[0].type != "cuda" or group != getattr(b, "group", None):
        return False
    count = static_int(group[1][0])
    return count is not None and count <= FEW and bool(a.read_writes.buffer_names() & b.read_writes.buffer_names())


def whole_rows() -> Any:
    """A context in which reductions over rows of up to ``LONGEST`` elements load them once, in one kernel.

    Quantizing a row, or normalizing and quantizing it, reads it twice: for its maximum, then for its codes. Inductor keeps rows of 1,024 elements in registers and reads longer ones again; of few
    rows it gives each to several programs, then adds a kernel for the maximum of theirs, and one for the codes.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
            usual: bool = InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
            if usual or cooperative_reduction or features.get_reduction_hint() != ReductionHint.INNER or not torch._inductor.config.triton.persistent_reductions:
                return usual
            return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST))

        @staticmethod
        def reduction_split_factor(device: torch.device, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool) -> int:
            whole = inner_reduction and reduction_numel_hint <= LONGEST
            return 1 if whole else int(InductorChoices.reduction_split_factor(device, reduction_numel_hint, numel_hint, inner_reduction))

        @staticmethod
        def can_fuse(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            return InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score) or beside(node1, node2)

        @staticmethod
        def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            return InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score) or beside(node1, node2)

    return V.set_choices_handler(Choices())


@contextlib.contextmanager
def narrow_casts() -> Iterator[None]:
    """A context in which a float that is narrowed, then widened stays narrow in between, as it does from torch 2.13 on.

    Before, Inductor takes a narrower cast and the wider one behind it for one: what a product stores for two readers that compute in float32, such as a row's maximum and its codes, then is written
    and read in float32.
    """
    from torch._inductor.fx_passes import joint_graph

    entries = [e for found in joint_graph.patterns.patterns.values() for e in found if getattr(e, "handler", None) is joint_graph.pointless_convert]
    before = [e.extra_check for e in entries]

    def check(match: Any, usual: Callable[[Any], bool]) -> bool:
        narrow, wide = match.kwargs["dtype1"], match.kwargs["dtype2"]
        return narrow.itemsize >= wide.itemsize and usual(match)

    for entry, usual in zip(entries, before):
        entry.extra_check = functools.partial(check, usual=usual)
    try:
        yield
    finally:
        for entry, usual in zip(entries, before):
            entry.extra_check = usual


def lowered(op: Any, *args: Any) -> Any:
    """What Inductor makes of an ATen op on IR nodes."""
    from torch._inductor.lowering import lowerings

    return lowerings[op](*args)


def sum_first(x: Any) -> Any:
    """The sum over the first axis of an IR node. A short axis is unrolled, in order, into whatever reads the sum."""
    return lowered(torch.ops.aten.sum.dim_IntList, x, [0])


def transposed(x: Any) -> Any:
    """A matrix of one-byte codes, an IR node, with its axes swapped in memory: a kernel of its own. Inductor fuses such a copy into whatever reads the same codes, and in a reduction, which goes along
    rows, every byte is a store of its own."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    x.realize()
    done = V.graph.__dict__.setdefault("qcompile_transposed", {})
    if (name := x.get_name()) in done:
        return done[name]
    load = x.make_loader()
    rows, columns = x.get_size()
    out: Any = ir.Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=lambda index: load((index[1], index[0])), ranges=[columns, rows])
    out.realize()
    out = ir.ExternKernel.require_contiguous(out)  # type: ignore[assignment]
    V.graph.no_fuse_buffer_names.add(out.get_name())
    done[name] = out
    return out


def scaled_mm(a: Any, a_scale: Any, b: Any, b_scale: Any, dtype: torch.dtype, fast: bool) -> Any:
    """The library's FP8 product of IR nodes, (M, K) times (N, K) transposed. Operands are stored first: Inductor's own lowering copies those that are not."""
    from torch._inductor import ir

    for node in (a, b, a_scale, b_scale):
        node.realize()
    a, b, a_scale, b_scale = (ir.ExternKernel.require_contiguous(node) for node in (a, b, a_scale, b_scale))
    aten = torch.ops.aten
    b_scale = lowered(aten.reshape.default, b_scale, [1, sizes(b_scale)[0]])
    return lowered(aten._scaled_mm.default, a, lowered(aten.permute.default, b, [1, 0]), a_scale, b_scale, None, None, dtype, fast)


def at_most(size: Any, bound: int) -> bool:
    """Whether a size is at most ``bound``, asked of a symbolic size by a guard: beyond the bound Dynamo compiles again. Sizes that depend on data are not."""
    if (known := static_int(size)) is not None:
        return known <= bound
    if isinstance(size, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return bool(guard_or_false(size <= bound))
    import sympy
    from torch._inductor.virtualized import V

    return bool(V.graph.sizevars.guard_or_false(sympy.Le(size, bound)))


def fallback_kernel(op: Any, *args: Any) -> Any:
    """An IR node that calls ``op`` as it is, for CPU kernels that are ordinary torch ops."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)
