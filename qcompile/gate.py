"""The accuracy gate: what a calibration measured, judged. A model that was quantized to gibberish is never handed back in silence.

Three rules, each with its reason beside its number: the model's output, a linear far below its peers, and values that are not finite. A finding names linears and the likely remedy, which is read
off what was done to them: schemes, methods, and how far the largest channel of their input stands out.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.core.errors import QcompileWarning, StrictError
from qcompile.core.recipe import Choice
from qcompile.passes import SOLVERS, TRANSFORMS
from qcompile.quality import Quality
from qcompile.replay import Unit
from qcompile.sequence import Outcome, Solved, solution_key
from qcompile.weights import TABLE

MODEL_DB = 10.0
"""SQNR of a model's output below which it has collapsed: a tenth of the output's energy is noise. Useful 4-bit models lie above (GPTQ on a small encoder 14 dB), per-tensor W8A8 on inputs with outliers below 3 dB."""
MODEL_KL = 0.5
"""Mean KL divergence of next-token distributions, in nats, from which a language model has collapsed: perplexity grows by up to e^0.5, 1.6 times. Textbook W4 stays under 0.02."""
PEERS_DB = 15.0
"""A linear this far under the median of those with the same schemes has 30 times the noise of each of them: it alone outweighs a model's worth of layers."""
HARMLESS_DB = 20.0
"""A linear above this is no finding, wherever its peers are: less than a hundredth of its output's energy is noise."""
PEERS = 4
"""Fewer linears of the same schemes have no median to speak of."""
OUTLYING = 8.0
"""The largest channel of an input over the median one, from which its outliers are to blame: three of eight bits serve that channel alone. 512 Gaussian rows give less than 2."""
NAMED = 4
"""Linears that a finding lists; how many more there are is said."""


@dataclass(frozen=True)
class Finding:
    """``sites``: names of linears, the worst first; what was measured; what is likely to help."""

    sites: tuple[str, ...]
    measured: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.measured}. {self.remedy}"


def verdict(outcome: Outcome) -> list[Finding]:
    """What is wrong with a quantized model, the model's output first; empty where nothing is."""
    broken, low = _broken(outcome.solved), _below_peers(outcome.solved)
    whole = _model(outcome.quality)
    found = []
    if whole:
        suspects = broken or low or _lowest(outcome.solved)
        worst = f"; the worst linears are {_listed(suspects)}" if suspects else ""
        found.append(_finding(suspects, f"the model's output has collapsed: {whole}{worst}", "keep in 16 bits what costs most: qcompile.sensitivity(model, recipe, data).ignore(4)"))
    if broken:
        found.append(_finding(broken, f"outputs that are NaN or infinite: {_listed(broken)}", _ignore(broken)))
    if low:
        found.append(_finding(low, f"linears far below their peers: {_listed(low, _median(outcome.solved))}", _ignore(low)))
    return found


def enforce(outcome: Outcome, strict: bool, units: Sequence[Unit] = (), stacklevel: int = 3) -> None:
    """Warn of what ``verdict`` finds. Under ``strict`` raises StrictError instead, and the units' solutions are dropped: the model is as it was, and is judged again when it is called."""
    findings = verdict(outcome)
    if not findings:
        return
    text = "qcompile: " + " Also: ".join(map(str, findings))
    if not strict:
        warnings.warn(text, QcompileWarning, stacklevel=stacklevel)
        return
    for unit in units:
        for site in unit.sites.values():
            choice, record = unit.plan.get(site.name), TABLE.get(unit.parameter(site))
            if record is not None and isinstance(choice, Choice):
                record.solutions.pop(solution_key(site, choice), None)
    raise StrictError(text)


# --- rules -------------------------------------------------------------------------------------------------------------


def _model(quality: Quality) -> str:
    """What is wrong with the output of the whole model, in words; empty where nothing is, or nothing was measured."""
    if not quality.finite:
        return "it holds values that are NaN or infinite"
    words = []
    if quality.decibels is not None and quality.decibels < MODEL_DB:
        words.append(f"its SQNR is {quality.decibels:.1f} dB ({MODEL_DB:.0f} at least)")
    if quality.kl is not None and quality.kl > MODEL_KL:
        words.append(f"the KL divergence of its next tokens {quality.kl:.2f} nats ({MODEL_KL} at most)")
    return " and ".join(words)


def _broken(lines: Sequence[Solved]) -> list[Solved]:
    return [line for line in lines if line.decibels is not None and (math.isnan(line.decibels) or line.decibels == -math.inf)]


def _measured(lines: Sequence[Solved]) -> list[tuple[float, Solved]]:
    return sorted(((line.decibels, line) for line in lines if line.decibels is not None and math.isfinite(line.decibels)), key=lambda pair: pair[0])


def _median(lines: Sequence[Solved]) -> dict[str, float]:
    """Median SQNR by scheme, of schemes with enough linears."""
    groups: dict[str, list[float]] = {}
    for db, line in _measured(lines):
        groups.setdefault(_schemes(line), []).append(db)
    return {schemes: statistics.median(values) for schemes, values in groups.items() if len(values) >= PEERS}


def _below_peers(lines: Sequence[Solved]) -> list[Solved]:
    medians = _median(lines)
    return [line for db, line in _measured(lines) if db < min(HARMLESS_DB, medians.get(_schemes(line), -math.inf) - PEERS_DB)]


def _lowest(lines: Sequence[Solved]) -> list[Solved]:
    """Suspects where no linear stands out: the least SQNR."""
    return [line for _, line in _measured(lines)][:NAMED]


# --- words -------------------------------------------------------------------------------------------------------------


def _schemes(line: Solved) -> str:
    return line.asked.schemes if line.asked is not None else line.choice


def _outlying(line: Solved) -> bool:
    """The activations are quantized, and outliers among their channels may be to blame."""
    return line.asked is not None and line.asked.input is not None and (line.spread is None or line.spread >= OUTLYING)


def _listed(lines: Sequence[Solved], medians: dict[str, float] | None = None) -> str:
    def one(line: Solved) -> str:
        words = [f"{line.decibels:.1f} dB"] if line.decibels is not None and math.isfinite(line.decibels) else []
        words += [f"{medians[_schemes(line)]:.1f} at its peers"] if medians else []
        words += [f"the largest channel of its input {line.spread:.0f} times the median one"] if _outlying(line) and line.spread is not None else []
        return line.name + (f" ({', '.join(words)})" if words else "")

    more = f" and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return ", ".join(map(one, lines[:NAMED])) + more


def _finding(lines: Sequence[Solved], measured: str, last: str) -> Finding:
    helps = dict.fromkeys([*(word for line in lines for word in remedies(line)), last])
    return Finding(tuple(dict.fromkeys(line.name for line in lines)), measured, "Likely to help: " + "; or ".join(helps))


def _ignore(lines: Sequence[Solved]) -> str:
    names = list(dict.fromkeys(line.name for line in lines))
    more = ", ..." if len(names) > NAMED else ""
    return f"keep them in 16 bits: ignore=[{', '.join(map(repr, names[:NAMED]))}{more}]"


def remedies(line: Solved) -> list[str]:
    """What may help one linear, the likeliest first; what was done already is not proposed again."""
    asked = line.asked
    if asked is None:
        return []
    done = {method.name for method in asked.methods}
    found: list[str] = []
    if _outlying(line):
        found += ["pass 'smooth', which takes outliers out of the input"] if not done & set(TRANSFORMS) else []
        found += ["pass 'outliers(threshold=6.0)', which keeps their columns in 16 bits"] if "outliers" not in done else []
    if asked.input is not None and asked.input.static:
        found.append("range(rule='mse') for the fixed ranges, or more typical calibration data" if "range" not in done else "ranges taken per token: input 'int8.row'")
    if asked.input is None or asked.weight.fmt.bits < 8:
        found += ["pass 'gptq'"] if not done & set(SOLVERS) - {"rtn"} else []
        found += ["pass 'awq'"] if not done & set(TRANSFORMS) else []
        found += [f"more bits than {asked.weight.fmt.bits}"] if asked.weight.fmt.bits < 8 else []
    return found
