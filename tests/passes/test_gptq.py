"""GPTQ against its definition: the optimal brain surgeon's step, column by column, with the inverse of what is left."""

from __future__ import annotations

import logging

import pytest
import torch
from correlated import SCHEMES, SHAPES, from_h, layer, second_moment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile.core.errors import OptionError, WeightError
from qcompile.core.formats import FORMATS, decode, encode
from qcompile.core.qtensor import dequantize, find_range, grid, grid_of, split_rows, unpack
from qcompile.core.scheme import Scheme
from qcompile.passes import adaround, gptq, rtn, sequential_mse
from qcompile.passes.method import output_error
from qcompile.passes.sequential_mse import clip_search

MODES = [{}, {"act_order": False}, {"act_order": False, "static_groups": True}, {"clip": True}]


def codes(q) -> Tensor:
    return unpack(q).view(torch.uint8)


def by_definition(w: Tensor, scheme: Scheme, h: Tensor, *, damping: float = 0.01, act_order: bool, static: bool) -> Tensor:
    """Codes of OBQ in a fixed order, float64: round a column, then move the open ones by ``-(w - q) Hinv_1 / Hinv_11``, Hinv the inverse of the open part of H."""
    n, k = w.shape
    c = scheme.extent(n, k)[1]
    h = h.double() + damping * h.double().diagonal().diag()
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(k)
    w, out = w.double().clone(), torch.empty(n, k, dtype=scheme.fmt.dtype)
    scale, zero = grid(w.float(), scheme).elements()
    for i, j in enumerate(order.tolist()):
        if not static and j % c == 0:
            group = w[:, j : j + c].float()
            s, z = grid_of(*find_range(group, scheme), scheme, group.shape).elements()
            scale[:, j : j + c] = s
            if zero is not None:
                zero[:, j : j + c] = z
        s, z = scale[:, j].double(), zero[:, j].double() if zero is not None else torch.zeros(())
        is_min = scheme.zero == "min"
        out[:, j] = encode((w[:, j] + z) / s if is_min else w[:, j] / s + z, scheme.fmt)
        value = decode(out[:, j], scheme.fmt).double()
        error = w[:, j] - (value * s - z if is_min else (value - z) * s)
        left = order[i:]
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, left[1:]] -= error[:, None] * (inverse[0, 1:] / inverse[0, 0])
    return out.view(torch.uint8)


@pytest.mark.parametrize("spelling", ["int4.g32", "uint4.g48.point", "uint3.g24.min", "nf4.g64", "e2m1.g16", "e4m3.tensor", "int8.b16x16", "int4.row", "uint4.g16.min/uint6.g8"])
@pytest.mark.parametrize("block", [1, 20, 128])
def test_blocks_and_cholesky_compute_the_definition(spelling, block):
    scheme = Scheme.parse(spelling)
    w, x = layer(24, 100)
    stats, h = second_moment(x), x.T @ x / len(x)
    nested = scheme.scale is not None
    for act_order, static in [(True, True), (False, True), *([] if nested else [(False, False)])]:
        q = gptq.solve(w, scheme, stats, damping=0.01, block=block, act_order=act_order, static_groups=static)
        torch.testing.assert_close(codes(q), by_definition(w, scheme, h, act_order=act_order, static=static), rtol=0, atol=0)


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_error_falls_and_weight_error_does_not(spelling, dtype):
    for n, k in SHAPES:
        w, x = layer(n, k, dtype=dtype)
        h, scheme, before = x.T @ x / len(x), Scheme.parse(spelling), w.clone()
        nearest = rtn.solve(w, scheme)
        plain = w - dequantize(nearest)
        for mode in MODES:
            q = gptq.solve(w, scheme, second_moment(x), **mode)
            delta = w - dequantize(q)
            assert output_error(delta, h) < 0.75 * output_error(plain, h), (n, k, mode)
            if all(torch.equal(a, b) for a, b in zip(q.flatten()[1:], nearest.flatten()[1:])):  # on the same grid nothing is nearer than the nearest
                assert delta.norm() >= plain.norm()
        assert torch.equal(w, before), "the weight was written to"


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("mode", [*MODES[:3], {"block": 7}])
def test_independent_channels_round_to_nearest(spelling, mode):
    scheme = Scheme.parse(spelling)
    for n, k in SHAPES:
        w, _ = layer(n, k)
        for h in (torch.eye(k), torch.diag(torch.rand(k) + 0.1)):
            a, b = gptq.solve(w, scheme, from_h(h), **mode), rtn.solve(w, scheme)
            assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a.flatten(), b.flatten()))


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_in_the_loop_is_decode_of_encode(name):
    fmt = FORMATS[name]
    values = sorted({float(v) for v in decode(torch.arange(2**fmt.bits, dtype=torch.uint8).view(fmt.dtype), fmt) if abs(v) < float("inf")})
    values = torch.tensor(values)
    middles = (values[1:] + values[:-1]) / 2
    edges = torch.cat([values, middles, torch.nextafter(middles, middles + 1), torch.nextafter(middles, middles - 1), torch.tensor([1e6, -1e6, 1e-30, -1e-30]), torch.randn(999)])
    want, got = decode(encode(edges, fmt), fmt), edges.clone()
    gptq.rounding(fmt, torch.device("cpu"))(got)
    assert torch.equal(want, got) and torch.equal(encode(got, fmt).view(torch.uint8), encode(edges, fmt).view(torch.uint8))


@pytest.mark.parametrize("spelling", ["int4.row", "nf4.row", "uint4.tensor.point"])
def test_the_order_of_channels_does_not_matter(spelling):
    w, x = layer(48, 200)
    shuffle = torch.randperm(200)
    a = gptq.solve(w, Scheme.parse(spelling), second_moment(x))
    b = gptq.solve(w[:, shuffle], Scheme.parse(spelling), second_moment(x[:, shuffle]))
    assert torch.equal(codes(a)[:, shuffle], codes(b))


def test_rows_are_independent_and_may_be_stacked():
    w, x = layer(96, 200)
    scheme = Scheme.parse("uint4.g64.point")
    both = gptq.solve(w, scheme, second_moment(x))
    for part, alone in zip(split_rows(both, [64, 32]), w.split([64, 32])):
        assert torch.equal(codes(part), codes(gptq.solve(alone, scheme, second_moment(x))))
    assert torch.equal(codes(both), codes(gptq.solve(w, scheme, second_moment(x)))), "not the same from run to run"


@pytest.mark.parametrize(
    "spellings, together",
    [
        (("int4.g64", "int4.g64"), True), (("nf4.g64/int8.row",) * 2, True), (("nf4.g64/int8.g256",), True), (("int4.g64", "int4.g32"), False),
        (("int8.b16x16",) * 2, False), (("int8.tensor",) * 2, False), (("e2m1.g16/e4m3.tensor",) * 2, False), ((), False),
    ],
)  # fmt: skip
def test_stackable(spellings, together):
    assert gptq.stackable([Scheme.parse(s) for s in spellings]) is together


def test_dead_channels_round_to_nearest_and_disturb_nobody():
    w, x = layer(48, 200)
    dead = torch.tensor([0, 17, 63, 64, 199])
    x[:, dead] = 0
    live = torch.ones(200, dtype=torch.bool)
    live[dead] = False
    scheme = Scheme.parse("int4.row")
    q, plain = gptq.solve(w, scheme, second_moment(x)), rtn.solve(w, scheme)
    assert torch.equal(codes(q)[:, dead], codes(plain)[:, dead])
    w[:, dead] = 0  # whatever they hold, others do not care (the scale is kept by the greatest weight)
    w[:, 0] = 9
    first = codes(gptq.solve(w, scheme, second_moment(x)))
    w[:, 17] = 3
    assert torch.equal(first[:, live], codes(gptq.solve(w, scheme, second_moment(x)))[:, live])


def test_few_tokens_and_outliers():
    for spelling in ("int4.g64", "int4.row"):
        w, x = layer(48, 200, tokens=5)
        x[:, 3] *= 1000
        h, scheme = x.T @ x / len(x), Scheme.parse(spelling)
        assert output_error(w - dequantize(gptq.solve(w, scheme, second_moment(x))), h) < output_error(w - dequantize(rtn.solve(w, scheme)), h)


def test_damping_rises_where_it_must(caplog):
    _, x = layer(1, 64, tokens=20)
    h = x.T @ x / len(x)
    assert gptq.propagation(h, 0.01)[1] == gptq.propagation(h, 0.01, damp="mean")[1] == 0.01
    t, used = gptq.propagation(h, 0.0)
    assert used > 0 and torch.equal(t.tril(), torch.eye(64))
    lowered = h - 0.05 * h.diagonal().diag()  # no second moment has a negative eigenvalue; one added up in 16 bits may
    with caplog.at_level(logging.WARNING, "qcompile.passes"):
        gptq.solve(torch.randn(8, 64), Scheme.parse("int4.row"), from_h(lowered), damping=0.01, name="layers.0.down")
    assert "layers.0.down" in caplog.text and "from 0.01 to 0.1" in caplog.text
    with pytest.raises(WeightError, match=r"layers.0.down.*not positive definite even with 1 "):
        gptq.propagation(torch.full((8, 8), -1.0) + 1.1 * torch.eye(8), 0.01, "layers.0.down")


def test_double_precision_before_more_damping():
    """A condition number that float32 cannot factor and float64 can."""
    q, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    h = q @ torch.diag(torch.logspace(0, -10, 64, dtype=torch.float64)) @ q.T
    assert gptq._unit_inverse(h.float(), h.diagonal().float()) is None and gptq._unit_inverse(h, h.diagonal()) is not None
    assert gptq.propagation(h, 1e-9)[1] == 1e-9


def test_dead_channels_alone_ask_for_no_damping():
    _, x = layer(1, 64)
    x[:, 9] = 0
    t, used = gptq.propagation(x.T @ x / len(x), 0.0)
    assert used == 0 and torch.equal(t[9], torch.eye(64)[9]) and torch.equal(t[:, 9], torch.eye(64)[9])


def test_only_zeros_seen(caplog):
    w, _ = layer(48, 96)
    q = gptq.solve(w, Scheme.parse("int4.g32"), from_h(torch.zeros(96, 96)))
    assert torch.equal(codes(q), codes(rtn.solve(w, Scheme.parse("int4.g32")))) and "only zeros" in caplog.text


def test_what_is_wrong_is_named():
    w, x = layer(64, 96)
    scheme, stats = Scheme.parse("int4.g32"), second_moment(x)
    bad = {"hessian": {**stats["hessian"], "sum": stats["hessian"]["sum"].clone()}}
    bad["hessian"]["sum"][4, 5] = float("nan")
    with pytest.raises(WeightError, match=r"layers\.1\.up has 1 entries that are NaN"):
        gptq.solve(w, scheme, bad, name="layers.1.up")
    with pytest.raises(WeightError, match=r"\(96, 96\).*\(64, 95\)"):
        gptq.solve(w[:, 1:], scheme, stats)
    with pytest.raises(WeightError, match="negative values on its diagonal"):
        gptq.solve(w, scheme, from_h(-torch.eye(96)))
    with pytest.raises(OptionError, match="block >= 1"):
        gptq.solve(w, scheme, stats, block=0)
    w[1, 2] = float("inf")
    with pytest.raises(WeightError, match=r"layers\.1\.up"):
        gptq.solve(w, scheme, stats, name="layers.1.up")


class Calls(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).removeprefix("aten.").partition(".")[0])
        return func(*args, **(kwargs or {}))


VIEWS = {"slice", "select", "unbind", "t", "view", "detach", "unsqueeze"}


@pytest.mark.parametrize("spelling", ["int4.g32", "uint4.g32.point", "uint4.g32.min/uint6.g8", "nf4.g32", "e2m1.g32", "e4m3.row"])
def test_the_loop_waits_for_nothing_and_launches_little(spelling):
    """What the host reads back does not grow with K, and a column costs at most eight kernels: on a GPU the loop is bound by launches."""
    counted = []
    for k in (256, 512):
        w, x = layer(16, k)
        with Calls() as calls:
            gptq.solve(w, Scheme.parse(spelling), second_moment(x))
        assert not {"nonzero", "masked_select", "unique"} & set(calls.names)
        counted.append((calls.names.count("_local_scalar_dense"), sum(name not in VIEWS for name in calls.names)))
    (waits, few), (more_waits, more) = counted
    assert waits == more_waits and (more - few) / 256 < 8.5


@pytest.mark.parametrize("solve", [gptq.solve, rtn.solve, sequential_mse.solve, adaround.solve])
@pytest.mark.parametrize("spelling", ["int4.g64", "e4m3.row"])
def test_parameters_in_half_precision(solve, spelling):
    w, x = layer(48, 200, dtype=torch.bfloat16)
    q = solve(torch.nn.Parameter(w.bfloat16()), Scheme.parse(spelling), second_moment(x))
    same = solve(w, Scheme.parse(spelling), second_moment(x))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) and not a.requires_grad for a, b in zip(q.flatten(), same.flatten()))


@pytest.mark.parametrize("rule", ["mse", "percentile"])
def test_ranges_come_from_the_rule(rule):
    w, x = layer(48, 192)
    w[0, :64] = torch.linspace(-1, 1, 64)
    w[0, 0] = 50
    scheme = Scheme.parse("int3.g64")
    plain, wide = rtn.solve(w, scheme, rule=rule), rtn.solve(w, scheme)
    assert rule == "percentile" or not torch.equal(plain.scale, wide.scale)
    assert torch.equal(gptq.solve(w, scheme, second_moment(x), rule=rule).scale, plain.scale)
    classic = gptq.solve(w, scheme, second_moment(x), rule=rule, act_order=False)
    assert torch.equal(classic.scale[:, 0], plain.scale[:, 0]) and not torch.equal(classic.scale[:, 1:], plain.scale[:, 1:])


def test_clip_starts_from_the_clipped_grid():
    w, x = layer(48, 200)
    scheme = Scheme.parse("int3.g64")
    q = gptq.solve(w, scheme, second_moment(x), clip=True)
    assert torch.equal(q.scale, clip_search(w, scheme, x.T @ x / len(x)).scale) and not torch.equal(q.scale, rtn.solve(w, scheme).scale)


@pytest.mark.parametrize("damp", ["channel", "mean"])
def test_damping_is_of_each_channel_or_of_the_mean(damp):
    """T from the explicit inverse of the damped H; by the channel it follows any scaling of the channels."""
    x = torch.randn(200, 24, dtype=torch.float64)
    h = x.T @ x / 200
    s = torch.logspace(-2, 2, 24, dtype=torch.float64)
    for scale in (torch.ones_like(s), s):
        scaled = h / scale / scale[:, None]
        added = scaled.diagonal() if damp == "channel" else scaled.diagonal().mean().expand(24)
        u = torch.linalg.cholesky(torch.linalg.inv(scaled + 0.01 * added.diag()), upper=True)
        want = u / u.diagonal()[:, None]
        assert torch.allclose(gptq.propagation(scaled, 0.01, damp=damp)[0].double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    if damp == "channel":
        assert torch.allclose(gptq.propagation(h / s / s[:, None], 0.01)[0].double() * s[:, None] / s, gptq.propagation(h, 0.01)[0].double(), rtol=1e-3, atol=1e-5)


def test_a_name_of_no_damping():
    with pytest.raises(OptionError, match="damp 'channel' or 'mean'"):
        gptq.solve(torch.randn(8, 16), Scheme.parse("int4.row"), from_h(torch.eye(16)), damp="median")
