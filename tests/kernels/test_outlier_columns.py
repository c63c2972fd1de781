"""Which columns are outliers: the rule written out, what is refused, and the template in Triton's interpreter. Whole splits are in passes/test_outliers, real GPUs in tests/gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import interpreted

from qcompile.kernels import outlier_columns
from qcompile.kernels.op import target
from qcompile.kernels.outlier_columns import Columns

CUDA = torch.device("cuda")


@pytest.mark.slow
def test_the_template_in_the_interpreter() -> None:
    rows = interpreted(Path(__file__).with_name("interpret_outliers.py"))
    assert len(rows) == 13 and all(rows.values()), rows


def plainly(x: torch.Tensor, count: int, threshold: float) -> tuple[list[int], int]:
    """Outliers in order, and how many more there are: sorted by magnitude, then by place."""
    peak = x.abs().reshape(-1, x.shape[-1]).amax(0).tolist()
    over = [k for k, p in enumerate(peak) if p >= threshold]
    return sorted(sorted(over, key=lambda k: (-peak[k], k))[:count]), max(0, len(over) - count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 48), (9, 48), (2, 3, 48)], ids=str)
@pytest.mark.parametrize(("count", "threshold"), [(1, 2.0), (8, 2.0), (8, 1.0), (48, 1.0), (8, 100.0), (47, 0.0)])
def test_the_meaning(shape: tuple[int, ...], count: int, threshold: float, dtype: torch.dtype) -> None:
    """bfloat16 has many equal maxima."""
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 1.5).to(dtype)
    outliers, more = plainly(x, count, threshold)
    got = target("outlier_columns")(x, count, threshold)
    others = [int(k not in outliers) for k in range(48)]
    assert got.dtype == torch.int32 and got.tolist() == [*others, *outliers, *[-1] * (count - len(outliers)), more]


def test_what_is_not_a_number_is_no_outlier() -> None:
    x = torch.tensor([[7.0, float("nan"), 1.0, float("-inf"), 6.0]])
    assert target("outlier_columns")(x, 2, 6.0).tolist() == [0, 1, 1, 0, 1, 0, 3, 1]


@pytest.mark.parametrize(("m", "k", "count", "reason"), [(1, 40, 40, "not all of them"), (1, 40000, 8, "up to 32768"), (5, 40, 8, "more than 4 rows"), (None, 40, 8, "more than 4 rows")])
def test_refusals(m: int | None, k: int, count: int, reason: str) -> None:
    assert reason in str(outlier_columns.supports(Columns(CUDA, m, k, count)))
    assert outlier_columns.supports(Columns(CUDA, 4, 4096, 32)) is None


def test_shape_without_values() -> None:
    out = outlier_columns.fake(torch.empty(2, 3, 40, device="meta"), 7, 6.0)
    assert out.shape == (48,) and out.dtype == torch.int32 and out.device.type == "meta"
