"""Outputs of two models side by side: logits, labels and masks shifted and checked, hidden states in pairs; and running the teacher as it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.core.errors import TrainingError

IGNORED = -100
"""The label of tokens that do not count, as in PyTorch and transformers."""


@dataclass(frozen=True)
class Aligned:
    """Tokens of both models, on the student's device: logits (B, T, V), labels and ``mask`` (B, T), which is None where all count; pairs of hidden states (B, S, H) and their mask (B, S)."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    mask: Tensor | None
    hidden: list[tuple[Tensor, Tensor]]
    hidden_mask: Tensor | None


def field(outputs: Any, name: str, who: str) -> Any:
    """``outputs.name`` or ``outputs[name]``, of an output of transformers, a mapping, or any object; None where it has none. Raises TrainingError for a tuple, which does not say what is what."""
    if isinstance(outputs, (tuple, list)):
        kinds = ", ".join(type(part).__name__ for part in outputs)
        raise TrainingError(f"the {who}'s outputs are a tuple of {kinds}, which does not say where the {name} are; give the logits themselves, or call the model with return_dict=True")
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def logits_of(outputs: Any, who: str) -> Tensor:
    """Logits of outputs, or the outputs where they are a tensor. Raises TrainingError where there are none, and for an empty batch."""
    logits = outputs if isinstance(outputs, Tensor) else field(outputs, "logits", who)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        found = f"a tensor of {tuple(logits.shape)}, {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TrainingError(f"the {who}'s logits are {found}, from outputs of type {type(outputs).__name__}; wanted is a floating point tensor (..., vocabulary)")
    if not logits.numel():
        raise TrainingError(f"the {who}'s logits are empty, of shape {tuple(logits.shape)}; leave empty batches out")
    return logits


def align(
    student_outputs: Any, teacher_outputs: Any, labels: Tensor | None, attention_mask: Tensor | None, hidden: list[tuple[Tensor, Tensor]], shift: bool, sequences: bool
) -> Aligned:
    """Both models' tokens, shifted by one where ``shift``: logits at t meet label and mask at t + 1, and the last logits are left out. ``sequences`` asks for logits (B, T, V).

    A token counts unless its label is -100, or it or the token that it is predicted from is padding. Raises TrainingError where shapes do not fit.
    """
    student = logits_of(student_outputs, "student")
    teacher = student if teacher_outputs is None else logits_of(teacher_outputs, "teacher").detach().to(student.device)
    shape = tuple(student.shape[:-1])
    if student.shape[-1] != teacher.shape[-1]:
        raise TrainingError(
            f"the student's vocabulary has {student.shape[-1]} tokens and the teacher's {teacher.shape[-1]}; both models must share a tokenizer. "
            f"Where only padding differs, hand over teacher_outputs= with logits cut to {student.shape[-1]}"
        )
    if shape != tuple(teacher.shape[:-1]):
        raise TrainingError(f"the student's logits are of shape {tuple(student.shape)} and the teacher's of {tuple(teacher.shape)}: batch or sequence differ; call both with the same inputs")
    if (shift or sequences) and len(shape) != 2:
        needs = "the shift by one" if shift else "tsld"
        raise TrainingError(f"logits of shape {tuple(student.shape)} are not (batch, sequence, vocabulary), which {needs} needs; for others: shift=False and another loss")
    if shift and shape[1] < 2:
        raise TrainingError(f"logits of shape {tuple(student.shape)}: in a sequence of one token nothing predicts another; give longer ones, or shift=False for labels that lie beside their logits")
    mask = _padding(attention_mask, shape, student.device)
    hidden_mask = mask if len(shape) == 2 else _padding(attention_mask, tuple(hidden[0][0].shape[:-1]), student.device) if hidden else None
    if labels is not None:
        labels = _checked(labels, shape).to(student.device)
    if shift:
        student, teacher = student[:, :-1], teacher[:, :-1]
        labels = None if labels is None else labels[:, 1:]
        mask = None if mask is None else mask[:, 1:] & mask[:, :-1]
    if labels is not None:
        known = labels != IGNORED
        mask = known if mask is None else mask & known
    return Aligned(student, teacher, labels, mask, hidden, hidden_mask)


def _padding(attention_mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Which tokens are no padding, (B, T), where the mask says that."""
    if attention_mask is None or attention_mask.dim() != 2 or len(shape) != 2:
        return None
    if tuple(attention_mask.shape) != shape:
        raise TrainingError(f"attention_mask is of shape {tuple(attention_mask.shape)}, and there are {shape} tokens; give a mask of their shape")
    return attention_mask.to(device) != 0


def _checked(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TrainingError(f"labels are {labels.dtype}; give token numbers as int64, -100 where a token does not count")
    if tuple(labels.shape) != shape:
        raise TrainingError(f"labels are of shape {tuple(labels.shape)} and logits have {shape} tokens; give a label for each, unshifted, -100 where it does not count")
    return labels.long()


def hidden_states(student_outputs: Any, teacher_outputs: Any, layers: Sequence[tuple[int, int]] | None) -> list[tuple[Tensor, Tensor]]:
    """Pairs of hidden states (B, S, H), the teacher's detached and on the student's device. Raises TrainingError where they are absent, or not of one shape."""
    both = []
    for outputs, who in ((student_outputs, "student"), (teacher_outputs, "teacher")):
        states = None if isinstance(outputs, Tensor) else field(outputs, "hidden_states", who)
        if not states:
            raise TrainingError(f"the loss 'layer' compares hidden states, and the {who}'s outputs have none; call it with output_hidden_states=True")
        both.append(states)
    student, teacher = both
    if layers is None and len(student) != len(teacher):
        raise TrainingError(f"the student has {len(student)} hidden states and the teacher {len(teacher)}; say which go together: layers=[(student's, teacher's), ...]")
    pairs = []
    for s, t in layers if layers is not None else [(i, i) for i in range(len(student))]:
        for index, states, who in ((s, student, "student"), (t, teacher, "teacher")):
            if not -len(states) <= index < len(states):
                raise TrainingError(f"layers names hidden state {index} of the {who}, which has {len(states)}, the embedding's included")
        if student[s].shape != teacher[t].shape:
            raise TrainingError(f"hidden state {s} of the student is of shape {tuple(student[s].shape)} and {t} of the teacher of {tuple(teacher[t].shape)}; 'layer' compares states of one shape")
        pairs.append((student[s], teacher[t].detach().to(student[s].device)))
    return pairs


@contextmanager
def running(teacher: Callable[..., Any]) -> Iterator[None]:
    """Every module of the teacher in eval mode; afterwards each in the mode that it was in."""
    were = [module for module in teacher.modules() if module.training] if isinstance(teacher, nn.Module) else []
    for module in were:
        module.training = False
    try:
        yield
    finally:
        for module in were:
            module.training = True


def moved(value: Any, device: torch.device | None) -> Any:
    """Tensors inside tuples, lists and dictionaries on ``device``."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    return type(value)(moved(part, device) for part in value) if type(value) in (tuple, list) else value
