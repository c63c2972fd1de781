"""AdamW whose state takes 3 bytes for each weight, and 5 with master weights: FP8-LM's optimizer (Peng et al. 2023, arXiv 2310.18313, section 2.2).

    first moment     FP8 (E4M3), one scale for the tensor          1 byte
    second moment    FP16, one scale for the tensor                2 bytes
    master weights   FP16, one scale for the tensor                2 bytes, for parameters of less than 32 bits

torch.optim.AdamW keeps 8, and 12 with masters in float32. All arithmetic is in float32, and a step moves the weights by the moments before they are rounded, as in the paper's code (MS-AMP).

What rounding to nearest loses, as the paper does it, and where this departs from it:

 * E4M3 has 3 bits of mantissa, so that a moment of its kind, ``beta1 * m + (1 - beta1) * g``, may round back to what it was. Where it grows, it ends short (under a constant gradient at 0.75
   of it, for beta1 = 0.9). Where it should decay, it would stand still for ever (for beta1 = 0.9 in the four least codes, for beta1 = 0.95 nearly everywhere), and drag weights along that get no
   gradient any more, such as rows of an embedding. So here a moment that no gradient holds up (the gradient is zero, or points the other way) and that would be stored as what it was takes the
   next code towards zero.
 * A second moment that is not zero is not stored as zero: dividing by eps alone would throw the weight away.
 * FP16 has 11 bits of significand at every scale, which beta2 up to 0.9995 can follow. A master weight takes up changes above 2**-12 of itself. The scale keeps these 11 bits for weights of any
   size, where plain FP16 has them above 6e-5 only. Updates that are smaller still, as at the end of a long schedule, want ``master="fp32"`` (7 bytes). There is no stochastic rounding, as there is
   none in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qcompile.core.errors import OptionError, TrainingError, unknown
from qcompile.core.formats import FORMATS

from .scaling import cast, greatest, round_to_dtype, scale_for
from .sharded import local_of, maximum_over_shards, sharded_like

E4M3 = FORMATS["e4m3"].dtype
E4M3_MAX = FORMATS["e4m3"].hi
FP16_MAX = 65504.0
FP16_LEAST = 2.0**-24
MASTERS = {"fp16": torch.float16, "fp32": torch.float32, "none": None}
"""What ``master`` may say: the dtype of the copy that small updates add up in, for parameters of less than 32 bits."""


class Wide(NamedTuple):
    """Moments and weights after a step, not yet rounded; ``maxima`` (4,): 1 where something is not finite, and the largest magnitudes of the three."""

    m: Tensor
    v: Tensor
    w: Tensor
    maxima: Tensor


class Rates(NamedTuple):
    """Options of a parameter group, as numbers."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


def advance(param: Tensor, grad: Tensor, state: dict[str, Tensor], rates: Rates) -> Wide:
    """One step of AdamW in float32 (float64 for such weights). Reads the master where there is one, unless ``param`` was changed by somebody else since: then those values are taken."""
    g = -grad.float() if rates.maximize else grad.float()
    m = rates.beta1 * (state["exp_avg"].float() * state["exp_avg_scale"]) + (1 - rates.beta1) * g
    v = rates.beta2 * (state["exp_avg_sq"].float() * state["exp_avg_sq_scale"]) + (1 - rates.beta2) * g.square()
    v = v.clamp(max=torch.finfo(torch.float32).max)
    step = state["step"] + 1
    correction1, correction2 = (-torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step) for beta in (rates.beta1, rates.beta2))
    w = param if param.dtype == torch.float64 else param.float()
    if "master" in state:
        master = state["master"].float() * state["master_scale"]
        w = torch.where(round_to_dtype(master, param.dtype) == w, master, w)
    w = w * (1 - rates.lr * rates.weight_decay) - rates.lr * (m / correction1) / ((v / correction2).sqrt() + rates.eps)
    bad = ~(g.isfinite().all() & w.isfinite().all())
    return Wide(m, v, w, torch.stack([bad.float(), greatest(m), greatest(v), greatest(w)]))


def store(param: Tensor, state: dict[str, Tensor], new: Wide, beta1: float) -> dict[str, Tensor]:
    """State and parameter ("param") after the step, rounded; as they were, but for the count of skipped steps, where something was not finite. FP8 codes as uint8."""
    good = new.maxima[0] == 0
    out = {"step": state["step"] + good, "skipped": state["skipped"] + ~good}
    out["exp_avg_scale"] = scale_for(new.maxima[1], E4M3_MAX)
    out["exp_avg"] = first_moment(new.m, out["exp_avg_scale"], state["exp_avg"].float() * state["exp_avg_scale"], beta1)
    out["exp_avg_sq_scale"] = scale_for(new.maxima[2], FP16_MAX)
    half = (new.v / out["exp_avg_sq_scale"]).half()
    out["exp_avg_sq"] = torch.where(new.v > 0, half.clamp(min=FP16_LEAST), half)
    w = new.w
    if "master" in state:
        full = state["master"].dtype == torch.float32
        out["master_scale"] = torch.ones_like(state["master_scale"]) if full else scale_for(new.maxima[3], FP16_MAX)
        w = round_to_dtype(w / out["master_scale"], state["master"].dtype)
        out["master"], w = w.to(state["master"].dtype), w * out["master_scale"]
    out["param"] = cast(w, param.dtype)
    before = {**state, "param": param}
    return {name: value if name in ("step", "skipped") else torch.where(good, _bytes(value), _bytes(before[name])) for name, value in out.items()}


def first_moment(m: Tensor, scale: Tensor, before: Tensor, beta1: float) -> Tensor:
    """E4M3 codes of ``m`` as uint8, nearest; but one code less where no gradient holds the moment up and it would be stored as what it was, ``before`` (both float32)."""
    codes = (m / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    stuck = (codes.float() * scale == before) & (m.abs() <= (beta1 * before).abs()) & (before != 0)
    return codes.view(torch.uint8) - stuck.to(torch.uint8)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x


def whole(param: Tensor, grad: Tensor, state: dict[str, Tensor], rates: Rates) -> dict[str, Tensor]:
    """The step of one tensor: new state and parameter from old ones, gradient and options. Pure; compiles as one graph."""
    return store(param, state, advance(param, grad, state, rates), rates.beta1)


class FP8AdamW(torch.optim.Optimizer):
    """AdamW with 8- and 16-bit state; options as of torch.optim.AdamW, and:

    ``master``: "fp16" (with a scale), "fp32" or "none" for parameters of less than 32 bits. float32 parameters are their own master, and with "none" every parameter is.
    ``compile``: run the step of each tensor through Inductor, one graph for all shapes.

    A step in which a tensor's gradient (or its new value) is not finite leaves that tensor and its state alone and is counted: ``optimizer.skipped``. Parameters may be bfloat16, float16,
    float32, float64, FP8, or sharded by FSDP2 (then scales are those of the whole tensor). What others write into a parameter between two steps is seen, master or not.
    Raises OptionError for options, TrainingError for sparse gradients, complex parameters and the state of another optimizer.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
        *, master: Literal["fp16", "fp32", "none"] = "fp16", maximize: bool = False, compile: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, master=master, maximize=maximize))
        self._compiles = compile
        self._prepare()

    def _prepare(self) -> None:
        make: Callable[[Any], Any] = (lambda f: torch.compile(f, fullgraph=True, dynamic=True)) if self._compiles else (lambda f: f)
        self._advance, self._store, self._whole = make(advance), make(store), make(whole)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every optimizer; options are checked here."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["master"] not in MASTERS:
            raise unknown("master", group["master"], MASTERS, "FP8AdamW")
        for name, value in (("lr", group["lr"]), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
            if not isinstance(value, Tensor) and not 0 <= value < math.inf:
                raise OptionError(f"FP8AdamW: {name}={value!r}; give a finite number of 0 or more")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise OptionError(f"FP8AdamW: betas={group['betas']!r}; give two numbers from 0 to below 1")
        for i, p in enumerate(group["params"]):
            if not p.is_floating_point():
                raise TrainingError(f"FP8AdamW: parameter {i} of group {len(self.param_groups) - 1}, of shape {tuple(p.shape)}, is {p.dtype}; only real floating point parameters are optimized")

    @property
    def skipped(self) -> int:
        """Steps of tensors that were left out because a gradient or a new weight was not finite. Waits for the device."""
        counts = [state["skipped"] for state in self.state.values() if "skipped" in state]
        return sum(int(count) for count in counts)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the value of ``closure``, which is called with gradients enabled, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rates = Rates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse or p.grad.layout != torch.strided:
                    raise TrainingError(
                        f"FP8AdamW: the gradient of a parameter of shape {tuple(p.shape)} is sparse ({p.grad.layout}); build its embedding with sparse=False, or give it to another optimizer"
                    )
                if not self.state[p]:
                    self.state[p].update(_fresh(p, group["master"]))
                self._update(p, p.grad, rates)
        return loss

    def _update(self, p: Tensor, grad: Tensor, rates: Rates) -> None:
        """The step of one tensor, written into its state and itself."""
        state = self.state[p]
        target, given = local_of(p), {name: local_of(value) for name, value in state.items()}
        flat = {name: value.reshape(-1) if value.dim() else value for name, value in given.items()}
        param, grad = target.reshape(-1), local_of(grad).reshape(-1)
        if target is p:
            if not p.numel():
                return
            new = self._whole(param, grad, flat, rates)
        else:
            wide = self._advance(param, grad, flat, rates)
            new = self._store(param, flat, wide._replace(maxima=maximum_over_shards(wide.maxima, p)), rates.beta1)
        for name, value in new.items():
            into = target if name == "param" else given[name]
            into.copy_(value.view(into.dtype).view(into.shape) if into.dtype.itemsize == 1 else value.view(into.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer, but that state keeps its dtypes (torch would cast it to the parameter's) and is copied. Raises TrainingError for the state of another optimizer."""
        handle = self.register_load_state_dict_pre_hook(_kept)  # after everybody else's
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiles": self._compiles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what ``load_state_dict`` ends in."""
        for group in state["param_groups"]:
            for p in group["params"]:
                values = state["state"].get(p, {})
                values.update({name: value.tensor.detach().to(device=p.device, copy=True) for name, value in values.items() if isinstance(value, _Kept)})
                _check(p, values, group.get("master"))
        super().__setstate__(state)
        if "_whole" not in vars(self):
            self._prepare()


class _Kept:
    """A tensor that torch's ``load_state_dict`` hands through as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _kept(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": {key: {name: _Kept(torch.as_tensor(value)) for name, value in values.items()} for key, values in state_dict["state"].items()}}


def _dtypes(p: Tensor, master: str) -> dict[str, torch.dtype]:
    """What the state of a parameter consists of. Scales and counts are scalars, the rest is of the parameter's shape."""
    one = torch.float32
    dtypes = {"step": one, "skipped": torch.int64, "exp_avg": E4M3, "exp_avg_scale": one, "exp_avg_sq": torch.float16, "exp_avg_sq_scale": one}
    copy = MASTERS[master]
    return {**dtypes, "master": copy, "master_scale": one} if copy is not None and p.dtype.itemsize < 4 else dtypes


def _fresh(p: Tensor, master: str) -> dict[str, Tensor]:
    """State before the first step."""
    state = {}
    for name, dtype in _dtypes(p, master).items():
        large = name in ("exp_avg", "exp_avg_sq", "master")
        state[name] = sharded_like(p, dtype) if large else torch.full((), float(name.endswith("scale")), dtype=dtype, device=p.device)
    return state


def _check(p: Tensor, values: dict[str, Any], master: str | None) -> None:
    """Raises TrainingError where ``values`` are not what this optimizer keeps for ``p``."""
    if not values:
        return
    wanted = _dtypes(p, master) if master in MASTERS else {}
    found = {name: getattr(value, "dtype", type(value)) for name, value in values.items()}
    if found != wanted:
        raise TrainingError(f"FP8AdamW: the state to load for a parameter of shape {tuple(p.shape)}, {p.dtype}, has {found}; wanted is {wanted or 'a group with master='}. It is not this optimizer's")
