"""Where the bits of a weight lie. A layout packs unsigned codes (..., N, K) into a uint8 tensor (..., N, bytes) and back, exactly.

``planes`` serves every width with one rule. The columns are cut into blocks of 128 (the last one padded with zero codes); a code is cut into bit planes
of 4, 2 or 1 bits (4 = 4, 3 = 2 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1), lowest bits first. A plane of width ``b`` takes ``16 * b`` bytes of a block: byte ``j`` holds the
columns ``j, j + 16b, j + 32b, ...``, the first in its lowest bits. A 4-bit code so pairs column ``j`` with ``j + 64``: one 32-bit word holds two runs of four
neighbouring columns, which is what both a ``dp4a`` dot product and a tensor-core tile want, without a shuffle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 128
"""Columns of one packed block."""


@cache
def planes(bits: int) -> tuple[tuple[int, int, int], ...]:
    """(width, shift in the code, first byte in a block) of each plane of a ``bits``-wide code.

    >>> planes(6)
    ((4, 0, 0), (2, 4, 64))
    """
    out, shift, start = [], 0, 0
    for width in (4, 2, 1):
        if bits - shift >= width and bits < 8:
            out.append((width, shift, start))
            shift, start = shift + width, start + 16 * width
    return tuple(out) if bits < 8 else ((8, 0, 0),)


def _pack_planes(codes: Tensor, bits: int) -> Tensor:
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # (..., blocks, 128)
    parts = []
    for width, shift, _ in planes(bits):
        part = ((codes >> shift) & (2**width - 1)).unflatten(-1, (8 // width, 16 * width))  # (..., blocks, position in byte, byte)
        places = torch.arange(8 // width, device=codes.device, dtype=torch.uint8) * width
        parts.append((part << places[:, None]).sum(-2, dtype=torch.uint8))
    return torch.cat(parts, -1).flatten(-2).contiguous()


def _unpack_planes(packed: Tensor, bits: int, k: int) -> Tensor:
    blocks = packed.unflatten(-1, (-1, BLOCK * bits // 8))
    codes = torch.zeros((*blocks.shape[:-1], BLOCK), dtype=torch.uint8, device=packed.device)
    for width, shift, start in planes(bits):
        part = blocks[..., start : start + 16 * width]
        pieces = [((part >> (width * i)) & (2**width - 1)) for i in range(8 // width)]
        codes = codes | (torch.cat(pieces, -1) << shift)
    return codes.flatten(-2)[..., :k]


@dataclass(frozen=True)
class Layout:
    """``pack(codes, bits)`` and ``unpack(packed, bits, k)`` on uint8 codes; ``row_bytes(k, bits)`` is the length of one packed row."""

    name: str
    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    row_bytes: Callable[[int, int], int]


LAYOUTS: dict[str, Layout] = {
    "plain": Layout("plain", lambda codes, bits: codes.contiguous(), lambda packed, bits, k: packed, lambda k, bits: k),
    "planes": Layout("planes", _pack_planes, _unpack_planes, lambda k, bits: -(-k // BLOCK) * BLOCK * bits // 8),
}
