"""Every way to write a linear becomes one; the others are listed with their reasons."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from captured import captured, outputs, refusals, texts, through
from expecttest import assert_expected_inline
from small import close
from torch import nn

import qcompile
from qcompile.passes import PASSES
from qcompile.passes.infra import run
from qcompile.passes.normalize import PRODUCTS


class Weight(nn.Module):
    """A function of x and parameters w (N x K), b, as a module."""

    def __init__(self, fn, *shape: int) -> None:
        super().__init__()
        self.fn, self.w, self.b = fn, nn.Parameter(torch.randn(shape or (32, 64))), nn.Parameter(torch.randn(32))

    def forward(self, x):
        return self.fn(x, self.w, self.b)


X = torch.randn(4, 64)
SPELLINGS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (32, 64)),
    "linear with names": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), (32, 64)),
    "linear with a cast": (lambda x, w, b: F.linear(x.double(), w.to(torch.float64)), (32, 64)),
    "Conv1D of transformers": (lambda x, w, b: torch.addmm(b, x.view(-1, x.size(-1)), w), (64, 32)),
    "addmm with names": (lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w.t()), (32, 64)),
    "matmul with T": (lambda x, w, b: x @ w.T, (32, 64)),
    "matmul with mT": (lambda x, w, b: torch.matmul(x, w.mT), (32, 64)),
    "matmul with transpose": (lambda x, w, b: torch.matmul(x, w.transpose(0, -1)), (32, 64)),
    "matmul with permute": (lambda x, w, b: torch.matmul(x, w.permute(1, 0)), (32, 64)),
    "matmul of K x N": (lambda x, w, b: x.reshape(2, 2, 64) @ w, (64, 32)),
    "mm": (lambda x, w, b: torch.mm(x, w), (64, 32)),
    "method mm": (lambda x, w, b: x.mm(w.t()) + b, (32, 64)),
    "inner": (lambda x, w, b: torch.inner(x, w), (32, 64)),
    "linalg.matmul": (lambda x, w, b: torch.linalg.matmul(x, w.t()), (32, 64)),
    "aten.linear": (lambda x, w, b: torch.ops.aten.linear(x, w, b) + torch.ops.aten.linear.default(x, w), (32, 64)),
    "aten.mm": (lambda x, w, b: torch.ops.aten.mm(x, w), (64, 32)),
    "reflected": (lambda x, w, b: w.__rmatmul__(x), (64, 32)),
    "first factor": (lambda x, w, b: (w @ x.t()).view(2, 64), (32, 64)),
    "first factor of a batch": (lambda x, w, b: torch.matmul(w.t(), x.reshape(2, 2, 64).transpose(1, 2)).view(2, 64), (64, 32)),
    "first factor of a vector": (lambda x, w, b: torch.matmul(w, x[0]), (32, 64)),
    "reflected first factor": (lambda x, w, b: x.t().__rmatmul__(w), (32, 64)),
    "one of stacked": (lambda x, w, b: x @ w[1] + x @ w[2].T.T, (3, 64, 32)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_become_linear_and_keep_their_value(name):
    fn, shape = SPELLINGS[name]
    gm, args = captured(Weight(fn, *shape), X)
    after = run([PASSES["normalize"]], gm)
    products = [n for n in after.graph.nodes if n.op != "placeholder" and n.target in PRODUCTS]
    assert products and {n.target for n in products} == {F.linear}
    assert refusals(after) == []
    for a, b in zip(outputs(gm, args), outputs(after, args), strict=True):
        assert torch.equal(a, b) or ("first factor" in name and close(a, b))  # sums in another order


def test_texts():
    def fn(x, w, b):
        a = torch.addmm(b, x, w)
        c = x @ w.transpose(0, 1).T
        return a, c, F.linear(input=x, weight=w.t(), bias=b)

    assert_expected_inline(
        texts(("normalize",), Weight(fn, 64, 32), X),
        """\
inputs: l_x_: float32[4, 64]
t_1 = %w.t()
a = linear(l_x_, t_1, %b)
transpose = %w.transpose(0, 1)
getattr_1 = getattr(transpose, 'T')
c = linear(l_x_, transpose, None)
t = %w.t()
linear = linear(l_x_, t, %b)
return (a, c, linear)""",
    )


def test_convolutions_with_a_kernel_of_one():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv1d(64, 32, 1), nn.Conv2d(32, 16, 1, bias=False)

        def forward(self, x):
            return self.two(self.one(x).unsqueeze(-1))

    gm, args = captured(Convolutions(), torch.randn(2, 64, 5))
    after = run([PASSES["normalize"]], gm)
    torch.testing.assert_close(outputs(after, args), outputs(gm, args))  # another order of sums than a convolution's
    assert_expected_inline(
        texts(("normalize",), Convolutions(), torch.randn(2, 64, 5)),
        """\
inputs: l_x_: float32[2, 64, 5]
movedim = l_x_.movedim(1, -1)
flatten = %one.weight.flatten(1)
linear = linear(movedim, flatten, %one.bias)
movedim_1 = linear.movedim(-1, 1)
conv1d = movedim_1.contiguous()
unsqueeze = conv1d.unsqueeze(-1)
movedim_2 = unsqueeze.movedim(1, -1)
flatten_1 = %two.weight.flatten(1)
linear_1 = linear(movedim_2, flatten_1, None)
movedim_3 = linear_1.movedim(-1, 1)
conv2d = movedim_3.contiguous()
return (conv2d,)""",
    )


REFUSED = {
    "beta": lambda x, w, b: torch.addmm(b, x, w.t(), beta=2),
    "matrix bias": lambda x, w, b: torch.addmm(x @ x.t() @ x[:, :32], x, w.t()),
    "first factor": lambda x, w, b: w.view(64, 32).view(32, 64) @ x.t(),
    "computed": lambda x, w, b: F.linear(x, w * 2),
    "einsum": lambda x, w, b: torch.einsum("mk,nk->nkm", x, w),
    "kernel of three": lambda x, w, b: F.conv1d(x[:, :32].t().unsqueeze(0), torch.stack([w[:, :32]] * 3, -1)),
    "stride": lambda x, w, b: F.conv1d(x.t().unsqueeze(0), w.unsqueeze(-1), stride=2),
    "bmm": lambda x, w, b: torch.bmm(x.unsqueeze(0), w.t().unsqueeze(0)),
}


def test_refusals_have_reasons():
    lines = [f"{name}: {'; '.join(refusals(through(('normalize',), Weight(fn), X))) or 'none'}" for name, fn in REFUSED.items()]
    assert_expected_inline(
        "\n".join(lines),
        """\
beta: w (32, 64): addmm with beta or alpha other than 1
matrix bias: w (32, 64): addmm whose first argument is not a bias vector
first factor: w (32, 64): the parameter is the first factor of the product
computed: w (32, 64): the weight is computed in the graph (mul)
einsum: w (32, 64): einsum 'mk,nk->nkm' has a matrix for each k
kernel of three: w (32, 64): a convolution whose weight is computed in the graph
stride: w (32, 64): a convolution whose weight is computed in the graph
bmm: w (32, 64): bmm is no linear layer""",
    )


MADE = {
    "weight norm": lambda x, w, b: F.linear(x, torch._weight_norm(w, w[:, :1])),
    "standardized": lambda x, w, b: F.linear(x, F.batch_norm(w.reshape(1, 32, -1), None, None, training=True).reshape_as(w)),
}


@pytest.mark.parametrize(("name", "how"), [("weight norm", "_weight_norm"), ("standardized", "reshape_as")])
def test_what_makes_a_weight_is_no_product(name, how):
    """The product behind it is listed, once."""
    assert refusals(through(("normalize",), Weight(MADE[name]), X)) == [f"w (32, 64): the weight is computed in the graph ({how})"]


def test_refusals_of_convolutions():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.padded, self.grouped = nn.Conv1d(64, 64, 3, padding=1), nn.Conv1d(64, 64, 1, padding=1), nn.Conv1d(64, 64, 1, groups=2)

        def forward(self, x):
            return self.grouped(self.padded(self.wide(x)))

    assert_expected_inline(
        "\n".join(refusals(through(("normalize",), Convolutions(), torch.randn(2, 64, 6)))),
        """\
wide.weight (64, 64, 3): a convolution with a kernel of 3
padded.weight (64, 64, 1): a convolution with padding, dilation or groups
grouped.weight (64, 32, 1): a convolution with padding, dilation or groups""",
    )


@pytest.mark.parametrize(("layer", "shape"), [
    (lambda: nn.Conv1d(64, 32, 1, stride=3), (2, 64, 8)), (lambda: nn.Conv2d(64, 32, 1, stride=2), (2, 64, 7, 6)), (lambda: nn.Conv2d(64, 32, 1, stride=(1, 3), bias=False), (2, 64, 4, 7)),
])  # fmt: skip
def test_a_stride_takes_some_places(layer, shape):
    """Shortcuts of residual networks."""
    model = nn.Sequential(layer(), nn.Flatten())
    gm, args = captured(model, torch.randn(shape))
    after = run([PASSES["normalize"]], gm)
    assert refusals(after) == [] and [n.target for n in after.graph.nodes if n.target in PRODUCTS] == [F.linear]
    for a, b in zip(outputs(gm, args), outputs(after, args), strict=True):
        assert close(a, b)


UNKNOWN = {
    "tensordot": lambda x, w, b: torch.tensordot(x, w, ([1], [1])),
    "mv": lambda x, w, b: torch.mv(w, x[0]),
    "multi_dot": lambda x, w, b: torch.linalg.multi_dot([x, w.t(), w]),
    "chain_matmul": lambda x, w, b: torch.chain_matmul(x, w.t(), w),
    "gru cell": lambda x, w, b: torch.gru_cell(x, x[:, :32], w.repeat(3, 1), w.repeat(3, 1)[:, :32]),
    "cdist": lambda x, w, b: torch.cdist(x, w),
}


def test_what_reads_a_matrix_is_listed():
    """Also by an operation that nobody has thought of; one that is known to be harmless is not."""
    lines = [f"{name}: {'; '.join(refusals(through(('normalize',), Weight(fn), X))) or 'none'}" for name, fn in UNKNOWN.items()]
    assert_expected_inline("\n".join(lines), """\
tensordot: w (32, 64): tensordot is no linear layer
mv: w (32, 64): mv is no linear layer
multi_dot: w (32, 64): linalg_multi_dot is no linear layer
chain_matmul: w (32, 64): chain_matmul is no linear layer
gru cell: w (32, 64): gru_cell is no linear layer
cdist: w (32, 64): cdist is no linear layer""")
    harmless = [lambda x, w, b: x + w[:4].float().abs(), lambda x, w, b: F.embedding(x[0].long().clamp(0, 31), w), lambda x, w, b: x.__radd__(w[:4]).add_(w[0])]
    torch._dynamo.reset()
    assert [refusals(through(("normalize",), Weight(fn), X)) for fn in harmless] == [[]] * 3


def test_a_buffer_is_listed():
    class Buffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.randn(32, 64))
            self.register_buffer("cache", torch.zeros(4, 64))

        def forward(self, x):
            self.cache.add_(x)
            return F.linear(x, self.w) + x @ self.w.t(), x @ self.cache.t()

    model = Buffer()
    assert refusals(through(("normalize",), model, X)) == ["w (32, 64): a buffer, no parameter"] * 2
    (first, second) = qcompile.explain(torch.compile(model, backend="qcompile", options={"lower": "eager"}), X).kept
    assert first.name == second.name == "w" and first.flops == 2 * 4 * 32 * 64


def test_a_pruned_weight_is_listed():
    """Its mask is a buffer, which neither hides it nor is listed beside it."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    report = qcompile.explain(torch.compile(model.requires_grad_(False), backend="qcompile", options={"lower": "eager"}), X)
    assert [(row.name, row.reason) for row in report.kept] == [("0.weight_orig", "the weight is computed in the graph (mul)")]
    assert report.totals.coverage == 1 / 3


def test_vectors_and_complex_weights_are_left_alone():
    """``F.linear`` takes a vector, too."""
    vector, spectrum = nn.Parameter(torch.randn(64), requires_grad=False), nn.Parameter(torch.randn(64, 32, dtype=torch.cfloat), requires_grad=False)
    torch._dynamo.reset()
    fast = torch.compile(lambda x: (F.linear(x, vector), x.cfloat() @ spectrum, F.linear(x.cfloat(), spectrum.t())), backend="qcompile", options={"lower": "eager", "weight": "int8.row"})
    torch.testing.assert_close(fast(X), (F.linear(X, vector), X.cfloat() @ spectrum, X.cfloat() @ spectrum))


def test_a_plain_tensor_is_listed():
    """An attribute that is no parameter; what is given to the call stays an activation."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.fc = torch.randn(64, 64), nn.Linear(64, 32).requires_grad_(False)

        def forward(self, x, other):
            return self.fc(x @ self.w + x @ other)

    (row,) = qcompile.explain(torch.compile(Plain(), backend="qcompile", options={"lower": "eager"}), X, torch.randn(64, 64)).kept
    assert row.name == "w" and row.reason.startswith("a plain tensor, no parameter")


class Cells(nn.Module):
    """Weights in torch's own layers, beside what has none."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(40, 32), nn.LayerNorm([5, 32])
        self.gru, self.rnn, self.bilinear = nn.GRUCell(32, 32), nn.RNNCell(32, 32), nn.Bilinear(32, 32, 16)
        self.encoder, self.conv = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True), nn.Conv3d(1, 2, 1)
        self.down = nn.ConvTranspose1d(5, 5, 2)

    def forward(self, ids):
        x = self.encoder(self.norm(self.table(ids)))
        y = self.rnn(self.gru(x[:, 0]))
        return self.bilinear(y, y), self.conv(x[:, None, None]), self.down(x)


def test_every_matrix_is_a_site_or_listed():
    model = Cells().eval()
    gm = through(("normalize", "find_sites"), model, torch.zeros(2, 5, dtype=torch.long))
    found = {site.param.path for site in gm.meta["sites"].values()} | {left.path for left in gm.meta["skipped"]}
    assert found == {name for name, p in model.named_parameters() if p.dim() >= 2 and not name.startswith(("table", "norm"))}


def test_products_of_activations_are_left_alone():
    gm = through(("normalize",), Weight(lambda x, w, b: (x @ x.t()) @ F.linear(x, w)), X)
    assert refusals(gm) == [] and [getattr(n.target, "__name__", "") for n in gm.graph.nodes].count("matmul") == 2


def test_names_stay():
    gm, _ = captured(Weight(lambda x, w, b: torch.relu(torch.addmm(b, x, w)), 64, 32), X)
    after = run([PASSES["normalize"]], gm)
    assert {n.name for n in gm.graph.nodes} <= {n.name for n in after.graph.nodes}
