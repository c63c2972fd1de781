"""Quantized training in two processes (gloo): DistributedDataParallel and FSDP2 give the losses of one process on the joined batch, and what is learned or measured is one over the group."""

from __future__ import annotations

import copy
import os
import pathlib
import sys

import pytest
import torch
from torch import nn

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]

from two_processes import main, run  # noqa: E402

RECIPES = {
    "W4A16 qat": {"recipe": "W4A16", "train": "qat"},
    "W8A8_STATIC qat": {"recipe": "W8A8_STATIC", "train": "qat(input='ste')"},
    "W8A8_STATIC lsq": {"recipe": "W8A8_STATIC", "train": "qat"},
    "fp8": {"train": "fp8"},
    "fp8 delayed": {"train": "fp8(scaling='delayed')"},
}
"""Options, each trained by every kind of loop."""
LOOSE = {"fp8": 0.01, "fp8 delayed": 0.01}
"""How far losses may lie apart: scales of current scaling are those of a process's own part, and all gradients are rounded to two bits."""


def reduced(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is one over the group. Histories are not: their maximum is taken when a scale is made."""
    return {name: t for name, t in state.items() if ".fp8_" not in name}


def options_of(name: str, lower: str = "eager") -> dict:
    return {**RECIPES[name], "lower": lower}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    import qcompile

    return torch.optim.SGD([{"params": list(model.parameters())}, {"params": qcompile.parameters(model)}], lr=0.05)


def batches(width: int, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(7)
    return [(torch.randn(16, width, generator=generator, device="cpu") * (1 + i)).to(torch.get_default_device()) for i in range(count)]


def loss_of(fast, x: torch.Tensor) -> torch.Tensor:
    return (fast(x) - x.roll(1, -1)).square().mean()


def train_steps(model: nn.Module, fast, data: list[torch.Tensor], make=optimizer_of) -> list[float]:
    """Losses; a mean over the processes, which is that of the joined batch where each has its part and changes nothing where all have the same."""
    import torch.distributed as dist

    loss_of(fast, data[0])
    optimizer, found = make(model), []
    for x in data:
        loss = loss_of(fast, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        found.append(float(loss) / 2)
    return found


def same_on_both(tensors) -> bool:
    import torch.distributed as dist

    for t in tensors:
        low, high = t.detach().clone(), t.detach().clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            return False
    return True


def near(found: list[float], wanted: list[float], rtol: float = 2e-4) -> bool:
    """Equal up to the order of sums, which now and then moves a number to the next step of its grid."""
    return len(found) == len(wanted) and all(abs(a - b) <= rtol * abs(b) for a, b in zip(found, wanted))


def wrapped(model: nn.Module, how: str, options: dict):
    from torch.nn.parallel import DistributedDataParallel as DDP

    if how == "compile(ddp)":
        return torch.compile(DDP(model, bucket_cap_mb=1), backend="qcompile", options=options)
    if how == "ddp(compile)":
        return DDP(torch.compile(model, backend="qcompile", options=options), bucket_cap_mb=1)
    model.compile(backend="qcompile", options=options)
    return DDP(model, bucket_cap_mb=1)


def check_ddp(rank: int) -> None:
    from small import Stack

    from qcompile import train

    for name in RECIPES:
        torch.manual_seed(0)
        start, data = Stack(2), batches(32)
        alone = copy.deepcopy(start)
        wanted = train_steps(alone, torch.compile(alone, backend="qcompile", options=options_of(name)), data)
        assert wanted[-1] != wanted[0]
        for how in ("compile(ddp)", "ddp(compile)", "in place") if name == "W4A16 qat" else ("compile(ddp)",):
            torch._dynamo.reset()
            model = copy.deepcopy(start)
            found = train_steps(model, wrapped(model, how, options_of(name)), [x.chunk(2)[rank] for x in data])
            assert near(found, wanted, LOOSE.get(name, 2e-4)), (name, how, found, wanted)
            state, theirs = reduced(train.state_dict(model)), reduced(train.state_dict(alone))
            assert state.keys() == theirs.keys() and same_on_both(state.values()), (name, how)
            assert all(torch.allclose(state[k], theirs[k], rtol=1e-3) for k in state), (name, how)


def check_accumulation(rank: int) -> None:
    """no_sync: the sum of four parts, two to each process."""
    from small import Stack

    import qcompile

    torch.manual_seed(0)
    start, (x, *_) = Stack(2), batches(32)
    alone, model = copy.deepcopy(start), copy.deepcopy(start)
    loss_of(torch.compile(alone, backend="qcompile", options=options_of("W4A16 qat")), x).backward()
    torch._dynamo.reset()
    fast = wrapped(model, "in place", options_of("W4A16 qat"))
    first, second = x.chunk(2)[rank].chunk(2)
    with fast.no_sync():
        (loss_of(fast, first) / 2).backward()
    (loss_of(fast, second) / 2).backward()
    for p, q in zip((*model.parameters(), *qcompile.parameters(model)), (*alone.parameters(), *qcompile.parameters(alone))):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6)


def check_fp8_scales(rank: int) -> None:
    """Delayed scales are those of the greatest values that any process saw: here one sees values eight times as great as the other."""
    import torch.distributed as dist
    from small import Net

    from qcompile import train
    from qcompile.kernels.fp8_history import SCALE

    torch.manual_seed(0)
    start, x, found = Net(), batches(32)[0].chunk(2)[rank] * (1 + 7 * rank), {}
    for reduce in (True, False):
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        fast = torch.compile(model, backend="qcompile", options={"train": f"fp8(scaling='delayed', reduce={reduce})", "lower": "eager"})
        for _ in range(3):
            fast(x).square().mean().backward()
        found[reduce] = {name: t[..., SCALE].clone() for name, t in train.state_dict(model).items() if ".fp8_" in name}
        assert len(found[reduce]) == 4, "forward and backward of two linears"
    assert all(same_on_both([scales]) for scales in found[True].values())
    assert not any(same_on_both([scales]) for scales in found[False].values())
    least = found[False]["up.weight.fp8_forward"].clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)  # the least scale is that of the greatest value
    assert torch.equal(least, found[True]["up.weight.fp8_forward"])


def check_buckets(rank: int, lower: str = "eager") -> None:
    """Dynamo's DDPOptimizer cuts a graph where a bucket is full, here between two linears of 1 MiB each, and has no parameters when it asks for the pieces."""
    from small import Net, graphs

    from qcompile import train

    torch.manual_seed(0)
    start, data, ignore = Net(256, 1024), batches(256, 3), {"ignore": ["down"]}
    for more, names in (({}, ["up.weight.step", "down.weight.step"]), (ignore, ["up.weight.step"]))[: 2 if lower == "eager" else 1]:
        torch._dynamo.reset()
        alone, model = copy.deepcopy(start), copy.deepcopy(start)
        wanted = train_steps(alone, torch.compile(alone, backend="qcompile", options=options_of("W4A16 qat") | more), data)
        torch._dynamo.reset()
        fast = wrapped(model, "compile(ddp)", options_of("W4A16 qat", lower) | more)
        with graphs() as seen:
            found = train_steps(model, fast, [x.chunk(2)[rank] for x in data])
        assert near(found, wanted), (found, wanted)
        assert len({id(graph) for graph, _ in seen}) == 2 and len(seen) == 8
        assert [name for name, _ in train.named_parameters(model)] == names and same_on_both(train.state_dict(model).values())
        if lower == "inductor":
            continue
        trained = loss_of(fast, data[0]).detach()
        with torch.no_grad(), graphs() as seen:
            evaluated = loss_of(fast, data[0])
        assert len({id(graph) for graph, _ in seen}) == 2 and torch.allclose(evaluated, trained, rtol=1e-5)


def sharded(model: nn.Module, options: dict) -> nn.Module:
    """FSDP2, each layer compiled and sharded by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.get_default_device().type, (2,))
    for layer in model.layers:
        layer.compile(backend="qcompile", options=options)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_fsdp2(rank: int) -> None:
    from small import Stack
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    from qcompile import train

    for name in RECIPES:
        torch.manual_seed(0)
        torch._dynamo.reset()
        start, data = Stack(2), batches(32)
        mine = [x.chunk(2)[rank] for x in data]
        alone = copy.deepcopy(start)
        for layer in alone.layers:
            layer.compile(backend="qcompile", options=options_of(name))
        wanted = train_steps(alone, alone, data)
        torch._dynamo.reset()
        model = sharded(copy.deepcopy(start), options_of(name))
        found = train_steps(model, model, mine)
        assert near(found, wanted, LOOSE.get(name, 2e-4)), (name, found, wanted)
        state, theirs = reduced(train.state_dict(model)), reduced(train.state_dict(alone))
        assert state.keys() == theirs.keys() and same_on_both(state.values()), name
        assert all(torch.allclose(state[k], theirs[k], rtol=1e-3) for k in state), name
        # a checkpoint, read by another model that is sharded, goes on alike
        weights, state = copy.deepcopy(get_model_state_dict(model)), {k: v.clone() for k, v in train.state_dict(model).items()}
        other = sharded(Stack(2), options_of(name))
        set_model_state_dict(other, weights)
        train.load_state_dict(other, state)
        assert train_steps(other, other, mine) == train_steps(model, model, mine), name


def check_fsdp2_evaluation(rank: int) -> None:
    """Gathering leaves no trace on a parameter. The weight is packed once for each change of its shard, whatever changed it."""
    from small import Stack

    from qcompile import weights

    torch.manual_seed(0)
    x = batches(32)[0].chunk(2)[rank]
    model = sharded(Stack(2), {"recipe": "W8A16", "train": "qat", "lower": "eager", "release": True})
    with torch.no_grad():
        before = model(x)
    packed: list[int] = []
    real = weights._codes
    weights._codes = lambda p, how, w, scheme, path, solution: (packed.append(id(p)), real(p, how, w, scheme, path, solution))[1]
    ways = {
        "foreach": lambda: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True).step(),
        "fused": lambda: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True).step(),
        "in place": lambda: [p.mul_(1.5) for p in model.parameters()],
        "local part": lambda: [p.to_local().mul_(0.5) for p in model.parameters()],
    }
    for name, change in ways.items():
        model(x).square().mean().backward()
        with torch.no_grad():
            change()
        packed.clear()
        with torch.no_grad():
            after, again = model(x), model(x)
        assert len(packed) == len(set(packed)) == 4, (name, packed)
        assert torch.equal(after, again) and not torch.allclose(after, before, rtol=1e-3)
        assert torch.allclose(after, model(x).detach(), rtol=1e-4, atol=1e-5), name
        before = after


class Adapted(nn.Module):
    """A frozen linear with a low-rank adapter, and a residual."""

    def __init__(self, width: int = 64, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.base(x).relu() + self.b(self.a(x))


class Adapters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def check_fsdp2_frozen(rank: int) -> None:
    """A base that ``quantize`` made codes of is sharded and gathered as codes: half of their bytes lie on each process, and adapters train as in one process."""
    from small import graphs

    import qcompile
    from qcompile.core.recipe import Choice

    def adapters_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)

    torch.manual_seed(0)
    torch._dynamo.reset()
    start, data, options = Adapters(), batches(64), {"train": "lora", "lower": "eager"}
    for layer in start.layers:
        qcompile.quantize(layer, "NF4", data[:1], ignore=["a", "b"], weight="nf4.g32/int8.g256", progress=False)
    alone = copy.deepcopy(start)
    for layer in alone.layers:
        layer.compile(backend="qcompile", options=options)
    wanted = train_steps(alone, alone, data, adapters_of)
    torch._dynamo.reset()
    model = sharded(copy.deepcopy(start), options)
    with graphs() as seen:
        found = train_steps(model, model, [x.chunk(2)[rank] for x in data], adapters_of)
    assert all([str(c) for c in graph.plan.values() if isinstance(c, Choice)] == ["nf4.g32/int8.g256"] for graph, _ in seen) and seen
    assert near(found, wanted)
    codes = {name: (p, q) for (name, p), (_, q) in zip(model.named_parameters(), alone.named_parameters(), strict=True) if "parametrizations" in name}
    assert len({name for name, (p, q) in codes.items() if q.dtype == torch.uint8}) == 2
    assert all(2 * p.to_local().nbytes == q.nbytes and p.dtype == q.dtype and p.grad is None for p, q in codes.values())
    adapters = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 4 and not any(torch.equal(p, start.get_parameter(name)) for name, p in adapters.items())
    assert all(torch.allclose(p, alone.get_parameter(name), rtol=1e-3, atol=1e-5) for name, p in adapters.items())


CHECKS = {
    "ddp": lambda rank: (check_ddp(rank), torch._dynamo.reset(), check_accumulation(rank), check_fp8_scales(rank), check_buckets(rank)),
    "ddp, buckets through Inductor": lambda rank: check_buckets(rank, "inductor"),
    "fsdp2": lambda rank: (check_fsdp2(rank), torch._dynamo.reset(), check_fsdp2_evaluation(rank)),
    "fsdp2, frozen codes": check_fsdp2_frozen,
}

BY_HAND = pytest.mark.skipif("QCOMPILE_SLOW" not in os.environ, reason="two processes compile C++ for two minutes: QCOMPILE_SLOW=1 runs it")
INTEGERS = pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="FSDP2 of torch 2.11 asks for gradients of all parameters, and integers have none; 2.12 was not tried")
MARKS = {"ddp, buckets through Inductor": BY_HAND, "fsdp2, frozen codes": INTEGERS}


@pytest.mark.parametrize("check", [pytest.param(name, marks=MARKS.get(name, ())) for name in CHECKS])
def test_two_processes(check):
    run(__file__, check)


if __name__ == "__main__":
    main(CHECKS)
