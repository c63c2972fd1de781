"""What ``torch.compile(..., options={...})`` takes, checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompile import compat
from qcompile.core.errors import OptionError, unknown
from qcompile.core.recipe import DEFAULT, Recipe, find_recipe
from qcompile.core.scheme import Scheme
from qcompile.passes import PASSES

HELP = {
    "recipe": "a preset's name or a qcompile.Recipe",
    "weight": "a scheme for weights, such as 'int4.g128'",
    "input": "a scheme for activations, such as 'int8.row', or '16bit'",
    "output": "a scheme that the outputs of linears are rounded to",
    "head": "a scheme for the head, which keeps 16 bits otherwise",
    "passes": "names of passes to run before lowering, in order",
    "ignore": "names, types or 're:' patterns of linears that keep 16 bits",
    "calibration": "statistics taken earlier",
    "train": "a training recipe",
    "mode": "one of torch.compile's modes (torch refuses mode= beside options=)",
    "root": "the name under which a compiled layer sits in its model",
    "release": "free each 16-bit weight when it is packed",
    "dump": "a folder for the graph after every pass",
    "strict": "raise where something would be skipped, emulated or replaced",
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
"""Passes that always run before those that a user names; ``lower`` runs after them."""
LATER = {"output": "output schemes", "calibration": "saved statistics", "train": "training recipes"}
"""Keys whose names are fixed and whose rooms are not built: an error says so, nothing is ignored in silence."""


@dataclass(frozen=True)
class Options:
    """Checked options."""

    recipe: Recipe
    passes: tuple[str, ...] = ()
    mode: str | None = None
    root: str = ""
    release: bool = False
    dump: str | None = None
    strict: bool = False
    lower: str = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)

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
        weight, x, head, ignore = given.get("weight"), given.get("input"), given.get("head"), given.get("ignore", ())
        ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        if wrong := [pattern for pattern in ignore if not isinstance(pattern, str)]:
            raise OptionError(f"option 'ignore' ({HELP['ignore']}) holds strings, not {wrong[0]!r}")
        if weight is not None and "recipe" not in given:  # a weight scheme with no recipe is weight-only unless an input scheme stands beside it
            recipe = Recipe("custom", str(Scheme.parse(weight)))
        else:
            recipe = find_recipe(given.get("recipe", DEFAULT))
        recipe = recipe.override(weight=weight, input=x, head=head, ignore=ignore)
        lower = given.get("lower", "inductor")
        if lower not in ("inductor", "eager"):
            raise unknown("value", lower, ("inductor", "eager"), "options['lower']")
        for name in given.get("passes", ()):
            if name not in PASSES:
                raise unknown("pass", name, [p for p in PASSES if p not in (*PIPELINE, "lower")], "options['passes']")
            if name in (*PIPELINE, "lower"):
                raise OptionError(f"pass {name!r} always runs; options['passes'] names those that run between {PIPELINE[-1]!r} and 'lower'")
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
            passes=tuple(given.get("passes", ())),
            mode=given.get("mode"),
            root=given.get("root", ""),
            release=given.get("release", False),
            dump=given.get("dump") or os.environ.get("QCOMPILE_DUMP"),
            strict=given.get("strict", False),
            lower=lower,
            inductor={**patches, **extra},
        )

    def key(self) -> bytes:
        """What enters the cache key beside our sources."""
        return repr((self.recipe, self.passes, self.lower, sorted(self.inductor.items(), key=str))).encode()
