"""Rows of `benchmarks/run.py`: literal tables, nothing is computed here. Rows of a part run in the order in which they stand, the most important first, until the time is up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One recipe on one `nn.Linear` of `n` x `k`, at several batch sizes. `error`: the greatest relative distance from the op's reference. `goal`: times as fast as compiled fp32, at some M."""

    recipe: str
    n: int = 2048
    k: int = 2048
    rows: tuple[int, ...] = (1, 16, 64, 512)
    error: float = 1e-3
    goal: tuple[tuple[int, float], ...] = ()


CASES = (
    Case("W8A8", error=5e-3, goal=((1, 2.0), (64, 2.0))),  # fused arithmetic may round a code the other way
    Case("W8A16"),
    Case("W4A16"),
    Case("NF4"),
)
QUICK = (Case("W8A8", 256, 256, (1, 16), error=5e-3), Case("NF4", 256, 256, (1,)))

OVERHEAD_GOAL = 1.10
"""A call of qcompile over one of plain Inductor, where nothing is quantized."""
COLD_GOAL = 1.5
"""Compiling with empty caches, as a multiple of plain Inductor's."""
WARM_GOAL = 2.0
"""Seconds beyond plain Inductor's, in a second process with the same caches."""


@dataclass(frozen=True)
class GpuCase:
    """One recipe on a bfloat16 `nn.Linear` of a GPU. `goal`: microseconds on an H200 by number of rows, quantization of the input included; `peer`: the best of other libraries there."""

    recipe: str
    goal: tuple[tuple[int, float], ...]
    peer: tuple[tuple[int, float], ...]
    bits: float
    """Bits of a weight: what a product with few rows must read."""
    weight: str | None = None


ROWS = (1, 16, 64, 256, 4096)


def _by_rows(*us: float) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ROWS, us))


GPU_CASES = (
    GpuCase("W4A8", _by_rows(9.5, 11, 14, 30, 460), _by_rows(22, 57, 52, 158, 2223), 4.125),
    GpuCase("W4A16", _by_rows(10, 13, 18, 46, 670), _by_rows(22, 57, 52, 158, 2223), 4.125),
    GpuCase("W8A8", _by_rows(16, 16.5, 18, 28, 430), _by_rows(17.8, 20.8, 21.8, 43.9, 525), 8.0),
    GpuCase("FP8", _by_rows(16, 16.5, 18, 26, 320), _by_rows(17.4, 24.2, 21.5, 30.1, 323), 8.0),
    GpuCase("W8A16", _by_rows(16, 17, 22, 46, 670), _by_rows(19.3, 28.5, 50.6, 147, 1901), 8.0),
    GpuCase("NF4", _by_rows(12, 16, 22, 50, 680), _by_rows(30.4, 69, 108, 119, 696), 4.125, "nf4.g64/int8.row"),
)
SHAPE = (14336, 4096)
"""N, K of the table."""
GPU_SHAPES = ((4096, 14336), (6144, 4096), (28672, 4096), (128256, 4096))
"""The others, at one and sixteen rows."""


@dataclass(frozen=True)
class Line:
    """A linear beside W8A8's: `options` of the backend, large columns in the data, and the most times W8A8's microseconds that it may take."""

    name: str
    options: tuple[tuple[str, object], ...]
    columns: int
    calibrated: bool
    goal: float


LINES = (
    Line("LLM_INT8 static, 64 columns", (("recipe", "W8A8"), ("passes", ["outliers(columns=64)"])), 64, True, 1.15),
    Line("LLM_INT8 dynamic, 32 columns", (("recipe", "LLM_INT8"),), 32, False, 1.5),
)


@dataclass(frozen=True)
class Moe:
    """A grouped product of `experts` matrices N x K, sorted rows, `top` experts for each of `m` tokens; `whole`: transformers' Qwen3 experts, with N columns between two products. `goal`: times as fast as bfloat16."""

    recipe: str
    m: int
    goal: float
    bits: float
    error: float = 1e-2
    whole: bool = False
    experts: int = 128
    n: int = 768
    k: int = 2048
    top: int = 8


MOES = (
    Moe("W4A16", 1, 1.5, 4.125),
    Moe("W8A8", 1, 1.5, 8.0),
    Moe("FP8", 1, 1.5, 8.0),
    Moe("W8A16", 1, 1.5, 8.0),
    Moe("W4A16", 64, 1.0, 4.125),
    Moe("W8A8", 64, 1.0, 8.0),
    Moe("FP8", 64, 1.0, 8.0),
    Moe("W8A16", 64, 1.0, 8.0),
    Moe("W4A16", 4096, 1.0, 4.125),
    Moe("W8A8", 4096, 1.0, 8.0),
    Moe("FP8", 4096, 1.0, 8.0),
    Moe("W8A16", 4096, 1.0, 8.0),
    Moe("W4A16", 16, 1.0, 4.125),
    Moe("W8A8", 16, 1.0, 8.0),
    Moe("FP8", 16, 1.0, 8.0),
    Moe("W8A16", 16, 1.0, 8.0),
    Moe("W4A16", 1, 1.5, 4.125, 0.3, True),
    Moe("W8A8", 1, 1.5, 8.0, 0.08, True),
    Moe("W4A16", 64, 1.0, 4.125, 0.3, True),
    Moe("W8A8", 64, 1.0, 8.0, 0.08, True),
    Moe("W8A8", 4096, 1.0, 8.0, 0.08, True),
)


# --- whole models ----------------------------------------------------------------------------------------------------

VOCABULARY = 128256
LLAMAS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}


@dataclass(frozen=True)
class Breakdown:
    """Kernels of one step of decoding with some layers of a model."""

    recipe: str
    head: str | None
    batch: int
    context: int
    model: str = "8B"
    layers: int = 4


BREAKDOWNS = (
    Breakdown("bf16", None, 1, 128),
    Breakdown("W4A16", "int4.g128", 1, 128),
    Breakdown("W8A8", "int8.row", 1, 128),
    Breakdown("FP8", "e4m3.row", 1, 128),
    Breakdown("W4A8", "int4.g128", 1, 128),
    Breakdown("bf16", None, 64, 2048),
    Breakdown("W4A16", "int4.g128", 64, 2048),
    Breakdown("W8A8", "int8.row", 64, 2048),
    Breakdown("bf16", None, 64, 128),
    Breakdown("W4A16", "int4.g128", 64, 128),
    Breakdown("W8A8", "int8.row", 64, 128),
    Breakdown("bf16", None, 1, 2048),
    Breakdown("W4A16", "int4.g128", 1, 2048),
    Breakdown("W8A8", "int8.row", 1, 2048),
)


BITS = {None: 16.0, "bf16": 16.0, "float32": 32.0, "W4A16": 4.125, "W4A8": 4.125, "W8A8": 8.0, "FP8": 8.0, "int4.g128": 4.125, "int8.row": 8.0, "e4m3.row": 8.0}
"""Of a weight, by recipe or by the head's scheme."""
ERRORS = {16: 0.1, 8: 0.6}
"""The greatest relative distance of whole models' logits from those of the same quantized graph run by its references (of the eager model, where nothing is quantized), before anything is timed; by
the bits of activations. A rounding of a 16-bit value moves some 8-bit codes to the next one, which is as large as quantizing itself, in each of 32 layers of random weights (measured: 0.23 to 0.41).
What has nothing to do with the truth is at 1.4."""


@dataclass(frozen=True)
class Run:
    """Decoding. `recipe` "float32" is transformers' eager model in that type, "bf16" Inductor alone; `head` None: 16 bits. `goal`: tokens a second."""

    model: str
    recipe: str
    head: str | None = None
    batch: int = 1
    context: int = 128
    goal: float | None = None


RUNS = (
    Run("8B", "W4A16", "int4.g128", goal=600),
    Run("8B", "bf16"),
    Run("8B", "W8A8", "int8.row", goal=380),
    Run("1B", "float32"),
    Run("1B", "W4A16", "int4.g128", goal=2940),
    Run("8B", "FP8", "e4m3.row", goal=380),
    Run("8B", "W4A8", "int4.g128", goal=600),
    Run("8B", "W4A16", None, 64, 2048),
    Run("8B", "bf16", None, 64, 2048),
    Run("8B", "float32"),
    Run("1B", "bf16"),
    Run("1B", "W4A8", "int4.g128", goal=2940),
    Run("8B", "W8A8", "int8.row", 64, 2048),
    Run("8B", "W4A16", None, goal=600),
    Run("1B", "W8A8", "int8.row"),
    Run("1B", "FP8", "e4m3.row"),
    Run("8B", "W4A16", "int4.g128", 1, 2048),
    Run("8B", "bf16", None, 1, 2048),
    Run("8B", "W8A8", "int8.row", 1, 2048),
    Run("8B", "W8A8", None, goal=380),
    Run("8B", "FP8", None, goal=380),
    Run("8B", "W4A8", None, goal=600),
    Run("1B", "W4A16", None, goal=2940),
    Run("1B", "W4A8", None, goal=2940),
    Run("8B", "bf16", None, 64, 128),
    Run("8B", "W4A16", "int4.g128", 64, 128),
    Run("8B", "W8A8", "int8.row", 64, 128),
    Run("8B", "FP8", "e4m3.row", 64, 128),
    Run("8B", "bf16", None, 8, 128),
    Run("8B", "W4A16", "int4.g128", 8, 128),
    Run("8B", "W4A8", "int4.g128", 8, 128),
    Run("8B", "W8A8", "int8.row", 8, 128),
    Run("8B", "bf16", None, 8, 2048),
    Run("8B", "W4A16", "int4.g128", 8, 2048),
    Run("8B", "W8A8", "int8.row", 8, 2048),
    Run("8B", "W4A8", "int4.g128", 64, 128),
    Run("8B", "FP8", "e4m3.row", 64, 2048),
    Run("8B", "FP8", "e4m3.row", 1, 2048),
    Run("1B", "bf16", None, 8, 128),
    Run("1B", "W4A16", "int4.g128", 8, 128),
    Run("1B", "bf16", None, 64, 128),
    Run("1B", "W4A16", "int4.g128", 64, 128),
)


@dataclass(frozen=True)
class Prefill:
    """All layers of a model on `tokens` tokens of one sequence, logits of the last position. `goal_ms`, or `goal` times bf16's. `graph`: as a CUDA graph (mode "reduce-overhead"), else every kernel is
    launched from Python."""

    recipe: str
    goal_ms: float | None = None
    goal: float | None = None
    model: str = "8B"
    tokens: int = 2048
    graph: bool = False


PREFILLS = tuple(Prefill(recipe, ms, goal, graph=graph) for graph in (False, True) for recipe, ms, goal in (("bf16", None, None), ("FP8", 31, None), ("W8A8", 38, None), ("W4A16", None, 1.08)))


@dataclass(frozen=True)
class Generate:
    """transformers' generate with a static cache against a step that is captured by hand with a cache as long. `goal`: the share of its tokens a second. `guards`: whether Dynamo guards modules on
    every call, as it does where it is not told otherwise. `own`: one cache is given to all calls of generate, which else makes one for each."""

    recipe: str
    head: str | None
    model: str = "8B"
    prompt: int = 128
    goal: float | None = 0.85
    guards: bool = True
    own: bool = False


GENERATES = (
    Generate("W4A16", "int4.g128"), Generate("W4A16", "int4.g128", own=True), Generate("W4A16", "int4.g128", guards=False, own=True), Generate("bf16", None, goal=None), Generate("W4A16", "int4.g128", "1B"), Generate("W8A8", "int8.row"),
)  # fmt: skip


@dataclass(frozen=True)
class Layers:
    """A model that is filled layer by layer on a card of which it may use `gib`, less than its 16-bit weights take."""

    recipe: str
    head: str | None
    model: str
    gib: float
    context: int = 128


LAYERS = (Layers("W4A16", "int4.g128", "8B", 8), Layers("W4A16", "int4.g128", "70B", 48))


@dataclass(frozen=True)
class Start:
    """Seconds of the first call of a step of decoding in a process of its own: caches empty, then those of the process before."""

    recipe: str
    head: str | None
    model: str = "8B"
    cold: float = 60
    warm: float = 12


STARTS = (Start("W4A16", "int4.g128"), Start("bf16", None), Start("FP8", "e4m3.row"))
