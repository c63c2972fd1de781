"""What can go wrong, said once: an error names what was found, where, and what exists instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class QcompileError(Exception):
    """Base of every error that qcompile raises on purpose."""


class OptionError(QcompileError, ValueError):
    """An option, recipe, scheme or format that does not exist or does not fit."""


class WeightError(QcompileError, ValueError):
    """A parameter that cannot be quantized; the message names it."""


class CalibrationError(QcompileError, ValueError):
    """Calibration data, or statistics taken earlier, that cannot serve this model; the message names the first place where they do not."""


class TrainingError(QcompileError, ValueError):
    """Outputs, labels, gradients or processes of a training loop that do not fit together; the message says which."""


class PassError(QcompileError, RuntimeError):
    """A pass failed; the message names the pass and what ran before it."""


class StrictError(QcompileError, RuntimeError):
    """Under ``strict``: a linear without a kernel, no C++ compiler, or a collapse that the accuracy gate finds."""


class QcompileWarning(UserWarning):
    """Something a user should know once: emulation, a fallback, a rule that matched nothing."""


@dataclass(frozen=True)
class Skip:
    """A refusal as a value: why a linear is left alone or a kernel does not apply. Printed in the report, never swallowed."""

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason


def unknown(kind: str, name: object, known: Iterable[str], where: str = "") -> OptionError:
    """The error for a name that is in no table: lists the table and the nearest spelling."""
    known = list(known)
    near = difflib.get_close_matches(str(name).lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    hint = next((f" Did you mean {k!r}?" for k in known if near and k.lower() == near[0]), "")
    place = f" in {where}" if where else ""
    return OptionError(f"unknown {kind} {name!r}{place}.{hint} Known: {', '.join(known)}.")
