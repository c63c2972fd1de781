"""Estimators: the forward is quantization bit for bit, gradients are those that the papers give, at the ends too."""

from __future__ import annotations

import pytest
import torch

from qcompile.core.errors import OptionError
from qcompile.core.estimators import ESTIMATORS, ends, fake_quantize, find_estimator, gradients
from qcompile.core.formats import FORMATS
from qcompile.core.qtensor import dequantize, nearest, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels.op import target
from qcompile.kernels.quantize import reference as quantized
from qcompile.kernels.scaled_linear import values

WEIGHTS = ("int4.g32", "int8.row", "uint4.g32.point", "nf4.g64/int8.row", "e4m3.tensor", "uint4.g32.min/uint6.g8", "e2m1.b16x16", "int2.g16", "fp4.g48")
INPUTS = ("int8.row", "int8.tensor", "uint8.row.point", "e4m3.row", "int8.g32")


@pytest.mark.parametrize("scheme", WEIGHTS)
@pytest.mark.parametrize("shape", [(48, 100), (3, 16, 64), (1, 7)])
def test_a_weight_is_what_quantize_makes_of_it(scheme, shape):
    w = torch.randn(shape)
    s = Scheme.parse(scheme)
    assert torch.equal(fake_quantize(w, [], s, "ste"), dequantize(quantize(w, s)))


@pytest.mark.parametrize("scheme", INPUTS)
def test_an_input_is_what_the_op_makes_of_it(scheme):
    x = torch.randn(2, 5, 100)
    s = Scheme.parse(scheme)
    codes, *scale = quantized(x, [], scheme)
    assert torch.equal(fake_quantize(x, [], s, "ste", True), values(codes, scale, s))


def test_ste_cuts_what_is_clipped_only():
    s, x = Scheme.parse("int8.tensor.static"), torch.tensor([[-3.0, -1.0, 0.3, 1.0, 1.003, 1.2]])
    dx, (nothing,) = gradients(torch.ones_like(x), x, [torch.tensor([-1.0, 1.0])], s, "ste", True)
    assert dx.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]] and nothing is None


def test_pact():
    s, alpha, x = Scheme.parse("int8.tensor.static"), torch.tensor([2.0]), torch.tensor([[-5.0, -2.0, -0.5, 0.5, 2.0, 7.0]])
    g = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    dx, (da,) = gradients(g, x, [alpha], s, "pact", True)
    assert dx.tolist() == [[0.0, 0.0, 4.0, 8.0, 0.0, 0.0]] and da.tolist() == [16.0 + 32.0 - 1.0 - 2.0]
    y = fake_quantize(x, [alpha], s, "pact", True)
    assert float(y.max()) == 2.0 and abs(float(y[0, 3]) - 0.5) < 2 / 127


def test_lsq_on_paper():
    """Equation 3 and the gradient scale of section 2.2, by hand: codes of 4 bits, one group of four values."""
    s, step = Scheme.parse("int4.row"), torch.tensor([[0.5]])
    x, g = torch.tensor([[-9.0, 0.6, 0.9, 9.0]]), torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    dx, (ds,) = gradients(g, x, [step], s, "lsq")
    assert dx.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert torch.allclose(ds, torch.tensor([[(-8 + (1 - 1.2) + (2 - 1.8) + 7) / (4 * 7) ** 0.5]]))


@pytest.mark.parametrize("scheme", ["int4.g32", "int2.g16", "int8.row", "e2m1.g16", "e4m3.row", "nf4.g32", "int4.b16x32"])
def test_lsq_in_float64(scheme):
    """Autograd through equations 1 and 2 of the paper, written with a straight-through rounding, in float64; some values are clipped."""
    s, x, g = Scheme.parse(scheme), torch.randn(64, 96), torch.randn(64, 96)
    step = (ESTIMATORS["lsq"].initial(x, s) * 0.6).bfloat16().float()  # as scales of groups are kept
    y = fake_quantize(x, [step], s, "lsq")
    dx, (ds,) = gradients(g, x, [step], s, "lsq")
    r, c = s.extent(*x.shape)
    leaves = [t.double().requires_grad_() for t in (x, step)]
    every = leaves[1].repeat_interleave(r, 0).repeat_interleave(c, 1)
    z = (leaves[0] / every).clamp(s.fmt.lo, s.fmt.hi)
    exact = every * (z + (y / every - z).detach())
    wanted = torch.autograd.grad((exact * g).sum(), leaves)
    assert bool((wanted[0] == 0).any())
    assert torch.allclose(dx.double(), wanted[0]) and torch.allclose(ds.double(), wanted[1] / (r * c * s.fmt.hi) ** 0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int4.g32", "int2.b16x24", "e2m1.g16"])
def test_ragged_groups_give_each_step_its_own_values(scheme):
    s, x, g = Scheme.parse(scheme), torch.randn(40, 70), torch.randn(40, 70)
    row = ESTIMATORS["lsq"]
    step = row.initial(x, s)
    _, (ds,) = gradients(g, x, [step], s, "lsq")
    r, c = s.extent(40, 70)
    for i, j in ((0, 0), (step.shape[0] - 1, step.shape[1] - 1)):
        part = (slice(i * r, (i + 1) * r), slice(j * c, (j + 1) * c))
        alone = Scheme.parse(f"{s.fmt}.b{r}x{c}")
        count = g[part].numel() / (r * c)
        _, (want,) = gradients(g[part], x[part], [step[i : i + 1, j : j + 1]], alone, "lsq")
        assert torch.allclose(ds[i, j], want[0, 0] * count**0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_ends_of_every_format(name):
    """What rounds to the greatest value lies below the end; what is clipped, beyond."""
    fmt = FORMATS[name]
    low, high = ends(fmt)
    assert low < fmt.lo or (fmt.kind == "int" and not fmt.signed)
    assert high > fmt.hi


@pytest.mark.parametrize("activation", [False, True])
def test_the_op_under_inductor_with_ugly_sizes(activation):
    op = target("fake_quant")
    scheme = "int8.row" if activation else "int4.g24"
    shape = (3, 5, 67) if activation else (33, 67)
    x = torch.randn(shape, requires_grad=True)
    learned = [] if activation else [(torch.rand(33, 3) * 0.2 + 0.1).requires_grad_()]
    g = torch.randn(shape)

    def run(x, *learned):
        return op(x, list(learned), scheme, "ste" if activation else "lsq", activation) * 2

    wanted = torch.autograd.grad((run(x, *learned) * g).sum(), [x, *learned])
    got = torch.autograd.grad((torch.compile(run, fullgraph=True)(x, *learned) * g).sum(), [x, *learned])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(wanted, got, strict=True))


def test_nearest():
    x = torch.randn(100_000) * torch.exp(torch.randn(100_000) * 20)
    assert torch.equal(nearest(x, 16), x.bfloat16().float())


def test_refusals():
    with pytest.raises(OptionError, match="unknown estimator 'ltq'"):
        find_estimator("ltq")
    with pytest.raises(OptionError, match="lsq learns a symmetric range"):
        fake_quantize(torch.randn(4, 8), [torch.ones(4, 1)], Scheme.parse("uint4.row.point"), "lsq")
    x = torch.empty(0, 8)
    assert fake_quantize(x, [], Scheme.parse("int8.row"), "ste", True).shape == x.shape
    assert gradients(x, x, [], Scheme.parse("int8.row"), "ste", True)[0].shape == x.shape
