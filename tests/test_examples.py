"""Every example runs as it is, with fewer steps and by its references: what Inductor makes of such graphs is in tests/train."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path):
    done = subprocess.run([sys.executable, str(path), "--steps", "2", "--lower", "eager"], capture_output=True, text=True, timeout=1200, cwd="/", env={**os.environ})
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "perplexity" in done.stdout or "loss" in done.stdout
