"""Losses against formulas in float64 that share no code with them; masks, the shift, limits, teachers of every kind, and what the errors say."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qcompile.core.errors import OptionError, TrainingError
from qcompile.train import distill as d
from qcompile.train.distill import LOSSES, Distillation, cross_entropy, divergence, hidden_error, soft_cross_entropy, token_scaled, token_weights

B, T, V = 3, 6, 11


@pytest.fixture
def batch():
    """Student and teacher logits, labels with some that do not count, a padding mask: what a loop has."""
    labels = torch.randint(0, V, (B, T))
    labels[0, :3] = -100
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 4:] = 0  # right padding
    mask[2, :2] = 0  # left padding
    return SimpleNamespace(student=torch.randn(B, T, V) * 2, teacher=torch.randn(B, T, V) * 2, labels=labels, mask=mask)


def probabilities(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


def by_hand(b, labels, mask, name, temperature=1.0, tau=10.0, shift=True):
    """Python floats and loops. Tokens are (sequence, position of the logits, position of the label)."""
    tokens = [(i, t, t + 1) for i in range(B) for t in range(T - 1)] if shift else [(i, t, t) for i in range(B) for t in range(T)]
    if mask is not None:
        tokens = [(i, t, u) for i, t, u in tokens if mask[i, t] and mask[i, u]]
    if labels is not None:
        tokens = [(i, t, u) for i, t, u in tokens if labels[i, u] != -100]
    student, teacher = ([[[float(v) / temperature for v in row] for row in seq] for seq in x.double().tolist()] for x in (b.student, b.teacher))
    hot = b.teacher.double().tolist()

    def soft(i, t):
        p, q = probabilities(teacher[i][t]), probabilities(student[i][t])
        extra = sum(x * math.log(x) for x in p) if name == "kl" else 0.0
        return (extra - sum(x * math.log(y) for x, y in zip(p, q))) * temperature**2

    if name == "ground_truth":
        return sum(-math.log(probabilities(b.student.double().tolist()[i][t])[labels[i, u]]) for i, t, u in tokens) / len(tokens)
    if name in ("logit", "kl"):
        return sum(soft(i, t) for i, t, _ in tokens) / len(tokens)
    total = 0.0
    for row in range(B):
        mine = [(t, -math.log(probabilities(hot[i][t])[labels[i, u]])) for i, t, u in tokens if i == row]
        weights = [math.exp(ce / tau) for _, ce in mine]
        total += sum(w / sum(weights) * soft(row, t) for w, (t, _) in zip(weights, mine))
    return total


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", ["ground_truth", "logit", "kl", "tsld"])
def test_against_loops_in_float64(batch, name, temperature, shift):
    for labels in (batch.labels, None):
        for mask in (batch.mask, None):
            if labels is None and LOSSES[name].labels:
                continue
            distill = Distillation(None, name, temperature=temperature, tau=3.0, shift=shift)
            loss, parts = distill(batch.student, labels=labels, attention_mask=mask, teacher_outputs=batch.teacher)
            assert float(loss) == pytest.approx(by_hand(batch, labels, mask, name, temperature, 3.0, shift), rel=2e-6)
            assert loss.dtype == torch.float32 and list(parts) == [name] and not parts[name].requires_grad


@pytest.mark.parametrize("name", ["ground_truth", "logit", "kl", "tsld"])
def test_gradients(batch, name):
    """By finite differences in float64, and nothing flows into the teacher."""
    student = batch.student[:, :4, :5].double().requires_grad_()
    teacher = batch.teacher[:, :4, :5].double().requires_grad_()
    distill = Distillation(None, name, temperature=1.5)
    call = lambda s: distill(s, labels=batch.labels[:, :4].clamp(max=4), attention_mask=batch.mask[:, :4], teacher_outputs=teacher).loss  # noqa: E731
    assert call(student).dtype == torch.float64
    assert torch.autograd.gradcheck(call, (student,))
    call(student).backward()
    assert teacher.grad is None


def test_ignored_tokens_get_no_gradient(batch):
    for name in ("ground_truth", "logit", "tsld"):
        student = batch.student.clone().requires_grad_()
        Distillation(None, name)(student, labels=batch.labels, attention_mask=batch.mask, teacher_outputs=batch.teacher).loss.backward()
        reached = student.grad.abs().sum(-1) > 0
        counts = (batch.labels != -100) & (batch.mask == 1)
        counts[:, :-1], last = counts[:, 1:] & (batch.mask[:, :-1] == 1), counts[:, -1].clone()
        counts[:, -1] = False
        assert last.any() and torch.equal(reached, counts)


# --- limits ------------------------------------------------------------------------------------------------------------


def test_infinite_tau_is_logit_distillation(batch):
    """Equal weights; the sum over the batch is the batch size times logit distillation's mean."""
    student, teacher = batch.student.double(), batch.teacher.double()
    given = dict(labels=batch.labels.clamp(min=0), teacher_outputs=teacher)
    logit = Distillation(None, "logit")(student, **given).loss
    for tau, slack in ((math.inf, 1e-14), (1e9, 1e-7)):
        torch.testing.assert_close(Distillation(None, "tsld", tau=tau)(student, **given).loss, B * logit, rtol=slack, atol=0)
        torch.testing.assert_close(Distillation(None, "tsld", tau=tau, reduction="mean")(student, **given).loss, logit, rtol=slack, atol=0)


def test_small_tau_takes_the_hardest_token(batch):
    labels = batch.labels.clamp(min=0)
    hardest = cross_entropy(batch.teacher, labels).argmax(-1)
    assert torch.equal(token_weights(batch.teacher, labels, tau=1e-4), nn.functional.one_hot(hardest, T).float())


def test_weights_follow_the_teachers_difficulty(batch):
    labels = batch.labels.clamp(min=0)
    weights, hard = token_weights(batch.teacher, labels, tau=10.0), cross_entropy(batch.teacher, labels)
    assert torch.equal(weights.argsort(-1), hard.argsort(-1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(B))
    torch.testing.assert_close(weights.log().diff(dim=-1), hard.diff(dim=-1) / 10, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_the_teacher(batch):
    student = batch.teacher.clone().requires_grad_()
    entropy = torch.distributions.Categorical(logits=batch.teacher[:, :-1].double()).entropy()
    loss = Distillation(None, "logit")(student, teacher_outputs=batch.teacher).loss
    assert loss.item() == pytest.approx(float(entropy.mean()), rel=1e-6)
    for name, floor in (("kl", 0.0), ("tsld", None)):
        loss = Distillation(None, name)(student, labels=batch.labels.clamp(min=0), teacher_outputs=batch.teacher).loss
        assert floor is None or loss.item() == floor
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.abs().max() < 1e-6
    weights = token_weights(batch.teacher[:, :-1], batch.labels.clamp(min=0)[:, 1:])
    assert loss.item() == pytest.approx(float((weights.double() * entropy).sum()), rel=1e-6)


def test_the_authors_code_where_nothing_is_masked(batch):
    """aiha-lab/TSLD, written over: softmax over the sequence of CE / tau, sum over everything."""
    labels = batch.labels.clamp(min=0)
    s, t, y = batch.student[:, :-1], batch.teacher[:, :-1], labels[:, 1:]
    scale = torch.softmax(nn.functional.cross_entropy(t.reshape(-1, V), y.reshape(-1), reduction="none").view(B, -1) / 10, dim=-1)
    wanted = ((-t.softmax(-1) * s.log_softmax(-1)).sum(-1) * scale).sum()
    torch.testing.assert_close(Distillation(None, "tsld")(batch.student, labels=labels, teacher_outputs=batch.teacher).loss, wanted)


def test_forbidden_tokens_are_no_nan():
    """Logits of -inf in both models, as where parts of a vocabulary are masked out."""
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    cut = copy.deepcopy((student[..., :4], teacher[..., :4]))
    student[..., 4], teacher[..., 4] = -math.inf, -math.inf
    student.requires_grad_()
    for f in (soft_cross_entropy, divergence):
        y = f(student, teacher)
        torch.testing.assert_close(y, f(*cut))
        assert torch.autograd.grad(y.sum(), student)[0].isfinite().all()


def test_a_sequence_without_tokens_weighs_nothing(batch):
    labels = batch.labels.clamp(min=0)
    labels[1] = -100
    student = batch.student.clone().requires_grad_()
    for reduction, count in (("sum", 1), ("mean", 2)):
        distill = Distillation(None, "tsld", reduction=reduction)
        loss = distill(student, labels=labels, teacher_outputs=batch.teacher).loss
        rest = Distillation(None, "tsld")(batch.student[[0, 2]], labels=labels[[0, 2]], teacher_outputs=batch.teacher[[0, 2]]).loss
        torch.testing.assert_close(loss, rest / count)
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


# --- hidden states -----------------------------------------------------------------------------------------------------


def states(n, h=8):
    return tuple(torch.randn(B, T, h) * 10.0**i for i in range(n))


def test_layers(batch):
    student, teacher = states(3), states(3)
    out = lambda logits, hidden: {"logits": logits, "hidden_states": hidden}  # noqa: E731

    def by_pairs(pairs, normalize, mask):
        keep = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
        errors = [((student[s] - teacher[t]).double()[keep] ** 2).mean() / ((teacher[t].double()[keep] ** 2).mean() if normalize else 1) for s, t in pairs]
        return float(sum(errors) / len(errors))

    for layers, pairs in ((None, [(0, 0), (1, 1), (2, 2)]), ([2], [(2, 2)]), ([(0, 1), (-1, 2)], [(0, 1), (2, 2)])):
        for normalize in (True, False):
            for mask in (None, batch.mask):
                distill = Distillation(None, "layer", layers=layers, normalize=normalize)
                loss, _ = distill(out(batch.student, student), attention_mask=mask, teacher_outputs=out(batch.teacher, teacher))
                assert float(loss) == pytest.approx(by_pairs(pairs, normalize, mask), rel=1e-5)
    torch.testing.assert_close(hidden_error(1000 * student[0], 1000 * teacher[0]), hidden_error(student[0], teacher[0]))


def test_weights_and_parts(batch):
    distill = Distillation(None, {"tsld": 0.5, "kl": 2, "logit": 0}, ground_truth=0.25)
    loss, parts = distill(batch.student, labels=batch.labels, teacher_outputs=batch.teacher)
    assert list(parts) == ["tsld", "kl", "ground_truth"]
    assert float(loss) == pytest.approx(0.5 * float(parts["tsld"]) + 2 * float(parts["kl"]) + 0.25 * float(parts["ground_truth"]), rel=1e-6)
    assert repr(distill) == "Distillation(0.5 tsld + 2 kl + 0.25 ground_truth, temperature=1, tau=10)"
    done = distill(batch.student, labels=batch.labels, teacher_outputs=batch.teacher)
    assert str(done).startswith(f"{float(loss):.4g} (tsld ") and done.parts["kl"] == parts["kl"]


# --- teachers ----------------------------------------------------------------------------------------------------------


class Bigrams(nn.Module):
    """Logits from the token before, through a dropout."""

    def __init__(self, vocabulary: int = V) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(vocabulary, 8), nn.Dropout(0.5), nn.Linear(8, vocabulary)
        self.seen: list[object] = []

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.seen.append((self.drop.training, torch.is_grad_enabled(), labels))
        return self.head(self.drop(self.embed(input_ids)))


def test_the_teacher_runs_in_eval_mode_without_grad_and_without_labels():
    teacher, ids = Bigrams(), torch.randint(0, V, (B, T))
    teacher.head.eval()
    distill = Distillation(teacher, "tsld", ground_truth=1.0)
    student = Bigrams()
    loss, _ = distill(student(ids), input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    assert teacher.seen == [(False, False, None)]
    assert teacher.training and teacher.drop.training and not teacher.head.training
    loss.backward()
    assert student.head.weight.grad is not None and all(p.grad is None for p in teacher.parameters())
    positional, _ = distill(student.eval()(ids), ids, labels=ids)
    keyword, _ = distill(student(ids), input_ids=ids, labels=ids)
    assert torch.equal(positional, keyword)


def test_the_mode_comes_back_after_an_error():
    teacher = Bigrams()
    with pytest.raises(IndexError):
        Distillation(teacher, "logit")(torch.randn(1, 2, V), torch.full((1, 2), V + 1))
    assert teacher.training and teacher.drop.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_of_16_bits(dtype):
    teacher, ids = Bigrams().eval(), torch.randint(0, V, (B, T))
    wanted = Distillation(copy.deepcopy(teacher).to(dtype).float(), "tsld")(teacher(ids), ids, labels=ids).loss
    loss = Distillation(teacher.to(dtype), "tsld")(copy.deepcopy(teacher).float()(ids), ids, labels=ids).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0.02)


def test_inputs_go_to_the_teachers_device():
    """A teacher on the meta device stands for one elsewhere: it is reached by everything, and its outputs come back."""
    seen = []

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, x, pair):
            seen.extend(t.device.type for t in (x, pair["a"][0]))
            return torch.zeros(B, T, V)

    Distillation(Far(), "logit")(torch.randn(B, T, V), torch.zeros(2), pair={"a": [torch.zeros(2)]})
    assert seen == ["meta", "meta"]


def test_transformers_models_compiled_and_not():
    """ModelOutputs with hidden states; the student is compiled whole, the teacher too, and the answer is that of eager models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    teacher, student = LlamaForCausalLM(config), LlamaForCausalLM(config).train()
    ids = torch.randint(0, V, (2, T))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(torch.rand(2, T) < 0.2, -100)}
    fast = [torch.compile(m, backend="eager") for m in (teacher, student)]
    found, caches = [], []
    teacher.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    for t, s in ((teacher, student), (fast[0], fast[1])):
        distill = Distillation(t, {"tsld": 1, "layer": 1}, ground_truth=0.5)
        loss, parts = distill(s(**batch, output_hidden_states=True), **batch)
        found.append(loss)
        torch.testing.assert_close(parts["ground_truth"], s(**batch).loss)
        assert teacher.training
    assert torch.equal(*found) and caches == [None, None]  # the teacher keeps no keys and values
    found[1].backward()
    assert student.lm_head.weight.grad is not None


def test_a_student_gets_better():
    """The whole loop on a task that can be learned: KL falls to nearly nothing."""
    teacher, student = Bigrams().eval(), Bigrams().eval()
    distill = Distillation(teacher, "tsld", reduction="mean")
    kl = Distillation(teacher, "kl")
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05)
    first = None
    for _ in range(150):
        ids = torch.randint(0, V, (8, T))
        loss, _ = distill(student(ids), input_ids=ids, labels=ids)
        first = first or kl(student(ids), input_ids=ids).loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kl(student(ids), input_ids=ids).loss.item() < 0.02 * first


def test_compiles_whole():
    """The pure losses, forward and backward, without a graph break: what AOTAutograd captures is handed to Inductor by torch.compile."""

    def all_of_them(s, t, y, mask):
        return (
            soft_cross_entropy(s, t, 2.0).mean() + divergence(s, t).mean() + token_scaled(s, t, y, mask) + cross_entropy(s, y).mean() + hidden_error(s, t, mask)
        )

    s, t, y, mask = torch.randn(B, T, V, requires_grad=True), torch.randn(B, T, V), torch.randint(0, V, (B, T)), torch.rand(B, T) > 0.3
    wanted = all_of_them(s, t, y, mask)
    found = torch.compile(all_of_them, backend="aot_eager", fullgraph=True)(s, t, y, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, s), torch.autograd.grad(wanted, s), rtol=1e-4, atol=1e-6)


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss="tlsd"), r"unknown loss 'tlsd' in Distillation. Did you mean 'tsld'\? Known: ground_truth, logit, kl, tsld, layer"),
        (dict(loss={"tsld": -1.0}), "weight of 'tsld' is -1.0"),
        (dict(loss={"tsld": math.nan}), "weight of 'tsld' is nan"),
        (dict(loss={"tsld": 0.0}), "no loss has a weight above 0"),
        (dict(loss={"ground_truth": 1.0}, ground_truth=0.5), "give one of them"),
        (dict(temperature=0.0), "temperature=0.0 divides"),
        (dict(tau=-1.0), "tau=-1.0"),
        (dict(reduction="avg"), "unknown reduction 'avg'"),
        (dict(layers=[1]), "layers=.1. belongs to the loss 'layer'"),
        (dict(loss="layer", layers=[]), "layers is empty"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(OptionError, match=message):
        Distillation(None, **options)


LOGITS = torch.zeros(2, 4, 5)
LABELS = torch.zeros(2, 4, dtype=torch.long)
HIDDEN = {"logits": LOGITS, "hidden_states": (torch.zeros(2, 4, 3),) * 2}


@pytest.mark.parametrize(
    ("options", "student", "call", "message"),
    [
        ({}, LOGITS, dict(teacher_outputs=LOGITS), "the losses tsld need labels"),
        ({}, LOGITS, dict(teacher_outputs=LOGITS[..., :4], labels=LABELS), "vocabulary has 5 tokens and the teacher's 4.*share a tokenizer"),
        ({}, LOGITS, dict(teacher_outputs=LOGITS[:, :3], labels=LABELS), r"\(2, 4, 5\) and the teacher's of \(2, 3, 5\)"),
        ({}, LOGITS, dict(teacher_outputs=LOGITS, labels=LABELS[:, :3]), r"labels are of shape \(2, 3\) and logits have \(2, 4\)"),
        ({}, LOGITS, dict(teacher_outputs=LOGITS, labels=LABELS.float()), "labels are torch.float32"),
        ({}, LOGITS, dict(teacher_outputs=LOGITS, labels=LABELS, attention_mask=LABELS[:1]), r"attention_mask is of shape \(1, 4\)"),
        ({}, LOGITS, dict(teacher_outputs=LOGITS, labels=LABELS - 100), r"no token counts: every label is -100 or padding in a batch of shape \(2, 3\)"),
        ({}, LOGITS, dict(teacher_outputs=LOGITS, labels=LABELS, attention_mask=LABELS), "no token counts"),
        ({}, LOGITS[:0], dict(teacher_outputs=LOGITS[:0], labels=LABELS[:0]), r"student's logits are empty, of shape \(0, 4, 5\)"),
        ({}, LOGITS[:, :1], dict(teacher_outputs=LOGITS[:, :1], labels=LABELS[:, :1]), "nothing predicts another"),
        ({}, LOGITS[0], dict(teacher_outputs=LOGITS[0], labels=LABELS[0]), "not .batch, sequence, vocabulary., which the shift by one"),
        (dict(shift=False), LOGITS[0], dict(teacher_outputs=LOGITS[0], labels=LABELS[0]), "which tsld needs"),
        ({}, (None, LOGITS), dict(teacher_outputs=LOGITS, labels=LABELS), "tuple of NoneType, Tensor.*return_dict=True"),
        ({}, {"last": LOGITS}, dict(teacher_outputs=LOGITS, labels=LABELS), "student's logits are NoneType, from outputs of type dict"),
        ({}, LABELS, dict(teacher_outputs=LOGITS, labels=LABELS), "torch.int64"),
        ({}, LOGITS, dict(labels=LABELS), "there is no teacher and the call brings no teacher_outputs"),
        (dict(teacher=Bigrams()), LOGITS, dict(labels=LABELS), "the teacher has no inputs"),
        (dict(loss="layer"), LOGITS, dict(teacher_outputs=HIDDEN), "student's outputs have none; call it with output_hidden_states=True"),
        (dict(loss="layer"), HIDDEN, dict(teacher_outputs={"logits": LOGITS, "hidden_states": HIDDEN["hidden_states"][:1]}), "student has 2 hidden states and the teacher 1"),
        (dict(loss="layer", layers=[5]), HIDDEN, dict(teacher_outputs=HIDDEN), "hidden state 5 of the student, which has 2"),
        (
            dict(loss="layer"), HIDDEN, dict(teacher_outputs={"logits": LOGITS, "hidden_states": (torch.zeros(2, 4, 4),) * 2}),
            r"hidden state 0 of the student is of shape \(2, 4, 3\) and 0 of the teacher of \(2, 4, 4\)",
        ),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit(options, student, call, message):
    with pytest.raises(TrainingError, match=message):
        Distillation(**{"teacher": None, **options})(student, **call)


def test_without_the_check_a_batch_without_tokens_is_zero():
    loss = Distillation(None, "tsld", check=False, ground_truth=1.0)(LOGITS, labels=LABELS - 100, teacher_outputs=LOGITS).loss
    assert float(loss) == 0


def test_classifiers_have_no_sequence():
    """Logits (B, V) with labels (B,), and no shift."""
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.randint(0, 3, (4,))
    _, parts = Distillation(None, {"kl": 1.0}, ground_truth=1.0, shift=False)(student, labels=labels, teacher_outputs=teacher, attention_mask=torch.ones(4, 9))
    torch.testing.assert_close(parts["ground_truth"], nn.functional.cross_entropy(student, labels))
    torch.testing.assert_close(parts["kl"], nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"))


def test_rows_are_what_the_docs_name():
    assert all(f"    {name} " in (d.__doc__ or "") for name in LOSSES)
