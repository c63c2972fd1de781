"""From the statistics of an input and the weights that read it to their Solutions: the recipe's transforms, outliers, solver, range and bias, in the recipe's order.

Nothing here runs a graph. ``qcompile.sequence`` takes the statistics site by site on a replay of recorded calls; a calibration that was loaded from a file brings its own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.core.errors import CalibrationError, OptionError, Skip, unknown
from qcompile.core.qtensor import QTensor, dequantize, quantize, split_rows
from qcompile.core.ranges import NEEDS, needed, static_range
from qcompile.core.recipe import KEEP, Choice, Method, Recipe
from qcompile.core.scheme import Scheme
from qcompile.core.solution import CHOSE, Solution
from qcompile.core.stats import Stats, rescale_all
from qcompile.kernels.quantize import reference as quantize_input
from qcompile.kernels.scaled_linear import values
from qcompile.passes import SOLVERS, TRANSFORMS, bias, outliers
from qcompile.passes.gptq import stackable
from qcompile.passes.method import Linears
from qcompile.passes.sites import Site
from qcompile.sqnr import level

SETTINGS = {"equalize": ("absorb",), "outliers": ("threshold", "columns", "dynamic", "weights"), "range": ("rule",), "bias": ("data",)}
"""Steps of a recipe that are neither a transform nor a solver, and their arguments."""
SWITCHES = {"equalize": ("absorb",), "bias": ("data",)}
"""Arguments of these that are True or False."""


@dataclass(frozen=True)
class Member:
    """One site of a group: its choice and its weight, (N, K) or (E, N, K), as the site reads it; for ``bias(data=False)`` also E[x] (K,) as the norm before implies it, or why it does not."""

    site: Site
    choice: Choice
    weight: Tensor
    mean: Tensor | Skip | None = None


@dataclass
class Observed:
    """Statistics of one input and how many rows they are of; for stacked experts also those of the rows of each."""

    stats: Stats
    tokens: int
    experts: Sequence[Observed] = ()

    def rescaled(self, s: Tensor) -> Observed:
        """Of ``x / s``; what cannot be known is left out."""
        return Observed(rescale_all(self.stats, s), self.tokens, [e.rescaled(s) for e in self.experts])

    def to(self, device: torch.device | str) -> Observed:
        """The same on another device."""
        return Observed({n: {k: t.to(device) for k, t in s.items()} for n, s in self.stats.items()}, self.tokens, [e.to(device) for e in self.experts])


def check(methods: Sequence[Method], where: str = "options['passes']") -> None:
    """Raises OptionError for a step that does not exist, an argument that it does not take, two solvers, or an order that steps do not run in."""
    solvers = [m.name for m in methods if m.name in SOLVERS]
    if len(solvers) > 1:
        raise OptionError(f"{where} names {len(solvers)} solvers: {', '.join(solvers)}; a weight is rounded once")
    for method in methods:
        if method.name not in (*TRANSFORMS, *SOLVERS, *SETTINGS):
            raise unknown("pass", method.name, [*TRANSFORMS, *SOLVERS, *SETTINGS], where)
        row = TRANSFORMS.get(method.name) or SOLVERS.get(method.name)
        known = SETTINGS[method.name] if row is None else _arguments(row.fn)
        for key in method.options:
            if key not in known:
                raise unknown("argument", key, known or ["none"], f"{method} in {where}")
        if method.name == "outliers" and method.options.get("weights", "kept") not in ("kept", "codes"):
            raise unknown("value", method.options["weights"], ("kept", "codes"), f"{method} in {where}")
        if flags := [key for key in SWITCHES.get(method.name, ()) if not isinstance(method.options.get(key, False), bool)]:
            raise OptionError(f"{method} in {where}: {flags[0]} is True or False, not {method.options[flags[0]]!r}")
        if method.name == "range" and method.options.get("rule") not in NEEDS:
            raise unknown("range rule", method.options.get("rule"), NEEDS, f"{method} in {where}")
    for earlier, later in itertools.combinations([m for m in methods if m.name not in ("range", "bias")], 2):  # these two work on what all others leave
        if _rank(earlier) > _rank(later):
            raise OptionError(f"{where}: {earlier} stands before {later}, and runs after it: write {later} first")


def _rank(method: Method) -> int:
    """Equalization works on the model's weights, transforms and the static split on inputs, solvers on what these leave; the dynamic split is of the input in the compiled graph."""
    if method.name in SOLVERS or method.options.get("dynamic"):
        return 2
    return 0 if method.name == "equalize" else 1


def check_recipe(recipe: Recipe, where: str) -> None:
    """``check`` of the steps of a recipe and of its rules; raises OptionError for a range rule, too, where no range is fixed."""
    own = [(f"rule {rule.pattern!r} of recipe {recipe.name}", rule.methods, [rule.input], [rule.weight]) for rule in recipe.rules if rule.methods is not None]
    plain = [rule for rule in recipe.rules if rule.methods is None]
    whole = (where, recipe.methods, [recipe.input, *(rule.input for rule in plain)], [recipe.weight, recipe.head, *(rule.weight for rule in plain)])
    for place, methods, inputs, weights in (whole, *own):
        check(methods, place)
        _check_values([Scheme.parse(w) for w in weights if w and w != KEEP], methods, place)
        fixed = any(Scheme.parse(x).static for x in inputs if x and x != KEEP)
        if not fixed and (steps := [m for m in methods if m.name == "range"]):
            raise OptionError(f"{place}: {steps[0]} is how the range of a static input is found, and there is none: inputs are {inputs[0] or 'in 16 bits'}. Take input='int8.tensor.static', or leave the step out")


def _check_values(weights: Sequence[Scheme], methods: Sequence[Method], place: str) -> None:
    """Raises OptionError where a step fits values and all are fixed, or searches scales under values that are fitted once the scales are settled."""
    learned = [w for w in weights if w.fmt.learned]
    for m in methods:
        if m.name == "lloyd_max" and weights and not learned:
            raise OptionError(f"{place}: lloyd_max fits the values of a codebook, and those of {weights[0]} are fixed: take a weight such as 'lut4.g64'")
        if learned and (m.name == "sequential_mse" or m.options.get("clip")):
            raise OptionError(f"{place}: {m} searches scales under fixed values, and those of {learned[0]} are fitted once its scales are settled: take lloyd_max, gptq or adaround")


def _arguments(fn: Callable[..., object]) -> list[str]:
    import inspect

    return [p.name for p in inspect.signature(fn).parameters.values() if p.default is not p.empty or p.kind is p.KEYWORD_ONLY]


def first_needs(choice: Choice) -> tuple[str, ...]:
    """Statistics of the input as it is: for transforms and static outliers."""
    found = [name for m in choice.methods if m.name in TRANSFORMS for name in TRANSFORMS[m.name].needs]
    return tuple(dict.fromkeys([*found, *(["absmax"] if any(m.name == "outliers" and not m.options.get("dynamic") for m in choice.methods) else [])]))


def then_needs(choice: Choice) -> tuple[str, ...]:
    """Statistics of the input as the quantized product reads it: for the solver, the bias and the range."""
    found = [name for m in choice.methods if m.name in SOLVERS for name in SOLVERS[m.name].needs]
    found += ["moments"] if any(m.name == "bias" and m.options.get("data", True) for m in choice.methods) else []
    return tuple(dict.fromkeys([*found, *([needed(rule_of(choice), choice.input)] if choice.input is not None and choice.input.static else [])]))


def needs_data(choice: Choice) -> bool:
    """Something about this site has to be found before it is rounded."""
    return bool(first_needs(choice) or then_needs(choice) or equalized(choice) or analytical(choice))


def analytical(choice: Choice) -> bool:
    """The mean of the input is that of the norm before, not of data: see ``qcompile.passes.norms``."""
    return any(m.name == "bias" and not m.options.get("data", True) for m in choice.methods)


def equalized(choice: object) -> bool:
    """The weight is equalized with its neighbours' before it is solved: see ``qcompile.balance``."""
    return isinstance(choice, Choice) and any(m.name == "equalize" for m in choice.methods)


def refuse_equalize(methods: Sequence[Method], where: str) -> None:
    """Raises OptionError where a recipe equalizes: that changes weights, which only ``quantize`` does."""
    if any(m.name == "equalize" for m in methods):
        raise OptionError(f"{where}: the step 'equalize' changes a model's weights in place, which compiling never does; take qcompile.quantize(model, recipe, data), then compile")


def rule_of(choice: Choice) -> str:
    """The range rule of a static input."""
    return next((str(m.options["rule"]) for m in choice.methods if m.name == "range"), "absmax")


def prepare(members: Sequence[Member], seen: Observed, legal: Callable[[Tensor], Tensor]) -> Solution:
    """What belongs to the input and is shared by all members: the vector of the transforms, made ``legal`` for the place where it goes, and the static outlier columns."""
    shared = Solution(tokens=seen.tokens)
    choice = members[0].choice
    for method in choice.methods:
        if method.name in TRANSFORMS:
            s = torch.ones(members[0].site.k, device=members[0].weight.device) if shared.smooth is None else shared.smooth
            at = seen.rescaled(s) if shared.smooth is not None else seen
            if "hessian" in TRANSFORMS[method.name].needs and seen.tokens < members[0].site.k:
                shared.notes = (*shared.notes, f"{method.name} searched on {seen.tokens} tokens for {members[0].site.k} input channels: data of more kinds may ask for another vector")
            row, linears = TRANSFORMS[method.name], Linears(_matrices(members, s), _schemes(members), choice.input, at.stats)
            v = row.fn(linears, **method.options)
            if row.about is not None and (words := row.about(linears, v, **method.options)):
                shared.notes = (*shared.notes, f"{CHOSE} {words}")
            shared.smooth = legal(s * v.float())
            every = torch.arange(1.0, members[0].site.k + 1, device=s.device)  # a vector that nothing is equal in
            shared.heads = not torch.equal(legal(every), every)
        elif method.name == "outliers" and members[0].weight.dim() == 2 and not method.options.get("dynamic"):
            stats = seen.stats if shared.smooth is None else seen.rescaled(shared.smooth).stats  # x as the steps before left it
            shared.outliers = outliers.columns(stats, **method.options)  # type: ignore[arg-type]
    return shared


def inverse(shared: Solution, k: int, device: torch.device) -> Tensor | None:
    """The vector (K,) that divides the input of the dense product: infinite at outlier columns, whose statistics then are those of zeros. None where there is nothing to divide by."""
    if shared.smooth is None and shared.outliers is None:
        return None
    s = torch.ones(k, device=device) if shared.smooth is None else shared.smooth.clone()
    if shared.outliers is not None:
        s[shared.outliers] = float("inf")
    return s


def inapplicable(choice: Choice, weight: Tensor) -> tuple[str, ...]:
    """Notes of a site's steps that stacked experts, (E, N, K), have no form of."""
    said = {"outliers": "stacked experts are not split: their outlier columns are quantized with the others", "bias": "stacked experts get no correction of a bias"}
    return tuple(said[m.name] for m in choice.methods if m.name in said) if weight.dim() == 3 else ()


def complete(members: Sequence[Member], shared: Solution, seen: Observed) -> list[Solution]:
    """The members' solutions: codes, static range, correction. ``seen`` is the input as the dense product reads it."""
    out = [replace(shared, notes=()) for _ in members]
    choice = members[0].choice
    if choice.input is not None and choice.input.static:
        scale, zero = static_range(rule_of(choice), seen.stats, choice.input)
        for s in out:
            s.range = tuple(t.reshape(1) for t in (scale, zero) if t is not None)
    for batch in _batches(members):
        start = time.perf_counter()
        for i, q, notes in _solve(batch, members, out, seen):
            out[i].q, out[i].notes = q, (*shared.notes, *inapplicable(members[i].choice, members[i].weight), *notes)
            out[i].seconds = (time.perf_counter() - start) / len(batch)
    if any(m.name == "bias" for m in choice.methods):
        _correct(members, out, shared, seen)
    return out


def _correct(members: Sequence[Member], out: Sequence[Solution], shared: Solution, seen: Observed) -> None:
    """Corrections of the biases, by the mean of the data or of the norm before."""
    mean = members[0].mean
    if not analytical(members[0].choice):
        moments = seen.stats["moments"]
        mean = (moments["sum"] / moments["count"].clamp(min=1)).float()
    elif isinstance(mean, Tensor) and (s := inverse(shared, members[0].site.k, mean.device)) is not None:
        mean = mean / s
    for m, solution in zip(members, out):
        if m.weight.dim() == 3 or solution.q is None:
            continue
        if not isinstance(mean, Tensor):
            solution.notes = (*solution.notes, f"the bias is not corrected without data: {mean}")
        else:
            solution.bias = bias.correction(solution.prepared(m.weight), solution.q, mean)


def _solve(batch: Sequence[int], members: Sequence[Member], out: Sequence[Solution], seen: Observed) -> list[tuple[int, QTensor, tuple[str, ...]]]:
    """Codes of the members of a batch, which share a solve: their rows are stacked, and taken apart again."""
    first = members[batch[0]]
    method = next((m for m in first.choice.methods if m.name in SOLVERS), Method("rtn"))
    scheme = first.choice.weight
    if first.weight.dim() == 3:
        parts, notes, few = [], [], []
        for e in range(first.weight.shape[0]):
            its = seen.experts[e] if seen.experts else seen
            use, w = method, out[batch[0]].prepared(first.weight[e])
            if SOLVERS[method.name].needs and its.tokens == 0:
                use = Method("rtn")
                notes.append(f"expert {e} saw no token: rounded to nearest")
            elif "hessian" in SOLVERS[method.name].needs and its.tokens < first.site.k:
                few.append(its.tokens)
            parts.append(SOLVERS[use.name].fn(w, scheme, its.stats, **use.options).flatten())
        if few:
            notes.append(f"{len(few)} of {first.weight.shape[0]} experts saw fewer tokens than the {first.site.k} input channels, one as few as {min(few)}: their Hessians are singular and lean on damping")
        q = QTensor.unflatten([torch.stack(t) for t in zip(*parts)], scheme, first.site.k)
        return [(batch[0], q, tuple(notes))]
    stacked = torch.cat([out[i].prepared(members[i].weight) for i in batch])
    q = SOLVERS[method.name].fn(stacked, scheme, seen.stats, **method.options)
    note: tuple[str, ...] = ()
    if "hessian" in SOLVERS[method.name].needs and seen.tokens < first.site.k:
        note = (f"{seen.tokens} tokens for {first.site.k} input channels: the Hessian is singular and leans on its damping",)
    if len(batch) == 1:
        return [(batch[0], q, note)]
    return [(i, part, note) for i, part in zip(batch, split_rows(q, [members[i].site.n for i in batch]))]


def _batches(members: Sequence[Member]) -> list[list[int]]:
    """Indices of members that are solved together: the same scheme, and groups that do not span rows."""
    found: dict[str, list[int]] = {}
    for i, m in enumerate(members):
        alone = m.weight.dim() == 3 or not stackable([m.choice.weight])
        found.setdefault(f"{m.choice.weight} {i}" if alone else str(m.choice.weight), []).append(i)
    return list(found.values())


def _matrices(members: Sequence[Member], s: Tensor) -> list[Tensor]:
    return [w.float() * s for m in members for w in (m.weight if m.weight.dim() == 3 else [m.weight])]


def _schemes(members: Sequence[Member]) -> list[Scheme]:
    return [m.choice.weight for m in members for _ in range(m.weight.shape[0] if m.weight.dim() == 3 else 1)]


class Product:
    """A solved site as plain torch: what the compiled graph will compute, in the dtype of its input."""

    def __init__(self, solution: Solution, choice: Choice, weight: Tensor, dtype: torch.dtype) -> None:
        self.solution, self.choice = solution, choice
        q = solution.q if solution.q is not None else quantize(solution.prepared(weight), choice.weight)
        self.dense = dequantize(q, torch.float32).to(dtype)
        split = solution.outliers is not None and solution.outliers.numel() > 0
        self.kept = solution.kept(weight).to(dtype) if split else None
        how = outliers.dynamic(choice)
        scaled = weight.float() if solution.smooth is None else weight.float() * solution.smooth
        self.whole = None if how is None else self.dense if how.codes else scaled.to(dtype)
        self.nbytes = sum(t.nbytes for t in (self.dense, self.kept, self.whole) if t is not None)

    def __call__(self, x: Tensor, expert: int | None = None) -> Tensor:
        """(..., K) -> (..., N)."""
        s, w = self.solution, self.dense if expert is None else self.dense[expert]
        x = s.divided(x)
        extra: Tensor | None = None
        if (how := outliers.dynamic(self.choice)) is not None and self.whole is not None and x.numel() and self.dense.dim() == 2:
            index = outliers.chosen(x.abs().reshape(-1, x.shape[-1]).amax(0), how)
            extra = x[..., index] @ self.whole[:, index].T
            x = x.index_fill(-1, index, 0)
        elif self.kept is not None and s.outliers is not None:
            extra = x[..., s.outliers] @ self.kept.T
            x = x.index_fill(-1, s.outliers, 0)
        if self.choice.input is not None:
            given = list(s.range) if self.choice.input.static else []
            codes, *scale = quantize_input(x, given, str(self.choice.input))
            x = values(codes, scale or given, self.choice.input).to(x.dtype)
        y = x @ w.T if extra is None else x @ w.T + extra
        return y if s.bias is None else y + s.bias.to(y.dtype)


def decibels(exact: Tensor, y: Tensor) -> float | None:
    """Signal to quantization noise of an output, in dB; None where there is no signal, infinite where there is no noise."""
    signal, noise = (float(t.double().square().sum()) for t in (exact, y.double() - exact.double()))
    return None if signal == 0 else level(signal, noise)


def spread(rows: Tensor, solution: Solution, choice: Choice) -> float | None:
    """The largest channel's absolute maximum over the median channel's, of an input (T, K) as the quantized product reads it: smoothed, less its outlier columns. None where it is zero."""
    peak = solution.divided(rows).abs().amax(0)
    if (how := outliers.dynamic(choice)) is not None:
        peak[outliers.chosen(peak, how)] = 0
    elif solution.outliers is not None:
        peak[solution.outliers] = 0
    peak = peak[peak > 0]
    return float(peak.max() / peak.median()) if peak.numel() else None


def from_statistics(members: Sequence[Member], seen: Observed, legal: Callable[[Tensor], Tensor], what: str) -> list[Solution]:
    """Solutions from statistics that were taken earlier on the unquantized model. Raises CalibrationError where one that is needed is missing."""
    choice, stats = members[0].choice, seen.stats
    refuse_equalize(choice.methods, what)
    if missing := [name for name in (*first_needs(choice), *then_needs(choice)) if name not in stats]:
        raise CalibrationError(f"{what} holds no {', '.join(missing)} of {members[0].site.path}, which {choice.key} needs; it holds {', '.join(stats) or 'nothing'}")
    shared = prepare(members, seen, legal)
    s = inverse(shared, members[0].site.k, members[0].weight.device)
    then = seen if s is None else seen.rescaled(s)
    if missing := [name for name in then_needs(choice) if name not in then.stats]:
        raise CalibrationError(f"{', '.join(missing)} of {members[0].site.path} is not known once its input is smoothed or split: take range(rule='absmax'), or calibrate with data")
    return complete(members, shared, then)
