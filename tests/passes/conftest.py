"""Makes ``captured`` importable: pytest's importlib mode puts no test folder on sys.path."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
