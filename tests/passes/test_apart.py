"""Products inside transforms of torch.func, and with weights that the forward writes, stay as they are; gradients and values are those of eager."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def fast(fn: Callable[..., Tensor], lower: str = "eager") -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(fn, backend="qcompile", options={"recipe": "W8A8", "lower": lower})


def transforms(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "grad": lambda x: torch.func.grad(lambda x: model(x).pow(2).sum())(x),
        "jacrev": lambda x: torch.func.jacrev(model)(x[0]),
        "jvp": lambda x: torch.func.jvp(model, (x,), (x,))[1],
        "vmap": lambda x: torch.func.vmap(model)(x),
    }


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", transforms(nn.Identity()))
def test_transforms_of_torch_func(name: str, frozen: bool) -> None:
    """A gradient through codes would be zero without a word."""
    torch.manual_seed(0)
    model, x = Mlp().requires_grad_(not frozen), torch.randn(5, 32)
    fn = transforms(model)[name]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            y, truth = fast(fn)(x), fn(x)
            if not frozen and torch.__version__.startswith("2.11.") and not torch.allclose(torch.compile(fn)(x), truth, atol=1e-5):
                continue  # the plain graph is compiled, and 2.11's Inductor gives jacrev wrong by itself
            torch.testing.assert_close(y, truth)


def test_what_stands_beside_a_transform_is_quantized() -> None:
    """Transformers makes masks with vmap, in the graph of the whole model."""
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(5, 32)

    def fn(x: Tensor) -> Tensor:
        return model(x) + torch.func.vmap(lambda row: model.up(row)[:32])(x)

    with torch.no_grad():
        report = qcompile.explain(fast(fn), x)
    assert {row.name: row.shape for row in report.sites} == {"up": (48, 32), "down": (32, 48)}
    (left,) = [row for row in report.kept if "transform" in row.reason]
    assert left.name.startswith("up") and "inside a transform of torch.func (vmap)" in left.reason


class Forces(Mlp):
    """The gradient of an energy, for which grad mode is turned on inside."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            return -torch.autograd.grad(super().forward(x).pow(2).sum(), x)[0]


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_gradients_that_the_forward_takes(lower: str) -> None:
    torch.manual_seed(0)
    model, x = Forces(), torch.randn(5, 32)
    wanted = model(x.clone())
    with torch.no_grad():
        torch.testing.assert_close(fast(model, lower)(x.clone()), wanted)


class Written(nn.Linear):
    how = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "set":
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.2)
        elif self.how == "data":
            self.weight.data.clamp_(-0.02, 0.02)
        elif self.how == "itself":
            self.weight.mul_(0.5)
        elif self.how == "part":
            self.weight[0] = 0
        elif self.how == "out":
            torch.mul(self.weight, 0.5, out=self.weight)
        y = super().forward(x)
        if self.how == "after":
            self.weight.mul_(0.5)
        return y


@pytest.mark.parametrize("how", ["set", "data", "itself", "part", "out", "after"])
def test_weights_that_the_forward_writes(how: str) -> None:
    """Codes are taken before the call: of a value that is written in it they know nothing. What is written behind the product is seen by the next call."""
    torch.manual_seed(0)
    model = nn.Sequential(Written(32, 48), nn.ReLU(), nn.Linear(48, 32)).requires_grad_(False)
    model[0].how = how
    twin = nn.Sequential(Written(32, 48), nn.ReLU(), nn.Linear(48, 32)).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    twin[0].how = how
    compiled, x = fast(model), torch.randn(5, 32)
    with torch.no_grad():
        for _ in range(3):
            wanted = twin(x)
            assert float((compiled(x) - wanted).norm()) < 0.02 * float(wanted.norm())
        report = qcompile.explain(compiled, x)
    assert len(report.sites) == (2 if how == "after" else 1)
    assert [row.reason.startswith("the forward writes this weight") for row in report.kept] == ([] if how == "after" else [True])


ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda w: w.view(-1), "t": lambda w: w.t(), "contiguous": lambda w: w.contiguous(), "to": lambda w: w.to(torch.float32), "unbind": lambda w: w.unbind()[0], "diagonal": lambda w: w.diagonal(),
    "expand_as": lambda w: w.expand_as(w), "as_strided": lambda w: w.as_strided((4,), (1,)), "unflatten": lambda w: w.unflatten(0, (2, -1)), "swapaxes": lambda w: w.swapaxes(0, 1), "chunk": lambda w: w.chunk(2)[1],
}  # fmt: skip
WRITES: dict[str, Callable[[Tensor], object]] = {
    "foreach": lambda w: torch._foreach_mul_([w], 0.5), "relu": lambda w: F.relu(w, inplace=True), "hardtanh": lambda w: F.hardtanh(w, -0.01, 0.01, inplace=True), "imul": lambda w: w.__imul__(0.5),
    "ipow": lambda w: w.__ipow__(2), "operator": lambda w: operator.isub(w, 1.0), "index": lambda w: w.__setitem__(0, 0.0),
    "overload": lambda w: torch.ops.aten.mul_.Tensor(w, torch.tensor(0.5)),
}  # fmt: skip


@pytest.mark.parametrize("alias", [*ALIASES, *WRITES])
def test_names_of_one_memory_and_ways_to_write_it(alias: str) -> None:
    """The product reads what was made of the weight before, or the weight itself."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False).requires_grad_(False)
    twin = nn.Linear(32, 32, bias=False).requires_grad_(False)
    twin.load_state_dict(layer.state_dict())

    def fn(layer: nn.Linear, x: Tensor) -> Tensor:
        turned = layer.weight.t()
        WRITES[alias](layer.weight.data) if alias in WRITES else ALIASES[alias](layer.weight.data).mul_(0.5)
        return x @ turned

    x = torch.randn(5, 32)
    compiled = fast(fn)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(layer, x), fn(twin, x))


def test_other_memory_is_not_written() -> None:
    """A copy of the weight, and the sum that a product becomes."""
    layer, x = nn.Linear(32, 32).requires_grad_(False), torch.randn(5, 32)

    def fn(x: Tensor) -> Tensor:
        return layer.weight.clone().mul_(2)[:5] + layer(x).add_(1)

    report = qcompile.explain(fast(fn), x)
    assert len(report.sites) == 1 and not [row for row in report.kept if "writes" in row.reason]
