"""What ``torch.compile(..., options={...})`` takes, checked before anything runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qcompile import compat
from qcompile.core.errors import OptionError, unknown
from qcompile.core.recipe import DEFAULT, Method, Recipe, find_recipe
from qcompile.core.scheme import Scheme
from qcompile.passes import PASSES, SOLVERS, TRAININGS, TRANSFORMS
from qcompile.solve import SETTINGS, check_recipe

HELP = {
    "recipe": "a preset's name or a qcompile.Recipe",
    "weight": "a scheme for weights, such as 'int4.g128'",
    "input": "a scheme for activations, such as 'int8.row', or '16bit'",
    "output": "a scheme that the outputs of linears are rounded to",
    "head": "a scheme for the head, which keeps 16 bits otherwise",
    "passes": "names of passes to run before lowering, in order",
    "ignore": "names, types or 're:' patterns of linears that keep 16 bits",
    "calibration": "a qcompile.Calibration or the path of a saved one",
    "calibration_memory": "memory that calibrating may take beside the model, such as '4GiB'",
    "train": "a training recipe with its arguments, such as 'qat' or \"qat(weight='lsq')\"",
    "mode": "one of torch.compile's modes (torch refuses mode= beside options=)",
    "root": "the name under which a compiled layer sits in its model",
    "release": "free each 16-bit weight when it is packed",
    "dump": "a folder for the graph after every pass",
    "strict": "raise where a linear would run without a kernel, experts outside of every graph, no C++ compiler is found, or calibration finds a collapse; what a recipe keeps in 16 bits is in the report",
    "lower": "'inductor' or 'eager' (the quantized graph by its references)",
    "inductor": "options handed on to Inductor",
}
TYPES: dict[str, tuple[type, ...]] = {
    "passes": (list, tuple),
    "ignore": (str, list, tuple),
    "root": (str,),
    "release": (bool,),
    "dump": (str, os.PathLike),
    "strict": (bool,),
    "inductor": (dict,),
}
PIPELINE = ("normalize", "find_sites", "match", "observe")
"""Passes that always run before those that a user names; ``lower`` and ``glu`` run after them."""
OURS = ("checkpoints", *PIPELINE, "transform", "merge", "attend", "lower", "glu", "factors")
"""Passes that run by themselves."""
LATER = {"output": "output schemes"}
"""Keys whose names are fixed and whose rooms are not built: an error says so, nothing is ignored in silence."""


DEFAULTS: dict[str, Any] = {}
"""What ``set_defaults`` was given."""


def set_defaults(**options: Any) -> None:
    """The options of every ``torch.compile(..., backend="qcompile")`` that gives none: for loops that take a backend's name and nothing else, such as ``TrainingArguments(torch_compile_backend="qcompile")``.

    They hold for the process, for graphs that are captured from now on; what is compiled already stays as it is. Options that a torch.compile gives replace all of them. Without arguments
    the library's own defaults are back. Raises OptionError for what ``options={...}`` does not take.
    """
    Options.parse(options)
    DEFAULTS.clear()
    DEFAULTS.update(options)


@dataclass(frozen=True)
class Options:
    """Checked options."""

    recipe: Recipe
    passes: tuple[str, ...] = ()
    calibration: Any = None
    calibration_memory: int | None = None
    mode: str | None = None
    root: str = ""
    release: bool = False
    dump: str | None = None
    strict: bool = False
    lower: str = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)
    train: Method | None = None
    training: dict[str, Any] = field(default_factory=dict)
    """All settings of ``train``."""

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Options from the dictionary that torch.compile hands over. Raises OptionError, which lists what exists."""
        given = dict(options or {})
        for key in given:
            if key not in HELP:
                raise unknown("option", key, HELP, "options")
            if key in LATER:
                raise OptionError(f"option {key!r} ({HELP[key]}) is not available in this version: {LATER[key]} are still to come")
            if key in TYPES and not (given[key] is None or isinstance(given[key], TYPES[key])):
                raise OptionError(f"option {key!r} ({HELP[key]}) is a {' or '.join(t.__name__ for t in TYPES[key])}, not {given[key]!r}")
        given = {key: value for key, value in given.items() if value is not None}
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise OptionError(f"mode is given twice: {mode!r} and options['mode'] = {given['mode']!r}")
        if isinstance(path := given.get("calibration"), (str, os.PathLike)) and not os.path.exists(path):  # also where the recipe needs none of it
            raise OptionError(f"option 'calibration' ({HELP['calibration']}): there is no calibration file {os.fspath(path)}; Calibration.save writes one")
        weight, x, head, ignore = given.get("weight"), given.get("input"), given.get("head"), given.get("ignore", ())
        ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        if wrong := [pattern for pattern in ignore if not isinstance(pattern, str)]:
            raise OptionError(f"option 'ignore' ({HELP['ignore']}) holds strings, not {wrong[0]!r}")
        if weight is not None and "recipe" not in given:  # a weight scheme with no recipe is weight-only unless an input scheme stands beside it
            recipe = Recipe("custom", str(Scheme.parse(weight)))
        else:
            recipe = replace(find_recipe(given.get("recipe", _default(given.get("train")))), implied="recipe" not in given)
        recipe = recipe.override(weight=weight, input=x, head=head, ignore=ignore)
        lower = given.get("lower", "inductor")
        if lower not in ("inductor", "eager"):
            raise unknown("value", lower, ("inductor", "eager"), "options['lower']")
        graph_passes, methods = _steps(given.get("passes", ()))
        if methods or "passes" in given:
            recipe = recipe.override(passes=methods)
        check_recipe(recipe, "options['passes']" if "passes" in given else f"recipe {recipe.name}")
        train: Method | None = None
        training: dict[str, Any] = {}
        if "train" in given:
            recipe, train, training = _train(recipe, given["train"])
        extra = dict(given.get("inductor", {}))
        known = compat.inductor_options() if extra else set()
        for key in extra:
            if key not in known:
                raise unknown("Inductor option", key, sorted(known), "options['inductor']")
        try:
            patches = compat.mode_patches(given.get("mode"))
        except ValueError as error:
            raise OptionError(f"unknown mode {error}") from None
        return cls(
            recipe=recipe,
            passes=graph_passes,
            calibration=given.get("calibration"),
            calibration_memory=memory_of(given["calibration_memory"]) if "calibration_memory" in given else None,
            mode=given.get("mode"),
            root=given.get("root", ""),
            release=given.get("release", False),
            dump=given.get("dump") or os.environ.get("QCOMPILE_DUMP"),
            strict=given.get("strict", False),
            lower=lower,
            inductor={**patches, **extra},
            train=train,
            training=training,
        )

    def key(self) -> bytes:
        """What enters the cache key beside our sources."""
        return repr((self.recipe, self.passes, self.lower, self.train, sorted(self.inductor.items(), key=str))).encode()


def _default(train: Any) -> str:
    """The recipe where none is named: that of the training recipe, if there is one."""
    return DEFAULT if train is None else TRAININGS[_method(train).name].recipe


def _method(spelling: Any) -> Method:
    method = Method.parse(spelling) if isinstance(spelling, (str, Method)) else Method(str(spelling))
    if method.name not in TRAININGS:
        raise unknown("training recipe", method.name, TRAININGS, "options['train']")
    return method


def _train(recipe: Recipe, spelling: Any) -> tuple[Recipe, Method, dict[str, Any]]:
    """(the recipe as it is trained, the training recipe as it was spelled, all its settings)."""
    method = _method(spelling)
    row = TRAININGS[method.name]
    settings = row.settings(method)
    row.check(recipe, settings)
    return replace(recipe, frozen=row.frozen), method, settings


def _steps(names: Sequence[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(passes on the graph, methods of the recipe) among what ``options["passes"]`` names."""
    graph, methods = [], []
    for spelling in names:
        name = Method.parse(spelling).name if isinstance(spelling, (str, Method)) else spelling
        if name in OURS:
            raise OptionError(f"pass {name!r} always runs; options['passes'] names those that run between {PIPELINE[-1]!r} and 'lower'")
        if name in PASSES:
            graph.append(name)
        elif name in (*TRANSFORMS, *SOLVERS, *SETTINGS):
            methods.append(str(Method.parse(spelling)))
        else:
            raise unknown("pass", name, [*(p for p in PASSES if p not in OURS), *TRANSFORMS, *SOLVERS, *SETTINGS], "options['passes']")
    return tuple(graph), tuple(methods)


def memory_of(memory: str | int | None) -> int:
    """Bytes: of "4GiB", "500MB" or a number; a third of what is free where nothing is said. Raises OptionError for anything else."""
    if memory is None:
        if torch.cuda.is_available():
            return int(torch.cuda.mem_get_info()[0] // 3)
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3)
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    m = re.fullmatch(r"\s*([\d.]+)\s*([kMGT]?)(i?)B\s*", str(memory))
    if m is None:
        raise OptionError(f"an amount of memory reads '4GiB', '500MB' or a number of bytes, not {memory!r}")
    return int(float(m[1]) * (1024 if m[3] else 1000) ** " kMGT".index(m[2] or " "))
