"""FSDP2 in two processes: the optimizer's state on shards, uneven and empty ones included, is that of the whole tensor, bit for bit."""

from __future__ import annotations

import copy
import pathlib
import sys

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from two_processes import main, run

LARGE = ("exp_avg", "exp_avg_sq", "master")


def part(full, sharded, rank):
    """This process's rows of a full tensor, by FSDP2's rule: chunks of equal size, the last ones short or empty."""
    chunks = full.chunk(2, 0)
    return chunks[rank] if rank < len(chunks) else full[:0]


def check_fsdp2(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from qcompile.train.optim import FP8AdamW

    mesh = init_device_mesh(torch.get_default_device().type, (2,))
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 1)).to(dtype)  # 5 rows: 3 and 2; 1 row: 1 and none
        sharded = copy.deepcopy(whole)
        fully_shard(sharded, mesh=mesh)
        reference, optimizer = FP8AdamW(whole.parameters(), lr=0.01), FP8AdamW(sharded.parameters(), lr=0.01)
        for i in range(6):
            if i == 4:  # a checkpoint in between
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = FP8AdamW(sharded.parameters(), lr=0.5)
                optimizer.load_state_dict(saved)
            for p, q in zip(whole.parameters(), sharded.parameters()):
                p.grad = torch.randn(p.shape).to(dtype)
                if i == 3 and p.dim() == 2:
                    p.grad[-1, 0] = torch.nan  # on the last shard alone
                local = part(p.grad, q, rank).clone()
                q.grad = DTensor.from_local(local, q.device_mesh, q.placements, run_check=False, shape=q.shape, stride=q.stride())
            reference.step()
            optimizer.step()
            for p, q in zip(whole.parameters(), sharded.parameters()):
                assert torch.equal(q.to_local(), part(p.detach(), q, rank)), (dtype, i)
                for name, value in reference.state[p].items():
                    mine = optimizer.state[q][name]
                    if name in LARGE:
                        assert isinstance(mine, DTensor) and mine.placements == q.placements and mine.shape == q.shape
                        assert torch.equal(mine.to_local().float(), part(value, q, rank).float()), (name, dtype, i)
                    else:
                        assert torch.equal(mine, value), (name, dtype, i)
        assert reference.skipped == optimizer.skipped == 2


def test_shards_are_parts_of_the_whole():
    run(__file__, "fsdp2")


if __name__ == "__main__":
    main({"fsdp2": check_fsdp2})
