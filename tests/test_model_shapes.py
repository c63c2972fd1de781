"""Models of transformers under batches and lengths that change, and layer by layer: one graph each, and the answer of eager with rounded weights.

W8A16 rounds nothing but weights, so answers are known to the last digits whatever the shape.
"""

from __future__ import annotations

import copy

import pytest
import torch
from small import W8, close, graphs, rounded
from test_models import main_output
from tiny_models import tiny

import qcompile

HEADS = {"llama": "lm_head", "bert": "cls.predictions.decoder"}
SHAPES = ((2, 5), (3, 8), (5, 13), (2, 30))


def ids(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(3, 128, shape)


@pytest.mark.parametrize("name", HEADS)
def test_batches_and_lengths_that_change(name):
    """A decoder and an encoder: a single graph serves all of them where shapes are dynamic from the start, two where the second call makes them so."""
    model, _ = tiny(name, num_hidden_layers=1)
    truth = rounded(model, keep=(HEADS[name],))
    for dynamic, most in ((True, 1), (None, 2)):
        torch._dynamo.reset()
        fast = torch.compile(model, backend="qcompile", dynamic=dynamic, fullgraph=True, options=W8)
        with torch.no_grad(), graphs() as seen:
            for shape in SHAPES:
                inputs = {"input_ids": ids(shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
                assert close(main_output(fast(**inputs)), main_output(truth(**inputs)), 1e-4), (dynamic, shape)
        assert len(seen) == len(SHAPES) and len({id(graph) for graph, _ in seen}) == most


@pytest.mark.parametrize("dynamic", [None, True])
def test_layers_one_by_one(built, dynamic):
    """One compilation for equal layers, whose weights and names are their own; what is outside of them (the head) is left as it is."""
    model, _ = tiny("llama", num_hidden_layers=4)
    truth = rounded(copy.deepcopy(model), keep=("lm_head",))
    for layer in model.model.layers:
        layer.compile(backend="qcompile", fullgraph=True, dynamic=dynamic, options=W8)
    for shape in SHAPES[:2] if dynamic else SHAPES[:1]:
        inputs = {"input_ids": ids(shape), "use_cache": False}
        with torch.no_grad():
            assert close(model(**inputs).logits, truth(**inputs).logits, 1e-4)
    assert len(built) == 1
    report = qcompile.explain(model, **inputs)
    assert [row.name for row in report.sites] == [f"model.layers.{i}.{part}" for i in range(4) for part in PARTS]
    assert report.graphs[0].parameter_sets == 4 and len(report.graphs) == 1
    assert any(row.name == "lm_head" and row.role == "unread" for row in report.kept)


PARTS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
