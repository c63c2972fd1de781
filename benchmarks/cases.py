"""Rows of `benchmarks/run.py`: literal tables, nothing is computed here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One recipe on one `nn.Linear` of `n` x `k`, at several batch sizes. `error`: the greatest relative distance from the op's reference. `goal`: times as fast as compiled fp32, at some M."""

    recipe: str
    n: int = 2048
    k: int = 2048
    rows: tuple[int, ...] = (1, 16, 64, 512)
    error: float = 1e-3
    goal: tuple[tuple[int, float], ...] = ()


CASES = (
    Case("W8A8", error=5e-3, goal=((1, 2.0), (64, 2.0))),  # fused arithmetic may round a code the other way
    Case("W8A16"),
    Case("W4A16"),
    Case("NF4"),
)
QUICK = (Case("W8A8", 256, 256, (1, 16), error=5e-3), Case("NF4", 256, 256, (1,)))

OVERHEAD_GOAL = 1.10
"""A call of qcompile over one of plain Inductor, where nothing is quantized."""
COLD_GOAL = 1.5
"""Compiling with empty caches, as a multiple of plain Inductor's."""
WARM_GOAL = 2.0
"""Seconds beyond plain Inductor's, in a second process with the same caches."""


@dataclass(frozen=True)
class GpuCase:
    """One recipe on a bfloat16 `nn.Linear` of a GPU. `goal`: microseconds on an H200 by number of rows, quantization of the input included; `peer`: the best of other libraries there."""

    recipe: str
    goal: tuple[tuple[int, float], ...]
    peer: tuple[tuple[int, float], ...]
    bits: float
    """Bits of a weight: what a product with few rows must read."""
    weight: str | None = None


ROWS = (1, 16, 64, 256, 4096)


def _by_rows(*us: float) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ROWS, us))


GPU_CASES = (
    GpuCase("W4A8", _by_rows(9.5, 11, 14, 30, 460), _by_rows(22, 57, 52, 158, 2223), 4.125),
    GpuCase("W4A16", _by_rows(10, 13, 18, 46, 670), _by_rows(22, 57, 52, 158, 2223), 4.125),
    GpuCase("W8A8", _by_rows(16, 16.5, 18, 28, 430), _by_rows(17.8, 20.8, 21.8, 43.9, 525), 8.0),
    GpuCase("FP8", _by_rows(16, 16.5, 18, 26, 320), _by_rows(17.4, 24.2, 21.5, 30.1, 323), 8.0),
    GpuCase("W8A16", _by_rows(16, 17, 22, 46, 670), _by_rows(19.3, 28.5, 50.6, 147, 1901), 8.0),
    GpuCase("NF4", _by_rows(12, 16, 22, 50, 680), _by_rows(30.4, 69, 108, 119, 696), 4.125, "nf4.g64/int8.row"),
)
SHAPE = (14336, 4096)
"""N, K of the table."""
GPU_SHAPES = ((4096, 14336), (6144, 4096), (28672, 4096), (128256, 4096))
"""The others, at one and sixteen rows."""


# --- whole models ----------------------------------------------------------------------------------------------------

VOCABULARY = 128256
LLAMAS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}


@dataclass(frozen=True)
class Breakdown:
    """Kernels of one step of decoding with some layers of a model. `error`: the greatest relative distance of the logits from the eager 16-bit model's."""

    recipe: str
    head: str | None
    batch: int
    context: int
    error: float
    model: str = "8B"
    layers: int = 4


BREAKDOWNS = (
    Breakdown("bf16", None, 1, 128, 0.05),
    Breakdown("W4A16", "int4.g128", 1, 128, 0.35),
    Breakdown("W8A8", "int8.row", 1, 128, 0.08),
    Breakdown("bf16", None, 64, 2048, 0.05),
    Breakdown("W4A16", "int4.g128", 64, 2048, 0.35),
    Breakdown("W8A8", "int8.row", 64, 2048, 0.08),
    Breakdown("bf16", None, 64, 128, 0.05),
    Breakdown("W4A16", "int4.g128", 64, 128, 0.35),
    Breakdown("W8A8", "int8.row", 64, 128, 0.08),
    Breakdown("bf16", None, 1, 2048, 0.05),
    Breakdown("W4A16", "int4.g128", 1, 2048, 0.35),
    Breakdown("W8A8", "int8.row", 1, 2048, 0.08),
)
