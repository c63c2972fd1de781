"""Whatever shape, dtype, grad mode or graph comes, the result is that of eager with rounded weights, and has eager's dtype."""

from __future__ import annotations

import pytest
import torch
from small import W8, Net, Stack, Tied, close, graphs, rounded
from tiny_models import tiny
from torch import nn

INDUCTOR = {"recipe": "W8A16"}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def compiled(model, dynamic=None, fullgraph=False, **options):
    return torch.compile(model, backend="qcompile", dynamic=dynamic, fullgraph=fullgraph, options=(W8 if "lower" not in options else {}) | options)


def right(fast, model, x, scheme="int8.row", keep=()):
    with torch.no_grad():
        y, truth = fast(x), rounded(model, scheme, keep)(x)
    return close(y, truth, TOLERANCE[truth.dtype])


@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (2, 3, 32), (1, 1, 32), (2, 1, 3, 32), (0, 32), (2, 0, 32)])
@pytest.mark.parametrize("recipe", ["W8A16", "W4A16"])
def test_static(shape, recipe):
    model = Net()
    assert right(compiled(model, dynamic=False, recipe=recipe), model, torch.randn(shape), {"W8A16": "int8.row", "W4A16": "int4.g128"}[recipe])


@pytest.mark.parametrize("shape", [(32,), (2, 3, 32), (0, 32)])
def test_static_through_inductor(shape):
    model = Net()
    assert right(compiled(model, **INDUCTOR, lower="inductor"), model, torch.randn(shape))


@pytest.mark.parametrize("recipe", ["W8A8", "W4A8", "FP8", "FP8_TENSOR"])
@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 32), (2, 0, 32)])
def test_quantized_inputs(recipe, shape):
    model = Net()
    x = torch.randn(shape)
    with torch.no_grad():
        y = compiled(model, recipe=recipe)(x)
        truth = model(x)
    assert y.shape == truth.shape and y.dtype == truth.dtype and close(y, truth, 0.3 if recipe == "W4A8" else 0.1)


def test_quantized_inputs_of_no_rows_through_inductor():
    model = Net()
    with torch.no_grad():
        fast = compiled(model, recipe="W8A8", lower="inductor", dynamic=False)
        assert fast(torch.randn(0, 32)).shape == (0, 32)
        x = torch.randn(3, 32)
        assert close(fast(x), model(x), 0.1)


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_stacked_experts_of_no_rows(form):
    """Mixtral's block alone: its attention refuses an empty batch in eager."""
    block = tiny("mixtral", num_hidden_layers=1, experts_implementation=form)[0].model.layers[0].mlp
    fast = compiled(block, recipe="W8A8")
    with torch.no_grad(), graphs() as seen:
        for x in (torch.randn(1, 0, 64), torch.randn(1, 5, 64)):
            assert close(fast(x), block(x), 0.05)
    assert len(seen) == 2 and all({name.rpartition(".")[2] for name in graph.kernels} == {"gate_up_proj", "down_proj"} for graph, _ in seen)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic(dynamic, lower):
    model = Net()
    fast = compiled(model, dynamic, recipe="W8A16", lower=lower)
    with graphs() as seen:
        for shape in ((2, 5, 32), (3, 7, 32), (4, 9, 32), (6, 5, 32)):
            assert right(fast, model, torch.randn(shape))
    assert len({id(g) for g, _ in seen}) == (1 if dynamic else 2)


def test_marked_dynamic():
    model = Net()
    fast = compiled(model)
    with graphs() as seen:
        for batch, length in ((2, 5), (3, 8), (7, 2)):
            x = torch.randn(batch, length, 32)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            assert right(fast, model, x)
    assert len({id(g) for g, _ in seen}) == 1


def test_one_row_after_many():
    model = Net()
    fast = compiled(model)
    for rows in (8, 1, 0, 5, 1):
        assert right(fast, model, torch.randn(rows, 32))


@pytest.mark.parametrize("recipe", ["W8A16", "W8A8"])
@pytest.mark.parametrize("how", ["transposed", "strided", "expanded", "offset"])
def test_not_contiguous(how, recipe):
    model = Net()
    x = {
        "transposed": lambda: torch.randn(32, 6).t(),
        "strided": lambda: torch.randn(6, 64)[:, ::2],
        "expanded": lambda: torch.randn(1, 32).expand(6, 32),
        "offset": lambda: torch.randn(6, 40)[:, 3:35],
    }[how]()
    fast = compiled(model, recipe=recipe)
    with torch.no_grad():
        assert close(fast(x), fast(x.contiguous()))
    with torch.no_grad():
        assert close(fast(x), model(x), 0.05)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_dtypes(dtype, lower):
    model = Net().to(dtype)
    assert right(compiled(model, recipe="W8A16", lower=lower), model, torch.randn(5, 32, dtype=dtype))


@pytest.mark.parametrize("recipe", ["W8A16", "W8A8"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_autocast(where, recipe, lower):
    class Cast(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = super().forward(x)
            return y, x + 1

    model = Net() if where == "outside" else Cast()
    fast = compiled(model, recipe=recipe, lower=lower)
    x = torch.randn(5, 32)
    with torch.no_grad():
        if where == "outside":
            with torch.autocast("cpu", torch.bfloat16):
                y, truth = fast(x), model(x)
            assert fast(x).dtype == torch.float32  # and without it, again
        else:
            (y, z), (truth, other) = fast(x), model(x)
            assert torch.equal(z, other)
    assert y.dtype == truth.dtype == torch.bfloat16 and close(y, truth, 5e-2)


def test_float_residual_under_autocast():
    """What eager computes in float32 stays float32."""

    class Residual(Net):
        def forward(self, x):
            return x + super().forward(x)

    model, x = Residual(), torch.randn(5, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, truth = compiled(model)(x), model(x)
    assert y.dtype == truth.dtype == torch.float32 and close(y, truth, 3e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes(mode):
    model, x = Net(), torch.randn(5, 32)
    fast = compiled(model)
    with mode():
        assert close(fast(x), rounded(model)(x))
    other = torch.inference_mode if mode is torch.no_grad else torch.no_grad
    with other():
        assert close(fast(x), rounded(model)(x))
    model.requires_grad_(False)
    assert close(fast(x), rounded(model)(x))  # grad mode on, nothing requires grad


def test_graph_breaks():
    class Broken(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
                torch._dynamo.graph_break()
            return x

    model, x = Broken(3), torch.randn(5, 32)
    with graphs() as seen:
        fast = compiled(model, ignore=["layers.1.up"])
        for _ in range(2):
            assert right(fast, model, x, keep=("layers.1.up",))
    assert len({id(g) for g, _ in seen}) >= 2  # layers that agree share one
    names = {name for g, _ in seen for name in g.kernels}
    assert {"layers.0.down", "layers.0.up", "layers.1.down"} <= names and "layers.1.up" not in names


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_a_graph_without_inputs(lower):
    """Between two breaks, a graph that makes a table out of nothing."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            torch._dynamo.graph_break()
            steps = torch.arange(32.0).cos()
            torch._dynamo.graph_break()
            return self.fc(x) + steps

    model = Broken()
    with graphs() as seen:
        assert right(compiled(model, recipe="W8A16", lower=lower), model, torch.randn(3, 32))
    assert [len(args) for _, args in seen] == [0, 4]


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_a_weight_as_the_first_factor(lower):
    """Time steps of state-space models: each column of the other factor is a token, and what follows sees the product as eager lays it out."""

    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 48, bias=False)

        def forward(self, x):
            return (self.fc.weight @ x.transpose(1, 2)).view(-1, 16, 3 * x.shape[1])

    model = Columns()
    with graphs() as seen:
        assert right(compiled(model, recipe="W8A16", lower=lower), model, torch.randn(2, 5, 32))
    (site,) = seen[0][0].sites.values()
    assert (site.path, site.shape, site.m) == ("fc", (48, 32), 10) and site.name in seen[0][0].kernels


def test_fullgraph():
    model, x = Net(), torch.randn(5, 32)
    assert right(compiled(model, fullgraph=True), model, x)


def test_integers_in():
    model, ids = Tied(tied=False), torch.randint(64, (2, 5))
    with graphs() as seen:
        assert right(compiled(model), model, ids, keep=("head",))
    assert list(seen[0][0].kernels) == ["body.up", "body.down"]
    for dtype in (torch.int32, torch.int64):
        assert right(compiled(model), model, torch.randint(64, (0,), dtype=dtype), keep=("head",))


def test_several_inputs_and_outputs():
    class Many(Net):
        def forward(self, x, scale, flag=None, *, rest):
            y = super().forward(x) * scale
            return {"y": y, "none": None, "rest": [r + 1 for r in rest], "flag": flag}

    model, x = Many(), torch.randn(5, 32)
    fast = compiled(model)
    with torch.no_grad():
        a = fast(x, 2.0, flag=True, rest=[x, x + 1])
        b = rounded(model)(x, 2.0, flag=True, rest=[x, x + 1])
    assert close(a["y"], b["y"]) and a["none"] is None and a["flag"] is True and all(map(torch.equal, a["rest"], b["rest"]))


def test_a_function_that_closes_over_a_model():
    model, x = Net(), torch.randn(5, 32)
    fast = torch.compile(lambda v: model(v) * 2, backend="qcompile", options=W8)
    with torch.no_grad():
        assert close(fast(x), rounded(model)(x) * 2)


def test_in_place_on_input_and_buffer():
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(32))

        def forward(self, x):
            x.mul_(2)
            y = super().forward(x)
            self.total += y.sum(0)
            return y

    model, x = Counts(), torch.randn(5, 32)
    twin = rounded(model)
    for recipe in ("W8A16", "W8A8_STATIC"):
        model.total.zero_()
        twin.total.zero_()
        fast = compiled(model, recipe=recipe)
        with torch.no_grad():
            for _ in range(2):
                a, b = x.clone(), x.clone()
                y, truth = fast(a), twin(b)
                assert torch.equal(a, b) and close(y, truth, 0.05)
        assert close(model.total, twin.total, 0.05)


@pytest.mark.parametrize(
    ("k", "scheme"), [(100, "int4.g128"), (129, "int4.g64"), (48, "int4.g32"), (33, "nf4.g64"), (17, "uint4.g16.point"), (40, "int8.g16"), (50, "e4m3.b32x32")]
)
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_ragged_groups(k, scheme, lower):
    model = nn.Sequential(nn.Linear(k, 24))
    with graphs() as seen:
        assert right(compiled(model, weight=scheme, lower=lower), model, torch.randn(5, k), scheme)
    assert len(seen[0][0].kernels) == 1


@pytest.mark.parametrize(("n", "k"), [(8, 32), (32, 8), (1, 64), (15, 15)])
def test_small_ones_are_skipped_with_a_reason(n, k):
    model = nn.Sequential(nn.Linear(k, n))
    with graphs() as seen:
        assert right(compiled(model), model, torch.randn(5, k), keep=("0",))
    (choice,) = seen[0][0].plan.values()
    assert f"{n} x {k} is smaller than 16" in str(choice) and not seen[0][0].kernels


def test_no_linear():
    class Plain(nn.Module):
        def forward(self, x):
            return torch.relu(x) + 1

    x = torch.randn(5, 32)
    for lower in ("eager", "inductor"):
        assert torch.equal(compiled(Plain(), lower=lower)(x), torch.relu(x) + 1)


class Pointwise(nn.Module):
    """A convolution with a kernel of one, and a view that only its own memory format allows."""

    def __init__(self, axes: int, last: bool) -> None:
        super().__init__()
        self.last, self.conv = last, {1: nn.Conv1d, 2: nn.Conv2d}[axes](32, 48, 1, padding="same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return (y.permute(0, 2, 3, 1) if self.last else y).view(y.shape[0], -1)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize(("shape", "last"), [((2, 32, 5), False), ((2, 32, 3, 5), False), ((2, 32, 3, 5), True)])
def test_memory_format_of_convolutions(shape, last, lower):
    model, x = Pointwise(len(shape) - 2, last), torch.randn(shape)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.no_grad(), graphs() as seen:
        assert close(compiled(model, recipe="W8A16", lower=lower)(x), model(x), 0.02)
    assert len(seen[0][0].kernels) == 1
