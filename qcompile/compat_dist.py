"""Process groups, and what is private of FSDP2 and its DTensor parameters; reached through ``compat``. Of FSDP2 nothing is imported: where the user did not, there is nothing to find."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch


def all_reduce(t: torch.Tensor, op: str, group: Any = None) -> torch.Tensor:
    """The sum ("sum"), greatest ("max") or least ("min") of a tensor over a process group (the default one), as a value that graphs may hold; the tensor itself where there is one process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return t
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    everybody: Any = dist.group.WORLD
    return wait_tensor(all_reduce(t, op, group if group is not None else everybody))


def world_size() -> int:
    """Processes of the default group; 1 where there is none."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered() -> dict[int, Any]:
    """id of a whole parameter -> the object by which FSDP2 gathers it from its shards, for all that are alive; empty where FSDP2 is not used."""
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", True)  # of all modules that were given to fully_shard
    if module is None or not states:
        return {}
    return {id(o._unsharded_param): o for o in gc.get_objects() if type(o) is module.FSDPParam and hasattr(o, "_unsharded_param")}


def shard_of(source: Any) -> torch.Tensor:
    """The parameter, a DTensor, that lies on this process and that optimizers step."""
    shard: torch.Tensor = source.sharded_param
    return shard


def shard_state(source: Any) -> tuple[object, ...]:
    """What changes when a shard was replaced or written to in place: through the DTensor, or its local part."""
    shard = source.sharded_param
    local = shard._local_tensor
    return id(shard), shard._version, local._version, local.data_ptr()
