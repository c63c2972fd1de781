"""Recipes as rows: which scheme each linear gets, and which passes run.

A recipe is weight x input schemes plus rules. A rule names linears by their full name, by ``re:`` and a regular expression (matched from the start, as everywhere in the field),
or by the type of their module (``Linear``, ``Conv1D``); the first rule that matches decides.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .errors import OptionError, unknown
from .scheme import FULL, Scheme

KEEP = "16bit"
"""The spelling of "leave this linear alone" where a scheme is expected."""


def input_scheme(spelling: str | Scheme) -> Scheme:
    """The scheme of activations that a spelling names; OptionError for what only weights have."""
    s = Scheme.parse(spelling)
    if s.fmt.learned:
        raise OptionError(f"input scheme '{s}': a codebook is fitted to a weight, which stays as it is; activations take a format of fixed values")
    if s.group[0] not in (1, FULL) or s.zero == "min" or s.scale is not None or s.layout:
        raise OptionError(
            f"input scheme '{s}': activations are scaled by 'tensor', 'row' or 'g<columns>', with 'point' or without; blocks of rows, minima, quantized scales and layouts are for weights"
        )
    return s


@dataclass(frozen=True)
class Method:
    """One step of a recipe with its arguments, spelled ``smooth`` or ``smooth(alpha=0.75)``; ``Method.parse(str(m)) == m``."""

    name: str
    arguments: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return self.name + (f"({', '.join(f'{key}={value!r}' for key, value in self.arguments)})" if self.arguments else "")

    @property
    def options(self) -> dict[str, object]:
        """The arguments as a dictionary."""
        return dict(self.arguments)

    @classmethod
    def parse(cls, spelling: str | Method) -> Method:
        """The method that a spelling names. Raises OptionError where it is not ``name`` or ``name(key=value, ...)`` with literal values."""
        if isinstance(spelling, Method):
            return spelling
        try:
            tree = ast.parse(spelling.strip(), mode="eval").body
            if isinstance(tree, ast.Name):
                return cls(tree.id)
            if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args and all(k.arg for k in tree.keywords):
                return cls(tree.func.id, tuple((str(k.arg), ast.literal_eval(k.value)) for k in tree.keywords))
        except (SyntaxError, ValueError, AttributeError):
            pass
        raise OptionError(f"a step reads 'name' or 'name(key=value, ...)', such as 'smooth(alpha=0.5)', not {spelling!r}")


@dataclass(frozen=True)
class Choice:
    """What one linear gets: a weight scheme, an input scheme (None: activations stay in 16 bits), why, and the methods that find its values.

    ``smooth``, ``outliers`` and ``corrected`` are what these methods found and the graph's shape depends on: whether a vector divides the input (one that heads share, with ``heads``), how many
    columns stay in 16 bits,
    whether the bias is corrected.
    """

    weight: Scheme
    input: Scheme | None = None
    why: str = ""
    methods: tuple[Method, ...] = ()
    smooth: bool = False
    heads: bool = False
    outliers: int = 0
    corrected: bool = False

    def __str__(self) -> str:
        found = [*(["smooth by heads" if self.heads else "smooth"] if self.smooth else []), *([f"{self.outliers} outlier columns"] if self.outliers else []), *(["bias corrected"] if self.corrected else [])]
        return ", ".join([self.schemes, *found])

    @property
    def schemes(self) -> str:
        """``input @ weight``, or the weight's scheme alone."""
        return f"{self.input} @ {self.weight}" if self.input else str(self.weight)

    @property
    def key(self) -> str:
        """What its solution depends on: schemes and methods with their arguments."""
        return " ".join([self.schemes, *(["via", *map(str, self.methods)] if self.methods else [])])


@dataclass(frozen=True)
class Rule:
    """``pattern`` -> weight and input schemes as spellings; ``weight=None`` leaves the linear in 16 bits. ``passes`` take the place of the recipe's steps: another alpha for one linear, say."""

    pattern: str
    weight: str | None = None
    input: str | None = None
    passes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.passes is not None:
            if self.weight is None:
                raise OptionError(f"rule {self.pattern!r} leaves its linears in 16 bits, where no step has anything to do; it names {', '.join(map(str, self.passes)) or 'an empty list'}")
            object.__setattr__(self, "passes", tuple(str(Method.parse(step)) for step in self.passes))
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise OptionError(f"rule {self.pattern!r} is not a regular expression: {error}") from error
        if self.weight is not None:
            Scheme.parse(self.weight)
        if self.input is not None:
            input_scheme(self.input)

    @property
    def methods(self) -> tuple[Method, ...] | None:
        """The passes, read; None: those of the recipe."""
        return None if self.passes is None else tuple(map(Method.parse, self.passes))

    def matches(self, name: str, kind: str = "") -> bool:
        """Whether the rule names this linear; ``kind`` is the class name of its module."""
        if self.pattern.startswith("re:"):
            return re.match(self.pattern[3:], name) is not None
        return self.pattern in (name, kind) or name.endswith("." + self.pattern)


@dataclass(frozen=True)
class Recipe:
    """A named default for every linear, rules for some, the scheme of the head, passes to run and a line of description."""

    name: str
    weight: str
    input: str | None = None
    rules: tuple[Rule, ...] = ()
    head: str | None = None
    passes: tuple[str, ...] = ()
    doc: str = field(default="", compare=False)
    implied: bool = field(default=False, compare=False, repr=False)
    """Nobody named it: a model that is quantized already is left as it is."""
    frozen: bool = field(default=False, repr=False)
    """Only weights that do not require grad get a scheme."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(str(Method.parse(step)) for step in self.passes))
        for scheme in (self.weight, self.head):
            if scheme is not None and scheme != KEEP:
                Scheme.parse(scheme)
        if self.input is not None and self.input != KEEP:
            input_scheme(self.input)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The passes, read."""
        return tuple(map(Method.parse, self.passes))

    @property
    def steps(self) -> tuple[Method, ...]:
        """Those of the recipe and of its rules."""
        return (*self.methods, *(m for rule in self.rules for m in rule.methods or ()))

    def override(
        self, *, weight: str | None = None, input: str | None = None, head: str | None = None, ignore: Iterable[str] = (), passes: Iterable[str] | None = None
    ) -> Recipe:
        """The recipe with other schemes or passes; ``input=KEEP`` drops the input scheme; ``ignore`` puts rules that keep 16 bits before the others."""
        rules = (*(Rule(pattern) for pattern in ignore), *self.rules)
        x = self.input if input is None else None if input == KEEP else str(input_scheme(input))
        name = self.name if weight is None and input is None and passes is None else "custom"
        steps = self.passes if passes is None else tuple(passes)
        return replace(self, name=name, weight=str(Scheme.parse(weight)) if weight else self.weight, input=x, head=head or self.head, rules=rules, passes=steps)

    @property
    def static(self) -> bool:
        """Some input range is fixed by calibration."""
        spellings = [self.input, *(rule.input for rule in self.rules)]
        return any(Scheme.parse(s).static for s in spellings if s)

    def __str__(self) -> str:
        schemes = f"{self.input} @ {self.weight}" if self.input else self.weight
        return f"{self.name} ({', '.join([schemes, *self.passes])})"


DEFAULT = "W8A8"

_ROWS = (
    Recipe("W8A8", "int8.row", "int8.row", doc="int8 weights per row, activations in int8 per token, ranges taken at run time"),
    Recipe("W8A8_STATIC", "int8.row", "int8.tensor.static", doc="as W8A8 with one calibrated range per input; re-quantization fuses into the layer before"),
    Recipe("W8A8_SMOOTHQUANT", "int8.row", "int8.row", passes=("smooth(alpha=0.5)",), doc="SmoothQuant: W8A8 once the input's large channels are moved into the weights"),
    Recipe("W8A8_SMOOTHQUANT_STATIC", "int8.row", "int8.tensor.static", passes=("smooth(alpha=0.5)",), doc="SmoothQuant with one calibrated range per input"),
    Recipe("LLM_INT8", "int8.row", "int8.row", passes=("outliers(dynamic=32)",), doc="LLM.int8(): as W8A8, with the input's columns of large values in 16 bits, found on every call; keeps the 16-bit weights"),
    Recipe("LLM_INT8_STATIC", "int8.row", "int8.row", passes=("outliers(threshold=6.0)",), doc="LLM.int8() with the columns that calibration found, of which alone 16-bit weights are kept"),
    Recipe("W8A16", "int8.row", doc="int8 weights per row, 16-bit activations"),
    Recipe("W4A16", "int4.g128", doc="int4 weights in groups of 128, 16-bit activations"),
    Recipe("W4A16_GPTQ", "uint4.g128.point", passes=("gptq",), doc="4-bit weights with zero points, solved by GPTQ in true sequential order"),
    Recipe("W4A16_AWQ", "uint4.g128.point", passes=("awq", "sequential_mse(clip=True)"), doc="4-bit weights with zero points, scaled and clipped by AWQ's searches"),
    Recipe("W4A16_AWQ_GPTQ", "uint4.g128.point", passes=("awq", "gptq(clip=True)"), doc="4-bit weights with zero points, scaled and clipped by AWQ, solved by GPTQ"),
    Recipe("W3A16_AWQ_GPTQ", "uint3.g128.point", passes=("awq", "gptq(clip=True)"), doc="3-bit weights with zero points, scaled and clipped by AWQ, solved by GPTQ"),
    Recipe("W4A8", "int4.g128", "int8.row", doc="int4 weights in groups of 128, int8 activations per token"),
    Recipe("W4A8_AQAS", "int4.g128", "int8.row", passes=("aqas", "gptq"), doc="W4A8 scaled by AQAS, which weighs the errors of weights and activations, and solved by GPTQ"),
    Recipe("FP8", "e4m3.row", "e4m3.row", doc="FP8 E4M3, weights per row and activations per token"),
    Recipe("FP8_TENSOR", "e4m3.tensor", "e4m3.tensor", doc="FP8 E4M3, one scale for each tensor, taken at run time"),
    Recipe("NF4", "nf4.g64", doc="QLoRA's 4-bit NormalFloat in blocks of 64, 16-bit activations"),
    Recipe("W4A16_LUT", "lut4.g64", passes=("lloyd_max",), doc="sixteen values of each weight's own, fitted by Lloyd and Max's rule to what an error costs, 16-bit activations"),
    Recipe("FP4", "fp4.g64", doc="bitsandbytes' FP4 in blocks of 64, 16-bit activations"),
    Recipe("INT8_ABSMAX", "int8.tensor", "int8.tensor", doc="baseline of the LLM.int8() paper: one range for each tensor"),
    Recipe("INT8_ZEROPOINT", "int8.tensor.point", "int8.tensor.point", doc="baseline of the LLM.int8() paper: one asymmetric range for each tensor"),
    Recipe("INT8_ROWWISE", "int8.tensor", "int8.row", doc="baseline of the LLM.int8() paper: activations per token, one range for the weight"),
    Recipe("INT8_VECTORWISE", "int8.row", "int8.row", doc="baseline of the LLM.int8() paper: as W8A8"),
    Recipe("INT8_VECTORWISE_ZEROPOINT", "int8.row.point", "int8.row.point", doc="baseline of the LLM.int8() paper: vector-wise, asymmetric"),
    Recipe("INT8_ABSMAX_DECOMPOSED", "int8.tensor", "int8.tensor", passes=("outliers(threshold=6.0)",), doc="INT8_ABSMAX beside 16-bit outlier columns"),
    Recipe("INT8_ZEROPOINT_DECOMPOSED", "int8.tensor.point", "int8.tensor.point", passes=("outliers(threshold=6.0)",), doc="INT8_ZEROPOINT beside 16-bit outlier columns"),
    Recipe("INT8_ROWWISE_DECOMPOSED", "int8.tensor", "int8.row", passes=("outliers(threshold=6.0)",), doc="baseline of the LLM.int8() paper: row-wise beside 16-bit outlier columns"),
    Recipe("LLM_INT8_ZEROPOINT", "int8.row.point", "int8.row.point", passes=("outliers(threshold=6.0)",), doc="LLM.int8() with asymmetric ranges"),
)
RECIPES: dict[str, Recipe] = {row.name: row for row in _ROWS}


def find_recipe(name: str | Recipe) -> Recipe:
    """A preset by its name, in any case, or a Recipe as it is. Raises OptionError with the list."""
    if isinstance(name, Recipe):
        return name
    key = str(name).upper().replace("-", "_")
    if key not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[key]
