"""`benchmarks/demo.py`: its parts on few tokens, and all of it as `make demo` runs it, by its quick form."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import qcompile

pytest.importorskip("transformers")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("qcompile_demo", ROOT / "benchmarks" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def loaded(demo):
    return demo.load()


def result(demo, name, perplexity, rates=(10.0, 30.0, 20.0)):
    return demo.Result(name, 20_000_000, 5_000_000, 9_000_000, 8.06, perplexity, list(rates), "import os", "a <report>")


def test_shipped_model_is_small(demo, loaded):
    """16 MB of weights at most, and 4,096 tokens."""
    model, tokenizer = loaded
    sizes = [path.stat().st_size for path in demo.MODEL.glob("*.safetensors")]
    assert 0 < sum(sizes) <= 16_000_000
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings == 4096


def test_perplexity_is_that_of_all_predictions(demo, loaded):
    model, tokenizer = loaded
    windows = demo.held_out(tokenizer, 2, 64)
    steps = []
    value = demo.perplexity(model, windows, batch=1, advance=lambda: steps.append(1))
    with torch.no_grad():
        losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in windows]
    assert value == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert len(steps) == 2 and 1 < value < 100


def test_windows_are_side_by_side(demo, loaded):
    windows = demo.held_out(loaded[1], 3, 64)
    text = (demo.MODEL / "heldout.txt").read_text("utf-8")
    assert windows.shape == (3, 64)
    assert text.startswith(loaded[1].decode(windows.flatten()))


def test_greedy_decoding_equals_generate(demo, loaded):
    model, tokenizer = loaded
    prompt = tokenizer(demo.PROMPT, return_tensors="pt").input_ids
    tokens, rate = demo.generate(model, model, prompt, 6)
    with torch.no_grad():
        expected = model.generate(prompt, max_new_tokens=7, do_sample=False)[0, prompt.shape[1] :]
    assert tokens == expected.tolist() and rate > 0


def test_sizes_come_from_the_report(demo, loaded):
    model, tokenizer = loaded
    fast = torch.compile(model, backend="qcompile", dynamic=False, options={"recipe": "W4A16", "lower": "eager"})
    report = qcompile.explain(fast, input_ids=demo.held_out(tokenizer, 1, 16), use_cache=False)
    plain, small = demo.fp32_result(model, "fp32"), demo.quantized_result(model, "W4A16", report)
    assert plain.linears == small.linears_before > 2 * small.linears
    assert small.bits == pytest.approx(4.125, abs=0.01)
    assert plain.resident - small.resident == plain.linears - small.linears
    assert "q_proj" in small.report


def test_table_has_ratios_against_the_first(demo):
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(demo.table([result(demo, "fp32", 8.0, [10.0]), result(demo, "W8A8", 8.04)]))
    text = console.export_text()
    for cell in ("fp32", "W8A8", "20.0 -> 5.0", "9.0", "8.06", "8.040", "1.0050", "20", "2.00"):
        assert cell in text


@pytest.mark.parametrize(("recipe", "ratio", "bad"), [("W8A8", 1.01, 0), ("W8A8", 1.03, 1), ("W4A16", 1.09, 0), ("NF4", 1.11, 1), ("NF4", math.nan, 1)])
def test_bounds(demo, recipe, ratio, bad):
    assert len(demo.failures([result(demo, "fp32", 8.0), result(demo, recipe, 8.0 * ratio)])) == bad


def test_page_holds_everything(demo, tmp_path):
    pytest.importorskip("matplotlib")
    page = demo.save([result(demo, "fp32", 8.0), result(demo, "W8A8", 8.04)], tmp_path / "out", "a caption").read_text("utf-8")
    for part in ("a caption", "data:image/png;base64,", "W8A8", "a &lt;report&gt;", "import os", "1.0050"):
        assert part in page
    assert (tmp_path / "out" / "demo.png").stat().st_size > 1000


def test_says_that_there_is_no_compiler(demo, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not demo.has_compiler()


@pytest.mark.slow
def test_the_command(demo, loaded, tmp_path):
    """Into the folder where it is run: what it prints is what it writes, and fp32's perplexity is the model's."""
    pytest.importorskip("matplotlib")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "demo.py"), "--quick"], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    cells = [[cell.strip() for cell in line[1:-1].split("\u2502")] for line in done.stdout.splitlines() if line.startswith("\u2502")]
    rows = json.loads((tmp_path / "out" / "demo.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["fp32, eager", "W8A8"]
    assert [[line[0], line[4], line[7]] for line in cells] == [[row["name"], f"{row['perplexity']:.3f}", f"{row['times_fp32']:.2f}"] for row in rows]
    model, tokenizer = loaded
    assert rows[0]["perplexity"] == pytest.approx(demo.perplexity(model, demo.held_out(tokenizer, 1)), rel=1e-4)
    assert 1 < rows[1]["perplexity"] <= demo.BOUND["W8A8"] * rows[0]["perplexity"] and rows[1]["linears_mb"] < rows[0]["linears_mb"] / 2
    page = (tmp_path / "out" / "demo.html").read_text("utf-8")
    assert all(part in page for part in ("data:image/png;base64,", "W8A8", "kept as it is", demo.PROMPT.split("\n")[0], cells[1][4]))
    assert (tmp_path / "out" / "demo.png").stat().st_size > 1000
