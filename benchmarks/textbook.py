"""Quantization as the papers define it, simulated in float64 on eager models. It shares no code with qcompile: it is what qcompile is judged by.

A `Method` is a value: the grid of the weights, that of the activations, how weights are solved for, which vector divides the inputs. `quantize(model, method, batches)` gives the float64 model
in which every linear (but those named) is replaced by `Quantized`, whose weights and inputs lie on their grids; products are exact. Groups run along the columns of a weight and divide them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Dettmers et al. 2023 (QLoRA), appendix E
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
NF4 += (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4 = (-1.0, -2 / 3, -1 / 2, -1 / 3, -1 / 4, -1 / 6, -1 / 192, 0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)  # bitsandbytes
TABLES = {"nf4": NF4, "fp4": FP4}


@dataclass(frozen=True)
class Grid:
    """A number format and who shares a scale. ``kind``: int, float (``exp`` exponent bits), nf4 or fp4; ``group``: "tensor", "row" or columns; ``point``: with an integer zero point."""

    bits: int = 8
    group: str | int = "row"
    point: bool = False
    kind: str = "int"
    exp: int = 0

    @property
    def top(self) -> float:
        """Where a symmetric scale puts the absolute maximum."""
        if self.kind != "float":
            return 1.0 if self.kind in TABLES else 2.0 ** (self.bits - 1) - 1
        man = self.bits - 1 - self.exp
        lost = 1 if (self.exp, man) == (4, 3) else 0  # OCP E4M3 spends its last code on NaN: 448, not 480
        return (2 - 2.0**-man * (1 + lost)) * 2.0 ** (2**self.exp - 1 - (2 ** (self.exp - 1) - 1))

    def blocks(self, t: Tensor) -> Tensor:
        """``t`` (..., columns) as (lines, elements that share a scale)."""
        return t.reshape(-1, {"tensor": t.numel(), "row": t.shape[-1]}.get(str(self.group)) or int(self.group))

    def parameters(self, t: Tensor, shrink: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale and zero point in the shape of ``t``; ``shrink`` multiplies the range, one number for each line of ``blocks(t)`` or one for all."""
        lines = self.blocks(t)
        if self.point:
            low, high = shrink * lines.amin(1, True).clamp(max=0), shrink * lines.amax(1, True).clamp(min=0)
            scale = (high - low) / (2.0**self.bits - 1)
        else:
            low, scale = None, shrink * lines.abs().amax(1, True) / self.top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.zeros_like(scale) if low is None else (-low / scale).round()
        return scale.expand_as(lines).reshape(t.shape), zero.expand_as(lines).reshape(t.shape)

    def snap(self, t: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest values of the grid."""
        if self.kind == "int":
            low, high = (0, 2**self.bits - 1) if self.point else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
            return ((t / scale + zero).round().clamp(low, high) - zero) * scale
        if self.kind in TABLES:
            values = torch.tensor(TABLES[self.kind], dtype=t.dtype)
            return values[torch.bucketize(t / scale, (values[1:] + values[:-1]) / 2)] * scale
        u = (t / scale).clamp(-self.top, self.top)
        _, e = torch.frexp(u)  # u = m * 2**e with 0.5 <= m < 1
        step = torch.exp2((e - 1).clamp(min=1 - (2 ** (self.exp - 1) - 1)).to(t.dtype) - (self.bits - 1 - self.exp))
        return (u / step).round() * step * scale

    def round(self, t: Tensor) -> Tensor:
        """To the nearest value, ranges from absolute maxima (or minima and maxima)."""
        return self.snap(t, *self.parameters(t))


@dataclass(frozen=True)
class Method:
    """``solver``: "rtn" or "gptq". ``transform``: "", "smooth" or "awq"; ``alpha`` is SmoothQuant's; ``clip``: AWQ's search for a smaller range.
    ``static``: one range for each input, from the calibration; ``threshold``: columns of an input that reach it are kept out of the quantization (LLM.int8()), in every call anew, ``whole``:
    by a weight that was rounded once with them, as bitsandbytes does."""

    weight: Grid = field(default_factory=Grid)
    input: Grid | None = None
    solver: str = "rtn"
    transform: str = ""
    alpha: float = 0.5
    clip: bool = False
    static: bool = False
    threshold: float | None = None
    whole: bool = False
    order: bool = True

    @property
    def calibrates(self) -> bool:
        return self.solver != "rtn" or bool(self.transform) or self.clip or self.static


class Quantized(nn.Module):
    """A linear on its grids: ``Q_x(x / s) @ Q_w(w * s).T + b``. ``integer`` and ``total`` count the multiplications done in low precision and all."""

    def __init__(self, linear: nn.Linear, weight: Tensor, method: Method, s: Tensor | None = None, top: float | None = None) -> None:
        super().__init__()
        self.exact, self.weight, self.bias = linear.weight.data, weight, linear.bias
        self.method, self.s, self.top = method, s, top
        self.integer = self.total = 0

    def _input(self, x: Tensor) -> Tensor:
        grid = self.method.input
        if grid is None:
            return x
        if self.top is None:
            return grid.round(x)
        scale = torch.tensor(self.top / grid.top, dtype=x.dtype)
        return grid.snap(x, scale, torch.zeros_like(scale))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.s is None else x / self.s
        columns, work, threshold = x.shape[-1], x[..., 0].numel() * len(self.weight), self.method.threshold
        out = None if threshold is None else (x.abs() >= threshold).reshape(-1, columns).any(0)
        kept = 0 if out is None else int(out.sum())
        self.total += columns * work
        self.integer += 0 if self.method.input is None else (columns - kept) * work
        if out is None or not kept:
            return F.linear(self._input(x), self.weight, self.bias)
        inside = self.weight if self.method.whole else self.method.weight.round(torch.where(out, 0.0, self.exact))  # ranges of what is left, as in the paper
        return F.linear(self._input(torch.where(out, 0.0, x)), torch.where(out, 0.0, inside), self.bias) + F.linear(torch.where(out, x, 0.0), self.exact)


# --- statistics ------------------------------------------------------------------------------------------------------


class Statistics:
    """Of one input with K channels: greatest and mean magnitude of each, and the second moment, over the tokens seen so far."""

    def __init__(self) -> None:
        self.tokens = 0
        self.absmax = self._sum = self._gram = torch.zeros(())

    def add(self, x: Tensor) -> Statistics:
        x = x.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        self.absmax, self._sum, self._gram = torch.maximum(self.absmax.to(x), x.abs().amax(0)), self._sum + x.abs().sum(0), self._gram + x.T @ x
        return self

    @property
    def absmean(self) -> Tensor:
        return self._sum / self.tokens

    @property
    def h(self) -> Tensor:
        """E[x x^T], (K, K): GPTQ's Hessian up to a factor that cancels."""
        return self._gram / self.tokens


# --- transforms and solvers ------------------------------------------------------------------------------------------


def smooth(weights: Sequence[Tensor], stats: Statistics, alpha: float) -> Tensor:
    """Xiao et al. 2022, equation 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), over all linears that read X."""
    peak = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=1e-5)
    return (stats.absmax.clamp(min=1e-5) ** alpha / peak ** (1 - alpha)).clamp(min=1e-5)


def output_error(delta: Tensor, h: Tensor) -> float:
    """Mean over tokens of |delta x|^2."""
    return float(((delta @ h) * delta).sum())


def awq(weights: Sequence[Tensor], stats: Statistics, grid: Grid, points: int = 20) -> Tensor:
    """Lin et al. 2023, equation 5: s = mean|X|^r, r = 0, 1/20 ... 19/20 by the output's error under rounding; normalized by sqrt(max * min)."""
    best, found = float("inf"), torch.ones_like(stats.absmean)
    for i in range(points):
        s = stats.absmean.clamp(min=1e-4) ** (i / points)
        s = s / (s.max() * s.min()).sqrt()
        error = sum(output_error(grid.round(w * s) / s - w, stats.h) for w in weights)
        if error < best:
            best, found = error, s
    return found


def clip(w: Tensor, stats_h: Tensor, grid: Grid, steps: int = 10, finest: int = 20) -> Tensor:
    """AWQ's clip search: for each group of each row the range, 1 to 0.55 of the full one, of least error of that group's part of the output. Gives the factors, (lines, 1)."""
    n, k = w.shape
    size = k if grid.group == "row" else int(grid.group)
    grams = torch.stack([stats_h[i : i + size, i : i + size] for i in range(0, k, size)])  # (K / size, size, size)
    best = torch.full((n * (k // size), 1), float("inf"), dtype=w.dtype)
    factors = torch.ones_like(best)
    for i in range(steps):
        shrink = 1 - i / finest
        delta = (grid.snap(w, *grid.parameters(w, shrink)) - w).view(n, -1, size)
        error = (torch.einsum("ngi,gij->ngj", delta, grams) * delta).sum(-1).reshape(-1, 1)
        better = error < best
        best, factors = torch.where(better, error, best), torch.where(better, shrink, factors)
    return factors


def gptq(w: Tensor, h: Tensor, grid: Grid, shrink: Tensor | float = 1.0, order: bool = True, damping: float = 0.01, block: int = 128) -> Tensor:
    """Frantar et al. 2022, algorithm 1, with the groups' scales fixed beforehand, so that `order` (columns by falling diagonal of H) leaves groups as they are."""
    scale, zero = grid.parameters(w, shrink)
    w, h = w.clone(), h.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead], w[:, dead] = 1, 0
    by = torch.argsort(h.diagonal(), descending=True, stable=True) if order else torch.arange(len(h))
    w, scale, zero, h = w[:, by], scale[:, by], zero[:, by], h[by][:, by]
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.zeros(len(w), stop - start, dtype=w.dtype)
        for i in range(start, stop):
            q[:, i] = grid.snap(w[:, i], scale[:, i], zero[:, i])
            errors[:, i - start] = (w[:, i] - q[:, i]) / upper[i, i]  # spread over the columns to come
            w[:, i:stop] -= errors[:, i - start, None] * upper[i, i:stop]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return q[:, torch.argsort(by)]


# --- a model ---------------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The model's layers: its longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


class _Stop(Exception):
    """Enough of the model has run."""


def _first_inputs(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the first layer is called with, for each batch: the hidden states and the rest."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "attention_mask")  # BERT gives its mask by position
        given = {**dict(zip(names, args)), **kwargs}
        seen.append((given.pop("hidden_states"), given))
        raise _Stop

    handle = blocks_of(model)[0].register_forward_pre_hook(note, with_kwargs=True)
    for batch in batches:
        with contextlib.suppress(_Stop):
            model(**batch)
    handle.remove()
    return seen


def _run(block: nn.Module, hidden: Tensor, rest: dict[str, Any]) -> Tensor:
    out = block(hidden, **rest)
    return out if isinstance(out, Tensor) else out[0]


def _stages(block: nn.Module, hidden: Tensor, rest: dict[str, Any]) -> list[list[str]]:
    """Names of the linears of a block in the order of their calls; those that read the same tensor together."""
    calls: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for x, names in calls:
                if x is args[0]:
                    return names.append(name)
            calls.append((args[0], [name]))

        return hook

    handles = [m.register_forward_pre_hook(note(name)) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    _run(block, hidden, rest)
    for handle in handles:
        handle.remove()
    return [names for _, names in calls]


def _observe(block: nn.Module, names: Sequence[str], hidden: Sequence[Tensor], rest: Sequence[dict[str, Any]], stop: bool = False) -> tuple[dict[str, Statistics], list[Tensor]]:
    """Statistics of the inputs of the linears named, and what the block gives for each batch; with `stop` each run ends at the first of them."""
    found, outputs = {name: Statistics() for name in names}, []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[name].add(args[0])
            if stop:
                raise _Stop

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    for h, r in zip(hidden, rest):
        with contextlib.suppress(_Stop):
            outputs.append(_run(block, h, r))
    for handle in handles:
        handle.remove()
    return found, outputs


def _solve(linears: Sequence[tuple[str, nn.Linear]], method: Method, before: Statistics | None, now: Statistics | None) -> list[Quantized]:
    """The linears of one stage. `before`: statistics of their input in the exact model, from which ranges and transforms are found; `now`: of what the quantized layers before them produce, for GPTQ."""
    weights = [linear.weight.data for _, linear in linears]
    s, top = None, None
    if method.transform and before is not None:
        s = smooth(weights, before, method.alpha) if method.transform == "smooth" else awq(weights, before, method.weight)
    if method.static and before is not None:
        top = float((before.absmax if s is None else before.absmax / s).max())
    out = []
    for name, linear in linears:
        w = linear.weight.data if s is None else linear.weight.data * s
        shrink: Tensor | float = 1.0
        if method.clip and before is not None and not any(part in name for part in ("q_proj", "k_proj", "query", "key")):  # as AWQ: clipping these hurts attention
            shrink = clip(w, before.h if s is None else before.h / torch.outer(s, s), method.weight)
        if method.solver == "gptq" and now is not None:
            q = gptq(w, now.h if s is None else now.h / torch.outer(s, s), method.weight, shrink, method.order)
        else:
            q = method.weight.snap(w, *method.weight.parameters(w, shrink))
        out.append(Quantized(linear, q, method, s, top))
    return out


@torch.no_grad()
def quantize(model: nn.Module, method: Method, batches: Sequence[dict[str, Any]], skip: Callable[[str], bool] = lambda name: False) -> nn.Module:
    """A float64 copy of `model` with the linears of its layers quantized, layer by layer; what lies outside of the layers (embeddings, head) stays. `skip(name)` spares linears by their full name."""
    if method.threshold is not None and method.calibrates:
        raise ValueError(f"the split is of inputs and weights as they are, found with {method}")
    model = copy.deepcopy(model).double().eval()
    layers = blocks_of(model)
    prefix = next(name for name, m in model.named_modules() if m is layers)
    inputs = _first_inputs(model, batches if method.calibrates else batches[:1])
    exact, rest = [h for h, _ in inputs], [r for _, r in inputs]
    hidden = exact
    for i, block in enumerate(layers):
        stages = [[name for name in names if not skip(f"{prefix}.{i}.{name}")] for names in _stages(block, hidden[0], rest[0])]
        stages = [names for names in stages if names]
        before, exact = _observe(block, [names[0] for names in stages], exact, rest) if method.calibrates else ({}, exact)
        for names in stages:
            now = _observe(block, names[:1], hidden, rest, stop=True)[0][names[0]] if method.solver == "gptq" else None
            linears = [(name, cast(nn.Linear, block.get_submodule(name))) for name in names]
            for name, quantized in zip(names, _solve(linears, method, before.get(names[0]), now)):
                block.set_submodule(name, quantized)
        if method.solver == "gptq":
            hidden = [_run(block, h, r) for h, r in zip(hidden, rest)]
        elif i == 0:
            hidden = hidden[:1]  # any hidden states show the stages
    return model


def integer_share(model: nn.Module) -> float:
    """Of the multiplications of all quantized linears so far, those done in low precision."""
    found = [m for m in model.modules() if isinstance(m, Quantized)]
    return sum(m.integer for m in found) / max(sum(m.total for m in found), 1)
