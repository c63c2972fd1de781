"""``grouped_linear``: every row meets its own expert, and only that one."""

from __future__ import annotations

import pytest
import torch

from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels import cpu
from qcompile.kernels.grouped import cpu_grouped
from qcompile.kernels.op import target
from qcompile.kernels.quantize import reference as quantized

WEIGHTS = ["int8.row", "int4.g32", "uint4.g48.point", "nf4.g64/int8.row", "e4m3.b16x32", "uint4.g32.min", "int8.tensor"]
E, N, K = 4, 17, 100


def expected(x: torch.Tensor, w: torch.Tensor, owner: list[int]) -> torch.Tensor:
    """Row by row, in float64; an owner outside 0..E-1 gives zeros."""
    rows = [w[e].double() @ row.double() if 0 <= e < len(w) else torch.zeros(w.shape[1], dtype=torch.float64) for row, e in zip(x, owner, strict=True)]
    return torch.stack(rows) if rows else torch.zeros(0, w.shape[1], dtype=torch.float64)


def owners(ends: list[int], count: int) -> list[int]:
    return [next((e for e, end in enumerate(ends) if i < end), -1) for i in range(count)]


SORTED = [([2, 5, 6, 9], 9), ([0, 0, 0, 7], 7), ([3, 3, 3, 3], 3), ([0, 2, 2, 4], 9), ([0, 0, 0, 0], 3), ([0, 0, 0, 0], 0), ([1, 1, 1, 1], 1)]
ROWS = [[0, 1, 2, 3], [3, 3, 0, 3, 1], [2], [], [-1, 4, 1, 1000, 0]]


@pytest.mark.parametrize("spelling", WEIGHTS)
def test_sorted_rows(spelling):
    """Ends as ``torch._grouped_mm`` takes them: empty experts, and rows behind the last end, which are zeros."""
    q = quantize(torch.randn(E, N, K), Scheme.parse(spelling))
    for ends, count in SORTED:
        x = torch.randn(count, K)
        y = target("grouped_linear")(x, [], torch.tensor(ends, dtype=torch.int32), q.flatten(), spelling, False)
        assert y.shape == (count, N) and y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected(x, dequantize(q), owners(ends, count)), rtol=1e-5, atol=1e-4)
        assert bool((y[ends[-1] :] == 0).all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("spelling", WEIGHTS)
def test_one_expert_for_each_row(spelling, dtype):
    q = quantize(torch.randn(E, N, K), Scheme.parse(spelling))
    for ids in ROWS:
        x = torch.randn(len(ids), K)
        y = target("grouped_linear")(x, [], torch.tensor(ids, dtype=dtype), q.flatten(), spelling, True)
        torch.testing.assert_close(y.double(), expected(x, dequantize(q), ids), rtol=1e-5, atol=1e-4)
        assert all(bool((y[i] == 0).all()) for i, e in enumerate(ids) if not 0 <= e < E)


@pytest.mark.parametrize("x_spelling", ["int8.row", "uint8.row.point", "int8.tensor", "int8.g32", "e4m3.row", "int8.tensor.static"])
@pytest.mark.parametrize("by_row", [False, True])
def test_quantized_rows(x_spelling, by_row):
    """The same as each expert's own scaled_linear."""
    q = quantize(torch.randn(E, N, K), Scheme.parse("int4.g32"))
    x, static = torch.randn(9, K), [torch.tensor([0.03])] if "static" in x_spelling else []
    codes, *scales = quantized(x, static, x_spelling)
    scales = static or scales
    ends, ids = [2, 5, 5, 8], [0, 0, 1, 1, 1, 3, 3, 3, -1]
    index = torch.tensor(ids if by_row else ends, dtype=torch.int32)
    scheme = f"{x_spelling} @ int4.g32"
    y = target("grouped_linear")(codes, scales, index, q.flatten(), scheme, by_row)
    for i, e in enumerate(ids):
        if e < 0:
            assert bool((y[i] == 0).all())
            continue
        own = [t if t.shape[0] == 1 else t[i : i + 1] for t in scales]
        torch.testing.assert_close(y[i : i + 1], target("scaled_linear")(codes[i : i + 1], own, [t[e] for t in q.flatten()], scheme), rtol=1e-5, atol=1e-4)


def test_one_expert_is_linear():
    q = quantize(torch.randn(1, N, K), Scheme.parse("int4.g32"))
    x = torch.randn(5, K, dtype=torch.bfloat16)
    y = target("grouped_linear")(x, [], torch.tensor([5], dtype=torch.int32), q.flatten(), "int4.g32", False)
    torch.testing.assert_close(y, target("linear")(x, [t[0] for t in q.flatten()], "int4.g32"))


@pytest.fixture(params=["reference", "c++"])
def grouped(request):
    """The op by its reference or by the C++ kernels."""
    if request.param == "reference":
        return target("grouped_linear")
    try:
        cpu.integer_library(), cpu.table_library()
    except cpu.NoCompiler as error:
        pytest.skip(str(error))
    return cpu_grouped


@pytest.mark.parametrize("spelling", ["int8.row", "uint4.g48.point", "e4m3.row", "int8.row @ int8.row", "int8.row @ int4.g32"])
def test_poisoned_experts_that_no_row_names_are_not_read(grouped, spelling):
    """Few rows and many, which the C++ kernels take in different ways. Bits that are all ones are NaN in every float, and garbage as codes."""
    given, _, w = spelling.rpartition(" @ ")
    q = quantize(torch.randn(E, N, K), Scheme.parse(w))
    truth = dequantize(q)
    for part in q.flatten():
        part[2].view(torch.uint8).fill_(255)
    for each in (1, 80):
        x = torch.randn(4 * each, K)
        rows, *scale = quantized(x, [], given) if given else (x,)
        for owner in ([0, 1, 3, 3], [0, 1, 2, 3]):
            ids = [e for e in owner for _ in range(each)]
            wanted = expected(rows.float() * scale[0].float() if given else x, truth, ids)
            for index, by_row in (([sum(e <= last for e in ids) for last in range(E)], False), (ids, True)):
                y = grouped(rows, scale, torch.tensor(index, dtype=torch.int32), q.flatten(), spelling, by_row)
                clean = torch.tensor(ids) != 2
                torch.testing.assert_close(y[clean].double(), wanted[clean], rtol=1e-5, atol=1e-4)
                assert bool(y[~clean].isnan().all()), "poison shows where a row names it"


def test_no_more_tiles_than_rows():
    """Few rows of many experts: a tile holds a row at least. Sizes come as Python's numbers or SymPy's, a dynamic count as a symbol."""
    import sympy

    from qcompile.kernels.grouped import sorted_grid

    meta = {"BLOCK_M": 16, "BLOCK_N": 32, "EXPERTS": 128}
    cdiv = lambda a, b: -(-a // b)  # noqa: E731
    for number in (int, sympy.Integer):
        assert [sorted_grid(number(m), number(64), meta, cdiv=cdiv)[0] for m in (1, 8, 4096)] == [2, 16, 2 * (256 + 129)]
    rows = sympy.Symbol("s0", integer=True, positive=True)
    assert sorted_grid(rows, sympy.Integer(64), meta, cdiv=cdiv)[0].subs(rows, 8) == 2 * 130
