"""Training's parts on CUDA: the compiled optimizer, a teacher on another device, and the checks of tests/train in two processes through NCCL where there are two GPUs."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

from qcompile.train.distill import Distillation
from qcompile.train.optim import FP8AdamW

TRAIN = pathlib.Path(__file__).resolve().parent.parent / "train"
sys.path.insert(0, str(TRAIN))

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_optimizer(dtype):
    """Eager on the CPU, eager and compiled on CUDA: the same to the last digits of the arithmetic, but for a moment here and there that rounds to the next code; a skipped step included."""
    shapes = [(64, 100), (5,), (3, 4, 2), (1000, 70)]
    sets = [[torch.nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]]
    sets += [[torch.nn.Parameter(p.detach().clone().cuda()) for p in sets[0]] for _ in range(2)]
    optimizers = [FP8AdamW(parameters, lr=0.01, compile=i == 2) for i, parameters in enumerate(sets)]
    for i in range(6):
        for many in zip(*sets):
            g = torch.randn(many[0].shape).to(dtype)
            if i == 3:
                g.view(-1)[0] = torch.inf
            for p in many:
                p.grad = g.to(p.device)
        for optimizer in optimizers:
            optimizer.step()
    for reference, *others in zip(*sets):
        for other in others:
            apart = ~torch.isclose(other.detach().cpu().float(), reference.detach().float(), rtol=0.01, atol=1e-3)
            assert float(apart.float().mean()) < 2e-4 and (dtype is not torch.float32 or not apart.any())
    assert [optimizer.skipped for optimizer in optimizers] == [4, 4, 4]


def test_a_teacher_elsewhere():
    """A teacher on the CPU for a student on CUDA: the loss of both on the CPU."""
    teacher, student = (torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50)) for _ in range(2))
    ids = torch.randint(0, 50, (2, 9))
    distill = Distillation(teacher, "tsld", ground_truth=0.5)
    wanted = distill(student(ids), ids, labels=ids).loss
    student.cuda()
    found = distill(student(ids.cuda()), ids.cuda(), labels=ids.cuda()).loss
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)


NCCL = [("test_allreduce.py", "all"), ("test_sharded.py", "fsdp2"), ("test_distributed.py", "ddp"), ("test_distributed.py", "ddp, buckets through Inductor"), ("test_distributed.py", "fsdp2")]


@pytest.mark.parametrize(("file", "check"), NCCL)
def test_nccl(file, check):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU, and NCCL needs one for each process")
    from two_processes import run

    run(str(TRAIN / file), check, "cuda")
