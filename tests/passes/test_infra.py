"""Order is checked, failures name their pass, steps diff, and one text form is stable."""

from __future__ import annotations

import operator

import pytest
import torch
from captured import FOUND, MATCHED, captured, context, texts
from expecttest import assert_expected_inline
from torch import fx, nn

from qcompile.core.errors import OptionError, PassError
from qcompile.passes import PASSES, infra
from qcompile.passes.infra import Pass, Step, find, graph_pass, run, text, written_by


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(64, 32)), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc(torch.relu(x @ self.w))[..., 1:8:2]


X = torch.randn(4, 64)


def test_order_is_checked():
    gm, args = captured(Model(), X)
    with pytest.raises(PassError, match="pass 'match' must run after find_sites; before it ran: normalize"):
        run([PASSES["normalize"], PASSES["match"]], gm, context(gm, args))
    with pytest.raises(PassError, match="pass 'find_sites' must run after normalize; before it ran: nothing"):
        run([PASSES["find_sites"]], gm)


def test_steps_of_earlier_runs_count():
    gm, args = captured(Model(), X)
    steps: list[Step] = []
    found = run([PASSES[name] for name in FOUND], gm, None, steps)
    run([PASSES["match"]], found, context(gm, args), steps)
    assert [(s.index, s.name) for s in steps] == [(0, "normalize"), (1, "find_sites"), (2, "match")]


def test_a_failure_names_its_pass():
    gm, _ = captured(Model(), X)

    @graph_pass()
    def broken(gm: fx.GraphModule, context: object = None) -> fx.GraphModule:
        raise KeyError("this")

    with pytest.raises(PassError, match="pass 'broken' failed after normalize: KeyError: 'this'"):
        run([PASSES["normalize"], broken], gm)


def test_an_invalid_graph_is_refused():
    gm, _ = captured(Model(), X)

    @graph_pass()
    def invalid(gm: fx.GraphModule, context: object = None) -> fx.GraphModule:
        first = next(n for n in gm.graph.nodes if n.op != "placeholder")
        first.args = (gm.graph.find_nodes(op="output")[0].args[0][0], first.args[1])  # reads what comes later
        return gm

    with pytest.raises(PassError, match="pass 'invalid' failed after nothing"):
        run([invalid], gm)


def test_passes_get_their_own_copy():
    gm, _ = captured(Model(), X)
    before = text(gm)

    @graph_pass()
    def emptied(gm: fx.GraphModule, context: object = None) -> fx.GraphModule:
        for node in reversed(gm.graph.nodes):
            if node.op == "output":
                node.args = ((),)
            elif node.op != "placeholder":
                gm.graph.erase_node(node)
        return gm

    assert text(run([emptied], gm)).endswith("return ()")
    assert text(gm) == before


def test_find_lists_what_exists():
    assert find("lower", PASSES) is PASSES["lower"]
    with pytest.raises(OptionError, match=r"normalise.*normalize"):
        find("normalise", PASSES)


def test_step_diff():
    gm, _ = captured(Model(), X)
    steps: list[Step] = []
    run([PASSES[name] for name in FOUND], gm, None, steps)
    assert_expected_inline(
        steps[0].diff(),
        """\
-matmul = matmul(l_x_, %w)
+t = %w.t()
+matmul = linear(l_x_, t, None)""",
    )
    assert steps[0].changed == 3 and steps[1].note == "2 linears"
    assert str(steps[1]).startswith("01 find_sites")
    assert Step(0, "none", "a", "a", 0.0).diff() == "" and Step(0, "none", "a", "a", 0.0).changed == 0


def test_texts_and_code_are_made_where_they_are_read(monkeypatch):
    """Both cost seconds on a graph of thousands of nodes."""
    gm, _ = captured(Model(), X)
    made = []
    monkeypatch.setattr(infra, "text", lambda gm: made.append("text") or "")
    monkeypatch.setattr(infra.compat, "trace_artifact", lambda *_: None)  # torch's handler for traces stays until its first line
    monkeypatch.setattr(fx.Graph, "python_code", lambda *_, **__: made.append("code"))
    names = [PASSES[name] for name in FOUND]
    run(names, gm)
    assert made == []
    run(names, gm, None, [])
    assert made == ["text"] * (len(FOUND) + 1)


def test_a_copy_runs():
    gm, args = captured(Model(), X)
    assert torch.equal(run([PASSES[name] for name in FOUND], gm)(*args)[0], gm(*args)[0])


def test_text():
    assert_expected_inline(
        texts(MATCHED, Model(), X),
        """\
inputs: l_x_: float32[4, 64]
t = %w.t()
matmul = linear(l_x_, t, None)  # w: int8.row @ int8.row
relu = relu(matmul)
linear = linear(relu, %fc.weight, %fc.bias)  # fc: int8.row @ int8.row
getitem = getitem(linear, (Ellipsis, 1:8:2))
return (getitem,)""",
    )


def test_text_is_stable():
    first = texts(MATCHED, Model(), X)
    torch._dynamo.reset()
    assert texts(MATCHED, Model(), X) == first


def test_text_of_arguments():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(2, 3)
    a = graph.call_function(operator.getitem, (x, (slice(1, None, 2), None, ...)))
    b = graph.call_method("to", (a, torch.float16), {"copy": True})
    c = graph.call_function(torch.ops.aten.add.Tensor, (b, 1.5))
    graph.output([c, (b,)])
    assert_expected_inline(
        text(fx.GraphModule(nn.Module(), graph)),
        """\
inputs: x: float32[2, 3]
getitem = getitem(x, (1::2, None, Ellipsis))
to = getitem.to(float16, copy=True)
add_tensor = aten.add.Tensor(to, 1.5)
return [add_tensor, (to,)]""",
    )


def test_a_pass_is_a_value():
    assert Pass("a", PASSES["match"].fn, ("b",)).after == ("b",)
    assert all(name == p.name for name, p in PASSES.items())


@pytest.mark.parametrize(
    ("target", "written"),
    [
        (operator.setitem, "a"), (operator.iand, "a"), (operator.and_, ""), (operator.is_, ""), (torch.add, ""), ("add_", "a"), ("logical_and_", "a"), ("__iadd__", "a"), ("__add__", ""), ("requires_grad_", ""),
        (torch.ops.aten.copy_.default, "a"), (torch.relu_, "a"),
    ],
)  # fmt: skip
def test_what_a_call_writes_to(target, written):
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    node = graph.call_method(target, (a, b)) if isinstance(target, str) else graph.call_function(target, (a, b))
    assert [n.name for n in written_by(node)] == ([written] if written else [])


def test_what_a_call_writes_to_by_keyword():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    assert written_by(graph.call_function(torch.add, (a, b), {"out": b})) == [b]
    assert written_by(graph.call_function(torch.nn.functional.relu, (a,), {"inplace": True})) == [a]
    assert written_by(graph.call_function(torch._foreach_add_, ([a, b], 1))) == [a, b]
    assert written_by(a) == []
