"""QLoRA: adapters train on a packed base, by the gradients of its dequantized weights; the base keeps no gradient, no optimizer state and, released, no 16-bit value."""

from __future__ import annotations

import copy

import pytest
import torch
from small import close, graphs, rounded, said
from tiny_models import tiny
from torch import nn

import qcompile
from qcompile.core.errors import OptionError, QcompileError
from qcompile.memory import is_released
from qcompile.weights import TABLE

peft = pytest.importorskip("peft")
NF4 = "nf4.g64/int8.g256"
KEEP = ("lora_", "lm_head")


class Adapted(nn.Module):
    """A frozen linear and two thin ones beside it, as in equation 5 of the paper."""

    def __init__(self, k: int, n: int, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(k, n, bias=bias).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(k, 4, bias=False), nn.Linear(4, n, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.dropout(x)))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = Adapted(64, 96, dropout=dropout), Adapted(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def compiled(model, **options):
    return torch.compile(model, backend="qcompile", fullgraph=True, options={"weight": NF4, "train": "lora", "lower": "eager"} | options)


def gradients(model, fn, *args, **inputs):
    """(loss, gradients by name)."""
    model.zero_grad()
    y = fn(*args, **inputs)
    loss = y.loss if hasattr(y, "loss") else y.float().square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(found, wanted, rtol=1e-5):
    return found.keys() == wanted.keys() and all(close(found[name], wanted[name], rtol) for name in wanted)


def llama(layers: int = 1, checkpoint: bool = False, **sizes):
    """(PEFT model, batch): LoRA on every linear, B not zero."""
    model, inputs = tiny("llama", num_hidden_layers=layers, **sizes)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # a hook that Dynamo cannot capture, and that only reentrant checkpoints need
        model.train()
    return model, {**inputs, "labels": inputs["input_ids"], "use_cache": False}


@pytest.mark.parametrize(
    ("options", "scheme", "lower"),
    [
        ({}, NF4, "eager"),
        ({"recipe": "NF4", "weight": None}, "nf4.g64", "eager"),
        ({"weight": "int4.g32"}, "int4.g32", "inductor"),
        ({"weight": "uint4.g32.point"}, "uint4.g32.point", "eager"),
        ({"weight": "e4m3.row"}, "e4m3.row", "eager"),
    ],
)
def test_gradients_are_those_of_the_dequantized_base(options, scheme, lower):
    model, x = Net(), torch.randn(2, 5, 64)
    loss, found = gradients(model, compiled(model, lower=lower, **options), x)
    twin = rounded(model, scheme, keep=KEEP)
    wanted_loss, wanted = gradients(twin, twin, x)
    assert close(loss, wanted_loss) and equal(found, wanted) and len(found) == 4
    assert model.up.base.weight.grad is None


def test_an_input_gets_its_gradient():
    model, x = Net(), torch.randn(3, 64, requires_grad=True)
    compiled(model)(x).square().sum().backward()
    found, x.grad = x.grad, None
    rounded(model, NF4, keep=KEEP)(x).square().sum().backward()
    assert close(found, x.grad)


@pytest.mark.parametrize("recipe", ["W8A8", "W4A8", "FP8", "LLM_INT8", "INT8_ZEROPOINT"])
def test_quantized_inputs_pass_the_gradient_straight_through(recipe):
    """dx = dy @ W: of a model whose linears round their inputs by x + (round(x) - x).detach()."""
    model, x = Net(), torch.randn(3, 64)
    fast = compiled(model, recipe=recipe, weight=None)
    with torch.no_grad():
        want = fast(x)
    y = fast(x)
    assert close(y.detach(), want)
    _, found = gradients(model, fast, x)
    grad_y = 2 * want
    up = model.up(x).detach()  # what lora_B of the last linear reads: near enough to the quantized one
    assert close(found["down.lora_B.weight"], grad_y.T @ model.down.lora_A(torch.relu(up)).detach(), 0.1)
    assert all(p.isfinite().all() for p in found.values()) and len(found) == 4


@pytest.mark.parametrize("lower", ["eager"])
def test_peft_as_it_is(lower, built):
    """One graph, all seven linears of a layer, the gradients of every adapter; and evaluation of the same weights."""
    model, inputs = llama()
    fast = compiled(model, lower=lower)
    with graphs() as seen:
        loss, found = gradients(model, fast, **inputs)
    twin = rounded(model, NF4, keep=KEEP)
    wanted_loss, wanted = gradients(twin, twin, **inputs)
    assert close(loss, wanted_loss) and equal(found, wanted) and len(found) == 14
    ((graph, _),) = seen
    packed = {name.removesuffix(".base_layer").rpartition(".")[2] for name in graph.kernels}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} and len(graph.kernels) == 7
    with torch.no_grad(), graphs() as seen:
        assert close(fast(**inputs).loss, wanted_loss)
    reasons = {name: str(choice) for name, choice in seen[0][0].plan.items() if "lora_" in name}
    assert len(reasons) == 14 and set(reasons.values()) == {"it is trained: its parameter requires grad"}
    assert len(built) == 2


def test_twenty_steps(lower="eager"):
    """The loss falls; the base has no gradient, no optimizer state, and the codes that it had."""
    model, inputs = llama()
    fast = compiled(model, lower=lower)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, codes = [], None
    for _ in range(20):
        loss = fast(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        base = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight
        (entry,) = TABLE.get(base).entries.values()
        assert codes is None or (entry.tensors[0].data_ptr() == codes[0] and torch.equal(entry.tensors[0], codes[1]))
        codes = entry.tensors[0].data_ptr(), entry.tensors[0].clone()
    assert losses[-1] < 0.7 * losses[0]
    assert all(("lora_" in name) == p.requires_grad == (p in optimizer.state) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_what_is_kept_for_the_backward():
    """Inductor's forward graph calls our kernels on the codes, and nothing that it hands to the backward is a weight in 16 or 32 bits, which reads the codes."""
    from torch._inductor import config

    found = []
    model, x = Net(), torch.randn(5, 64)
    with torch._functorch.config.patch(enable_autograd_cache=False), config.patch(fx_graph_cache=False, post_grad_custom_post_pass=found.append):
        compiled(model, lower="inductor")(x).sum().backward()
    forward, backward = found
    assert [str(n.target) for n in forward.nodes if "qcompile" in str(n.target)].count("qcompile.linear.default") == 2
    assert [str(n.target) for n in backward.nodes if "qcompile" in str(n.target)] == ["qcompile.frozen_grad.default"]
    kept = [n.meta["val"] for n in forward.find_nodes(op="output")[0].args[0] if n is not None]
    weights = {tuple(m.weight.shape) for m in (model.up.base, model.down.base)}
    assert not [t for t in kept if t.dtype.is_floating_point and (tuple(t.shape) in weights or tuple(t.shape)[::-1] in weights)]
    assert [t.dtype for t in kept].count(torch.uint8) == 1  # nothing before the first linear trains


@pytest.mark.parametrize("how", ["option", "release_weights"])
def test_released(how):
    """Training needs no 16-bit value of the base: gradients stay, and what is resident are codes."""
    model, inputs = llama(hidden_size=128, intermediate_size=256)
    twin = rounded(model, NF4, keep=KEEP)
    _, wanted = gradients(twin, twin, **inputs)
    fast = compiled(model, release=how == "option")
    for step in range(3):
        _, found = gradients(model, fast, **inputs)
        assert equal(found, wanted)
        if how == "release_weights" and not step:
            qcompile.release_weights(model)
    base = {name: p for name, p in model.named_parameters() if name.endswith("proj.base_layer.weight")}
    assert len(base) == 7 and all(map(is_released, base.values()))
    held = sum(t.nbytes for p in base.values() for entry in TABLE.get(p).entries.values() for t in entry.tensors)
    assert held + sum(p.untyped_storage().nbytes() for p in base.values()) < 0.16 * sum(p.nbytes for p in base.values())  # of float32
    with torch.no_grad():
        assert close(fast(**inputs).loss, twin(**inputs).loss)


def test_checkpointing():
    model, inputs = llama(checkpoint=True)
    twin = rounded(model, NF4, keep=KEEP)
    _, wanted = gradients(twin, twin, **inputs)
    fast = compiled(model, release=True)
    _, found = gradients(model, fast, **inputs)
    assert equal(found, wanted)
    with torch.no_grad(), graphs() as seen:  # still in training mode
        assert close(fast(**inputs).loss, twin(**inputs).loss) and len(seen[0][0].kernels) == 7


def test_layers_compiled_one_by_one(built):
    """Regional compilation: one graph for all layers, also where checkpoints surround them."""
    model, inputs = llama(layers=3, checkpoint=True)
    twin = rounded(model, NF4, keep=KEEP)
    _, wanted = gradients(twin, twin, **inputs)
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="qcompile", options={"weight": NF4, "train": "lora", "lower": "eager"})
    _, found = gradients(model, model, **inputs)
    assert equal(found, wanted) and len(built) <= 2


def test_autocast():
    model, x = Net(), torch.randn(6, 64)
    twin = rounded(model, NF4, keep=KEEP)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(model, compiled(model, lower="inductor"), x)
        _, wanted = gradients(twin, twin, x)
    assert equal(found, wanted, 2e-2) and all(g.dtype == torch.float32 for g in found.values())


def test_bfloat16():
    model, x = Net().bfloat16(), torch.randn(6, 64, dtype=torch.bfloat16)
    _, found = gradients(model, compiled(model, lower="inductor"), x)
    twin = rounded(model, NF4, keep=KEEP)
    _, wanted = gradients(twin, twin, x)
    assert equal(found, wanted, 3e-2)


def test_gradients_accumulate():
    model, xs = Net(), torch.randn(4, 3, 64)
    fast, twin = compiled(model), rounded(model, NF4, keep=KEEP)
    for x in xs:
        fast(x).square().sum().backward()
    twin(xs.flatten(0, 1)).square().sum().backward()
    assert equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None})


def test_dropout():
    model, x = Net(dropout=0.5), torch.randn(6, 64)
    twin, fast = rounded(model, NF4, keep=KEEP), compiled(model)
    torch.manual_seed(1)
    _, found = gradients(model, fast, x)
    torch.manual_seed(1)
    _, wanted = gradients(twin, twin, x)
    assert equal(found, wanted)


def test_unfrozen_on_the_way():
    """Dynamo's guard tells of it: the weight then trains in its own bits."""
    model, x = Net(), torch.randn(3, 64)
    fast = compiled(model)
    fast(x)
    model.up.base.weight.requires_grad_(True)
    _, found = gradients(model, fast, x)
    twin = rounded(model, NF4, keep=("lora_", "up.base"))
    _, wanted = gradients(twin, twin, x)
    assert "up.base.weight" in wanted and equal(found, wanted)


def test_unfrozen_once_released():
    model, x = Net(), torch.randn(3, 64)
    fast = compiled(model, release=True)
    fast(x)
    model.up.base.weight.requires_grad_(True)
    with pytest.raises(Exception, match=r"up\.base\.weight was released, but this graph trains it; freeze it again") as info:
        fast(x)
    assert "WeightError" in str(info.value)
    model.up.base.weight.requires_grad_(False)
    fast(x).sum().backward()


def test_without_the_option_released_weights_are_an_error():
    model, x = Net(), torch.randn(3, 64)
    compiled(model, release=True)(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="'train': 'lora'"):
        compiled(model, train=None)(x)


def test_merge_of_a_base_that_was_not_released():
    """PEFT merges into the weights that are there: the 16-bit ones, or with ``rounded`` those that were trained on."""
    model, inputs = llama()
    fast = compiled(model)
    for rounds in (False, True):
        fast(**inputs)
        with torch.no_grad():
            trained = fast(**inputs).logits
        own = copy.deepcopy(model)
        if rounds:
            assert qcompile.restore_weights(model, rounded=True) > 0
        merged = model.merge_and_unload() if rounds else own.merge_and_unload()
        with torch.no_grad():
            assert close(merged(**inputs).logits, trained) is rounds


def test_merge_of_a_released_base_and_saved_adapters(tmp_path):
    model, inputs = llama()
    fresh = copy.deepcopy(model.get_base_model())
    fast = compiled(model, release=True)
    fast(**inputs).loss.backward()
    with torch.no_grad():
        trained = fast(**inputs).logits
    model.save_pretrained(tmp_path)
    assert qcompile.restore_weights(model) > 0 and not any(map(is_released, model.parameters()))
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert close(merged(**inputs).logits, trained)
    names = {n for n in fresh.state_dict() if "lora_" not in n}
    plain, _ = tiny("llama", num_hidden_layers=1)
    plain.load_state_dict({n.replace(".base_layer", ""): fresh.state_dict()[n] for n in names})
    again = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    with torch.no_grad():
        assert close(compiled(again)(**inputs).logits, trained)


def test_a_base_that_is_stored_as_codes():
    """``qcompile.quantize`` first, adapters on top of it; then back to plain weights, and merged."""
    model, inputs = tiny("llama", num_hidden_layers=1)
    twin = rounded(model, "int4.g32", keep=KEEP)
    qcompile.quantize(model, recipe="W4A16", weight="int4.g32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(5)
    twin = peft.get_peft_model(twin, config)
    inputs = {**inputs, "labels": inputs["input_ids"], "use_cache": False}
    _, wanted = gradients(twin, twin, **inputs)
    fast = torch.compile(model, backend="qcompile", options={"train": "lora", "lower": "eager"})
    with graphs() as seen:
        _, found = gradients(model, fast, **inputs)
    assert equal(found, wanted) and len(found) == 4 and len(seen[0][0].kernels) == 7
    assert qcompile.restore_weights(model) > 0
    with torch.no_grad():
        assert close(model.merge_and_unload()(**inputs).logits, twin(**inputs).logits)


@pytest.mark.parametrize("recipe", ["W4A16_GPTQ", "W4A8_AQAS", "W8A8_SMOOTHQUANT_STATIC", "LLM_INT8_STATIC", "W4A16_LUT"])
def test_solved_codes_under_adapters(recipe):
    """Methods run on the first call, or on a calibration, as for inference: training and evaluation read the same codes."""
    model, x = Net(), torch.randn(48, 64)
    fast = compiled(model, recipe=recipe, weight=None)
    qcompile.calibrate(fast, [torch.randn(48, 64)], progress=False)
    y = fast(x)
    y.square().sum().backward()
    with torch.no_grad(), graphs() as seen:
        assert close(y.detach(), fast(x), 1e-4)
    assert len(seen[0][0].kernels) == 2
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    twin = copy.deepcopy(model)
    _, wanted = gradients(twin, twin, x)
    assert all(close(p.grad, wanted[name], 0.3) for name, p in model.named_parameters() if p.requires_grad)


def test_frozen_experts():
    """Mixtures: the gradient passes through the experts to what trains before them."""
    model, inputs = tiny("mixtral", num_hidden_layers=1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    inputs = {**inputs, "labels": inputs["input_ids"], "use_cache": False}
    fast = compiled(model, weight="int8.row")
    with graphs() as seen:
        loss, found = gradients(model, fast, **inputs)
    assert [site.role for site in seen[0][0].sites.values() if site.name in seen[0][0].kernels].count("experts") == 2
    plain_loss, plain = gradients(model, model, **inputs)
    assert close(loss, plain_loss, 1e-2) and equal(found, plain, 0.1)


def test_nothing_to_pack_is_an_error():
    with pytest.raises(OptionError, match="nothing to pack"):
        qcompile.backend.Options.parse({"recipe": qcompile.Recipe("none", "16bit"), "train": "lora"})


def test_parameters_of_a_model_that_learns_nothing_else():
    model, x = Net(), torch.randn(3, 64)
    fast = compiled(model)
    fast(x)
    with pytest.raises(QcompileError, match="train='lora' learns nothing beside the model"):
        qcompile.parameters(fast)


def test_nothing_is_said():
    model, x = Net(), torch.randn(3, 64)
    with said() as texts:
        compiled(model)(x).sum().backward()
    assert not texts
