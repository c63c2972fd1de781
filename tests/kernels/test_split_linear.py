"""A quantized product with 16-bit columns beside it: the sum of two products, for every spelling. The loop in Triton's interpreter is in test_stream, real GPUs in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels import OPS, split_linear
from qcompile.kernels.op import Case, target
from qcompile.kernels.quantize import reference as quantize_activations

CUDA = torch.device("cuda")


def operands(weight: str, given: str | None, gather_w: bool, shape: tuple[int, ...] = (5,), dtype: torch.dtype = torch.bfloat16, gather_x: bool = True):
    """Arguments of the op, and what it should be in float64."""
    torch.manual_seed(0)
    q = quantize(torch.randn(24, 96), Scheme.parse(weight))
    whole, index = torch.randn(*shape, 96, dtype=dtype), torch.tensor([90, -1, 3, 4], dtype=torch.int32)
    w = torch.randn(24, 96, dtype=dtype)
    dense = whole.clone()
    dense[..., [90, 3, 4]] = 0
    w16 = w if gather_w else w[:, [90, 0, 3, 4]]
    x16 = whole if gather_x else dense.new_zeros(*shape, 4).copy_(whole[..., [90, 0, 3, 4]]) * torch.tensor([1, 0, 1, 1], dtype=dtype)
    x, scales, value = dense, [], dense.double()
    if given:
        x, *scales = quantize_activations(dense, [], given)
        value = x.double() * scales[0].double()
    wanted = value @ dequantize(q, torch.float64).T + whole[..., [90, 3, 4]].double() @ w[:, [90, 3, 4]].double().T
    return (x, scales, q.flatten(), x16, w16, index, gather_x, gather_w, f"{given} @ {weight}" if given else weight), wanted


@pytest.mark.parametrize(("gather_x", "gather_w"), [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize(("weight", "given"), [("int8.row", "int8.row"), ("int4.g32", "int8.row"), ("nf4.g64/int8.g256", None), ("int8.row", None), ("uint3.g16.min", None)])
def test_the_sum_of_two_products(weight: str, given: str | None, shape: tuple[int, ...], gather_x: bool, gather_w: bool) -> None:
    """By the reference, and apart, each product by the kernel that it has alone. Compiled splits are in passes/test_outliers."""
    args, wanted = operands(weight, given, gather_w, shape, gather_x=gather_x)
    op = target("split_linear")
    for got, limit in ((op(*args), 1e-5), (split_linear.apart(*args), 4e-3)):  # two roundings to bfloat16 of the columns' product
        assert got.dtype == torch.float32 and got.shape == wanted.shape
        assert float((got - wanted).norm() / wanted.norm()) < limit


def test_columns_are_rounded_as_the_activations_are() -> None:
    """Those that calibration kept may be of another dtype."""
    args, _ = operands("int8.row", "int8.row", False)
    wide = (*args[:4], args[4].float() + 1e-4, *args[5:])
    assert torch.equal(target("split_linear")(*wide), target("split_linear")(*wide[:4], wide[4].bfloat16(), *wide[5:]))


def test_no_column_is_left() -> None:
    args, _ = operands("int8.row", "int8.row", True)
    none = (*args[:5], torch.full((4,), -1, dtype=torch.int32), *args[6:])
    assert torch.equal(target("split_linear")(*none), target("scaled_linear")(args[0], args[1], args[2], args[-1]))


def case(weight: str, given: str | None, m: int | None) -> Case:
    x = Scheme.parse(given) if given else None
    return Case(CUDA, x.fmt.dtype if x else torch.bfloat16, Scheme.parse(weight), x, 4096, 4096, m, capability=(9, 0))


def test_one_kernel_where_the_product_is_streamed() -> None:
    choose = OPS["split_linear"].choose
    assert [choose(case("int8.row", "int8.row", m))[0].name for m in (1, 64, 4096, None)] == ["triton stream, and columns"] * 4  # type: ignore[union-attr]
    assert choose(case("int8.row", None, 4096))[0].name == choose(case("int3.g128", None, 1))[0].name == "two products"  # type: ignore[union-attr]
    assert "left to dequantize" in str(split_linear.supports(case("int8.row", None, 4096))) and "left to triton linear" in str(split_linear.supports(case("int3.g128", None, 1)))


def test_shape_without_values() -> None:
    args, _ = operands("int8.row", "int8.row", True, (2, 3))
    moved = [[t.to("meta") for t in a] if isinstance(a, list) else a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    out = split_linear.fake(*moved)
    assert out.shape == (2, 3, 24) and out.dtype == torch.float32 and out.device.type == "meta"
