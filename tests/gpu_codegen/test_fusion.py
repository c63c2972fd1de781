"""What the whole backend makes of models for an H200: which chains are one kernel, what is stored, which tensor-core instructions run, how many kernels a layer takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from small import renumbered

pytestmark = pytest.mark.xdist_group("fusion")  # a worker keeps what its cases gave

Part = dict[str, Any]
QCase = Callable[..., dict[str, Part]]
COUNTS = {"W8A8": 10, "W8A8_STATIC": 9, "W8A16": 8, "W4A16": 8, "W4A8": 10, "FP8": 10, "FP8_TENSOR": 15, "NF4": 8, "FP4": 8}
COUNTS |= {"W8A8_SMOOTHQUANT": COUNTS["W8A8"], "W8A8_SMOOTHQUANT_STATIC": COUNTS["W8A8_STATIC"], "W4A16_AWQ": COUNTS["W4A16"], "LLM_INT8_STATIC": COUNTS["W8A8"]}
"""Launches of a Llama layer, attention included: 4 products (q, k and v are one, and gate, up and silu), 1 attention, 1 rotation of q and k, 2 norms; the quantization of attention's output, and
that of down's input where its range is dynamic. A transform adds none: a vector that divides o's input multiplies v's columns in the store of their product with q and k."""
PRODUCTS = {"FP8_TENSOR": 7}
"""Other than 4: rows that share one scale stay apart."""


def kinds(part: Part) -> list[str]:
    """What each launch is: "tem" (a template), "per" and "red" (reductions), "poi" (pointwise), or the name of an extern call."""
    return [name.split("_")[1] if name.startswith("triton_") else name for name in part["calls"]]


def kernel(part: Part, name: str) -> dict[str, Any]:
    return next(k for k in part["kernels"] if k["name"] == name)


def templates(part: Part) -> list[dict[str, Any]]:
    """Template kernels in the order of their launches."""
    return [kernel(part, name) for name in part["calls"] if name.startswith("triton_tem")]


def stored(row: dict[str, Any]) -> list[str]:
    """Dtypes that a kernel writes, from its signature."""
    signature = re.search(r"'signature': \{(.*?)\}", row["source"])
    assert signature
    return re.findall(r"'(?:in_)?out_ptr\d+': '\*(\w+)'", signature[1])


def launch(part: Part, name: str, nth: int = 0) -> list[str]:
    """Arguments of a launch."""
    return re.findall(rf"\b{re.escape(name)}\.run\((.*?), stream=", part["source"])[nth].split(", ")  # type: ignore[no-any-return]


def compiled(part: Part, only: str = "triton") -> None:
    """Every kernel has a cubin and keeps its registers."""
    rows = [row for row in part["kernels"] if row["name"].startswith(only)]
    assert rows
    for row in rows:
        assert row["cubin_bytes"] > 1000, row["name"]
        assert row["spills"] == 0, f"{row['name']} spills {row['spills']} bytes, {row['registers']} registers, {row['config']}"


@pytest.mark.parametrize(("name", "codes", "instruction"), [("norm int8", "i8", ".s8"), ("norm fp8", "fp8e4nv", ".e4m3")])
def test_residual_norm_and_quantization_are_one_kernel(qcase: QCase, name: str, codes: str, instruction: str) -> None:
    part = qcase("chains")[name]
    assert kinds(part) == ["per", "tem"]
    norm, product = part["kernels"]
    assert sorted(stored(norm)) == sorted(["bf16", codes, "fp32"])  # the residual stream, codes, one scale for each row
    assert stored(product) == ["bf16"]
    assert sum(count for name, count in product["ptx"].items() if "mma" in name and name.endswith(instruction)) > 0, product["ptx"]
    compiled(part)


@pytest.mark.parametrize("name", ["requantized (M, K)", "requantized (1, S, K)", "requantized (B, S, K)", "requantized dynamic"])
def test_the_whole_epilogue_is_in_the_template(qcase: QCase, name: str) -> None:
    """int4 product, scales, bias, GELU, residual and the next layer's int8 codes: one kernel that stores codes and nothing else."""
    part = qcase("chains")[name]
    assert kinds(part) == ["tem", "tem"] and part["externs"] == []
    first, second = templates(part)
    assert stored(first) == ["i8"] and stored(second) == ["bf16"]
    assert "tanh" in first["source"]
    assert second["ptx"]["mma.sync*.s8"] + second["ptx"]["wgmma.mma_async*.s8"] > 0
    compiled(part)


def test_batch_stays_symbolic(qcase: QCase) -> None:
    assert re.search(r"\bs\d+\b", qcase("chains")["requantized dynamic"]["source"])


def test_without_epilogue_fusion(qcase: QCase) -> None:
    """The count is able to fail."""
    assert kinds(qcase("chains")["unfused"]) == ["tem", "poi", "tem", "poi"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("W8A8 1", 320), ("FP8 1", 320), ("W8A8 2048", 320), ("FP8 2048", 900)])
def test_a_long_row_is_quantized_in_few_instructions(qcase: QCase, name: str, most: int) -> None:
    """They bound it: a thread has 32 of 14,336 elements. The reference took 640 and more, and behind the library's product, where silu is in the same kernel, 1,390."""
    part = qcase("long_rows", compile="triton_per")[name]
    (row,) = [row for row in part["kernels"] if "R0_BLOCK: tl.constexpr = 16384" in row["source"]]
    compiled(part, row["name"])
    assert 100 < row["instructions"] <= most, row["instructions"]
    assert ("silu" in row["name"]) == (name == "FP8 2048")


def test_swiglu_is_one_kernel_and_its_quantization_another(qcase: QCase) -> None:
    """Gate, up and silu are one product. The dynamic quantization of what it stores is one kernel behind it, the one before down: a row's maximum needs all columns, which no tile has."""
    part = qcase("chains")["swiglu"]
    assert kinds(part) == ["per", "tem", "per", "tem"]  # quantize x; gate, up and silu; quantize; down
    assert sorted(stored(kernel(part, part["calls"][2]))) == ["fp32", "i8"]
    assert all(stored(row) == ["bf16"] and row["ptx"]["wgmma.mma_async*.s8"] > 0 for row in templates(part))
    assert "linear_glu" in templates(part)[0]["name"] and "silu" not in part["calls"][2]
    compiled(part)


def test_dynamic_rows_with_a_dynamic_batch(qcase: QCase) -> None:
    part = qcase("chains")["norm"]
    assert kinds(part) == ["per", "tem", "per", "tem"]  # a row's maximum needs the whole row: it cannot be in the product's epilogue
    compiled(part)


def test_static_int8_throughout(qcase: QCase) -> None:
    part = qcase("chains")["int8 (B, S, K)"]
    assert kinds(part) == ["poi", "tem", "tem"]
    assert [stored(row) for row in templates(part)] == [["i8"], ["bf16"]]
    compiled(part)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_templates_of_static_models_compile(qcase: QCase, name: str) -> None:
    """First of the tests of these models: the others read the same code and need no cubins."""
    part = qcase("static_models", compile="triton_tem")[name]
    compiled(part, "triton_tem")


@pytest.mark.slow
def test_smoothing_vectors_add_no_kernel_where_linears_have_biases(qcase: QCase) -> None:
    """q, k and v are one product, their biases one sum, and the vector that divides o's input multiplies v's columns in the same store."""
    parts = qcase("static_models", compile=False)
    assert kinds(parts["opt smoothed"]) == kinds(parts["opt"])


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_static_models_requantize_in_the_template(qcase: QCase, name: str) -> None:
    """fc1, its bias, activation and re-quantization are one kernel that stores int8 alone; fc2 reads that buffer; no float32 tensor, and no 16-bit one of the hidden size, goes to memory."""
    part = qcase("static_models", compile=False)[name]
    fused = [i for i, call in enumerate(part["calls"]) if call.startswith("triton_tem") and stored(kernel(part, call)) == ["i8"]]
    assert len(fused) == 1
    fc1, fc2 = part["calls"][fused[0] : fused[0] + 2]
    assert fc2.startswith("triton_tem") and stored(kernel(part, fc2)) == ["bf16"]
    signature = re.findall(r"'(\w+)': '\*(\w+)'", kernel(part, fc2)["source"])
    assert ("arg_X", "i8") in signature
    out = [a for a in launch(part, fc1) if a.startswith("buf")][-1]
    assert launch(part, fc2)[0] == out
    assert re.search(rf"{out} = empty_strided_cuda\(\(32, 512\), \(512, 1\), torch\.int8\)", part["source"])
    assert "empty_strided_cuda((2, 16, 512)" not in part["source"]
    large = re.findall(r"empty_strided_cuda\(\(32, 512\), \(512, 1\), torch\.(\w+)\)", part["source"])
    assert sorted(large) == ["bfloat16", "int8"]  # 512 is the vocabulary as well: the head's logits
    assert not re.search(r"empty_strided_cuda\(.*torch\.float32\)", part["source"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_no_kernel_only_quantizes_behind_a_product(qcase: QCase, name: str) -> None:
    """The one pointwise quantization is that of attention's output: attention is an extern kernel."""
    quantizing = [call for call in qcase("static_models", compile=False)[name]["calls"] if call.startswith("triton_poi") and "_quantize" in call]
    assert len(quantizing) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_a_llama_layer_under_every_recipe(qcase: QCase, name: str) -> None:
    parts = qcase("recipes", compile="triton_tem")
    assert set(parts) == set(COUNTS)
    part = parts[name]
    assert len(part["calls"]) == COUNTS[name], part["calls"]
    assert part["extra"]["kernels"] == 7 and kinds(part).count("tem") == PRODUCTS.get(name, 4)
    assert [e for e in part["externs"] if "_attention" not in e] == []
    compiled(part, "triton_tem")
    for row in templates(part):
        if "A8" in name or "INT8" in name:
            assert row["ptx"]["mma.sync*.s8"] + row["ptx"]["wgmma.mma_async*.s8"] > 0
        else:
            assert row["ptx"]["mma.sync"] + row["ptx"]["wgmma.mma_async"] > 0
    gated = [row for row in templates(part) if "linear_glu" in row["name"]]
    assert [stored(row) for row in gated] == ([] if name == "FP8_TENSOR" else [["i8"]] if "STATIC" in name and name != "LLM_INT8_STATIC" else [["bf16"]])  # down's codes, or its input
    assert not any("silu" in call for call in part["calls"] if name != "FP8_TENSOR")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("W4A16 1", 16), ("W8A8 1", 16), ("W8A8_STATIC 1", 16), ("W4A16 128", 1), ("W8A8 128", 1), ("W8A8_STATIC 128", 1)])
def test_a_step_of_decoding_repeats_no_keys(qcase: QCase, name: str, parts: int) -> None:
    """Attention reads the cache as it is; its parts are combined by the kernel that stores o's input, codes where its range is static. Batch 128 has programs enough without parts, and no kernel that combines.

    torch 2.11 sees no shared data between a tile of heads and the row that they make, so that there one pointwise kernel quantizes under a static range.
    """
    static = "STATIC" in name
    apart = static and torch.__version__.startswith("2.11.")
    part = qcase("decoding", compile="triton_tem")[name]
    (attention,) = [row for row in templates(part) if "arg_K" in row["source"]]
    compiled(part, attention["name"])
    assert f"SPLIT : tl.constexpr = {parts}\n" in attention["source"]
    assert not [n for n in part["calls"] if "sdpa" in n or "scaled_dot" in n or "clone" in n]
    behind = part["calls"][part["calls"].index(attention["name"]) + 1 :]
    if parts > 1:
        combining = kernel(part, behind.pop(0))
        assert "arg_PARTS" in combining["source"] and stored(combining) == (["i8"] if static and not apart else ["bf16"]), "one kernel combines"
        compiled(part, combining["name"])
    product = next(i for i, n in enumerate(behind) if n.startswith("triton_tem"))
    assert [n.split("_")[1] for n in behind[:product]] == (["poi"] if apart else ["per"] if name.startswith("W8A8 ") else []), "rows are quantized by a kernel of their own"
    caches = [kernel(part, n) for n in part["calls"] if "index_copy" in n]
    assert [row["source"].count("tl.store(") for row in caches] == [2], "keys and values are written by one kernel"
    assert len(part["externs"]) == 1, "angles are no product of a library; the head is"


@pytest.mark.slow
def test_counters_step_in_one_kernel(qcase: QCase) -> None:
    """Three products, each with its count in the epilogue, and one kernel that writes the counts where they are, the last one: whoever else reads the counts of before has run."""
    parts = qcase("counting")
    product, plain = ["triton_tem"], ["triton_poi"]
    before = {"W4A16": 3 * product, "W4A16 positions": product + plain, "W4A16 outputs": product + 2 * plain}
    for name, part in parts.items():
        assert [call.split("_fused")[0] for call in part["calls"]] == [*before[name], "triton_for"], name
        (row,) = [row for row in part["kernels"] if row["name"].startswith("triton_for")]
        assert row["source"].count("tl.store(") == 3
        compiled(part, row["name"])


@pytest.mark.slow
def test_attention_to_keys_of_a_dynamic_number(qcase: QCase) -> None:
    """A stride that depends on a dynamic size is a sum, and has a name before it is multiplied."""
    named: dict[str, set[str]] = {"keys": {"kb", "kg", "vb", "vg"}, "batch": {"qq", "part"}}
    for name, part in qcase("growing", compile="triton_tem").items():
        found = set()
        for row in templates(part):
            text = row["source"][row["source"].rindex("@triton.jit") :]
            found |= set(re.findall(r"^    stride_(\w+) = \d+ \+ \d+\*ks\d+$", text, re.MULTILINE))
            addresses = [line for line in text.splitlines() if re.search(r"= (K|V|Q|PARTS) \+|tl\.load\((Q|keys|values|at)\b", line)]
            assert not any("ks0" in line for line in addresses), addresses
            compiled(part, row["name"])
        assert found == named[name]


@pytest.mark.slow
def test_broadcast_values_are_copied_for_attention(qcase: QCase) -> None:
    """The template takes columns to lie side by side."""
    part = qcase("decoding", compile="triton_tem")["broadcast"]
    (attention,) = [row for row in templates(part) if "arg_K" in row["source"]]
    (load,) = re.findall(r"v = tl.load\(values \+ (.*?), mask", attention["source"])
    assert load == "at[:, None].to(tl.int64) * stride_vs + column[None, :]" and "    stride_vs = 64\n" in attention["source"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["W8A8", "W4A16"])
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_experts_of_mixtral(qcase: QCase, form: str, recipe: str) -> None:
    """Sorted rows and one expert for each row: two grouped products, in 16 bits out, that compile and keep their registers."""
    part = qcase("experts", compile="triton_tem")[f"{form} {recipe}"]
    grouped = [row for row in templates(part) if "grouped_linear" in row["name"]]
    assert len(grouped) == 2 and not [name for name in part["calls"] if "dequantize" in name]  # nobody makes 16-bit experts
    assert all("INDEX" in row["source"] and "fp32" not in stored(row) for row in grouped)
    if recipe == "W8A8":
        assert all(row["ptx"]["mma.sync*.s8"] + row["ptx"]["wgmma.mma_async*.s8"] > 0 for row in grouped)
    compiled(part, "triton_tem")


@pytest.mark.slow
def test_spills_are_seen(qcase: QCase) -> None:
    """The check of registers is able to fail: a tile too large for its warps."""
    (row,) = qcase("spilling")["kernels"]
    assert row["spills"] > 0, row["registers"]


def between(part: Part, first: str, last: str) -> str:
    """Lines of the graph before Inductor from the one that matches ``first`` to the one that matches ``last``, with the names of packed inputs cut to their ends and nodes numbered anew."""
    lines = part["extra"]["text"].splitlines()
    start = next(i for i, line in enumerate(lines) if re.search(first, line))
    end = next(i for i, line in enumerate(lines) if re.search(last, line))
    text = renumbered("\n".join(lines[start : end + 3]))
    return re.sub(r"l_\w*?modules_([a-z0-9_]+?)_parameters_weight__", lambda m: m[1].split("_modules_")[-1] + ".", text)


@pytest.mark.slow
def test_graph_of_opt(qcase: QCase) -> None:
    assert_expected_inline(
        between(qcase("static_models", compile=False)["opt"], r"fc1: ", r"fc2: "),
        """\
scaled_linear_default_0 = qcompile.scaled_linear(getitem_0, [fc1.range], [fc1.codes, fc1.scale], 'int8.tensor.static @ int8.row')  # model.decoder.layers.0.fc1: int8.tensor.static @ int8.row
add_0 = add(scaled_linear_default_0, %model.decoder.layers.0.fc1.bias)
hidden_states_0 = add_0.to(bfloat16)
hidden_states_1 = relu(hidden_states_0, inplace=False)
quantize_default_0 = qcompile.quantize(hidden_states_1, [fc2.range], 'int8.tensor.static')
getitem_1 = getitem(quantize_default_0, 0)
scaled_linear_default_1 = qcompile.scaled_linear(getitem_1, [fc2.range], [fc2.codes, fc2.scale], 'int8.tensor.static @ int8.row')  # model.decoder.layers.0.fc2: int8.tensor.static @ int8.row
add_1 = add(scaled_linear_default_1, %model.decoder.layers.0.fc2.bias)
hidden_states_2 = add_1.to(bfloat16)""",
    )


@pytest.mark.slow
def test_graph_of_gpt2(qcase: QCase) -> None:
    assert_expected_inline(
        between(qcase("static_models", compile=False)["gpt2"], r"mlp\.c_fc: ", r"mlp\.c_proj: "),
        """\
scaled_linear_default_0 = qcompile.scaled_linear(getitem_0, [c_fc.range], [c_fc.codes, c_fc.scale], 'int8.tensor.static @ int8.row')  # transformer.h.0.mlp.c_fc: int8.tensor.static @ int8.row
add_0 = add(scaled_linear_default_0, %transformer.h.0.mlp.c_fc.bias)
x_0 = add_0.to(bfloat16)
x_1 = x_0.view((2, 16, 512))
mul_0 = mul(0.5, x_1)
pow_0 = pow(x_1, 3.0)
mul_1 = mul(0.044715, pow_0)
add_1 = add(x_1, mul_1)
mul_2 = mul(0.7978845608028654, add_1)
tanh_0 = tanh(mul_2)
add_2 = add(1.0, tanh_0)
hidden_states_0 = mul(mul_0, add_2)
view_0 = hidden_states_0.view(-1, 512)
quantize_default_0 = qcompile.quantize(view_0, [c_proj.range], 'int8.tensor.static')
getitem_1 = getitem(quantize_default_0, 0)
scaled_linear_default_1 = qcompile.scaled_linear(getitem_1, [c_proj.range], [c_proj.codes, c_proj.scale], 'int8.tensor.static @ int8.row')  # transformer.h.0.mlp.c_proj: int8.tensor.static @ int8.row
add_3 = add(scaled_linear_default_1, %transformer.h.0.mlp.c_proj.bias)
x_2 = add_3.to(bfloat16)""",
    )


@pytest.mark.slow
def test_graph_of_bert(qcase: QCase) -> None:
    assert_expected_inline(
        between(qcase("static_models", compile=False)["bert"], r"intermediate\.dense: ", r"0\.output\.dense: "),
        """\
scaled_linear_default_0 = qcompile.scaled_linear(getitem_0, [dense.range], [dense.codes, dense.scale], 'int8.tensor.static @ int8.row')  # bert.encoder.layer.0.intermediate.dense: int8.tensor.static @ int8.row
add_0 = add(scaled_linear_default_0, %bert.encoder.layer.0.intermediate.dense.bias)
hidden_states_0 = add_0.to(bfloat16)
hidden_states_1 = gelu(hidden_states_0)
quantize_default_0 = qcompile.quantize(hidden_states_1, [dense.range], 'int8.tensor.static')
getitem_1 = getitem(quantize_default_0, 0)
scaled_linear_default_1 = qcompile.scaled_linear(getitem_1, [dense.range], [dense.codes, dense.scale], 'int8.tensor.static @ int8.row')  # bert.encoder.layer.0.output.dense: int8.tensor.static @ int8.row
add_1 = add(scaled_linear_default_1, %bert.encoder.layer.0.output.dense.bias)
hidden_states_2 = add_1.to(bfloat16)""",
    )


@pytest.mark.parametrize("recipe", ["W4A16", "W4A8", "W8A8", "FP8", "NF4", "FP8A16"])
def test_the_kernel_for_the_rows_at_hand(qcase: QCase, recipe: str) -> None:
    """Few rows stream the weight; with many, 16-bit activations and FP8 go to the library. Nothing spills."""
    parts = qcase("regimes")
    quantize = [] if recipe in ("W4A16", "NF4", "FP8A16") else ["per"]
    for rows in ("1", "16", "dynamic"):
        part = parts[f"{recipe} {rows}"]
        assert kinds(part) == [*quantize, "tem"]
        assert "tl.inline_asm_elementwise" in templates(part)[0]["source"] or recipe in ("W8A8", "FP8")
        compiled(part)
    many = kinds(parts[f"{recipe} 4096"])
    library = {"FP8": ["per", "extern_kernels._scaled_mm"], "W4A16": ["poi", "extern_kernels.mm"], "NF4": ["poi", "extern_kernels.mm"], "FP8A16": ["poi", "extern_kernels.mm"]}
    assert many == library.get(recipe, [*quantize, "tem"])
    compiled(parts[f"{recipe} 4096"])


def test_a_batch_that_grows_is_guarded(qcase: QCase) -> None:
    """The dynamic kernel was chosen for up to 64 rows: its graph carries the bound."""
    source = qcase("regimes")["W4A16 dynamic"]["source"]
    assert re.search(r"\bs\d+\b", source)


def test_parts_of_k_are_added_where_they_are_read(qcase: QCase) -> None:
    """Four partial products, then one kernel that adds them up with bias and cast."""
    part = qcase("regimes")["split"]
    assert kinds(part) == ["tem", "poi"]
    assert stored(part["kernels"][0]) == ["fp32"] and stored(part["kernels"][1]) == ["bf16"]
    assert part["kernels"][1]["source"].count("tl.load(in_ptr0") == 4
    compiled(part)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["W4A16", "W8A8", "FP8", "NF4"])
def test_gated_products_for_the_rows_at_hand(qcase: QCase, recipe: str) -> None:
    """One kernel with two sums in the tiles of an 8B model, none of which spills. With more rows than 64 of 16 bits, and many of FP8, the product is one of its own."""
    parts = qcase("gated", compile="triton_tem")
    wide = recipe.endswith("16") or recipe == "NF4"
    quantize = [] if wide else ["per"]
    dynamic = recipe in ("W4A16", "W8A8")
    for rows in ("1", "64", "200", *(("dynamic 48",) if dynamic else ())):
        part = parts[f"{recipe} {rows}"]
        if wide and rows == "200":
            assert kinds(part) == ["tem", "poi"]
            compiled(part, "triton_tem")
            continue
        assert kinds(part) == [*quantize, "tem"]
        assert [stored(row) for row in templates(part)] == [["bf16"]] and "acc_up" in templates(part)[0]["source"]
        compiled(part, "triton_tem")
    for rows in ("4096", *(("dynamic 1024",) if dynamic else ())):
        part = parts[f"{recipe} {rows}"]
        if recipe in ("W4A8", "W8A8"):
            assert kinds(part) == [*quantize, "tem"]
            compiled(part, "triton_tem")
        else:
            assert part["externs"] in (["extern_kernels.mm"], ["extern_kernels._scaled_mm"]) and "silu" in part["calls"][-1]


@pytest.mark.slow
def test_every_activation_compiles(qcase: QCase) -> None:
    """Sizes that fill no tile, too."""
    parts = qcase("gated", compile="triton_tem")
    for name in ("ragged", "gelu", "gelu_tanh", "relu_squared"):
        assert kinds(parts[name]) == ["per", "tem"] and "linear_glu" in parts[name]["calls"][1]
        compiled(parts[name], "triton_tem")


@pytest.mark.parametrize("rows", [1, 64])
def test_codebooks_are_read_in_the_kernel_that_dequantizes(qcase: QCase, rows: int) -> None:
    """One kernel reads codes, scales and the sixteen values, which are an input, and stores 16 bits; the library multiplies."""
    part = qcase("codebooks")[f"{rows} rows"]
    first = part["kernels"][0]
    assert stored(first) == ["bf16"] and re.findall(r"'in_ptr\d+': '\*(\w+)'", first["source"]) == ["u8", "fp32", "bf16"]
    assert len([k for k in kinds(part) if "mm" in k]) == 1 and kinds(part)[0] == "poi"
    compiled(part)


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_a_split_is_part_of_the_product(qcase: QCase, rows: int) -> None:
    """Static: the kernel that quantizes, which leaves the outliers out, and the product, which gathers them; with many rows they are gathered once. Dynamic: one program that finds them before (with
    more rows their maxima first, in one step or two), and a count behind it; with more rows than 64 the weight's columns are gathered once, too."""
    parts = qcase("splits")
    static, dynamic = parts[f"static {rows}"], parts[f"dynamic {rows}"]
    assert kinds(static) == (["per", "tem"] if rows == 1 else ["per", "poi", "tem"]), static["calls"]
    names = kinds(dynamic)
    assert names.count("tem") == 2 and not [name for name in names if "extern" in name]
    assert len(names) == {1: 4, 64: 6, 300: 8}[rows], dynamic["calls"]
    assert f"stride_w16n + {'index' if rows <= 64 else 'beside'}[None, :]" in templates(dynamic)[-1]["source"]
    for part in (static, dynamic):
        assert "tl.dot(w16_0" in templates(part)[-1]["source"]
        compiled(part)
