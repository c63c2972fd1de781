"""Gradients averaged over processes in 8 bits: FP8-LM's gradient all-reduce (Peng et al. 2023, arXiv 2310.18313, section 2.1), as a communication hook of DistributedDataParallel.

    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(state := FP8AllReduce(ddp), fp8_all_reduce)

Every tensor has one scale, the same on all processes: the least power of two that holds its largest gradient on any of them (the paper's "shared scale", there as a reciprocal: the
minimum). So codes of several processes can be added as they are. Neither NCCL nor gloo adds FP8, so that a bucket of n gradients on N processes goes these ways:

    all-reduce    the largest gradient of each tensor                           4 bytes a tensor
    all-to-all    codes: each process gets its N-th of everybody's              n (N - 1) / N bytes sent by each
    all-gather    the N-th that each has added in float32, divided by N
                  and rounded again, with the same scale                        n (N - 1) / N bytes
    all-reduce    how many codes saturated, of each tensor                      8 bytes a tensor

That is 2 bytes for each gradient, where a ring in float32 sends 8 and in bfloat16 4. Adding in float32 spares the overflow and underflow of sums in FP8 that the paper scales against; a
gradient is rounded twice, each time to within 1/16 of itself (E4M3) or half the least code.

The automatic scaling factor mu of each tensor follows the paper: halved after a step in which more than 0.001 % of its codes saturate, doubled after 1000 steps in a row in which no more did.
Codes are mu times larger than the shared scale makes them. At mu = 1, where it begins, nothing can saturate; above, the largest values of a large tensor are clipped for the sake of the small
ones, and as soon as these are more than 0.001 %, mu goes back.

A gradient that is not finite on one process is NaN on all, as after any all-reduce, and is counted: ``state.nonfinite``.
"""

# no "from __future__ import annotations": DistributedDataParallel compares the annotations of a hook with types, not with their spelling
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qcompile.core.errors import OptionError, TrainingError, unknown
from qcompile.core.formats import FORMATS

from .scaling import LEAST, greatest, scale_for

FP8 = ("e4m3", "e5m2")
"""Formats of gradients: those with a dtype of 8 bits."""


class FP8AllReduce:
    """State of the hook: mu, clean steps and counts of each parameter, alike on all processes.

    ``module``: the model, wrapped in DistributedDataParallel or not; ``group``: the processes, all by default; ``fmt``: "e4m3" as in the paper, or "e5m2".
    ``threshold``: the share of saturated codes that halves mu; ``patience``: clean steps that double it; ``mu``: where it begins and the bounds that it keeps between, (first, least, greatest).
    ``saturated`` and ``nonfinite`` count codes and tensors over all steps, by name, where there were any.
    Raises OptionError where these do not fit.
    """

    def __init__(
        self, module: nn.Module, group: dist.ProcessGroup | None = None, *, fmt: Literal["e4m3", "e5m2"] = "e4m3", threshold: float = 1e-5, patience: int = 1000,
        mu: tuple[float, float, float] = (1.0, 2.0**-10, 2.0**10),
    ) -> None:  # fmt: skip
        if fmt not in FP8:
            raise unknown("format", fmt, FP8, "FP8AllReduce")
        if not 0 <= threshold < 1 or patience < 1:
            raise OptionError(f"FP8AllReduce: threshold={threshold!r} is a share of codes from 0 to below 1, and patience={patience!r} a number of steps, 1 at least")
        if not 0 < mu[1] <= mu[0] <= mu[2]:
            raise OptionError(f"FP8AllReduce: mu={mu!r} is (first, least, greatest), all above 0 and in that order: least, first, greatest")
        inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
        named = [(name, p) for name, p in inner.named_parameters() if p.requires_grad]
        if not named:
            raise OptionError(f"FP8AllReduce: {type(inner).__name__} has no parameter that requires grad")
        self.names = [name for name, _ in named]
        self._parameters = [p for _, p in named]  # held, so that no other parameter can take over one's id
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        self._rows: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.group, self.fmt, self.threshold, self.patience, self.bounds = group, fmt, threshold, patience, mu[1:]
        device = named[0][1].device
        self.mu = torch.full((len(named),), mu[0], device=device)
        self.clean = torch.zeros(len(named), dtype=torch.int64, device=device)
        self._saturated = torch.zeros_like(self.clean)
        self._nonfinite = torch.zeros_like(self.clean)

    @property
    def saturated(self) -> dict[str, int]:
        """Codes that saturated, all steps and processes together, of the parameters that had any. Waits for the device."""
        return self._counted(self._saturated)

    @property
    def nonfinite(self) -> dict[str, int]:
        """Steps in which a gradient was not finite on some process, of the parameters that had any. Waits for the device."""
        return self._counted(self._nonfinite)

    def _counted(self, counts: Tensor) -> dict[str, int]:
        return {name: count for name, count in zip(self.names, counts.tolist()) if count}

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on, by names of parameters; alike on all processes, so that one may save it."""
        return {"names": list(self.names), **{name: getattr(self, at).clone() for name, at in TENSORS.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, for parameters of the same names in any order. Raises TrainingError where names differ."""
        theirs = list(state_dict["names"])
        if sorted(theirs) != sorted(self.names):
            odd = sorted(set(theirs) ^ set(self.names))
            raise TrainingError(f"FP8AllReduce: the state to load has {len(theirs)} parameters and the module {len(self.names)}; {', '.join(odd[:5])} are in one of them only")
        order = torch.tensor([theirs.index(name) for name in self.names])
        for name, at in TENSORS.items():
            mine = getattr(self, at)
            mine.copy_(state_dict[name][order.to(state_dict[name].device)])

    def rows(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of the parameters of a bucket, and their numbers of elements; kept, so that nothing is copied to a GPU twice. Raises TrainingError for a parameter that the module did not have."""
        key = tuple(id(p) for p in parameters)
        if key in self._rows:
            return self._rows[key]
        missing = [tuple(p.shape) for p in parameters if id(p) not in self._index]
        if missing:
            raise TrainingError(f"FP8AllReduce: a bucket has parameters of shapes {missing} that are not the module's; build the state from the module that DistributedDataParallel wraps")
        device = self.mu.device
        self._rows[key] = torch.tensor([self._index[i] for i in key], device=device), torch.tensor([p.numel() for p in parameters], device=device)
        return self._rows[key]

    def learn(self, rows: Tensor, saturated: Tensor, sizes: Tensor, bad: Tensor) -> None:
        """mu, clean steps and counts after a step: ``saturated`` codes among ``sizes``, and which tensors were not finite, which teaches nothing about mu; each (T,)."""
        much = saturated > self.threshold * sizes
        clean = torch.where(bad, self.clean[rows], torch.where(much, 0, self.clean[rows] + 1))
        grown = clean >= self.patience
        mu = self.mu[rows] * torch.where(bad, 1.0, torch.where(much, 0.5, torch.where(grown, 2.0, 1.0)))
        self.mu[rows] = mu.clamp(*self.bounds)
        self.clean[rows] = torch.where(grown, 0, clean)
        self._saturated[rows] += saturated
        self._nonfinite[rows] += bad.long()


TENSORS = {"mu": "mu", "clean": "clean", "saturated": "_saturated", "nonfinite": "_nonfinite"}
"""Keys of the state dict, and attributes."""


def fp8_all_reduce(state: FP8AllReduce, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The hook: the mean over all processes of the gradients of a bucket, of any float dtype, in place.

    With NCCL everything is queued and the backward pass goes on; with gloo the hook waits, since its calls must come in the same order on every process.
    """
    buffer = bucket.buffer()
    step = _Step(state, buffer, bucket.gradients(), *state.rows(bucket.parameters()))
    first = dist.all_reduce(step.amax, op=dist.ReduceOp.MAX, group=state.group, async_op=True)
    assert first is not None
    if buffer.device.type == "cpu":
        first.wait()
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(step.finish())
        return done
    chained: torch.futures.Future[Tensor] = first.get_future().then(lambda _: step.finish())
    return chained


class _Step:
    """One bucket on its way."""

    def __init__(self, state: FP8AllReduce, buffer: Tensor, gradients: list[Tensor], rows: Tensor, sizes: Tensor) -> None:
        self.state, self.buffer, self.gradients, self.rows, self.sizes = state, buffer, gradients, rows, sizes
        self.fmt = FORMATS[state.fmt]
        # NaN as infinite, since reductions may lose it
        self.amax = torch.stack([greatest(g) for g in gradients]).nan_to_num(nan=float("inf"), posinf=float("inf"))

    def finish(self) -> Tensor:
        """From the largest gradients to the mean, written into the bucket."""
        state, group = self.state, self.state.group
        if self.amax.is_cuda:
            self.amax.record_stream(torch.cuda.current_stream())  # made on the stream of the backward pass, and this may be another
        bad = self.amax.isinf()
        scales = (scale_for(torch.where(bad, 0.0, self.amax), self.fmt.hi) / state.mu[self.rows]).clamp(min=LEAST)
        processes = dist.get_world_size(group)
        share = -(-self.buffer.numel() // processes)
        codes, saturated = self._encode(scales, bad, share * processes)
        counting = dist.all_reduce(saturated, group=group, async_op=True)
        received = torch.empty_like(codes)
        dist.all_to_all_single(received, codes, group=group)
        total = _values(received, self.fmt.dtype).view(processes, share).sum(0) / processes
        dist.all_gather_into_tensor(codes, total.to(self.fmt.dtype).view(torch.uint8), group=group)
        self._decode(codes, scales, bad)
        assert counting is not None
        counting.wait()
        state.learn(self.rows, saturated, self.sizes * processes, bad)
        return self.buffer

    def _encode(self, scales: Tensor, bad: Tensor, padded: int) -> tuple[Tensor, Tensor]:
        """Codes of the bucket as uint8, padded with zeros, and how many of each tensor saturated."""
        codes = torch.zeros(padded, dtype=torch.uint8, device=self.buffer.device)
        saturated, at, hi = [], 0, self.fmt.hi
        for i, g in enumerate(self.gradients):
            y = torch.where(bad[i], 0.0, g.reshape(-1).float() / scales[i])
            saturated.append((y.abs() > hi).sum())
            codes[at : at + g.numel()] = y.clamp(-hi, hi).to(self.fmt.dtype).view(torch.uint8)
            at += g.numel()
        return codes, torch.stack(saturated)

    def _decode(self, codes: Tensor, scales: Tensor, bad: Tensor) -> None:
        """The gradients from their mean codes; NaN where one was not finite."""
        at = 0
        for i, g in enumerate(self.gradients):
            values = _values(codes[at : at + g.numel()], self.fmt.dtype) * scales[i]
            g.copy_(torch.where(bad[i], float("nan"), values).view(g.shape))
            at += g.numel()


def _values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.view(dtype).float()


