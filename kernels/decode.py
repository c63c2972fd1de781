"""Inline PTX that turns packed codes into tensor-core operands, four bytes of weights at a time. Each decoder is text made from a Format, as in ``tiles``.

A 4-bit weight of the ``planes`` layout keeps column ``j`` of a block of 128 in the low and column ``j + 64`` in the high half of byte ``j``, so that one 32-bit word becomes two operands of
four neighbouring columns. Conversion instructions (I2F) run at a quarter of the rate of logic, so none is used:
 * int8 operands: a signed nibble moved to the upper half of its byte is 16 times its value (``factor`` says so), an unsigned one is masked;
 * 16-bit operands of integers: the code lands in the mantissa of a float whose exponent makes the last bit worth one, and a subtraction takes that float's own value away, exactly;
 * 16-bit operands of FP8: exponent and mantissa are shifted to where the wider float has them, which is a power of two off;
 * any other 4-bit format: its 16 values are a table of bytes in registers, which PRMT looks up four at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.core.formats import Format, decode

DTYPES = {"tl.float16": torch.float16, "tl.bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Decoder:
    """PTX from one word of four bytes to operands of ``dtype``: ``outputs`` words, in order of columns. What it gives is ``factor`` times the code's value."""

    ptx: str
    outputs: int
    dtype: str
    factor: float = 1

    def call(self, source: str, *names: str, paired: int = 0) -> str:
        """Statements that set ``names`` (two halves of a packed block, or one tile) from the uint8 tile ``source``.

        ``paired``: the tile holds int16, two bytes each, and an output of 16 bits has so many columns. A lane holds pairs of columns of what ``wgmma`` takes from registers; of single bytes LLVM would
        take every word apart, and put it together again.
        """
        kinds = ", ".join(["tl.int32" if paired else self.dtype] * len(names))
        kinds = f"({kinds})" if len(names) > 1 else kinds
        constraints = ",".join(["=&r"] * self.outputs + ["r"])
        lines = "; ".join(line.strip() for line in self.ptx.strip().splitlines())
        asm = f'{", ".join(names)} = tl.inline_asm_elementwise("{{ {lines}; }}", "{constraints}", [{source}], dtype={kinds}, is_pure=True, pack={2 if paired else 4})'
        apart = [f"{name} = tl.reshape(tl.join({name}.to(tl.int16), ({name} >> 16).to(tl.int16)), (BLOCK_N, {paired})).to({self.dtype}, bitcast=True)" for name in names]
        return "\n".join([asm, *apart]) if paired else asm


def settled(name: str, dtype: str) -> str:
    """A Triton statement that changes nothing and costs nothing, but reads what tensor cores make.

    They read decoded operands from registers while the program goes on. Where sums go from one step of a loop into the next and nothing else reads them, Triton (3.6) waits for the last product of
    a step only in the next one. A variant of the loop that left it so gave wrong sums, now and then, in tiles of eight warps on an H200.
    """
    return f'{name} = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [{name}], dtype={dtype}, is_pure=True, pack=1)'


def nibbles(fmt: Format, dtype: str) -> Decoder:
    """Of a 4-bit format: words $0.. of the low halves, then of the high halves, from word ``$n``."""
    if dtype == "tl.int8":
        return _to_int8(fmt)
    return _by_exponent(fmt, dtype) if fmt.kind == "int" else _by_table(fmt, dtype)


def _to_int8(fmt: Format) -> Decoder:
    if fmt.signed:
        return Decoder(".reg .b32 a\nshl.b32 a, $2, 4\nand.b32 $0, a, 0xF0F0F0F0\nand.b32 $1, $2, 0xF0F0F0F0", 2, "tl.int8", 16)
    return Decoder(".reg .b32 a\nshr.b32 a, $2, 4\nand.b32 $0, $2, 0x0F0F0F0F\nand.b32 $1, a, 0x0F0F0F0F", 2, "tl.int8")


def _word(value: float, dtype: str) -> str:
    """The bits of a 16-bit float, twice, as a PTX literal."""
    bits = int(torch.tensor(value, dtype=DTYPES[dtype]).view(torch.int16)) & 0xFFFF
    return f"0x{bits:04X}{bits:04X}"


def _by_exponent(fmt: Format, dtype: str) -> Decoder:
    """``1024 + code`` in float16, ``128 + code`` in bfloat16; signed codes are made unsigned by flipping their sign bit, and 8 more is taken away."""
    start, add = (1024, "add.rn.f16x2 {0}, {0}, c") if dtype == "tl.float16" else (128, "fma.rn.bf16x2 {0}, {0}, one, c")  # sm_90 has no add.bf16x2 of full rate
    flip = 8 if fmt.signed else 0
    lines = [".reg .b32 a, b, m, c, one", f"mov.b32 m, {_word(start + flip, dtype)}", f"mov.b32 c, {_word(-start - flip, dtype)}", f"mov.b32 one, {_word(1, dtype)}"]
    lines += ["prmt.b32 a, $4, 0, 0x4140", "prmt.b32 b, $4, 0, 0x4342"]  # two bytes each, widened
    lines += ["lop3.b32 $0, a, 0x000F000F, m, 0x6A", "lop3.b32 $1, b, 0x000F000F, m, 0x6A", "shr.b32 a, a, 4", "shr.b32 b, b, 4"]  # (a & mask) ^ m
    lines += ["lop3.b32 $2, a, 0x000F000F, m, 0x6A", "lop3.b32 $3, b, 0x000F000F, m, 0x6A", *(add.format(f"${i}") for i in range(4))]
    return Decoder("\n".join(lines), 4, dtype)


def _by_table(fmt: Format, dtype: str) -> Decoder:
    """PRMT picks four of eight bytes by four 3-bit indices; two of them and a selection by the index's upper bit make a table of 16."""
    values = decode(torch.arange(16, dtype=torch.uint8), fmt).to(DTYPES[dtype]).view(torch.int16)
    low, high = (values & 0xFF).tolist(), ((values >> 8) & 0xFF).tolist()
    lines = [".reg .b32 s, t, m, u, v, l, h", "and.b32 s, $4, 0x77777777", "shr.b32 t, $4, 3", "and.b32 t, t, 0x11111111"]
    for name, table in (("h", high), ("l", low)):
        lines.append(f".reg .b32 {name}0, {name}1, {name}2, {name}3")
        lines += [f"mov.b32 {name}{i}, 0x{sum(byte << 8 * j for j, byte in enumerate(table[4 * i : 4 * i + 4])):08X}" for i in range(4)]
    for half in range(2):
        lines.append("prmt.b32 m, 0x0000FF00, 0, t")
        for name, table in (("h", high), ("l", low)):
            if any(table):
                lines += [f"prmt.b32 u, {name}0, {name}1, s", f"prmt.b32 v, {name}2, {name}3, s", f"lop3.b32 {name}, u, v, m, 0xD8"]  # m ? v : u
            else:
                lines.append(f"mov.b32 {name}, 0")
        lines += [f"prmt.b32 ${half}, l, h, 0x6240", f"prmt.b32 ${2 + half}, l, h, 0x7351"]
        if half == 0:
            lines += ["shr.b32 s, s, 16", "shr.b32 t, t, 16"]
    return Decoder("\n".join(lines), 4, dtype)


def wide(fmt: Format, dtype: str) -> Decoder | None:
    """Of an 8-bit format: words $0, $1 of 16-bit operands from word ``$2``; None where none has been written."""
    if fmt.name == "int8":
        return int8(dtype)
    return _by_shift(fmt, dtype) if fmt.native in (torch.float8_e4m3fn, torch.float8_e5m2) else None


def _by_shift(fmt: Format, dtype: str) -> Decoder:
    """E4M3 and E5M2, subnormals with the rest: each byte between copies of its sign, shifted to the upper end of the mantissa, all but one sign masked.

    That is the value times ``2 ** (bias - wider bias)``. bfloat16 is multiplied back, since sums of what is 2**-120 of its value would end among float32's subnormals. E4M3's NaN, which no weight
    is, would be 480.
    """
    half = dtype == "tl.float16"
    shift = (10 if half else 7) - fmt.man
    mask = 0x8000 | 0x7F << shift
    lines = [".reg .b32 scale, minus", f"mov.b32 scale, {_word(2.0 ** (127 - fmt.bias), dtype)}", "mov.b32 minus, 0x80008000"] if not half else []
    for i, s in enumerate(("9180", "B3A2")):
        lines += [f"prmt.b32 ${i}, $2, 0, 0x{s}", f"shl.b32 ${i}, ${i}, {shift}", f"and.b32 ${i}, ${i}, 0x{mask:04X}{mask:04X}"]
        lines += [] if half else [f"fma.rn.bf16x2 ${i}, ${i}, scale, minus"]
    return Decoder("\n".join(lines), 2, dtype, 2.0 ** (fmt.bias - 15) if half else 1)


def int8(dtype: str) -> Decoder:
    """Signed bytes to 16 bits. float16: ``1024 + (byte + 128)`` less 1152. bfloat16 has 7 bits of mantissa: ``128 + (low seven)`` less 128 or, where the sign is set, 256, which differ by one bit."""
    if dtype == "tl.float16":
        lines = [".reg .b32 u, c, m", "xor.b32 u, $2, 0x80808080", "mov.b32 m, 0x64646464", f"mov.b32 c, {_word(-1152, dtype)}"]
        lines += [*(f"prmt.b32 ${i}, u, m, 0x{s}" for i, s in enumerate(("4140", "4342"))), *(f"add.rn.f16x2 ${i}, ${i}, c" for i in range(2))]
        return Decoder("\n".join(lines), 2, dtype)
    lines = [".reg .b32 a, b, m, minus", f"mov.b32 m, {_word(128, dtype)}", f"mov.b32 minus, {_word(-1, dtype)}"]
    for i, s in enumerate(("4140", "4342")):
        lines += [f"prmt.b32 a, $2, 0, 0x{s}", "lop3.b32 b, a, 0x00800080, m, 0xEA", "lop3.b32 a, a, 0x007F007F, m, 0xEA", f"fma.rn.bf16x2 ${i}, b, minus, a"]
    return Decoder("\n".join(lines), 2, dtype)
