"""The PTX of the decoders, run by a small interpreter on every byte, against the formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch

from qcompile.core.formats import FORMATS, decode
from qcompile.kernels.decode import DTYPES, Decoder, int8, nibbles, wide

WORD = 0xFFFFFFFF
DTYPE = {**DTYPES, "tl.int8": torch.int8}


def prmt(a: int, b: int, selector: int) -> int:
    """Four of eight bytes by the low three bits of four selectors; a selector's upper bit spreads the sign instead."""
    both, out = (b << 32) | a, 0
    for i in range(4):
        s = selector >> 4 * i & 15
        byte = both >> 8 * (s & 7) & 255
        out |= (255 * (byte >> 7) if s & 8 else byte) << 8 * i
    return out


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Any function of three bits, as a table."""
    out = 0
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & WORD


def halves(dtype: torch.dtype, fn: Callable[..., torch.Tensor]) -> Callable[..., int]:
    """An instruction on two 16-bit floats, rounded once."""

    def run(*words: int) -> int:
        values = [torch.tensor([w & 0xFFFF, w >> 16], dtype=torch.int32).to(torch.uint16).view(dtype).double() for w in words]
        low, high = (int(v) & 0xFFFF for v in fn(*values).to(dtype).view(torch.int16))
        return high << 16 | low

    return run


OPCODES: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, n: a << n & WORD,
    "shr.b32": lambda a, n: a >> n,
    "xor.b32": lambda a, b: a ^ b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": halves(torch.bfloat16, lambda a, b, c: a * b + c),
    "add.rn.f16x2": halves(torch.float16, lambda a, b: a + b),
}


def run(ptx: str, outputs: int, word: int) -> list[int]:
    """The output words of a decoder for one input word."""
    values = {f"${outputs}": word}
    for line in ptx.strip().splitlines():
        opcode, _, rest = line.strip().partition(" ")
        if opcode == ".reg":
            continue
        target, *operands = re.split(r",\s*", rest)
        values[target] = OPCODES[opcode](*(values[o] if o in values else int(o, 0) for o in operands))
    return [values[f"${i}"] for i in range(outputs)]


def operands(decoder: Decoder, data: Sequence[int]) -> torch.Tensor:
    """What four bytes become: one row for each half (low nibbles, high ones), or one row."""
    words = run(decoder.ptx, decoder.outputs, int.from_bytes(bytes(data), "little"))
    raw = torch.tensor([b for w in words for b in w.to_bytes(4, "little")], dtype=torch.uint8)
    return raw.view(DTYPE[decoder.dtype]).view(-1, 4)


BYTES = [[(37 * i + 61 * j) % 256 for j in range(4)] for i in range(256)]
"""Every byte at every place."""
FOUR_BITS = [name for name, fmt in FORMATS.items() if fmt.bits == 4]


@pytest.mark.parametrize("dtype", ["tl.float16", "tl.bfloat16"])
@pytest.mark.parametrize("name", FOUR_BITS)
def test_nibbles(name: str, dtype: str) -> None:
    fmt, decoder = FORMATS[name], nibbles(FORMATS[name], dtype)
    values = decode(torch.arange(16, dtype=torch.uint8), fmt) if fmt.kind != "int" else torch.arange(16.0) - torch.where(torch.arange(16) > 7, 16.0 * fmt.signed, 0.0)
    for data in BYTES:
        codes = torch.tensor(data)
        assert torch.equal(operands(decoder, data), torch.stack([values[codes & 15], values[codes >> 4]]).to(DTYPE[dtype]))


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_nibbles_to_int8(name: str) -> None:
    decoder = nibbles(FORMATS[name], "tl.int8")
    for data in BYTES:
        codes = torch.tensor(data)
        both = torch.stack([codes & 15, codes >> 4])
        signed = both - 16 * (both > 7) if FORMATS[name].signed else both
        assert torch.equal(operands(decoder, data).int(), (signed * decoder.factor).int())


@pytest.mark.parametrize("dtype", ["tl.float16", "tl.bfloat16"])
def test_bytes(dtype: str) -> None:
    for data in BYTES:
        signed = torch.tensor(data, dtype=torch.uint8).view(torch.int8)
        assert torch.equal(operands(int8(dtype), data), signed.to(DTYPE[dtype])[None])


@pytest.mark.parametrize("dtype", ["tl.float16", "tl.bfloat16"])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8(name: str, dtype: str) -> None:
    """Every value, subnormals among them, but infinities and NaN, which no weight is."""
    fmt, decoder = FORMATS[name], wide(FORMATS[name], dtype)
    assert decoder is not None
    for data in BYTES:
        truth = torch.tensor(data, dtype=torch.uint8).view(fmt.native).float()
        finite = truth.isfinite()
        assert finite.any() and torch.equal((operands(decoder, data)[0].double() / decoder.factor)[finite], truth.double()[finite])


def test_no_decoder_of_other_bytes() -> None:
    assert wide(FORMATS["uint8"], "tl.bfloat16") is None and wide(FORMATS["e3m4"], "tl.float16") is None


def test_the_interpreter_can_fail() -> None:
    broken = nibbles(FORMATS["int4"], "tl.bfloat16").ptx.replace("0x4342", "0x4340")
    assert not torch.equal(operands(Decoder(broken, 4, "tl.bfloat16"), BYTES[0]), operands(nibbles(FORMATS["int4"], "tl.bfloat16"), BYTES[0]))
