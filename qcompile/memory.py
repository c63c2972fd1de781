"""Memory of weights: give the 16-bit storage back, bring it back, and say by hand that a weight changed.

A released parameter keeps its shape and dtype but only one element of storage: it reads as NaN, and cannot crash the process, which freed storage would.
Torch refuses writes into it, but for ``fill_`` and ``zero_``, behind which the next call raises WeightError; ``p.data = t`` gives it a value again.
``state_dict`` gives dequantized values for it, ``copy.deepcopy`` and ``torch.save`` a whole parameter, and ``load_state_dict`` gives it storage again first.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompile.core.errors import WeightError
from qcompile.core.qtensor import dequantize
from qcompile.stored import Stored
from qcompile.weights import TABLE, Key, Record, state_of


def refresh(model: nn.Module) -> int:
    """Pack all weights of ``model`` anew on its next call, after an edit that PyTorch cannot see (``p.data.mul_(2)``). Returns how many packed weights were marked."""
    return TABLE.forget(list(model.parameters()))


def release_weights(model: nn.Module) -> int:
    """Give back the 16-bit storage of every packed weight of ``model``; call the compiled model once before. Returns the bytes freed.

    Weights that some compiled graph still reads in 16 bits (an embedding tied to the head) are kept, and stacked ones of which not all matrices are packed: ``explain`` notes why. Raises WeightError where nothing is packed.
    """
    parameters = list(model.named_parameters())
    packed = [(name, p) for name, p in parameters if (record := TABLE.get(p)) is not None and record.entries]
    if not packed:
        raise WeightError("none of the model's weights is packed yet: compile it with backend='qcompile' and call it once, then release")
    freed = sum(release(p, name) for name, p in packed)
    guard([p for _, p in packed])
    return freed


def restore_weights(model: nn.Module, rounded: bool = False) -> int:
    """Give every weight of ``model`` that was released, or is stored as codes (``qcompile.quantize``), 16-bit storage again, filled with its dequantized value: what adapters beside it were
    trained on, so that PEFT's ``merge_and_unload`` then merges into that, as bitsandbytes does.

    ``rounded`` overwrites packed weights that were not released with their dequantized values, too; else they keep their own. Returns the bytes of the weights that were filled.
    """
    filled = 0
    for module in list(model.modules()):
        for name, held in list(module.parametrizations.items()) if parametrize.is_parametrized(module) else ():  # type: ignore[union-attr, operator]
            if isinstance(held[0], Stored):
                parametrize.remove_parametrizations(module, name)
                value = getattr(module, name).detach()
                delattr(module, name)  # torch leaves a plain tensor there
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
                filled += value.nbytes
    for p in dict.fromkeys(model.parameters()):
        if is_released(p):
            revive(p)
        elif rounded and (record := TABLE.get(p)) is not None and _stands_for(p, record):
            with torch.no_grad():
                p.copy_(_value(p, record, p.dtype))
        else:
            continue
        filled += p.nbytes
    return filled


def _stands_for(p: Tensor, record: Record) -> bool:
    """What is packed is the value that the parameter has now, all of it."""
    states = [entry.state for key, entry in record.entries.items() if key[0] == "weight"]
    return bool(states) and set(states) == {state_of(p)} and not _missing(p, record)


def release(p: nn.Parameter, path: str) -> int:
    """Give back the storage of one packed parameter, unless something still reads it in 16 bits; ``guard`` it afterwards. Returns the bytes freed."""
    record = TABLE.get(p)
    if record is None or not record.entries:
        raise WeightError(f"{path} has not been packed: call the compiled model once before its weights are released")
    if is_released(p):
        return 0
    record.held = "; ".join(sorted(record.pinned)) or _missing(p, record)
    if record.held:
        return 0
    freed = p.nbytes
    TABLE.release(p)
    me = weakref.ref(p)
    p.__dict__.update(__deepcopy__=lambda memo: _copied(me(), memo), __reduce_ex__=lambda protocol: _whole(me()).__reduce_ex__(protocol))
    return freed


def held(parameters: Iterable[Tensor]) -> list[str]:
    """A line for each parameter that should have been released and was not: why, and the bytes."""
    found = [(record, p.nbytes) for p in parameters if (record := TABLE.get(p)) is not None and record.held and record.released is None]
    return [f"the 16-bit weight {record.path} ({nbytes} bytes) was not released: {record.held}" for record, nbytes in found]


def is_released(p: object) -> bool:
    """Whether the 16-bit value of this parameter was given back."""
    return isinstance(p, Tensor) and TABLE.is_released(p)


def restored(p: Tensor) -> Tensor:
    """The value of a released parameter, dequantized, in its own dtype and shape; any other parameter as it is."""
    record = TABLE.get(p)
    if record is None or record.released is None or not is_released(p):
        return p
    return _value(p, record, record.released)


def _value(p: Tensor, record: Record, dtype: torch.dtype) -> Tensor:
    """What the packed entries of a parameter mean, laid out as the parameter is."""
    keys = _keys(p, record)
    parts = [_dequantized(record, keys[None])] if None in keys else [_dequantized(record, keys[i]) for i in range(p.shape[0])]
    value = parts[0] if None in keys else torch.stack(parts)
    return value.to(dtype).reshape(p.shape).to(p.device)


def _keys(p: Tensor, record: Record) -> dict[int | None, Key]:
    """An entry for each of the stacked matrices that is packed by itself, and under None one for the whole parameter."""
    elements = {key: re.match(r"\[(-?\d+)\]", key[1]) for key in record.entries if key[0] == "weight"}
    return {int(found[1]) % p.shape[0] if found else None: key for key, found in reversed(elements.items())}


def _missing(p: Tensor, record: Record) -> str:
    """Why what is packed cannot stand for the whole parameter; "" where it can."""
    keys = _keys(p, record)
    return "" if None in keys or len(keys) == p.shape[0] else f"{len(keys)} of its {p.shape[0]} stacked matrices are packed; the others would be lost"


def _dequantized(record: Record, key: Key) -> Tensor:
    """The value of one packed entry, float32, laid out as the parameter is."""
    _, how, rest = key
    entry = record.entries[key]
    value = dequantize(entry.qtensor(), torch.float32)
    if (solution := entry.solution) is not None:
        solution = solution.to(value.device)
        value = value if solution.smooth is None else value / solution.smooth
        if ("columns", how, rest) in record.entries:
            columns = record.entries["columns", how, rest].tensors[0].float()
            value[..., solution.outliers] = columns if solution.smooth is None else columns / solution.smooth[solution.outliers]
    return value.transpose(-1, -2) if how.rpartition(".")[2] == "t" else value


def revive(p: Tensor) -> None:
    """Give a released parameter storage again, filled with its dequantized value, so that it can be written to."""
    record = TABLE.get(p)
    if record is not None and is_released(p):
        p.data = restored(p).contiguous()
        record.released = None


def _whole(p: Any) -> nn.Parameter:
    """A released parameter's value as a parameter of its own; one that was revived as it is, our two methods dropped."""
    if is_released(p):
        return nn.Parameter(restored(p), p.requires_grad)
    for name in ("__deepcopy__", "__reduce_ex__"):
        p.__dict__.pop(name, None)
    return p  # type: ignore[no-any-return]


def _copied(p: Any, memo: dict[int, Any]) -> Any:
    whole = _whole(p)
    memo[id(p)] = whole if whole is not p else type(p).__deepcopy__(p, memo)
    return memo[id(p)]


def guard(parameters: Collection[Tensor]) -> None:
    """Hooks for ``state_dict`` and ``load_state_dict`` on all live modules that own one of these parameters; one scan for all of them."""
    wanted = {id(p) for p in parameters}
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module) and "_qcompile_guarded" not in module.__dict__ and any(id(q) in wanted for q in module.__dict__.get("_parameters", {}).values()):
            module.__dict__["_qcompile_guarded"] = True
            module.register_state_dict_post_hook(_dequantize_released)
            module.register_load_state_dict_pre_hook(_revive_released)


def _dequantize_released(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, p in module._parameters.items():
        if p is not None and prefix + name in state and is_released(p):
            state[prefix + name] = restored(p)


def _revive_released(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, p in module._parameters.items():
        if p is not None and prefix + name in state:
            revive(p)
