"""Products of one input become one: what is merged and why not, the same numbers, one copy of the weights, live weights."""

from __future__ import annotations

import contextlib
import sys
import threading

import pytest
import torch
from expecttest import assert_expected_inline
from small import close
from tiny_models import tiny
from torch import nn

import qcompile
from qcompile import fill
from qcompile.passes.infra import text
from qcompile.weights import TABLE

MERGE = sys.modules["qcompile.passes.merge"]  # the package's attribute of this name is the pass


class Gated(nn.Module):
    """gate and up of one input, then down; `bias` gives both one."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48, bias=bias), nn.Linear(32, 64, bias=bias), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x)[..., :48])


def fast(model, lower="eager", **options):
    return torch.compile(model, backend="qcompile", options={"lower": lower, **options})


def test_graph(built):
    with torch.no_grad():
        fast(Gated().to(torch.bfloat16))(torch.randn(5, 32, dtype=torch.bfloat16))
    (graph,) = built
    assert graph.merged == {"gate": ("gate", "up"), "up": ("gate", "up")}
    lines = [line for line in text(graph.lowered).splitlines() if "narrow" in line or "scaled_linear" in line]
    assert_expected_inline(
        "\n".join(lines).replace("l_self_modules_", "").replace("_parameters_weight_", ""),
        """\
scaled_linear_default = qcompile.scaled_linear(getitem_1, [getitem_2], [gate_codes, gate_scale], 'int8.row @ int8.row')  # gate: int8.row @ int8.row
to = scaled_linear_default.to(bfloat16)
linear = narrow(to, -1, 0, 48)
linear_1 = narrow(to, -1, 48, 64)
scaled_linear_default_1 = qcompile.scaled_linear(getitem_3, [getitem_4], [down_codes, down_scale], 'int8.row @ int8.row')  # down: int8.row @ int8.row
add = add(scaled_linear_default_1, %down.bias)""",
    )


@pytest.mark.parametrize(("recipe", "lower"), [*((name, "eager") for name in ("W8A8", "W4A16", "W4A16_GPTQ", "W8A8_SMOOTHQUANT", "NF4")), ("W8A8", "inductor")])
def test_the_same_numbers(monkeypatch, lower, recipe):
    model, inputs = tiny("llama", num_hidden_layers=1)
    out = {}
    for devices in ((), ("cpu",)):
        torch._dynamo.reset()
        monkeypatch.setattr(MERGE, "DEVICES", devices)
        with torch.no_grad():
            out[len(devices)] = fast(model, lower, recipe=recipe)(**inputs, use_cache=False).logits
    assert close(out[1], out[0], 1e-5)


def test_one_copy_that_follows_the_weights():
    model, x = Gated(), torch.randn(5, 32)
    f = fast(model)
    with torch.no_grad():
        f(x)
        entries = [next(iter(TABLE.record(m.weight).entries.values())) for m in (model.gate, model.up)]
        storage = {e.tensors[0].untyped_storage().data_ptr() for e in entries}
        assert len(storage) == 1, "gate and up lie in one tensor"
        address = entries[1].tensors[0].data_ptr()
        model.up.weight.mul_(-2)
        torch._dynamo.reset()
        truth = fast(Gated_copy(model))(x)
        assert torch.equal(f(x), truth)
        assert entries[1].tensors[0].data_ptr() == address, "packed again in place"
        assert qcompile.release_weights(model) > 0
        assert torch.equal(f(x), truth)
        assert close(model.state_dict()["up.weight"], Gated_copy(model).up.weight, 0.02)


def test_two_graphs_at_once_join_once(built, monkeypatch):
    """Two threads take the joined weights of two graphs: each waits, once it has read the parts, for the other to have read them, too; which one that holds the lock waits for in vain."""
    model, x = Gated(), torch.randn(5, 32)
    with torch.no_grad():
        fast(model)(x)
    (slot,) = [s for s in built[0].slots if s.rest]
    model = Gated_copy(model)  # whose weights nobody joined
    parameters = [model.gate.weight, model.up.weight]
    met, packed, got = threading.Barrier(2), TABLE.packed, []

    def read(p, *rest):
        found = packed(p, *rest)
        if p is parameters[1]:
            with contextlib.suppress(threading.BrokenBarrierError):
                met.wait(1)
        return found

    monkeypatch.setattr(TABLE, "packed", read)
    threads = [threading.Thread(target=lambda: got.append(fill.tensors_of(slot, *parameters))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 2 and got[0][0] is got[1][0], "two copies"


def Gated_copy(model: Gated) -> Gated:
    other = Gated()
    other.load_state_dict(model.state_dict())
    return other


def test_two_instances_share_the_graph(built, monkeypatch):
    a, b, x = Gated(), Gated(), torch.randn(5, 32)
    with torch.no_grad():
        fa, fb = fast(a), fast(b)
        ya, yb = fa(x), fb(x)
        torch._dynamo.reset()
        assert len(built) == 1
        monkeypatch.setattr(MERGE, "DEVICES", ())
        assert torch.equal(ya, fast(a)(x)) and torch.equal(yb, fast(b)(x))


def test_explain_has_a_row_for_each():
    model, x = Gated(), torch.randn(5, 32)
    f = fast(model)
    with torch.no_grad():
        f(x)
        qcompile.release_weights(model)
    report = qcompile.explain(f, x)
    assert {row.name for row in report.sites} == {"gate", "up", "down"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight": "int8.tensor"}, "share scales"), ({"weight": "int4.b32x32"}, "share scales"), ({"recipe": "W8A8_STATIC"}, "is in its store"),
        ({"recipe": "LLM_INT8"}, "outlier columns"), ({"recipe": "W8A8", "ignore": ["gate"]}, None),
    ],
)  # fmt: skip
def test_what_stays_apart(built, options, reason):
    with torch.no_grad():
        fast(Gated(), **options)(torch.randn(5, 32))
    assert built[-1].merged == {}
    if reason:
        assert reason in str(built[-1].planned.meta["unmerged"]["gate"])


class Attention(nn.Module):
    """q, k and v of one input, of which k has no bias, as in Whisper."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 48), nn.Linear(32, 24, bias=False), nn.Linear(32, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x).tanh(), self.k(x), self.v(x) * 2], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_biases_are_one_vector(built, monkeypatch, lower, dtype):
    """Added before the cast, as in a product of its own: the same numbers, also where a bias is changed later. In bfloat16 to a rounding, since products of other sizes add in another order."""
    model, x = Attention().to(dtype), torch.randn(5, 32, dtype=dtype)
    with torch.no_grad():
        merged = fast(model, lower)
        out = [merged(x)]
        assert built[-1].merged["k"] == ("q", "k", "v")
        assert len([n for n in built[-1].lowered.graph.nodes if n.target is torch.cat]) == 2, "the model's and that of biases"
        model.v.bias.add_(1)
        out.append(merged(x))
        torch._dynamo.reset()
        monkeypatch.setattr(MERGE, "DEVICES", ())
        apart = fast(model, lower)
        assert close(out[1], apart(x), 1e-5 if dtype == torch.float32 else 4e-3) and built[-1].merged == {}
        model.v.bias.sub_(1)
        assert close(out[0], apart(x), 1e-5 if dtype == torch.float32 else 4e-3)


class Unit(nn.Module):
    """A gated unit of two linears with biases, of equal size."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.gate(x)) * self.up(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_unit_with_biases(built, dtype):
    """One product, and the activation behind the biases."""
    model, x = Unit().to(dtype), torch.randn(5, 32, dtype=dtype)
    with torch.no_grad():
        assert close(fast(model)(x), model(x), 0.03)
    assert built[-1].merged["up"] == ("gate", "up") and "linear_glu" not in text(built[-1].lowered)


class Laid(nn.Module):
    """Two linears of one input, the first of which is looked at as it lies: rows without gaps."""

    def __init__(self, how: str, bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(32, 48, bias=bias), nn.Linear(32, 48, bias=bias), how

    def forward(self, x: torch.Tensor):
        y, z = self.a(x), self.b(x)
        if self.how == "view":
            return y.view(x.shape[0], -1, 16).transpose(0, 1) + 1, z * 2
        if self.how == "view of a view":
            return y.view(*x.shape[:-1], 3, 16).view(-1) + 1, z * 2
        if self.how == "heads":
            return y.view(*x.shape[:-1], 3, 16).transpose(1, 2) + 1, z * 2
        if self.how == "as_strided":
            return y.as_strided((2, 3), (48, 1)) * 1, z * 2
        return y, z.chunk(2, -1)[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize(("how", "copies"), [("view", 1), ("view of a view", 1), ("heads", 0), ("as_strided", 1), ("output", 2)])
def test_columns_that_are_looked_at_as_they_lie(built, how, copies, lower, bias):
    """Copied out where the gaps between them would be seen, and nowhere else; what leaves the graph lies as the model's own would."""
    model, x = Laid(how, bias), torch.randn(4, 5, 32)
    with torch.no_grad():
        got, wanted = fast(model, lower, recipe="W8A16")(x), model(x)
    assert built[-1].merged["b"] == ("a", "b")
    assert got[0].stride() == wanted[0].stride() and all(close(g, w, 0.02) for g, w in zip(got, wanted))
    assert sum(n.target == "contiguous" for n in built[-1].lowered.graph.nodes) == copies


@pytest.mark.parametrize("shape", [(1,), (), (1, 48)])
def test_biases_of_other_shapes_stay_in_their_own_store(built, shape):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bias = nn.Linear(32, 48), nn.Linear(32, 48), nn.Parameter(torch.randn(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) * torch.nn.functional.linear(x, self.b.weight, self.bias)

    model, x = Odd(), torch.randn(5, 32)
    with torch.no_grad():
        assert close(fast(model, recipe="W8A16")(x), model(x), 0.03)
    assert built[-1].merged == {}


def test_a_bias_that_is_computed_stays_where_it_is(built):
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(32, 48), nn.Linear(32, 48), nn.Parameter(torch.ones(48))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + torch.nn.functional.linear(x, self.b.weight, self.b.bias * self.scale)

    model, x = Computed(), torch.randn(5, 32)
    with torch.no_grad():
        assert close(fast(model)(x), model(x), 0.02)
    assert built[-1].merged == {} and "in its own store" in str(built[-1].planned.meta["unmerged"]["b"])


def test_other_devices_keep_products_apart(built, monkeypatch):
    monkeypatch.setattr(MERGE, "DEVICES", ("cuda",))
    with torch.no_grad():
        fast(Gated())(torch.randn(5, 32))
    assert built[-1].merged == {} and "cpu" in str(built[-1].planned.meta["unmerged"]["up"])
