"""Sites become ops whose weights are inputs; what follows the product is plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captured import LOWERED, MATCHED, captured, context, through
from expecttest import assert_expected_inline
from torch import nn

from qcompile.core.errors import PassError, Skip
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.recipe import Recipe, Rule
from qcompile.core.scheme import Scheme
from qcompile.passes import PASSES
from qcompile.passes.infra import run, text
from qcompile.passes.sites import view


def lowered(model, *inputs, recipe="W8A8") -> str:
    """The graph's text; names of packed inputs are cut to the parameter's own."""
    return short(text(through(LOWERED, model, *inputs, recipe=recipe)))


def short(graph: str) -> str:
    import re

    return re.sub(r"l_self_(?:modules_)?((?:(?!_weight__|__)\w)*?)_?(?:parameters_)(\w*?)__(codes|scale|part\d|range)", r"\1.\2.\3", graph)


class QKV(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32, bias=False), nn.Linear(64, 64)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


X = torch.randn(2, 3, 64)


def test_kin_share_one_dynamic_quantization():
    assert_expected_inline(
        lowered(QKV(), X),
        """\
inputs: l_x_: float32[2, 3, 64], q.weight.codes: int8[64, 64], q.weight.scale: float32[64, 1], k.weight.codes: int8[32, 64], k.weight.scale: float32[32, 1], v.weight.codes: int8[64, 64], v.weight.scale: float32[64, 1]
quantize_default = qcompile.quantize(l_x_, [], 'int8.row')
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
scaled_linear_default = qcompile.scaled_linear(getitem, [getitem_1], [q.weight.codes, q.weight.scale], 'int8.row @ int8.row')  # q: int8.row @ int8.row
linear = add(scaled_linear_default, %q.bias)
linear_1 = qcompile.scaled_linear(getitem, [getitem_1], [k.weight.codes, k.weight.scale], 'int8.row @ int8.row')  # k: int8.row @ int8.row
scaled_linear_default_2 = qcompile.scaled_linear(getitem, [getitem_1], [v.weight.codes, v.weight.scale], 'int8.row @ int8.row')  # v: int8.row @ int8.row
linear_2 = add(scaled_linear_default_2, %v.bias)
return (linear, linear_1, linear_2)""",
    )


def test_kin_share_one_static_quantization():
    assert_expected_inline(
        lowered(QKV(), X, recipe="W8A8_STATIC"),
        """\
inputs: l_x_: float32[2, 3, 64], q.weight.codes: int8[64, 64], q.weight.scale: float32[64, 1], q.weight.range: float32[1], k.weight.codes: int8[32, 64], k.weight.scale: float32[32, 1], v.weight.codes: int8[64, 64], v.weight.scale: float32[64, 1]
quantize_default = qcompile.quantize(l_x_, [q.weight.range], 'int8.tensor.static')
getitem = getitem(quantize_default, 0)
scaled_linear_default = qcompile.scaled_linear(getitem, [q.weight.range], [q.weight.codes, q.weight.scale], 'int8.tensor.static @ int8.row')  # q: int8.tensor.static @ int8.row
linear = add(scaled_linear_default, %q.bias)
linear_1 = qcompile.scaled_linear(getitem, [q.weight.range], [k.weight.codes, k.weight.scale], 'int8.tensor.static @ int8.row')  # k: int8.tensor.static @ int8.row
scaled_linear_default_2 = qcompile.scaled_linear(getitem, [q.weight.range], [v.weight.codes, v.weight.scale], 'int8.tensor.static @ int8.row')  # v: int8.tensor.static @ int8.row
linear_2 = add(scaled_linear_default_2, %v.bias)
return (linear, linear_1, linear_2)""",
    )


def test_kin_with_other_schemes_have_their_own():
    rules = (Rule("k", "int4.g32", "int8.row"), Rule("v", "int8.row"))
    assert_expected_inline(
        lowered(QKV(), X, recipe=Recipe("mixed", "int8.row", "int8.tensor.static", rules)),
        """\
inputs: l_x_: float32[2, 3, 64], q.weight.codes: int8[64, 64], q.weight.scale: float32[64, 1], q.weight.range: float32[1], k.weight.codes: uint8[32, 64], k.weight.scale: bfloat16[32, 2], v.weight.codes: int8[64, 64], v.weight.scale: float32[64, 1]
quantize_default = qcompile.quantize(l_x_, [q.weight.range], 'int8.tensor.static')
getitem = getitem(quantize_default, 0)
scaled_linear_default = qcompile.scaled_linear(getitem, [q.weight.range], [q.weight.codes, q.weight.scale], 'int8.tensor.static @ int8.row')  # q: int8.tensor.static @ int8.row
linear = add(scaled_linear_default, %q.bias)
quantize_default_1 = qcompile.quantize(l_x_, [], 'int8.row')
getitem_1 = getitem(quantize_default_1, 0)
getitem_2 = getitem(quantize_default_1, 1)
linear_1 = qcompile.scaled_linear(getitem_1, [getitem_2], [k.weight.codes, k.weight.scale], 'int8.row @ int4.g32')  # k: int8.row @ int4.g32
linear_default = qcompile.linear(l_x_, [v.weight.codes, v.weight.scale], 'int8.row')  # v: int8.row
linear_2 = add(linear_default, %v.bias)
return (linear, linear_1, linear_2)""",
    )


class Cast(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.out(torch.relu(self.fc(x)))


def test_bias_and_cast_of_a_16_bit_model():
    assert_expected_inline(
        lowered(Cast().bfloat16(), X.bfloat16(), recipe="W4A16"),
        """\
inputs: l_x_: bfloat16[2, 3, 64], fc.weight.codes: uint8[32, 64], fc.weight.scale: bfloat16[32, 1], out.weight.codes: uint8[32, 64], out.weight.scale: bfloat16[32, 1]
linear_default = qcompile.linear(l_x_, [fc.weight.codes, fc.weight.scale], 'int4.g128')  # fc: int4.g128
add = add(linear_default, %fc.bias)
linear = add.to(bfloat16)
relu = relu(linear)
linear_default_1 = qcompile.linear(relu, [out.weight.codes, out.weight.scale], 'int4.g128')  # out: int4.g128
add_1 = add(linear_default_1, %out.bias)
linear_1 = add_1.to(bfloat16)
return (linear_1,)""",
    )


def test_casts_of_autocast_are_written_out():
    model = Cast()

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    gm, args = captured(call, X)
    after = run([PASSES[name] for name in LOWERED], gm, context(gm, args, "W8A16"))
    assert_expected_inline(
        short(text(after)),
        """\
inputs: l_x_: float32[2, 3, 64], l_model_modules_fc_parameters_weight__codes: int8[32, 64], l_model_modules_fc_parameters_weight__scale: float32[32, 1], l_model_modules_out_parameters_weight__codes: int8[32, 32], l_model_modules_out_parameters_weight__scale: float32[32, 1]
_enter_autocast = _enter_autocast('cpu', bfloat16, True, None)
to = l_x_.to(bfloat16)
linear_default = qcompile.linear(to, [l_model_modules_fc_parameters_weight__codes, l_model_modules_fc_parameters_weight__scale], 'int8.row')  # fc: int8.row
add = add(linear_default, %fc.bias)
linear = add.to(bfloat16)
relu = relu(linear)
linear_default_1 = qcompile.linear(relu, [l_model_modules_out_parameters_weight__codes, l_model_modules_out_parameters_weight__scale], 'int8.row')  # out: int8.row
add_1 = add(linear_default_1, %out.bias)
linear_1 = add_1.to(bfloat16)
_exit_autocast = _exit_autocast(_enter_autocast)
return (linear_1,)""",
    )


class Spellings(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.conv = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(32)), nn.Conv1d(64, 32, 1)

    def forward(self, x):
        flat = x.view(-1, 64)
        return torch.addmm(self.b, flat, self.w), F.linear(flat.double(), self.w.t().to(torch.float64)), self.conv(x.transpose(1, 2))


def test_transposes_casts_and_views_of_weights_are_gone():
    """One packed weight serves both uses of a parameter."""
    assert_expected_inline(
        lowered(Spellings(), X, recipe="W8A16"),
        """\
inputs: l_x_: float32[2, 3, 64], .w.codes: int8[32, 64], .w.scale: float32[32, 1], conv.weight.codes: int8[32, 64], conv.weight.scale: float32[32, 1]
flat = l_x_.view(-1, 64)
linear_default = qcompile.linear(flat, [.w.codes, .w.scale], 'int8.row')  # w: int8.row
addmm = add(linear_default, %b)
double = flat.double()
linear_default_1 = qcompile.linear(double, [.w.codes, .w.scale], 'int8.row')  # w@2: int8.row
linear = linear_default_1.to(float64)
transpose = l_x_.transpose(1, 2)
movedim = transpose.movedim(1, -1)
linear_default_2 = qcompile.linear(movedim, [conv.weight.codes, conv.weight.scale], 'int8.row')  # conv: int8.row
linear_3 = add(linear_default_2, %conv.bias)
movedim_1 = linear_3.movedim(-1, 1)
conv1d = movedim_1.contiguous()
return (addmm, linear, conv1d)""",
    )


class Experts(nn.Module):
    def __init__(self, form: str):
        super().__init__()
        self.form, self.w = form, nn.Parameter(torch.randn(4, 48, 64))

    def forward(self, x, ids):
        if self.form == "weight first":
            return torch.bmm(self.w[ids], x.unsqueeze(-1)).squeeze(-1)
        if self.form == "rows first":
            return torch.bmm(x.unsqueeze(1), self.w[ids].transpose(1, 2)).squeeze(1)
        if self.form == "dense":
            return torch.bmm(x.unsqueeze(0).expand(4, -1, -1), self.w.transpose(1, 2))
        return F.grouped_mm(x, self.w.transpose(1, 2), offs=ids)


IDS = torch.tensor([0, 2, 1, 1, 3])


@pytest.mark.parametrize("form", ["weight first", "rows first"])
def test_one_expert_for_each_row(form):
    graph = lowered(Experts(form), torch.randn(5, 64), IDS)
    assert "'int8.row @ int8.row', True)" in graph and "l_ids_" in graph and "bmm" not in graph.replace("bmm =", "").replace("bmm.", "")


def test_texts_of_experts():
    assert_expected_inline(
        lowered(Experts("weight first"), torch.randn(5, 64), IDS, recipe="W4A16"),
        """\
inputs: l_ids_: int64[5], l_x_: float32[5, 64], .w.codes: uint8[4, 48, 64], .w.scale: bfloat16[4, 48, 1]
unsqueeze = l_x_.unsqueeze(-1)
squeeze_1 = unsqueeze.squeeze(-1)
grouped_linear_default = qcompile.grouped_linear(squeeze_1, [], l_ids_, [.w.codes, .w.scale], 'int4.g128', True)  # w: int4.g128
bmm = grouped_linear_default.unsqueeze(-1)
squeeze = bmm.squeeze(-1)
return (squeeze,)""",
    )
    torch._dynamo.reset()
    assert_expected_inline(
        lowered(Experts("dense"), torch.randn(5, 64), IDS),
        """\
inputs: l_x_: float32[5, 64], .w.codes: int8[4, 48, 64], .w.scale: float32[4, 48, 1]
unsqueeze = l_x_.unsqueeze(0)
expand = unsqueeze.expand(4, -1, -1)
size = expand.size(1)
arange = arange(1, 5, dtype=int32, device=device(type='cpu'))
mul = mul(arange, size)
flatten = expand.flatten(0, 1)
quantize_default = qcompile.quantize(flatten, [], 'int8.row')
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
grouped_linear_default = qcompile.grouped_linear(getitem, [getitem_1], mul, [.w.codes, .w.scale], 'int8.row @ int8.row', False)  # w: int8.row @ int8.row
bmm = grouped_linear_default.unflatten(0, (4, -1))
return (bmm,)""",
    )
    torch._dynamo.reset()
    ends = torch.tensor([1, 3, 4, 5], dtype=torch.int32)
    assert_expected_inline(
        lowered(Experts("sorted").bfloat16(), torch.randn(5, 64).bfloat16(), ends, recipe="W8A16"),
        """\
inputs: l_x_: bfloat16[5, 64], l_ids_: int32[4], .w.codes: int8[4, 48, 64], .w.scale: float32[4, 48, 1]
grouped_linear_default = qcompile.grouped_linear(l_x_, [], l_ids_, [.w.codes, .w.scale], 'int8.row', False)  # w: int8.row
_grouped_mm = grouped_linear_default.to(bfloat16)
return (_grouped_mm,)""",
    )


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack, self.keep, self.fc = nn.Parameter(torch.randn(3, 32, 64)), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        y = self.fc(x)
        y.add_(1)  # its result is used by nothing: it must stay
        return F.linear(self.keep(y), self.stack[1]), F.linear(y, self.stack[1])


def test_what_keeps_16_bits_and_writes_stay():
    assert_expected_inline(
        lowered(Mixed(), X, recipe=Recipe("mixed", "int8.row", None, (Rule("keep"),))),
        """\
inputs: l_x_: float32[2, 3, 64], fc.weight.codes: int8[64, 64], fc.weight.scale: float32[64, 1], .stack.codes: int8[32, 64], .stack.scale: float32[32, 1]
linear_default = qcompile.linear(l_x_, [fc.weight.codes, fc.weight.scale], 'int8.row')  # fc: int8.row
y = add(linear_default, %fc.bias)
add_ = y.add_(1)
linear_1 = linear(y, %keep.weight, %keep.bias)  # keep: rule 'keep' keeps 16 bits
linear_2 = qcompile.linear(linear_1, [.stack.codes, .stack.scale], 'int8.row')  # stack: int8.row
linear_3 = qcompile.linear(y, [.stack.codes, .stack.scale], 'int8.row')  # stack@2: int8.row
return (linear_2, linear_3)""",
    )


def test_slots_and_kernels():
    gm = through(LOWERED, QKV(), X, recipe="W8A8_STATIC")
    assert [f"{slot.what} {slot.path} {slot.scheme}" for slot in gm.meta["slots"]] == [
        "weight q int8.row",
        "range q int8.tensor.static",
        "weight k int8.row",
        "weight v int8.row",
    ]
    assert set(gm.meta["kernels"]) == {"q", "k", "v"} and all(isinstance(kernel, str) for kernel in gm.meta["kernels"].values())


def test_a_scheme_without_a_kernel_says_so():
    gm = through(LOWERED, QKV(), X, recipe=Recipe("odd", "int8.row", "int8.row.point"))
    assert all(isinstance(k, Skip) for k in gm.meta["kernels"].values())
    assert "int8.row.point" in str(gm.meta["kernels"]["q"])


def test_lower_needs_a_plan():
    gm, args = captured(QKV(), X)
    with pytest.raises(PassError, match="pass 'lower' must run after match"):
        run([PASSES[name] for name in ("normalize", "find_sites", "lower")], gm, context(gm, args))


@pytest.mark.parametrize("model", [QKV(), Spellings(), Mixed()], ids=lambda m: type(m).__name__)
def test_the_graph_means_the_model_with_rounded_weights(model):
    gm, args = captured(model, X)
    planned = run([PASSES[name] for name in MATCHED], gm, context(gm, args, "W8A16"))
    after = run([PASSES["lower"]], planned, context(gm, args, "W8A16"), [_done("match")])
    slots = after.meta["slots"]
    packed = [t for slot in slots for t in quantize(view(args[slot.arg].detach(), slot.view), slot.scheme).flatten()]
    with torch.no_grad():
        got = after(*args, *packed)
        for slot in slots:
            matrix = view(args[slot.arg].data, slot.view)
            matrix.copy_(dequantize(quantize(matrix, Scheme.parse("int8.row")), matrix.dtype))
        want = gm(*args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _done(name: str):
    from qcompile.passes.infra import Step

    return Step(0, name, "", "", 0.0)
