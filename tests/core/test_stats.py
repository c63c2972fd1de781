"""Statistics: pieces are the whole, merged is together, rescaled is of the rescaled; each against what it is defined to be, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.core import histogram, stats
from qcompile.core.errors import OptionError
from qcompile.core.stats import ROWS, STATISTICS

K = 12
rows = pytest.mark.parametrize("name", STATISTICS)
EXACT = ["absmax", "minmax", "histogram", "samples"]
ORDERED = ["samples", "moving"]
"""What merging does not reproduce."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def data(t: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows whose size changes along the way, with zeros, so that limits grow and ends lie on edges of bins."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(t, K, generator=g) * torch.logspace(-3, 2, max(t, 1))[:t, None]
    return torch.where(torch.rand(t, K, generator=g) < 0.1, torch.zeros(()), x).to(dtype)


def seen(x: torch.Tensor, names, pieces=1) -> dict:
    state = stats.new(names, K)
    for piece in x.tensor_split(pieces):
        state = stats.update_all(state, piece)
    return state


def close(a: dict, b: dict, name: str, exact: bool = True) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
        if exact:
            assert torch.equal(a[key], b[key]), (name, key)
        else:
            torch.testing.assert_close(a[key], b[key], rtol=2e-5, atol=2e-5 * float(b[key].abs().max()))


@rows
def test_empty_rows_change_nothing(name):
    x = data(30)
    before, after = seen(x, [name]), stats.update_all(seen(x, [name]), x[:0])
    close(after[name], before[name], name)
    close(stats.update_all({}, x[:0], [name])[name], stats.new([name], K)[name], name)


@given(t=st.integers(1, 1300), pieces=st.integers(1, 9), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pieces_are_the_whole(t, pieces, dtype, seed):
    names = [n for n in STATISTICS if n != "moving"]  # which counts batches
    x = data(t, seed, dtype)
    one, many = seen(x, names), seen(x, names, pieces)
    for name in names:
        close(many[name], one[name], name, name in EXACT)


@given(t=st.integers(0, 700), u=st.integers(0, 700), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_merged_is_together(t, u, seed):
    x, y = data(t, seed), data(u, seed + 100)
    names = [n for n in STATISTICS if n not in ORDERED]
    both = seen(torch.cat([x, y]), names)
    for one, other in ((x, y), (y, x)):
        merged = stats.merge_all(seen(one, names), seen(other, names))
        for name in names:
            close(merged[name], both[name], name, name in EXACT)


@rows
def test_merging_leaves_both_as_they_are(name):
    a, b = seen(data(700), [name]), seen(data(900, 1), [name])
    kept = {key: t.clone() for key, t in a[name].items()}
    merged = stats.merge_all(a, b)
    stats.update_all(merged, data(50, 2) * 1e6)
    close(a[name], kept, name)


def test_rescaled_is_of_the_rescaled():
    x, s = data(800), torch.rand(K) * 3 + 0.01
    all_of = seen(x, STATISTICS)
    scaled, expected = stats.rescale_all(all_of, s), seen(x / s, STATISTICS)
    assert set(scaled) == set(STATISTICS) - {"histogram", "moving"}
    for name in scaled:
        close(scaled[name], expected[name], name, name in EXACT)
    for name, state in seen(x, STATISTICS).items():
        close(all_of[name], state, name)  # rescaling is of a copy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definitions(dtype):
    x = data(1000, dtype=dtype)
    s, d = seen(x, STATISTICS, 7), x.double()
    assert torch.equal(s["absmax"]["absmax"], d.abs().amax(0).float())
    assert torch.equal(s["minmax"]["lo"], d.amin(0).float()) and torch.equal(s["minmax"]["hi"], d.amax(0).float())
    assert int(s["moments"]["count"]) == int(s["hessian"]["count"]) == int(s["samples"]["seen"]) == stats.tokens(s) == 1000
    for key, expected in (("sum", d.sum(0)), ("abs", d.abs().sum(0)), ("square", d.square().sum(0))):
        torch.testing.assert_close(s["moments"][key], expected, rtol=1e-12, atol=1e-9)
    h = s["hessian"]["sum"]
    assert h.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(h.double(), d.T @ d, rtol=1e-5, atol=1e-6 * float((d.T @ d).max()))


@rows
def test_memory_is_what_it_says(name):
    state = seen(data(2000), [name])[name]
    assert STATISTICS[name].nbytes(K) == sum(t.nbytes for t in state.values())


@rows
def test_the_default_dtype_does_not_matter(name):
    expected = seen(data(100), [name])
    torch.set_default_dtype(torch.bfloat16)
    try:
        close(seen(data(100).float() * 0 + 1, [name])[name], seen(torch.ones(100, K, dtype=torch.float32), [name])[name], name)
        assert {k: t.dtype for k, t in seen(torch.ones(9, K, dtype=torch.float32), [name])[name].items()} == {k: t.dtype for k, t in expected[name].items()}
    finally:
        torch.set_default_dtype(torch.float32)


# --- histogram --------------------------------------------------------------------------------------------------------


@given(scales=st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=6), bf16=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_histogram_grows_to_numpys(scales, bf16, seed):
    g = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(40, K, generator=g) * scale).to(torch.bfloat16 if bf16 else torch.float32) for scale in scales]
    state = stats.new(["histogram"], K)
    for batch in batches:
        state = stats.update_all(state, batch)
    h, x = state["histogram"], torch.cat(batches).double().numpy()
    limit = float(h["limit"])
    assert np.log2(limit).is_integer() and limit / 2 <= np.abs(x).max() < limit
    positive, _ = np.histogram(x[x >= 0], histogram.BINS, (0, limit))
    negative, _ = np.histogram(-x[x < 0], histogram.BINS, (0, limit))
    assert np.array_equal(h["counts"].numpy(), np.concatenate([negative[::-1], positive]))
    centres, counts = stats.magnitudes(h)
    folded, edges = np.histogram(np.abs(x), histogram.BINS, (0, limit))
    assert np.array_equal(counts.numpy(), folded) and np.array_equal(centres.double().numpy(), (edges[1:] + edges[:-1]) / 2)


def test_histogram_of_zeros_and_of_extremes():
    h = seen(torch.zeros(5, K), ["histogram"])["histogram"]
    assert float(h["limit"]) == histogram.LEAST and float(h["counts"][histogram.BINS]) == 5 * K
    h = seen(torch.tensor([[3.4e38, -3.4e38, 1e-45, -1e-45] * 3]), ["histogram"])["histogram"]
    assert h["counts"][[0, histogram.BINS - 1, histogram.BINS, -1]].tolist() == [3, 3, 3, 3] and float(h["counts"].sum()) == K


# --- samples ----------------------------------------------------------------------------------------------------------


def numbered(n: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + n, dtype=torch.float32)[:, None].expand(n, K)


def kept(state: dict) -> list[int]:
    assert bool((state["rows"] == state["rows"][:, :1]).all())
    return sorted(int(v) for v in state["rows"][:, 0])


def chi_square(chosen: list[int], n: int, bins: int = 16) -> float:
    observed, _ = np.histogram(chosen, bins, (0, n))
    return float(((observed - len(chosen) / bins) ** 2).sum() / (len(chosen) / bins))


@pytest.mark.parametrize("n", [513, 1000, 3000, 20000, 100003])
def test_samples_are_uniform_and_the_same_again(n):
    a, b = (seen(numbered(n), ["samples"], pieces)["samples"] for pieces in (1, 13))
    assert torch.equal(a["rows"], b["rows"])
    chosen = kept(a)
    assert len(set(chosen)) == ROWS and int(a["seen"]) == n
    assert chi_square(chosen, n) < 45  # 15 degrees of freedom: one in ten thousand


@pytest.mark.parametrize(("n", "m"), [(100, 100), (300, 212), (300, 213), (100, 5000), (5000, 100), (6000, 2000), (4000, 4000), (0, 900), (900, 0)])
def test_merged_samples_are_fair(n, m):
    merged = stats.merge_all(seen(numbered(n), ["samples"]), seen(numbered(m, n), ["samples"]))["samples"]
    chosen = kept(merged)
    assert len(set(chosen)) == min(ROWS, n + m) and int(merged["seen"]) == n + m
    from_n = sum(i < n for i in chosen)
    assert abs(from_n - len(chosen) * n / (n + m)) <= 0.5
    assert chi_square(chosen, n + m) < 45
    more = stats.update_all({"samples": merged}, numbered(3 * (n + m), n + m))["samples"]
    assert len(set(kept(more))) == min(ROWS, 4 * (n + m)) and chi_square(kept(more), 4 * (n + m)) < 45


# --- moving -----------------------------------------------------------------------------------------------------------


def test_moving_average():
    batches = [data(20, i, torch.bfloat16) for i in range(6)]
    state: dict = stats.new(["moving"], K)
    lo = hi = None
    for batch in batches:
        state = stats.update_all(state, batch)
        a, b = float(batch.min()), float(batch.max())
        lo, hi = (a, b) if lo is None else (0.9 * lo + 0.1 * a, 0.9 * hi + 0.1 * b)
    assert [float(state["moving"][key]) for key in ("lo", "hi")] == pytest.approx([lo, hi], rel=1e-5)
    other = seen(torch.full((4, K), 8.0), ["moving"], 2)
    merged = stats.merge_all(state, other)["moving"]
    assert int(merged["batches"]) == 8 and float(merged["hi"]) == pytest.approx((6 * hi + 2 * 8) / 8, rel=1e-5)
    close(stats.merge_all(stats.new(["moving"], K), other)["moving"], other["moving"], "moving")


# --- values that are not finite, names, files --------------------------------------------------------------------------


@rows
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_left_out(name, bad):
    x = data(50)
    poisoned = x.clone()
    poisoned[7, 3] = poisoned[30, 0] = poisoned[30, 1] = bad
    assert stats.check_finite(poisoned) == 3 and stats.check_finite(x) == 0
    good = x[[i for i in range(50) if i not in (7, 30)]]
    close(stats.update_all({}, poisoned, [name])[name], stats.update_all({}, good, [name])[name], name)


def test_a_histogram_does_not_swallow_nan():
    x = data(10)
    x[2, 2] = float("nan")
    with pytest.raises(OptionError, match="1 of the 120 values"):
        STATISTICS["histogram"].update(stats.new(["histogram"], K)["histogram"], x)


def test_leading_axes_and_names():
    x = data(60)
    a = stats.update_all(stats.new(["absmax", "hessian"], K), x.view(3, 20, K), ["absmax"])
    assert stats.tokens(a) == 0 and bool((a["absmax"]["absmax"] > 0).all())
    assert stats.tokens(seen(x, ["absmax", "histogram"])) is None
    with pytest.raises(OptionError, match="Did you mean 'hessian'"):
        stats.new(["hesian"], K)
    with pytest.raises(OptionError, match="holds 12 channels and was given rows of 5"):
        stats.update_all(a, x[:, :5])
    with pytest.raises(OptionError, match="cannot be merged"):
        stats.merge_all(a, seen(x, ["absmax"]))
    close(stats.merge_all({}, a)["absmax"], a["absmax"], "absmax")


def test_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    inputs = {"layers.1.": seen(data(700), STATISTICS), "layers.1.mlp.": seen(data(3, 1), ["samples", "absmax"]), "layers.10.": seen(data(0), ["hessian"])}
    flat = {key: t for prefix, s in inputs.items() for key, t in stats.to_tensors(s, prefix).items()}
    safetensors.save_file(flat, tmp_path / "stats.safetensors")
    read = safetensors.load_file(tmp_path / "stats.safetensors")
    for prefix, expected in inputs.items():
        back = stats.from_tensors(read, prefix)
        assert back.keys() == expected.keys()
        for name in expected:
            close(back[name], expected[name], name)
    del read["layers.1.minmax.hi"]
    with pytest.raises(OptionError, match=r"'layers.1.minmax' has the tensors \['lo'\] and needs \['hi', 'lo'\]"):
        stats.from_tensors(read, "layers.1.")


@pytest.mark.gpu
@rows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_devices_agree(name, dtype):
    x = data(3000, dtype=dtype)
    here, there = seen(x, [name], 3), stats.new([name], K, "cuda")
    for piece in x.cuda().tensor_split(3):
        there = stats.update_all(there, piece)
    close({key: t.cpu() for key, t in there[name].items()}, here[name], name, name in EXACT)
