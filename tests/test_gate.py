"""The accuracy gate: a collapse is named with its remedy, an error under strict, and a model that is fine passes in silence."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from small import said
from torch import nn

import qcompile
from qcompile.calibrate import KEPT, calibrate
from qcompile.core.errors import QcompileWarning, StrictError
from qcompile.core.recipe import Choice, Method
from qcompile.core.scheme import Scheme
from qcompile.core.solution import Solution
from qcompile.gate import enforce, remedies, verdict
from qcompile.quality import Quality
from qcompile.sequence import Outcome, Solved
from qcompile.solve import spread
from qcompile.weights import TABLE

TENSOR = {"weight": "int8.row", "input": "int8.tensor.static", "lower": "eager"}


@pytest.fixture(autouse=True)
def nothing_kept():
    KEPT.clear()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """The layers of ``outliers`` have a channel of their input 3,000 times larger, and its weights smaller: the same function."""

    def __init__(self, outliers: tuple[int, ...], bare: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.lm_head = nn.Linear(32, 50)
        self.bare = bare
        with torch.no_grad():
            for i in outliers:
                self.layers[i].norm.weight[3] *= 3000
                self.layers[i].norm.bias[3] *= 3000
                self.layers[i].up.weight[:, 3] /= 3000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) - (x if self.bare else 0)
        return self.lm_head(x)


def model(*outliers: int, bare: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(outliers, bare).eval()


DATA = [torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def choice(weight: str = "int8.row", x: str | None = "int8.row", *methods: str) -> Choice:
    return Choice(Scheme.parse(weight), Scheme.parse(x) if x else None, "", tuple(map(Method.parse, methods)))


def line(name: str, db: float | None, asked: Choice | None = None, spread: float | None = 2.0) -> Solved:
    asked = asked or choice()
    return Solved(name, str(asked), db, 100, 0.0, (), asked, spread)


def outcome(lines: list[Solved], signal: float = 1.0, noise: float = 1e-4, kl: float | None = None, finite: bool = True) -> Outcome:
    return Outcome(lines, Quality(signal, noise, kl or 0.0, int(kl is not None), finite), 100)


HEALTHY = [line(f"layers.{i}.up", 38.0 + i) for i in range(6)]


# --- rules -------------------------------------------------------------------------------------------------------------


def test_silence():
    assert verdict(outcome(HEALTHY, kl=0.01)) == [] and verdict(Outcome()) == []


@pytest.mark.parametrize(("noise", "collapsed"), [(0.099, False), (0.101, True)])
def test_the_models_output_at_ten_decibels(noise, collapsed):
    assert bool(verdict(outcome(HEALTHY, noise=noise))) is collapsed


@pytest.mark.parametrize(("kl", "collapsed"), [(0.49, False), (0.51, True)])
def test_divergence_at_half_a_nat(kl, collapsed):
    found = verdict(outcome(HEALTHY, kl=kl))
    assert bool(found) is collapsed
    if collapsed:
        assert "0.51 nats" in found[0].measured and found[0].sites[0] == "layers.0.up"


def test_an_output_that_is_not_finite_names_the_linears_that_are_not():
    (whole, sites) = verdict(outcome([*HEALTHY, line("bad", math.nan)], finite=False))
    assert "NaN or infinite" in whole.measured and whole.sites == sites.sites == ("bad",) and "ignore=['bad']" in sites.remedy and "sensitivity" in whole.remedy


@pytest.mark.parametrize(("db", "low"), [(19.9, True), (20.1, False), (25.0, False)])
def test_far_below_peers(db, low):
    """Peers have 40 dB: under 20 dB is found, and what is over is harmless."""
    found = verdict(outcome([*HEALTHY, line("bad", db)]))
    assert [f.sites for f in found] == ([("bad",)] if low else [])


def test_peers_have_the_same_schemes_and_are_enough():
    other = choice("int4.g32", None)
    assert not verdict(outcome([*HEALTHY, line("bad", 19.0, other)]))
    assert not verdict(outcome([*HEALTHY[:2], line("bad", 1.0)], noise=1e-4))
    fours = [line(f"x.{i}", 18.0, other) for i in range(5)]
    assert not verdict(outcome([*fours, line("close", 4.0, other)])) and verdict(outcome([*fours, line("far", 2.9, other)]))


def test_many_names_are_cut():
    text = str(verdict(outcome([*(line(f"good.{i}", 40.0) for i in range(9)), *(line(f"bad.{i}", 1.0) for i in range(7))]))[0])
    assert "and 3 more" in text and "bad.3" in text and "bad.4" not in text


# --- remedies ----------------------------------------------------------------------------------------------------------


def words(asked: Choice, spread: float | None = 2.0) -> str:
    return " | ".join(remedies(line("x", 1.0, asked, spread)))


def test_remedies_are_read_off_what_was_done():
    assert "'smooth'" in words(choice(), 300.0) and "outliers(threshold=6.0)" in words(choice(), 300.0)
    assert "smooth" not in words(choice()) and "outliers" not in words(choice())
    assert "'smooth'" in words(choice(), None)
    smoothed = words(choice("int8.row", "int8.row", "smooth"), 300.0)
    assert "'smooth'" not in smoothed and "outliers" in smoothed
    assert remedies(line("x", 1.0, choice("int8.row", "int8.row", "smooth", "outliers(columns=8)"), 300.0)) == []
    four = words(choice("int4.g32", None))
    assert "'gptq'" in four and "'awq'" in four and "more bits than 4" in four
    solved = words(choice("int4.g32", None, "awq", "gptq"))
    assert "gptq" not in solved and "awq" not in solved and "more bits than 4" in solved
    static = choice("int8.row", "int8.tensor.static")
    assert "range(rule='mse')" in words(static) and "per token" in words(choice("int8.row", "int8.tensor.static", "range(rule='mse')"))


def test_every_remedy_is_a_step_that_exists():
    from qcompile.options import Options

    for step in ("smooth", "awq", "gptq", "outliers(threshold=6.0)", "range(rule='mse')"):
        Options.parse({"recipe": "W8A8_STATIC", "passes": [step]})


def test_spread():
    rows = torch.ones(6, 9)
    rows[2, 4] = -30
    plain = choice()
    assert spread(rows, Solution(), plain) == 30
    s = torch.ones(9)
    s[4] = 10
    assert spread(rows, Solution(smooth=s), plain) == 3
    assert spread(rows, Solution(outliers=torch.tensor([4])), plain) == 1
    assert spread(rows, Solution(), choice("int8.row", "int8.row", "outliers(dynamic=2)")) == 1
    assert spread(torch.zeros(3, 4), Solution(), plain) is None


# --- what is measured ----------------------------------------------------------------------------------------------------


def test_quality_leaves_out_what_the_original_masks():
    exact = torch.randn(4, 10)
    y = exact + 0.01 * torch.randn(4, 10)
    plain, masked = Quality(), Quality()
    plain.see(exact[:, 1:], y[:, 1:], True)
    exact[:, 0] = y[:, 0] = -math.inf
    masked.see(exact, y, True)
    assert masked.finite and masked.decibels == pytest.approx(plain.decibels) and masked.kl == pytest.approx(plain.kl, rel=1e-3)
    y[0, 3] = math.nan
    masked.see(exact, y, True)
    assert not masked.finite and masked.decibels is None


def test_recipes_that_need_no_data_are_measured_too():
    found = calibrate(torch.compile(model(), backend="qcompile", options={"recipe": "W8A8", "lower": "eager"}), DATA).outcome
    assert len(found.solved) == 8 and all(s.decibels > 30 for s in found.solved) and found.quality.decibels > 30 and 0 < found.quality.kl < 1e-3


# --- on models -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_fine_passes_in_silence():
    fast = torch.compile(model(), backend="qcompile", options={**TENSOR, "strict": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error", QcompileWarning)
        calibrate(fast, DATA)


def test_one_bad_linear_is_named_with_its_remedy():
    fast = torch.compile(model(2), backend="qcompile", options=TENSOR)
    with pytest.warns(QcompileWarning, match=r"linears far below their peers: layers\.2\.up \(") as caught:
        calibrate(fast, DATA)
    text = str(caught[0].message)
    assert "times the median one" in text and "pass 'smooth'" in text and "ignore=['layers.2.up']" in text and "layers.1" not in text


@pytest.mark.parametrize("passes", [["smooth(alpha=0.5)"], ["outliers(threshold=100.0)"]])
def test_the_remedies_work(passes):
    with warnings.catch_warnings():
        warnings.simplefilter("error", QcompileWarning)
        out = calibrate(torch.compile(model(2), backend="qcompile", options={**TENSOR, "passes": passes}), DATA).outcome
    assert min(s.decibels for s in out.solved) > 20


def test_a_collapse():
    fast = torch.compile(model(0, 1, 2, 3, bare=True), backend="qcompile", options=TENSOR)
    with pytest.warns(QcompileWarning, match="the model's output has collapsed: its SQNR is"):
        calibrate(fast, DATA)
    with said() as texts, torch.no_grad():
        fast(DATA[0])
    assert not texts  # said once, where it was measured


@pytest.mark.parametrize("ignore", [[], ["tail"]])
def test_code_between_graphs_hides_no_collapse(ignore):
    """What an eager step makes of one graph's output reaches the next as it was recorded: the quality is that of the worse of both."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = Layer(), nn.Linear(32, 40)

        @torch.compiler.disable
        def between(self, x):
            return x * 1.0

        def forward(self, x):
            return self.tail(self.between(self.body.down(torch.relu(self.body.up(x)))))

    torch.manual_seed(0)
    model, x = Broken(), torch.randn(64, 32)
    with torch.no_grad(), said() as texts:
        fast = torch.compile(model, backend="qcompile", options={"weight": "int2.row", "lower": "eager", "ignore": ignore})
        sitting = calibrate(fast)
        with sitting:
            fast(x)
    found = sitting.outcome.quality.decibels
    assert found is not None and found < 10 and any("SQNR" in text for text in texts)


def test_strict_raises_and_leaves_nothing_behind():
    m = model(0, 1, 2, 3, bare=True)
    fast = torch.compile(m, backend="qcompile", options={**TENSOR, "strict": True})
    with pytest.raises(StrictError, match=r"collapsed.*layers\.0\.up"):
        calibrate(fast, DATA)
    record = TABLE.get(m.layers[0].up.weight)
    assert record is not None and not record.solutions
    with torch.no_grad(), pytest.raises(Exception, match="collapsed"):  # Dynamo wraps what a backend raises
        fast(DATA[0])


def test_the_first_call_is_judged():
    with said() as texts, torch.no_grad():
        torch.compile(model(0, 1, 2, 3, bare=True), backend="qcompile", options=TENSOR)(DATA[0])
    assert any("calibrated 8 linears on the first call" in t for t in texts) and any("has collapsed" in t for t in texts)
    with torch.no_grad(), pytest.raises(Exception, match="collapsed"):
        torch.compile(model(0, 1, 2, 3, bare=True), backend="qcompile", options={**TENSOR, "strict": True})(DATA[0])


def saved(path, *outliers, bare=False):
    kept = model(*outliers, bare=bare)  # statistics are taken when they are asked for: of a model that lives
    with said():
        calibrate(torch.compile(kept, backend="qcompile", options=TENSOR), DATA, progress=False).save(path)
    return path


def test_what_is_solved_from_a_file_is_judged(tmp_path):
    """On the first call, in each linear and at the output."""
    for bare, name in ((True, "the model's output has collapsed"), (False, r"linears far below their peers: layers.2.up (")):
        made = (0, 1, 2, 3) if bare else (2,)
        path = saved(str(tmp_path / "c.safetensors"), *made, bare=bare)
        fast = [torch.compile(model(*made, bare=bare), backend="qcompile", options={**TENSOR, "calibration": path, "strict": strict}) for strict in (False, True)]
        with said() as texts, torch.no_grad():
            fast[0](DATA[0])
        assert len([t for t in texts if name in t]) == 1
        with torch.no_grad(), pytest.raises(Exception, match=re.escape(name)):
            fast[1](DATA[0])


def test_judging_is_no_calibration(tmp_path):
    """A first call with values that are not finite computes what it did; what is fine passes in silence."""
    path, bad = saved(str(tmp_path / "c.safetensors")), DATA[0].clone()
    bad[0, 0, 0] = math.nan
    for x in (DATA[0], bad):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", QcompileWarning)
            y = torch.compile(model(), backend="qcompile", options={**TENSOR, "calibration": path, "strict": True})(x)
        assert torch.isfinite(y[1]).all()


def test_enforce_without_findings_keeps_solutions():
    enforce(outcome(HEALTHY), strict=True)
    with pytest.warns(qcompile.QcompileWarning, match="collapsed"):
        enforce(outcome(HEALTHY, noise=1.0), strict=False)
