"""Attention of few queries: the meaning, what is refused, tiles, and the template in Triton's interpreter. Generated code is in gpu_codegen, real GPUs in tests/gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import interpreted

from qcompile.kernels import attention
from qcompile.kernels.attention import Attention

CUDA = torch.device("cuda")


def case(**changes: object) -> Attention:
    return Attention(**{"device": CUDA, "dtype": torch.bfloat16, "rows": 4, "pairs": 8, "columns": 128, "queries": 1, "mask": "bool", **changes})  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_template_in_the_interpreter() -> None:
    rows = interpreted(Path(__file__).with_name("interpret_attention.py"))
    assert len(rows) == 18
    for *about, error in rows:
        assert error < 1e-3, (about, error)


@pytest.mark.parametrize(
    ("changes", "keys", "by_head", "looks"),
    [({}, 192, False, False), ({}, 2112, False, True), ({"pairs": 512}, 192, False, True), ({}, None, False, True), ({"pairs": None}, 192, False, True), ({}, 2112, True, False), ({"mask": ""}, 2112, False, False)],
)
def test_few_keys_are_all_read(changes: dict[str, object], keys: int | None, by_head: bool, looks: bool) -> None:
    """The mask is looked through for the keys that are seen where reading all of them would take longer."""
    assert attention.looks(case(**{"pairs": 8, "columns": 128, "mask": "bool", **changes}), keys, by_head) is looks


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize(("heads", "groups"), [(6, 6), (6, 2), (6, 1)])
def test_the_meaning(heads: int, groups: int, mask: str | None) -> None:
    """softmax(q k^T scale + mask) v, written out, each head with the keys of its group."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16, dtype=torch.float64) for h, n in ((heads, 3), (groups, 11), (groups, 11)))
    given = None if mask is None else torch.randn(2, 1, 3, 11, dtype=torch.float64)
    added = given if given is None or mask == "float" else torch.zeros_like(given).masked_fill(given < -1, -torch.inf)
    for h in range(heads):
        g = h // (heads // groups)
        scores = q[:, h] @ k[:, g].mT * 0.2 + (0 if added is None else added[:, 0])
        wanted = scores.softmax(-1) @ v[:, g]
        got = torch.ops.qcompile.attention(q, k, v, given if mask != "bool" or given is None else given >= -1, 0.2)
        torch.testing.assert_close(got[:, h], wanted)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": torch.float32}, "float32"), ({"rows": None}, "dynamic"), ({"rows": 64}, "more than 63"), ({"columns": 20}, "multiples of 8"), ({"columns": 512, "rows": 1}, "multiples of 8"), ({"columns": 32, "rows": 40}, "more than its 32")],
)  # fmt: skip
def test_refusals(changes: dict[str, object], reason: str) -> None:
    assert reason in str(attention.supports(case(**changes)))


@pytest.mark.parametrize("rows", [1, 4, 15, 16, 31, 63])
@pytest.mark.parametrize("pairs", [1, 8, 64, 512, None])
@pytest.mark.parametrize("keys", [1, 100, 4096, None])
def test_tiles_are_possible(rows: int, pairs: int | None, keys: int | None) -> None:
    config = attention.blocks(case(rows=rows, pairs=pairs), keys)
    assert config["ROWS"] >= max(16, rows + 1) and config["ROWS"] & (config["ROWS"] - 1) == 0, "a tile holds the rows and their logarithms"
    assert 1 <= config["SPLIT"] <= attention.PARTS
    assert config["SPLIT"] == 1 or (keys is None or config["SPLIT"] // 2 * attention.FEWEST < keys), "half as many programs have keys enough for each"
    assert config["BLOCK"] * (1 if keys is None else config["SPLIT"]) >= min(keys or 0, 64 * config["SPLIT"]), "few keys are one tile"
    assert config["SPLIT"] == 1 or (pairs or 64) * config["SPLIT"] <= attention.PROGRAMS
