"""FP8-LM's optimizer against AdamW in float64 and against torch's in training; its state in bytes and through checkpoints; and gradients that should not be there."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.core.errors import OptionError, TrainingError
from qcompile.core.formats import FORMATS, numbers
from qcompile.data import STDLIB_LM
from qcompile.train.optim import FP8AdamW, first_moment
from qcompile.train.scaling import round_to_dtype, scale_for

LARGE = ("exp_avg", "exp_avg_sq", "master")
ALL = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def parameter(*shape, dtype=torch.float32, size=1.0):
    return nn.Parameter((torch.randn(*shape) * size).to(dtype))


def train(optimizer, p, gradients):
    for g in gradients:
        p.grad = g.to(p.dtype)
        optimizer.step()


def decoded(state, name):
    return state[name].double() * state[name + "_scale"].double()


def snapshot(optimizer, p):
    return {"param": p.detach().clone(), **{name: value.clone() for name, value in optimizer.state[p].items()}}


def same(a, b):
    """Equal bit for bit, dtypes included."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8)) for k in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32], ids=str)
def test_round_to_dtype_is_a_cast_there_and_back(dtype):
    """Every exponent from far below the least value on, ties among them, and what is not finite."""
    w = torch.ldexp(torch.randint(-(1 << 24), 1 << 24, (200_000,)).float(), torch.randint(-60, -8 if dtype is torch.float16 else 4, (200_000,)))
    ties = torch.ldexp(torch.arange(-4096.0, 4096.0), torch.tensor(-26.0))
    w = torch.cat([w, ties, ties * 2.0**10, ties * 2.0**20, torch.tensor([0.0, 2.0**-25, -(2.0**-25), 65504.0, 65519.0])])
    hi = torch.finfo(dtype).max
    want = (w.clamp(-hi, hi) if dtype.itemsize == 1 else w).to(dtype).float()
    assert torch.equal(round_to_dtype(w, dtype), want)
    if dtype.itemsize > 1:
        odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
        assert torch.equal(round_to_dtype(odd, dtype).nan_to_num(5.0), odd.to(dtype).float().nan_to_num(5.0))


# --- one step, from the formula ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_step_is_adamw_of_the_stored_state(dtype, maximize):
    """In float64, from the values that the codes stand for. The master moves by the moments before they are rounded."""
    p = parameter(7, 9, dtype=dtype)
    lr, betas, eps, decay = 0.01, (0.8, 0.99), 1e-6, 0.1
    optimizer = FP8AdamW([p], lr=lr, betas=betas, eps=eps, weight_decay=decay, maximize=maximize, master="fp32")
    train(optimizer, p, [torch.randn(7, 9) * 10.0**-i for i in range(4)])
    before, g = snapshot(optimizer, p), torch.randn(7, 9).to(dtype)
    w = before["master"].double() if "master" in before else before["param"].double()
    g64 = -g.double() if maximize else g.double()
    m = betas[0] * decoded(before, "exp_avg") + (1 - betas[0]) * g64
    v = betas[1] * decoded(before, "exp_avg_sq") + (1 - betas[1]) * g64**2
    w = w * (1 - lr * decay) - lr * (m / (1 - betas[0] ** 5)) / ((v / (1 - betas[1] ** 5)).sqrt() + eps)
    train(optimizer, p, [g])
    state = optimizer.state[p]
    assert float(state["step"]) == 5
    torch.testing.assert_close(state.get("master", p.detach()).double(), w, rtol=1e-5, atol=1e-7)
    assert torch.equal(p.detach(), state["master"].to(dtype)) if "master" in state else True
    least, amax = 2.0**-9, float(m.abs().max())
    assert float(state["exp_avg_scale"]) == 2.0 ** math.ceil(math.log2(amax / 448))
    m_error = (decoded(state, "exp_avg") - m).abs()
    assert bool((m_error <= torch.maximum(m.abs() / 8, least * state["exp_avg_scale"].double())).all())  # at most one code
    torch.testing.assert_close(decoded(state, "exp_avg_sq"), v, rtol=2.0**-11 * 1.01, atol=2.0**-24 * float(state["exp_avg_sq_scale"]))


def test_scales_are_powers_of_two_that_just_fit():
    amax = torch.cat([torch.rand(2000) * torch.logspace(-30, 30, 2000), torch.tensor([448.0, 448.0001, 447.999, 224.0, 1e-44, 3e38])])
    for greatest in (448.0, 65504.0, 57344.0):
        scale = scale_for(amax, greatest)
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
        ratio = amax.double() / scale.double()
        assert bool((ratio <= greatest).all()) and bool((ratio[amax > 1e-30] > greatest / 2).all())
    assert float(scale_for(torch.tensor(0.0), 448.0)) == 2.0**-126


def test_first_moment_rounds_to_nearest():
    half = torch.tensor(numbers(FORMATS["e4m3"]))
    middle = (half[1:] + half[:-1]) / 2
    x = torch.cat([half, middle, middle.nextafter(torch.tensor(1e9)), -middle, torch.randn(1000) * 100])
    codes = first_moment(x, torch.tensor(1.0), torch.zeros(()), 0.9)
    assert torch.equal(codes, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


# --- training ------------------------------------------------------------------------------------------------------------


def test_regression_ends_where_adamw_ends():
    """Least squares by minibatches, learning rate falling to zero: within 1 % of the way from the start to torch's AdamW in float32."""
    x, truth = torch.randn(512, 24), torch.randn(24, 3)
    y = x @ truth + 0.1 * torch.randn(512, 3)
    ends = []
    for make in (torch.optim.AdamW, FP8AdamW):
        p = nn.Parameter(torch.zeros(24, 3))
        optimizer = make([p], lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
        for i in range(300):
            rows = torch.arange(i * 32, i * 32 + 32) % 512
            optimizer.zero_grad()
            (x[rows] @ p - y[rows]).square().mean().backward()
            optimizer.step()
            schedule.step()
        ends.append(p.detach())
    assert (ends[0] - truth).norm() < 0.05 * truth.norm()
    assert (ends[0] - ends[1]).norm() < 0.01 * truth.norm()


class LM(nn.Module):
    """A character model with attention, as small as one that learns something."""

    def __init__(self, vocabulary: int, h: int = 32) -> None:
        super().__init__()
        self.embed, self.place, self.norm = nn.Embedding(vocabulary, h), nn.Parameter(torch.zeros(32, h)), nn.LayerNorm(h)
        self.qkv, self.up, self.down, self.head = nn.Linear(h, 3 * h), nn.Linear(h, 2 * h), nn.Linear(2 * h, h), nn.Linear(h, vocabulary)

    def forward(self, ids):
        y = self.embed(ids) + self.place
        q, k, v = self.qkv(self.norm(y)).chunk(3, -1)
        y = y + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(y + self.down(F.gelu(self.up(y))))


def test_a_language_model_trains_as_with_adamw():
    """Characters of Python sources, 90 steps: the loss at the end is within 0.5 % of torch's AdamW in float32, with weights in float32 and in bfloat16 with FP16 masters."""
    text = (STDLIB_LM / "heldout.txt").read_text()[:50000]
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])

    def run(make, dtype):
        torch.manual_seed(1)
        model, losses = LM(len(characters)).to(dtype), []
        optimizer = make(model.parameters(), lr=5e-3)
        for _ in range(90):
            window = ids[torch.randint(0, len(ids) - 33, (8, 1)) + torch.arange(33)]
            loss = F.cross_entropy(model(window[:, :-1]).float().flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], sum(losses[-20:]) / 20

    first, wanted = run(torch.optim.AdamW, torch.float32)
    assert wanted < 0.75 * first
    for dtype in (torch.float32, torch.bfloat16):
        assert run(FP8AdamW, dtype)[1] == pytest.approx(wanted, rel=5e-3), dtype


# --- memory ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "master", "size"),
    [(torch.float32, "fp16", 3), (torch.bfloat16, "fp16", 5), (torch.bfloat16, "fp32", 7), (torch.float16, "none", 3), (torch.float8_e4m3fn, "fp16", 5)],
)
def test_bytes_of_a_weight(dtype, master, size):
    p = parameter(64, 33, dtype=dtype)
    optimizer = FP8AdamW([p], master=master)
    train(optimizer, p, [torch.randn(64, 33)])
    state = optimizer.state[p]
    assert sum(state[name].nbytes for name in LARGE if name in state) == size * p.numel()
    assert sum(value.nbytes for name, value in state.items() if name not in LARGE) <= 24  # two or three scales, two counts


# --- checkpoints -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["memory", "file", "deepcopy"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_resuming_is_bit_exact(dtype, way):
    p = parameter(6, 10, dtype=dtype, size=0.3)
    optimizer = FP8AdamW([p], lr=0.01)
    early, late = ([torch.randn(6, 10) for _ in range(5)] for _ in range(2))
    train(optimizer, p, early)
    q = nn.Parameter(p.detach().clone())
    if way == "deepcopy":
        (q,), resumed = copy.deepcopy(([p], optimizer))
    else:
        saved = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            stream = io.BytesIO()
            torch.save(saved, stream)
            saved = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
        resumed = FP8AdamW([q], lr=0.5)
        resumed.load_state_dict(saved)
    assert same(snapshot(optimizer, p), snapshot(resumed, q))
    train(optimizer, p, late)
    train(resumed, q, late)
    assert same(snapshot(optimizer, p), snapshot(resumed, q))
    assert resumed.param_groups[0]["lr"] == 0.01


def test_loading_copies_and_hooks_are_heard():
    p, q = parameter(3, dtype=torch.bfloat16), parameter(3, dtype=torch.bfloat16)
    optimizer, other = FP8AdamW([p]), FP8AdamW([q])
    train(optimizer, p, [torch.ones(3)])
    seen = []
    other.register_load_state_dict_pre_hook(lambda o, d: seen.append(d["state"][0]["exp_avg"].dtype))
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(other, q)
    train(optimizer, p, [torch.ones(3)])
    assert same(before, snapshot(other, q)) and seen == [torch.float8_e4m3fn]


def test_the_state_of_another_optimizer_is_refused():
    p = parameter(3)
    adamw = torch.optim.AdamW([p])
    train(adamw, p, [torch.ones(3)])
    with pytest.raises(TrainingError, match=r"parameter of shape \(3,\), torch.float32, has .*exp_avg.*torch.float32.*It is not this optimizer's"):
        FP8AdamW([p]).load_state_dict(adamw.state_dict())


def test_distributed_checkpoints_take_it():
    """torch.distributed.checkpoint's view of an optimizer, by names of parameters."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(4, 3).bfloat16()
    optimizer = FP8AdamW(model.parameters())
    model(torch.randn(2, 4).bfloat16()).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = copy.deepcopy(model)
    resumed = FP8AdamW(other.parameters())
    set_optimizer_state_dict(other, resumed, saved)
    assert same(snapshot(optimizer, model.weight), snapshot(resumed, other.weight))


# --- groups, closures, shapes ------------------------------------------------------------------------------------------------


def test_groups_have_options_of_their_own():
    a, b, c = (parameter(4, dtype=torch.bfloat16) for _ in range(3))
    optimizer = FP8AdamW([{"params": [a], "lr": 0.1}, {"params": [b], "master": "none"}], lr=0.0, weight_decay=0.0)
    optimizer.add_param_group({"params": [c], "lr": torch.tensor(0.1)})
    was = [p.detach().clone() for p in (a, b, c)]
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(a.detach(), (was[0].float() - 0.1).bfloat16(), rtol=0.01, atol=1e-2)
    assert torch.equal(b.detach(), was[1])
    torch.testing.assert_close(c.detach(), (was[2].float() - 0.1).bfloat16(), rtol=0.01, atol=1e-2)
    assert "master" in optimizer.state[a] and "master" not in optimizer.state[b]


def test_closure():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = FP8AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0 and p.item() < 3 and optimizer.step() is None


def test_any_layout_and_no_elements():
    """Channels last, a scalar, an empty parameter, one without a gradient: as the same values laid out plainly."""
    plain, spread = parameter(2, 3, 4, 4), None
    spread = nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    scalar, empty, frozen = nn.Parameter(torch.tensor(2.0)), parameter(0, 3), parameter(2)
    optimizer = FP8AdamW([plain, spread, scalar, empty, frozen])
    g = torch.randn(2, 3, 4, 4)
    for _ in range(3):
        plain.grad, spread.grad, scalar.grad, empty.grad = g, g.to(memory_format=torch.channels_last), torch.tensor(1.0), torch.zeros(0, 3)
        optimizer.step()
    assert torch.equal(plain.detach(), spread.detach()) and spread.is_contiguous(memory_format=torch.channels_last)
    assert scalar.item() < 2 and not optimizer.state[frozen] and optimizer.skipped == 0


# --- gradients that stop, vanish or burst ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1", [0.9, 0.95])
def test_a_moment_dies_out_when_its_gradient_does(beta1):
    """Rows of an embedding that are not seen any more stop moving. With rounding to nearest alone they would not: 0.95 times a code is, nearest, that code."""
    p = parameter(2, 50)
    optimizer = FP8AdamW([p], betas=(beta1, 0.999), weight_decay=0.0)
    train(optimizer, p, [torch.randn(2, 50)] * 3)
    quiet = torch.stack([torch.randn(50), torch.zeros(50)])
    train(optimizer, p, [quiet * torch.randn(())] * 200)
    state, before = optimizer.state[p], p.detach().clone()
    assert bool((state["exp_avg"][1].float() == 0).all()) and bool((state["exp_avg"][0].float() != 0).any())
    train(optimizer, p, [quiet])
    assert torch.equal(p[1].detach(), before[1]) and not torch.equal(p[0].detach(), before[0])


def test_a_zero_gradient_moves_nothing():
    p = parameter(5)
    before = p.detach().clone()
    optimizer = FP8AdamW([p], lr=0.1, weight_decay=0.5)
    train(optimizer, p, [torch.zeros(5)] * 2)
    torch.testing.assert_close(p.detach(), before * 0.95**2)
    assert optimizer.skipped == 0


def test_one_huge_gradient_does_not_throw_small_ones_away():
    """The second moments of others underflow FP16 beside it; none of them moves by more than a few learning rates."""
    p = parameter(200)
    optimizer = FP8AdamW([p], lr=1e-3, weight_decay=0.0)
    train(optimizer, p, [torch.randn(200) * 1e-6 for _ in range(3)])
    spike = torch.randn(200) * 1e-6
    spike[0] = 1e4
    for g in (spike, *[torch.randn(200) * 1e-6 * (torch.rand(200) > 0.5) for _ in range(30)]):
        before = p.detach().clone()
        train(optimizer, p, [g])
        assert float((p.detach() - before).abs().max()) < 2e-2
    small = decoded(optimizer.state[p], "exp_avg_sq")[1:]
    assert bool((small > 0).all()) and bool(p.isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(dtype, bad):
    p, q = parameter(4, 4, dtype=dtype), parameter(3, dtype=dtype)
    optimizer = FP8AdamW([p, q])
    train(optimizer, p, [torch.randn(4, 4)])
    before = snapshot(optimizer, p)
    p.grad, q.grad = torch.randn(4, 4).to(dtype), torch.ones(3, dtype=dtype)
    p.grad[1, 2] = bad
    optimizer.step()
    after = snapshot(optimizer, p)
    assert int(after.pop("skipped")) == 1 and int(before.pop("skipped")) == 0
    assert same(before, after) and float(optimizer.state[q]["step"]) == 1
    assert optimizer.skipped == 1
    train(optimizer, p, [torch.randn(4, 4)])
    assert float(optimizer.state[p]["step"]) == 2 and bool(p.isfinite().all())


def test_first_gradient_not_finite():
    p = parameter(3)
    before = p.detach().clone()
    optimizer = FP8AdamW([p])
    train(optimizer, p, [torch.tensor([1.0, math.inf, 0.0])])
    assert torch.equal(p.detach(), before) and optimizer.skipped == 1 and not bool(optimizer.state[p]["exp_avg"].float().any())


# --- master weights ----------------------------------------------------------------------------------------------------------------


def test_small_updates_add_up_in_the_master():
    """A step of 1e-3 is lost on a bfloat16 weight of 1, not on its FP16 master; one of 1e-4 is lost there, and not in float32."""
    moved = {}
    for lr in (1e-3, 1e-4):
        for master in ("none", "fp16", "fp32"):
            p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
            train(FP8AdamW([p], lr=lr, weight_decay=0.0, master=master), p, [torch.ones(8)] * 100)
            moved[lr, master] = round(float(1 - p[0].detach()), 3)
    assert moved[1e-3, "none"] == 0 and moved[1e-3, "fp16"] > 0.07 and moved[1e-3, "fp32"] > 0.07
    assert moved[1e-4, "fp16"] == 0 and moved[1e-4, "fp32"] > 0.007


def test_where_a_constant_gradient_leaves_the_first_moment():
    """What rounding to nearest costs, as the module says: 0.1 of the rest to 1 is less than half a code from 0.75 on. The paper's optimizer does the same."""
    p = parameter(3)
    optimizer = FP8AdamW([p])
    train(optimizer, p, [torch.ones(3)] * 100)
    assert decoded(optimizer.state[p], "exp_avg").tolist() == [0.75] * 3


def test_the_scale_keeps_small_weights_exact():
    """Weights of 1e-7, which plain FP16 holds with two bits, to 11 bits."""
    w = torch.randn(500) * 1e-7
    p = nn.Parameter(w.bfloat16())
    optimizer = FP8AdamW([p], lr=0.0)
    train(optimizer, p, [torch.ones(500)])
    assert torch.equal(decoded(optimizer.state[p], "master").float(), p.detach().float())
    assert not torch.equal(w.half().float().bfloat16(), p.detach())


def test_a_parameter_written_by_others_is_seen():
    """The model's ``load_state_dict``, ``.data``, a clamp: the next step starts from there, and the rest of the master keeps its last bits."""
    p = parameter(6, dtype=torch.bfloat16)
    optimizer = FP8AdamW([p], lr=1e-3, weight_decay=0.0)
    train(optimizer, p, [torch.ones(6)] * 3)
    master = decoded(optimizer.state[p], "master")
    p.data = p.data.clone()
    p.data[:3] = torch.tensor([5.0, -7.0, 9.0])
    train(optimizer, p, [torch.zeros(6)])
    now = decoded(optimizer.state[p], "master")
    torch.testing.assert_close(now[:3], torch.tensor([5.0, -7.0, 9.0]).double(), rtol=0, atol=5e-3)
    torch.testing.assert_close(now[3:], master[3:], rtol=0, atol=5e-3)
    assert bool((now[3:] != p[3:].double()).any())


def test_fp8_parameters_saturate():
    p = nn.Parameter(torch.tensor([447.0, -447.0, 1.0]).to(torch.float8_e4m3fn))
    optimizer = FP8AdamW([p], lr=50.0, weight_decay=0.0)
    train(optimizer, p, [torch.tensor([-1.0, 1.0, 1.0])] * 3)
    assert p.detach().float().tolist()[:2] == [448.0, -448.0] and optimizer.skipped == 0


# --- compiled ------------------------------------------------------------------------------------------------------------------------


def test_compiled_steps_are_the_eager_ones():
    """Inductor's arithmetic differs by contractions only; one graph serves every shape and learning rate of a dtype."""
    shapes = [(6, 10), (5,), (3, 4, 2), (30, 2)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager, fast = ([parameter(*s, dtype=torch.bfloat16) for s in shapes] for _ in range(2))
    for a, b in zip(eager, fast):
        b.data.copy_(a)
    optimizers = [FP8AdamW(eager, lr=0.01), FP8AdamW(fast, lr=0.01, compile=True)]
    for i in range(4):
        for a, b in zip(eager, fast):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
            if i == 2:
                a.grad.view(-1)[0] = b.grad.view(-1)[0] = math.nan
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.01 / (i + 1)
            optimizer.step()
    for a, b in zip(eager, fast):
        torch.testing.assert_close(a, b, rtol=0.01, atol=1e-4)
        ours, theirs = (decoded(optimizer.state[p], "master") for optimizer, p in zip(optimizers, (a, b)))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)  # bfloat16 alone, were the master not read, is 4e-3
    assert optimizers[0].skipped == optimizers[1].skipped == len(shapes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


# --- errors ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(master="bf16"), r"unknown master 'bf16' in FP8AdamW.*Known: fp16, fp32, none"),
        (dict(lr=-1.0), "lr=-1.0"),
        (dict(lr=math.nan), "lr=nan"),
        (dict(eps=-1e-8), "eps=-1e-08"),
        (dict(weight_decay=math.inf), "weight_decay=inf"),
        (dict(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\); give two numbers from 0 to below 1"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(OptionError, match=message):
        FP8AdamW([parameter(2)], **options)


def test_sparse_gradients_and_complex_parameters_are_refused():
    embed = nn.Embedding(5, 3, sparse=True)
    embed(torch.tensor([1])).sum().backward()
    with pytest.raises(TrainingError, match=r"parameter of shape \(5, 3\) is sparse \(torch.sparse_coo\); build its embedding with sparse=False"):
        FP8AdamW(embed.parameters()).step()
    with pytest.raises(TrainingError, match=r"parameter 0 of group 0, of shape \(2,\), is torch.complex64"):
        FP8AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
