"""Which commit a benchmark's row is of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit at hand, short; ``QCOMPILE_COMMIT`` says it where there is no repository to ask."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return os.environ.get("QCOMPILE_COMMIT") or asked.stdout.strip() or "unknown"
