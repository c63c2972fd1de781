"""What ``qcompile.explain`` measures, against sums by hand and an independent computation, on every way to compile a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from explained import EAGER, IDS, Block, tiny
from tiny_models import tiny as tiny_model
from torch import nn

import qcompile
from qcompile.core.qtensor import dequantize, quantize
from qcompile.core.scheme import Scheme
from qcompile.kernels.quantize import reference as quantize_input
from qcompile.measure import sqnr


@pytest.fixture(scope="module")
def report() -> qcompile.Report:
    torch._dynamo.reset()
    return qcompile.explain(torch.compile(tiny(), backend="qcompile", options=EAGER), IDS)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_totals_by_hand(report):
    layer, head, gate, convolution, unused, table = 2 * 64 * 128 * 4, 100 * 64 * 4, 4 * 64 * 4, 64 * 64 * 3 * 4, 32 * 32 * 4, 100 * 64 * 4
    packed = (128 * 64 + 128 * 4) + (64 * 128 + 64 * 4)
    t = report.totals
    assert t.bytes_before == 3 * layer + head + gate + convolution + unused
    assert t.bytes_after == 3 * packed + head + gate + convolution + unused
    assert t.coverage == 3 * layer / (3 * layer + convolution + unused)
    assert t.coverage_all == 3 * layer / t.bytes_before
    flops = 2 * 14 * np.array([6 * 64 * 128, 100 * 64, 4 * 64, 64 * 64 * 3])
    assert t.coverage_flops == flops[0] / (flops[0] + flops[3]) and t.coverage_flops_all == flops[0] / flops.sum()
    biases = (3 * 128 + 64 + 100 + 32) * 4
    assert t.resident_bytes == 3 * packed + t.bytes_before + table + biases + 8
    assert t.released == 0


def test_rows(report):
    up, down = report.sites[:2]
    assert [row.name for row in report.sites] == [f"layers.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert (up.shape, up.role, up.weight, up.input, up.why, up.rows, up.regime, up.graph) == ((128, 64), "linear", "int8.row", "int8.row", "W8A8", 14, "small", 0)
    assert up.bits == 8 + 32 / 64 and down.bits == 8 + 32 / 128
    assert (up.bytes_before, up.bytes_after, up.flops) == (128 * 64 * 4, 128 * 64 + 512, 2 * 14 * 128 * 64)
    assert up.kernel == "reference: options['lower'] is 'eager'"
    assert {(row.name, row.role) for row in report.kept} == {("lm_head", "head"), ("gate", "router"), ("convolution.weight", "other"), ("unused", "unread")}
    why = {row.name: row.reason for row in report.kept}
    assert why["convolution.weight"] == "a convolution with a kernel of 3" and why["unused"] == "no compiled graph reads it in this call"


def decibels(exact: np.ndarray, y: np.ndarray) -> float:
    return 10 * np.log10((exact.astype(np.float64) ** 2).sum() / ((exact.astype(np.float64) - y) ** 2).sum())


@pytest.mark.parametrize("given", [None, "int8.row", "int8.tensor.static"])
def test_sqnr_against_numpy(given):
    torch.manual_seed(1)
    layer, x = nn.Linear(96, 48), torch.randn(5, 96)
    options = {"weight": "int8.row", **({"input": given} if given else {}), **EAGER}
    row = qcompile.explain(torch.compile(layer, backend="qcompile", options=options), x).sites[0]
    w, v = layer.weight.detach().numpy(), x.numpy()
    scale = np.abs(w).max(1, keepdims=True) / 127
    w_hat = np.rint(w / scale) * scale
    axis = {"int8.row": 1, "int8.tensor.static": None, None: None}[given]
    step = np.abs(v).max(axis, keepdims=True) / 127
    v_hat = np.rint(v / step).clip(-128, 127) * step if given else v
    assert row.weight_db == pytest.approx(decibels(w, w_hat), abs=1e-3)
    assert row.output_db == pytest.approx(decibels(v.astype(np.float64) @ w.T, v_hat.astype(np.float64) @ w_hat.T), abs=1e-2)


def test_static_range_is_the_calibrated_one():
    """The range comes from the first call, not from the call that is explained."""
    torch.manual_seed(1)
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    fast = torch.compile(layer, backend="qcompile", options={"recipe": "W8A8_STATIC", **EAGER})
    good = qcompile.explain(fast, x).sites[0].output_db
    clipped = qcompile.explain(fast, x * 20).sites[0].output_db
    assert good > 30 and clipped < 5


def test_each_input_has_its_own_static_range():
    """Readers of one input share a range, others do not."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c((self.a(x) + self.b(x)) / 500)

    report = qcompile.explain(torch.compile(Scaled(), backend="qcompile", options={"recipe": "W8A8_STATIC", **EAGER}), torch.randn(4, 64))
    assert [row.name for row in report.sites] == ["a", "b", "c"] and all(row.output_db > 30 for row in report.sites)


def test_autocast_casts_the_input_first():
    layer, x = nn.Linear(96, 48), torch.randn(5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        row = qcompile.explain(torch.compile(layer, backend="qcompile", options={"weight": "int8.row", "input": "int8.row", **EAGER}), x).sites[0]

    def expected(v: np.ndarray) -> float:
        w = layer.weight.detach().numpy()
        scale, step = np.abs(w).max(1, keepdims=True) / 127, np.abs(v).max(1, keepdims=True) / 127
        return decibels(v.astype(np.float64) @ w.T, (np.rint(v / step) * step).astype(np.float64) @ (np.rint(w / scale) * scale).T)

    assert row.output_db == pytest.approx(expected(x.bfloat16().float().numpy()), abs=1e-3)
    assert row.output_db != pytest.approx(expected(x.numpy()), abs=1e-2)


def test_exact_weights_have_no_error():
    layer = nn.Linear(32, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, (16, 32)).float())
        layer.weight[:, 0] = 127
    row = qcompile.explain(torch.compile(layer, backend="qcompile", options={"weight": "int8.row", **EAGER}), torch.randn(3, 32)).sites[0]
    assert row.weight_db == row.output_db == 200


def test_sqnr():
    assert sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20)
    assert sqnr(torch.ones(3), torch.ones(3)) == 200
    assert sqnr(torch.zeros(3), torch.zeros(3)) is None and sqnr(torch.ones(2), torch.tensor([1.0, float("nan")])) is None


def test_bits_of_packed_groups():
    fast = torch.compile(nn.Linear(256, 64), backend="qcompile", options={"weight": "uint4.g128.point", **EAGER})
    row = qcompile.explain(fast, torch.randn(1, 256)).sites[0]
    assert row.bits == 4 + (16 + 8) / 128 and row.regime == "decode" and row.input is None and row.scheme == "uint4.g128.point"


def test_explaining_changes_nothing():
    model = tiny()
    fast = torch.compile(model, backend="qcompile", options=EAGER)
    with torch.no_grad():
        before = fast(IDS)[0]
    state = torch.random.get_rng_state()
    qcompile.explain(fast, IDS)
    assert torch.equal(torch.random.get_rng_state(), state) and int(model.calls) == 2
    with torch.no_grad():
        assert torch.equal(fast(IDS)[0], before)


# --- what may be explained ---------------------------------------------------------------------------------------------


def test_inductor():
    report = qcompile.explain(torch.compile(Block().eval(), backend="qcompile"), torch.randn(3, 64))
    assert report.graphs[0].kernel_count > 0 and report.graphs[0].lower == "inductor"
    assert all(row.kernel and "eager" not in row.kernel for row in report.sites)
    assert {row.weight_db > 30 for row in report.sites} == {True}


def test_compiled_in_place():
    model = tiny()
    model.compile(backend="qcompile", options=EAGER)
    report = qcompile.explain(model, IDS)
    assert len(report.sites) == 6 and [row.name for row in report.kept if row.role == "unread"] == ["unused"]


def test_compiled_function_and_method():
    model = tiny()
    function = torch.compile(lambda ids: model(ids)[0] + 1, backend="qcompile", options=EAGER)
    names = [f"layers.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert [row.name for row in qcompile.explain(function, IDS).sites] == names
    model.compile(backend="qcompile", options=EAGER)
    report = qcompile.explain(model.generate, IDS)
    assert [row.name for row in report.sites] == names and [row.name for row in report.kept if row.role == "unread"] == ["unused"]


def test_regional():
    model = tiny()
    for layer in model.layers:
        layer.compile(backend="qcompile", options=EAGER)
    report = qcompile.explain(model, IDS)
    (graph,) = report.graphs
    assert (graph.parameter_sets, graph.calls, graph.sites) == (3, 3, 2)
    assert [row.name for row in report.sites] == [f"layers.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert len({row.weight_db for row in report.sites}) == 6
    assert [g.label for g in report.site_groups()] == ["layers.*.up  x3", "layers.*.down  x3"]
    reasons = {row.name: row.reason for row in report.kept}
    assert set(reasons) == {"embedding", "gate", "convolution", "lm_head", "unused"}
    assert "embedding table" in reasons["embedding"] and "embedding table" not in reasons["lm_head"]
    assert report.totals.bytes_before == tiny_bytes(model) - model.embedding.weight.nbytes


def tiny_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.dim() > 1)


def test_regional_with_a_rule_for_one_layer():
    model = tiny()
    for layer in model.layers:
        layer.compile(backend="qcompile", options={"ignore": ["layers.1.up"], **EAGER})
    report = qcompile.explain(model, IDS)
    assert "layers.1.up" not in [row.name for row in report.sites] and "layers.1.down" in [row.name for row in report.sites]
    assert [row.reason for row in report.kept if row.name == "layers.1.up"] == ["rule 'layers.1.up' keeps 16 bits"]
    assert len(report.graphs) == 2


def test_graph_break():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    report = qcompile.explain(torch.compile(Broken().eval(), backend="qcompile", options=EAGER), torch.randn(2, 32))
    assert [(row.name, row.graph) for row in report.sites] == [("a", 0), ("b", 1)] and report.totals.coverage == 1 and not report.kept


def test_calls_of_one_graph_are_summed():
    layer = nn.Linear(32, 32)
    fast = torch.compile(layer, backend="qcompile", options=EAGER)
    report = qcompile.explain(lambda x: fast(fast(fast(x))), torch.randn(4, 32))
    assert len(report.sites) == 1 and (report.graphs[0].calls, report.graphs[0].parameter_sets) == (3, 1)
    assert report.totals.bytes_before == 32 * 32 * 4 and report.totals.coverage_flops == 1


def test_prefill_and_decode():
    """Two graphs read the same weights: a row for each regime, each weight's bytes once."""
    model = tiny()
    fast = torch.compile(model, backend="qcompile", options=EAGER, dynamic=False)
    report = qcompile.explain(lambda: (fast(IDS), fast(IDS[:1, :5]), fast(IDS[:1, :1])))
    assert [(row.name, row.graph, row.rows, row.regime) for row in report.sites[::6]] == [
        ("layers.0.up", 0, 14, "small"),
        ("layers.0.up", 1, 5, "small"),
        ("layers.0.up", 2, 1, "decode"),
    ]
    groups = report.site_groups()
    assert [(g.label, g.m, g.total("bytes_after")) for g in groups[::2]] == [("layers.*.up  x3", "5-14", 3 * (64 * 128 + 512)), ("layers.*.up  x3", "1", 3 * (64 * 128 + 512))]
    assert report.totals.bytes_before == sum(g.total("bytes_before") for g in groups[:2]) + sum(g.total("nbytes") for g in report.kept_groups())
    linears, head, gate, convolution = 6 * 64 * 128, 64 * 100, 64 * 4, 64 * 64 * 3
    assert report.totals.coverage_flops_all == linears / (linears + head + gate + convolution)


class Twice(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.fc, self.transposed = nn.Linear(32, 32, bias=False), transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.fc(x))
        return x @ self.fc.weight if self.transposed else self.fc(x)


def test_weight_used_twice_counts_once():
    report = qcompile.explain(torch.compile(Twice(False), backend="qcompile", options=EAGER), torch.randn(4, 32))
    assert [row.name for row in report.sites] == ["fc", "fc@2"]
    assert (report.totals.bytes_before, report.totals.bytes_after) == (32 * 32 * 4, 32 * 32 + 128) and report.totals.coverage == 1


def test_weight_packed_and_kept_is_held_twice():
    report = qcompile.explain(torch.compile(Twice(False), backend="qcompile", options={"ignore": ["fc@2"], **EAGER}), torch.randn(4, 32))
    assert ([row.name for row in report.sites], [row.name for row in report.kept]) == (["fc"], ["fc@2"])
    assert report.totals.bytes_after == 32 * 32 + 128 + 32 * 32 * 4 and report.totals.coverage_flops == 1 / 2


def test_weight_packed_in_two_ways_is_covered_once():
    report = qcompile.explain(torch.compile(Twice(True), backend="qcompile", options=EAGER), torch.randn(4, 32))
    assert [row.name for row in report.sites] == ["fc", "fc@2"] and report.totals.coverage == 1
    assert (report.totals.bytes_before, report.totals.bytes_after) == (32 * 32 * 4, 2 * (32 * 32 + 128))


def test_flops_count_calls():
    a, b = nn.Linear(32, 32), nn.Linear(32, 32)
    packed, kept = torch.compile(a, backend="qcompile", options=EAGER), torch.compile(b, backend="qcompile", options={"weight": "int8.row", "ignore": ["Linear"], **EAGER})
    report = qcompile.explain(lambda x: packed(packed(packed(kept(x)))), torch.randn(4, 32))
    assert report.totals.coverage_flops == 3 / 4 and report.totals.coverage == 1 / 2


def test_flops_of_what_is_no_linear():
    """By hand, for every kind of product."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.up, self.cell = nn.Conv1d(32, 16, 3, padding=1), nn.ConvTranspose1d(16, 8, 2, stride=2), nn.GRUCell(16, 24)
            self.e, self.f, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((16, 40), (20, 16), (2, 10, 7)))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = self.wide(x)
            rows = x.transpose(1, 2)  # (2, 10, 16)
            return self.up(x), self.cell(x[:, :, 0]), torch.einsum("btk,kn->btn", rows, self.e), self.f @ x, torch.bmm(self.b.transpose(1, 2), rows)

    report = qcompile.explain(torch.compile(Products(), backend="qcompile", options=EAGER), torch.randn(2, 32, 10))
    assert {row.name: row.flops for row in report.kept} == {
        "wide.weight": 2 * 20 * 16 * 32 * 3,
        "up.weight": 2 * 20 * 16 * 8 * 2,
        "cell.weight_ih": 2 * 2 * 3 * 24 * 16,
        "cell.weight_hh": 2 * 2 * 3 * 24 * 24,
        "b": 2 * 2 * 7 * 10 * 16,
    }
    assert {row.name: row.flops for row in report.sites} == {"e": 2 * 20 * 16 * 40, "f": 2 * 20 * 20 * 16}  # linears, written as einsum and the other way round


def test_stacked_experts():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 32, 48))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, self.w)

    model, x = Experts(), torch.randn(4, 5, 32)
    row = qcompile.explain(torch.compile(model, backend="qcompile", options=EAGER), x).sites[0]
    assert (row.role, row.shape, row.rows) == ("experts", (4, 48, 32), 20) and row.weight_db > 30
    w, rounded = model.w.detach().mT, Scheme.parse("int8.row")
    codes, scale = quantize_input(x, [], "int8.row")
    exact, got = x.double() @ w.double().mT, (codes.double() * scale.double()) @ dequantize(quantize(w, rounded), torch.float64).mT
    assert row.output_db == pytest.approx(decibels(exact.numpy(), got.numpy()), abs=1e-2)
    assert row.flops == 2 * 20 * 32 * 48 and row.bits == 8 + 32 / 32


def test_outputs_of_experts_of_a_model():
    """Whatever form they run in; noise of weights that are rounded alone is as strong behind the product."""
    found = []
    for form in ("grouped_mm", "batched_mm"):
        torch._dynamo.reset()
        model, inputs = tiny_model("mixtral", num_hidden_layers=1, experts_implementation=form)
        report = qcompile.explain(torch.compile(model, backend="qcompile", options=EAGER | {"recipe": "W8A16"}), **inputs)
        rows = {row.name.rpartition(".")[2]: row for row in report.sites if row.role == "experts"}
        assert set(rows) == {"gate_up_proj", "down_proj"} and all(row.output_db == pytest.approx(row.weight_db, abs=2) for row in rows.values())
        found.append([rows[name].output_db for name in sorted(rows)])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_released():
    model = tiny()
    fast = torch.compile(model, backend="qcompile", options=EAGER)
    held = qcompile.explain(fast, IDS).totals
    freed = qcompile.release_weights(model)
    assert freed == 3 * 2 * 64 * 128 * 4
    report = qcompile.explain(fast, IDS)
    assert [(row.weight_db, row.output_db, row.rows) for row in report.sites] == [(None, None, 14)] * 6
    assert report.totals.released == 6 and report.totals.resident_bytes == held.resident_bytes - freed + 6 * 4
    assert (report.totals.bytes_before, report.totals.bytes_after, report.totals.coverage) == (held.bytes_before, held.bytes_after, held.coverage)
    assert "n/a" in str(report) and "6 16-bit weights released" in str(report)
    assert json.loads(report.to_json())["sites"][0]["weight_db"] is None


def test_no_linear():
    report = qcompile.explain(torch.compile(nn.Conv2d(3, 8, 3), backend="qcompile", options=EAGER), torch.randn(1, 3, 8, 8))
    assert not report.sites and report.notes == ("no linear was found in the graphs that ran",)
    assert report.totals.coverage == 0 and report.kept[0].reason == "a convolution with a kernel of 3x3" and "weight" in str(report)


def test_notes_are_the_graphs(report):
    fast = torch.compile(nn.Linear(32, 32), backend="qcompile", options={"ignore": ["nothing_like_this"], **EAGER})
    with pytest.warns(qcompile.QcompileWarning):
        assert "graph 0: rule 'nothing_like_this' matched nothing" in qcompile.explain(fast, torch.randn(2, 32)).notes


@pytest.mark.parametrize("regional", [False, True])
def test_a_rule_that_another_graph_matches_is_no_note(regional):
    class Layer(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(super().forward(x))

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(32, 32) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    model, options = Broken(), {"ignore": ["layers.1"], **EAGER}
    if regional:
        for layer in model.layers:
            layer.compile(backend="qcompile", options=options)
    fast = model if regional else torch.compile(model, backend="qcompile", options=options)
    report = qcompile.explain(fast, torch.randn(2, 32))
    assert [row.name for row in report.kept] == ["layers.1"] and report.notes == () and not any(row.notes for row in report.graphs)


# --- what calibration found ----------------------------------------------------------------------------------------------


def calibrated(model: nn.Module, data: list[torch.Tensor], **options: object) -> tuple[object, qcompile.Report, object]:
    """(compiled model, its report, calibration)."""
    from qcompile.calibrate import calibrate

    fast = torch.compile(model, backend="qcompile", options={**options, **EAGER})
    found = calibrate(fast, data, progress=False)
    return fast, qcompile.explain(fast, data[0]), found


def test_uncalibrated_rows_have_none(report):
    assert {row.calibrated for row in report.sites} == {None}


def test_rows_of_a_calibrated_model():
    torch.manual_seed(0)
    data = [torch.randn(40, 64) for _ in range(3)]
    options = {"weight": "int4.g32", "input": "int8.tensor.static", "passes": ["smooth(alpha=0.5)", "gptq"]}
    with pytest.warns(qcompile.QcompileWarning, match="120 tokens for 128 input channels"):
        _, report, found = calibrated(Block().eval(), data, **options)
    up, down = (row.calibrated for row in report.sites)
    assert (up.solver, up.steps, up.tokens, up.outliers) == ("gptq", ("smooth(alpha=0.5)", "gptq"), 120, ())
    assert up.place.startswith("multiply: ") and "residual stream" in up.place and down.place == "rows: in the rows of up"
    assert [row.calibrated.decibels for row in report.sites] == [s.decibels for s in found.outcome.solved]
    assert up.notes == () and down.notes == ("120 tokens for 128 input channels: the Hessian is singular and leans on its damping",)
    assert [n for n in report.notes if "Hessian" in n] == [f"down: {down.notes[0]}"]
    assert -up.clip[0] == up.clip[1] > 0 and json.loads(report.to_json())["sites"][0]["calibrated"]["clip"] == list(up.clip)


def test_clip_is_what_the_input_saturates_at():
    data = [torch.rand(40, 64) * 5 - 1]
    for scheme, ends in (("int8.tensor.static", (-1, 1)), ("uint8.tensor.point.static", (0, 1))):
        _, report, _ = calibrated(nn.Linear(64, 32), data, weight="int8.row", input=scheme)
        low, high = report.sites[0].calibrated.clip
        peak = float(data[0].max())
        assert high == pytest.approx(peak, rel=0.02)
        assert low == pytest.approx(-peak if ends[0] else float(data[0].min()), rel=0.05)


def test_static_outlier_columns_are_listed():
    data = [torch.randn(40, 64)]
    data[0][:, [7, 50]] *= 30
    _, report, _ = calibrated(nn.Linear(64, 32), data, recipe="LLM_INT8_STATIC")
    assert report.sites[0].calibrated.outliers == (7, 50) and report.sites[0].calibrated.place is None


@pytest.mark.parametrize(("step", "bits"), [("outliers(columns=16)", 8 + 32 / 64 + 32 * 16 / 64), ("outliers(dynamic=4)", 8 + 32 / 64 + 32), ("outliers(dynamic=4, weights='codes')", 8 + 32 / 64)])
def test_columns_beside_the_codes_count(step, bits):
    """32-bit columns that a static split keeps, the whole weight where each call chooses its own, and nothing where they are read off the codes."""
    _, report, _ = calibrated(nn.Linear(64, 32), [torch.randn(40, 64)], recipe="W8A8", passes=[step])
    assert report.sites[0].bits == bits and report.sites[0].bytes_after == bits * 64 * 32 / 8
    assert report.totals.bytes_after == report.sites[0].bytes_after


def test_calls_with_more_outliers_than_columns_are_counted():
    x = torch.randn(8, 64) * 0.1
    x[0, [3, 9, 20]] = 50.0
    layer = nn.Linear(64, 32)
    fast = torch.compile(layer, backend="qcompile", options={"recipe": "W8A8", "passes": ["outliers(dynamic=2)"], **EAGER})
    with torch.no_grad():
        fast(x), fast(x * 0.01), fast(x)
    expected = "weight: in 3 calls more than 2 columns of the input passed 6.0, those beyond were quantized: outliers(dynamic=4) keeps more"  # the call that is explained counts, too
    assert qcompile.explain(fast, x).notes == (expected,)
    enough = torch.compile(nn.Linear(64, 32), backend="qcompile", options={"recipe": "W8A8", "passes": ["outliers(dynamic=3)"], **EAGER})
    assert qcompile.explain(enough, x).notes == ()
