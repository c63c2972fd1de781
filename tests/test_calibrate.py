"""Sittings: what a user's loop records, what comes of it, and what may go wrong in it."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref

import pytest
import torch
from calibrated import GPTQ, Broken, Mlp, codes, compiled, linears, rows, same_codes, solutions
from small import ROOT, Net, Stack, close, graphs, rounded, said
from tiny_models import tiny
from torch import nn

from qcompile.calibrate import KEPT, calibrate, session
from qcompile.core.errors import CalibrationError, OptionError, QcompileWarning
from qcompile.core.qtensor import dequantize
from qcompile.options import Options, memory_of
from qcompile.replay import nbytes
from qcompile.statistics import Calibration
from qcompile.weights import TABLE

XS = [rows(40, 32, seed=i) for i in range(4)]


def sit(fast, xs=XS, **given):
    with said() as texts, calibrate(fast, progress=False, **given) as sitting:
        for x in xs:
            fast(x)
    return sitting, texts


def by_codes(model, keep=()):
    """A copy of a model with the weights that were solved."""
    twin = copy.deepcopy(model)
    for name, m in linears(twin).items():
        m.weight.data.copy_(dequantize(solutions(model)[name].q, m.weight.dtype))
    return twin


def test_a_sitting(built):
    """Outputs inside are the unquantized model's; afterwards one graph is compiled, which computes with what was solved."""
    model = Mlp()
    fast = compiled(model, dynamic=False)
    with torch.no_grad():
        truth = [model(x) for x in XS]
        with calibrate(fast, progress=False) as sitting:
            assert session() is sitting
            inside = [fast(x) for x in XS]
        assert session() is None and not built
        assert all(torch.equal(a, b) for a, b in zip(inside, truth))
        with said() as texts:
            after = [fast(x) for x in XS]
        assert len(built) == 1 and not texts
        assert all(close(a, by_codes(model)(x)) and not torch.equal(a, b) for a, b, x in zip(after, truth, XS))
    assert sitting.outcome.tokens == 160 and sitting.calibration is not None


def test_what_was_compiled_before_is_left(built):
    """A model that ran quantized runs as it is inside."""
    model = Mlp()
    fast = torch.compile(model, backend="qcompile", options={"weight": "int4.g16", "lower": "eager"})
    with torch.no_grad():
        first = fast(XS[0])
        assert not close(first, model(XS[0]), 1e-3)
        with calibrate(fast, progress=False):
            assert torch.equal(fast(XS[0]), model(XS[0]))
        assert torch.equal(fast(XS[0]), first) and len(built) == 2


@pytest.mark.parametrize("before", [True, False], ids=["after calls", "first"])
@pytest.mark.parametrize("model", [Mlp, lambda: torch.nn.Linear(32, 32)], ids=["module", "torch's own"])
def test_instances_that_share_a_graph_are_calibrated_one_by_one(model, before):
    """Dynamo compiles torch's own modules through a wrapper, whose code no instance has: the graph's code is known for every instance that it served."""
    fast = [torch.compile(model().eval(), backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager"}) for _ in range(3)]
    with torch.no_grad():
        for f in fast if before else ():
            f(XS[0])
        for f in fast:
            sitting, _ = sit(f)
            assert sitting.outcome.tokens == 160
            f(XS[0])
        with said() as texts:
            for f in fast:
                f(XS[0])
    assert not texts, "nothing calibrates on its first call"


@pytest.mark.parametrize("model", [Broken, lambda: Stack(2)], ids=["graph break", "stack"])
def test_calls_after_and_between(model, built):
    model = model()
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            sit(fast)
            y = fast(XS[0])
            twin = copy.deepcopy(model)
            for name, s in solutions(model).items():
                twin.get_submodule(name).weight.copy_(dequantize(s.q, torch.float32))
            assert close(y, twin(XS[0]))


@pytest.mark.parametrize("form", [lambda x: {"x": x}, lambda x: (x,), lambda x: [x], lambda x: x], ids=["dict", "tuple", "list", "tensor"])
def test_batches(form):
    one, two = Mlp(), Mlp()
    two.load_state_dict(one.state_dict())
    sit(compiled(one))
    with said():
        found = calibrate(compiled(two), [form(x) for x in XS], progress=False)
    assert isinstance(found, Calibration) and same_codes(one, two)
    assert [line.name for line in found.outcome.solved] == ["a", "b", "c"]


def test_batches_from_a_generator():
    model = Mlp()
    with said():
        assert calibrate(compiled(model), (x for x in XS), progress=False).outcome.tokens == 160


def test_sittings_add_up():
    """Two sittings equal one with all the data."""
    one, two = Mlp(), Mlp()
    two.load_state_dict(one.state_dict())
    sit(compiled(one))
    fast = compiled(two)
    sit(fast, XS[:1])
    first = codes(two)
    sitting, _ = sit(fast, XS[1:])
    assert sitting.outcome.tokens == 160 and same_codes(one, two)
    assert any(not torch.equal(first[n], c) for n, c in codes(two).items())


def test_sittings_add_up_over_a_graph_break():
    one, two = Broken(), Broken()
    two.load_state_dict(one.state_dict())
    sit(compiled(one))
    fast = compiled(two)
    for part in (XS[:2], XS[2:]):
        sit(fast, part)
    assert same_codes(one, two)


def test_a_sitting_that_is_too_large_to_keep_says_so(monkeypatch):
    monkeypatch.setattr(sys.modules["qcompile.calibrate"], "KEEP_BYTES", XS[0].nbytes)
    model = Mlp()
    fast = compiled(model, dynamic=False)
    sitting, texts = sit(fast)
    assert any("another sitting begins anew, without its calls" in t for t in texts) and sitting.outcome.tokens == 160
    again, _ = sit(fast, XS[:1])
    assert again.outcome.tokens == XS[0].shape[0]


def test_the_bar_shows_loss_and_time(monkeypatch):
    said = []
    monkeypatch.setattr("qcompile.progress.bar", contextlib.contextmanager(lambda *_: iter([lambda count, text=None: said.append(text)])))
    sit(compiled(Mlp(), dynamic=False))
    assert [bool(re.fullmatch(rf"{name} \d+\.\d dB \d+\.\d\d s", text)) for name, text in zip("abc", filter(None, said), strict=True)] == [True] * 3


def test_seconds_of_each_step():
    sitting, _ = sit(compiled(Mlp(), dynamic=False))
    assert list(sitting.outcome.seconds) == ["recording", "solving"] and min(sitting.outcome.seconds.values()) > 0


def test_another_recipe_begins_anew():
    """What was recorded under one recipe is not solved again under another's name."""
    model = Mlp()
    sit(compiled(model), XS[:2])
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager"})
    torch._dynamo.reset()
    sitting, _ = sit(fast, XS[2:])
    assert {line.choice for line in sitting.outcome.solved} == {"int8.tensor.static @ int8.row"} and len(sitting.outcome.solved) == 3
    assert len(TABLE.get(model.a.weight).solutions) == 2
    with torch.no_grad(), said() as texts:
        assert close(fast(XS[0]), model(XS[0]), 0.05) and not texts


def test_the_first_call_calibrates():
    model = Mlp()
    fast = compiled(model)
    with said() as texts, torch.no_grad():
        y = fast(XS[0])
    assert any("calibrated 3 linears on the first call, which had 40 tokens" in t for t in texts)
    assert close(y, by_codes(model)(XS[0]))
    alone = Mlp()
    alone.load_state_dict(model.state_dict())
    sit(compiled(alone), XS[:1])
    assert same_codes(alone, model)


def test_too_few_tokens_are_named():
    _, texts = sit(compiled(Mlp()), [rows(5, 32)])
    assert any("a: 5 tokens for 32 input channels: the Hessian is singular" in t for t in texts)
    _, texts = sit(compiled(Mlp(), passes=["awq"]), [rows(5, 32)])
    assert any("a: awq searched on 5 tokens for 32 input channels" in t for t in texts)
    for passes in (["awq"], ["smooth"], ["gptq"]):
        assert not any("tokens for" in t for t in sit(compiled(Mlp(), passes=passes), XS)[1])


# --- what goes wrong ---------------------------------------------------------------------------------------------------------


def test_an_error_in_the_loop():
    """What was recorded before it is kept; the model is unharmed and usable, and the next sitting adds to it."""
    model, whole = Mlp(), Mlp()
    whole.load_state_dict(model.state_dict())
    fast = compiled(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), calibrate(fast, progress=False):
        fast(XS[0])
        fast(XS[1])
        raise ZeroDivisionError
    assert session() is None and all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))
    with torch.no_grad():
        y = fast(XS[3])
    assert solutions(model)["a"].tokens == 80
    assert close(y, by_codes(model)(XS[3]))
    sit(fast, XS[2:])
    sit(compiled(whole))
    assert same_codes(model, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_is_not_finite(bad):
    model = Mlp()
    fast = compiled(model)
    x = XS[1].clone()
    x[3, 5] = bad
    with pytest.raises(CalibrationError, match=r"1 values of the input of a .*NaN or infinite"), calibrate(fast, progress=False):
        fast(XS[0])
        fast(x)
    fresh = Mlp()
    fresh.load_state_dict(model.state_dict())
    sit(fast)  # the bad sitting left nothing behind
    sit(compiled(fresh))
    assert same_codes(model, fresh)


def test_nan_that_appears_inside():
    class Log(Mlp):
        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.log(self.a(x)))))

    fast = compiled(Log())
    with pytest.raises(CalibrationError, match="of the input of b are NaN"), calibrate(fast, progress=False):
        fast(XS[0])


def test_no_call_inside():
    fast = compiled(Mlp())
    with pytest.raises(CalibrationError, match="no graph of qcompile ran"), calibrate(fast, progress=False):
        pass
    for nothing in ([], iter([])):
        with pytest.raises(CalibrationError, match="the data is empty"):
            calibrate(fast, nothing, progress=False)


def test_a_model_that_is_not_compiled():
    model = Mlp()
    with pytest.raises(CalibrationError, match="call the compiled model"), calibrate(model, progress=False):
        model(XS[0])
    with pytest.raises(CalibrationError, match="call the compiled model"):
        calibrate(torch.compile(model, backend="eager"), XS, progress=False)


def test_no_rows():
    fast = compiled(Mlp())
    with pytest.raises(CalibrationError, match="gave a no rows"), calibrate(fast, progress=False):
        fast(torch.randn(0, 32))


def test_memory_for_calls():
    model = Mlp()
    fast = compiled(model, dynamic=False)
    sitting, texts = sit(fast, memory=2 * XS[0].nbytes)
    assert sitting.outcome.tokens == 80 and any("2 batches were not recorded" in t for t in texts)
    with pytest.raises(CalibrationError, match=r"1 bytes of memory hold no batch"), calibrate(compiled(Mlp()), progress=False, memory=1) as sitting:
        sitting.fast(XS[0])


@pytest.mark.parametrize("fed", [True, False])
def test_a_batch_is_recorded_whole_or_not_at_all(fed):
    """Three of the second batch's four layers would fit."""
    model = Stack(4)
    for layer in model.layers:
        layer.compile(backend="qcompile", dynamic=False, options=GPTQ)
    batches = [XS[0], XS[1], XS[2][:5]]
    with said() as texts, calibrate(model, progress=False, memory=7 * XS[0].nbytes) as sitting:
        if fed:
            sitting.feed(batches)
        else:
            for x in batches:
                model(x)
    assert {line.tokens for line in sitting.outcome.solved} == {45} and len(sitting.outcome.solved) == 8
    assert any("1 batches were not recorded" in t for t in texts)


class Rotated(Mlp):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(48))

    def forward(self, x):
        return self.c(torch.tanh(self.b(self.table * self.a(x))))


def test_buffers_are_copied_once():
    """Until they are written to."""
    model = Rotated()
    with said(), calibrate(compiled(model, dynamic=False), progress=False) as sitting:
        for x in XS:
            sitting.fast(x)
            if x is XS[1]:
                model.table.mul_(2)
    tables = [next(t for t in call.args.values() if t.shape == (48,)) for call in sitting.units[0].calls]
    assert [any(t is other for other in tables[:i]) for i, t in enumerate(tables)] == [False, True, False, True]
    assert torch.equal(tables[0] * 2, tables[2]) and tables[2] is not model.table
    assert nbytes(sitting.units) == sum(x.nbytes for x in XS) + 2 * 48 * 4


def test_of_another_dtype():
    """A batch of another dtype raises as the model itself does, and harms nothing."""
    model = Mlp()
    fast = compiled(model)
    with pytest.raises(Exception, match="dtype"), calibrate(fast, progress=False):
        fast(XS[0])
        fast(XS[0].double())
    sit(fast)
    assert len(codes(model)) == 3


# --- weights change ----------------------------------------------------------------------------------------------------------


def steps_on(model):
    loss = model(XS[0]).square().sum()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict({n: p * 1.5 for n, p in m.state_dict().items()}),
    "in place": lambda m: [m.get_parameter(f"{n}.weight").mul_(-1) for n in "abc"],
    "replaced data": lambda m: [setattr(m.get_parameter(f"{n}.weight"), "data", rows(*m.get_parameter(f"{n}.weight").shape)) for n in "abc"],
}


@pytest.mark.parametrize("how", CHANGES)
def test_changed_weights_are_rounded_to_nearest(how):
    """Never stale codes."""
    model = Mlp()
    fast = compiled(model)
    sit(fast)
    with torch.no_grad():
        fast(XS[0])
        CHANGES[how](model)
        with said() as texts:
            y = fast(XS[0])
        assert close(y, rounded(model, "int4.g16")(XS[0]))
    assert sum("changed since it was calibrated: rounded to nearest" in t for t in texts) == 3


def test_an_optimizer_step():
    model = Mlp()
    fast = compiled(model)
    sit(fast)
    with torch.no_grad():
        fast(XS[0])
    steps_on(model)
    with torch.no_grad(), said() as texts:
        assert close(fast(XS[0]), rounded(model, "int4.g16")(XS[0]))
    assert any("rounded to nearest" in t for t in texts)


def test_weights_that_come_back():
    """The value that was calibrated has its codes again."""
    model = Mlp()
    fast = compiled(model)
    sit(fast)
    with torch.no_grad(), said():
        y = fast(XS[0])
        state = {n: p.clone() for n, p in model.state_dict().items()}
        model.a.weight.mul_(2)
        assert not close(fast(XS[0]), y, 1e-3)
        model.load_state_dict(state)
        assert torch.equal(fast(XS[0]), y)


def test_calibrated_again_after_a_change():
    model, fresh = Mlp(), Mlp()
    fast = compiled(model)
    sit(fast)
    with torch.no_grad():
        model.load_state_dict(fresh.state_dict())
    sit(fast)
    sit(compiled(fresh))
    with torch.no_grad(), said() as texts:
        assert close(fast(XS[0]), by_codes(model)(XS[0])) and not texts
    assert not torch.equal(codes(model)["a"], rows(1))


def test_another_dtype():
    model = Mlp()
    fast = compiled(model)
    sit(fast)
    model.to(torch.bfloat16)
    with torch.no_grad(), said() as texts:
        y = fast(XS[0].bfloat16())
        assert y.dtype == torch.bfloat16 and close(y, rounded(model, "int4.g16")(XS[0].bfloat16()), 0.02)
    assert texts


def test_other_outlier_columns_after_another_sitting():
    """A later sitting finds other columns: the new graph reads the new ones."""
    model = Mlp()
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "passes": ["outliers(threshold=20.0)"], "lower": "eager"})
    x = XS[0].clone()
    x[:, 3] *= 50
    y = XS[1].clone()
    y[:, [4, 9]] *= 50
    counts = []
    with torch.no_grad():
        for batch in (x, y):
            sit(fast, [batch])
            with graphs() as seen:
                assert close(fast(batch), model(batch), 0.02)
            counts.append(seen[0][0].plan["a"].outliers)
            assert solutions(model)["a"].outliers.numel() == counts[-1]
    assert counts == [1, 3]


def test_copies():
    model = Mlp()
    fast = compiled(model)
    sit(fast)
    twin = copy.deepcopy(model)
    assert TABLE.get(twin.a.weight) is None
    with said() as texts, torch.no_grad():
        y = compiled(twin)(XS[1])
        assert torch.isfinite(y).all() and torch.equal(fast(XS[1]), compiled(model)(XS[1]))
    assert any("on the first call" in t for t in texts)  # nothing was said of the copy
    assert pickle.loads(pickle.dumps(model.state_dict())).keys() == model.state_dict().keys()


def test_nothing_keeps_a_model_alive():
    model = Mlp()
    fast = compiled(model)
    sitting, _ = sit(fast)
    with torch.no_grad():
        fast(XS[0])
    refs = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(model)]
    solved = weakref.ref(solutions(model)["a"])
    torch._dynamo.reset()
    del model, fast, sitting
    gc.collect()
    assert not any(ref() is not None for ref in refs) and solved() is None
    other = Mlp()
    sit(compiled(other), XS[:1])
    assert all(u.alive for u in KEPT)


def test_release_after_calibration():
    model = Mlp()
    fast = compiled(model, release=True)
    sit(fast)
    twin = by_codes(model)
    with torch.no_grad():
        assert close(fast(XS[0]), twin(XS[0]))
        torch._dynamo.reset()
        assert close(fast(XS[0]), twin(XS[0]))
    with pytest.raises(CalibrationError, match="was released"), calibrate(fast, progress=False):
        fast(XS[0])


# --- through Inductor --------------------------------------------------------------------------------------------------------


def test_through_inductor():
    model = Mlp()
    fast = torch.compile(model, backend="qcompile", fullgraph=True, options={k: v for k, v in GPTQ.items() if k != "lower"})
    sit(fast, XS[:2])
    with torch.no_grad():
        assert close(fast(XS[0]), by_codes(model)(XS[0]), 1e-4)


# --- several processes -------------------------------------------------------------------------------------------------------

TWO = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, torch._inductor.compile_fx, torch.distributed as dist, torch.multiprocessing as mp  # imported once, before the fork
from calibrated import Mlp, codes, compiled, rows
from small import said
from qcompile.calibrate import calibrate

def solve(rank, size, path, out):
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{{path}}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = Mlp()
    fast = compiled(model, passes=["smooth", "gptq"], input="int8.tensor.static")
    xs = [rows(40, 32, seed=i) for i in range(4)]
    with said(), calibrate(fast, progress=False) as sitting:
        for x in xs[rank::size]:
            fast(x)
    torch.save((codes(model), sitting.outcome.tokens), f"{{out}}/{{size}}{{rank}}.pt")
    if size > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    out = sys.argv[1]
    mp.start_processes(solve, (1, "", out), nprocs=1, start_method="fork")
    mp.start_processes(solve, (2, out + "/meet", out), nprocs=2, start_method="fork")
"""


def test_two_processes(tmp_path):
    """Each with half of the data solves what one with all does."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    alone, first, second = (torch.load(tmp_path / name) for name in ("10.pt", "20.pt", "21.pt"))
    assert alone[1] == first[1] == second[1] == 160
    for name in alone[0]:
        assert torch.equal(first[0][name], second[0][name]) and torch.equal(alone[0][name], first[0][name]), name


NAN = TWO.partition("def solve")[0] + """
from datetime import timedelta
from qcompile.core.errors import CalibrationError

def solve(rank, out):
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = Mlp()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fast = compiled(model, passes=["smooth", "gptq"])
    try:
        with said(), calibrate(fast, progress=False):
            for i in range(2):
                fast(rows(40, 32, seed=i) * (float("nan") if rank == 1 and i == 0 else 1.0))
    except CalibrationError as error:
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        open(f"{out}/{rank}.txt", "w").write(str(error))
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(solve, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_data_of_one_process_that_is_not_finite(tmp_path):
    """All raise, none waits for the one that did."""
    script = tmp_path / "nan.py"
    script.write_text(NAN)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    errors = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1] and re.match(r"process 1: 1280 values of the input of a are NaN or infinite", errors[0])


# --- options -----------------------------------------------------------------------------------------------------------------


def test_methods_in_passes():
    assert Options.parse({"passes": ["smooth(alpha=0.75)", "gptq(act_order=False)"]}).recipe.passes == ("smooth(alpha=0.75)", "gptq(act_order=False)")
    assert Options.parse({"recipe": "W4A16_GPTQ"}).recipe.passes == ("gptq",)
    assert Options.parse({"recipe": "W4A16_GPTQ", "passes": []}).recipe.passes == ()
    assert Options.parse({"recipe": "W4A16", "passes": ("gptq",)}).recipe.weight == "int4.g128"


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        (["smoth"], r"unknown pass 'smoth' in options\['passes'\]. Did you mean 'smooth'\? Known: .*awq.*gptq.*outliers"),
        (["gptq(blok=3)"], r"unknown argument 'blok' in gptq\(blok=3\).*Did you mean 'block'\? Known: .*damping"),
        (["gptq", "adaround"], "names 2 solvers: gptq, adaround"),
        (["range(rule='klx')"], r"unknown range rule 'klx'.*percentile"),
        (["range"], r"unknown range rule None"),
        (["smooth(0.5)"], "a step reads 'name' or"),
        (["bias(x=1)"], r"unknown argument 'x' in bias\(x=1\).*Known: data"),
        (["outliers(column=3)"], r"unknown argument 'column'.*threshold, columns, dynamic"),
        (["equalize(absorb=1)"], r"absorb is True or False, not 1"),
        (["gptq", "smooth"], r"options\['passes'\]: gptq stands before smooth, and runs after it: write smooth first"),
        (["bias", "smooth", "rtn", "range(rule='mse')", "awq"], "rtn stands before awq"),
        (["gptq", "outliers(threshold=6.0)"], "gptq stands before outliers"),
        (["outliers(dynamic=4)", "smooth"], r"outliers\(dynamic=4\) stands before smooth"),
        (["smooth", "equalize"], "smooth stands before equalize"),
        (["lower"], "always runs"),
        ([3], "3"),
    ],
)
def test_wrong_passes(passes, text):
    with pytest.raises(OptionError, match=text):
        Options.parse({"passes": passes})


@pytest.mark.parametrize(("given", "size"), [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1.5 kB", 1500), ("7B", 7), (12, 12)])
def test_amounts_of_memory(given, size):
    assert memory_of(given) == size == Options.parse({"calibration_memory": given}).calibration_memory


@pytest.mark.parametrize("given", ["four", "4 GiBs", -1, 0, True, 1.5])
def test_no_amounts_of_memory(given):
    with pytest.raises(OptionError, match="an amount of memory reads"):
        memory_of(given)


# --- static ranges -----------------------------------------------------------------------------------------------------------

RULES = ["absmax", "minmax", "percentile", "moving_average", "mse", "kl", "sqnr"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("scheme", "extra"),
    [("int8.tensor.static", []), ("uint8.tensor.static.point", []), ("int8.tensor.static", ["smooth"]), ("uint8.tensor.static.point", ["outliers(columns=2)"])],
    ids=["plain", "plain with a zero", "smooth", "split with a zero"],
)
def test_range_rules(rule, scheme, extra):
    """The range is that of the rule on the values that the product reads: smoothed, without the outlier columns."""
    from qcompile.core.ranges import NEEDS, static_range
    from qcompile.core.scheme import Scheme
    from qcompile.core.stats import new, update_all

    model = nn.Sequential(nn.Linear(32, 32))
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "input": scheme, "passes": [*extra, f"range(rule={rule!r})"], "lower": "eager"})
    xs = [x * torch.linspace(0.2, 4, 32) for x in XS]
    sit(fast, xs)
    s = solutions(model)["0"]
    stats = new(["absmax", "minmax", "histogram", "moving"], 32)
    for x in xs:
        x = x if s.smooth is None else x / s.smooth
        stats = update_all(stats, x if s.outliers is None else x.index_fill(1, s.outliers, 0.0))
    scale, zero = static_range(rule, stats, Scheme.parse(scheme))
    assert rule in NEEDS and (s.smooth is not None) == (extra == ["smooth"]) and (s.outliers is not None) == (extra == ["outliers(columns=2)"])
    torch.testing.assert_close(s.range[0], scale.reshape(1), rtol=2e-3, atol=0)
    assert len(s.range) == (1 if zero is None else 2) and (zero is None or abs(float(s.range[1]) - float(zero)) <= 1)
    with torch.no_grad():
        assert close(fast(xs[0]), model(xs[0]), 0.05)


def test_a_dynamic_range_needs_no_data():
    model = Mlp()
    with said() as texts, torch.no_grad():
        torch.compile(model, backend="qcompile", options={"recipe": "LLM_INT8", "lower": "eager"})(XS[0])
    assert not texts


def test_a_range_rule_wants_a_static_input():
    """Accepted, it would do nothing."""
    from qcompile.core.recipe import Recipe, Rule

    for given, found in (({}, "int8.row"), ({"recipe": "W4A16"}, "in 16 bits"), ({"recipe": "W8A8_STATIC", "input": "int8.row"}, "int8.row")):
        with pytest.raises(OptionError, match=rf"range\(rule='mse'\) .* inputs are {found}. Take input='int8.tensor.static'"):
            Options.parse({**given, "passes": ["range(rule='mse')"]})
    with pytest.raises(OptionError, match="recipe mine: range"):
        Options.parse({"recipe": Recipe("mine", "int8.row", "int8.row", passes=("range(rule='kl')",))})
    Options.parse({"recipe": Recipe("mine", "int8.row", rules=(Rule("a", "int8.row", "int8.tensor.static"),), passes=("range(rule='kl')",))})


def test_rules_of_the_recipe_go_by_site():
    from qcompile.core.recipe import Recipe, Rule

    model = Mlp()
    recipe = Recipe("mine", "int4.g16", rules=(Rule("b", None), Rule("c", "int8.row", "int8.row")), passes=("gptq",))
    sitting, _ = sit(compiled(model, weight=None, passes=None, recipe=recipe))
    assert {line.name: line.choice for line in sitting.outcome.solved} == {"a": "int4.g16", "c": "int8.row @ int8.row"}


def test_steps_of_a_rule():
    """One linear has an alpha of its own, one no smoothing, kin of others or not."""
    from qcompile.core.recipe import Recipe, Rule

    class Kin(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            return self.d(torch.tanh(self.a(x) + self.b(x) + self.c(x)))

    model, x = Kin(), XS[0] * torch.linspace(0.1, 8, 32)
    rules = (Rule("b", "int8.row", "int8.row", passes=("smooth(alpha=0.9)",)), Rule("d", "int8.row", "int8.row", passes=()))
    fast = torch.compile(model, backend="qcompile", options={"recipe": Recipe("mine", "int8.row", "int8.row", rules, passes=("smooth(alpha=0.5)",)), "lower": "eager"})
    sit(fast, [x])
    found = solutions(model)
    for name, alpha in (("a", 0.5), ("b", 0.9)):
        w = torch.cat([model.a.weight, model.c.weight] if name == "a" else [model.b.weight])
        torch.testing.assert_close(found[name].smooth, (x.abs().amax(0) ** alpha / w.detach().abs().amax(0) ** (1 - alpha)))
    assert torch.equal(found["a"].smooth, found["c"].smooth) and found["d"].smooth is None
    with torch.no_grad():
        assert close(fast(x), model(x), 0.02)


def test_steps_of_a_rule_are_checked():
    from qcompile.core.recipe import Recipe, Rule

    for rule, text in (
        (Rule("a", "int8.row", passes=("smoth",)), r"unknown pass 'smoth' in rule 'a' of recipe mine. Did you mean 'smooth'"),
        (Rule("a", "int8.row", passes=("range(rule='kl')",)), r"rule 'a' of recipe mine: range\(rule='kl'\).*in 16 bits"),
        (Rule("a", "int8.row", passes=("gptq", "smooth")), "rule 'a' of recipe mine: gptq stands before smooth"),
    ):
        with pytest.raises(OptionError, match=text):
            Options.parse({"recipe": Recipe("mine", "int8.row", "int8.tensor.static", rules=(rule,))})
    static = Rule("a", "int8.row", "int8.tensor.static", passes=())
    with pytest.raises(OptionError, match="range"):
        Options.parse({"recipe": Recipe("mine", "int8.row", rules=(static,), passes=("range(rule='kl')",))})


def test_the_alpha_that_a_search_chose_is_noted():
    """In the outcome and in the report, and nobody is warned of it."""
    import qcompile

    model = nn.Sequential(nn.Linear(32, 32))
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "passes": ["smooth(alpha='auto')"], "lower": "eager"})
    x = XS[0] * torch.logspace(-2, 2, 32)
    sitting, texts = sit(fast, [x])
    (note,) = sitting.outcome.solved[0].notes
    alpha = float(note.removeprefix("chose alpha "))
    assert 0 < alpha < 1 and not any("chose" in t for t in texts)
    w = model[0].weight.detach().abs().amax(0)
    torch.testing.assert_close(solutions(model)["0"].smooth, x.abs().amax(0) ** alpha / w ** (1 - alpha))
    assert any(n == f"0: chose alpha {alpha:g}" for n in qcompile.explain(fast, x).notes)
    assert sit(torch.compile(model, backend="qcompile", options={"recipe": "W8A8", "passes": ["smooth(alpha=0.4)"], "lower": "eager"}), [x])[0].outcome.solved[0].notes == ()


def test_a_tiny_model_in_bfloat16():
    model, inputs = tiny("llama", torch.bfloat16)
    fast = compiled(model)
    with said(), calibrate(fast, progress=False) as sitting:
        fast(**inputs)
    with torch.no_grad():
        assert close(fast(**inputs).logits, model(**inputs).logits, 0.3)
    assert sitting.outcome.quality.finite and sitting.outcome.quality.decibels > 10


def test_the_option_bounds_the_memory():
    """``calibration_memory`` where the context was given none; a limit of its own wins."""
    model = Net()
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager", "calibration_memory": "1kB"})
    with pytest.raises(CalibrationError, match="1000 bytes of memory hold no batch"):
        calibrate(fast, [torch.randn(64, 32)], progress=False)
    with pytest.warns(QcompileWarning, match="2 batches were not recorded"):
        assert calibrate(fast, [torch.randn(6, 32) for _ in range(3)], progress=False).outcome.tokens == 6
    assert calibrate(fast, [torch.randn(64, 32)], progress=False, memory="1MB").outcome.tokens >= 64


def test_a_function_without_parameters_between_graph_breaks():
    """Transformers' masks are such: what Dynamo captured of it while recording must not outlive the sitting."""

    def halved(x):
        torch._dynamo.graph_break()
        return x / 2

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.b(halved(self.a(x)))

    model, x = Between(), rows(8, 32)
    fast = torch.compile(model, backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager"})
    with torch.no_grad():
        for _ in range(2):
            calibrate(fast, [x], progress=False)
            assert 0 < float((fast(x) - model(x)).norm()) < 0.03 * float(model(x).norm())


def test_two_models_in_two_sittings_at_once():
    """Each sitting gets its model's graphs, in whatever order they are called."""
    models, x = [nn.Sequential(nn.Linear(32, 32)) for _ in range(2)], rows(40, 32)
    f, g = (torch.compile(m, backend="qcompile", options={"recipe": "W8A8_STATIC", "lower": "eager"}) for m in models)
    with torch.no_grad():
        with calibrate(f, progress=False) as outer, calibrate(g, progress=False) as inner:
            g(f(x))
        assert [line.tokens for s in (outer, inner) for line in s.outcome.solved] == [40, 40]
        wanted = models[1](models[0](x))
        assert 0 < float((g(f(x)) - wanted).norm()) < 0.03 * float(wanted.norm())
