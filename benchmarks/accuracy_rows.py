"""Rows and goals of `benchmarks/accuracy.py`: literal tables. A method as the textbook has it, beside the options of `torch.compile(backend="qcompile")` that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from textbook import Grid, Method

LMS = ("lm", "lm-outliers")
FED_BY_NORM = ("o_proj", "down_proj")
"""What LLM.int8() on the norm-fed linears of a Llama spares."""


@dataclass(frozen=True)
class Row:
    """One method. ``method``: the textbook's, None where it has none; ``ours``: options of the backend, as one writes them; ``spare``: endings of names of linears that keep 16 bits;
    ``models``: where it is run."""

    name: str
    method: Method | None
    ours: Mapping[str, Any] = field(hash=False)
    spare: tuple[str, ...] = ()
    models: tuple[str, ...] = (*LMS, "encoder")

    @property
    def options(self) -> dict[str, Any]:
        """``ours`` with the spared linears and the eager references."""
        ignore = {"ignore": [f"re:.*{ending}$" for ending in self.spare]} if self.spare else {}
        return {**self.ours, **ignore, "lower": "eager"}


T8, R8, T8P, R8P = Grid(8, "tensor"), Grid(8, "row"), Grid(8, "tensor", point=True), Grid(8, "row", point=True)
G4, G4P, G3, G3P = Grid(4, 128), Grid(4, 128, point=True), Grid(3, 128), Grid(3, 128, point=True)
E4M3_TENSOR = Grid(8, "tensor", kind="float", exp=4)
E4M3, E3M4 = Grid(8, "row", kind="float", exp=4), Grid(8, "row", kind="float", exp=3)
SPLIT_COLUMNS = 32
SPLIT = f"outliers(dynamic={SPLIT_COLUMNS}, threshold=6.0)"
"""Found in every call; the codes of the weight are those of the whole weight."""
CHOSEN = "outliers(threshold=6.0)"
"""Chosen by calibration, so that the weight's ranges are those of the columns that are left."""


def _w8a8(weight: str, x: str, *passes: str) -> dict[str, Any]:
    return {"weight": weight, "input": x, "passes": list(passes)}


def _w(weight: str, *passes: str) -> dict[str, Any]:
    return _w8a8(weight, "16bit", *passes)


ROWS: tuple[Row, ...] = (
    # the table of LLM.int8(): ranges and granularities, without and with decomposition
    Row("w8a8-tensor", Method(T8, T8), _w8a8("int8.tensor", "int8.tensor")),
    Row("w8a8-vector", Method(R8, R8), _w8a8("int8.row", "int8.row")),
    Row("w8a8-rowwise", Method(T8, R8), _w8a8("int8.tensor", "int8.row")),
    Row("w8a8-tensor-point", Method(T8P, T8P), _w8a8("uint8.tensor.point", "uint8.tensor.point")),
    Row("w8a8-vector-point", Method(R8P, R8P), _w8a8("uint8.row.point", "uint8.row.point")),
    Row("w8a8-tensor-split", Method(T8, T8, threshold=6.0), _w8a8("int8.tensor", "int8.tensor", CHOSEN)),
    Row("w8a8-rowwise-split", Method(T8, R8, threshold=6.0), _w8a8("int8.tensor", "int8.row", CHOSEN)),
    Row("w8a8-vector-point-split", Method(R8P, R8P, threshold=6.0), _w8a8("uint8.row.point", "uint8.row.point", CHOSEN)),
    Row("llm-int8", Method(R8, R8, threshold=6.0, whole=True), _w8a8("int8.row", "int8.row", SPLIT)),
    Row("llm-int8-static", Method(R8, R8, threshold=6.0), _w8a8("int8.row", "int8.row", CHOSEN)),
    Row("llm-int8-norm-fed", Method(R8, R8, threshold=6.0, whole=True), _w8a8("int8.row", "int8.row", SPLIT), FED_BY_NORM, LMS),
    Row("w8a8-static", Method(R8, T8, static=True), _w8a8("int8.row", "int8.tensor.static")),
    Row("smoothquant", Method(R8, R8, transform="smooth"), _w8a8("int8.row", "int8.row", "smooth(alpha=0.5)")),
    Row("smoothquant-auto", None, _w8a8("int8.row", "int8.row", "smooth(alpha='auto')")),
    Row("smoothquant-static", Method(R8, T8, transform="smooth", static=True), _w8a8("int8.row", "int8.tensor.static", "smooth(alpha=0.5)")),
    Row("w8a8-tensor-equalize", None, _w8a8("int8.tensor", "int8.tensor", "equalize")),
    Row("w8a16", Method(R8), {"recipe": "W8A16"}),
    # 4 bits
    Row("w4-rtn", Method(G4), _w("int4.g128")),
    Row("w4-rtn-point", Method(G4P), _w("uint4.g128.point")),
    Row("w4-rtn-bias", None, _w("int4.g128", "bias")),
    Row("w4-sequential-mse", None, _w("int4.g128", "sequential_mse")),
    Row("w4-adaround", None, _w("int4.g128", "adaround"), models=LMS),
    Row("w4-gptq", Method(G4, solver="gptq"), _w("int4.g128", "gptq")),
    Row("w4-gptq-point", Method(G4P, solver="gptq"), _w("uint4.g128.point", "gptq")),
    Row("w4-awq", Method(G4P, transform="awq"), _w("uint4.g128.point", "awq")),
    Row("w4-awq-symmetric", Method(G4, transform="awq"), _w("int4.g128", "awq")),
    Row("w4-awq-clip", Method(G4P, transform="awq", clip=True), _w("uint4.g128.point", "awq", "sequential_mse(clip=True)")),
    Row("w4-awq-clip-symmetric", Method(G4, transform="awq", clip=True), _w("int4.g128", "awq", "sequential_mse(clip=True)")),
    # 4 bits, combinations
    Row("w4-awq-gptq", Method(G4P, transform="awq", solver="gptq"), _w("uint4.g128.point", "awq", "gptq")),
    Row("w4-awq-gptq-symmetric", Method(G4, transform="awq", solver="gptq"), _w("int4.g128", "awq", "gptq")),
    Row("w4-awq-clip-gptq", Method(G4P, transform="awq", clip=True, solver="gptq"), _w("uint4.g128.point", "awq", "gptq(clip=True)")),
    Row("w4-smooth-gptq-symmetric", Method(G4, transform="smooth", solver="gptq"), _w("int4.g128", "smooth(alpha=0.5)", "gptq")),
    Row("w4-smooth-clip-gptq-symmetric", Method(G4, transform="smooth", clip=True, solver="gptq"), _w("int4.g128", "smooth(alpha=0.5)", "gptq(clip=True)")),
    Row("w4-smooth-clip-gptq", Method(G4P, transform="smooth", clip=True, solver="gptq"), _w("uint4.g128.point", "smooth(alpha=0.5)", "gptq(clip=True)")),
    Row("w4a8-smooth-gptq", Method(G4, R8, transform="smooth", solver="gptq"), _w8a8("int4.g128", "int8.row", "smooth(alpha=0.5)", "gptq")),
    Row("w4a8", Method(G4, R8), {"recipe": "W4A8"}),
    Row("w4a8-aqas", None, {"recipe": "W4A8_AQAS"}),
    Row("nf4", Method(Grid(4, 64, kind="nf4")), {"recipe": "NF4"}),
    Row("fp4", Method(Grid(4, 64, kind="fp4")), {"recipe": "FP4"}),
    Row("w4-lut", None, {"recipe": "W4A16_LUT"}),
    # 3 bits
    Row("w3-rtn", Method(G3), _w("int3.g128")),
    Row("w3-rtn-point", Method(G3P), _w("uint3.g128.point")),
    Row("w3-gptq", Method(G3, solver="gptq"), _w("int3.g128", "gptq")),
    Row("w3-gptq-point", Method(G3P, solver="gptq"), _w("uint3.g128.point", "gptq")),
    Row("w3-awq", Method(G3P, transform="awq"), _w("uint3.g128.point", "awq")),
    Row("w3-awq-gptq", Method(G3P, transform="awq", solver="gptq"), _w("uint3.g128.point", "awq", "gptq")),
    Row("w3-lut-gptq", None, _w("lut3.g128", "gptq")),
    Row("w3-clip-gptq", Method(G3P, clip=True, solver="gptq"), _w("uint3.g128.point", "gptq(clip=True)")),
    Row("w3-awq-clip-gptq", Method(G3P, transform="awq", clip=True, solver="gptq"), _w("uint3.g128.point", "awq", "gptq(clip=True)")),
    # 8-bit floating point
    Row("e4m3", Method(E4M3, E4M3), {"recipe": "FP8"}),
    Row("e4m3-tensor", Method(E4M3_TENSOR, E4M3_TENSOR), {"recipe": "FP8_TENSOR"}),
    Row("e3m4", Method(E3M4, E3M4), _w8a8("e3m4.row", "e3m4.row")),
)
W4_COMBINED = ("w4-awq-gptq", "w4-awq-clip-gptq", "w4-smooth-clip-gptq")
W4_SYMMETRIC = ("w4-awq-gptq-symmetric", "w4-smooth-gptq-symmetric", "w4-smooth-clip-gptq-symmetric")
W4_AWQ = ("w4-awq-symmetric", "w4-awq-clip-symmetric")
"""AWQ is a scale search and a clip search."""
W3 = tuple(row.name for row in ROWS if row.name.startswith("w3"))


@dataclass(frozen=True)
class Goal:
    """The best of ``rows`` is at most ``factor`` times the best of ``than``; at most ``factor`` itself where ``than`` is empty. ``of="int8"``: the share of multiplications in int8 is at least ``factor``."""

    model: str
    rows: tuple[str, ...]
    factor: float
    than: tuple[str, ...] = ()
    of: str = "metric"

    def __str__(self) -> str:
        best = f"best of {', '.join(self.rows)}" if len(self.rows) > 1 else self.rows[0]
        if self.of == "int8":
            return f"{self.model}: {best} has at least {self.factor:.0%} of its multiplications in int8"
        return f"{self.model}: {best} at most {self.factor:g}" + (f" x {' or '.join(self.than)}" if self.than else "")


TEXTBOOK_RATIO = {"encoder": 1.03}
"""Greatest ratio of our metric to the textbook's, in every row of a model."""
GOALS: tuple[Goal, ...] = (
    Goal("encoder", W4_COMBINED, 0.015),
    Goal("encoder", W3, 0.07),
    Goal("lm-outliers", ("llm-int8",), 1e-3, ("w8a8-vector",)),
    Goal("lm-outliers", ("llm-int8",), 0.8, of="int8"),
    Goal("lm-outliers", ("smoothquant",), 1e-3, ("w8a8-vector",)),
    Goal("lm-outliers", ("smoothquant-static",), 1e-2, ("w8a8-tensor",)),
    Goal("lm", ("w4-gptq",), 0.1, ("w4-rtn",)),
    Goal("lm-outliers", ("w4-gptq",), 0.6, ("w4-rtn",)),
    Goal("lm", W4_AWQ, 0.85, ("w4-rtn",)),
    Goal("lm-outliers", W4_AWQ, 0.5, ("w4-rtn",)),
    Goal("lm-outliers", W4_SYMMETRIC, 0.5, ("w4-awq-symmetric", "w4-gptq")),
)
