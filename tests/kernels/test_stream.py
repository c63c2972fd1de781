"""Streamed products: the loop in Triton's interpreter, tiles, refusals. Decoders are in test_decode, generated code in gpu_codegen, real GPUs in tests/gpu."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import interpreted

from qcompile.core.scheme import Scheme
from qcompile.kernels import stream, tuned
from qcompile.kernels.op import Case

CUDA = torch.device("cuda")


def case(weight: str, given: str | None = None, m: int | None = 1, n: int = 4096, k: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Case:
    x = Scheme.parse(given) if given else None
    return Case(CUDA, x.fmt.dtype if x else dtype, Scheme.parse(weight), x, n, k, m, capability=(9, 0))


@pytest.mark.slow
@pytest.mark.parametrize(("which", "cases"), [("plain", 60), ("gated", 33), ("grouped", 18), ("parts", 27), ("beside", 15), ("paired", 16)])
def test_the_loop_in_the_interpreter(which: str, cases: int) -> None:
    rows = interpreted(Path(__file__).with_name("interpret.py"), which)
    assert len(rows) >= cases
    for *about, error in rows:
        limit = 3e-4 if about[0].split(".")[0] in ("nf4", "fp4") else 1e-6  # tables of 16 values are rounded to float16
        assert error < limit, (about, error)


@pytest.mark.parametrize(
    ("weight", "given", "reason"),
    [
        ("int3.g128", None, "codes of 3 bits"), ("int4.g32", None, "not multiples of 64"), ("uint4.g128.min", None, "not multiples"), ("int8.row", "int8.g32", "not multiples"),
        ("uint8.g128.point", None, "without zero points"), ("e3m4.row", None, "not int8 or FP8"), ("e4m3b11.row", None, "not int8 or FP8"), ("int4.g64/int8.g16", None, "not one for each row"),
    ],
)  # fmt: skip
def test_refusals(weight: str, given: str | None, reason: str) -> None:
    assert reason in str(stream.supports(case(weight, given)))


@pytest.mark.parametrize(("weight", "given"), [("int4.g128", None), ("nf4.g64/int8.row", None), ("e2m1.g64/e4m3.tensor", None), ("int4.g128", "int8.row"), ("e4m3.b128x128", "e4m3.g128"), ("int8.row", None)])
def test_support(weight: str, given: str | None) -> None:
    assert stream.supports(case(weight, given)) is None


@pytest.mark.parametrize(
    ("weight", "given", "m", "tile", "stages"),
    [
        ("int4.g128", "int8.row", 64, (64, 128, 1, 1, 8, 5), 8),  # 112 programs: one each, and 72 KB leave room for three
        ("nf4.g64", None, 64, (64, 64, 1, 1, 4, 3), 4),  # 224 programs: two each
        ("int8.row", "int8.row", 64, (64, 64, 1, 1, 4, 5), 5),
        ("int4.g128", None, 64, (64, 64, 1, 2, 4, 3), 3),
        ("int4.g128", "int8.row", 64, (64, 32, 2, 1, 4, 3), 3),  # 896 programs: as many as fit
        ("int8.row", None, 16, (16, 32, 1, 1, 2, 5), 7),
        ("int4.g128", None, 16, (16, 32, 1, 1, 2, 4), 4),
        ("int8.row", "int8.row", 1, (1, 16, 1, 4, 1, 3), 3),
        ("int4.g128", "int8.row", None, (64, 128, 1, 1, 8, 5), 5),
    ],
)  # fmt: skip
def test_programs_that_are_launched_early_are_spread(monkeypatch: pytest.MonkeyPatch, weight: str, given: str | None, m: int | None, tile: tuple[int, ...], stages: int) -> None:
    monkeypatch.setattr(tuned.compat, "multiprocessors", lambda device: 132)
    before = dict(zip(tuned.FIELDS, (*tile, 1)))
    assert tuned.spread(before, case(weight, given, m, 14336, 4096)) == {**before, "num_stages": stages}


def test_few_columns_bound_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned.compat, "multiprocessors", lambda device: 132)
    tile = dict(zip(tuned.FIELDS, (64, 128, 1, 1, 8, 3, 1)))
    assert tuned.spread(tile, case("int4.g128", "int8.row", 64, 14336, 512))["num_stages"] == 4
    assert tuned.spread(tile, case("int4.g128", "int8.row", 64, 28672, 4096), 2)["num_stages"] == 6, "two tiles of codes a stage"


def test_float32_activations_are_not_streamed() -> None:
    assert "float32" in str(stream.supports(case("int4.g128", dtype=torch.float32)))


@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 65, 257, 4096, None])
@pytest.mark.parametrize("n", [16, 4096, 14336])
def test_tiles_are_possible(m: int | None, n: int) -> None:
    """Powers of two, sixteen rows of weights for each warp at least, eight where there is one row of activations."""
    for weight, given in (("int4.g128", None), ("int4.g128", "int8.row"), ("int8.row", "int8.row"), ("nf4.g64", None)):
        for tile in (tuned.config(case(weight, given, m, n)), tuned.gated(case(weight, given, m, n))):
            assert all(tile[name] & (tile[name] - 1) == 0 for name in ("BLOCK_M", "BLOCK_N", "SPLIT", "UNROLL", "num_warps"))
            assert tile["BLOCK_N"] >= (8 if m == 1 else 16) and 1 <= tile["SPLIT"] < 8 and tile["num_stages"] >= 1


@pytest.mark.parametrize(
    ("given", "plain", "gated"),
    [
        ("int8.row", (1, 16, 4, 1), (1, 16, 1, 1)), ("int8.row", (16, 64, 1, 4), (16, 32, 1, 2)), ("int8.row", (64, 128, 4, 8), (64, 64, 1, 8)), ("int8.row", (128, 64, 1, 4), (64, 64, 1, 4)),
        ("int8.row", (128, 128, 2, 8), (128, 64, 1, 8)), ("int8.row", (256, 128, 1, 8), (128, 128, 1, 8)), (None, (128, 128, 1, 8), (64, 128, 1, 8)), (None, (256, 128, 1, 8), (64, 128, 1, 8)),
    ],
)  # fmt: skip
def test_a_gated_tile_is_half_a_plain_one(monkeypatch: pytest.MonkeyPatch, given: str | None, plain: tuple[int, ...], gated: tuple[int, ...]) -> None:
    """BLOCK_M, BLOCK_N, SPLIT, warps. K is never in parts."""
    rows, columns, split, warps = plain
    size, c = (1, 4096, 4096), case("int8.row", given)
    monkeypatch.setattr(tuned, "rows", lambda: {tuned.arithmetic(c): {size: (rows, columns, split, 1, warps, 3, 1)}})
    assert tuple(tuned.gated(c)[name] for name in ("BLOCK_M", "BLOCK_N", "SPLIT", "num_warps")) == gated
    measured = {tuned.arithmetic(c, True): {size: (32, 64, 1, 2, 4, 3, 1)}}
    monkeypatch.setattr(tuned, "rows", lambda: measured)
    assert tuned.gated(c) == {"BLOCK_M": 32, "BLOCK_N": 64, "SPLIT": 1, "UNROLL": 2, "num_warps": 4, "num_stages": 3, "PARTS": 1, "GROUP_M": 8}


def test_the_nearest_row_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    small, wide, many = (16, 32, 1, 1, 2, 4, 1), (16, 64, 1, 1, 4, 4, 1), (128, 128, 1, 1, 8, 3, 1)
    monkeypatch.setattr(tuned, "rows", lambda: {"16 @ int4": {(1, 4096, 14336): small, (1, 14336, 4096): wide, (4096, 4096, 4096): many}})
    assert tuned.config(case("int4.g128", m=1, n=12000))["BLOCK_N"] == 64
    assert tuned.config(case("int4.g128", m=1, n=4096, k=11008))["BLOCK_N"] == 32
    assert tuned.config(case("int4.g128", m=2))["BLOCK_N"] == tuned.config(case("int4.g128", m=None))["BLOCK_N"] == 128


def test_few_programs_take_k_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key projection of an 8B model alone: 32 programs would read 2 MB one after another. Programs that cut K themselves are left alone."""
    size = (1, 4096, 4096)
    for parts, split in ((1, 4), (4, 1)):
        monkeypatch.setattr(tuned, "rows", lambda parts=parts: {"16 @ int4": {size: (1, 32, 1, 1, parts, 3, parts)}})
        assert tuned.config(case("int4.g128", m=1, n=1024, k=4096))["SPLIT"] == split
        assert tuned.config(case("int4.g128", m=1, n=1024, k=1024))["SPLIT"] == 1
        assert tuned.config(case("int4.g128", m=1, n=14336, k=4096))["SPLIT"] == 1


@pytest.mark.parametrize(("k", "parts", "warps"), [(4096, 8, 8), (512, 4, 4), (768, 2, 2), (896, 1, 1), (130, 1, 1)])
def test_parts_of_k_are_whole_blocks(monkeypatch: pytest.MonkeyPatch, k: int, parts: int, warps: int) -> None:
    monkeypatch.setattr(tuned, "rows", lambda: {"16 @ int4": {(1, 4096, 4096): (1, 16, 1, 1, 8, 3, 8)}, "16 @ int4, gated": {(1, 4096, 4096): (1, 16, 1, 1, 8, 3, 8)}, "16 @ int4, grouped": {(1, 4096, 4096): (16, 16, 1, 1, 8, 3, 8)}})
    c = case("int4.g128", m=1, n=4096, k=k)
    for tile in (tuned.config(c), tuned.gated(c), tuned.grouped(replace(c, experts=4), False)):
        assert (tile["PARTS"], tile["num_warps"]) == (parts, warps)


def test_rows_of_an_expert_choose_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (16, 32, 1, 1, 2, 3, 1), (128, 64, 1, 1, 4, 3, 1)
    c = replace(case("int4.g128", n=768, k=2048), experts=128)
    monkeypatch.setattr(tuned, "rows", lambda: {"16 @ int4, grouped": {(1, 768, 2048): few, (256, 768, 2048): many}})
    assert [tuned.grouped(replace(c, m=m), False)["BLOCK_M"] for m in (8, 128, 512, 32768, None)] == [16, 16, 128, 128, 128]
    monkeypatch.setattr(tuned, "rows", lambda: {"16 @ int4": {(1, 768, 2048): (1, 16, 4, 1, 1, 3, 1)}})
    assert (tuned.grouped(replace(c, m=8), False)["BLOCK_M"], tuned.grouped(replace(c, m=8), True)["BLOCK_M"]) == (16, 1)
    assert tuned.grouped(replace(c, m=8), False)["SPLIT"] == 1


def test_the_shipped_table_can_be_taken() -> None:
    """Every row, for a K of every kind: whole blocks in each part, eight columns of weights or more, no split where parts are."""
    for arithmetic, found in tuned.rows().items():
        for tile in found.values():
            rows, columns, split, unroll, warps, stages, parts = tile
            assert all(v & (v - 1) == 0 for v in (rows, columns, split, unroll, warps, parts)), (arithmetic, tile)
            assert columns >= 8 and stages >= 1 and (parts == 1 or (split == 1 and warps % parts == 0)), (arithmetic, tile)
