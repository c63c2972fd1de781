"""Real architectures, tiny and random: one graph, experts included, at least 95 % of the linear bytes quantized, and as right as the same rounding in eager.

All run with the eager lowering here, some through Inductor on the CPU, all through Inductor where there is a GPU.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from rounding import RoundedInputs, with_rounded_weights
from tiny_models import TINY, few_layers, one_layer, tiny
from torch import nn

from qcompile.backend import CompiledGraph, backend, collecting
from qcompile.core.errors import QcompileWarning

RECIPES = ("W8A8", "W4A16")
SAMPLE = [
    ("llama", "W8A8"), ("llama", "W4A16"), ("mixtral", "W8A8"), ("mixtral", "W4A16"), ("gpt2", "W8A8"), ("bert", "W4A16"), ("opt", "W8A8"),
]  # fmt: skip
REQUIRED = {
    "llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "bloom", "mixtral", "qwen2_moe", "deepseek_v3", "mamba2", "bert", "roberta", "modernbert", "t5",
    "bart", "vit", "clip", "whisper",
}  # fmt: skip
FACTOR = 3.0
"""In bfloat16, where what is computed between linears is rounded in other places: activations are rounded beside the weights, with about the same number of bits, and their error may add up to twice that of the weights."""
TABLES = ("cls_token", "position_embeddings", "position_embedding", "class_embedding")
"""Parameters that are added to activations, outside any nn.Embedding."""
NUDGES = (2e-5, -2e-5, 5e-6, -5e-6, 1e-4, -1e-4)
"""In float32, parts of a step between codes by which sums in another order may move what is rounded; the first two are more than was seen, but for a few values in a million."""
ROUTED = 2.0
"""Times more, in bfloat16, where routers choose experts: a token between two of them may go to the other one, which no rounding error bounds."""


def test_the_list_is_whole():
    assert set(TINY) >= REQUIRED


@pytest.mark.parametrize("name", TINY)
def test_eager_lowering(name):
    """Every recipe from one capture: Dynamo takes most of the time. One layer where all are equal."""
    check(*tiny(name, **few_layers(name)), RECIPES, {"lower": "eager"})


@pytest.mark.parametrize(("name", "recipe"), SAMPLE)
def test_inductor(name, recipe):
    """One layer: Inductor compiles the second as it did the first."""
    check(*tiny(name, **one_layer(name)), [recipe], {})


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_every_form_of_experts(name):
    """transformers runs experts in a loop, as a product with a weight for each token, or grouped: all are quantized, with the numbers of the grouped ones."""
    outputs: dict[str, list[torch.Tensor]] = {recipe: [] for recipe in RECIPES}
    for form in ("grouped_mm", "batched_mm", "eager"):
        for recipe, found in outputs.items():
            torch._dynamo.reset()
            model, inputs = tiny(name, num_hidden_layers=1)
            model.set_experts_implementation(form)
            fast = torch.compile(model, backend="qcompile", options={"recipe": recipe, "lower": "eager"})
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", QcompileWarning)
                found.append(main_output(fast(**inputs)))
                calls: list = []
                with collecting(lambda graph, args, calls=calls: calls.append((graph, args))):
                    assert distance(main_output(fast(**inputs)), found[0]) < 1e-5
                quantized = {id(args[graph.sites[site].param.index]) for graph, args in calls for site in graph.kernels}
                stacks = [p for p in model.parameters() if p.dim() == 3]
                assert stacks and all(id(p) in quantized for p in stacks), form
    for found in outputs.values():
        assert all(distance(y, found[0]) < 1e-5 for y in found)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TINY)
def test_inductor_gpu(name, recipe):
    check(*on_gpu(name, torch.float32), [recipe], {})


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "qwen2_moe", "gpt_oss", "llama4", "deepseek_v3"])
def test_inductor_gpu_bf16(name, recipe):
    check(*on_gpu(name, torch.bfloat16), [recipe], {})


def on_gpu(name, dtype):
    model, inputs = tiny(name, dtype=dtype)
    return model.cuda(), {k: v.cuda() if torch.is_tensor(v) else v for k, v in inputs.items()}


def check(model, inputs, recipes, options):
    """One graph, and for each recipe the coverage, and what eager makes of the same weights and inputs of linears, rounded."""
    built, graphs, found = [], {}, {}

    def every(gm, example_inputs):
        built.append({recipe: backend(gm, example_inputs, options={"recipe": recipe, **options}) for recipe in recipes})
        return lambda *args: built[0][chosen](*args)

    fast = torch.compile(model, backend=every, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", QcompileWarning)
        truth = main_output(model(**inputs))
        for chosen in recipes:
            calls = []
            with collecting(lambda graph, args, calls=calls: calls.append((graph, args))):
                found[chosen] = main_output(fast(**inputs))
            assert len(built) == len(calls) == 1
            graphs[chosen] = calls[0]
        exact = copy.deepcopy(model.state_dict())
        for chosen in recipes:
            graph, args = graphs[chosen]
            model.load_state_dict(exact)
            assert coverage(model, graph, args) >= 0.95
            with_rounded_weights(model, graph, args)
            given, references = settled(model, graph, args, inputs) if truth.dtype == torch.float32 else (inputs, [])
            weights_alone = main_output(model(**given))
            model.load_state_dict(exact)
            y = found[chosen] if given is inputs else main_output(fast(**given))
            truth = main_output(model(**given))
            judge(graph, y, truth, references, distance(weights_alone, truth))


def settled(model, graph, args, inputs):
    """Inputs that leave no value between two codes of what is rounded, and what eager makes of them with the same rounding; where none of eight do, all that it may make of the first.

    Such a value goes to either code, whatever the order of sums that led to it, and what follows then differs by as much as rounding does.
    """

    def rounded(given, nudge):
        with RoundedInputs(graph, args, nudge) as mode:
            out = main_output(model(**given))
        assert mode.met == set(mode.schemes), "what eager multiplies by is what was quantized"
        return out

    for by in range(8):
        given = {name: other(v, by) if torch.is_tensor(v) and "mask" not in name else v for name, v in inputs.items()} if by else inputs
        y = rounded(given, 0.0)
        if all(distance(rounded(given, nudge), y) < 1e-4 for nudge in NUDGES[:2]):
            return given, [y]
    return inputs, [rounded(inputs, nudge) for nudge in (0.0, *NUDGES)]


def other(v, by):
    """Values of the same kind: floats in other places, other tokens between the first and the last that there are."""
    if v.dtype.is_floating_point:
        return torch.roll(v, by, -1)
    low, high = v.min(), v.max()
    return (v - low + by) % (high - low + 1) + low


def judge(graph, y, truth, references, cost):
    """``references``: what eager may make of the rounded model with rounded inputs of its linears; ``cost``: what rounding the weights costs."""
    assert y.shape == truth.shape and y.dtype == truth.dtype and torch.isfinite(y).all()
    assert cost > 0, "nothing was rounded"
    if truth.dtype == torch.float32:
        found = [distance(y, reference) for reference in references]
        assert min(found) < 1e-4 + 0.02 * cost, f"{found} from eager with the same rounding, while rounding the weights costs {cost:.3g}"
    else:
        factor = FACTOR * (ROUTED if any(s.role == "router" for s in graph.sites.values()) else 1)
        assert distance(y, truth) < factor * cost + 5e-2


def main_output(out):
    """The first tensor of a model's output: logits, or the last hidden state."""
    return next(v for v in (out.values() if hasattr(out, "values") else out) if torch.is_tensor(v))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def coverage(model, graph: CompiledGraph, args) -> float:
    """Quantized bytes over the bytes of all matrices of the model, whether the graph found them or not; tables, convolutions, heads, routers, and biases of experts are not counted."""
    apart = {id(args[s.param.index]) for s in graph.sites.values() if s.role in ("head", "router")}
    tables = (nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    apart |= {id(p) for m in model.modules() if isinstance(m, tables) for p in m.parameters(recurse=False)}
    counted = {id(p): p.nbytes for name, p in model.named_parameters() if p.dim() >= 2 and id(p) not in apart and not name.endswith((*TABLES, "_bias"))}
    quantized = {id(args[graph.sites[name].param.index]) for name in graph.kernels}
    return sum(size for p, size in counted.items() if p in quantized) / sum(counted.values())
