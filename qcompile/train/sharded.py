"""Parameters that FSDP2 shards (DTensor): their local parts, state laid out like them, and maxima over all parts."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _dtensor() -> Any:
    """The class DTensor where somebody has loaded it, else None: importing it takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def local_of(x: Tensor) -> Tensor:
    """The part that lies on this process; the tensor itself where it is not sharded."""
    kind = _dtensor()
    return x.to_local() if kind is not None and isinstance(x, kind) else x


def sharded_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape, layout and device of ``p``, sharded as it is."""
    kind = _dtensor()
    if kind is None or not isinstance(p, kind):
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    local = torch.zeros_like(p.to_local(), dtype=dtype)
    made: Tensor = kind.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    return made


def maximum_over_shards(values: Tensor, p: Tensor) -> Tensor:
    """The largest of ``values`` over all processes that hold a part of ``p``; NaN counts as infinite, since reductions may lose it."""
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"))
    for axis, placement in enumerate(p.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=p.device_mesh.get_group(axis))  # type: ignore[attr-defined]
    return values
