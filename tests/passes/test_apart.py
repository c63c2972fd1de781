"""Products inside transforms of torch.func, and with weights that the forward writes, stay as they are; gradients and values are those of eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import qcompile
from qcompile.core.errors import Skip
from qcompile.passes.apart import apart


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
            torch.testing.assert_close(fast(fn)(x), fn(x))


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


def test_reads_of_a_view_made_before() -> None:
    """One memory under two names."""
    graph = fx.Graph()
    weight, x = graph.placeholder("weight"), graph.placeholder("x")
    weight.meta["param"] = object()
    seen = graph.call_method("t", (weight,))
    graph.call_method("clamp_", (weight, -1, 1))
    product = graph.call_function(torch.matmul, (x, seen))
    other = graph.call_function(torch.matmul, (x, x))
    found = apart(graph)
    assert isinstance(found[product], Skip) and "clamp_" in str(found[product]) and other not in found
