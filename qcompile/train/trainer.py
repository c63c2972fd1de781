"""transformers' ``Trainer``: it takes a model that was compiled in place, or the backend's name; a callback looks after what training keeps beside the model.

    model.compile(backend="qcompile", options={"recipe": "W4A16", "train": "qat"})
    Trainer(model, TrainingArguments(...), train_dataset=..., callbacks=[qcompile.train.trainer.Callback()]).train()

or, where only a name fits,

    qcompile.set_defaults(recipe="W4A16", train="qat")
    Trainer(model, TrainingArguments(torch_compile_backend="qcompile", ...), train_dataset=..., callbacks=[qcompile.train.trainer.Callback()]).train()
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qcompile.core.errors import OptionError
from qcompile.train import load_state_dict, state_dict
from qcompile.trained import STATE

FILE = "qcompile.pt"
"""What a checkpoint's folder holds beside Trainer's own files."""
Optimize = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def accept_name() -> None:
    """Let ``TrainingArguments(torch_compile_backend="qcompile")`` and ``Accelerator(dynamo_backend="qcompile")`` through. accelerate (1.15) knows a fixed list of backends and refuses those
    that PyTorch finds by entry points; its enumeration gets the hook that Python has for values that are not listed."""
    from accelerate.utils import DynamoBackend

    if "QCOMPILE" in DynamoBackend:
        return
    member = str.__new__(DynamoBackend, "QCOMPILE")
    member._name_ = member._value_ = "QCOMPILE"
    before = DynamoBackend._missing_
    DynamoBackend._missing_ = lambda value: member if value == "QCOMPILE" else before(value)


class Callback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Steps what estimators learn with an optimizer of its own, and keeps it in checkpoints, so that ``trainer.train(resume_from_checkpoint=...)`` goes on bit-exactly.

    ``optimizer(parameters)`` makes the optimizer; AdamW with the betas and the learning rate of the arguments, without weight decay, where it is not given. Its learning rates follow the
    Trainer's schedule; its gradients are not clipped. What is learned exists after the first forward, which is too late for the Trainer's own optimizer and its schedule.
    ``checkpoint``: the folder to resume from where it is not ``<output_dir>/checkpoint-<step>``.

    Making one lets accelerate accept the backend's name, see ``accept_name``. Raises OptionError where a checkpoint lacks what training kept.
    """

    def __init__(self, optimizer: Optimize | None = None, checkpoint: str | pathlib.Path | None = None) -> None:
        accept_name()
        self._make, self._checkpoint = optimizer, checkpoint
        self.optimizer: torch.optim.Optimizer | None = None
        self._names: list[list[str]] = []

    # --- events, in the order of a run --------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Where the arguments name the backend: the Trainer compiles a wrapper around the model, which it leaves out when it evaluates. So the model is compiled in place, too."""
        if args.torch_compile_backend == "qcompile" and model._compiled_call_impl is None:
            model.compile(backend="qcompile", mode=args.torch_compile_mode)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Resume, where the Trainer does."""
        self.on_init_end(args, state, control, model)  # the model may be another one: model_init
        if state.global_step:
            self._load(args, model, pathlib.Path(self._checkpoint or _folder(args, state)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        """Step what is learned, just before the Trainer's optimizer steps the model."""
        known = {name for names in self._names for name in names}
        self._add(args, [(name, p) for name, p in _learned(model) if name not in known])
        if self.optimizer is None:
            return
        factor = optimizer.param_groups[0]["lr"] / args.learning_rate if args.learning_rate else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        scaler = getattr(optimizer, "scaler", None)  # of fp16: unscales, and leaves out steps with infinite gradients
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Save what training keeps into the checkpoint that was just written."""
        folder = _folder(args, state)
        if not state.is_world_process_zero:
            return
        if not folder.is_dir():
            raise OptionError(f"the Trainer has saved step {state.global_step}, but not as {folder}, where what quantized training keeps belongs; hyperparameter search, which saves elsewhere, is not supported")
        own = None if self.optimizer is None else self.optimizer.state_dict()
        torch.save({"state": state_dict(model), "optimizer": own, "names": self._names}, folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The Trainer may have loaded the best model: so do we."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_state_dict(model, _read(pathlib.Path(state.best_model_checkpoint))["state"])

    # --- the optimizer ------------------------------------------------------------------------------------------------

    def _add(self, args: Any, new: list[tuple[str, nn.Parameter]]) -> None:
        """Give the optimizer parameters that it does not have."""
        if not new:
            return
        parameters = [p for _, p in new]
        if self.optimizer is not None:
            self.optimizer.add_param_group({"params": parameters, "lr": self.optimizer.param_groups[0]["initial_lr"]})
        elif self._make is not None:
            self.optimizer = self._make(parameters)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, weight_decay=0.0)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._names.append([name for name, _ in new])

    def _load(self, args: Any, model: Any, folder: pathlib.Path) -> None:
        saved = _read(folder)
        load_state_dict(model, saved["state"])
        learned = dict(_learned(model))
        self.optimizer, self._names = None, []
        for names in saved["names"]:
            self._add(args, [(name, learned[name]) for name in names])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved["optimizer"])


def _learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What estimators learn so far: nothing before the first forward, and with recipes that learn nothing."""
    return [(name, p) for name, p in STATE.named(model) if isinstance(p, nn.Parameter)]


def _folder(args: Any, state: Any) -> pathlib.Path:
    return pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read(folder: pathlib.Path) -> dict[str, Any]:
    """What ``on_save`` wrote."""
    if not (folder / FILE).is_file():
        raise OptionError(f"no {FILE} in {folder}: the checkpoint was written without qcompile.train.trainer.Callback, or lies elsewhere; name its folder, Callback(checkpoint=...)")
    read: dict[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    return read


__all__ = ["Callback", "accept_name"]
