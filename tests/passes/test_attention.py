"""``nn.MultiheadAttention`` becomes two linears and attention between them; what cannot is listed with the reason."""

from __future__ import annotations

import pytest
import torch
from captured import FOUND, captured, outputs, refusals, texts, through
from expecttest import assert_expected_inline
from torch import nn

from qcompile.passes import PASSES
from qcompile.passes.infra import run

X = torch.randn(2, 5, 64)


class Attention(nn.Module):
    """One call of nn.MultiheadAttention, whose second output is dropped."""

    def __init__(self, bias: bool = True, batch_first: bool = True, self_attention: bool = True, weights: bool = False, **call) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(64, 4, bias=bias, batch_first=batch_first).eval()
        self.self_attention, self.weights, self.call = self_attention, weights, call

    def forward(self, x):
        other = x if self.self_attention else x + 1
        y, w = self.mha(x, other, other, **self.call)
        return (y, w) if self.weights else y


@pytest.mark.parametrize("call", [{}, {"need_weights": False}])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_value(bias, batch_first, call):
    gm, args = captured(Attention(bias, batch_first, **call), X)
    after = run([PASSES[name] for name in FOUND], gm)
    assert list(after.meta["sites"]) == ["mha.in_proj_weight", "mha.out_proj"] and refusals(after) == []
    torch.testing.assert_close(outputs(after, args), outputs(gm, args))


def test_text():
    """torch 2.11 ends otherwise: without a copy of what it transposed."""
    older, newer = "y = linear_1.transpose(1, 0)\nreturn (y,)", "attn_output_1 = linear_1.transpose(1, 0)\nattn_output_2 = attn_output_1.contiguous()\nreturn (attn_output_2,)"
    assert_expected_inline(texts(FOUND, Attention(), X).replace(older, newer), """\
inputs: l_x_: float32[2, 5, 64]
query = l_x_.transpose(1, 0)
linear = linear(query, %mha.in_proj_weight, %mha.in_proj_bias)  # mha.in_proj_weight linear
narrow = linear.narrow(-1, 0, 64)
unflatten = narrow.unflatten(-1, (4, 16))
permute = unflatten.permute(1, 2, 0, 3)
narrow_1 = linear.narrow(-1, 64, 64)
unflatten_1 = narrow_1.unflatten(-1, (4, 16))
permute_1 = unflatten_1.permute(1, 2, 0, 3)
narrow_2 = linear.narrow(-1, 128, 64)
unflatten_2 = narrow_2.unflatten(-1, (4, 16))
permute_2 = unflatten_2.permute(1, 2, 0, 3)
scaled_dot_product_attention = scaled_dot_product_attention(permute, permute_1, permute_2)
permute_3 = scaled_dot_product_attention.permute(2, 0, 1, 3)
flatten = permute_3.flatten(2)
linear_1 = linear(flatten, %mha.out_proj.weight, %mha.out_proj.bias)  # mha.out_proj linear
attn_output_1 = linear_1.transpose(1, 0)
attn_output_2 = attn_output_1.contiguous()
return (attn_output_2,)""")


def test_refusals():
    mask = torch.zeros(5, 5)
    models = {
        "cross": Attention(self_attention=False),
        "weights": Attention(weights=True),
        "mask": Attention(attn_mask=mask),
        "padding": Attention(key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)),
        "encoder layer": nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval(),
    }
    lines = []
    for name, model in models.items():
        torch._dynamo.reset()
        gm = through(FOUND, model, X)
        lines.append("\n".join([f"{name}: sites {', '.join(gm.meta['sites']) or 'none'}", *refusals(gm)]))
    assert_expected_inline("\n".join(lines), """\
cross: sites none
mha.in_proj_weight (192, 64): multi_head_attention_forward whose query, key and value differ reads parts of one matrix
mha.out_proj.weight (64, 64): multi_head_attention_forward whose query, key and value differ reads parts of one matrix
weights: sites none
mha.in_proj_weight (192, 64): multi_head_attention_forward whose attention weights are read: call it with need_weights=False
mha.out_proj.weight (64, 64): multi_head_attention_forward whose attention weights are read: call it with need_weights=False
mask: sites none
mha.in_proj_weight (192, 64): multi_head_attention_forward with masks or added keys
mha.out_proj.weight (64, 64): multi_head_attention_forward with masks or added keys
padding: sites none
mha.in_proj_weight (192, 64): multi_head_attention_forward with masks or added keys
mha.out_proj.weight (64, 64): multi_head_attention_forward with masks or added keys
encoder layer: sites none
self_attn.in_proj_weight (192, 64): _transformer_encoder_layer_fwd is no linear layer: this fast path of nn.TransformerEncoderLayer is one operation; torch.backends.mha.set_fastpath_enabled(False) makes it a graph of linears
self_attn.out_proj.weight (64, 64): _transformer_encoder_layer_fwd is no linear layer: this fast path of nn.TransformerEncoderLayer is one operation; torch.backends.mha.set_fastpath_enabled(False) makes it a graph of linears
linear1.weight (96, 64): _transformer_encoder_layer_fwd is no linear layer: this fast path of nn.TransformerEncoderLayer is one operation; torch.backends.mha.set_fastpath_enabled(False) makes it a graph of linears
linear2.weight (64, 96): _transformer_encoder_layer_fwd is no linear layer: this fast path of nn.TransformerEncoderLayer is one operation; torch.backends.mha.set_fastpath_enabled(False) makes it a graph of linears""")


def test_the_slow_path_of_an_encoder_layer():
    """What the reason advises."""
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        gm, args = captured(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval(), X)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    after = run([PASSES[name] for name in FOUND], gm)
    assert len(after.meta["sites"]) == 4 and refusals(after) == []
    torch.testing.assert_close(outputs(after, args), outputs(gm, args))
