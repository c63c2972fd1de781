"""``linear_glu``: the unfused formula, the table of activations, which cases a GPU has a kernel for. The loop itself is in test_stream, generated code in gpu_codegen, real GPUs in tests/gpu."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qcompile.core.errors import OptionError
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels.linear_glu import ACTIVATIONS, OP, apart, known, supports
from qcompile.kernels.op import Case, target
from qcompile.kernels.quantize import reference as quantized
from qcompile.kernels.scaled_linear import values

I, K = 17, 100  # noqa: E741 - the inner width, as papers call it
FORMULAS = {
    "silu": lambda x: x / (1 + (-x).exp()), "gelu": lambda x: x * torch.special.ndtr(x), "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0), "relu_squared": lambda x: x.clamp(min=0) ** 2, "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}  # fmt: skip


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("spelling", ["int8.row", "int4.g32", "nf4.g64/int8.row", "uint4.g32.min"])
def test_the_unfused_formula(spelling: str, name: str, gate_first: bool) -> None:
    """In float64, of each half on its own."""
    q, x = quantize(torch.randn(2 * I, K), Scheme.parse(spelling)), torch.randn(2, 3, K)
    w = dequantize(q).double()
    first, second = x.double() @ w[:I].T, x.double() @ w[I:].T
    gate, up = (first, second) if gate_first else (second, first)
    y = target("linear_glu")(x, [], q.flatten(), spelling, name, gate_first)
    assert y.shape == (2, 3, I) and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), FORMULAS[name](gate) * up, rtol=1e-4, atol=1e-3)  # float32, and relu squared doubles its error


@pytest.mark.parametrize("given", ["int8.row", "e4m3.row", "int8.tensor", "int8.g32", "uint8.row.point", "int8.tensor.static"])
def test_quantized_rows(given: str) -> None:
    q, static = quantize(torch.randn(2 * I, K), Scheme.parse("int4.g32")), [torch.tensor([0.03])] if "static" in given else []
    codes, *scales = quantized(torch.randn(5, K), static, given)
    y = values(codes, static or scales, Scheme.parse(given)) @ dequantize(q).T
    out = target("linear_glu")(codes, static or scales, q.flatten(), f"{given} @ int4.g32", "silu", True)
    torch.testing.assert_close(out, F.silu(y[:, :I]) * y[:, I:])


def test_a_product_of_its_own_means_the_same() -> None:
    """What is traced where there is no kernel."""
    for given in (None, "int8.row"):
        weight, x = quantize(torch.randn(2 * I, 128), Scheme.parse("int4.g64")).flatten(), torch.randn(5, 128)
        codes, scales = (x, []) if given is None else (lambda c, *s: (c, s))(*quantized(x, [], given))
        args = codes, scales, weight, "int4.g64" if given is None else f"{given} @ int4.g64", "gelu", False
        torch.testing.assert_close(apart(*args), OP.reference(*args))


def test_unknown_activations_are_an_error_with_a_list() -> None:
    with pytest.raises(OptionError, match=r"unknown activation 'swish' in linear_glu.*silu, gelu"):
        known("swish")
    assert all(name == a.name for name, a in ACTIVATIONS.items()) and set(ACTIVATIONS) == set(FORMULAS)


def case(weight: str, given: str | None, m: int | None, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Case:
    x = Scheme.parse(given) if given else None
    return Case(torch.device(device), x.fmt.dtype if x else dtype, Scheme.parse(weight), x, 28672, 4096, m, capability=(9, 0))


@pytest.mark.parametrize(
    ("weight", "given"), [("int4.g128", None), ("int4.g128", "int8.row"), ("int8.row", "int8.tensor.static"), ("e4m3.row", "e4m3.row"), ("nf4.g64", None), ("int8.row", None)]
)
def test_support_up_to_where_the_library_begins(weight: str, given: str | None) -> None:
    assert all(supports(case(weight, given, m)) is None for m in (1, 64))
    assert (supports(case(weight, given, 256)) is None) == (given is not None), "of 16 bits beyond 64 rows the product alone is faster"
    beyond = supports(case(weight, given, 257))
    assert (beyond is None) == (given is not None and given.startswith("int8")), beyond


@pytest.mark.parametrize(
    ("weight", "given", "m", "reason"),
    [
        ("int4.g128", None, 65, "more than 64 rows of 16 bits"), ("int4.g128", None, 257, "a product of 257 rows is left to dequantize + cuBLAS"), ("e4m3.row", "e4m3.row", 4096, "a product of 4096 rows is left to cuBLAS FP8"), ("int2.g16", None, 1, "codes of 2 bits"),
        ("uint4.g32.min", None, 1, "not multiples"), ("int8.row", "uint8.row.point", 1, "zero point"), ("int4.g128", "e4m3.row", 1, "no tensor-core product"),
    ],
)  # fmt: skip
def test_refusals(weight: str, given: str | None, m: int, reason: str) -> None:
    assert reason in str(supports(case(weight, given, m)))


def test_the_table_of_kernels() -> None:
    names = {c: OP.choose(c)[0].name for c in (case("int4.g128", None, 1), case("int4.g128", None, 300), case("int4.g128", None, None, torch.float32, "cpu"))}
    assert list(names.values()) == ["triton stream, gated", "product, then the activation", "product, then the activation"]
