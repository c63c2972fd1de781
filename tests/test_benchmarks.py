"""`benchmarks/run.py --quick` runs, checks before it times, and writes the keys that the committed results have."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MACHINE = {"quick", "versions", "cpu", "flags", "threads", "load_before"}
ROW = {"recipe", "m", "n", "k", "kernel", "error", "rounding", "right", "fp32_ms", "ms", "ratio", "goal", "met"}
OVERHEAD = {"error", "right", "inductor_ms", "ignoring_ms", "W8A8_ms", "check_ms", "check_share", "parameters", "ratio", "goal", "met"}
COMPILE = {"right", "fp32_cold", "fp32_warm", "W8A8_cold", "W8A8_warm", "cold_ratio", "warm_beyond", "cold_met", "warm_met"}


def run(tmp_path: pathlib.Path, *parts: str) -> dict:
    path = tmp_path / "run.json"
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "run.py"), "cpu", "--quick", "--json", str(path), "--parts", *parts], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_linear(tmp_path):
    report = run(tmp_path, "linear")
    assert set(report) >= MACHINE
    assert all(set(row) >= ROW and row["right"] and row["ms"] > 0 for row in report["linear"])
    assert {row["recipe"] for row in report["linear"]} == {"W8A8", "NF4"}


def test_unknown_parts_are_refused(tmp_path, monkeypatch, capsys):
    """Before anything is measured, and with what there is."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run as benchmark

    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("it measures"))
    for parts, unknown in ((["linear", "overheads"], "overheads"), (["linear overhead"], "linear overhead")):
        with pytest.raises(SystemExit):
            benchmark.main(["cpu", "--json", str(tmp_path / "run.json"), "--parts", *parts])
        assert f"unknown parts {unknown}; there are linear, overhead, compile" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif("QCOMPILE_SLOW" not in os.environ, reason="four processes compile C++, and test_caches shows the same of the caches: QCOMPILE_SLOW=1 runs it")
def test_compile_time(tmp_path):
    """A second process finds the first one's code in Inductor's caches: `right` says so."""
    pytest.importorskip("transformers")
    report = run(tmp_path, "overhead", "compile")
    assert set(report["overhead"]) >= OVERHEAD and report["overhead"]["parameters"] == 4
    assert set(report["compile"]) >= COMPILE and report["compile"]["right"]


def test_committed_results_have_no_paths():
    path = ROOT / "benchmarks" / "results" / "cpu" / "run.json"
    text = path.read_text()
    assert set(json.loads(text)) >= MACHINE | {"linear", "overhead", "compile"}
    assert not any(part in text for part in ("/work", "/home", "/tmp", "/root"))


@pytest.mark.parametrize("name", ["the shipped model", "gpt2", "mixtral"])
def test_coverage_is_what_explain_says(name):
    """Rows of the README's table, measured again."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import coverage

    rows = json.loads(coverage.RESULTS.read_text())
    assert list(rows) == coverage.names() and rows[name] == coverage.measure(name)


@pytest.mark.parametrize("section", ["cpu", "gpu", "coverage", "sweep", "train"])
def test_the_readmes_numbers_are_made_from_the_results(section):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), section], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text()
    assert f"<!-- {section} -->\n{done.stdout.strip()}\n<!-- /{section} -->" in readme


def test_the_table_of_tiles_is_the_best_of_what_was_measured():
    """`kernels/tuned.json` has, for each arithmetic and size, the fastest tile of the logs in `results`, or another one of them and says why. Weights that are decoded to 16 bits for 17 to 256 rows were timed on
    an H100, all else on an H200, some sizes again as they are launched early."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tune
    import tune_grouped

    from qcompile.kernels.tuned import arithmetic

    results = ROOT / "benchmarks" / "results"

    def logged(*names):
        found = {}
        for name in names:
            for job, us in tune.logged(results / name).items():
                found.setdefault((arithmetic(tune.case(job), job.gated), job.m, job.n, job.k), {})[job.tile] = us
        return found

    times = logged("h200/tune.jsonl", "h100/tune_paired.jsonl") | logged("h200/tune_early.jsonl")
    for line in (results / "h200" / "tune_grouped.txt").read_text().splitlines():
        if row := re.fullmatch(r"(\w+) (\d+) \(([\d, ]+)\) ([\d.]+) ", line):
            job = tune_grouped.Job(row[1], int(row[2]), tuple(int(v) for v in row[3].split(",")))
            times.setdefault((arithmetic(tune_grouped.case(job), grouped=True), job.mean, tune_grouped.N, tune_grouped.K), {})[job.tile] = float(row[4])
    table = json.loads((ROOT / "kernels" / "tuned.json").read_text())["rows"]
    assert len(table) == len(times) > 100
    for row in table:
        found = times[row["arithmetic"], *row["size"]]
        us = found[(*row["tile"], 1)[:7]]
        assert us == row["us"] and ("why" in row or us == min(found.values())), row
    assert sum("why" in row for row in table) < 10


def test_tuning_some_sizes_keeps_the_rows_of_others(tmp_path, monkeypatch):
    """What was timed takes the place of its row, or comes last where it has none; a size that nobody tunes is refused before anything is timed."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tune

    monkeypatch.setattr(tune.torch.cuda, "get_device_name", lambda: "a GPU")
    path = tmp_path / "tuned.json"
    path.write_text((ROOT / "kernels" / "tuned.json").read_text())
    before = json.loads(path.read_text())["rows"]
    tune.write(path, {("W4A16", 1, 4096, 4096, False): (1.5, (1, 16, 1, 1, 2, 4, 2)), ("NF4", 5, 64, 128, False): (2.5, (16, 32, 1, 2, 2, 3, 1))})
    after = json.loads(path.read_text())["rows"]
    place = next(i for i, row in enumerate(before) if row["arithmetic"] == "16 @ int4" and row["size"] == [1, 4096, 4096])
    new = {"arithmetic": "16 @ int4", "size": [1, 4096, 4096], "tile": [1, 16, 1, 1, 2, 4, 2], "us": 1.5}
    assert after == [*before[:place], new, *before[place + 1 :], {"arithmetic": "16 @ table4", "size": [5, 64, 128], "tile": [16, 32, 1, 2, 2, 3], "us": 2.5}]
    assert tune.jobs(sizes=["4096X14336"]) == [] and {(job.n, job.k) for job in tune.jobs(("W4A16",), (1,), ["4096x14336"])} == {(4096, 14336)}
