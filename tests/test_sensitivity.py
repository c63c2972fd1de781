"""The ranking of linears, against models whose weights are rounded by hand, one at a time."""

from __future__ import annotations

import base64
import copy
import json
import re
import sys

import pytest
import torch
from torch import nn

from qcompile.calibrate import KEPT, calibrate
from qcompile.core.errors import CalibrationError, OptionError, QcompileError
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.sensitivity import Effect, Sensitivity, sensitivity
from qcompile.sqnr import sqnr
from qcompile.weights import TABLE

FOUR = {"weight": "int4.g32", "lower": "eager"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(32, 32) for _ in range(3))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(torch.tanh(self.q(x)) * self.k(x))
        return x + self.down(torch.relu_(self.up(x)))  # in place: what later linears read must not be spoilt


class Model(nn.Module):
    def __init__(self, broken: bool = False, head: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(32, 40) if head else nn.Identity()
        self.broken = broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.lm_head(self.blocks[1](x))


def build(**how: bool) -> Model:
    torch.manual_seed(3)
    m = Model(**how).eval()
    with torch.no_grad():
        m.blocks[1].down.weight[:, ::32] = 4.0  # groups of 32 that lose all else
    return m


NAMES = [f"blocks.{i}.{name}" for i in range(2) for name in ("q", "k", "o", "up", "down")]
DATA = [torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@torch.no_grad()
def by_hand(model: Model, names: list[str], data: list[torch.Tensor]) -> tuple[float, float]:
    """(SQNR, KL) of the model with the weights of these linears rounded."""
    twin = copy.deepcopy(model)
    for name in names:
        w = twin.get_submodule(name).weight
        w.copy_(dequantize(quantize(w.detach(), Scheme.parse("int4.g32")), torch.float32))
    exact, y = (torch.cat([m(x).reshape(-1, 40 if isinstance(m.lm_head, nn.Linear) else 32) for x in data]) for m in (model, twin))
    p, q = exact.double().log_softmax(-1), y.double().log_softmax(-1)
    found = sqnr(exact, y)
    assert found is not None
    return found, float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("mode", ["one", "all-but-one"])
def test_against_rounding_by_hand(mode, broken):
    m = build(broken=broken)
    found = sensitivity(m, FOUR, DATA, mode=mode, progress=False)
    assert sorted(r.name for r in found.rows) == sorted(NAMES) and all(r.finite and r.reached for r in found.rows)
    for row in found.rows:
        db, kl = by_hand(m, [row.name] if mode == "one" else [n for n in NAMES if n != row.name], DATA)
        assert row.decibels == pytest.approx(db, abs=2e-3), row.name
        assert row.kl == pytest.approx(kl, rel=1e-2, abs=1e-7), row.name
    assert found.decibels == pytest.approx(by_hand(m, NAMES, DATA)[0], abs=2e-3)
    values = [r.kl for r in found.rows]
    assert values == sorted(values, reverse=mode == "one")
    assert found.rows[0].name == "blocks.1.down" and found.ignore(1) == ["blocks.1.down"]


def test_without_a_head_the_output_is_what_counts():
    m = build(head=False)
    found = sensitivity(m, FOUR, DATA, progress=False)
    assert found.kl is None and {r.kl for r in found.rows} == {None}
    assert [r.decibels for r in found.rows] == sorted(r.decibels for r in found.rows)
    assert found.rows[0].decibels == pytest.approx(by_hand(m, [found.rows[0].name], DATA)[0], abs=2e-3)
    assert "n/a" in str(found)


def test_calls_of_several_shapes_count_together():
    m, data = build(), [DATA[0], DATA[1][:1, :1], DATA[1][:2]]
    found = sensitivity(m, FOUR, data, progress=False)
    for row in found.rows[:3]:
        assert row.decibels == pytest.approx(by_hand(m, [row.name], data)[0], abs=2e-3)


def test_solvers_and_transforms_see_the_unquantized_model():
    """Behind another linear that is quantized the solution would be another: each is solved as if it were alone."""
    m = build()
    options = {"weight": "int4.g32", "input": "int8.tensor.static", "passes": ["smooth", "gptq", "range(rule='mse')"], "lower": "eager"}
    whole = {r.name: r.decibels for r in sensitivity(m, options, DATA, progress=False).rows}
    for name in ("blocks.0.down", "blocks.1.up"):
        alone = sensitivity(m, {**options, "ignore": [n for n in NAMES if n != name]}, DATA, progress=False)
        assert [r.name for r in alone.rows] == [name] and alone.rows[0].decibels == pytest.approx(whole[name], abs=1e-6)
        assert alone.decibels == pytest.approx(whole[name], abs=1e-6)


def test_nothing_of_the_model_changes():
    m = build()
    fast = torch.compile(m, backend="qcompile", options=FOUR)
    with torch.no_grad():
        before = fast(DATA[0])
    state, kept = copy.deepcopy(m.state_dict()), list(KEPT)
    sensitivity(fast, {"recipe": "W4A16_GPTQ", "lower": "eager"}, DATA, progress=False)
    assert kept == KEPT and all(torch.equal(v, m.state_dict()[k]) for k, v in state.items())
    assert not any(r.solutions for p in m.parameters() if (r := TABLE.get(p)) is not None)
    with torch.no_grad():
        assert torch.equal(fast(DATA[0]), before)


def test_what_is_ignored_mends_the_model():
    """The ranking feeds ``ignore``: the model without its most sensitive linear is what all-but-one measured."""
    m = build()
    ranked = sensitivity(m, FOUR, DATA, progress=False)
    apart = sensitivity(m, FOUR, DATA, mode="all-but-one", progress=False)
    mended = calibrate(torch.compile(m, backend="qcompile", options={**FOUR, "ignore": ranked.ignore(1)}), DATA, progress=False).outcome.quality
    assert mended.decibels == pytest.approx(apart.rows[0].decibels, abs=2e-3) and mended.decibels > apart.decibels + 3


def test_between_graphs_other_code_is_noted():
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.from_numpy(shifted(self.a(x))))

    @torch.compiler.disable
    def shifted(x: torch.Tensor):
        return x.numpy() + 1

    found = sensitivity(Apart().eval(), FOUR, [DATA[0]], progress=False)
    assert {r.name: r.reached for r in found.rows} == {"a": False, "b": True}
    assert all(r.decibels is not None for r in found.rows) and "measured at the output of a captured graph" in str(found)


# --- the result ----------------------------------------------------------------------------------------------------------


def made() -> Sensitivity:
    rows = [Effect(f"l.{i}", (8, 8), "int4.g32", size, 10.0 + i, None, True) for i, size in enumerate((100, 500, 300, 100))]
    return Sensitivity("W4", "one", tuple(rows), 5.0, None)


def test_ignore():
    s = made()
    assert s.ignore(2) == ["l.0", "l.1"] and s.ignore(0) == [] and s.ignore(99) == ["l.0", "l.1", "l.2", "l.3"]
    assert s.ignore(share=0.4) == ["l.0", "l.2"] and s.ignore(share=1) == s.ignore(4) and s.ignore(share=0) == []
    for wrong in ({}, {"n": 1, "share": 0.5}, {"share": 1.5}):
        with pytest.raises(OptionError):
            s.ignore(**wrong)


def test_text_and_json():
    s = made()
    text = str(s)
    assert text.index("l.0") < text.index("l.3") and max(map(len, text.splitlines())) <= 120 and "all quantized: 5.0 dB" in text
    data = json.loads(s.to_json())
    assert data["rows"][1]["name"] == "l.1" and data["rows"][1]["decibels"] == 11.0 and data["rows"][0]["kl"] is None


def test_not_finite_comes_first():
    from qcompile.sensitivity import _cost, _gain

    good, bad = Effect("good", (1,), "x", 1, 3.0, 2.0, True), Effect("bad", (1,), "x", 1, None, None, False)
    assert sorted([good, bad], key=_cost)[0] is bad and sorted([bad, good], key=_gain)[0] is good


def test_plot(tmp_path, monkeypatch):
    s = made()
    ax = s.plot().axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["l.0", "l.1", "l.2", "l.3"]
    assert [b.get_width() for b in ax.patches] == pytest.approx([10 ** -(1 + i / 10) for i in range(4)])
    s.save_png(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    s.save_html(str(tmp_path / "s.html"))
    page = (tmp_path / "s.html").read_text()
    image = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert image is not None and base64.b64decode(image[1]).startswith(b"\x89PNG") and "l.3" in page
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(QcompileError, match="pip install matplotlib"):
        s.plot()


def test_bad_input():
    m = build()
    with pytest.raises(OptionError, match="'all-but-one'"):
        sensitivity(m, FOUR, DATA, mode="two")
    with pytest.raises(OptionError, match="W8A8"):
        sensitivity(m, "W8A9", DATA)
    with pytest.raises(CalibrationError, match="at least one batch"):
        sensitivity(m, FOUR, [], progress=False)
    with pytest.raises(CalibrationError, match="keeps 16 bits"):
        sensitivity(m, {**FOUR, "ignore": ["Linear"]}, DATA, progress=False)
    with pytest.raises(CalibrationError, match="does not fit"):
        sensitivity(m, FOUR, DATA, progress=False, memory="1kB")
    with pytest.raises(CalibrationError, match="NaN"):
        sensitivity(m, FOUR, [DATA[0] * float("nan")], progress=False)
    with pytest.raises(CalibrationError, match=r"model\.eval"):
        sensitivity(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1)).train(), FOUR, DATA)
