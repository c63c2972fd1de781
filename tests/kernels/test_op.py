"""What every op promises, over the table OPS: torch's own checks, and one meaning whether run, traced, simplified or exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.core.errors import Skip
from qcompile.core.qtensor import quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels import OPS
from qcompile.kernels.op import NAMESPACE, Case, Kernel, _lower, decompositions, target

Args = tuple[Any, ...]


def weight(spelling: str, *shape: int) -> list[Tensor]:
    return quantize(torch.randn(shape), Scheme.parse(spelling)).flatten()


def rows(spelling: str, *shape: int) -> tuple[Tensor, list[Tensor]]:
    codes, *scale = OPS["quantize"].reference(torch.randn(shape), [], spelling)
    return codes, scale


def _scaled(x: str, w: str, *shape: int, n: int = 24) -> Args:
    codes, scale = rows(x, *shape)
    return codes, scale, weight(w, n, shape[-1]), f"{x} @ {w}"


def _grouped(w: str, by_row: bool) -> Args:
    index = torch.tensor([1, 0, 2, 1, 1], dtype=torch.int64) if by_row else torch.tensor([2, 2, 4], dtype=torch.int32)
    return torch.randn(5, 96), [], index, weight(w, 3, 24, 96), w, by_row


# One list of argument tuples for each op. A new op needs a line here; test_every_op_has_samples says so.
SAMPLES: dict[str, list[Callable[[], Args]]] = {
    "quantize": [
        lambda: (torch.randn(4, 96), [], "int8.row"),
        lambda: (torch.randn(2, 3, 96, dtype=torch.bfloat16), [], "int8.row.point"),
        lambda: (torch.randn(4, 96), [], "e4m3.tensor"),
        lambda: (torch.randn(4, 96), [], "int8.g32"),
        lambda: (torch.randn(2, 3, 70), [], "uint8.g32.point"),
        lambda: (torch.randn(4, 96), [torch.tensor([0.03])], "int8.tensor.static"),
        lambda: (torch.randn(4, 96), [torch.tensor([0.03]), torch.tensor([7.0])], "uint8.tensor.static.point"),
        lambda: (torch.randn(4, 96), [], "e2m1.g32"),
        lambda: (torch.randn(4, 96), [], "nf4.row"),
        lambda: (torch.randn(0, 96), [], "int8.row"),
    ],
    "dequantize": [
        lambda: (weight("int4.g32", 24, 96), "int4.g32", 96, torch.float32),
        lambda: (weight("nf4.g32/int8.row", 24, 100), "nf4.g32/int8.row", 100, torch.bfloat16),
        lambda: (weight("uint4.g32.min", 3, 24, 100), "uint4.g32.min", 100, torch.float16),
        lambda: (weight("e4m3.b16x32", 24, 96), "e4m3.b16x32", 96, torch.bfloat16),
        lambda: (weight("uint3.g32.point", 24, 96), "uint3.g32.point", 96, torch.float32),
        lambda: (weight("int4.g32", 24, 100), "int4.g32", 100, torch.float32),
        lambda: (weight("int8.b16x32", 24, 100), "int8.b16x32", 100, torch.float32),
        lambda: (weight("e2m1.g16/e4m3.tensor", 24, 96), "e2m1.g16/e4m3.tensor", 96, torch.float32),
    ],
    "linear": [
        lambda: (torch.randn(4, 96), weight("int4.g32", 24, 96), "int4.g32"),
        lambda: (torch.randn(2, 3, 96, dtype=torch.bfloat16), weight("int8.row", 24, 96), "int8.row"),
        lambda: (torch.randn(4, 100, dtype=torch.float16), weight("nf4.g32/int8.row", 24, 100), "nf4.g32/int8.row"),
        lambda: (torch.randn(1, 96), weight("uint4.g32.point", 24, 96), "uint4.g32.point"),
        lambda: (torch.randn(0, 96), weight("uint4.g32.min", 24, 96), "uint4.g32.min"),
        lambda: (torch.randn(4, 96), weight("e3m2.g32", 24, 96), "e3m2.g32"),
    ],
    "scaled_linear": [
        lambda: _scaled("int8.row", "int8.row", 4, 96),
        lambda: _scaled("int8.row", "int4.g32", 2, 3, 96),
        lambda: _scaled("e4m3.tensor", "e4m3.b16x32", 4, 96),
        lambda: _scaled("int8.g32", "int8.g32", 2, 3, 100),
        lambda: _scaled("uint8.row.point", "uint4.g32.point", 2, 3, 96),
        lambda: _scaled("int8.tensor", "nf4.g32/int8.row", 1, 96),
        lambda: _scaled("int8.row", "int8.row", 0, 96),
    ],
    "linear_glu": [
        lambda: (torch.randn(4, 96), [], weight("int4.g32", 24, 96), "int4.g32", "silu", True),
        lambda: (torch.randn(2, 3, 100, dtype=torch.bfloat16), [], weight("nf4.g32/int8.row", 24, 100), "nf4.g32/int8.row", "gelu_tanh", False),
        lambda: (*rows("int8.row", 2, 3, 96), weight("int8.row", 24, 96), "int8.row @ int8.row", "relu_squared", True),
        lambda: (*rows("int8.g32", 4, 100), weight("int8.g32", 24, 100), "int8.g32 @ int8.g32", "gelu", True),
        lambda: (torch.randn(0, 96), [], weight("int8.row", 24, 96), "int8.row", "sigmoid", False),
    ],
    "split_linear": [
        lambda: (*rows("int8.row", 2, 3, 96), weight("int8.row", 24, 96), torch.randn(2, 3, 96), torch.randn(24, 96), torch.tensor([3, 95, -1]), True, True, "int8.row @ int8.row"),
        lambda: (torch.randn(4, 100, dtype=torch.bfloat16), [], weight("nf4.g32/int8.row", 24, 100), torch.randn(4, 100, dtype=torch.bfloat16), torch.randn(24, 2), torch.tensor([99, 0]), True, False, "nf4.g32/int8.row"),
        lambda: (torch.randn(1, 96), [], weight("int4.g32", 24, 96), torch.randn(1, 2), torch.randn(24, 96), torch.tensor([5, 6]), False, True, "int4.g32"),
    ],
    "outlier_columns": [
        lambda: (torch.randn(2, 3, 96), 5, 2.0),
        lambda: (torch.randn(1, 96, dtype=torch.bfloat16), 96, 0.5),
        lambda: (torch.randn(4, 96), 5, 100.0),
    ],
    "columns": [
        lambda: (weight("int8.row", 24, 96), torch.tensor([3, 95, 0]), "int8.row", 96),
        lambda: (weight("int4.g32", 24, 100), torch.tensor([99]), "int4.g32", 100),
        lambda: (weight("nf4.g32/int8.row", 24, 96), torch.tensor([], dtype=torch.int64), "nf4.g32/int8.row", 96),
    ],
    "stored": [
        lambda: (weight("int4.g32", 24, 96), [], [], "int4.g32", 96, torch.bfloat16),
        lambda: (weight("int8.row", 24, 96), [torch.rand(96) + 0.5], [torch.tensor([3, 95]), torch.randn(24, 2)], "int8.row", 96, torch.float32),
    ],
    "attention": [
        lambda: (torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16), None, 0.25),
        lambda: (torch.randn(2, 4, 3, 16, dtype=torch.bfloat16), *(torch.randn(2, 1, 9, 16, dtype=torch.bfloat16) for _ in "kv"), torch.arange(9).expand(2, 1, 3, 9) < 4, 0.25),
    ],
    "grouped_linear": [
        lambda: _grouped("int4.g32", False),
        lambda: _grouped("int4.g32", True),
        lambda: _grouped("nf4.g32/int8.row", False),
        lambda: (*rows("int8.row", 5, 96), torch.tensor([2, 2, 4], dtype=torch.int32), weight("int8.row", 3, 24, 96), "int8.row @ int8.row", False),
    ],
    "fp8_linear": [
        lambda: (torch.randn(2, 3, 40), torch.randn(24, 40), [], [], 0, 0, "tensor"),
        lambda: (torch.randn(5, 40), torch.randn(24, 40), [], [], 0, 0, "row"),
        lambda: (torch.randn(5, 40), torch.randn(24, 40), [torch.ones(2, 16)], [torch.zeros(2, 1, 7)], 1, 0, "delayed"),
    ],
    "fp8_product": [lambda: (torch.randn(5, 40).to(torch.float8_e5m2), torch.rand(5, 1), torch.randn(24, 40).to(torch.float8_e4m3fn), torch.rand(24, 1), torch.float32, True)],
    "fp8_transpose": [lambda: (torch.randn(5, 40).to(torch.float8_e4m3fn), torch.randn(5, 24))],
    "fp8_scales": [lambda: (torch.rand(3, 2, 7), torch.rand(3, 1, 7), 1, True, 6)],
    "fp8_record": [lambda: (torch.rand(3, 2, 7), torch.rand(3, 16), list(torch.rand(3, 2)))],
    "fake_quant": [
        lambda: (torch.randn(24, 96), [torch.rand(24, 3) + 0.1], "int4.g32", "lsq", False),
        lambda: (torch.randn(2, 3, 100, dtype=torch.bfloat16), [], "int8.row", "ste", True),
        lambda: (torch.randn(24, 100), [], "nf4.g32/int8.row", "ste", False),
        lambda: (torch.randn(4, 96), [torch.tensor([2.0])], "int8.tensor.static", "pact", True),
        lambda: (torch.randn(0, 96), [], "int8.row", "ste", True),
    ],
    "moving_range": [
        lambda: (torch.randn(2, 3, 96), torch.zeros(2), 0.01, False),
        lambda: (torch.randn(4, 96, dtype=torch.bfloat16), torch.tensor([-1.0, 2.0]), 0.01, True),
    ],
    "frozen_linear": [
        lambda: (torch.randn(4, 96), weight("int4.g32", 24, 96), [], "int4.g32"),
        lambda: (torch.randn(2, 3, 96), weight("int8.row", 24, 96), [], "int8.row @ int8.row"),
        lambda: (torch.randn(2, 3, 96), weight("int8.row", 24, 96), [torch.tensor([0.03])], "int8.tensor.static @ int8.row"),
    ],
    "frozen_grad": [
        lambda: (torch.randn(4, 24), weight("int4.g32", 24, 96), "int4.g32", 96, torch.float32),
        lambda: (torch.randn(2, 3, 24), weight("nf4.g32/int8.row", 24, 100), "nf4.g32/int8.row", 100, torch.float32),
    ],
    "frozen_grouped": [lambda: _frozen(_grouped("int4.g32", False)), lambda: _frozen(_grouped("int4.g32", True))],
    "frozen_grouped_grad": [lambda: _frozen_grad(_grouped("int4.g32", False)), lambda: _frozen_grad(_grouped("int4.g32", True))],
}  # fmt: skip


def _frozen(args: Args) -> Args:
    """What ``frozen_grouped`` takes, of what ``grouped_linear`` takes."""
    x, _, index, packed, scheme, by_row = args
    return x, index, packed, [], scheme, by_row


def _frozen_grad(args: Args) -> Args:
    x, _, index, packed, scheme, by_row = args
    return torch.randn(x.shape[0], packed[0].shape[-2]), index, packed, scheme, by_row, x.shape[-1], torch.float32
EACH = [pytest.param(name, make, id=f"{name}-{i}") for name, makes in SAMPLES.items() for i, make in enumerate(makes)]
each = pytest.mark.parametrize(("name", "make"), EACH)
each_linear = pytest.mark.parametrize(("name", "make"), [p for p in EACH if OPS[p.values[0]].case is not None and p.values[0] not in ("attention", "outlier_columns", "quantize", "fp8_product", "fp8_transpose")])
each_simplified = pytest.mark.parametrize(("name", "make"), [p for p in EACH if OPS[p.values[0]].simplify is not None and not p.values[0].startswith("frozen")])  # those always become the ops of inference
each_traced = pytest.mark.parametrize(("name", "make"), [p for p in EACH if "grouped" not in p.values[0]])  # that reference reads its index: no trace knows it


def close(got: Any, wanted: Any) -> None:
    """Codes equal, floats to the last bits of float32."""
    for a, b in zip(tensors(got), tensors(wanted), strict=True):
        exact = a.element_size() == 1
        torch.testing.assert_close(a, b, rtol=0 if exact else 2e-5, atol=0 if exact else 2e-5)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def test_every_op_has_samples():
    assert set(SAMPLES) == set(OPS), "give the new op a line in SAMPLES"
    assert all(name == op.name for name, op in OPS.items())


@each
def test_opcheck(name, make):
    args = make()
    fp8 = any(t.dtype.itemsize == 1 and t.is_floating_point() for t in tensors(args))  # torch's schema check compares arguments by arithmetic that FP8 lacks
    torch.library.opcheck(target(name), args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[int(fp8) :])


@pytest.mark.parametrize("spelling", ["int8.row", "int8.tensor"])
def test_opcheck_of_rows_that_are_not_contiguous(spelling):
    torch.library.opcheck(target("quantize"), (torch.randn(2, 96, 4).mT, [], spelling), test_utils=("test_faketensor",))


@each
def test_fake_is_the_shape_of_the_reference(name, make):
    args = make()
    for got, wanted in zip(tensors(OPS[name].fake(*args)), tensors(OPS[name].reference(*args)), strict=True):
        assert (got.shape, got.dtype, got.device) == (wanted.shape, wanted.dtype, wanted.device)


@each
def test_the_op_is_its_reference_and_leaves_its_arguments_alone(name, make):
    args = make()
    before = [t.clone() for t in tensors(args)]
    close(target(name)(*args), OPS[name].reference(*args))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, tensors(args)) if a.numel())
    close(OPS[name].reference(*args), OPS[name].reference(*args))


@each_traced
def test_traced_reference(name, make):
    """What Inductor gets where no kernel applies: pointwise code without constants, and equal."""
    args = make()
    leaves, spec = torch.utils._pytree.tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def fn(*given: Tensor) -> Any:
        full = list(leaves)
        for i, t in zip(places, given):
            full[i] = t
        return OPS[name].reference(*torch.utils._pytree.tree_unflatten(full, spec))

    gm = make_fx(fn, tracing_mode="fake")(*(leaves[i] for i in places))
    assert not gm.graph.find_nodes(op="get_attr")
    close(gm(*(leaves[i] for i in places)), OPS[name].reference(*args))


@each_simplified
def test_simplify_keeps_the_meaning(name, make):
    """N-D to 2-D and nested scales to flat ones, until nothing is left to do."""
    op, args = OPS[name], make()
    out = op.simplify(*args)
    nested = "/" in str(args)
    assert (out is NotImplemented) == (not nested and (args[0].dim() == 2))
    if out is not NotImplemented:
        close(out, op.reference(*args))


@each
def test_aot_eager(name, make):
    """Our ops pass through AOTAutograd whole, among others, with static sizes (the first sample) and dynamic ones (the others)."""
    args = make()
    op = target(name)

    def fn(*given: Any) -> Any:
        out = op(*given)
        return [t.float() + 1 for t in out] if isinstance(out, (list, tuple)) else out.float() * 2

    dynamic = make is not SAMPLES[name][0]
    close(torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*args), fn(*args))


@each_linear
def test_export(name, make):
    args = make()

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, rest: list[Tensor]) -> Tensor:
            flat = iter(rest)
            return target(name)(x, *(([next(flat) for _ in a] if isinstance(a, list) else next(flat) if isinstance(a, Tensor) else a) for a in args[1:]))

    rest = tensors(args[1:])
    program = torch.export.export(Module(), (args[0], rest))
    assert any(n.target is target(name) for n in program.graph.nodes)
    close(program.module()(args[0], rest), OPS[name].reference(*args))


def test_namespace_and_table():
    table = decompositions(OPS)
    assert set(table) == {target(name) for name in OPS}
    for name in OPS:
        assert str(target(name)) == f"{NAMESPACE}.{name}.default"


# --- which kernel --------------------------------------------------------------------------------------------------------


def test_choose_takes_the_first_kernel_that_supports_the_case():
    def kernel(name: str, device: str, answer: Skip | None) -> Kernel:
        return Kernel(name, device, lambda case: answer, lambda *args: name)

    op = dataclasses.replace(OPS["linear"], kernels=(kernel("a", "cuda", None), kernel("b", "cpu", Skip("too odd")), kernel("c", "cpu", None), kernel("d", "cpu", None)))
    case = Case(torch.device("cpu"), torch.float32, Scheme.parse("int4.g32"), None, 16, 96)
    assert op.choose(case)[0].name == "c" and op.choose(case)[1] is None
    none, reason = dataclasses.replace(op, kernels=op.kernels[:2]).choose(case)
    assert none is None and str(reason) == "too odd"
    none, reason = dataclasses.replace(op, kernels=()).choose(case)
    assert none is None and str(reason) == "linear has no kernel for cpu"


def test_decompose_keeps_an_op_that_has_a_kernel_and_traces_one_that_has_none():
    args = (torch.randn(4, 96), weight("int4.g32", 24, 96), "int4.g32")
    yes = Kernel("yes", "cpu", lambda case: None, lambda *args: None)
    no = Kernel("no", "cpu", lambda case: Skip("no"), lambda *args: None)
    assert dataclasses.replace(OPS["linear"], kernels=(yes,)).decompose(*args) is NotImplemented
    close(dataclasses.replace(OPS["linear"], kernels=(no,)).decompose(*args), OPS["linear"].reference(*args))


def test_an_op_that_cannot_be_traced_is_kept_for_its_fallback():
    args = (torch.randn(4, 96), weight("int4.g32", 24, 96), "int4.g32")
    no = Kernel("no", "cpu", lambda case: Skip("no"), lambda *args: None)
    op = dataclasses.replace(OPS["linear"], kernels=(no,), fallback=lambda case, *args: "called")
    assert op.decompose(*args) is NotImplemented and _lower(op, *args) == "called"


OLD = (8, 0)
"""Compute capability of an A100, which has no FP8."""


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize(("w", "x"), [("e4m3.row", None), ("e4m3.row", "e4m3.row"), ("e4m3.b128x128", "e4m3.g128"), ("int8.row", "e4m3.row")])
def test_an_old_gpu_has_no_kernel_for_fp8(w, x, experts):
    given = Scheme.parse(x) if x else None
    op = OPS["grouped_linear" if experts > 1 else "scaled_linear" if x else "linear"]
    for capability in (OLD, (9, 0)):
        dtype = given.fmt.dtype if given is not None else torch.bfloat16
        kernel, reason = op.choose(Case(torch.device("cuda"), dtype, Scheme.parse(w), given, 128, 256, 32, experts, capability))
        if capability == OLD:
            assert kernel is None and reason is not None
        elif not w.startswith("int8"):
            assert kernel is not None


@each_linear
def test_case_reads_the_arguments(name, make):
    op, args = OPS[name], make()
    case, w = op.case(*args), next(a for a in reversed(args) if isinstance(a, list))
    assert (case.n, case.k, case.device, case.dtype) == (w[0].shape[-2], args[0].shape[-1], torch.device("cpu"), args[0].dtype)
    assert case.m == args[0].shape[0] and case.experts == (w[0].shape[0] if w[0].dim() == 3 else 1)
    assert (case.input is not None) == ("@" in next(a for a in args if isinstance(a, str)))


def test_a_dynamic_number_of_rows_is_one_of_three_regimes() -> None:
    """On a GPU a symbolic size is asked for its regime, which guards it; a static one is itself, and on a CPU nothing is asked."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    from qcompile.kernels.op import rows_of

    for value, regime in ((2, 64), (64, 64), (65, 256), (256, 256), (257, 4096), (4096, 4096)):
        env = ShapeEnv()
        symbol = env.create_symbol(value, torch._dynamo.source.LocalSource("m"), dynamic_dim=DimDynamic.DYNAMIC)
        size = env.create_symintnode(symbol, hint=value)
        assert rows_of(size, torch.device("cpu")) is None and not env.guards
        assert rows_of(size, torch.device("cuda")) == regime
        assert env.guards
    assert rows_of(17, torch.device("cuda")) == rows_of(17, torch.device("cpu")) == 17
