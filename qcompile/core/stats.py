"""Statistics of activations: pure functions from rows of values to small states, one row of ``STATISTICS`` each.

A state is a dict of tensors. ``update`` takes rows ``x`` (T, K), T may be 0, in float16, bfloat16, float32 or float64; it may reuse the state's tensors and returns the state.
``merge`` is what one observer of everything would hold (up to the rounding of sums), except where a row says otherwise: "samples" and "moving" depend on order.
``rescale(state, s)`` is the state that ``x / s`` would have given, ``s`` (K,) positive, or None where the state does not tell.

Values have to be finite. ``update_all`` leaves rows out that are not, and ``check_finite`` counts them for the caller's report; a row's own ``update`` lets NaN through,
where it is seen, and "histogram", in which it would not be, raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import histogram
from .errors import OptionError, unknown
from .histogram import centres, magnitudes, pieces

State = dict[str, Tensor]
Stats = Mapping[str, State]
"""Statistic name -> its state, of one input with K channels."""
Device = torch.device | str

ROWS = 512
"""Rows that a sample keeps."""
AVERAGING = 0.1
"""Weight of the newest batch in a moving average (momentum 0.9). torch's observer has 0.01, which needs hundreds of batches to forget its first."""


@dataclass(frozen=True)
class Statistic:
    """One statistic. ``nbytes(k)`` is what the state of K channels holds at most."""

    name: str
    init: Callable[[int, Device], State]
    update: Callable[[State, Tensor], State]
    merge: Callable[[State, State], State]
    rescale: Callable[[State, Tensor], State | None]
    nbytes: Callable[[int], int]


def _unknown_after(state: State, s: Tensor) -> State | None:
    """``rescale`` of a statistic over all channels together: dividing each by its own factor cannot be undone from the whole."""
    return None


def _sum(a: State, b: State) -> State:
    return {key: a[key] + b[key] for key in a}


def _zeros(shape: tuple[int, ...], device: Device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, device=device, dtype=dtype)  # whatever the default dtype is while a model is loaded


# absmax, minmax: per channel, exact.


def _divided(state: State, s: Tensor) -> State:
    return {key: t / s.float() for key, t in state.items()}


def _absmax_update(state: State, x: Tensor) -> State:
    if len(x):
        lo, hi = torch.aminmax(x, dim=0)
        state["absmax"] = torch.maximum(state["absmax"], torch.maximum(-lo, hi).float())
    return state


def _absmax_merge(a: State, b: State) -> State:
    return {"absmax": torch.maximum(a["absmax"], b["absmax"])}


def _minmax_init(k: int, device: Device) -> State:
    return {"lo": _zeros((k,), device) + float("inf"), "hi": _zeros((k,), device) - float("inf")}


def _minmax_update(state: State, x: Tensor) -> State:
    if not len(x):
        return state
    lo, hi = torch.aminmax(x, dim=0)
    return _minmax_merge(state, {"lo": lo.float(), "hi": hi.float()})


def _minmax_merge(a: State, b: State) -> State:
    return {"lo": torch.minimum(a["lo"], b["lo"]), "hi": torch.maximum(a["hi"], b["hi"])}


# moments: count, sum x, sum |x|, sum x^2 per channel, float64.


def _moments_init(k: int, device: Device) -> State:
    return {"count": _zeros((), device, torch.float64), **{key: _zeros((k,), device, torch.float64) for key in ("sum", "abs", "square")}}


def _moments_update(state: State, x: Tensor) -> State:
    state["count"] += len(x)
    for piece in map(Tensor.double, pieces(x)):
        state["sum"] += piece.sum(0)
        state["abs"] += piece.abs().sum(0)
        state["square"] += (piece * piece).sum(0)
    return state


def _moments_rescale(state: State, s: Tensor) -> State:
    d = s.double()
    return {"count": state["count"].clone(), "sum": state["sum"] / d, "abs": state["abs"] / d, "square": state["square"] / (d * d)}


# hessian: sum of x x^T.


def _hessian_init(k: int, device: Device) -> State:
    return {"sum": _zeros((k, k), device), "count": _zeros((), device, torch.float64)}


def _hessian_update(state: State, x: Tensor) -> State:
    """Products of 16-bit values are exact in float32. Sums are float32, on float64 values float64."""
    state["count"] += len(x)
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        state["sum"] += torch.mm(x.T, x, out_dtype=torch.float32)
        return state
    if x.dtype == torch.float64:
        state["sum"] = state["sum"].double()
    for piece in pieces(x):
        rows = piece.to(state["sum"].dtype)
        state["sum"].addmm_(rows.T, rows)
    return state


def _hessian_rescale(state: State, s: Tensor) -> State:
    d = s.to(state["sum"].dtype)
    return {"sum": state["sum"] / d / d[:, None], "count": state["count"].clone()}


# samples: rows from everywhere, equally likely.


def _samples_init(k: int, device: Device) -> State:
    return {"rows": _zeros((0, k), device), "seen": _zeros((), device, torch.int64)}


def _hash(i: Tensor) -> Tensor:
    """63 bits that look random, of int64 numbers: splitmix64 (Steele, Lea, Flood 2014), whose products wrap, as int64's do on every device."""

    def right(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = i * (0x9E3779B97F4A7C15 - 2**64) + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ right(z, 27)) * (0x94D049BB133111EB - 2**64)
    return right(z ^ right(z, 31), 1)


def _samples_update(state: State, x: Tensor) -> State:
    """Vitter's algorithm R (1985) with a hash of the row's number for a coin: row i takes slot ``hash(i) mod (i + 1)`` if that is below ROWS; the last one to come stays."""
    seen, rows = state["seen"], state["rows"]
    i = torch.arange(len(x), device=x.device) + seen
    slot = torch.where(i < ROWS, i, _hash(i) % (i + 1))
    last = torch.full((ROWS,), -1, device=x.device)
    taken = slot < ROWS
    last.scatter_reduce_(0, slot[taken], torch.arange(len(x), device=x.device)[taken], "amax")
    size = min(ROWS, len(rows) + len(x))
    rows = torch.cat([rows, rows.new_zeros(size - len(rows), rows.shape[1])])
    written = last[:size] >= 0
    rows[written] = x[last[:size][written]].float()
    return {"rows": rows, "seen": seen + len(x)}


def _samples_merge(a: State, b: State) -> State:
    """ROWS rows, of each as many as its share of all rows seen, drawn by hash; fair to every row, but not the rows that one observer would hold."""
    seen = a["seen"] + b["seen"]
    total, of_a = int(seen), int(a["seen"])
    if total <= ROWS:
        return {"rows": torch.cat([a["rows"], b["rows"]]), "seen": seen}
    from_a = (2 * ROWS * of_a + total) // (2 * total)  # rounded; at most what a holds, since total > ROWS
    kept = [_drawn(a["rows"], from_a, total), _drawn(b["rows"], ROWS - from_a, total + 1)]
    return {"rows": torch.cat(kept), "seen": seen}


def _drawn(rows: Tensor, n: int, seed: int) -> Tensor:
    """``n`` of the rows, in their order."""
    order = _hash(torch.arange(len(rows), device=rows.device) + (seed << 20)).argsort()
    return rows[order[:n].sort().values]


def _samples_rescale(state: State, s: Tensor) -> State:
    return {"rows": state["rows"] / s.float(), "seen": state["seen"].clone()}


# moving: range of the whole tensor, averaged over batches.


def _moving_init(k: int, device: Device) -> State:
    return {"lo": _zeros((), device), "hi": _zeros((), device), "batches": _zeros((), device, torch.int64)}


def _moving_update(state: State, x: Tensor) -> State:
    """Exponential moving average of each batch's least and greatest value; one call is one batch, the first is taken as it is."""
    if not len(x):
        return state
    weight = torch.where(state["batches"] == 0, 1.0, AVERAGING)
    lo, hi = torch.aminmax(x)
    return {"lo": torch.lerp(state["lo"], lo.float(), weight), "hi": torch.lerp(state["hi"], hi.float(), weight), "batches": state["batches"] + 1}


def _moving_merge(a: State, b: State) -> State:
    """Mean of both, weighted by batches: an approximation, for which came first is not known."""
    batches = a["batches"] + b["batches"]
    share = (b["batches"] / batches.clamp(min=1)).float()
    return {"lo": torch.lerp(a["lo"], b["lo"], share), "hi": torch.lerp(a["hi"], b["hi"], share), "batches": batches}


_ROWS = (
    Statistic("absmax", lambda k, device: {"absmax": _zeros((k,), device)}, _absmax_update, _absmax_merge, _divided, lambda k: 4 * k),
    Statistic("minmax", _minmax_init, _minmax_update, _minmax_merge, _divided, lambda k: 8 * k),
    Statistic("moments", _moments_init, _moments_update, _sum, _moments_rescale, lambda k: 24 * k + 8),
    Statistic("histogram", histogram.init, histogram.update, histogram.merge, _unknown_after, lambda k: 16 * histogram.BINS + 4),
    Statistic("hessian", _hessian_init, _hessian_update, _sum, _hessian_rescale, lambda k: 4 * k * k + 8),
    Statistic("samples", _samples_init, _samples_update, _samples_merge, _samples_rescale, lambda k: 4 * ROWS * k + 8),
    Statistic("moving", _moving_init, _moving_update, _moving_merge, _unknown_after, lambda k: 16),
)
STATISTICS: dict[str, Statistic] = {row.name: row for row in _ROWS}


def _find(name: str) -> Statistic:
    if name not in STATISTICS:
        raise unknown("statistic", name, STATISTICS)
    return STATISTICS[name]


def check_finite(x: Tensor) -> int:
    """How many values are NaN or infinite."""
    return int(x.numel() - torch.isfinite(x).sum())


def new(names: Iterable[str], k: int, device: Device = "cpu") -> dict[str, State]:
    """Empty states of an input with ``k`` channels. Raises OptionError on a name that is in no row."""
    return {name: _find(name).init(k, device) for name in names}


def update_all(stats: Stats, x: Tensor, names: Iterable[str] | None = None) -> dict[str, State]:
    """Every state of ``stats`` (or those of ``names``, begun here where ``stats`` lacks them) with the rows of ``x`` (..., K) added; rows with a value that is not finite are left out.

    Other states are handed on. The given states must not be used afterwards. Raises OptionError on an unknown name and where K is not what a state has.
    """
    x = x.detach().reshape(-1, x.shape[-1])
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        x = x[finite]
    out = dict(stats)
    for name in list(stats) if names is None else list(names):
        row = _find(name)
        state = out[name] if name in out else row.init(x.shape[1], x.device)
        width = next((t.shape[-1] for key, t in state.items() if t.dim() and key != "counts"), x.shape[1])
        if width != x.shape[1]:
            raise OptionError(f"statistic {name!r} holds {width} channels and was given rows of {x.shape[1]}: each input needs statistics of its own")
        out[name] = row.update(state, x)
    return out


def merge_all(a: Stats, b: Stats) -> dict[str, State]:
    """Both together. One without any statistic (an input that was never reached) adds nothing; raises OptionError where one has a statistic that the other lacks."""
    if not a or not b:
        return dict(a or b)
    if set(a) != set(b):
        raise OptionError(f"statistics of one input cannot be merged: one side has {sorted(a)}, the other {sorted(b)}; collect the same on both")
    return {name: _find(name).merge(a[name], b[name]) for name in a}


def rescale_all(stats: Stats, s: Tensor) -> dict[str, State]:
    """Statistics of ``x / s``, ``s`` (K,) positive; those that do not tell are dropped."""
    scaled = {name: _find(name).rescale(state, s) for name, state in stats.items()}
    return {name: state for name, state in scaled.items() if state is not None}


def tokens(stats: Stats) -> int | None:
    """Rows seen; None where no statistic counts them ("absmax", "minmax", "moving" and, as it does not know K, a "histogram" alone)."""
    counted = (("moments", "count"), ("hessian", "count"), ("samples", "seen"))
    return next((int(stats[name][key]) for name, key in counted if name in stats), None)


def to_tensors(stats: Stats, prefix: str = "") -> dict[str, Tensor]:
    """``prefix + "<statistic>.<key>"`` -> contiguous tensor, for safetensors."""
    return {f"{prefix}{name}.{key}": t.contiguous() for name, state in stats.items() for key, t in state.items()}


def from_tensors(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, State]:
    """Inverse of ``to_tensors``; what lies elsewhere or deeper under ``prefix`` is not looked at. Raises OptionError on a statistic that is unknown or lacks a tensor."""
    out: dict[str, State] = {}
    for path, t in tensors.items():
        parts = path.removeprefix(prefix).split(".")
        if path.startswith(prefix) and len(parts) == 2:
            out.setdefault(parts[0], {})[parts[1]] = t
    for name, state in out.items():
        expected = set(_find(name).init(1, "cpu"))
        if set(state) != expected:
            raise OptionError(f"statistic {prefix + name!r} has the tensors {sorted(state)} and needs {sorted(expected)}; the file is not whole, or of another version")
    return out


__all__ = [
    "AVERAGING", "ROWS", "STATISTICS", "State", "Statistic", "Stats", "centres", "check_finite", "from_tensors", "magnitudes", "merge_all", "new", "rescale_all",
    "to_tensors", "tokens", "update_all",
]  # fmt: skip
