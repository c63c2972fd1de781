"""Where a factor for each channel of an input may go: which place each architecture gives, and that a model's function is untouched there.

Vectors of powers of two make the check exact: every rounding on the way commutes with them, so that outputs must agree bit by bit.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from captured import FOUND, captured, context
from expecttest import assert_expected_inline
from tiny_models import TINY, tiny
from torch import nn

from qcompile import compat
from qcompile.core.errors import PassError
from qcompile.passes import PASSES
from qcompile.passes.infra import clone, run
from qcompile.passes.observe import input_of
from qcompile.passes.producers import Place, _by_column, apply, place, shared

pytestmark = pytest.mark.xdist_group("producers")  # a worker keeps what it captured


def found(model, *inputs, dynamic=None):
    """(graph with its sites, Dynamo's inputs)."""
    gm, args = captured(model, *inputs, dynamic=dynamic)
    return run([PASSES[name] for name in FOUND], gm, context(gm, args)), args


@functools.lru_cache(None)
def found_tiny(name, **changes):
    """Captured once for all tests: what they do, they do to clones."""
    model, inputs = tiny(name, dtype=torch.float64, **changes)
    names = list(inputs)
    return found(lambda *values: model(**dict(zip(names, values))), *inputs.values())


def groups(gm) -> list[tuple[str, ...]]:
    """Kin groups, in the order of the graph."""
    done: list[tuple[str, ...]] = []
    for site in gm.meta["sites"].values():
        if not any(site.name in group for group in done):
            done.append((site.name, *site.kin))
    return done


def table(gm) -> str:
    """One line for each group; layers, and nodes' names, that differ only in a number are shown once."""
    lines = [f"{', '.join(name.rpartition('.')[2] for name in group)}: {place(gm, group).why}" for group in groups(gm)]
    return "\n".join(dict.fromkeys(re.sub(r"\.\d+\b", ".i", re.sub(r"_\d+(?=\)| is also)", "", line)) for line in lines))


def powers(k: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-4, 5, (k,)).double()


def moved(gm, args, vectors, undo=True):
    """(graph, args): the vectors put at the places of their groups, and, with ``undo``, the inputs that the sites read divided by them again."""
    gm = clone(gm)
    args = list(args)
    places = {group: place(gm, group) for group in vectors}
    like = next(n for n in gm.graph.nodes if n.op == "placeholder")
    mode = gm.meta["test_fake_mode"]
    for i, (group, make) in enumerate(vectors.items()):
        v = shared(make(gm.meta["sites"][group[0]].k), places[group])
        vector, inverse = (compat.add_static_input(gm, f"{what}_{i}", mode.from_tensor(t), like) for what, t in (("v", v), ("u", 1 / v)))
        args += [v, 1 / v]
        apply(gm, places[group], group, vector)
        readers = [n for n in gm.graph.nodes if n.meta.get("site") in group]
        for reader in readers if undo else ():
            x = input_of(reader)
            with gm.graph.inserting_before(reader):
                factor = gm.graph.call_method("unsqueeze", (inverse, -1)) if _by_column(reader) else inverse
                back = gm.graph.call_function(torch.mul, (x, factor))
                reader.replace_input_with(x, gm.graph.call_method("to", (back, x.meta["example_value"].dtype)))
    gm.graph.lint()
    gm.recompile()
    return gm, args


def flat(gm, args):
    """Tensors that the graph returns, on inputs that it may write to."""
    with torch.no_grad():
        out = gm(*[int(a) if isinstance(a, torch.SymInt) else a if isinstance(a, nn.Parameter) else a.clone() for a in args])
    return [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]


def unchanged(gm, args, make=powers, tolerance=0.0):
    """Both that the function is the same and that the vectors reach the sites: left in, they change it."""
    truth = flat(gm, args)
    vectors = dict.fromkeys(groups(gm), make)
    for a, b in zip(truth, flat(*moved(gm, args, vectors)), strict=True):
        assert a.dtype == b.dtype
        if tolerance:
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()))
        else:
            assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(truth, flat(*moved(gm, args, vectors, undo=False))))


@pytest.mark.parametrize("name", TINY)
def test_the_function_is_untouched(name):
    gm, args = found_tiny(name, use_cache=False)
    unchanged(gm, args)
    for group in groups(gm):
        if len(group) > 1:  # x of a part of the kin may not change for the others
            assert place(gm, group[1:]).kind == "multiply"


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_with_a_cache_that_the_graph_returns(name):
    gm, args = found_tiny(name)
    unchanged(gm, args)
    kinds = {place(gm, group).kind for group in groups(gm) if "o_proj" in group[0]}
    assert kinds == ({"rows"} if name == "deepseek_v3" else {"multiply"})  # deepseek caches what its values are computed from


@pytest.mark.parametrize("changes", [{}, {"attn_implementation": "eager"}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_attention_fused_and_written_out(name, changes):
    gm, args = found_tiny(name, use_cache=False, **changes)
    assert {place(gm, (s,)).kind for s in gm.meta["sites"] if s.endswith(("o_proj", "attn.c_proj", "attention.dense"))} == {"rows"}
    unchanged(gm, args)


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "vit"])
def test_any_positive_vector(name):
    """Without casts to float32 on the way, real vectors change nothing but the last digits."""
    gm, args = found_tiny(name, use_cache=False)
    unchanged(gm, args, lambda k: torch.rand(k).double() * 4 + 0.1, 1e-12)


def test_experts_row_by_row():
    unchanged(*found_tiny("mixtral", use_cache=False, experts_implementation="batched_mm"))


def test_llama():
    assert_expected_inline(
        table(found_tiny("llama", use_cache=False)[0]),
        """\
q_proj, k_proj, v_proj: folded into the norm model.layers.i.input_layernorm
o_proj: in the rows of model.layers.i.self_attn.v_proj through repeated heads
gate_proj, up_proj: folded into the norm model.layers.i.post_attention_layernorm
down_proj: in the rows of model.layers.i.mlp.up_proj
lm_head: folded into the norm model.norm""",
    )


def test_llama_with_a_cache():
    assert_expected_inline(
        table(found_tiny("llama")[0]),
        """\
q_proj, k_proj, v_proj: folded into the norm model.layers.i.input_layernorm
o_proj: kept as a multiply: cat (values) lies between, as a cache has
gate_proj, up_proj: folded into the norm model.layers.i.post_attention_layernorm
down_proj: in the rows of model.layers.i.mlp.up_proj
lm_head: folded into the norm model.norm""",
    )


def test_gpt2():
    assert_expected_inline(
        table(found_tiny("gpt2", use_cache=False)[0]),
        """\
c_attn: folded into the norm transformer.h.i.ln_1
c_proj: in the rows of transformer.h.i.attn.c_attn
c_fc: folded into the norm transformer.h.i.ln_2
c_proj: kept as a multiply: x is also read by pow (pow)
wte: folded into the norm transformer.ln_f""",
    )


def test_opt():
    assert_expected_inline(
        table(found_tiny("opt", use_cache=False, do_layer_norm_before=True)[0]),
        """\
project_in: kept as a multiply: embedding (inputs_embeds) does not commute with a factor for each channel
q_proj, k_proj, v_proj: folded into the norm model.decoder.layers.i.self_attn_layer_norm
out_proj: in the rows of model.decoder.layers.i.self_attn.v_proj
fc1: folded into the norm model.decoder.layers.i.final_layer_norm
fc2: in the rows of model.decoder.layers.i.fc1
project_out: folded into the norm model.decoder.final_layer_norm
embed_tokens: in the rows of model.decoder.project_out""",
    )


def test_bert():
    assert_expected_inline(
        table(found_tiny("bert", use_cache=False)[0]),
        """\
query, key, value: kept as a multiply: x is also read by add (add) (residual stream)
dense: in the rows of bert.encoder.layer.i.attention.self.value
dense: kept as a multiply: x is also read by add (add) (residual stream)
dense: kept as a multiply: gelu (hidden_states) does not commute with a factor for each channel
dense: folded into the norm bert.encoder.layer.i.output.LayerNorm
word_embeddings: folded into the norm cls.predictions.transform.LayerNorm""",
    )


def test_t5():
    assert_expected_inline(
        table(found_tiny("t5", use_cache=False)[0]),
        """\
q, k, v: folded into the norm encoder.block.i.layer.i.layer_norm
o: in the rows of encoder.block.i.layer.i.SelfAttention.v
wi_0, wi_1: folded into the norm encoder.block.i.layer.i.layer_norm
wo: in the rows of encoder.block.i.layer.i.DenseReluDense.wi_1
q, k, v: folded into the norm decoder.block.i.layer.i.layer_norm
o: in the rows of decoder.block.i.layer.i.SelfAttention.v
q: folded into the norm decoder.block.i.layer.i.layer_norm
k, v, k, v: kept as a multiply: x is also read by the output of the graph
o: in the rows of decoder.block.i.layer.i.EncDecAttention.v
wi_0, wi_1: folded into the norm decoder.block.i.layer.i.layer_norm
wo: in the rows of decoder.block.i.layer.i.DenseReluDense.wi_1
embed_tokens: folded into the norm decoder.final_layer_norm""",
    )


def test_gemma3():
    assert_expected_inline(
        table(found_tiny("gemma3", use_cache=False)[0]),
        """\
q_proj, k_proj, v_proj: folded into the norm model.layers.i.input_layernorm
o_proj: in the rows of model.layers.i.self_attn.v_proj through repeated heads
gate_proj, up_proj: folded into the norm model.layers.i.pre_feedforward_layernorm
down_proj: in the rows of model.layers.i.mlp.up_proj
embed_tokens: folded into the norm model.norm""",
    )


def test_mixtral():
    """Who reads the experts' input beside them differs between versions of transformers."""
    assert_expected_inline(
        table(found_tiny("mixtral", use_cache=False)[0]).replace("masked_fill_ (masked_fill_)", "to (to)"),
        """\
q_proj, k_proj, v_proj: folded into the norm model.layers.i.input_layernorm
o_proj: in the rows of model.layers.i.self_attn.v_proj through repeated heads
gate: kept as a multiply: selected_hidden_states_g is also read by to (to)
gate_up_proj: kept as a multiply: hidden_states is also read by model.layers.i.mlp.gate
down_proj: in the rows of model.layers.i.mlp.experts.gate_up_proj
lm_head: folded into the norm model.norm""",
    )


def test_vit():
    assert_expected_inline(
        table(found_tiny("vit", use_cache=False)[0]),
        """\
q_proj, k_proj, v_proj: folded into the norm vit.layers.i.layernorm_before
o_proj: in the rows of vit.layers.i.attention.v_proj
fc1: folded into the norm vit.layers.i.layernorm_after
fc2: kept as a multiply: gelu (hidden_states) does not commute with a factor for each channel
classifier: folded into the norm vit.layernorm""",
    )


# --- small graphs, one thing each ----------------------------------------------------------------------------------------


class Two(nn.Module):
    """``b(act(a(x)))``."""

    def __init__(self, act, n=48):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(32, n), nn.Linear(48, 16), act

    def forward(self, x):
        return self.b(self.act(self.a(x)))


def only(act, n=48, site="b", dynamic=None) -> tuple[Place, object, list]:
    gm, args = found(Two(act, n).double(), torch.randn(2, 5, 32).double(), dynamic=dynamic)
    return place(gm, (site,)), gm, args


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (F.relu, "rows"),
        (lambda x: F.relu(x, inplace=True), "rows"),
        (F.leaky_relu, "rows"),
        (lambda x: -x / 3 * 0.5, "rows"),
        (lambda x: F.dropout(x, 0.3, False), "rows"),
        (lambda x: x.float().double().contiguous(), "rows"),
        (lambda x: x.masked_fill(torch.arange(5)[:, None] > 2, 0.0), "rows"),
        (lambda x: torch.masked_fill(x, torch.arange(48) > 2, value=0), "rows"),
        (lambda x: x.masked_fill(torch.arange(5)[:, None] > 2, 1.0), "multiply"),
        (lambda x: x.masked_fill(x > 0, 0.0), "multiply"),
        (F.gelu, "multiply"),
        (F.silu, "multiply"),
        (torch.tanh, "multiply"),
        (torch.square, "multiply"),
        (lambda x: F.relu(x) ** 2, "multiply"),
        (lambda x: x * x, "multiply"),
        (lambda x: x * x.sigmoid(), "multiply"),
        (lambda x: 1 / x, "multiply"),
        (lambda x: x + 1, "multiply"),
        (lambda x: x.cumsum(-1), "multiply"),
        (lambda x: torch.cat([x[..., :24], x[..., 24:]], -1), "multiply"),
        (lambda x: x.relu_(), "multiply"),
        (lambda x: x * x.shape[-1], "rows"),
        (lambda x: x @ x.new_ones(48, 48), "multiply"),
        (lambda x: x.new_ones(5, 5) @ x, "rows"),
        (lambda x: (x.new_ones(5) @ x[0])[None], "multiply"),
    ],
)
def test_what_commutes(act, kind):
    where, gm, args = only(act)
    assert where.kind == kind, where.why
    unchanged(gm, args, tolerance=1e-12 if kind == "multiply" else 0)


def test_only_positive_factors_pass_an_activation():
    where, *_ = only(F.relu)
    assert where.homogeneous
    with pytest.raises(PassError, match="only commutes with positive"):
        shared(torch.linspace(-1, 1, 48), where)
    assert not only(lambda x: x * 2)[0].homogeneous


@pytest.mark.parametrize(
    ("act", "n", "index"),
    [
        (lambda x: x.view(2, 5, 6, 8).transpose(2, 3).flatten(2), 48, lambda c: c % 6 * 8 + c // 6),
        (lambda x: x.flip(-1), 48, None),
        (lambda x: x[..., 16:], 64, lambda c: c + 16),
        (lambda x: x.chunk(2, -1)[1] * torch.sigmoid(x.chunk(2, -1)[0]), 96, lambda c: c + 48),
        (lambda x: x.view(2, 5, 4, 12).repeat_interleave(2, 2)[:, :, :4].flatten(-2), 48, lambda c: c // 24 * 12 + c % 12),
        (lambda x: x.unflatten(-1, (2, 12))[..., None, :].expand(2, 5, 2, 2, 12).reshape(2, 5, 48), 24, lambda c: c // 24 * 12 + c % 12),
        (lambda x: x.movedim(-1, 0).movedim(0, 2), 48, lambda c: c),
        (lambda x: x[:, [3, 1]], 48, None),
        (lambda x: x[torch.tensor([1, 0, 1])], 48, lambda c: c),
    ],
)
def test_channels_are_followed_through_views(act, n, index):
    """flip is not followed, so the factor stays in the graph."""
    where, gm, args = only(act, n)
    assert (where.index is None) == (index is None) or where.kind == "rows"
    if index is not None:
        assert where.index == tuple(index(c) for c in range(48))
    unchanged(gm, args, tolerance=1e-13)  # a product over a strided input is summed in another order


def test_tokens_that_become_channels():
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(160, 16)

        def forward(self, x):
            return self.b(self.a(x).flatten(1))

    gm, args = found(Mix().double(), torch.randn(2, 5, 16).double())
    assert place(gm, ("b",)).index == tuple(c % 32 for c in range(160))  # five tokens share the producer's rows
    unchanged(gm, args)


def test_shared_takes_the_maximum_of_each_row():
    where, *_ = only(lambda x: x.repeat(1, 1, 2), 24)
    v = torch.rand(48)
    assert torch.equal(shared(v, where), v.view(2, 24).amax(0).repeat(2))


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.b = norm, nn.Linear(48, 16)

    def forward(self, x):
        return self.b(self.norm(x))


class Scaled(nn.Module):
    """x w + c, the parameters being applied in ways of their own."""

    def __init__(self):
        super().__init__()
        self.w, self.c = nn.Parameter(torch.randn(48)), nn.Parameter(torch.randn(1, 1, 48))

    def forward(self, x):
        return ((1 + self.w.float()) * x.tanh() + self.c).to(x.dtype)


@pytest.mark.parametrize(
    ("norm", "kind", "vectors"),
    [
        (nn.LayerNorm(48), "norm", 2),
        (nn.LayerNorm(48, bias=False), "norm", 1),
        (nn.LayerNorm(48, elementwise_affine=False), "multiply", 1),
        (nn.RMSNorm(48), "norm", 1),
        (nn.RMSNorm(48, elementwise_affine=False), "multiply", 1),
        (nn.LayerNorm((5, 48)), "multiply", 1),
        (Scaled(), "norm", 2),
        (nn.Sequential(nn.LayerNorm(48), nn.ReLU()), "norm", 2),
    ],
)
def test_norms(norm, kind, vectors):
    gm, args = found(Normed(norm).double(), torch.randn(2, 5, 48).double())
    where = place(gm, ("b",))
    assert (where.kind, len(where.nodes)) == (kind, vectors), where.why
    unchanged(gm, args)


def test_a_norm_whose_output_leaves_the_graph():
    class Both(Normed):
        def forward(self, x):
            h = self.norm(x)
            return self.b(h), h

    gm, args = found(Both(nn.LayerNorm(48)).double(), torch.randn(2, 5, 48).double())
    assert place(gm, ("b",)).why == "kept as a multiply: x is also read by the output of the graph"
    unchanged(gm, args)


def test_a_norm_used_twice_is_scaled_for_one_reader():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(48), nn.Linear(48, 48), nn.Linear(48, 16)

        def forward(self, x):
            return self.b(self.norm(self.a(self.norm(x))))

    gm, args = found(Twice().double(), torch.randn(2, 5, 48).double())
    assert {place(gm, (name,)).kind for name in "ab"} == {"norm"}
    unchanged(gm, args)


def test_a_written_value_is_left_alone():
    def write(x):
        y = x * 2
        y[..., :4] = 1
        return y

    where, gm, args = only(write)
    assert where.kind == "multiply" and "setitem" in where.why
    unchanged(gm, args)


def test_symbolic_sizes():
    where, gm, args = only(lambda x: F.relu(x).view(x.shape[0], -1, 6, 8).transpose(1, 2).transpose(1, 2).reshape(x.shape[0], -1, 48), dynamic=True)
    assert where.kind == "rows" and where.index == tuple(range(48))
    unchanged(gm, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [nn.LayerNorm(48), nn.Identity()])
def test_dtypes_stay(dtype, norm):
    gm, args = found(Normed(norm).to(dtype), torch.randn(2, 5, 48, dtype=dtype))
    truth = flat(gm, args)
    scaled = flat(*moved(gm, args, {("b",): lambda k: powers(k).float()}, undo=False))
    assert [t.dtype for t in scaled] == [t.dtype for t in truth] and not torch.equal(scaled[0], truth[0])


def test_a_vector_along_the_tokens_is_no_shift():
    """As many tokens as channels, so that shapes alone do not tell."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.c, self.b = nn.LayerNorm(48), nn.Parameter(torch.randn(48)), nn.Linear(48, 16)

        def forward(self, x):
            return self.b((self.norm(x).transpose(1, 2) + self.c).transpose(1, 2))

    gm, args = found(Turned().double(), torch.randn(2, 48, 48).double())
    assert "adds to other channels" in place(gm, ("b",)).why
    unchanged(gm, args, tolerance=1e-13)


def test_of_two_factors_the_one_with_all_rows():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.a, self.b = nn.Linear(32, 1), nn.Linear(32, 48), nn.Linear(48, 16)

        def forward(self, x):
            return self.b(self.one(x) * self.a(x))

    gm, args = found(Gated().double(), torch.randn(2, 5, 32).double())
    assert place(gm, ("b",)).site == "a"
    unchanged(gm, args)


def test_rows_of_a_fused_projection_that_others_read():
    """The factor stays out of the other parts; where one of them overlaps, it stays out of the projection."""

    class Fused(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.a, self.b, self.start = nn.Linear(32, 64), nn.Linear(24, 16), start

        def forward(self, x):
            h = self.a(x)
            return self.b(h[..., 40:]), h[..., : self.start].softmax(-1)

    for start, kind in ((40, "rows"), (41, "multiply")):
        gm, args = found(Fused(start).double(), torch.randn(2, 5, 32).double())
        assert place(gm, ("b",)).kind == kind
        unchanged(gm, args, tolerance=1e-13)


def test_sites_that_are_not_kin():
    gm, _ = found(Two(F.relu).double(), torch.randn(2, 5, 32).double())
    with pytest.raises(PassError, match="do not read one input"):
        place(gm, ("a", "b"))
    with pytest.raises(PassError, match="no such sites in the graph: c; it has a, b"):
        place(gm, ("c",))
