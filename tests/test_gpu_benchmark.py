"""`benchmarks/run.py gpu` as far as it goes without a GPU: literal tables, grouping of kernels, what becomes of traces, and one step of decoding on the CPU."""

from __future__ import annotations

import json
import pathlib
import re
import sys
from unittest import mock

import pytest
import torch

from qcompile.core.recipe import find_recipe
from qcompile.core.scheme import Scheme

pytest.importorskip("jinja2")
pytest.importorskip("transformers")

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cases  # noqa: E402
import gpu  # noqa: E402
import gpu_breakdown  # noqa: E402
import gpu_decode  # noqa: E402
import gpu_floor  # noqa: E402
import gpu_layers  # noqa: E402
import gpu_model  # noqa: E402
import gpu_plots  # noqa: E402
import gpu_tables  # noqa: E402
import run  # noqa: E402


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("triton_tem_fused_linear_rms_norm_3", "linear"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", "linear"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>", "linear"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<>", "attention"),
        ("triton_poi_fused_index_copy_5", "cache"),
        ("Memcpy DtoD (Device -> Device)", "cache"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_2", "rest"),
        ("triton_red_fused_quantize_1", "rest"),
    ],
)
def test_groups(name, group):
    assert gpu_breakdown.group(name) == group


def test_summary_of_a_trace():
    """Two layers, a head: its time is not divided, gaps are what the step takes beyond its kernels."""
    names = ["triton_red_fused_mean_0", "triton_tem_fused_1", "fmha_cutlassF"] * 2 + ["triton_tem_fused_9"]
    events = [{"cat": "kernel", "name": name, "ts": 100 + 12 * i, "dur": 10} for i, name in enumerate(names)]
    trace = {"traceEvents": [{"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1, "dur": 5}, *reversed(events), {"ph": "M", "name": "process_name"}]}
    kernels = gpu_breakdown.kernels_of(trace)
    assert [k["name"] for k in kernels] == names
    row = gpu_breakdown.summary(gpu_breakdown.steadiest([kernels[:3], kernels, kernels]), 90.0, 2)
    assert row["groups_us"] == {"head": 10, "linear": 20, "attention": 20, "cache": 0, "rest": 20}
    assert row["per_layer_us"] == {"linear": 10, "attention": 10, "cache": 0, "rest": 10}
    assert (row["busy_us"], row["gaps_us"], row["gap_us_each"], row["launches"]) == (70, 20, 2, 7)
    row |= {"model": "8B", "layers": 2, "recipe": "W4A16", "head": None, "batch": 1, "context": 128, "cache": 192}
    assert "gaps 20.0" in gpu_breakdown.table(row)


def test_kernels_that_begin_early_count_what_they_add():
    """Three kernels: the second begins while the first ends and waits for it, the third lies inside the second, the fourth comes after a gap. What they add and the gap make up the whole."""
    events = [{"cat": "kernel", "name": name, "ts": start, "dur": long} for name, start, long in (("a", 100, 10), ("b", 104, 16), ("c", 106, 4), ("d", 123, 5))]
    kernels = gpu_breakdown.kernels_of({"traceEvents": events})
    assert [(k["name"], k["us"], k["gap"], k["long"]) for k in kernels] == [("a", 10, 0, 10), ("b", 10, 0, 16), ("c", 0, 0, 4), ("d", 5, 3, 5)]
    row = gpu_breakdown.summary(kernels, 28.0, 1)
    assert (row["busy_us"], row["gaps_us"]) == (25, 3) and {k["name"]: k["start_to_end_us"] for k in row["kernels"]} == {"a": 10, "b": 16, "c": 4, "d": 5}


# --- literal tables ------------------------------------------------------------------------------------------------------

MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11", "copy_tb_s": 2.4, "read_tb_s": 3.0, "bf16_tflop_s": 700.0}


@pytest.mark.parametrize("part", gpu.PARTS)
def test_rows_of_each_part(part):
    """Every row says what it is, so that a failure can be told; ``only`` leaves recipes out."""
    found = gpu.rows_of(part, MACHINE)
    assert len({what for what, _ in found}) == len(found) > 0
    assert all("copy_tb_s" not in what for what, _ in found)
    assert len(gpu.rows_of(part, MACHINE, ["FP8"])) < len(found) or part == "lines"


def test_rows_name_schemes_and_recipes_that_exist():
    for row in cases.RUNS:
        assert row.recipe in cases.BITS and row.head in cases.BITS and row.model in cases.LLAMAS
    for case in (*cases.BREAKDOWNS, *cases.GENERATES, *cases.STARTS, *cases.LAYERS, *cases.PREFILLS, *cases.MOES):
        assert case.recipe == "bf16" or find_recipe(case.recipe)
    for recipe in ("W4A16", "W4A8", "W8A8", "FP8"):
        assert cases.BITS[recipe] == pytest.approx(Scheme.parse(find_recipe(recipe).weight).bits_per_weight((4096, 4096)), abs=0.02)


def test_a_failure_is_a_row():
    def fails():
        raise ValueError("no room")

    assert gpu.attempt("W4A16 1", fails).items() >= {"case": "W4A16 1", "failed": "ValueError: no room"}.items()


# --- models --------------------------------------------------------------------------------------------------------------


def test_sizes_are_the_models():
    model = gpu_model.build("tiny", device="cpu")
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    blocks, head = gpu_model.linear_elements("tiny")
    assert linears == blocks + head == gpu_model.linear_elements("tiny", vocab_size=512)[0] + 512 * 128
    whole = gpu_decode.model_bytes(model)
    assert gpu_decode.packed_bytes("tiny", "bf16", None, whole) == whole
    assert gpu_decode.packed_bytes("tiny", "W8A8", "int8.row", whole) == whole - linears


@torch.no_grad()
def test_a_step_is_repeated_from_the_same_place():
    model = gpu_model.build("tiny", device="cpu")
    decoder = gpu_model.Decoder(model, 2, 24)
    first = decoder.once(model)
    assert first.shape == (2, 1, 512) and decoder.length == 24 + gpu_model.ROOM
    assert not torch.equal(decoder.step(model), first)  # one token further
    assert torch.equal(decoder.once(model), first)
    assert decoder.bytes == 2 * 2 * 2 * 2 * 32 * decoder.length * 2  # layers, keys and values, sequences, heads, columns, 2 bytes
    torch._dynamo.reset()
    fast = gpu_model.compiled(model, "W8A8", "int8.row", lower="eager", release=True)
    assert gpu_model.distance(decoder.once(fast), first) < cases.ERRORS[8]


@torch.no_grad()
def test_a_model_is_filled_layer_by_layer():
    """Of three regions (two layers and the head); its logits are those of their references, and weights are the same whenever they are made."""
    torch._dynamo.reset()
    row = gpu_layers.layers(cases.Layers("W4A16", "int4.g128", "tiny", 1, 24), "cpu")
    assert row["right"] and row["regions"] == 3 and 0 < row["error"] < 0.1 and row["tokens_s"] > 0
    made = gpu_layers.Made({"a": torch.empty(3, 4), "b": torch.empty(5)}, "cpu")
    assert torch.equal(made["a"], made["a"]) and made["b"].tolist() == [1] * 5 and list(made) == ["a", "b"]


# --- tables and pictures -------------------------------------------------------------------------------------------------


def report() -> dict:
    """A few rows of every part, as `measure` writes them."""
    step_of = {"model": "8B", "head": None, "context": 128, "cache": 192, "batch": 1, "error": 0.1, "right": True, "floor_us": 900.0, "of_floor": 0.5, "goal": None, "met": None, "memory_gib": 5.0}
    step = {"model": "8B", "layers": 4, "batch": 1, "context": 128, "cache": 192, "right": True, "step_us": 500.0, "busy_us": 450.0, "gaps_us": 50.0, "launches": 60, "kernels": []}
    groups = {"head": 50.0, "linear": 300.0, "attention": 40.0, "cache": 10.0, "rest": 50.0}
    expert = {"m": 1, "experts": 128, "top": 8, "n": 768, "k": 2048, "right": True, "us": 8.0, "bf16_us": 16.0, "ratio": 2.0, "floor_us": 4.0, "of_floor": 0.5, "goal": 1.5, "met": True}
    return {
        "machine": MACHINE,
        "model": [
            {**step_of, "recipe": "bf16", "tokens_s": 150.0, "us": 6666.0},
            {**step_of, "recipe": "W4A16", "head": "int4.g128", "tokens_s": 600.0, "us": 1666.0, "goal": 600, "met": True, "peak_of_bf16": 1.02, "after_of_packed": 1.05},
            {**step_of, "recipe": "W8A8", "right": False},
            {"case": "Run FP8", "failed": "OutOfMemoryError: no | room"},
        ],
        "breakdown": [{**step, "recipe": recipe, "head": None, "groups_us": groups, "groups_count": dict.fromkeys(groups, 4), "per_layer_us": {k: v / 4 for k, v in groups.items() if k != "head"}} for recipe in ("bf16", "W4A16")],
        "moe": [{**expert, "recipe": recipe, "what": what} for recipe in ("W4A16", "W8A8") for what in ("product", "Qwen3 experts")],
        "lines": [{"recipe": line.name, "m": m, "right": True, "us": 20.0, "w8a8_us": 18.0, "ratio": 1.11, "goal": line.goal, "met": True} for line in cases.LINES for m in (1, 16)],
        "prefill": [{"model": "8B", "recipe": recipe, "tokens": 2048, "right": True, "ms": 30.0, "goal_ms": goal, "goal": share} for recipe, goal, share in (("bf16", None, None), ("FP8", 31, None), ("W4A16", None, 1.08))],
        "generate": [{"model": "8B", "recipe": "W4A16", "head": None, "right": True, "tokens_s": 550.0, "by_hand_tokens_s": 600.0, "share": 0.92, "goal": 0.85, "met": True}],
        "layers": [{"model": "70B", "recipe": "W4A16", "head": None, "right": True, "bf16_gib": 131.4, "limit_gib": 48.0, "peak_gib": 39.5, "after_gib": 36.25, "ready_s": 61.2, "tokens_s": 71.0}],
        "start": [{"model": "8B", "recipe": "W4A16", "head": None, "right": True, "cold_s": 50.0, "warm_s": 13.0, "cold_goal": 60, "warm_goal": 12, "met": False}],
    }


def test_tables():
    text = "\n".join(gpu_tables.markdown(report()))
    for line in (
        "| 8B | W4A16 | int4.g128 | 1 | 128 | 600 | 600 (met) | 4.00 |  | 0.50 | 1.02 | 1.05 |",
        "| W4A16 | 16 bits | 1 | 128 | 75.0 | 10.0 | 2.5 | 12.5 | 1.00 | 50.0 | 50.0 | 500.0 | 60 |",
        "| product | W4A16 | 1 | 8.0 | 16.0 | 2.00 | 1.5 (met) | 0.50 |",
        "| LLM_INT8 static, 64 columns | 16 | 20.0 | 18.0 | 1.11 | <= 1.15 (met) |",
        "| 8B | W4A16 | 2048 | Python | 30.0 | <= 32.4 (met) | 1.00 |",
        "| 8B | W4A16 | 16 bits | 550 | 600 | 92% | 85% (met) |",
        "| 8B | W4A16 | 16 bits | 50.0 | 13.0 | 60 / 12 (missed) |",
        "| 70B | W4A16 | 16 bits | 131.4 | 48.0 | 39.5 | 36.2 | 61 | 71 |",
        "Not measured: model: 8B W8A8 1 128 was wrong, and not timed; model: Run FP8: OutOfMemoryError: no / room.",
    ):
        assert line in text, line
    assert gpu_tables.markdown({"machine": MACHINE, "linear": [], "shapes": []}) == []


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    gpu_plots.draw(report(), tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(gpu_plots.PICTURES) == set(gpu_plots.drawn(report()))


def test_committed_results_have_their_pictures():
    for path in (ROOT / "benchmarks" / "results").glob("*/gpu.json"):
        assert all((path.parent / f"{name}.png").exists() for name in gpu_plots.drawn(json.loads(path.read_text()))), path.parent.name


def test_merging_keeps_other_parts(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps({"machine": {"gpu": "a"}, "linear": [1], "model": [2]}))
    new.write_text(json.dumps({"machine": {"gpu": "b"}, "linear": [], "model": [3], "moe": [4]}))
    gpu_tables.merge(old, [new])
    assert json.loads(old.read_text()) == {"machine": {"gpu": "b"}, "linear": [1], "model": [3], "moe": [4]}


def test_the_floor_reads_at_the_rate_of_a_reduction():
    assert gpu_floor.floor_us(3e6, 0, False, MACHINE) == pytest.approx(1.0)
    assert gpu_floor.floor_us(3e6, 0, False, {"copy_tb_s": 1.5, "bf16_tflop_s": 1.0}) == pytest.approx(2.0)
    assert gpu_floor.floor_us(0, 14e8, True, MACHINE) == pytest.approx(1.0)


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["gpu", "--parts", "model", "modle"])
    assert "unknown parts modle; there are breakdown, model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "FP8 W8A8"], "unknown cases 'FP8 W8A8' of breakdown, model, prefill, linear, moe, lines, generate, start, layers, shapes; there are bf16, W4A16, W8A8, "),
        (["--parts", "moe", "linear", "--case", "W8A8", "W8A9", "FP9"], "unknown cases 'FP9', 'W8A9' of moe, linear; there are W4A16, W8A8, FP8, W8A16, W4A8, NF4, "),
        (["--parts", "moe", "--case", "NF4"], "unknown cases 'NF4' of moe; there are W4A16, W8A8, FP8, W8A16, each"),
        (["--parts", "shapes", "--case", "NF4"], "unknown cases 'NF4' of shapes; there are W4A8, W4A16, W8A8, FP8, each"),
        (["--parts", "lines", "--case", "W8A8"], "unknown cases 'W8A8' of lines; there are none, each"),
    ],
)
def test_unknown_cases_are_refused(arguments, said, monkeypatch, capsys):
    """Before anything is measured: a recipe that no row of these parts has, and two in one argument."""
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("it measures"))
    with pytest.raises(SystemExit):
        run.main(["gpu", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["cpu", "--case", "W8A8"], "--case: not for cpu"), (["cpu", "--case", "W8A8", "--seconds", "5"], "--case, --seconds: not for cpu"), (["gpu", "--quick", "--repeats", "1"], "--quick, --repeats: not for gpu")],
)
def test_options_of_the_other_device_are_refused(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("it measures"))
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("it measures"))
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "wanted"), [([], (gpu.PARTS, ())), (["--parts", "moe", "linear", "--case", "NF4", "FP8"], (["moe", "linear"], ["NF4", "FP8"]))])
def test_known_parts_and_cases_are_measured(arguments, wanted, monkeypatch):
    measured = []
    monkeypatch.setattr(gpu, "measure", lambda parts, only, path, seconds: measured.append((parts, only)))
    assert run.main(["gpu", *arguments]) == 0 and measured == [wanted]


# --- the driver and CUDA graphs, with stand-ins for the GPU -----------------------------------------------------------------


def test_rows_are_written_as_they_come(tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("launch failed")

    path = tmp_path / "sub" / "gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"machine": {}, "linear": [{"us": 1.0}], "moe": [{"case": "first", "us": 2.0}, {"case": "fourth", "right": True}]}))
    rows = [("first", lambda: {"us": 3.0, "right": True}), ("second", fails), ("third", lambda: {"right": False})]
    monkeypatch.setattr(gpu, "machine", lambda: MACHINE)
    monkeypatch.setattr(gpu, "rows_of", lambda part, about, only: rows)
    assert gpu.measure(["moe", "breakdown"], (), path, 100.0) == 4
    found = json.loads(path.read_text())
    assert found["machine"] == MACHINE and found["linear"] == [{"us": 1.0}]
    assert [row.get("failed", row.get("right")) for row in found["moe"]] == [True, True, "RuntimeError: launch failed", False] and len(found["breakdown"]) == 3
    capsys.readouterr()
    assert gpu.measure(["model"], (), path, -1.0) == 0
    assert "model: out of time; 3 of 3 rows were not run" in capsys.readouterr().out


@torch.no_grad()
def test_rows_that_are_not_measured_again_stay():
    rows = [{"recipe": "W8A8", "m": 1, "us": 2.0, "commit": "a"}, {"recipe": "W4A16", "m": 1, "us": 3.0, "commit": "a"}]
    gpu.put(rows, {"case": "W4A16 1", "recipe": "W4A16", "m": 1, "us": 1.0, "commit": "b"})
    gpu.put(rows, {"case": "W4A16 16", "failed": "no memory", "commit": "b"})
    gpu.put(rows, {"case": "W4A16 16", "recipe": "W4A16", "m": 16, "us": 4.0, "commit": "c"})
    assert [(r["recipe"], r["m"], r["us"], r["commit"]) for r in rows] == [("W8A8", 1, 2.0, "a"), ("W4A16", 1, 1.0, "b"), ("W4A16", 16, 4.0, "c")]


def test_the_commit_is_the_one_at_hand_or_given(monkeypatch):
    monkeypatch.delenv("QCOMPILE_COMMIT", raising=False)
    assert re.fullmatch(r"[0-9a-f]{7,}|unknown", gpu.commit())
    monkeypatch.setenv("QCOMPILE_COMMIT", "given")
    assert gpu.commit() == "given"


def test_graphs_of_steps(monkeypatch):
    """Streams, graphs and events that do nothing: as many steps are captured as said, from the start, and replays begin there."""
    cuda = mock.MagicMock()
    cuda.Event.return_value.elapsed_time.return_value = 0.8
    monkeypatch.setattr(torch, "cuda", cuda)
    model = gpu_model.build("tiny", device="cpu")
    decoder = gpu_model.Decoder(model, 1, 24)
    lengths: list[int] = []

    def forward(*args, **given):
        lengths.append(int(decoder.cache.layers[0].cumulative_length))
        return model(*args, **given)

    assert decoder.graph_us(forward) == pytest.approx(100.0)
    assert lengths == [24, 24, *range(24, 24 + gpu_model.STEPS)]
    assert cuda.CUDAGraph.return_value.replay.call_count == 11


def test_profiles_of_replays(monkeypatch):
    """The run with the median sum, of those that lost nothing."""
    times = iter([[9], [5, 5], [6, 6], [4, 4], [7, 7, 0][:2]])

    class Profile:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def export_chrome_trace(self, path):
            events = [{"cat": "kernel", "name": "gemm", "ts": i * 10, "dur": us} for i, us in enumerate(next(times))]
            pathlib.Path(path).write_text(json.dumps({"traceEvents": events}))

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[str] = []
    found = gpu_breakdown.profiled(lambda: calls.append("replay"), lambda: calls.append("rewind"))
    assert [k["us"] for k in found] == [6, 6] and calls == ["rewind", "replay"] * 6
