"""What Inductor makes of training for an H200: fake quantization fuses; of FP8, casts and magnitudes fuse into what computes the values, codes are transposed apart, and shared inputs are cast once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

Part = dict[str, Any]
QCase = Callable[..., dict[str, Part]]


def stored(part: Part, name: str) -> list[str]:
    """Dtypes that a kernel writes."""
    row = next(k for k in part["kernels"] if k["name"] == name)
    signature = re.search(r"'signature': \{(.*?)\}", row["source"])
    assert signature
    return sorted(re.findall(r"'(?:in_)?out_ptr\d+': '\*(\w+)'", signature[1]))


def count(part: Part, word: str) -> int:
    """Launches whose names hold a word."""
    return sum(word in name for name in part["calls"])


def test_norm_magnitude_and_cast_are_one_kernel(qcase: QCase) -> None:
    """Delayed scaling: the norm stores codes (for up and gate, once), its rows' largest magnitudes and what its backward needs; nothing in 16 bits."""
    part = qcase("fp8_training", compile=False)["delayed forward"]
    (norm,) = [name for name in part["calls"] if "rsqrt" in name]
    assert "fp8e4nv" in stored(part, norm) and "fp32" in stored(part, norm)
    assert stored(part, norm).count("fp8e4nv") == 1


def test_current_scaling_takes_magnitudes_in_the_norm(qcase: QCase) -> None:
    part = qcase("fp8_training", compile=False)["tensor forward"]
    (norm,) = [name for name in part["calls"] if "rsqrt" in name and ("_red_" in name or "_per_" in name)]
    assert "bf16" in stored(part, norm)  # largest magnitudes of rows; the cast needs that of all
    assert "fp8e4nv" not in stored(part, norm)


@pytest.mark.parametrize("scaling", ["tensor", "row", "delayed"])
def test_nine_products_all_in_fp8(qcase: QCase, scaling: str) -> None:
    forward, backward = (qcase("fp8_training", compile=False)[f"{scaling} {which}"] for which in ("forward", "backward"))
    assert forward["externs"] == ["extern_kernels._scaled_mm"] * 3 and backward["externs"] == ["extern_kernels._scaled_mm"] * 6


@pytest.mark.parametrize(("scaling", "transposes"), [("tensor", 3 + 2 + 3), ("delayed", 3 + 2 + 3)])
def test_codes_are_transposed_apart_and_once(qcase: QCase, scaling: str, transposes: int) -> None:
    """Three weights, two inputs (up and gate share one), three gradients: each a kernel that reads and writes bytes, and none is a reduction."""
    forward, part = (qcase("fp8_training", compile=False)[f"{scaling} {which}"] for which in ("forward", "backward"))
    names = [name for name in part["calls"] if "transpose" in name]
    assert count(forward, "transpose") == 0 and len(names) == transposes and all("_poi_" in name and len(stored(part, name)) == 1 for name in names)


def test_backward_saves_codes(qcase: QCase) -> None:
    """The backward takes three weights and two inputs in FP8."""
    source = qcase("fp8_training", compile=False)["delayed backward"]["source"]
    taken = re.findall(r"^    (\w+) = rand_strided\((\(.*?\)), .*?dtype=torch\.(\w+)\)", source, re.M)
    assert sum(dtype == "float8_e4m3fn" for _, _, dtype in taken) == 5, taken


def test_fake_quantization_is_no_kernel_of_its_own_but_for_weights(qcase: QCase) -> None:
    """QAT of int4 groups under int8 rows: inputs are rounded in the norm and in the gate's product, each weight is in one pointwise kernel, and in the backward its gradient and its step's in one."""
    forward, backward = (qcase("fp8_training", compile=False)[f"qat {which}"] for which in ("forward", "backward"))
    calls = ["product" if name.startswith("extern") else name.split("_")[1] for name in forward["calls"]]
    assert calls == ["per", "poi", "product", "poi", "product", "poi", "per", "product"]
    norm, silu = (name for name in forward["calls"] if "_per_" in name)
    assert "rsqrt" in norm and "fake_quant" in norm and "silu" in silu and "fake_quant" in silu
    weights = [name for name in backward["calls"] if "sub_sum_view_where" in name]
    assert len(weights) == 3 and all(stored(backward, name) == ["bf16", "fp32"] for name in weights) and count(backward, "extern") == 6
    assert len(backward["calls"]) == 6 + 3 + 1 + 1 + 2, "products, weights, the gate's product, the norm, and the sums of the norm's gradient"


def test_the_optimizer_reads_its_master(qcase: QCase) -> None:
    """A cast to bfloat16 and back is left out of Triton code, so that a master in more bits would never equal its parameter: it is rounded by its bits."""
    kernels = qcase("optimizer", compile=False)["step"]["kernels"]
    masked = [k["source"] for k in kernels if re.search(r"tl\.full\(\[.*?\], -65536, tl\.int32\)", k["source"])]
    assert len(masked) == 2 and all(".to(tl.int32, bitcast=True)" in source for source in masked)  # the largest magnitudes; the new parameter
