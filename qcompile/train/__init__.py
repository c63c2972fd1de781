"""Training through the same backend: ``torch.compile(model, backend="qcompile", options={"recipe": ..., "train": "qat"})`` in an ordinary loop.

``parameters`` gives the optimizer what estimators learn, ``state_dict`` and ``load_state_dict`` make it resumable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qcompile.core.errors import OptionError
from qcompile.missed import module_of
from qcompile.trained import STATE
from qcompile.trained import load_state_dict as _load
from qcompile.trained import state_dict as _state


def _module(fast: Any) -> nn.Module:
    module = module_of(fast)
    if module is None:
        raise OptionError(f"training state belongs to a module: give what torch.compile(model, backend='qcompile') returned, or the model, not {type(fast).__name__}")
    return module


def named_parameters(fast: Any) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of what estimators learn for a model, compiled or not: ``layers.0.up_proj.weight.step``. Empty where nothing is learned.

    Raises OptionError where no training graph of the model ran yet: what is learned is made by the first call under grad mode.
    """
    module = _module(fast)
    found = list(STATE.named(module))
    if not STATE.knows(module):
        raise OptionError("nothing is learned for this model yet: call it once under grad mode, fast(**batch), then give qcompile.parameters(fast) to the optimizer. (train='lora' learns nothing beside the model: give the optimizer the model's parameters that require grad)")
    return [(name, p) for name, p in found if isinstance(p, nn.Parameter)]


def parameters(fast: Any) -> list[nn.Parameter]:
    """What estimators learn, for the optimizer: ``AdamW([{"params": model.parameters()}, {"params": qcompile.parameters(fast), "weight_decay": 0.0}])``. See ``named_parameters``."""
    return [p for _, p in named_parameters(fast)]


def overflows(fast: Any) -> dict[str, dict[str, int]]:
    """Name of a weight -> role ("input", "weight", "gradient") -> calls in which FP8 training with delayed scaling met values beyond its scale, inf or NaN; what met none is left out."""
    found = {name: {role: n for role, n in STATE.overflows(p).items() if n} for name, p in _module(fast).named_parameters()}
    return {name.replace("_orig_mod.", ""): counts for name, counts in found.items() if counts}


def state_dict(fast: Any) -> dict[str, Tensor]:
    """Name -> tensor of all that training keeps beside the model (learned numbers, ranges, histories), to be saved beside ``model.state_dict()``."""
    return _state(_module(fast))


def load_state_dict(fast: Any, state: Mapping[str, Tensor]) -> None:
    """Give a model, compiled or not, what ``state_dict`` gave; see ``qcompile.trained``."""
    _load(_module(fast), state)


def repaired(fast: Any) -> dict[str, int]:
    """How many learned numbers an optimizer's step made zero, negative, infinite or NaN so far, which got their last healthy values back, by the name of what was learned; empty where none did."""
    return STATE.repaired(_module(fast))


__all__ = ["load_state_dict", "named_parameters", "overflows", "parameters", "repaired", "state_dict"]
