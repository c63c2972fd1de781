"""The README is true: its session runs and prints what it says, and its tables are what their commands print."""

from __future__ import annotations

import doctest
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_session():
    script = (
        "import doctest, sys, torch; "
        f"result = doctest.testfile({str(ROOT / 'README.md')!r}, module_relative=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE); "
        "assert result.attempted > 10; sys.exit(min(result.failed, 1))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd="/", timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_session_is_a_session():
    assert len(doctest.DocTestParser().get_examples(README)) > 10


@pytest.mark.parametrize("name", ["recipes", "formats", "kernels"])
def test_tables(name):
    done = subprocess.run([sys.executable, "-m", "qcompile", name], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", README, re.S)
    assert shown is not None and shown[1] == done.stdout.strip()
