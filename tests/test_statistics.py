"""A calibration as a file: statistics of the unquantized model by linear, and solutions made from them."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from calibrated import GPTQ, Mlp, codes, compiled, rows, same_codes, solutions
from safetensors import safe_open
from safetensors.torch import save_file
from small import Stack, close, said
from tiny_models import tiny

from qcompile.calibrate import KEPT, calibrate
from qcompile.core.errors import CalibrationError, WeightError
from qcompile.statistics import ALWAYS, Calibration, collect

XS = [rows(40, 32, seed=i) for i in range(3)]
EAGER = {"lower": "eager"}


def copied(model, strict=True):
    twin = Mlp()
    twin.load_state_dict(model.state_dict(), strict)
    return twin


@pytest.fixture
def taken():
    """(model, its calibration under gptq)."""
    model = Mlp()
    with said():
        return model, calibrate(compiled(model), XS, progress=False)


def through(model, given, **options):
    """The model solved from statistics, and its outputs."""
    torch._dynamo.reset()
    fast = compiled(model, calibration=given, **options)
    with torch.no_grad(), said() as texts:
        return fast(XS[0]), texts


def test_statistics_are_those_of_the_unquantized_model(taken):
    model, found = taken
    seen = found.statistics()
    assert list(seen) == ["a", "b", "c"] and all(s.tokens == 120 for s in seen.values())
    with torch.no_grad():
        x = torch.cat(XS)
        inputs = {"a": x, "b": torch.relu(model.a(x)), "c": torch.tanh(model.b(torch.relu(model.a(x))))}
    for name, x in inputs.items():
        stats = seen[name].stats
        assert set(stats) == {*ALWAYS, "hessian"}
        assert torch.equal(stats["absmax"]["absmax"], x.abs().amax(0)) and torch.equal(stats["minmax"]["lo"], x.amin(0))
        assert close(stats["hessian"]["sum"], x.T @ x, 1e-5) and float(stats["moments"]["count"]) == 120
        assert float(stats["histogram"]["counts"].sum()) == x.numel()


@pytest.mark.parametrize("budget", [1, 6000, 1 << 30])
def test_collected_in_as_many_passes_as_memory_asks_for(taken, budget):
    _, found = taken
    want = found.statistics()
    got = collect(found._units, (*ALWAYS, "hessian"), budget)
    for name in want:
        for row, state in want[name].stats.items():
            assert all(torch.equal(got[name].stats[row][key], t) for key, t in state.items())


def test_more_statistics_on_demand(taken):
    _, found = taken
    assert "samples" not in found.statistics()["a"].stats
    assert found.statistics("samples")["b"].stats["samples"]["rows"].shape == (120, 48)


def test_saved_and_loaded(taken, tmp_path):
    _, found = taken
    found.save(tmp_path / "c.safetensors", "samples")
    back = Calibration.load(tmp_path / "c.safetensors")
    assert list(back.statistics()) == ["a", "b", "c"]
    for name, one in found.statistics("samples").items():
        other = back.statistics()[name]
        assert one.tokens == other.tokens and set(one.stats) == set(other.stats)
        for row, state in one.stats.items():
            assert all(torch.equal(other.stats[row][key], t) for key, t in state.items())


def test_the_same_from_file_and_object(taken, tmp_path):
    model, found = taken
    found.save(tmp_path / "c.safetensors")
    one, two = copied(model), copied(model)
    y, texts = through(one, found)
    z, more = through(two, str(tmp_path / "c.safetensors"))
    assert same_codes(one, two) and torch.equal(y, z) and not texts and not more
    assert torch.equal(codes(one)["a"], codes(model)["a"])  # the first site sees what it sees in sequential order
    assert not torch.equal(codes(one)["c"], codes(model)["c"])  # later ones do not: this is the unquantized model's data


def test_as_an_option_of_path_type(taken, tmp_path):
    model, found = taken
    found.save(tmp_path / "c.safetensors")
    one = copied(model)
    through(one, tmp_path / "c.safetensors")
    assert len(solutions(one)) == 3


@pytest.mark.parametrize("passes", [["smooth"], ["awq", "gptq"], ["outliers(columns=3)", "gptq", "bias"], ["smooth(alpha='auto')", "bias"]])
def test_other_methods_from_a_file(taken, tmp_path, passes):
    model, found = taken
    found.save(tmp_path / "c.safetensors", "hessian", "samples")
    one = copied(model)
    y, _ = through(one, str(tmp_path / "c.safetensors"), weight="int8.row", input="int8.row", passes=passes)
    with torch.no_grad():
        assert close(y, model(XS[0]), 0.05)
    assert all((s.smooth is not None) == (passes[0] in ("awq", "smooth", "smooth(alpha='auto')")) for s in solutions(one).values())
    assert all((s.outliers is not None) == passes[0].startswith("outliers") and (s.bias is not None) == ("bias" in passes) for s in solutions(one).values())


def test_kin_and_ranges_from_a_file(tmp_path):
    model, inputs = tiny("llama")
    with said():
        fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager"})
        calibrate(fast, [inputs], progress=False).save(tmp_path / "c.safetensors")
    twin, _ = tiny("llama")
    torch._dynamo.reset()
    with torch.no_grad(), said() as texts:
        y = torch.compile(twin, backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager", "calibration": str(tmp_path / "c.safetensors")})(**inputs).logits
        assert close(y, fast(**inputs).logits, 0.05) and not texts
    assert torch.equal(solutions(twin)["model.layers.0.self_attn.q_proj"].range[0], solutions(twin)["model.layers.0.self_attn.k_proj"].range[0])


def test_merged():
    """Two calibrations together are one that saw all."""
    model = Mlp()
    parts = []
    with said():
        for xs in (XS, XS[:1], XS[1:]):
            twin = copied(model)
            parts.append((twin, calibrate(compiled(twin), xs, progress=False)))
    whole, merged = parts[0][1].statistics(), parts[1][1].merge(parts[2][1]).statistics()
    for name, one in whole.items():
        assert one.tokens == merged[name].tokens
        for row, state in one.stats.items():
            for key, t in state.items():
                torch.testing.assert_close(merged[name].stats[row][key], t, rtol=1e-5, atol=1e-4)


def test_one_weight_in_two_places_has_two_statistics():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    model = Twice()
    with said():
        seen = calibrate(compiled(model), XS, progress=False).statistics()
    assert list(seen) == ["a", "a@2"]
    assert torch.equal(seen["a"].stats["absmax"]["absmax"], torch.cat(XS).abs().amax(0)) and not torch.equal(seen["a@2"].stats["absmax"]["absmax"], seen["a"].stats["absmax"]["absmax"])


# --- files that do not fit ---------------------------------------------------------------------------------------------------


class Other(torch.nn.Module):
    """Other names."""

    def __init__(self, width=32):
        super().__init__()
        self.a, self.q = torch.nn.Linear(width, 48), torch.nn.Linear(48, 32)

    def forward(self, x):
        return self.q(torch.relu(self.a(x)))


def raises(match):
    return pytest.raises(Exception, match=match)


def test_a_file_of_another_model(taken, tmp_path):
    _, found = taken
    found.save(tmp_path / "c.safetensors")
    with raises(r"knows nothing of q; it is of another model, whose linears begin with a, b, c"):
        through(Other(), str(tmp_path / "c.safetensors"))


def test_a_file_of_a_model_of_other_widths(taken, tmp_path):
    _, found = taken
    found.save(tmp_path / "c.safetensors")
    torch._dynamo.reset()
    with raises(r"of another model: a is 48x64, there it is 48x32"), torch.no_grad():
        compiled(Other(64), calibration=str(tmp_path / "c.safetensors"))(rows(4, 64))


def test_a_file_of_a_model_of_other_heights(taken, tmp_path):
    """The statistics would fit: they are of inputs."""
    model = copied(taken[0])
    model.b, model.c = torch.nn.Linear(48, 24, bias=False), torch.nn.Linear(24, 16)
    taken[1].save(tmp_path / "c.safetensors")
    with raises(r"of another model: b is 24x48, there it is 32x48"):
        through(model, str(tmp_path / "c.safetensors"))


def test_a_file_of_other_weights(taken, tmp_path):
    _, found = taken
    found.save(tmp_path / "c.safetensors")
    _, texts = through(Mlp(), str(tmp_path / "c.safetensors"))
    assert any("was taken with other weights of a, b, c: calibrate this model again" in t for t in texts)
    calibration = Calibration.load(tmp_path / "c.safetensors")
    assert calibration._weights == found._weights and calibration.merge(calibration)._weights == found._weights
    sites, cast = found._units[0].sites.values(), Mlp().double()
    with said() as texts:  # cast weights cannot be compared
        calibration.check(list(sites), {s.param.index: cast.get_parameter(s.param.path) for s in sites})
    assert not texts


class Larger(Mlp):
    def __init__(self):
        super().__init__()
        self.more = torch.nn.Linear(16, 16)

    def forward(self, x):
        return self.more(super().forward(x))


def test_a_file_of_more_linears(tmp_path):
    large = Larger()
    with said():
        calibrate(compiled(large), XS, progress=False).save(tmp_path / "c.safetensors")
    model = copied(large, strict=False)
    KEPT.clear()
    del large
    torch._dynamo.reset()
    gc.collect()
    _, texts = through(model, str(tmp_path / "c.safetensors"))
    assert any("has statistics of linears that no live model has: more" in t for t in texts)


@pytest.mark.parametrize("gone", ["all", "one"])
def test_a_model_that_is_gone(gone):
    """Not statistics of no rows: a model is gone when one of its parameters is."""
    model = Mlp()
    with said():
        found = calibrate(compiled(model), XS, progress=False)
    KEPT.clear()
    torch._dynamo.reset()
    if gone == "one":
        model.b = torch.nn.Linear(1, 1)
    else:
        del model
    gc.collect()
    with pytest.raises(WeightError, match="that was calibrated no longer exists"):
        found.statistics()


def experts_of(path, inputs, **options):
    """The codes of the first layer's first stack, solved from a file, and what was said; everything before them keeps 16 bits, so that they see what they saw in the calibration."""
    twin, _ = tiny("mixtral", experts_implementation="grouped_mm")
    KEPT.clear()
    torch._dynamo.reset()
    with torch.no_grad(), said() as texts:
        compiled(twin, calibration=str(path), ignore=["re:.*self_attn.*"], **options)(**inputs)
    return solutions(twin)["model.layers.0.mlp.experts.gate_up_proj"].q.codes, texts


def test_experts_from_a_file_have_statistics_of_their_own(tmp_path):
    """Bit by bit what a calibration solves; two files merged have the rows of both; a file without them says that all share those of all."""
    model, inputs = tiny("mixtral", experts_implementation="grouped_mm")
    other = {key: value.flip(0) if torch.is_tensor(value) else value for key, value in inputs.items()}
    with said():
        both = calibrate(compiled(model, ignore=["re:.*self_attn.*"]), [inputs, other], progress=False)
    wanted = solutions(model)["model.layers.0.mlp.experts.gate_up_proj"].q.codes.clone()
    both.save(tmp_path / "both.safetensors")
    codes, texts = experts_of(tmp_path / "both.safetensors", inputs)
    assert torch.equal(codes, wanted) and not [t for t in texts if "together" in t]
    halves, twins = [], []
    for batch in (inputs, other):
        twin, _ = tiny("mixtral", experts_implementation="grouped_mm")
        KEPT.clear()
        torch._dynamo.reset()
        with said():
            halves.append(calibrate(compiled(twin, ignore=["re:.*self_attn.*"]), [batch], progress=False))
        twins.append(twin)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole, joined = both.statistics()[name], halves[0].merge(halves[1]).statistics()[name]
    assert len(whole.experts) == len(joined.experts) == 4 and sum(e.tokens for e in whole.experts) == whole.tokens
    for mine, theirs in zip(whole.experts, joined.experts):
        assert mine.tokens == theirs.tokens and torch.allclose(mine.stats["hessian"]["sum"], theirs.stats["hessian"]["sum"], rtol=1e-5)
    halves[0].save(tmp_path / "half.safetensors")
    assert not torch.equal(experts_of(tmp_path / "half.safetensors", inputs)[0], wanted)


def test_experts_from_a_file_of_before_share_statistics(tmp_path):
    """Of a version that kept none of each: said, by name."""
    model, inputs = tiny("mixtral", experts_implementation="grouped_mm")
    with said():
        calibrate(compiled(model), [inputs], progress=False).save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        about = json.loads(file.metadata()["qcompile"])
        tensors = {key: file.get_tensor(key) for key in file.keys() if "/expert." not in key}  # noqa: SIM118
    assert about.pop("experts")
    save_file(tensors, tmp_path / "c.safetensors", metadata={"qcompile": json.dumps(about)})
    twin, _ = tiny("mixtral", experts_implementation="grouped_mm")
    torch._dynamo.reset()
    with torch.no_grad(), said() as texts:
        compiled(twin, calibration=str(tmp_path / "c.safetensors"))(**inputs)
    (text,) = [t for t in texts if "solved on the rows of all experts together" in t]
    assert "model.layers.1.mlp.experts.down_proj" in text and "q_proj" not in text


def test_a_statistic_that_is_not_there(tmp_path):
    model = Mlp()
    with said():
        fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager"})
        calibrate(fast, XS, progress=False).save(tmp_path / "c.safetensors")
    with raises(r"holds no hessian of a, which int4.g16 via gptq needs; it holds absmax"):
        through(copied(model), str(tmp_path / "c.safetensors"))


def test_what_cannot_be_known_after_smoothing(taken, tmp_path):
    model, found = taken
    found.save(tmp_path / "c.safetensors", "samples")
    with raises(r"histogram of a is not known once its input is smoothed or split"):
        through(copied(model), str(tmp_path / "c.safetensors"), weight="int8.row", input="int8.tensor.static", passes=["smooth", "range(rule='kl')"])


def test_files_that_are_none(tmp_path):
    (tmp_path / "text").write_text("no such thing")
    save_file({"x": torch.ones(1)}, tmp_path / "plain")
    (tmp_path / "short").write_bytes((tmp_path / "plain").read_bytes()[:20])
    for name, text in (("absent", "there is no calibration file"), ("text", "is no safetensors file"), ("plain", "holds no calibration of this version"), ("short", "is no safetensors file")):
        with pytest.raises(CalibrationError, match=text):
            Calibration.load(tmp_path / name)
        with raises(text):
            through(Mlp(), str(tmp_path / name))


def test_a_sitting_is_better_than_a_file(taken):
    """What was solved in a sitting is not solved again from a file."""
    model, found = taken
    before = codes(model)
    y, _ = through(model, found)
    assert all(torch.equal(before[n], c) for n, c in codes(model).items()) and torch.isfinite(y).all()


def test_options_reach_gptq():
    assert GPTQ["passes"] == ["gptq"]
    one, two = Mlp(), Mlp()
    two.load_state_dict(one.state_dict())
    with said():
        calibrate(compiled(one), XS, progress=False)
        calibrate(compiled(two, passes=["gptq(act_order=False)"]), XS, progress=False)
    assert not same_codes(one, two)


@pytest.mark.parametrize("options", [{"recipe": "W8A8_STATIC"}, {"recipe": "W8A8", "passes": ["smooth"]}, {"weight": "int4.g16", "passes": ["gptq"]}], ids=["static", "smooth", "gptq"])
def test_layers_that_share_a_graph_take_statistics_of_their_own(tmp_path, options):
    """Compiled layer by layer from a file, as compiled whole: the first layer's names are not those of the others."""
    x = torch.randn(64, 32)
    model = Stack(3)
    for i, layer in enumerate(model.layers):
        layer.down.weight.data.mul_(10.0**i)
    whole, twin = copy.deepcopy(model), copy.deepcopy(model)
    with said() as texts, torch.no_grad():
        calibrate(torch.compile(model, backend="qcompile", options=options | EAGER), [x], progress=False).save(tmp_path / "c.safetensors")
        given = options | EAGER | {"calibration": str(tmp_path / "c.safetensors")}
        torch._dynamo.reset()
        truth = torch.compile(whole, backend="qcompile", options=given)(x)
        for layer in twin.layers:
            layer.compile(backend="qcompile", options=given)
        assert close(twin(x), truth, 1e-5)
    assert not [text for text in texts if "other weights" in text]
