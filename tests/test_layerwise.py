"""Models that are built on the meta device and filled layer by layer: the same numbers as the whole model's, one layer in 16 bits at a time, and what is wrong is said before anything is read."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from small import graphs, said
from tiny_models import tiny
from torch import nn

import qcompile
from qcompile.core.errors import OptionError, QcompileWarning, WeightError
from qcompile.layerwise import Reader, _move
from qcompile.memory import is_released

EAGER = {"lower": "eager"}


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """An embedding, blocks in a list, a norm with a buffer behind, a linear outside."""

    def __init__(self, blocks=3):
        super().__init__()
        self.embed, self.layers, self.out = nn.Embedding(40, 32), nn.ModuleList(Block() for _ in range(blocks)), nn.Linear(32, 24)
        self.register_buffer("shift", torch.randn(32))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(x + self.shift)


def empty(make=Net, buffers=True):
    with init_empty_weights(include_buffers=buffers):
        return make().eval()


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "gpt2"])
@pytest.mark.parametrize("recipe", ["W8A8", "W4A16"])
def test_models_from_their_checkpoints(name, recipe, tmp_path):
    """In shards, with tied weights, experts and two stacks of layers: bit by bit what layers compiled one by one give."""
    model, inputs = tiny(name)
    inputs["use_cache"] = False
    source = model.state_dict() if name == "mixtral" else tmp_path  # whose checkpoint has names, and experts, of its own
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with init_empty_weights():
        twin = type(model)(model.config).eval()
    options = {"recipe": recipe, **EAGER}
    names = qcompile.load_weights(twin, source, options=options)
    assert not any(p.is_meta for n, p in twin.named_parameters() if not any(n.startswith(region + ".") for region in names))
    for region in names:
        model.get_submodule(region).compile(backend="qcompile", options=options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", QcompileWarning)  # experts in a loop are told
        first, second = twin(**inputs).logits, twin(**inputs).logits
        torch._dynamo.reset()
        truth = model(**inputs).logits
        assert torch.equal(first, truth) and torch.equal(second, truth)
    assert not any(p.is_meta for p in twin.parameters()) and sum(is_released(p) for p in twin.parameters()) >= 4 * len(twin.get_submodule(names[0].rpartition(".")[0]))


def test_one_layer_at_a_time(monkeypatch):
    """Whenever a layer is read, those before it are released, and those behind it are on the meta device."""
    whole, model = Net(4).eval(), empty(lambda: Net(4))
    qcompile.load_weights(model, whole.state_dict(), options={"recipe": "W8A16", **EAGER})
    held, fill = [], Reader.fill

    def spied(self, key, where):
        fill(self, key, where)
        layers = sum(p.untyped_storage().nbytes() for p in model.layers.parameters() if not p.is_meta and p.dim() == 2)
        held.append(layers)

    monkeypatch.setattr(Reader, "fill", spied)
    with torch.no_grad():
        y = model(IDS)
    one = sum(p.nbytes for p in Block().parameters() if p.dim() == 2)
    assert max(held) <= one + 4 * 2 * 4 and len(held) == 4 * 3 + 2  # four layers of two released weights, an element each
    twin = Net(4).eval()
    twin.load_state_dict(whole.state_dict())
    for layer in twin.layers:
        layer.compile(backend="qcompile", options={"recipe": "W8A16", **EAGER})
    twin.out = torch.compile(twin.out, backend="qcompile", options={"recipe": "W8A16", **EAGER})  # of a linear's own compile() Dynamo captures nothing
    with torch.no_grad():
        assert torch.equal(y, twin(IDS))
    assert all(is_released(p) for p in (*model.layers.parameters(), model.out.weight) if p.dim() == 2)
    saved = model.state_dict()
    assert all(torch.allclose(saved[n], p, atol=2e-2 * float(p.abs().max())) for n, p in whole.state_dict().items())


def test_sources(tmp_path):
    """A mapping, a file, a folder; another dtype; what is not on the meta device stays."""
    whole = Net().eval()
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    found = []
    for source in (whole.state_dict(), tmp_path / "model.safetensors", str(tmp_path)):
        model = empty()
        qcompile.load_weights(model, source, options={"recipe": "W8A16", **EAGER})
        with torch.no_grad():
            found.append(model(IDS))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    model = empty()
    model.embed.weight = nn.Parameter(torch.ones(40, 32).bfloat16())
    names = qcompile.load_weights(model, tmp_path, dtype=torch.bfloat16, options={"recipe": "W8A16", **EAGER})
    assert names == ["layers.0", "layers.1", "layers.2", "out"]
    assert torch.equal(model.embed.weight, torch.ones(40, 32).bfloat16()) and model.embed.weight.requires_grad
    with torch.no_grad():
        assert model(IDS).dtype == torch.bfloat16 and model.layers[0].up.bias.dtype == torch.bfloat16
    assert not model.layers[0].up.weight.requires_grad


def test_a_tensor_is_asked_for_twice():
    """For its shape, before anything is filled, and for its values: a mapping may read it from somewhere each time."""

    class Read(Mapping):
        def __init__(self, state):
            self.state, self.asked = state, Counter()

        def __getitem__(self, name):
            self.asked[name] += 1
            return self.state[name]

        def __iter__(self):
            return iter(self.state)

        def __len__(self):
            return len(self.state)

    source, model = Read(Net().state_dict()), empty()
    qcompile.load_weights(model, source, options={"recipe": "W8A16", **EAGER})
    with torch.no_grad():
        model(IDS)
    assert set(source.asked) == set(source.state) and set(source.asked.values()) == {2}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["as stored", "as asked"])
def test_a_model_that_looks_at_a_layer_before_it_calls_it(stored, tmp_path):
    """A head that casts its input to its weight's dtype, which is that of the values to come; the model itself was described in float32."""

    class Casting(Net):
        def forward(self, ids):
            return self.out(self.embed(ids).float().to(self.out.weight.dtype))

    whole, model = Net().to(stored).eval(), empty(Casting)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    qcompile.load_weights(model, tmp_path, dtype=torch.bfloat16 if stored == torch.float32 else None, regions=["layers.0", "out"], options={"recipe": "W8A16", **EAGER})
    assert model.out.weight.is_meta and model.out.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(IDS).dtype == torch.bfloat16


def test_tied_across_regions():
    """A parameter that two layers share is outside of both."""
    whole, model = Net().eval(), empty()
    whole.layers[2].up.weight = whole.layers[0].up.weight
    model.layers[2].up.weight = model.layers[0].up.weight
    state = {n: p for n, p in whole.state_dict().items() if n != "layers.0.up.weight"}
    qcompile.load_weights(model, state, options={"recipe": "W8A16", **EAGER})
    assert model.layers[0].up.weight is model.layers[2].up.weight and torch.equal(model.layers[0].up.weight, whole.layers[0].up.weight)
    with torch.no_grad():
        assert float((model(IDS) - whole(IDS)).abs().max()) < 0.05


def test_more_kinds_of_layers_than_dynamo_keeps():
    """Of one function it keeps eight graphs; a layer beyond them would run eagerly, and read released weights."""

    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32 + 8 * i), nn.Linear(32 + 8 * i, 32)) for i in range(12))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    assert torch._dynamo.config.recompile_limit == 8
    whole, models, x = Kinds().eval(), [empty(Kinds) for _ in range(2)], torch.randn(3, 32)
    for dtype, model in zip((torch.float32, torch.bfloat16), models):
        assert len(qcompile.load_weights(model, whole.state_dict(), dtype=dtype, options={"recipe": "W8A16", **EAGER})) == 12
        with torch.no_grad():
            model(x.to(dtype))
            assert float((model(x.to(dtype)).float() - whole(x)).norm() / whole(x).norm()) < 0.02
    assert all(is_released(p) for model in models for p in model.parameters() if p.dim() == 2)


class Counted(nn.Module):
    """Blocks that keep something of their own between calls, found by their number, as a cache's layers are."""

    def __init__(self, blocks=12):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        for i, layer in enumerate(self.layers):
            layer.number = i
            layer.forward = lambda x, seen, layer=layer: Block.forward(layer, x) + seen[layer.number]

    def forward(self, x, seen):
        for layer in self.layers:
            x = layer(x, seen)
        return x


@pytest.mark.parametrize("length", [3, 5])
def test_layers_that_dynamo_tells_apart_by_their_number(length):
    """Twelve graphs, of which it would keep eight of one function: from the third layer on each has a function to itself."""
    whole, model = Counted().eval(), empty(Counted)
    with warnings.catch_warnings(), torch.no_grad(), graphs() as seen:
        warnings.simplefilter("error", QcompileWarning)
        qcompile.load_weights(model, whole.state_dict(), options={"recipe": "W8A16", **EAGER})
        for rows in (3, length, 3):
            x, kept = torch.randn(rows, 32), {i: torch.randn(rows, 32) for i in range(12)}
            y, exact = model(x, kept), whole(x, kept)
            assert float((y - exact).norm() / exact.norm()) < 0.02
    assert len(seen) == 36 and all(is_released(p) for p in model.parameters() if p.dim() == 2)


def test_buffers_that_have_values_move_with_the_weights():
    """On a second device ("meta" stands for one that is not here): all of the model is there afterwards, the tensors that were made with it, too."""
    model = empty(buffers=False)
    model.layers[1].up.weight = model.layers[2].up.weight = nn.Parameter(torch.randn(64, 32))
    assert model.shift.device.type == "cpu"
    _move(model, torch.device("meta"))
    assert model.shift.is_meta and model.layers[1].up.weight.is_meta
    assert model.layers[1].up.weight is model.layers[2].up.weight


def test_layers_that_are_alike_share_a_graph():
    """Four blocks and a linear: two captures, of which each goes on once its weights are released, though their strides are others."""
    whole, model = Net(4).eval(), empty(lambda: Net(4))
    qcompile.load_weights(model, whole.state_dict(), options={"recipe": "W8A16", **EAGER})
    with torch.no_grad(), graphs() as seen:
        for _ in range(3):
            model(IDS)
    assert len(seen) == 15 and len({id(graph.captured) for graph, _ in seen}) == 2


def test_named_regions():
    whole, model = nn.Sequential(Block(), nn.Sequential(Block(), Block())).eval(), empty(lambda: nn.Sequential(Block(), nn.Sequential(Block(), Block())))
    with pytest.raises(OptionError, match=r"name the modules to fill.*there are 0, 1"):
        qcompile.load_weights(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), {})
    with pytest.raises(OptionError, match=r"no module is called '1\.5'; did you mean 1"):
        qcompile.load_weights(model, whole.state_dict(), regions=["0", "1.5"])
    with pytest.raises(OptionError, match=r"region 1\.0 is a part of region 1"):
        qcompile.load_weights(model, whole.state_dict(), regions=["1", "1.0"])
    assert qcompile.load_weights(model, whole.state_dict(), regions=["0", "1.0"], options={"recipe": "W8A16", **EAGER}) == ["0", "1.0"]
    assert not model[1][1].up.weight.is_meta and model[1][0].up.weight.is_meta
    with torch.no_grad():
        assert float((model(torch.randn(3, 32)) - whole(torch.zeros(3, 32))).abs().max()) < 100 and not model[0].up.weight.is_meta


def test_what_is_wrong_is_said_before_anything_is_read():
    state = Net().state_dict()
    for change, words in (
        (lambda s: s.pop("layers.1.up.bias"), r"the mapping has no tensor layers\.1\.up\.bias; it has layers\.\d\.up\.bias"),
        (lambda s: s.update({"out.weight": torch.zeros(24, 31)}), r"out\.weight is \[24, 32\] in the model, and \[24, 31\] in the mapping"),
    ):
        model, wrong = empty(), copy.copy(state)
        change(wrong)
        with pytest.raises(WeightError, match=words):
            qcompile.load_weights(model, wrong)
        assert all(p.is_meta for p in model.parameters()) and model.layers[0]._compiled_call_impl is None
    with pytest.raises(WeightError, match="is no safetensors file"):
        qcompile.load_weights(empty(), "nowhere")
    model = empty(lambda: _with_table(), buffers=True)
    with pytest.raises(WeightError, match=r"buffer layers\.0\.table is on the meta device, and no checkpoint holds it"):
        qcompile.load_weights(model, state)


def _with_table():
    net = Net()
    net.layers[0].register_buffer("table", torch.ones(3), persistent=False)
    return net


def test_unexpected_tensors_and_layers_that_no_call_reaches():
    whole = Net().eval()
    model = empty()
    with pytest.warns(QcompileWarning, match=r"1 tensors of the source have no place in the model: more"):
        qcompile.load_weights(model, whole.state_dict() | {"more": torch.ones(2)}, options={"recipe": "W8A16", **EAGER})
    last, model.layers = model.layers[2], model.layers[:2]
    with torch.no_grad(), pytest.warns(QcompileWarning, match=r"first call did not reach layers\.2: on the meta device"):
        model(IDS)
    assert last.up.weight.is_meta
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", QcompileWarning)
        y = last(torch.zeros(2, 32))
        model(IDS)
    assert not last.up.weight.is_meta and torch.allclose(y, whole.layers[2](torch.zeros(2, 32)), atol=0.02)


def test_a_layer_that_cannot_be_read_is_read_by_the_next_call(monkeypatch):
    whole, model = Net().eval(), empty()
    qcompile.load_weights(model, whole.state_dict(), options={"recipe": "W8A16", **EAGER})
    fill = Reader.fill

    def fails(self, key, where):
        if key == "layers.1.down.weight":
            raise OSError("the disk is away")
        fill(self, key, where)

    monkeypatch.setattr(Reader, "fill", fails)
    with torch.no_grad(), pytest.raises(OSError, match="the disk is away"):
        model(IDS)
    monkeypatch.setattr(Reader, "fill", fill)
    with torch.no_grad():
        assert float((model(IDS) - whole(IDS)).abs().max()) < 0.05


def test_through_inductor():
    whole, model = Net().eval(), empty()
    qcompile.load_weights(model, whole.state_dict(), options={"recipe": "W8A8", "head": "int8.row"})
    with torch.no_grad(), said():
        assert float((model(IDS) - whole(IDS)).norm() / whole(IDS).norm()) < 0.03
