"""What Inductor generates for an H200, checked without one: how many kernels, which of them are extern, and that each compiles for sm_90 without spilling."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.xdist_group("generated")  # a worker keeps what its cases gave

Isolated = Callable[..., dict[str, Any]]


def compiles(result: dict[str, Any]) -> None:
    """Every kernel has a cubin and keeps its registers."""
    for kernel in result["kernels"]:
        assert kernel["cubin_bytes"] > 1000, kernel["name"]
        assert kernel["spills"] == 0, f"{kernel['name']} spills {kernel['spills']} bytes, {kernel['registers']} registers, {kernel['config']}"


def names(result: dict[str, Any]) -> list[str]:
    return [kernel["name"] for kernel in result["kernels"]]


def test_inductor_makes_silu_up_and_row_codes_one_kernel(isolated: Isolated) -> None:
    """Plain torch code on two tensors, with no product and no op of ours: what Inductor fuses by itself. What the backend makes of a SwiGLU MLP is in test_fusion.py."""
    result = isolated("swiglu_quantize", config={"split_reductions": False})
    assert len(result["calls"]) == 1 and result["externs"] == [], result["calls"]
    assert "tl.int8" in result["kernels"][0]["source"]
    compiles(result)


@pytest.mark.slow
def test_few_long_rows_split_the_reduction(isolated: Isolated) -> None:
    """Why the test above switches `split_reductions` off: 64 rows of 11008 leave SMs idle, so Inductor computes the row maximum in two steps and reads the inputs twice."""
    assert len(isolated("swiglu_quantize", compile=False)["calls"]) == 3
    assert len(isolated("swiglu_quantize", compile=False, m=4096)["calls"]) == 1


@pytest.mark.slow
def test_autotuned_int8_gemm_uses_wgmma(isolated: Isolated) -> None:
    result = isolated("int8_gemm_autotuned")
    assert len(result["calls"]) == 1 and result["kernels"][0]["ptx"]["wgmma.mma_async"] > 0
    compiles(result)


def test_indexing_and_cache_updates(isolated: Isolated) -> None:
    result = isolated("indexing")
    assert result["externs"] == ["torch.ops.aten._scaled_dot_product_efficient_attention.default"]
    assert result["graphs"] == 1
    compiles(result)


@pytest.mark.parametrize("decompose", [True, False])
def test_graph_with_our_decompositions_and_pass(isolated: Isolated, decompose: bool) -> None:
    result = isolated("graph_level", decompose=decompose, compile=False)
    kept = "qcompile.linear.default" in result["extra"]["seen"]
    assert kept is not decompose
    assert any(name.startswith("triton_tem_") for name in names(result)) is not decompose
    assert ("extern_kernels.mm" in result["externs"]) is decompose


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "matmuls"),
    [("opt", {"addmm": 6, "mm": 1}), ("llama", {"mm": 8})],
)
def test_transformers(isolated: Isolated, model: str, matmuls: dict[str, int]) -> None:
    """One layer and the head of a real model, unquantized: one graph, each linear one extern call, fused attention, nothing left on the CPU."""
    result = isolated("transformer", name=model, compile=False)
    externs = Counter(name.removeprefix("extern_kernels.") for name in result["externs"])
    attention = [name for name in externs if "_attention" in name]
    assert result["graphs"] == 1 and len(attention) == 1
    rotary = 1 if model == "llama" and torch.__version__.startswith("2.11.") else 0  # frequencies times positions, a product with one column, is pointwise from 2.12 on
    assert {name: n for name, n in externs.items() if name not in attention} == matmuls | ({"mm": matmuls["mm"] + rotary})
    assert "async_compile.cpp" not in result["source"] and "empty_strided_cpu(" not in result["source"]


def test_a_failing_case_shows_its_output(isolated: Isolated) -> None:
    with pytest.raises(AssertionError, match="no_such_case"):
        isolated("no_such_case")


@pytest.mark.parametrize("part", ["W8A8", "W4A16"])
def test_early_launches_wait_for_the_kernel_before(qcase: Callable[..., dict[str, Any]], part: str) -> None:
    """Every kernel waits before it reads or writes and before it lets the next one begin; the one that only fills memory, which Inductor leaves without a wait, too."""
    result = qcase("early")[part]
    assert result["externs"] == [] and len(result["kernels"]) == (4 if part == "W4A16" else 5)
    for kernel in result["kernels"]:
        text = kernel["source"]
        assert "'launch_pdl': True" in text, kernel["name"]
        begin = text.index("@triton.jit")
        wait = text.index("tl.extra.cuda.gdc_wait()", begin)
        later = [text.find(word, begin) for word in ("tl.load(", "tl.store(", "gdc_launch_dependents()")]
        assert all(wait < at for at in later if at >= 0), kernel["name"]
        assert ("tl.load(" in text) == ("gdc_launch_dependents()" in text), kernel["name"]
    compiles(result)


@pytest.mark.parametrize(("part", "programs"), [("W4A8", 112), ("NF4", 224)])
def test_programs_that_are_launched_early_are_spread(qcase: Callable[..., dict[str, Any]], part: str, programs: int) -> None:
    """By the shared memory that Triton takes for their stages, no more fit in a multiprocessor than its share (``kernels/tuned.py``, ``spread``): with the tuned stages it would be three."""
    (product,) = [kernel for kernel in qcase("early_rows", compile="triton_tem")[part]["kernels"] if kernel["name"].startswith("triton_tem")]
    assert 228 * 1024 // (product["shared"] + 1024) == -(-programs // 132) and product["spills"] == 0, product["config"]


def test_launches_are_early_only_where_it_is_asked_for(qcase: Callable[..., dict[str, Any]]) -> None:
    assert not any("gdc_wait" in kernel["source"] or "'launch_pdl': True" in kernel["source"] for kernel in qcase("early")["plain"]["kernels"])


@pytest.mark.parametrize("rows", [1, 16])
def test_parts_of_k_have_a_warp_each(qcase: Callable[..., dict[str, Any]], rows: int) -> None:
    """Tensor cores multiply them as a batch (``mma.sync``, which a warp issues alone), and their sums meet once, behind the loop."""
    for name, result in qcase("parted", compile="triton_tem").items():
        if not name.endswith(f" {rows}"):
            continue
        (product,) = [kernel for kernel in result["kernels"] if kernel["name"].startswith("triton_tem")]
        assert "acc = tl.sum(acc, 0)" in product["source"] and "part = tl.arange(0, 4)" in product["source"], name
        assert sum(count for opcode, count in product["ptx"].items() if opcode.startswith("mma.sync")) > 0, (name, product["ptx"])
        assert product["cubin_bytes"] > 1000 and product["spills"] == 0, name
