"""The 8-bit all-reduce in two processes, against its definition written over; mu, counts, checkpoints, bytes, and a training run."""

from __future__ import annotations

import math
import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from two_processes import main, run

from qcompile.core.errors import OptionError, TrainingError
from qcompile.train.allreduce import FP8AllReduce, fp8_all_reduce

SHAPES = {"a": (300,), "b": (7, 5), "c": (), "d": (1000, 3), "e": (11,)}


class Given(nn.Module):
    """A model whose gradients are what it is called with."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, gradients):
        return sum((p * gradients[name].to(p.dtype)).sum() for name, p in self.named_parameters())


def wrapped(dtype=torch.float32, **options):
    """A model over several buckets, and the state of its hook."""
    ddp = DistributedDataParallel(Given(dtype), bucket_cap_mb=0.002)
    state = FP8AllReduce(ddp, **options)
    ddp.register_comm_hook(state, fp8_all_reduce)
    return ddp, state


def step(ddp, everybodys):
    """Gradients by name after a backward pass in which process r has ``everybodys[r]``."""
    ddp.zero_grad()
    ddp(everybodys[dist.get_rank()]).backward()
    return {name: p.grad.clone() for name, p in ddp.module.named_parameters()}


def drawn(size=1.0):
    """Gradients of both processes, which both know."""
    return [{name: torch.randn(shape) * size * 10.0 ** -i * (1 + 3 * rank) for i, (name, shape) in enumerate(SHAPES.items())} for rank in range(2)]


def defined(everybodys, dtype, hi, mu=1.0):
    """The paper's scheme with sums in float: a shared scale, codes, their mean, rounded again."""
    out = {}
    for name in SHAPES:
        given = [g[name].double() for g in everybodys]
        scale = 2.0 ** math.ceil(math.log2(max(float(g.abs().max()) for g in given) / hi)) / mu
        codes = [(g / scale).clamp(-hi, hi).float().to(dtype).double() for g in given]
        out[name] = (sum(codes) / 2).float().to(dtype).double() * scale
    return out


def check_values(rank):
    for fmt, dtype, hi in (("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)):
        ddp, state = wrapped(fmt=fmt)
        for size in (1.0, 1e-9, 1e12):
            everybodys = drawn(size)
            found, wanted = step(ddp, everybodys), defined(everybodys, dtype, hi)
            for name in SHAPES:
                torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-7, atol=0)
                mean = (everybodys[0][name] + everybodys[1][name]) / 2
                assert float((found[name] - mean).norm() / mean.norm()) < (0.2 if fmt == "e5m2" else 0.1), name
                both = [torch.empty_like(found[name]) for _ in range(2)]
                dist.all_gather(both, found[name])
                assert torch.equal(*both)
        assert not state.saturated and not state.nonfinite
    ddp, _ = wrapped(torch.bfloat16)
    everybodys = [{name: g.bfloat16().float() for name, g in given.items()} for given in drawn()]
    for name, g in step(ddp, everybodys).items():
        assert g.dtype == torch.bfloat16 and torch.equal(g, defined(everybodys, torch.float8_e4m3fn, 448.0)[name].bfloat16())
    zero = [{name: torch.zeros(shape) for name, shape in SHAPES.items()}] * 2
    assert all(not g.any() for g in step(ddp, zero).values())


def check_mu(rank):
    """Doubled after three clean steps; then the flat tensor saturates and goes back, the one with an outlier stays."""
    ddp, state = wrapped(patience=3, threshold=0.001)
    flat = [{name: torch.full(shape, 1.9) for name, shape in SHAPES.items()} for _ in range(2)]
    for given in flat:
        given["d"] = torch.randn(1000, 3).clamp(-0.9, 0.9)
        given["d"][0, 0] = 1.9  # codes reach to 3.5 at mu = 1, to 1.75 at 2, to 0.875 at 4
    for i in range(3):
        assert state.mu.tolist() == [1.0] * 5 and state.clean.tolist() == [i] * 5
        step(ddp, flat)
    assert state.mu.tolist() == [2.0] * 5 and state.clean.tolist() == [0] * 5
    found = step(ddp, flat)
    assert state.names == list(SHAPES) and state.mu.tolist() == [1.0, 1.0, 1.0, 2.0, 1.0]
    assert state.saturated == {"a": 600, "b": 70, "c": 2, "d": 2, "e": 22}
    for name, g in defined(flat, torch.float8_e4m3fn, 448.0, mu=2.0).items():
        torch.testing.assert_close(found[name].double(), g, rtol=1e-7, atol=0)
    for _ in range(2):
        step(ddp, flat)
    assert state.mu.tolist() == [1.0, 1.0, 1.0, 4.0, 1.0]
    step(ddp, flat)
    assert state.mu.tolist() == [2.0, 2.0, 2.0, 2.0, 2.0] and state.clean.tolist() == [0, 0, 0, 0, 0]


def check_not_finite(rank):
    """NaN on one process is NaN on both, of that tensor alone; mu learns nothing from it, and the next step is as ever."""
    ddp, state = wrapped(patience=2)
    everybodys = drawn()
    everybodys[1]["b"][2, 3] = math.nan
    everybodys[0]["d"][5, 1] = math.inf
    found = step(ddp, everybodys)
    for name, g in found.items():
        assert bool(g.isnan().all() if name in ("b", "d") else g.isfinite().all()), name
    assert state.nonfinite == {"b": 1, "d": 1} and state.clean.tolist() == [1, 0, 1, 0, 1]
    assert all(bool(g.isfinite().all()) for g in step(ddp, drawn()).values())
    assert state.mu.tolist() == [2.0, 1.0, 2.0, 1.0, 2.0]


def check_resume(rank):
    """A new process group's state from a saved one goes on bit for bit."""
    ddp, state = wrapped(patience=2, threshold=0.0)
    for _ in range(3):
        step(ddp, drawn())
    saved = state.state_dict()
    again, resumed = wrapped(patience=2, threshold=0.0)
    resumed.load_state_dict({**saved, "names": saved["names"][::-1], **{k: saved[k].flip(0) for k in saved if k != "names"}})
    for _ in range(4):
        everybodys = drawn()
        a, b = step(ddp, everybodys), step(again, everybodys)
        assert all(torch.equal(a[name], b[name]) for name in SHAPES)
    new, old = resumed.state_dict(), state.state_dict()
    assert all(torch.equal(new[k], old[k]) for k in old if k != "names") and not torch.equal(old["clean"], saved["clean"])


def check_bytes(rank):
    """Codes that leave a process: half of the bucket to the other one, twice; and 12 bytes a tensor."""
    sent = []
    real = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor")}
    dist.all_reduce = lambda t, *a, **k: (sent.append(t.nbytes), real["all_reduce"](t, *a, **k))[1]
    dist.all_to_all_single = lambda out, t, *a, **k: (sent.append(t.nbytes // 2), real["all_to_all_single"](out, t, *a, **k))[1]
    dist.all_gather_into_tensor = lambda out, t, *a, **k: (sent.append(t.nbytes), real["all_gather_into_tensor"](out, t, *a, **k))[1]
    ddp, _ = wrapped()
    step(ddp, drawn())
    elements = sum(math.prod(shape) for shape in SHAPES.values())
    assert elements <= sum(sent) <= elements + 12 * len(SHAPES) + 2 * 5, (sum(sent), elements)
    for name, f in real.items():
        setattr(dist, name, f)


def check_training(rank):
    """Two processes with data of their own learn what they learn with a float32 all-reduce, and stay alike."""
    from qcompile.train.optim import FP8AdamW

    truth = torch.randn(16, 4)
    x = torch.randn(2, 40, 32, 16)
    y = x @ truth + 0.1 * torch.randn(2, 40, 32, 4)
    ends = []
    for hook, make in ((False, torch.optim.AdamW), (True, torch.optim.AdamW), (True, FP8AdamW)):
        torch.manual_seed(1)
        ddp = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)))
        if hook:
            ddp.register_comm_hook(FP8AllReduce(ddp), fp8_all_reduce)
        optimizer = make(ddp.parameters(), lr=5e-3)
        losses = []
        for i in range(120):
            optimizer.zero_grad()
            loss = (ddp(x[rank, i % 40]) - y[rank, i % 40]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        total = torch.tensor([losses[0], sum(losses[-40:]) / 40])
        dist.all_reduce(total)
        ends.append(total.tolist())
        weight = ddp.module[0].weight.detach()
        both = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(both, weight)
        assert torch.equal(*both)
    assert ends[0][1] < 0.05 * ends[0][0]
    for first, last in ends[1:]:
        assert abs(last - ends[0][1]) < 0.01 * first, ends
    if rank == 0:
        print("ends", ends)


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


def check_all(rank):
    """In one pair of processes: starting them takes longer than any check."""
    for name, f in CHECKS.items():
        torch.manual_seed(0)
        f(rank)
        print("passed", name)


def test_in_two_processes():
    printed = run(__file__, "all")
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("passed")] == list(CHECKS)


# --- without processes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fmt="int8"), "unknown format 'int8' in FP8AllReduce.*Known: e4m3, e5m2"),
        (dict(threshold=1.5), "threshold=1.5 is a share"),
        (dict(patience=0), "patience=0"),
        (dict(mu=(1.0, 2.0, 4.0)), r"mu=\(1.0, 2.0, 4.0\)"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(OptionError, match=message):
        FP8AllReduce(Given(), **options)


def test_modules_that_do_not_fit():
    with pytest.raises(OptionError, match="ReLU has no parameter that requires grad"):
        FP8AllReduce(nn.ReLU())
    state = FP8AllReduce(Given())
    with pytest.raises(TrainingError, match=r"parameters of shapes \[\(2, 2\)\] that are not the module's"):
        state.rows([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(TrainingError, match="the state to load has 2 parameters and the module 5; a, b, bias, c, d are in one of them only"):
        state.load_state_dict(FP8AllReduce(nn.Linear(2, 2)).state_dict())


if __name__ == "__main__":
    main({"all": check_all})
