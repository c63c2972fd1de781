"""What a training recipe is: the pass that puts its ops into the graph, and the arguments that its spelling takes, as in ``qat(weight='lsq')``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompile.core.errors import OptionError, Skip
from qcompile.core.recipe import DEFAULT, Choice, Method, Recipe

from .infra import Pass
from .sites import Site


@dataclass(frozen=True)
class Training:
    """One row. ``insert`` is the pass; ``arguments`` name -> (default, what it is); ``check(recipe, settings)`` raises OptionError for what cannot be trained.
    ``frozen``: only weights that do not require grad get a scheme, also at inference. ``recipe``: what stands where none is named. ``keeps(site, choice)``: why a site trains in 16 bits all the same."""

    name: str
    insert: Pass
    arguments: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    check: Callable[[Recipe, Mapping[str, Any]], None] = lambda recipe, settings: None
    frozen: bool = False
    doc: str = ""
    recipe: str = DEFAULT
    keeps: Callable[[Site, Choice], Skip | None] = lambda site, choice: None

    def settings(self, method: Method) -> dict[str, Any]:
        """All arguments of a spelling, defaults filled in. Raises OptionError for one that does not exist, or is of another type than its default."""
        out = {name: default for name, (default, _) in self.arguments.items()}
        for name, value in method.options.items():
            if name not in self.arguments:
                raise OptionError(f"options['train']: {self.name} takes no argument {name!r}; it takes {', '.join(f'{n}: {what}' for n, (_, what) in self.arguments.items()) or 'none'}")
            default = self.arguments[name][0]
            if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
                raise OptionError(f"options['train']: {self.name}({name}=...) is {self.arguments[name][1]}, not {value!r}")
            out[name] = value
        return out


def no_methods(recipe: Recipe, what: str) -> None:
    """OptionError where a recipe solves for codes: they are those of weights that stay as they are."""
    if steps := list(dict.fromkeys(m.name for m in recipe.steps)):
        raise OptionError(
            f"recipe {recipe.name} is for inference: {', '.join(steps)} find codes of weights that stay as they are, and {what} changes them. "
            f"Train with the schemes alone, options={{'weight': {recipe.weight!r}{f', {chr(39)}input{chr(39)}: {recipe.input!r}' if recipe.input else ''}, 'train': ...}}"
        )
