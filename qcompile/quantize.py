"""``qcompile.quantize``: quantize a model in place, offline. What is left is an ordinary module whose weights are codes."""

from __future__ import annotations

import json
import os
import pathlib
import re
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.balance import Balanced, held_by_several
from qcompile.calibrate import KEPT, Session
from qcompile.core.digest import digest
from qcompile.core.errors import CalibrationError, OptionError, QcompileWarning
from qcompile.core.qtensor import QTensor
from qcompile.core.qtensor import quantize as round_to_nearest
from qcompile.core.recipe import Choice, Recipe
from qcompile.core.scheme import Scheme
from qcompile.core.solution import Solution
from qcompile.options import Options
from qcompile.passes.sites import Site, view
from qcompile.passes.slots import leader
from qcompile.replay import Unit
from qcompile.sequence import Outcome, found, solution_key
from qcompile.solve import needs_data
from qcompile.stored import install
from qcompile.trained import STATE
from qcompile.watch import everyone
from qcompile.weights import TABLE, fingerprint


def quantize(
    model: nn.Module,
    recipe: str | Recipe = "W8A8",
    data: Iterable[Any] | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    memory: str | int | None = None,
    **options: Any,
) -> Outcome:
    """Quantize the linears of ``model`` in place by ``recipe``, and return a line for each: its scheme, SQNR, tokens seen, seconds.

    ``data``: batches (a dictionary is keyword arguments, a tuple or list positional ones, anything else the only argument); recipes that need no data take the model's ``dummy_inputs`` where
    they are given none. ``options`` are those of the backend that choose schemes and linears (``weight``, ``input``, ``head``, ``ignore``, ``passes``).
    The step ``equalize`` of ``passes`` scales the model's weights in place by powers of two before they are solved, where its function stays as it is (``qcompile.balance``).
    ``resume`` names a folder: every solved linear is kept there at once, and a run that was interrupted goes on where it stopped; what was kept for other data, weights or choices is solved again.
    Two runs on the same data give the same bits.

    Afterwards each weight is parametrized by its codes: the model runs in eager PyTorch as it is, with the weights rounded, and ``torch.compile(model, backend="qcompile")`` multiplies the codes.
    Weights that something else reads, too (an embedding tied to the head), convolution kernels and single matrices of a stack keep their bits; a QcompileWarning names them.
    Raises CalibrationError where data is needed and missing or not finite, OptionError for wrong options.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"quantize takes a torch.nn.Module, not {type(model).__name__}")
    allowed = ("weight", "input", "head", "ignore", "passes", "strict")
    for key in options:
        if key not in allowed:
            raise OptionError(f"quantize takes no option {key!r}; it takes {', '.join(allowed)}")
    given = {"recipe": recipe, **options}
    parsed = Options.parse(given)
    for method in parsed.recipe.steps:
        if method.options.get("dynamic") and method.options.get("weights") != "codes":
            raise OptionError(
                f"recipe {parsed.recipe.name}: {method} reads columns of the 16-bit weights on every call, which quantize replaces by codes. "
                "Take LLM_INT8_STATIC, which keeps the columns that calibration finds, or outliers(dynamic=32, weights='codes')"
            )
    batches = _batches(model, parsed, data)
    fast = torch.compile(model, backend="qcompile", options=given, dynamic=False)
    folder = _Folder(resume, Balanced(model))
    others, KEPT[:] = KEPT[:], []  # this data alone: what was recorded for calibrating, or by a run that was interrupted, would be counted beside it
    try:
        with Session(fast, progress, memory, folder) as sitting:
            sitting.feed(batches)
    except BaseException:
        folder.balanced.restore()
        raise
    finally:
        KEPT[:] = others
    folder.balanced.forget()
    start = time.perf_counter()
    _install(model, sitting.units, folder.codes)
    sitting.outcome.seconds["installing"] = time.perf_counter() - start
    return sitting.outcome


def _batches(model: nn.Module, options: Options, data: Iterable[Any] | None) -> Iterable[Any]:
    if data is not None:
        return data
    methods = tuple(m for m in options.recipe.steps if m.name != "equalize" and not (m.name == "bias" and m.options.get("data") is False))  # these look at weights alone
    if options.recipe.static or needs_data(Choice(Scheme.parse("int8.row"), methods=methods)):  # methods need data whatever the scheme
        raise CalibrationError(f"recipe {options.recipe.name} needs data: quantize(model, {options.recipe.name!r}, batches)")
    dummy = getattr(model, "dummy_inputs", None)
    if dummy is None:
        raise CalibrationError("quantize reads the linears off the model's graph: give it one batch, quantize(model, recipe, [batch]), whatever its values")
    return [dummy]


def _install(model: nn.Module, units: Sequence[Unit], codes: dict[Key, QTensor]) -> None:
    """Parametrize every weight that was solved and that nothing but its linear reads. ``codes`` are those of rounding to nearest that are known; the others are rounded again."""
    held, done = {id(p): (module, name) for module in model.modules() for name, p in module._parameters.items()}, set()
    kept: dict[int, str] = {}
    several = held_by_several(model)
    todo = [
        (site := unit.sites[name], choice, weakref.ref(unit.parameter(site)), _trained_range(unit, site, choice))  # now: the first of those that read one input is replaced before the others
        for unit in units for name, choice in unit.plan.items() if _solved(unit, name)
    ]  # fmt: skip
    for unit in units:  # several graphs may read one weight: all are asked
        for site in (unit.sites[name] for name in unit.plan if _solved(unit, name)):
            p = unit.parameter(site)
            if reason := "the model does not hold it" if id(p) not in held else "another module holds it, too" if id(p) in several else _unfit(unit, site):
                kept.setdefault(id(p), f"{site.path} ({reason})")
    for site, choice, ref, trained in todo:
        parameter = ref()
        if parameter is None or id(parameter) in kept or id(parameter) in done:
            continue
        owner, attribute = held[id(parameter)]
        record = TABLE.record(parameter, site.path)
        solution = record.solutions[solution_key(site, choice)].now()
        solution.range = trained or solution.range
        if solution.q is None and not choice.methods:  # a model that was trained quantized keeps the steps of its training, so that its codes are those of its own evaluation
            with torch.no_grad():
                solution.q = STATE.codes(parameter, site.view, view(parameter.detach(), site.view), choice.weight, site.path)
        solution.q = codes.pop((id(parameter), *solution_key(site, choice)), None) if solution.q is None else solution.q
        if solution.q is None:
            with torch.no_grad():
                solution.q = round_to_nearest(solution.prepared(view(parameter.detach(), site.view)), choice.weight, name=site.path)
        done.add(id(parameter))
        record.solutions.clear()
        install(owner, attribute, found(choice, solution), solution, site.view == "t")
        del parameter
    if kept:
        more = f" (and {len(kept) - 5} more)" if len(kept) > 5 else ""
        warnings.warn(f"qcompile: kept in 16 bits: {', '.join(list(kept.values())[:5])}{more}", QcompileWarning, stacklevel=3)


def _trained_range(unit: Unit, site: Site, choice: Choice) -> tuple[Tensor, ...]:
    """The range of a static input that a model trained quantized has learned; empty where there is none."""
    if choice.input is None or not choice.input.static:
        return ()
    first, _ = leader(unit.gm, site, choice)
    return STATE.range(unit.parameter(first), first.name, first.view, choice.input)


def _solved(unit: Unit, name: str) -> bool:
    return isinstance(unit.plan[name], Choice) and unit.sites[name].stored is None


def _unfit(unit: Unit, site: Site) -> str:
    """Why a weight cannot be replaced by codes; empty where it can."""
    if site.view not in ("", "t"):
        return f"it is read as {site.view!r}"
    if sum(s.param.index == site.param.index for s in unit.sites.values()) > 1 and not _alike(unit, site):
        return "several linears read it"
    front = list(unit.placeholders[site.param.index].users)
    while front:
        node = front.pop()
        if "site" in node.meta:
            continue
        if node.op == "output" or getattr(node.target, "__name__", node.target) == "embedding":
            return "an embedding reads it, too"
        front += list(node.users)
    return ""


def _alike(unit: Unit, site: Site) -> bool:
    """All linears that read this weight (one that is called twice) read the same codes: those of rounding to nearest."""
    choices = [(s.view, unit.plan[s.name]) for s in unit.sites.values() if s.param.index == site.param.index]
    first = unit.plan[site.name]
    return all(how == site.view and isinstance(c, Choice) and c.key == first.key and not c.methods and not (c.input and c.input.static) for how, c in choices)


Key = tuple[int, str, str, str]
"""id of a parameter, and the key of one of its solutions."""


class _Folder:
    """Solutions as files, one for each linear: what makes a long run resumable. Without a path nothing is written. ``codes`` of rounding to nearest wait here for the end of the run.

    A file counts for the weight, the choice and what came before: a digest of the data, of parameters that are not solved, and of all solutions before it.
    """

    def __init__(self, path: str | os.PathLike[str] | None, balanced: Balanced) -> None:
        self.balanced = balanced
        self.codes: dict[Key, QTensor] = {}
        self.bytes = 0
        self._before = b""
        self._states: dict[int, tuple[object, ...]] = {}
        self.path = pathlib.Path(path) if path is not None else None
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)

    def _file(self, site: Site) -> pathlib.Path:
        assert self.path is not None
        return self.path / (re.sub(r"[^\w.@-]", "_", site.name) + ".safetensors")

    def begin(self, units: Sequence[Unit]) -> None:
        """The data of a run, that of all processes."""
        if self.path is None:
            return
        seen: list[object] = []
        for unit in units:
            solved = {id(unit.parameter(unit.sites[name])) for name in unit.plan if _solved(unit, name)}
            seen += [self._state(p) for p in unit.parameters() if id(p) not in solved]
            seen += [(i, fingerprint(a) if isinstance(a, Tensor) else repr(a)) for call in unit.calls for i, a in call.args.items()]
        self._before = digest(*(repr(part).encode() for part in everyone(seen)))

    def passed(self, solved: Sequence[tuple[Site, Choice, Solution, Tensor]]) -> None:
        """These sites are solved: later ones see their outputs."""
        if self.path is not None:
            parts = [(site.name, choice.key, self._state(p), [fingerprint(t) for t in _tensors(solution).values()]) for site, choice, solution, p in solved]
            self._before = digest(self._before, repr(parts).encode())

    def _state(self, p: Tensor) -> tuple[object, ...]:
        if id(p) not in self._states:
            self._states[id(p)] = fingerprint(p)
        return self._states[id(p)]

    def save(self, site: Site, choice: Choice, solution: Solution, p: Tensor) -> None:
        """Write one solution; the file appears whole or not at all."""
        from safetensors.torch import save_file

        if self.path is None:
            return
        tensors = _tensors(solution)
        about = {"key": choice.key, "weight": repr(self._state(p)), "before": self._before.hex(), "solved": bool(solution.state), "heads": solution.heads, "tokens": solution.tokens, "decibels": solution.decibels, "notes": solution.notes, "k": site.k}
        part = self._file(site).with_suffix(".part")
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, str(part), metadata={"qcompile": json.dumps(about)})
        part.replace(self._file(site))

    def load(self, site: Site, choice: Choice, p: Tensor) -> Solution | None:
        """The solution that was kept for this weight, choice and input; None where there is none, or it was for other values."""
        from safetensors import safe_open

        if self.path is None or not self._file(site).is_file():
            return None
        with safe_open(str(self._file(site)), "pt") as file:
            about = json.loads(file.metadata()["qcompile"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state = self._state(p)
        if (about["key"], about["weight"], about.get("before")) != (choice.key, repr(state), self._before.hex()):
            return None
        packed = [tensors[f"q{i}"] for i in range(sum(key[0] == "q" and key[1:].isdigit() for key in tensors))]
        q = QTensor.unflatten(packed, choice.weight, about["k"]) if packed else None
        ranges = tuple(tensors[f"range{i}"] for i in range(sum(key.startswith("range") for key in tensors)))
        smooth, outliers, bias = (tensors.get(name) for name in ("smooth", "outliers", "bias"))
        solution = Solution(smooth, outliers, bias, range=ranges, q=q, heads=about["heads"], tokens=about["tokens"], decibels=about["decibels"], notes=tuple(about["notes"]))
        solution.state = state if about["solved"] else ()
        return solution.to(p.device)


def _tensors(solution: Solution) -> dict[str, Tensor]:
    """What a file holds of a solution."""
    tensors = {name: t for name in ("smooth", "outliers", "bias") if (t := getattr(solution, name)) is not None}
    return tensors | {f"range{i}": t for i, t in enumerate(solution.range)} | {f"q{i}": t for i, t in enumerate(solution.q.flatten() if solution.q is not None else ())}


__all__ = ["quantize"]
