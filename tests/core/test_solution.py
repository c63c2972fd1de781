"""A linear prepared as a solution says is the linear as it was, before anything is rounded."""

from __future__ import annotations

import pytest
import torch

from qcompile.core.qtensor import quantize
from qcompile.core.scheme import Scheme
from qcompile.core.solution import Solution

W, X = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
S = torch.linspace(0.1, 8, 40)


@pytest.mark.parametrize("smooth", [None, S], ids=["plain", "smooth"])
@pytest.mark.parametrize("outliers", [None, [], [3], [0, 7, 39]], ids=str)
def test_parts_make_the_whole(smooth, outliers):
    index = None if outliers is None else torch.tensor(outliers, dtype=torch.int64)
    s = Solution(smooth=smooth, outliers=index)
    x, before = s.divided(X), W.clone()
    dense = s.prepared(W)
    y = x.double() @ dense.double().T
    if outliers:
        assert not dense[:, outliers].any()
        y += x[:, outliers].double() @ s.kept(W).double().T
    torch.testing.assert_close(y, X.double() @ W.double().T, rtol=1e-5, atol=1e-5)
    assert torch.equal(W, before) and dense.dtype == torch.float32


def test_nothing_to_do():
    s = Solution()
    assert s.divided(X) is X and torch.equal(s.prepared(W.bfloat16()), W.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    s = Solution(smooth=S)
    x = s.divided(X.to(dtype))
    assert x.dtype == dtype and float((x.double() - X.to(dtype).double() / S.double()).abs().max()) <= torch.finfo(dtype).eps * 64 + 1e-7
    assert s.prepared(W.to(dtype)).dtype == torch.float32


def test_experts():
    s = Solution(smooth=S)
    assert torch.equal(s.prepared(torch.stack([W, 2 * W]))[1], 2 * W * S)


def test_columns_that_are_kept_apart():
    """Where the weight is gone, its outlier columns are read as they were stored."""
    kept = torch.randn(24, 2)
    s = Solution(outliers=torch.tensor([1, 5]), columns=kept.bfloat16())
    assert torch.equal(s.kept(W), kept.bfloat16().float())


def test_another_device():
    q = quantize(W, Scheme.parse("int4.g8"))
    s = Solution(S, torch.tensor([1]), torch.ones(24), (torch.ones(1),), q, 5, 30.0, 1.0, ("note",), state=("x",))
    moved = s.to(torch.device("meta"))
    assert all(t.device.type == "meta" for t in (moved.smooth, moved.outliers, moved.bias, *moved.range, *moved.q.flatten()))
    assert (moved.tokens, moved.decibels, moved.seconds, moved.notes, moved.state) == (5, 30.0, 1.0, ("note",), ("x",))
    assert s.smooth.device.type == "cpu" and moved.q.scheme == q.scheme
