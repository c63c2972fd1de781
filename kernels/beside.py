"""Columns in 16 bits beside a streamed product (``kernels/split_linear.py``): how a tile of them is read."""

from __future__ import annotations

from dataclasses import dataclass

CHUNKS = 32, 64
"""Columns beside a loop that one dot takes: gathered ones, or few, and many."""


@dataclass(frozen=True)
class Beside:
    """``columns`` 16-bit columns that are multiplied beside the quantized ones: of X16 and W16, which hold these alone, or, where they are gathered, all columns, among which INDEX names them."""

    columns: int
    gather_x: bool
    gather_w: bool

    @property
    def indexed(self) -> bool:
        """INDEX is read."""
        return self.gather_x or self.gather_w

    @property
    def chunk(self) -> int:
        """Columns of one dot."""
        return CHUNKS[not self.gather_x and self.columns > CHUNKS[0]]

    @property
    def pointers(self) -> tuple[str, ...]:
        """In the order of a template's arguments."""
        return ("X16", "W16", "INDEX") if self.indexed else ("X16", "W16")

    @property
    def name(self) -> str:
        """Part of a template's name."""
        return f"beside_{self.columns}{'_gather' if self.indexed else ''}{'_x' if self.gather_x else ''}{'_w' if self.gather_w else ''}"

    def strides(self) -> list[str]:
        """Statements that the loads need."""
        return ['stride_x16m = {{stride("X16", 0)}}', 'stride_w16n = {{stride("W16", 0)}}']

    def loads(self, live: str, split: bool, c: int) -> list[str]:
        """Statements that set ``x16_<c>`` (BLOCK_M, chunk) and ``w16_<c>`` (BLOCK_N, chunk) of the columns from ``c`` on. Of programs that share a tile, the first one adds them."""
        own = f"tl.where(part_k == 0, {self.columns}, 0)" if split else self.columns
        lines = [f"beside = {c} + tl.arange(0, {self.chunk})", f"named = (beside < {own})[None, :]"]
        if self.indexed:
            lines += [f"index = tl.load(INDEX + beside, mask=beside < {own}, other=-1).to(tl.int64)", "named = (index >= 0)[None, :]"]
        x, w = ("index" if gather else "beside" for gather in (self.gather_x, self.gather_w))
        return [
            *lines,
            f"x16_{c} = tl.load(X16 + rm[:, None] * stride_x16m + {x}[None, :], mask=named & ({live})[:, None], other=0.0)",
            f"w16_{c} = tl.load(W16 + rn[:, None] * stride_w16n + {w}[None, :], mask=named, other=0.0).to(x16_{c}.dtype)",
        ]
