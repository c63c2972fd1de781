"""Packing is exact, and the bytes are where the documentation says."""

from __future__ import annotations

import pytest
import torch

from qcompile.core.layouts import BLOCK, LAYOUTS, planes

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)


@pytest.mark.parametrize("k", [1, 63, 64, 127, 128, 129, 300])
@pytest.mark.parametrize("bits", range(2, 9))
@layouts
def test_exact(layout, bits, k):
    codes = torch.randint(0, 2**bits, (2, 3, k), dtype=torch.uint8)
    packed = layout.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (2, 3, layout.row_bytes(k, bits))
    assert torch.equal(layout.unpack(packed, bits, k), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@layouts
def test_one_row_at_a_time_is_the_whole(layout, bits):
    codes = torch.randint(0, 2**bits, (4, 200), dtype=torch.uint8)
    assert torch.equal(torch.stack([layout.pack(row, bits) for row in codes]), layout.pack(codes, bits))
    assert torch.equal(layout.pack(codes.T.contiguous().T, bits), layout.pack(codes, bits))  # strides do not matter


def test_four_bits_pair_column_j_with_j_plus_64():
    codes = torch.randint(0, 16, (1, 2 * BLOCK), dtype=torch.uint8)
    packed = LAYOUTS["planes"].pack(codes, 4)[0].tolist()
    c = codes[0].tolist()
    assert packed == [c[block * 128 + j] | c[block * 128 + j + 64] << 4 for block in range(2) for j in range(64)]


def test_three_bits_are_a_plane_of_two_and_one_of_one():
    codes = torch.randint(0, 8, (1, BLOCK), dtype=torch.uint8)
    packed = LAYOUTS["planes"].pack(codes, 3)[0].tolist()
    c = codes[0].tolist()
    low = [sum((c[j + 32 * i] & 3) << (2 * i) for i in range(4)) for j in range(32)]
    high = [sum((c[j + 16 * i] >> 2) << i for i in range(8)) for j in range(16)]
    assert packed == low + high


def test_padding_is_zero_codes():
    packed = LAYOUTS["planes"].pack(torch.full((1, 1), 15, dtype=torch.uint8), 4)
    assert packed[0].tolist() == [15] + [0] * 63


@pytest.mark.parametrize("bits", range(2, 9))
def test_planes_cover_a_code_and_a_block(bits):
    parts = planes(bits)
    assert sum(width for width, _, _ in parts) == bits
    assert [shift for _, shift, _ in parts] == [sum(w for w, _, _ in parts[:i]) for i in range(len(parts))]
    assert [start for _, _, start in parts] == [16 * shift for _, shift, _ in parts]
    assert LAYOUTS["planes"].row_bytes(BLOCK, bits) == 16 * bits
    assert LAYOUTS["planes"].row_bytes(BLOCK + 1, bits) == 32 * bits
    assert LAYOUTS["plain"].row_bytes(BLOCK + 1, bits) == BLOCK + 1
