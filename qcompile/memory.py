"""Memory of weights: give the 16-bit storage back, bring it back, and say by hand that a weight changed.

A released parameter keeps its shape and dtype but only one element of storage: it reads as NaN, refuses writes, and cannot crash the process, which freed storage would.
``state_dict`` gives dequantized values for it, and ``load_state_dict`` gives it storage again first.
"""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from qcompile import compat
from qcompile.core.errors import WeightError
from qcompile.core.qtensor import dequantize
from qcompile.weights import TABLE


def refresh(model: nn.Module) -> int:
    """Pack all weights of ``model`` anew on its next call, after an edit that PyTorch cannot see (``p.data.mul_(2)``). Returns how many packed weights were marked."""
    return TABLE.forget(list(model.parameters()))


def release_weights(model: nn.Module) -> int:
    """Give back the 16-bit storage of every packed weight of ``model``; call the compiled model once before. Returns the bytes freed.

    Weights that some compiled graph still reads in 16 bits (an embedding tied to the head) are kept. Raises WeightError where nothing is packed.
    """
    parameters = list(model.named_parameters())
    packed = [(name, p) for name, p in parameters if (record := TABLE.get(p)) is not None and record.entries]
    if not packed:
        raise WeightError("none of the model's weights is packed yet: compile it with backend='qcompile' and call it once, then release")
    return sum(release(p, name) for name, p in packed)


def release(p: nn.Parameter, path: str) -> int:
    """Give back the storage of one packed parameter, unless something still reads it in 16 bits. Returns the bytes freed."""
    record = TABLE.get(p)
    if record is None or not record.entries:
        raise WeightError(f"{path} has not been packed: call the compiled model once before its weights are released")
    if record.released is not None or record.pinned or any("[" in how for _, how, _ in record.entries):
        return 0
    freed = p.nbytes
    record.released = p.dtype
    collapse(p)
    _guard_state_dict(p)
    return freed


def collapse(p: Tensor) -> None:
    """One NaN seen through every index."""
    with compat.no_dispatch_modes(), torch.no_grad():
        p.data = torch.full((1,), float("nan"), dtype=p.dtype, device=p.device).expand(p.shape)


def is_released(p: object) -> bool:
    """Whether the 16-bit value of this parameter was given back."""
    record = TABLE.get(p) if isinstance(p, Tensor) else None
    return record is not None and record.released is not None


def restored(p: Tensor) -> Tensor:
    """The value of a released parameter, dequantized, in its own dtype and shape; any other parameter as it is."""
    record = TABLE.get(p)
    if record is None or record.released is None:
        return p
    (_, how, _), entry = next(iter(record.entries.items()))
    value = dequantize(entry.qtensor(), record.released)
    return (value.transpose(-1, -2) if how == "t" else value).reshape(p.shape).to(p.device)


def revive(p: Tensor) -> None:
    """Give a released parameter storage again, filled with its dequantized value, so that it can be written to."""
    record = TABLE.get(p)
    if record is not None and record.released is not None:
        value = restored(p).contiguous()
        record.released = None
        p.data = value


def _guard_state_dict(p: nn.Parameter) -> None:
    """Hooks on the modules that own ``p``."""
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module) and any(q is p for q in module.__dict__.get("_parameters", {}).values()) and "_qcompile_guarded" not in module.__dict__:
            module.__dict__["_qcompile_guarded"] = True
            module._register_state_dict_hook(_dequantize_released)
            module.register_load_state_dict_pre_hook(_revive_released)


def _dequantize_released(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, p in module._parameters.items():
        if p is not None and prefix + name in state and is_released(p):
            state[prefix + name] = restored(p)


def _revive_released(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, p in module._parameters.items():
        if p is not None and prefix + name in state:
            revive(p)
