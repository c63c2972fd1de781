"""Knowledge distillation: a quantized student learns from the outputs of the model that it was made from. For any PyTorch loop, compiled or not.

    distill = Distillation(teacher, "tsld", ground_truth=0.1)
    for batch in loader:                                     # input_ids, attention_mask, labels
        loss, parts = distill(student(**batch), **batch)
        loss.backward()

The losses, rows of ``LOSSES``, for teacher probabilities P_T and student probabilities P_S of each token t:

    ground_truth   -log P_S(label_t), mean over tokens
    logit          sum over the vocabulary of -P_T log P_S, mean over tokens (Hinton et al. 2015, arXiv 1503.02531; temperature T, times T**2)
    kl             the same less the teacher's entropy: the forward KL divergence. Same gradient, and zero where the student has arrived
    tsld           token-scaled logit distillation (Kim et al. 2023, arXiv 2308.06744): tokens that the teacher finds hard weigh more,
                   sum over t of softmax_t(CE_t / tau) * (sum over the vocabulary of -P_T log P_S), CE_t = -log P_T(label_t)
    layer          mean squared error of hidden states, relative to the teacher's mean square

All is computed in float32 (float64 where both models are), whatever the models compute in.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.core.errors import OptionError, TrainingError, unknown

from .outputs import IGNORED, Aligned, align, hidden_states, moved, running

Reduction = Literal["sum", "mean"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (...) over the tokens that count; 0 where none does."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``-sum_v P_T log P_S`` of each token, (...) for logits (..., V) of any float dtypes; with a temperature, T**2 times that of logits / T, so that gradients keep their size."""
    p = F.softmax(_wide(teacher) / temperature, dim=-1)
    log_q = F.log_softmax(_wide(student) / temperature, dim=-1)
    return -torch.where(p > 0, p * log_q, 0.0).sum(-1) * temperature**2  # where both models forbid a token with -inf, 0 * inf is no NaN


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL divergence ``sum_v P_T (log P_T - log P_S)`` of each token, (...) for logits (..., V); times T**2. Exactly zero for equal logits."""
    log_p = F.log_softmax(_wide(teacher) / temperature, dim=-1)
    log_q = F.log_softmax(_wide(student) / temperature, dim=-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1) * temperature**2


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log P(label)`` of each token, (...) for logits (..., V) and integer labels (...); 0 where the label is -100."""
    return F.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none").view(labels.shape)


def token_weights(teacher: Tensor, labels: Tensor, mask: Tensor | None = None, tau: float = 10.0) -> Tensor:
    """TSLD's weights, (B, T) for teacher logits (B, T, V) and labels (B, T): the softmax over the sequence of the teacher's cross entropy / ``tau``. Each row sums to 1, to 0 where no token counts.

    ``tau`` = inf gives every token of a sequence the same weight. Tokens outside of ``mask`` (B, T) have no part in the softmax; in the authors' code (aiha-lab/TSLD) they have one, with CE 0.
    """
    hard = cross_entropy(teacher, labels).detach() / tau
    if mask is None:
        return hard.softmax(-1)
    weights = hard.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.where(mask, weights, 0.0)  # a row without tokens is NaN before


def token_scaled(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor | None = None, tau: float = 10.0, temperature: float = 1.0, reduction: Reduction = "sum"
) -> Tensor:
    """TSLD of logits (B, T, V), labels (B, T) and an optional boolean mask (B, T): a scalar.

    Each sequence gives a weighted mean over its tokens. "sum" adds these over the batch, as the authors' code does, so that the loss grows with the batch; "mean" divides by the number of
    sequences that have tokens.
    """
    each = (token_weights(teacher, labels, mask, tau) * soft_cross_entropy(student, teacher, temperature)).sum(-1)
    if reduction == "sum":
        return each.sum()
    return each.mean() if mask is None else each.sum() / mask.any(-1).sum().clamp(min=1)


def hidden_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Mean squared error of hidden states (B, S, H) over the tokens of ``mask`` (B, S), a scalar; divided by the teacher's mean square where ``normalize``, so that layers of any size weigh alike."""
    t = _wide(teacher)
    error = _mean((_wide(student) - t).square().mean(-1), mask)
    return error / _mean(t.square().mean(-1), mask).clamp(min=torch.finfo(t.dtype).tiny) if normalize else error


@dataclass(frozen=True)
class Loss:
    """One row: a scalar from aligned outputs, and what it needs of them."""

    compute: Callable[[Distillation, Aligned], Tensor]
    teacher: bool = True
    labels: bool = False
    hidden: bool = False
    sequences: bool = False


def _layer(d: Distillation, a: Aligned) -> Tensor:
    errors = [hidden_error(s, t, a.hidden_mask, d.normalize) for s, t in a.hidden]
    return torch.stack(errors).mean()


def _tsld(d: Distillation, a: Aligned) -> Tensor:
    assert a.labels is not None
    return token_scaled(a.student, a.teacher, a.labels, a.mask, d.tau, d.temperature, d.reduction)


LOSSES: dict[str, Loss] = {
    "ground_truth": Loss(lambda d, a: _mean(cross_entropy(a.student, a.labels), a.mask), teacher=False, labels=True),  # type: ignore[arg-type]
    "logit": Loss(lambda d, a: _mean(soft_cross_entropy(a.student, a.teacher, d.temperature), a.mask)),
    "kl": Loss(lambda d, a: _mean(divergence(a.student, a.teacher, d.temperature), a.mask)),
    "tsld": Loss(_tsld, labels=True, sequences=True),
    "layer": Loss(_layer, hidden=True),
}


class Distilled(NamedTuple):
    """What a call gives: ``loss``, the weighted sum, with its graph; ``parts``, each loss by its name, not weighted, detached and still on the device."""

    loss: Tensor
    parts: dict[str, Tensor]

    def __str__(self) -> str:
        return f"{self.loss.item():.4g} (" + ", ".join(f"{name} {part.item():.4g}" for name, part in self.parts.items()) + ")"


class Distillation:
    """A loss that runs the teacher: ``loss, parts = distill(student_outputs, **batch)``.

    ``teacher``: a model, compiled or not, on any device and of any float dtype, or any callable; it runs under no_grad, in eval mode (its modules get their own modes back), without the labels.
    None where every call brings ``teacher_outputs``. An encoder-decoder that makes its inputs from labels wants a function around it that passes them.
    ``loss``: a row of LOSSES, or weights by name: ``{"tsld": 1.0, "layer": 0.5}``. ``ground_truth`` adds that loss with a weight.
    ``temperature`` of "logit", "kl" and "tsld"; ``tau`` of the token weights, inf for equal ones; ``reduction`` over the batch of "tsld" (see ``token_scaled``).
    ``layers``: the hidden states that "layer" compares: None for all, or indices, or pairs (student's, teacher's); 0 is what comes out of the embedding, -1 the last. ``normalize``: see
    ``hidden_error``.
    ``shift``: logits at t predict the label at t + 1, as in causal language models of transformers, whose labels come unshifted. False for logits (..., V) and labels (...) that lie side by side.
    ``check``: raise where no token counts, for which one number is read back from the labels' device in every call.
    Raises OptionError where these do not fit.
    """

    def __init__(
        self, teacher: Callable[..., Any] | None, loss: str | Mapping[str, float] = "tsld", *, temperature: float = 1.0, tau: float = 10.0, ground_truth: float = 0.0,
        layers: Sequence[int | tuple[int, int]] | None = None, normalize: bool = True, reduction: Reduction = "sum", shift: bool = True, check: bool = True,
    ) -> None:  # fmt: skip
        self.weights = _weights(loss, ground_truth)
        for name, value in (("temperature", temperature), ("tau", tau)):
            if not value > 0:
                raise OptionError(f"Distillation: {name}={value!r} divides logits or losses; give a positive number")
        if reduction not in ("sum", "mean"):
            raise unknown("reduction", reduction, ["sum", "mean"], "Distillation")
        if layers is not None and "layer" not in self.weights:
            raise OptionError(f"Distillation: layers={layers!r} belongs to the loss 'layer', and the losses are {', '.join(self.weights)}")
        if layers is not None and not len(layers):
            raise OptionError("Distillation: layers is empty; give indices, pairs, or None for all")
        self.teacher, self.shift, self.check = teacher, shift, check
        self.temperature: float = temperature
        self.tau: float = tau
        self.reduction: Reduction = reduction
        self.normalize: bool = normalize
        self.layers = None if layers is None else [pair if isinstance(pair, tuple) else (pair, pair) for pair in layers]

    def __repr__(self) -> str:
        terms = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in self.weights.items())
        return f"Distillation({terms}, temperature={self.temperature:g}, tau={self.tau:g})"

    def __call__(
        self, student_outputs: Any, *args: Any, labels: Tensor | None = None, attention_mask: Tensor | None = None, teacher_outputs: Any = None, **batch: Any
    ) -> Distilled:
        """The loss of one batch.

        ``student_outputs``: logits (B, T, V), or an output of transformers or a mapping that has ``logits``, and ``hidden_states`` for "layer" (call the student with output_hidden_states=True).
        ``args``, ``attention_mask`` and ``batch`` are the teacher's inputs. Padding, where ``attention_mask`` (B, T) is 0, does not count, nor does a label of -100; a mask of more dimensions says
        which tokens see which and is for the teacher only.
        Raises TrainingError, which names what does not fit: vocabularies, lengths, labels that are missing, hidden states, an empty batch, or one in which no token counts.
        """
        rows = [LOSSES[name] for name in self.weights]
        if any(row.labels for row in rows) and labels is None:
            raise TrainingError(f"{self}: the losses {', '.join(n for n in self.weights if LOSSES[n].labels)} need labels; call distill(outputs, **batch) with labels in the batch")
        hidden = any(row.hidden for row in rows)
        if teacher_outputs is None and any(row.teacher for row in rows):
            teacher_outputs = self._ask(args, batch if attention_mask is None else {"attention_mask": attention_mask, **batch}, hidden)
        pairs = hidden_states(student_outputs, teacher_outputs, self.layers) if hidden else []
        aligned = align(student_outputs, teacher_outputs, labels, attention_mask, pairs, self.shift, any(row.sequences for row in rows))
        if self.check and aligned.mask is not None and not bool(aligned.mask.any()):
            raise TrainingError(f"{self}: no token counts: every label is {IGNORED} or padding in a batch of shape {tuple(aligned.mask.shape)}; leave such batches out")
        parts = {name: LOSSES[name].compute(self, aligned) for name in self.weights}
        loss = torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum()
        return Distilled(loss, {name: part.detach() for name, part in parts.items()})

    def _ask(self, args: tuple[Any, ...], batch: Mapping[str, Any], hidden: bool) -> Any:
        """The teacher's outputs, on its own device."""
        if self.teacher is None:
            raise TrainingError(f"{self}: there is no teacher and the call brings no teacher_outputs; give one of them")
        if not args and not batch:
            raise TrainingError(f"{self}: the teacher has no inputs; call distill(outputs, **batch) with what the student was called with")
        extra: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        device = None
        if isinstance(self.teacher, nn.Module):
            device = next((p.device for p in self.teacher.parameters()), None)
            inner = getattr(self.teacher, "_orig_mod", self.teacher)
            if "use_cache" in inspect.signature(inner.forward).parameters:
                extra["use_cache"] = False  # transformers would keep keys and values that nobody asks for
        with running(self.teacher), torch.no_grad():
            return self.teacher(*moved(args, device), **{**extra, **moved(dict(batch), device)})


def _weights(loss: str | Mapping[str, float], ground_truth: float) -> dict[str, float]:
    """Weights by name, in the order given, without zeros; checked."""
    given = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    if ground_truth and "ground_truth" in given:
        raise OptionError(f"Distillation: ground_truth={ground_truth:g} and a loss 'ground_truth' of weight {given['ground_truth']:g}; give one of them")
    given |= {"ground_truth": ground_truth} if ground_truth else {}
    for name, weight in given.items():
        if name not in LOSSES:
            raise unknown("loss", name, LOSSES, "Distillation")
        if not 0 <= weight < math.inf:
            raise OptionError(f"Distillation: the weight of {name!r} is {weight!r}; give a finite number of 0 or more")
    kept = {name: float(weight) for name, weight in given.items() if weight}
    if not kept:
        raise OptionError(f"Distillation: no loss has a weight above 0; known: {', '.join(LOSSES)}")
    return kept
