"""What ships with the package: a small language model of the Python standard library."""

from __future__ import annotations

import pathlib
from typing import Any

import torch

STDLIB_LM = pathlib.Path(__file__).parent / "stdlib_lm"
"""The model's folder, in the layout of ``from_pretrained``; ``heldout.txt`` in it is text that it was not trained on."""


def stdlib_lm(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer): a Llama of 6.2 M parameters, in eval mode. Needs transformers; loads from the package's own files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(STDLIB_LM, dtype=dtype).eval(), AutoTokenizer.from_pretrained(STDLIB_LM)
