"""The backend itself: what a compiled graph holds and returns, through Inductor and by references alike, and what it says of itself."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from small import W8, Net, Stack, close, graphs, rounded, said
from torch import nn

from qcompile import RECIPES
from qcompile.backend import CompiledGraph, _training
from qcompile.core.errors import Skip


@pytest.fixture
def x():
    return torch.randn(5, 32)


def compiled(model, **options):
    return torch.compile(model, backend="qcompile", options=options)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith("INT8_")])
def test_inductor_equals_the_references(recipe, x):
    model = Net()
    with torch.no_grad():
        a = compiled(model, recipe=recipe, lower="eager")(x)
        torch._dynamo.reset()
        assert close(compiled(model, recipe=recipe)(x), a, 2e-3)


@pytest.mark.parametrize(
    ("weight", "x_scheme"),
    [("uint4.g16.point", None), ("uint4.g32.min", None), ("nf4.g64/int8.g256", None), ("int8.row", "int8.row.point"), ("int4.g32", "e4m3.row"), ("int3.g32", None)],
)
def test_any_pair_of_schemes(weight, x_scheme, x):
    options = {"weight": weight} | ({"input": x_scheme} if x_scheme else {})
    model = Net(n=64)
    with torch.no_grad():
        a = compiled(model, lower="eager", **options)(x)
        torch._dynamo.reset()
        b = compiled(model, **options)(x)
        assert close(b, a, 2e-3) and close(a, model(x), 0.4)
        if x_scheme is None:
            assert close(a, rounded(model, options["weight"])(x))


@pytest.mark.parametrize("options", [{"weight": "int3.g32"}, {"weight": "int4.g32", "input": "e4m3.row"}, {"weight": "int8.row", "input": "int8.g32"}])
def test_emulated_ragged_groups(options, x):
    model = Net()  # 48 columns in groups of 32
    with torch.no_grad():
        a = compiled(model, lower="eager", **options)(x)
        torch._dynamo.reset()
        assert close(compiled(model, **options)(x), a, 2e-3)


def test_static_is_calibrated_once_and_says_so(x):
    model = Net()
    with said() as texts, torch.no_grad(), graphs() as seen:
        fast = compiled(model, recipe="W8A8_STATIC", lower="eager")
        a = fast(x)
        fast(100 * x)
        assert torch.equal(fast(x), a)  # the second call did not move the ranges
        fast(torch.cat([x, x]))  # another graph, the same ranges
    said_so = [t for t in texts if "calibrated" in t]
    assert len(said_so) == 1 and "calibrated 2 linears on the first call, which had 5 tokens" in said_so[0]
    assert close(a, model(x).detach(), 0.05)
    assert {g.steps[3].note for g, _ in seen} == {"calibrated 2 linears on the first call, which had 5 tokens", "known from an earlier call"}


def test_what_a_graph_tells(x):
    model = Net()
    with torch.no_grad(), graphs() as seen:
        compiled(model, recipe="W4A16", ignore=["up"])(x)
    graph, args = seen[0]
    assert isinstance(graph, CompiledGraph) and list(graph.sites) == ["up", "down"]
    assert [step.name for step in graph.steps] == ["normalize", "find_sites", "match", "observe", "merge", "attend", "lower", "glu", "factors"]
    assert isinstance(graph.plan["up"], Skip) and "rule 'up' keeps 16 bits" in str(graph.plan["up"]) and str(graph.plan["down"]) == "int4.g128"
    assert list(graph.kernels) == ["down"] and graph.kernel_count >= 1
    assert not any(a is model.down.weight for a in (args[i] for i in graph._kept)) and any(a is model.up.weight for a in args)


def test_the_captured_graph_is_not_edited(x):
    """Dynamo reads its graph again; variants start from ours."""
    model = Stack(2)
    for layer in model.layers:
        layer.compile(backend="qcompile", options=W8 | {"ignore": ["re:layers.1.*"]})
    with torch.no_grad(), graphs() as seen:
        model(x)
    first = seen[0][0]
    assert not any("packed" in n.meta for n in first.captured.graph.nodes) and len(first.captured.graph.find_nodes(op="placeholder")) == len(seen[0][1])


def test_kin_share_one_quantized_input(x):
    class Kin(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 16) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) * self.v(x)

    model = Kin()
    for recipe in ("W8A8", "W8A8_STATIC"):
        with torch.no_grad(), graphs() as seen:
            assert close(compiled(model, recipe=recipe, lower="eager")(x), model(x), 0.05)
        names = [str(n.target) for n in seen[0][0].lowered.graph.nodes]
        assert sum("qcompile.quantize" in n for n in names) == 1 and sum("scaled_linear" in n for n in names) == 1  # and one product


def test_collecting_ends(x):
    fast = compiled(Net(), **W8)
    with torch.no_grad():
        with graphs() as seen:
            fast(x)
        fast(x)
    assert len(seen) == 1


def test_training_is_told_by_grad_mode_and_inputs():
    """And by the graph, where it turns grad mode on."""
    w = nn.Parameter(torch.ones(2, 2))
    plain, turns = (torch.fx.GraphModule(nn.Module(), torch.fx.Graph()) for _ in range(2))
    turns.graph.call_function(torch._C._set_grad_enabled, (True,))
    assert _training(plain, [w]) and not _training(plain, [w.detach(), 3]) and not torch.no_grad()(_training)(plain, [w])
    assert torch.no_grad()(_training)(turns, [w]) and not torch.no_grad()(_training)(turns, [w.detach()])


def test_a_copied_model_is_another_model(x):
    model = Net()
    fast = compiled(model, **W8)
    with torch.no_grad():
        fast(x)
        twin = copy.deepcopy(model)
        twin.up.weight.mul_(-1)
        assert close(compiled(twin, **W8)(x), rounded(twin)(x)) and close(fast(x), rounded(model)(x))


def test_a_compiled_model_can_be_copied_and_saved(x, tmp_path):
    model = Net()
    fast = compiled(model, **W8)
    with torch.no_grad():
        y = fast(x)
        assert close(copy.deepcopy(fast)(x), y)
    torch.save(fast.state_dict(), tmp_path / "state.pt")
    again = compiled(Net(), **W8)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    with torch.no_grad():
        assert close(again(x), y)


def test_nested_compile(x):
    """A compiled layer inside of a compiled model is one graph."""
    model = Stack(2)
    model.layers[0] = torch.compile(model.layers[0], backend="qcompile", options=W8)
    with torch.no_grad(), graphs() as seen:
        y = compiled(model, **W8)(x)
    twin = copy.deepcopy(model)
    twin.layers[0] = twin.layers[0]._orig_mod
    with torch.no_grad():
        assert close(y, rounded(twin)(x)) and seen
    assert sorted(n for g, _ in seen for n in g.kernels) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]


def test_threads_compile_at_once(x):
    import threading

    models, results = [Net() for _ in range(3)], {}

    def work(i):
        with torch.no_grad():
            results[i] = compiled(models[i], **W8)(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(close(results[i], rounded(models[i])(x).detach()) for i in range(3))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 32, 48))

    def forward(self, x):
        return torch.bmm(x, self.w)


@pytest.mark.parametrize(("options", "reason"), [({"recipe": "FP8"}, "no product of e4m3 and e4m3"), ({"weight": "int3.row"}, "codes of 4 or 8 bits, not 3")])
def test_emulated_experts_are_told_and_refused_under_strict(options, reason):
    model, x = Experts(), torch.randn(4, 5, 32)
    with torch.no_grad(), said() as texts:
        y = compiled(model, **options)(x)
        torch._dynamo.reset()
        assert close(y, compiled(model, lower="eager", **options)(x), 1e-3)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=f"1 linears are emulated.*{reason}"):
            compiled(model, strict=True, **options)(x)
    assert any(reason in t for t in texts)


@pytest.mark.parametrize("options", [{"recipe": "FP8"}, {"weight": "e4m3.row"}])
def test_an_old_gpu_under_strict(options, x, monkeypatch):
    """The decisions for a GPU without FP8, which need no GPU."""
    from qcompile.kernels.op import Case

    monkeypatch.setattr(sys.modules["qcompile.passes.lower"], "Case", lambda device, *rest: Case(torch.device("cuda"), *rest, capability=(8, 0)))
    with torch.no_grad(), graphs() as seen:
        compiled(Net(), lower="eager", **options)(x)
        assert all(isinstance(kernel, Skip) and "compute capability 8.9" in str(kernel) for kernel in seen[0][0].kernels.values())
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"2 linears are emulated.*compute capability 8\.9, this device has \(8, 0\)"):
            compiled(Net(), strict=True, lower="eager", **options)(x)


@pytest.mark.parametrize(("options", "early"), [({}, None), ({"mode": "reduce-overhead"}, True), ({"mode": "reduce-overhead", "inductor": {"triton.enable_pdl": False}}, False)])
def test_kernels_launch_early_where_cuda_graphs_are_asked_for(options, early, x, monkeypatch):
    """A launch that may begin early takes Triton's own launcher, which without a graph costs more than it gains."""
    from qcompile import compat

    seen = []
    monkeypatch.setattr(compat, "inductor", lambda gm, inputs, patches, table: seen.append(patches) or gm)
    with torch.no_grad():
        torch.compile(Net().eval(), backend="qcompile", options=options)(x)
    assert [patches.get("triton.enable_pdl") for patches in seen] == [early]
