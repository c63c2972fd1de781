"""Weights are inputs: whatever happens to a parameter, the next call computes with its value."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from small import W8, Net, Tied, close, graphs, rounded
from torch import nn

import qcompile
from qcompile import memory
from qcompile.weights import TABLE


def compiled(model, **options):
    return torch.compile(model, backend="qcompile", options=W8 | options)


def right(fast, model, x, scheme="int8.row", keep=()):
    with torch.no_grad():
        return close(fast(x), rounded(model, scheme, keep)(x))


@pytest.fixture
def x():
    return torch.randn(5, 32)


def test_two_instances_share_one_graph(x):
    first, second = Net(), Net()
    a, b = compiled(first), compiled(second)
    with graphs() as seen:
        for _ in range(2):
            assert right(a, first, x) and right(b, second, x)
    assert len({id(graph) for graph, _ in seen}) == 1
    with torch.no_grad():
        assert not close(a(x), b(x))


def _loaded(model):
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


def _assigned(model):
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)


def _replaced(model):
    model.up.weight = nn.Parameter(torch.randn(48, 32))


def _data(model):
    model.up.weight.data = torch.randn(48, 32)


def _copied(model):
    with torch.no_grad():
        model.up.weight.copy_(torch.randn(48, 32))


def _in_place(model):
    with torch.no_grad():
        model.up.weight.mul_(3).add_(0.5)


def _element(model):
    with torch.no_grad():
        model.up.weight[3, 5] = 40.0


def _step(model, optimizer, **settings):
    step = optimizer(model.parameters(), lr=0.3, **settings)
    model(torch.randn(3, 32)).square().sum().backward()
    step.step()
    step.zero_grad()


CHANGES = {
    "load_state_dict": _loaded,
    "assign": _assigned,
    "replaced": _replaced,
    "data": _data,
    "copy_": _copied,
    "in place": _in_place,
    "element": _element,
    "adamw fused": lambda m: _step(m, torch.optim.AdamW, fused=True),
    "adamw foreach": lambda m: _step(m, torch.optim.AdamW, foreach=True),
    "sgd fused": lambda m: _step(m, torch.optim.SGD, fused=True),
    "to float64 and back": lambda m: m.double().float(),
    "inference": lambda m: torch.inference_mode()(_loaded)(m),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, x):
    model = Net()
    fast = compiled(model)
    assert right(fast, model, x)
    before = model.up.weight.detach().clone()
    CHANGES[change](model)
    assert "float64" in change or not torch.equal(before, model.up.weight)
    for _ in range(2):
        assert right(fast, model, x)


def test_a_change_is_seen_through_inductor(x):
    model = Net()
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A16"})
    assert right(fast, model, x)
    for change in ("load_state_dict", "replaced", "adamw fused"):
        CHANGES[change](model)
        assert right(fast, model, x)
    model.up.weight.data.mul_(2)
    qcompile.refresh(model)
    assert right(fast, model, x)


def test_an_address_that_comes_back(x):
    """A new value may lie where the old one lay."""
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    fast = compiled(model)
    assert right(fast, model, x)
    for _ in range(20):
        model[0].weight.data = torch.randn(48, 32)
        model[0].weight.data = torch.randn(48, 32)
        assert right(fast, model, x)


def test_the_same_storage_read_otherwise(x):
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    fast = compiled(model)
    assert right(fast, model, x)
    for _ in range(3):
        model[0].weight.data = model[0].weight.data.t()
        assert right(fast, model, x)


def test_without_guards_on_modules(x):
    """``guard_filter_fn`` is torch.compile's own. Weights are looked at all the same: written to, replaced, given other data."""
    model = Net()
    fast = compiled(model, guard_filter_fn=torch.compiler.skip_guard_on_all_nn_modules_unsafe)
    assert right(fast, model, x)
    with torch.no_grad():
        model.up.weight.mul_(-2)
    assert right(fast, model, x)
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))
    assert right(fast, model, x)
    model.up.weight.data = torch.randn_like(model.up.weight)
    assert right(fast, model, x)


def test_refresh_tells_of_what_cannot_be_seen(x):
    model = Net()
    fast = compiled(model)
    assert right(fast, model, x)
    model.up.weight.data.mul_(-2)
    assert not right(fast, model, x)
    assert qcompile.refresh(model) == 2
    assert right(fast, model, x) and qcompile.refresh(nn.Linear(4, 4)) == 0


def test_refresh_of_one_layer_of_two_graphs(x):
    model, other = Net(), Net()
    fast, fast_other = compiled(model), compiled(other)
    assert right(fast, model, x) and right(fast_other, other, x)
    for m in (model, other):
        m.down.weight.data.mul_(-2)
    qcompile.refresh(model.down)
    assert right(fast, model, x) and not right(fast_other, other, x)


def test_inference_parameters(x):
    with torch.inference_mode():
        model = Net()
        fast = compiled(model)
        y = fast(x)
        assert close(y, rounded(model)(x))
        model.up.weight.data = torch.randn(48, 32)
        assert close(fast(x), rounded(model)(x))
        model.up.weight.mul_(2)
        qcompile.refresh(model)
        assert close(fast(x), rounded(model)(x))


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data", "release, load", "option release, load"])
def test_inference_mode_first(change, lower, x):
    """What the first call packed in inference mode is written to by a later one under no_grad."""
    model = Net()
    fast = compiled(model, lower=lower, release="option" in change)
    with torch.inference_mode():
        fast(x)
    if change.startswith("release"):
        qcompile.release_weights(model)
    CHANGES["load_state_dict" if "load" in change else change](model)
    with torch.no_grad():
        assert close(fast(x), rounded(model)(x), 1e-5 if lower == "eager" else 1e-2)


def test_calibrated_in_inference_mode_first(x):
    class Counting(Net):
        """Writes to its input and to a buffer."""

        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(32))

        def forward(self, x):
            self.total.add_(x.add_(1).mean(0))
            return super().forward(x)

    model = Counting()
    fast = compiled(model, recipe="W8A8_SMOOTHQUANT_STATIC")
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            fast(x.clone())
            with qcompile.calibrate(fast) as run:
                fast(x.clone())
            run.calibration.statistics()
            assert close(fast(x.clone()), model(x.clone()), 0.1)
            assert qcompile.explain(fast, x.clone()).totals.coverage == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_released_inference_parameters(mode, x):
    with torch.inference_mode():
        model = Net()
        truth = rounded(model)(x)
        fast = compiled(model, release=True)
    with mode():
        assert close(fast(x), truth) and memory.is_released(model.up.weight)


def test_nothing_leaks(x):
    def use():
        model = Net()
        fast = compiled(model)
        with torch.no_grad():
            fast(x)
        ids = [id(p) for p in model.parameters()]
        packed = [weakref.ref(t) for p in model.parameters() if TABLE.get(p) for e in TABLE.get(p).entries.values() for t in e.tensors]
        assert len(packed) == 4
        return weakref.ref(model), ids, packed

    use()  # what the first call of all keeps
    gc.collect()
    count = len(TABLE._records)
    model, ids, packed = use()
    gc.collect()
    assert model() is None
    assert len(TABLE._records) == count and not any(i in TABLE._records for i in ids)
    gc.collect()
    assert [r() for r in packed] == [None] * 4


def test_a_graph_forgets_dead_instances(x):
    """One graph outlives the instances that it served."""
    keeper = Net()
    fast = compiled(keeper)
    with graphs() as seen, torch.no_grad():
        fast(x)
        graph = seen[0][0]
        for _ in range(4):
            compiled(Net())(x)
    seen.clear()
    gc.collect()
    assert len(graph._bindings) == 1


def test_addresses_stay(x):
    model = Net()
    fast = compiled(model)
    assert right(fast, model, x)
    entry = next(iter(TABLE.get(model.up.weight).entries.values()))
    before = [t.data_ptr() for t in entry.tensors]
    for change in ("load_state_dict", "data", "in place", "adamw fused"):
        CHANGES[change](model)
        assert right(fast, model, x)
    entry = next(iter(TABLE.get(model.up.weight).entries.values()))
    assert [t.data_ptr() for t in entry.tensors] == before


def test_two_recipes_on_one_model(x):
    model = Net()
    eight, four = compiled(model), compiled(model, recipe="NF4")
    for _ in range(2):
        assert right(eight, model, x) and right(four, model, x, "nf4.g64")
        CHANGES["in place"](model)
    assert len(TABLE.get(model.up.weight).entries) == 2


def test_tied_embedding_and_head():
    model = Tied()
    ids = torch.randint(64, (2, 7))
    fast = compiled(model, head="int8.row")
    head = rounded(nn.Sequential(model.head))[0]

    def truth():
        return rounded(nn.Sequential(model.head))[0](rounded(model.body)(model.table(ids)))

    with torch.no_grad():
        assert not torch.equal(head.weight, model.head.weight)
        assert close(fast(ids), truth())
        model.table.weight.mul_(-1.5)
        assert close(fast(ids), truth())
    plain = compiled(model)
    with torch.no_grad():
        assert close(plain(ids), model.head(rounded(model.body)(model.table(ids))))


def test_one_weight_twice_in_a_graph(x):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x))) @ self.fc.weight

    model = Twice()
    fast = compiled(model)
    with torch.no_grad():
        fc = rounded(nn.Sequential(model.fc))[0]
        y = torch.relu(fc(x))
        transposed = rounded(nn.Sequential(nn.Linear(32, 32)))[0]
        transposed.weight.copy_(model.fc.weight.t())
        transposed = rounded(nn.Sequential(transposed))[0]
        assert close(fast(x), fc(y) @ transposed.weight.t())


def test_threads(x):
    models = [Net() for _ in range(4)]
    fasts = [compiled(m) for m in models]
    inputs = [torch.randn(5, 32) for _ in range(4)]
    wanted = [rounded(m)(v).detach() for m, v in zip(models, inputs)]
    with torch.no_grad():
        fasts[0](x)
    failures: list[object] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for turn in range(25):
                    j = (i + turn) % 4
                    if not close(fasts[j](inputs[j]), wanted[j]):
                        failures.append((i, turn))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_threads_while_weights_change(x):
    """Readers never crash, and when the changes are over they compute with the last value."""
    model = Net()
    fast = compiled(model)
    assert right(fast, model, x)
    errors: list[Exception] = []
    done = threading.Event()

    def read() -> None:
        try:
            with torch.no_grad():
                while not done.is_set():
                    fast(x)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for t in threads:
        t.start()
    for _ in range(10):
        CHANGES["in place"](model)
    done.set()
    for t in threads:
        t.join()
    assert not errors and right(fast, model, x)


def test_a_bias_changes(x):
    """A bias needs no table: it is read as it is."""
    model = Net()
    fast = compiled(model)
    assert right(fast, model, x)
    model.up.bias.data.add_(3)
    assert right(fast, model, x)


def test_a_weight_that_is_a_buffer(x):
    """No parameter, no quantization, but the right values."""

    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(48, 32))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    model = Buffer()
    fast = compiled(model)
    for _ in range(2):
        assert torch.equal(fast(x), model(x))
        model.w.mul_(2)


def test_parametrized_weight(x):
    """A weight that the graph computes is no parameter: left alone and right."""
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 48)), nn.Linear(48, 32))
    fast = compiled(model)
    with torch.no_grad(), graphs() as seen:
        y = fast(x)
        middle = model[0](x)
        assert close(y, rounded(nn.Sequential(model[1]))[0](middle))
    assert list(seen[0][0].kernels) == ["1"]
