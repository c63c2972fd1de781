"""`benchmarks/run.py gpu` as far as it goes without a GPU: literal tables, grouping of kernels, what becomes of traces, and one step of decoding on the CPU."""

from __future__ import annotations

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_breakdown  # noqa: E402


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
    assert "gaps 20.0" in gpu_breakdown.table(row) and len(gpu_breakdown.markdown([row, {"failed": "x"}])) == 3
