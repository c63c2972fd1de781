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
