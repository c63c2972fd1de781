"""Released weights: the memory is given back, the output stays, and no use of a released weight crashes or computes nonsense in silence."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from small import W8, Net, Stack, Tied, close, graphs, rounded, said
from tiny_models import tiny
from torch import nn

import qcompile
from qcompile import memory
from qcompile.core.errors import WeightError
from qcompile.memory import is_released
from qcompile.weights import TABLE


def compiled(model, **options):
    return torch.compile(model, backend="qcompile", options=W8 | options)


def storages(*tensors) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def packed(model) -> list[torch.Tensor]:
    return [t for p in model.parameters() if TABLE.get(p) for e in TABLE.get(p).entries.values() for t in e.tensors]


@pytest.fixture
def x():
    return torch.randn(5, 32)


@pytest.fixture(params=["release_weights", "option"])
def released(request, x):
    """(model, its compiled form, what it computed before the release): a model whose weights were released in one of the two ways."""
    model = Net()
    truth = rounded(model)(x).detach()
    fast = compiled(model, release=request.param == "option")
    with torch.no_grad():
        assert close(fast(x), truth)
    if request.param == "release_weights":
        assert qcompile.release_weights(model) == model.up.weight.nbytes + model.down.weight.nbytes
    assert is_released(model.up.weight) and is_released(model.down.weight)
    return model, fast, truth


def test_output_stays(released, x):
    _, fast, truth = released
    with torch.no_grad():
        for _ in range(3):
            assert close(fast(x), truth)
        assert close(fast(torch.cat([x, x])), torch.cat([truth, truth]))  # another graph
    with torch.inference_mode():
        assert close(fast(x), truth)


@pytest.mark.parametrize(("recipe", "how"), [("W8A8", "option"), ("W4A16", "release_weights"), ("NF4", "option"), ("NF4", "release_weights")])
def test_resident_bytes(how, recipe):
    """At most 1.1 x (packed sites + tensors kept), measured over real storages."""
    model, inputs = tiny("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    fast = compiled(model, recipe=recipe, release=how == "option")
    with torch.no_grad(), graphs() as seen:
        y = fast(**inputs).logits
        if how == "release_weights":
            qcompile.release_weights(model)
        assert torch.equal(fast(**inputs).logits, y)
    graph, args = seen[-1]
    quantized = {id(args[graph.sites[name].param.index]) for name in graph.kernels}
    kept = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in quantized]
    budget = storages(*packed(model)) + storages(*kept)
    resident = storages(*packed(model), *model.parameters(), *model.buffers())
    assert resident <= 1.1 * budget
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    big = {t.untyped_storage().data_ptr() for t in alive if t.dtype == torch.bfloat16 and t.untyped_storage().nbytes() >= 512 * 256 * 2}
    assert not big, "a copy of a 16-bit weight is still alive"
    if recipe == "NF4":
        assert resident < 0.5 * sum(p.numel() * 2 for p in model.parameters())


def test_site_by_site(monkeypatch):
    """When a site is packed, those before it are released already: no more than one layer is held twice."""
    model, held = Stack(6), []
    real = memory.TABLE.packed

    def watch(p, how, scheme, path, *more):
        if TABLE.get(p) is None or not TABLE.get(p).entries:
            held.append([is_released(q) for q in model.parameters() if q.dim() == 2])
        return real(p, how, scheme, path, *more)

    monkeypatch.setattr(TABLE, "packed", watch)
    with torch.no_grad():
        compiled(model, release=True)(torch.randn(2, 32))
    assert held == [[True] * i + [False] * (12 - i) for i in range(12)]


def test_peak(monkeypatch):
    """Memory during the first call: below the 16-bit model, its packed form of one layer, and what packing one weight takes."""
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(12)]).to(torch.bfloat16)
    whole, one = storages(*model.parameters()), model[0].weight.nbytes
    peak = 0
    real = memory.release

    def watch(p, path):
        nonlocal peak
        peak = max(peak, storages(*packed(model), *model.parameters()))
        return real(p, path)

    monkeypatch.setattr("qcompile.backend.release", watch)
    with torch.no_grad():
        compiled(model, release=True)(torch.randn(2, 256, dtype=torch.bfloat16))
    assert peak <= whole + 0.6 * one


def test_state_dict(released):
    model, _, _ = released
    state = model.state_dict()
    want = {"up.weight": (48, 32), "up.bias": (48,), "down.weight": (32, 48)}
    assert {k: tuple(v.shape) for k, v in state.items()} == want
    assert all(torch.isfinite(v).all() and not is_released(v) for v in state.values())
    assert storages(*state.values()) >= 4 * (2 * 48 * 32)
    other = Net()
    other.load_state_dict(state)
    assert torch.equal(other.up.weight, state["up.weight"])


def test_state_dict_is_the_rounded_model(x):
    model = Net()
    twin = rounded(model)
    with torch.no_grad():
        compiled(model, release=True)(x)
    assert all(close(v, twin.state_dict()[k], 1e-6) for k, v in model.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_revives(released, x, assign):
    model, fast, _ = released
    fresh = Net()
    model.load_state_dict(fresh.state_dict(), assign=assign)
    with torch.no_grad():
        assert close(model(x), fresh(x))
        assert close(fast(x), rounded(fresh)(x))
    assert torch.isfinite(model.up.weight).all() == (not is_released(model.up.weight))


def test_load_one_of_two(released, x):
    """A partial checkpoint revives what it names; the rest stays released and right."""
    model, fast, _ = released
    want = Net()
    want.load_state_dict(model.state_dict())
    want.up.weight.data.copy_(torch.randn(48, 32))
    model.load_state_dict({"up.weight": want.up.weight}, strict=False)
    with torch.no_grad():
        assert close(fast(x), rounded(want)(x), 1e-2)
    assert is_released(model.down.weight)


def test_deepcopy(released, x):
    """A copy is whole: dequantized weights of its own."""
    model, fast, truth = released
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert close(twin(x), truth, 1e-4)
        assert close(fast(x), truth)
    assert is_released(model.up.weight) and not is_released(twin.up.weight)
    twin.up.weight.data.zero_()
    with torch.no_grad():
        assert close(fast(x), truth)


def test_save(released, x):
    model, fast, truth = released
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert close(again(x), truth, 1e-4)
        assert close(fast(x), truth)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert all(torch.isfinite(v).all() for v in torch.load(file).values())


def test_eager_use_is_nan(released, x):
    model, _, _ = released
    with torch.no_grad():
        assert model(x).isnan().all()
    assert model.up.weight.isnan().all() and model.up.weight.shape == (48, 32)
    assert "nan" in repr(model.up.weight)


@pytest.mark.parametrize("how", ["release_weights", "option"])
def test_recompile_limit_is_told_before_it_is_hit(how):
    """Beyond it Dynamo runs eagerly, on NaN, and asks nobody."""
    model = Net()
    fast = torch.compile(model, backend="qcompile", options=W8 | {"release": how == "option"}, dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3), said() as texts:
        for m in range(2, 4):
            fast(torch.randn(m, 32))
        if how == "release_weights":
            qcompile.release_weights(model)
        assert fast(torch.randn(4, 32)).isfinite().all()
    (text,) = texts
    assert "recompile limit (3) is reached for Net.forward" in text and "released weights, which are NaN" in text


def test_writing_is_an_error(released, x):
    model, fast, truth = released
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.up.weight.mul_(2)
    with torch.no_grad():
        assert close(fast(x), truth)


@pytest.mark.parametrize("write", ["fill_", "zero_"])
def test_a_write_that_torch_lets_through_is_an_error(released, x, write):
    model, fast, _ = released
    with torch.no_grad(), pytest.raises(WeightError, match=r"up was released, and written to since.*p\.data = t"):
        getattr(model.up.weight, write)(*([2] if write == "fill_" else []))
        fast(x)
    fresh = Net()
    model.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        assert close(fast(x), rounded(fresh)(x))


def test_share_memory(released, x):
    model, fast, truth = released
    model.share_memory()
    with torch.no_grad():
        assert close(fast(x), truth) and is_released(model.up.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_dtype(released, x, dtype):
    """The compiled model goes on in the new dtype, and its weights come back in it."""
    model, fast, truth = released
    model.to(dtype)
    with torch.no_grad():
        y = fast(x.to(dtype))
    assert y.dtype == dtype and close(y.float(), truth, 2e-2)
    assert model.state_dict()["up.weight"].dtype == dtype and torch.isfinite(model.state_dict()["up.weight"]).all()


def test_to_device(released, x):
    model, fast, truth = released
    with torch.no_grad():
        model.to("cpu")
        assert close(fast(x), truth)


def test_grad_mode_is_an_error(released, x):
    model, fast, truth = released
    with pytest.raises(Exception, match=r"grad mode is on and weights were released.*torch\.no_grad"):
        fast(x)
    with torch.no_grad():
        assert close(fast(x), truth)
    model.requires_grad_(False)
    assert close(fast(x), truth)


def test_another_recipe_is_an_error(released, x):
    model, fast, truth = released
    with torch.no_grad(), pytest.raises(Exception, match=r"up.* was released.*cannot be packed as nf4"):
        compiled(model, recipe="NF4")(x)
    with torch.no_grad(), pytest.raises(Exception, match=r"was released"):
        compiled(model, ignore=["up"])(x)
    with torch.no_grad():
        assert close(fast(x), truth)


def test_refresh_and_optimizers_leave_released_weights_alone(released, x):
    model, fast, truth = released
    qcompile.refresh(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step()
    with torch.no_grad():
        assert close(fast(x), truth)
    assert qcompile.release_weights(model) == 0


def test_replaced_after_release(released, x):
    model, fast, _ = released
    model.up.weight = nn.Parameter(torch.randn(48, 32))
    want = Net()
    want.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert close(fast(x), rounded(want)(x), 1e-2)


def test_data_after_release(released, x):
    """``p.data = t`` brings a value: the release is over."""
    model, fast, _ = released
    model.up.weight.data = torch.randn(48, 32)
    want = Net()
    want.load_state_dict(model.state_dict())
    assert torch.equal(want.up.weight, model.up.weight)
    with torch.no_grad():
        assert close(fast(x), rounded(want)(x), 1e-2)


def test_nothing_is_captured_again(x):
    """Dynamo guards strides, and those of a released weight are others: not of weights that the graph does not read. One graph serves all layers of both models, before and after."""
    torch._dynamo.reset()
    models = [Stack(3), Stack(3)]
    with torch.no_grad(), graphs() as seen:
        for model in models:
            for layer in model.layers:
                layer.compile(backend="qcompile", options=W8 | {"release": True})
        first = [model(x) for model in models]
        again = [model(x) for model in models]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(is_released(p) for model in models for p in model.parameters() if p.dim() == 2)
    assert len({id(graph) for graph, _ in seen}) == 1


@pytest.mark.parametrize("release", [False, True])
def test_other_strides_are_other_values(release, x):
    """Given its transpose in the same memory, a packed weight is packed again; for one that the graph reads in 16 bits another graph is captured. The first is held in 16 bits by an embedding's graph."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
    TABLE.record(model[0].weight).pinned.add("another graph reads it")
    fast = compiled(model, ignore=["2"], release=release)
    with torch.no_grad(), graphs() as seen:
        for place in (0, 2):
            fast(x)
            model[place].weight.data = model[place].weight.data.t()
            want = copy.deepcopy(model)
            want[0] = rounded(nn.Sequential(want[0]))[0]
            assert close(fast(x), want(x), 1e-2)
    assert not is_released(model[0].weight)
    assert len({id(graph) for graph, _ in seen}) == (2 if release else 3)


def test_tied_embedding_is_kept():
    model, ids = Tied(), torch.randint(64, (2, 7))
    fast = compiled(model, head="int8.row", release=True)
    with torch.no_grad():
        y = fast(ids)
        assert not is_released(model.table.weight) and is_released(model.body.up.weight)
        assert qcompile.release_weights(model) == 0
        assert torch.equal(fast(ids), y) and torch.isfinite(y).all()


def test_embedding_in_another_graph_is_kept():
    """The table is looked up in one graph and multiplied with in another."""

    class Broken(Tied):
        def forward(self, ids):
            x = self.table(ids)
            torch._dynamo.graph_break()
            return self.head(self.body(x))

    model, ids = Broken(), torch.randint(64, (2, 7))
    fast = compiled(model, head="int8.row", release=True)
    with torch.no_grad():
        y = fast(ids)
        assert torch.isfinite(y).all() and torch.equal(fast(ids), y)


@pytest.mark.parametrize("head", [None, "int8.row"])
def test_embedding_outside_every_graph_is_kept(head):
    """Its head is one, although the graph has no embedding, and its weight stays."""

    class Outside(Tied):
        @torch.compiler.disable
        def look_up(self, ids):
            return self.table(ids)

        def forward(self, ids):
            return self.head(self.body(self.look_up(ids)))

    model, ids = Outside(), torch.randint(64, (2, 7))
    fast = compiled(model, head=head, release=True)
    with torch.no_grad(), graphs() as seen:
        y = fast(ids)
        assert torch.isfinite(y).all() and torch.equal(fast(ids), y)
        assert qcompile.release_weights(model) == 0 and not is_released(model.table.weight) and is_released(model.body.up.weight)
    (role,) = [site.role for graph, _ in seen[:1] for site in graph.sites.values() if "body" not in site.name]
    assert role == "head"


def test_one_layer_of_a_model(x):
    model = Stack(2)
    fast = compiled(model)
    with torch.no_grad():
        y = fast(x)
        freed = qcompile.release_weights(model.layers[0])
        assert freed == 2 * 48 * 32 * 4 and not is_released(model.layers[1].up.weight)
        assert torch.equal(fast(x), y)


class Stacked(nn.Module):
    """Matrices of one parameter, each used by itself, in both directions."""

    def __init__(self, used: int = 3) -> None:
        super().__init__()
        self.w, self.used = nn.Parameter(torch.randn(3, 32, 32)), used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.used):
            x = F.linear(x, self.w[i]) if i % 2 else x @ self.w[i - 3]
        return x


@pytest.mark.parametrize("how", ["release_weights", "option"])
def test_stacked_matrices(how, x):
    model = Stacked()
    fast = compiled(model, release=how == "option")
    with torch.no_grad():
        y = fast(x)
        if how == "release_weights":
            assert qcompile.release_weights(model) == model.w.nbytes
        assert is_released(model.w) and torch.equal(fast(x), y)
        twin = Stacked()
        twin.load_state_dict(model.state_dict())
        assert close(twin(x), y)
        model.load_state_dict(twin.state_dict())
        assert not is_released(model.w) and close(fast(x), y, 0.02)


@pytest.mark.parametrize("how", ["release_weights", "option"])
def test_stacked_matrices_that_are_not_all_packed_are_held(how, x):
    model = Stacked(used=2)
    fast = compiled(model, release=how == "option")
    with torch.no_grad():
        y = fast(x)
        assert how == "option" or qcompile.release_weights(model) == 0
        assert not is_released(model.w) and torch.equal(fast(x), y)
    report = qcompile.explain(fast, x)
    (note,) = [note for note in report.notes if "not released" in note]
    assert note == "the 16-bit weight w (12288 bytes) was not released: 2 of its 3 stacked matrices are packed; the others would be lost"
    assert report.totals.resident_bytes >= model.w.nbytes


def test_two_recipes_then_release(x):
    model = Net()
    eight, four = compiled(model), compiled(model, recipe="NF4")
    with torch.no_grad():
        a, b = eight(x), four(x)
        qcompile.release_weights(model)
        assert torch.equal(eight(x), a) and torch.equal(four(x), b)


def test_before_packing_is_an_error(x):
    with pytest.raises(WeightError, match=r"packed yet.*call it once"):
        qcompile.release_weights(Net())
    with pytest.raises(WeightError, match="packed yet"):
        qcompile.release_weights(nn.ReLU())


def test_through_inductor(x):
    model = Net()
    fast = torch.compile(model, backend="qcompile", options={"release": True})
    with torch.no_grad():
        y = fast(x)
        assert is_released(model.up.weight)
        assert torch.equal(fast(x), y) and close(y, rounded(copy.deepcopy(model))(x), 3e-2)


def test_compiled_module_itself(x):
    """release_weights and refresh take what torch.compile returned, too."""
    model = Net()
    fast = compiled(model)
    with torch.no_grad():
        y = fast(x)
        assert qcompile.refresh(fast) == 2 and torch.equal(fast(x), y)
        assert qcompile.release_weights(fast) > 0 and torch.equal(fast(x), y)
