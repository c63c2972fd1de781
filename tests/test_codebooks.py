"""Weights with values of their own, end to end: the step in a recipe, one graph for tensors with different values, live weights, files, and what the report says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import Net, close, graphs, rounded
from tiny_models import tiny

import qcompile
from qcompile.core.scheme import Scheme
from qcompile.kernels import OPS, stream
from qcompile.kernels.op import Case
from qcompile.options import Options

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 32)
LUT = {"weight": "lut4.g16", "recipe": "W4A16"}


def fast(model, lower="eager", **options):
    return torch.compile(model, backend="qcompile", options={"lower": lower, **LUT, **options})


@pytest.mark.parametrize("weight", ["lut4.row", "lut4.g16/int8.row", "lut3.g16.min"])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_without_data(lower, weight):
    """Every weight counts alike. Four bits are decoded by the C++ kernel, three by the traced reference."""
    model = Net()
    with torch.no_grad():
        f = fast(model, lower, weight=weight)
        assert close(f(X), rounded(model, weight)(X), 1e-5)
        assert close(f(X[:3]), rounded(model, weight)(X[:3]), 1e-5)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_one_graph_for_two_models(lower):
    a, b = Net(), Net()
    with torch.no_grad(), graphs() as seen:
        for model in (a, b):
            model.up.weight.pow_(3)
            assert close(fast(model, lower)(X), rounded(model, LUT["weight"])(X), 1e-5)
            f = fast(model, lower)
            model.down.weight.copy_(torch.randn(32, 48).sign())
            assert close(f(X), rounded(model, LUT["weight"])(X), 1e-5), "other values, read by the same graph"
    assert len({id(graph) for graph, _ in seen}) == 1


def test_the_step_in_a_recipe():
    model = Net()
    with torch.no_grad():
        truth = model(X)
        f = torch.compile(model, backend="qcompile", options={"recipe": "W4A16_LUT", "weight": "lut3.row", "passes": ["lloyd_max", "bias"], "lower": "eager"})
        with qcompile.calibrate(f) as sitting:
            f(X)
        y, plain = f(X), rounded(model, "lut3.row")(X)
        assert float((y - truth).norm()) < float((plain - truth).norm())
        report = qcompile.explain(f, X)
        row = next(s for s in report.to_dict()["sites"] if s["name"] == "up")
        assert row["weight"] == "lut3.row" and row["weight_db"] > 10
        assert qcompile.release_weights(model) > 0 and torch.equal(f(X), y)
    assert sitting.outcome.tokens == 64


def test_in_files(tmp_path):
    model, path = Net(), str(tmp_path / "seen.safetensors")
    with torch.no_grad():
        f = fast(model, passes=["lloyd_max"])
        with qcompile.calibrate(f) as sitting:
            f(X)
        sitting.calibration.save(path)
        y = f(X)
        torch._dynamo.reset()
        assert close(fast(model, passes=["lloyd_max"], calibration=path)(X), y, 1e-2)


def test_stored_in_a_module(tmp_path):
    """``quantize``: codebooks are parameters of the module, and follow ``load_state_dict``, ``resume`` and casts."""
    a, b = Net(), Net()
    for model in (a, b):
        qcompile.quantize(model, "W4A16", [X], weight="lut4.g16", passes=["lloyd_max"], progress=False, resume=str(tmp_path / "kept"))
    assert [tuple(p.shape) for p in a.up.parametrizations.weight.parameters()][-2] == (16,)
    with torch.no_grad():
        f = fast(b)
        assert close(f(X), b(X)) and not close(a(X), b(X), 0.1)
        b.load_state_dict(a.state_dict())
        assert torch.equal(a(X), b(X)) and close(f(X), a(X))
        torch._dynamo.reset()
        half = b.to(torch.bfloat16)
        assert close(torch.compile(half, backend="qcompile", options={"lower": "inductor"})(X.bfloat16()).float(), a(X), 0.03)


def test_experts_have_one_each():
    model, inputs = tiny("mixtral", num_hidden_layers=1)
    with torch.no_grad():
        y = fast(model, weight="lut4.g32")(**inputs).logits
        torch._dynamo.reset()
        report = qcompile.explain(fast(model, "inductor", weight="lut4.g32"), **inputs)
        assert close(torch.compile(model, backend="qcompile", options={**LUT, "weight": "lut4.g32"})(**inputs).logits, y, 1e-4)
    rows = {row["name"]: row for row in report.to_dict()["sites"]}
    assert any("experts" in name for name in rows) and all(row["weight"] == "lut4.g32" for row in rows.values())


def test_beside_fixed_values():
    model, rule = Net(), qcompile.Rule("down", "int8.row")
    with torch.no_grad():
        f = torch.compile(model, backend="qcompile", options={"recipe": qcompile.Recipe("two", "lut4.row", rules=(rule,), passes=("lloyd_max",)), "lower": "eager"})
        qcompile.calibrate(f, [X])
        rows = {row["name"]: row for row in qcompile.explain(f, X).to_dict()["sites"]}
    assert (rows["up"]["weight"], rows["down"]["weight"]) == ("lut4.row", "int8.row")
    assert close(torch.tensor(rows["down"]["weight_db"]), torch.tensor(44.0), 0.1)


def test_kernels_of_a_gpu():
    """None decodes values that are an input: linears are dequantized for the library, all else runs by its reference, and why is said."""
    w, x = Scheme.parse("lut4.g64"), Scheme.parse("int8.row")
    case = Case(torch.device("cuda"), torch.bfloat16, w, None, 4096, 4096, 64, capability=(9, 0))
    for m in (1, 64, 4096, None):
        kernel, refused = OPS["linear"].choose(replace(case, m=m))
        assert refused is None and kernel.name == "dequantize + cuBLAS"
    assert not stream.takes_scales(replace(case, weight=Scheme.parse("lut4.g64/int8.row"))) and "are an input" in str(stream.supports(case))
    for op, asked in (("linear", replace(case, dtype=torch.float32)), ("scaled_linear", replace(case, dtype=torch.int8, input=x)), ("grouped_linear", replace(case, experts=4))):
        kernel, refused = OPS[op].choose(asked)
        assert kernel is None and "lut4" in str(refused), op


def test_what_has_no_codebook():
    for weight, step, why in (("int4.g16", "lloyd_max", r"those of int4\.g16 are fixed"), ("lut4.row", "gptq(clip=True)", "searches scales"), ("lut4.row", "sequential_mse", "searches scales")):
        with pytest.raises(qcompile.OptionError, match=why):
            Options.parse({"weight": weight, "passes": [step]})
    with pytest.raises(qcompile.OptionError, match="activations take a format of fixed values"):
        Options.parse({**LUT, "input": "lut4.row"})
