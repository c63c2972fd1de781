"""The least time that a product could take on a card, from its measured ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_rate(machine: Mapping[str, Any]) -> float:
    """TB/s of a reduction, which only reads; of a copy in results that have no other."""
    rate: float = machine.get("read_tb_s", machine["copy_tb_s"])
    return rate


def floor_us(n_bytes: float, operations: float, twice: bool, machine: Mapping[str, Any]) -> float:
    """Microseconds to read so many bytes once, or to do so many operations at the rate of a large bfloat16 product; ``twice`` that rate for products in 8 bits."""
    return max(n_bytes / read_rate(machine) / 1e6, operations / machine["bf16_tflop_s"] / 1e6 / (2 if twice else 1))
