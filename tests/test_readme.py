"""The README is true: its session runs and prints what it says, and its tables are what their commands print."""

from __future__ import annotations

import doctest
import pathlib
import re
import subprocess
import sys

import pytest

from qcompile.__main__ import CITED, main, methods, sources
from qcompile.core.ranges import RANGES
from qcompile.core.recipe import RECIPES, Method
from qcompile.core.stats import STATISTICS
from qcompile.passes import SOLVERS, TRANSFORMS
from qcompile.solve import SETTINGS, check

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TABLES = ("recipes", "formats", "kernels", "methods", "training")


def test_session():
    script = (
        "import doctest, sys, torch; "
        f"result = doctest.testfile({str(ROOT / 'README.md')!r}, module_relative=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE); "
        "assert result.attempted > 40; sys.exit(min(result.failed, 1))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd="/", timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_session_is_a_session():
    assert len(doctest.DocTestParser().get_examples(README)) > 40


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qcompile", name])
    main()
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", README, re.S)
    assert shown is not None and shown[1] == capsys.readouterr().out.strip()


def test_tables_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "qcompile", "training"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and f"<!-- training -->\n{done.stdout.strip()}\n<!-- end -->" in README, done.stderr


def test_the_place_of_the_accuracy_table():
    assert README.count("<!-- accuracy -->") == README.count("<!-- /accuracy -->") == 1
    assert "python benchmarks/accuracy.py" in README.partition("<!-- accuracy -->")[0][-300:]


# --- python -m qcompile methods ----------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    """Cells without the quotes of code."""
    return [[cell.strip("` ") for cell in line[2:-2].split(" | ")] for line in methods().splitlines()[2:]]


def test_every_step_is_in_the_table_once():
    steps = [row[0] for row in rows()]
    assert len(set(steps)) == len(steps)
    assert {Method.parse(step).name for step in steps} == {*TRANSFORMS, *SOLVERS, *SETTINGS}
    assert {Method.parse(step).options["rule"] for step in steps if "rule" in step} == set(RANGES)
    assert {method.name for recipe in RECIPES.values() for method in recipe.methods} <= {Method.parse(step).name for step in steps}


def test_arguments_and_statistics_are_those_that_exist():
    for step, kind, arguments, statistics, _ in rows():
        if kind in ("transform", "solver"):
            check([Method.parse(f"{step}({arguments})")])
            assert statistics == (", ".join((TRANSFORMS.get(step) or SOLVERS[step]).needs) or "none")
        assert statistics == "none" or set(statistics.split(", ")) <= set(STATISTICS)


@pytest.mark.parametrize(
    ("step", "source"),
    [("smooth", "Xiao et al. 2023 (arXiv 2211.10438)"), ("gptq", "Frantar et al. 2022"), ("adaround", "Nagel et al. 2020"), ("outliers", "Dettmers et al. 2022"), ("range(rule='kl')", "Migacz 2017"), ("rtn", "-")],
)
def test_the_source_is_the_one_that_the_file_cites(step, source):
    assert {row[0]: row[4] for row in rows()}[step] == source


def test_sources():
    assert sources("After Doe et al. 2021; see Doe et al. 2021 (arXiv 2101.00001) and,\nin AIMET (Roe 2020). The 2020 edition: May 7.") == "Doe et al. 2021 (arXiv 2101.00001); AIMET; Roe 2020"
    assert not CITED.findall("bits per weight in 2023, and K = 4096")
