"""transformers' Trainer and other loops that are not ours: by the backend's name or with a model compiled in place; what is learned moves, evaluation is quantized, a run that was interrupted goes on bit-exactly."""

from __future__ import annotations

import pathlib

import pytest
import torch
from small import Net, graphs
from torch import nn

import qcompile
from qcompile import train
from qcompile.core.errors import OptionError
from qcompile.options import DEFAULTS
from qcompile.train.graph import TrainingGraph

pytest.importorskip("accelerate")
from accelerate.utils import DynamoBackend
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from qcompile.train.trainer import FILE, Callback, accept_name

RECIPES = {
    "W4A16 qat": {"recipe": "W4A16", "train": "qat"},
    "W8A8_STATIC qat": {"recipe": "W8A8_STATIC", "train": "qat(input='ste')"},
    "fp8 delayed": {"train": "fp8(scaling='delayed')"},
}
"""Options that a loop trains with; a training recipe that learns nothing and keeps nothing fits, too."""


@pytest.fixture(autouse=True)
def no_defaults():
    yield
    qcompile.set_defaults()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32))


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    ids = (torch.randint(0, 64, (count, 1), generator=torch.Generator().manual_seed(1)) + torch.arange(16)) % 8  # something to learn
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder: pathlib.Path, how: str, options: dict, callback: Callback | None = None, **arguments) -> Trainer:
    """A Trainer of a fresh model."""
    model, options = llama(), {**options, "lower": "eager"}
    if how == "by name":
        qcompile.set_defaults(**options)
        arguments["torch_compile_backend"] = "qcompile"
    else:
        model.compile(backend="qcompile", options=options)
    settings = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 5, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return Trainer(model, TrainingArguments(str(folder), **{**settings, **arguments}), train_dataset=rows(64), eval_dataset=rows(4), callbacks=[callback or Callback()])


def everything(made: Trainer) -> dict[str, torch.Tensor]:
    return {**{f"model.{k}": v for k, v in made.model.state_dict().items()}, **{f"state.{k}": v.clone() for k, v in train.state_dict(made.model).items()}}


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("recipe", "how"), [*((recipe, "in place") for recipe in RECIPES), ("W4A16 qat", "by name"), ("fp8 delayed", "by name")])
def test_trainer_trains_evaluates_and_resumes(tmp_path, how, recipe):
    first = trainer(tmp_path, how, RECIPES[recipe], eval_strategy="steps", eval_steps=5)
    with graphs() as seen:
        first.train()
    trained = [graph for graph, _ in seen if isinstance(graph, TrainingGraph)]
    evaluated = [graph for graph, _ in seen if not isinstance(graph, TrainingGraph)]
    assert len(trained) == 10 and len(evaluated) == 2 and len(evaluated[0].kernels) == 7  # each graph once a step, and twice to evaluate
    assert losses(first)[-1] < losses(first)[0]
    start = torch.load(tmp_path / "checkpoint-5" / FILE, weights_only=True)["state"]
    for name, value in train.state_dict(first.model).items():
        assert torch.isfinite(value).all() and not torch.equal(value, start[name]), name
    whole, history = everything(first), losses(first)
    torch._dynamo.reset()
    second = trainer(tmp_path, how, RECIPES[recipe])  # another process would make it anew, too
    assert second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5")).global_step == 10
    again = everything(second)
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)
    assert losses(second) == history


def test_the_callbacks_optimizer_follows_the_schedule_and_may_be_given(tmp_path):
    seen = []

    class Watched(Callback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **more):
            super().on_pre_optimizer_step(args, state, control, optimizer=optimizer, **more)
            seen.append((optimizer.param_groups[0]["lr"], self.optimizer.param_groups[0]["lr"]))

    callback = Watched(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    made = trainer(tmp_path, "in place", RECIPES["W4A16 qat"], callback, max_steps=3, gradient_accumulation_steps=2)
    made.train()
    assert isinstance(callback.optimizer, torch.optim.SGD) and {id(p) for p in callback.optimizer.param_groups[0]["params"]} == {id(p) for p in qcompile.parameters(made.model)}
    assert [lr for pair in seen for lr in pair] == pytest.approx([0.01, 0.5, 0.02 / 3, 1.0 / 3, 0.01 / 3, 0.5 / 3])
    assert all(p.grad is None for p in qcompile.parameters(made.model))


def test_the_best_model_gets_what_it_had_learned(tmp_path):
    made = trainer(tmp_path, "in place", RECIPES["W4A16 qat"], eval_strategy="steps", eval_steps=2, save_steps=2, max_steps=4, load_best_model_at_end=True)
    made._determine_best_metric = lambda metrics, trial: setattr(made.state, "best_model_checkpoint", str(tmp_path / "checkpoint-2")) or True
    made.train()
    best = torch.load(tmp_path / "checkpoint-2" / FILE, weights_only=True)["state"]
    last = torch.load(tmp_path / "checkpoint-4" / FILE, weights_only=True)["state"]
    now = train.state_dict(made.model)
    assert all(torch.equal(now[k], best[k]) for k in best) and not all(torch.equal(now[k], last[k]) for k in last)


def test_a_checkpoint_without_our_file_is_an_error(tmp_path):
    made = trainer(tmp_path, "in place", RECIPES["W4A16 qat"], max_steps=1, save_steps=1)
    made.train()
    (tmp_path / "checkpoint-1" / FILE).unlink()
    with pytest.raises(OptionError, match=r"no qcompile\.pt in .*checkpoint-1.*Callback\(checkpoint=\.\.\.\)"):
        trainer(tmp_path, "in place", RECIPES["W4A16 qat"], max_steps=2).train(resume_from_checkpoint=True)


def test_accelerate_accepts_our_name_and_no_other():
    accept_name()
    accept_name()
    assert DynamoBackend("QCOMPILE").value == "QCOMPILE" and "QCOMPILE" in DynamoBackend and "EAGER" in DynamoBackend
    with pytest.raises(ValueError, match="QCOMPILER"):
        DynamoBackend("QCOMPILER")


def test_defaults_are_read_where_no_options_are_given(built):
    x = torch.randn(3, 32)
    with pytest.raises(OptionError, match="unknown option 'recipes'"):
        qcompile.set_defaults(recipes="W8A16")
    qcompile.set_defaults(recipe="W8A16", lower="eager")
    with torch.no_grad():
        for options in (None, {"recipe": "W4A16", "lower": "eager"}):
            torch._dynamo.reset()
            torch.compile(Net(), backend="qcompile", options=options)(x)
        qcompile.set_defaults(lower="eager")  # not added to what was set before
        torch._dynamo.reset()
        torch.compile(Net(), backend="qcompile")(x)
    qcompile.set_defaults()
    assert [graph.options.recipe.name for graph in built] == ["W8A16", "W4A16", "W8A8"] and DEFAULTS == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plain_loop_resumes_bit_exactly(tmp_path, recipe):
    """With the optimizer, through a file: what is learned exists before the optimizer's state is read."""
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))

    def run(steps: int, path: pathlib.Path | None = None, save: pathlib.Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Net()
        fast = torch.compile(model, backend="qcompile", options={**RECIPES[recipe], "lower": "eager"})
        saved = None if path is None else torch.load(path, weights_only=True)
        if saved is None:
            fast(x)
        else:
            model.load_state_dict(saved["model"])
            train.load_state_dict(fast, saved["state"])
        optimizer = torch.optim.AdamW([{"params": list(model.parameters())}, {"params": qcompile.parameters(fast), "weight_decay": 0.0}], lr=0.01)
        if saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
        for _ in range(steps):
            optimizer.zero_grad()
            (fast(x) - x).square().mean().backward()
            optimizer.step()
        if save is not None:
            torch.save({"model": model.state_dict(), "state": train.state_dict(fast), "optimizer": optimizer.state_dict()}, save)
        return {**model.state_dict(), **train.state_dict(fast)}

    whole = run(6)
    run(3, save=tmp_path / "half.pt")
    rest = run(3, path=tmp_path / "half.pt")
    assert whole.keys() == rest.keys() and all(torch.equal(whole[k], rest[k]) for k in whole)
