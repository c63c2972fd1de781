"""What cannot work is an error that names the thing; the model is unharmed, and works once the thing is mended."""

from __future__ import annotations

import warnings

import pytest
import torch
from small import W8, Net, Tied, close, graphs, rounded, said
from torch import nn

from qcompile.backend import backend
from qcompile.core.errors import WeightError
from qcompile.passes import PASSES, Pass
from qcompile.weights import TABLE


@pytest.fixture
def x():
    return torch.randn(5, 32)


def compiled(model, **options):
    return torch.compile(model, backend="qcompile", options=W8 | options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"release": True}, {"recipe": "NF4"}])
def test_weights_that_are_not_finite(value, options, x):
    model = Net()
    good = model.down.weight[3, 5].item()
    model.down.weight.data[3, 5] = value
    fast = compiled(model, **options)
    state = {k: v.clone() for k, v in model.state_dict().items()} if not options.get("release") else None
    for _ in range(2):
        with torch.no_grad(), pytest.raises(Exception, match=r"parameter down(\.weight)? of shape \(32, 48\) has 1 values that are NaN or infinite, the first at \(3, 5\)"):
            fast(x)
    with torch.no_grad():
        if state is not None:
            assert all(torch.equal(v, state[k]) or k == "down.weight" for k, v in model.state_dict().items())
            assert model(x).shape == (5, 32)
        model.load_state_dict({"down.weight": model.down.weight.detach().nan_to_num(good, good, good)}, strict=False)
        twin = Net()
        twin.load_state_dict(model.state_dict())
        assert close(fast(x), rounded(twin, "nf4.g64" if options.get("recipe") else "int8.row")(x), 2e-2 if state is None else 1e-5)


def test_a_weight_that_becomes_nan(x):
    """An update that is no good is refused; the next good one is taken."""
    model = Net()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        good = model.up.weight.clone()
        model.up.weight[0, 0] = float("nan")
        with pytest.raises(Exception, match=r"parameter up"):
            fast(x)
        model.up.weight.copy_(good)
        assert close(fast(x), rounded(model)(x))


def test_zero_and_constant_weights(x):
    model = Net()
    with torch.no_grad():
        model.up.weight.zero_()
        model.down.weight.fill_(0.5)
        for recipe in ("W8A16", "W4A16", "NF4", "FP4"):
            assert close(compiled(model, recipe=recipe)(x), model(x), 0.05)


def test_meta_parameters(x):
    with torch.device("meta"):
        model = Net()
    with torch.no_grad(), pytest.raises(Exception, match=r"meta"):
        compiled(model)(x)
    with torch.no_grad(), pytest.raises(Exception, match=r"parameter up(\.weight)? is on the meta device: load its values"):
        compiled(model)(x.to("meta"))
    model.to_empty(device="cpu")
    model.load_state_dict(Net().state_dict())
    with torch.no_grad():
        assert close(compiled(model)(x), rounded(model)(x))


def test_one_parameter_moved_to_another_device(x):
    """The call says whose it is; moved back it is right again, with its new values."""
    model = Net()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        kept = model.up.weight
        model.up.weight = nn.Parameter(kept.to("meta"))
        with pytest.raises(Exception, match=r"meta"):
            fast(x)
        model.up.weight = nn.Parameter(kept * 2)
        assert close(fast(x), rounded(model)(x))


def test_a_move_that_no_guard_sees(x):
    """Torch 2.11's guards do not see ``.data =`` on another device: the graph runs, and the weights say it. ``tests/gpu/test_weights.py`` moves one; here the graph thinks that it was compiled elsewhere."""
    model = Net()
    fast = compiled(model)
    with torch.no_grad(), graphs() as ran:
        fast(x)
        ((graph, _),) = ran
        there = dict(graph._devices)
        graph._devices = dict.fromkeys(there, torch.device("cuda:0"))
        model.up.weight.mul_(2)
        with pytest.raises(WeightError, match=r"up\.weight is on cpu, and this graph was compiled for cuda:0"):
            fast(x)
        graph._devices = there
        assert close(fast(x), rounded(model)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_is_cast_after_compiling(dtype, x):
    model = Net()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model.to(dtype)
        y, truth = fast(x.to(dtype)), rounded(model)(x.to(dtype))
        assert y.dtype == dtype and close(y, truth, 2e-2)
        model.float()
        assert close(fast(x), rounded(model)(x))


def test_a_cast_that_no_input_shows():
    """Ids stay integers when the model is cast."""
    model, ids = Tied(), torch.randint(64, (2, 5))
    fast = compiled(model)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            model.to(dtype)
            y, truth = fast(ids), rounded(model, keep=("head",))(ids)
            assert y.dtype == dtype and close(y, truth, 2e-2)


def test_wrong_shape(x):
    model = Net()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        with pytest.raises(Exception, match=r"shape|size|mat"):
            fast(torch.randn(5, 31))
        assert close(fast(x), rounded(model)(x))


@pytest.mark.parametrize("name", ["normalize", "find_sites", "match", "observe", "lower"])
def test_a_pass_that_fails(name, x, monkeypatch):
    def fail(gm, context):
        raise KeyError("oops")

    model = Net()
    fast = compiled(model)
    with monkeypatch.context() as patch:
        patch.setitem(PASSES, name, Pass(name, fail, PASSES[name].after))
        with torch.no_grad(), pytest.raises(Exception, match=rf"pass '{name}' failed after .*KeyError: 'oops'"):
            fast(x)
    with torch.no_grad():
        assert close(fast(x), rounded(model)(x))


def test_a_pass_that_breaks_the_graph(x, monkeypatch):
    def bad(gm, context):
        node = next(n for n in gm.graph.nodes if n.op == "call_function")
        node.args = (next(iter(reversed(gm.graph.nodes))).prev, *node.args[1:])
        return gm

    monkeypatch.setitem(PASSES, "match", Pass("match", bad, PASSES["match"].after))
    with torch.no_grad(), pytest.raises(Exception, match=r"pass 'match' failed"):
        compiled(Net())(x)


def test_static_recipe_on_an_empty_call(x):
    """No rows, no range: an error, and the next call calibrates."""
    model = Net()
    fast = torch.compile(model, backend="qcompile", dynamic=False, options={"recipe": "W8A8_STATIC", "lower": "eager"})
    with torch.no_grad():
        with pytest.raises(Exception, match=r"calibration data gave up no rows"):
            fast(x[:0])
        assert close(fast(x), model(x), 0.05) and fast(x[:0]).shape == (0, 32)


def test_static_recipe_on_nan(x):
    model = Net()
    fast = compiled(model, recipe="W8A8_STATIC")
    with torch.no_grad():
        with pytest.raises(Exception, match=r"160 values of the input of up are NaN or infinite in the calibration data"):
            fast(x / 0)
        assert not TABLE.record(model.up.weight).solutions
        assert close(fast(x), model(x), 0.05)


def test_hardware_that_is_not_there(x):
    """FP8 products on a CPU are emulated, which is said once; ``strict`` refuses."""
    model = Net()
    with said() as texts, graphs() as seen, torch.no_grad():
        for _ in range(2):
            assert close(compiled(model, recipe="FP8")(x), model(x), 0.1)
    assert len(texts) == 1 and "2 linears are emulated by dequantize + matmul" in texts[0] and "e4m3" in texts[0]
    assert texts[0].removeprefix("qcompile: ") in seen[0][0].notes
    with torch.no_grad(), pytest.raises(Exception, match=r"StrictError.*|2 linears are emulated"):
        compiled(model, recipe="FP8", strict=True)(x)
    with torch.no_grad():
        assert close(compiled(model, recipe="W8A8", strict=True)(x), model(x), 0.05)


def test_weights_that_are_integers():
    """What is quantized already is left alone."""

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-8, 8, (32, 32), dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.codes.to(x.dtype).t()

    model = Codes()
    x = torch.randn(3, 32)
    with graphs() as seen:
        assert close(compiled(model)(x), model(x))
    assert not seen[0][0].kernels


def test_called_by_hand(x):
    """The backend is a function of a graph module and inputs."""
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    out = backend(gm, [x], options={"lower": "eager"})(x)
    assert torch.equal(out, x.relu())


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool])
@pytest.mark.parametrize("recipe", ["W8A8", "W8A16"])
def test_integer_inputs(recipe, dtype):
    """Eager refuses them; Dynamo's fake values do not. The same compiled model takes floats afterwards."""
    model, x = Net(), torch.ones(3, 32, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = compiled(model, recipe=recipe)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            model(x)
        with pytest.raises(Exception, match=f"linear up has a weight of torch.float32 and an input of {dtype}.*convert the input"):
            fast(x)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert close(fast(x.float()), rounded(model)(x.float()), 2e-2 if recipe == "W8A8" else 1e-5)


@pytest.mark.parametrize(("recipe", "shows"), [("W8A8", True), ("FP8", True), ("W8A16", True), ("W8A8_STATIC", False)])
def test_activations_that_are_not_finite(recipe: str, shows: bool) -> None:
    """They spoil their own rows and no others; integer codes of a static range cannot hold them."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32).eval()
    fast = torch.compile(model, backend="qcompile", options={"recipe": recipe})
    x = torch.randn(4, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # W8A8_STATIC says that it calibrates
        before = fast(x)
        x[0, 3], x[1, 5] = float("nan"), float("inf")
        y = fast(x)
    assert y[:2].isfinite().all(1).tolist() == [not shows] * 2
    torch.testing.assert_close(y[2:], before[2:])
