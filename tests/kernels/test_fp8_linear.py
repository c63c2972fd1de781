"""The linear of FP8 training: its values and gradients are those of the quantized operands in float64, and Inductor computes what eager does."""

from __future__ import annotations

import statistics

import pytest
import torch

from qcompile import compat
from qcompile.kernels import OPS
from qcompile.kernels.fp8_history import BACK, E4M3, E5M2, NUMBERS, OVERFLOWS, POSITION, RECENT, RING, SCALE, entered, scales_reference
from qcompile.kernels.fp8_linear import SCALINGS, cast, kernel_for, largest
from qcompile.kernels.op import decompositions, target

LINEAR = target("fp8_linear")
HI = {E4M3: 448.0, E5M2: 57344.0}


def history(x, w, g=2.0**-4):
    """(numbers, state of gradients) of one linear whose scales are those of its operands."""
    scale = torch.tensor([448 / float(x.abs().max()), 448 / float(w.abs().max()), 57344 / g])
    numbers = torch.cat([scale, torch.zeros(1), torch.nn.functional.pad((1 / scale)[:, None], (0, BACK - 1)).flatten()])[None]
    assert numbers.shape == (1, NUMBERS)
    return [numbers], [torch.zeros(1, 1, RING + 3)]


def codes(t, dtype, axis=None, scale=None):
    """What the definition multiplies, float64: the value under its scale, rounded, and back."""
    t = t.float()
    amax = t.abs().amax() if axis is None else t.abs().amax(axis, keepdim=True)
    s = (HI[dtype] / amax if scale is None else scale).double()
    return (t * s.float()).clamp(-HI[dtype], HI[dtype]).to(dtype).double() / s


def expected(x, w, g, scaling, numbers):
    """(y, dx, dw) in float64 on the quantized operands."""
    how = SCALINGS[scaling]
    x, g = x.detach().reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if how.by_row:
        y = codes(x, E4M3, -1) @ codes(w, E4M3, -1).T
        return y, codes(g, how.gradient, -1) @ codes(w, E4M3, 0), codes(g, how.gradient, 0).T @ codes(x, E4M3, 0)
    sx, sw, sg = numbers[0][0, :3] if how.delayed else (None, None, None)
    qx, qw, qg = codes(x, E4M3, scale=sx), codes(w, E4M3, scale=sw), codes(g, how.gradient, scale=sg)
    return qx @ qw.T, qg @ qw, qg.T @ qx


def apart(a, b):
    return float((a.detach().double().reshape(b.shape) - b).norm() / b.norm())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 17), (33,), (1, 16)])
def test_values_and_gradients(scaling, dtype, shape):
    x, w = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(19, shape[-1]).to(dtype).requires_grad_()
    numbers, state = history(x.detach(), w.detach()) if scaling == "delayed" else ([], [])
    y = LINEAR(x, w, numbers, state, 0, 0, scaling)[0]
    g = (torch.randn(y.shape) / 64).to(dtype)
    y.backward(g)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert (y.dtype, y.shape, x.grad.shape) == (dtype, (*shape[:-1], 19), x.shape)
    for got, want in zip((y, x.grad, w.grad), expected(x, w.detach(), g, scaling, numbers)):
        assert apart(got, want) < tolerance


def compiled(fn, *args):
    def backend(gm, inputs):
        return compat.inductor(gm, inputs, {}, decompositions(OPS))

    return torch.compile(fn, backend=backend, fullgraph=True)(*args)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_inductor_computes_the_same(scaling):
    """Forward, backward and what is written to the state, at sizes that are no multiples of anything; a bfloat16 product may round its sum the other way."""
    results = []
    for run in (lambda fn, *args: fn(*args), compiled):
        torch.manual_seed(0)
        x, w = torch.randn(3, 7, 37, requires_grad=True), torch.randn(21, 37, requires_grad=True)
        numbers, state = history(x.detach(), w.detach()) if scaling == "delayed" else ([], [])
        y = run(lambda x, w, *rest: LINEAR(torch.nn.functional.silu(x), w, list(rest[:1]), list(rest[1:]), 0, 0, scaling)[0].square(), x, w, *numbers, *state)
        y.sum().backward()
        results.append([y.detach(), x.grad, w.grad, *state])
    assert all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(*results))


@pytest.mark.parametrize(("x_grad", "w_grad"), [(True, False), (False, True)])
def test_only_what_is_asked_for(x_grad, w_grad):
    x, w = torch.randn(4, 32, requires_grad=x_grad), torch.randn(16, 32, requires_grad=w_grad)
    y = LINEAR(x, w, [], [], 0, 0, "tensor")[0]
    saved = y.grad_fn.saved_tensors
    assert len(saved) == 2 and all(t.dtype in (E4M3, torch.float32) and t.shape in ((4, 32), (16, 32), (1, 1)) for t in saved)  # codes, no 16-bit tensor
    y.sum().backward()
    assert ((x.grad is not None), (w.grad is not None)) == (x_grad, w_grad)


def test_no_rows():
    x, w = torch.randn(0, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    y = LINEAR(x, w, [], [], 0, 0, "tensor")[0]
    y.sum().backward()
    assert y.shape == (0, 16) and x.grad.shape == (0, 32) and not w.grad.any()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(scaling, bad):
    """Not clipped away: a loss scaler has to see it."""
    x, w = torch.randn(4, 32), torch.randn(16, 32)
    numbers, state = history(x, w) if scaling == "delayed" else ([], [])
    x[1, 2] = bad
    y = LINEAR(x, w, numbers, state, 0, 0, scaling)[0]
    assert y[1].isnan().all()
    if scaling != "tensor":  # there the scale itself is not finite
        assert y[0].isfinite().all()


def test_a_tensor_of_zeros():
    y = LINEAR(torch.zeros(4, 32), torch.randn(16, 32), [], [], 0, 0, "tensor")[0]
    assert not y.any()


def test_values_beyond_a_given_scale_saturate():
    assert cast(torch.tensor([1e6, -1e6, 1.0]), torch.tensor(1.0), E4M3, True).float().tolist() == [448, -448, 1]


def test_largest():
    x = torch.randn(5, 7)
    assert largest(x).shape == (1, 1) and float(largest(x)) == float(x.abs().max())
    assert torch.equal(largest(x, -1), x.abs().amax(1, keepdim=True)) and torch.equal(largest(x, 0), x.abs().amax(0, keepdim=True))


# --- histories -----------------------------------------------------------------------------------------------------------


class Plain:
    """Delayed scaling in plain Python: one operand."""

    def __init__(self, length, margin, leap, hi, scale=1.0):
        self.seen, self.length, self.margin, self.leap, self.hi, self.scale, self.overflows = [], length, margin, leap, hi, scale, 0

    def next(self):
        m = max(self.seen[-self.length :], default=0.0)
        recent = [x for x in self.seen[-min(RECENT, self.length) :] if x > 0]
        if self.leap and recent:
            m = min(m, 2.0**self.leap * statistics.geometric_mean(recent))
        self.scale = self.hi / m / 2**self.margin if m > 0 else self.scale
        return self.scale

    def see(self, amax):
        finite = amax == amax and amax != float("inf")
        self.overflows += not finite or amax * self.scale > self.hi * (1 + 2**-10)
        self.seen.append(amax if finite else 0.0)


@pytest.mark.parametrize(("length", "margin", "leap"), [(1, 0, 0), (1, 3, 6), (2, 3, 0), (4, 0, 3), (4, 3, 6)])
def test_scales_follow_the_rule(length, margin, leap):
    """Two linears over some calls: the ring goes round, a call sees inf, one NaN, some nothing at all, one far more than usual."""
    forward, backward = torch.zeros(2, 2, RING + length), torch.zeros(2, 1, RING + length)
    forward[..., SCALE], backward[..., SCALE] = 1.0, 2.0**16
    plain = [[Plain(length, margin, leap, 448.0), Plain(length, margin, leap, 448.0), Plain(length, margin, leap, 57344.0, 2.0**16)] for _ in range(2)]
    special = {3: float("inf"), 5: float("nan"), 7: 0.0, 8: 0.0, 9: 0.0, 10: 0.0, 11: 1e5, 16: 1e5}
    for call in range(18):
        numbers = scales_reference(forward, backward, margin, True, leap)
        assert torch.equal(numbers[:, BACK::BACK], 1 / numbers[:, :3]) and int(numbers[0, 3]) == (call + 1) % length
        amax = torch.rand(2, 3) * 10 + 0.1
        amax[1] = special.get(call, amax[1, 0])
        for row, mine in enumerate(plain):
            assert numbers[row, :3].tolist() == pytest.approx([p.next() for p in mine], rel=1e-6)
            for p, a in zip(mine, amax[row].tolist()):
                p.see(a)
        forward = OPS["fp8_record"].reference(forward, numbers, list(amax[:, :2]))
        backward = entered(backward, numbers[:, 2:3], numbers[:, 3:4], amax[:, 2:], 57344.0)
    counts = torch.cat([forward, backward], 1)[..., OVERFLOWS]
    assert counts.tolist() == [[p.overflows for p in mine] for mine in plain] and counts.sum() > 0
    assert (forward[..., POSITION] == 18 % length).all()


@pytest.mark.parametrize("length", [4, 20, 64])
def test_one_call_moves_scales_by_a_leap_and_a_lasting_change_is_followed(length):
    """A call of 1e9 times the usual counts as 64 times the usual, which it raises itself for 16 calls, whenever it comes; what stays is the usual soon. A ring of 20 has gone round."""

    def greatest(calls, leap):
        """What the next scales bring to the greatest value of their formats."""
        forward, backward = torch.zeros(1, 2, RING + length), torch.zeros(1, 1, RING + length)
        for amax in calls:
            numbers = scales_reference(forward, backward, 0, False, leap)
            forward = OPS["fp8_record"].reference(forward, numbers, [torch.full((2,), amax)])
            backward = entered(backward, numbers[:, 2:3], numbers[:, 3:4], torch.full((1, 1), amax), 57344.0)
        found = torch.tensor([448.0, 448.0, 57344.0]) / scales_reference(forward, backward, 0, False, leap)[0, :3]
        assert torch.allclose(found, found[:1].expand(3), rtol=1e-5)
        return float(found[0])

    usual, spike = [1e-4], [1e5]
    recent = min(RECENT, length)
    assert greatest(20 * usual + spike, 0) == pytest.approx(1e5)
    assert greatest(20 * usual + spike, 6) == pytest.approx(64 * 1e-4 * 1e9 ** (1 / recent), rel=1e-4)  # it is one of those that say what is usual, too
    assert greatest(spike + 40 * usual, 6) == pytest.approx(1e-4 if length < 41 else 64e-4, rel=1e-4)
    assert greatest(20 * usual + (recent - 1) * spike, 6) == pytest.approx(1e5 if length > RECENT else 64e5 * 1e-9 ** (1 / 4), rel=1e-4)
    assert greatest(20 * usual + recent * spike, 6) == pytest.approx(1e5)


# --- the library ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "n", "k", "why"), [((9, 0), 64, 128, None), ((8, 9), 16, 16, None), ((8, 0), 64, 128, "8.9"), ((9, 0), 64, 120, "multiples of 16")])
def test_where_the_library_multiplies(monkeypatch, capability, n, k, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = kernel_for(torch.device("cuda"), torch.bfloat16, n, k)
    assert found == "scaled_mm" if why is None else why in str(found)


def test_a_cpu_emulates():
    assert "no kernel for cpu" in str(kernel_for(torch.device("cpu"), torch.float32, 64, 64))
