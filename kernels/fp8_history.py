"""Delayed scaling: the scales of FP8 training come from the largest magnitudes of the calls before, which a state tensor holds. ``fp8_scales`` reads it, ``fp8_record`` enters what a call saw.

A row of state is ``[scale, overflows, position, ring...]`` in float32: the scale that was used last, how many calls saturated or met inf or NaN, the place in the ring that was written last, and a
ring of the largest magnitudes of the last ``history`` calls. A ring, where Transformer Engine rolls: nothing moves, and a backward writes the place that its own forward took, so that several
forwards may come before their backwards. What the forward writes (inputs and weights) and what the backward writes (gradients) are two tensors: AOTAutograd computes a backward's view of a tensor
that the forward writes, too, from its value before that forward.

The rule (Transformer Engine's ``DelayedScaling``, algorithm "max"; Micikevicius et al. 2022, arXiv 2209.05433, section 3.1): scale = (greatest value of the format / max(ring)) / 2**margin, the old
scale where the ring is empty. It differs in two things:

 * A call that met inf or NaN enters nothing, and is counted. Transformer Engine lets it freeze the scale for as long as it is in the history.
 * max(ring) counts as 2**leap times what is usual at most, the geometric mean of the last ``RECENT`` calls; what is beyond saturates, and is counted. There are gradients a billion times the usual
   (of a token whose hidden state is zero, which the backward of each norm multiplies by 1 / sqrt(eps)). By the maximum alone, one of them rounds all others to zero for as long as it is in the
   history, and training of that linear stops: benchmarks/results/h200/fp8_curve_leap0.json. A change that lasts is followed within ``RECENT`` calls. ``leap=0`` takes the maximum as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile import compat
from qcompile.core.ranges import TINY

from .op import Op

SCALE, OVERFLOWS, POSITION, RING = range(4)
"""Columns of a row of state; the ring is the last column and all behind it."""
NUMBERS, BACK = 16, 4
"""Columns of what ``fp8_scales`` gives: scales of the input, the weight and the gradient, the place in the rings, and from column BACK on their reciprocals, each at the head of four, for the
library reads a scale where 16 bytes begin."""
RECENT = 16
"""Calls whose geometric mean is what is usual."""
SLACK = 2.0**-10
"""A scale that is made of a magnitude may bring it this far beyond the greatest value, to which it rounds: no overflow."""
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def highest(dtype: torch.dtype) -> float:
    """The greatest finite value of an FP8 dtype."""
    return torch.finfo(dtype).max


def entered(state: Tensor, scale: Tensor, position: Tensor, amax: Tensor, hi: float) -> Tensor:
    """Rows of state (..., L) after a call that used ``scale`` (...) and whose largest magnitudes were ``amax`` (...), written at ``position`` (...) of the ring."""
    finite = torch.isfinite(amax)
    over = (~finite | (amax * scale > hi * (1 + SLACK))).float()
    column = torch.arange(state.shape[-1], device=state.device)
    out = torch.where(column == position[..., None] + RING, torch.where(finite, amax, 0.0)[..., None], state)
    out = torch.where(column == OVERFLOWS, state + over[..., None], out)
    out = torch.where(column == SCALE, scale[..., None], out)
    return torch.where(column == POSITION, position[..., None], out)


def usual(ring: Tensor, written: Tensor) -> Tensor:
    """Geometric mean of what the last ``RECENT`` calls entered in rings (..., n), of which ``written`` (...) is the last place; zeros are not counted, infinite where all are. Of gradients that are still to come, after several forwards, the places
    hold what was entered a whole ring ago."""
    age = torch.remainder(written[..., None] - torch.arange(ring.shape[-1], device=ring.device), ring.shape[-1])
    kept = (age < RECENT) & (ring > 0)
    mean = torch.where(kept, ring.clamp(min=TINY).log2(), 0.0).sum(-1) / kept.sum(-1).clamp(min=1)
    return torch.where(kept.any(-1), mean.exp2(), torch.inf)


def scales_reference(forward: Tensor, backward: Tensor, margin: int, reduce: bool, leap: int) -> Tensor:
    """``forward`` (S, 2, L), rows of the input and the weight of S linears, ``backward`` (S, 1, L), of the output's gradient -> (S, NUMBERS) float32: their three scales, this call's place in the rings, and the
    reciprocals of the scales, so that products read them where they are.

    ``reduce`` takes the maxima over all processes of the default group, where there is one: one collective for all linears. Each is limited by what is usual on its own process before.
    """
    both = torch.cat([forward, backward], 1)
    largest = both[..., RING:].amax(-1)
    largest = torch.minimum(largest, usual(both[..., RING:], forward[:, :1, POSITION]) * 2.0**leap) if leap else largest
    largest = compat.all_reduce(largest, "max") if reduce else largest
    hi = torch.where(torch.arange(3, device=forward.device) < 2, highest(E4M3), highest(E5M2))
    scale = torch.where(largest > 0, hi / largest.clamp(min=TINY) * 2.0**-margin, both[..., SCALE])
    position = torch.remainder(forward[:, :1, POSITION] + 1, forward.shape[-1] - RING)
    back = torch.where(torch.arange(BACK, device=forward.device) == 0, (1 / scale)[..., None], 0.0)
    return torch.cat([scale, position, back.flatten(1)], 1)


def scales_fake(forward: Tensor, backward: Tensor, margin: int, reduce: bool, leap: int) -> Tensor:
    """Shape and dtype of ``scales_reference``."""
    return forward.new_empty((forward.shape[0], NUMBERS))


SCALES = Op("fp8_scales", "(Tensor forward, Tensor backward, int margin, bool reduce, int leap) -> Tensor", scales_reference, scales_fake)


def record_reference(forward: Tensor, numbers: Tensor, amax: Sequence[Tensor]) -> Tensor:
    """``forward`` (S, 2, L) after a call: ``numbers`` (S, NUMBERS) as ``fp8_scales`` gave them, ``amax`` of each linear (2,), of its input and its weight."""
    return entered(forward, numbers[:, :2], numbers[:, 3:4].expand(-1, 2), torch.stack(list(amax)), highest(E4M3))


def record_fake(forward: Tensor, numbers: Tensor, amax: Sequence[Tensor]) -> Tensor:
    """Shape and dtype of ``record_reference``."""
    return torch.empty_like(forward)


RECORD = Op("fp8_record", "(Tensor forward, Tensor numbers, Tensor[] amax) -> Tensor", record_reference, record_fake)
