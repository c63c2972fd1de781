"""The `isolated` fixture: a case of the GPU code generation harness, run in its own process."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def isolated() -> Callable[..., dict[str, Any]]:
    """`run_case.isolated`; loaded by path, since pytest's importlib mode puts no test folder on sys.path."""
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("gpu_codegen_run_case", Path(__file__).with_name("run_case.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run: Callable[..., dict[str, Any]] = module.isolated
    return run


@pytest.fixture(scope="session")
def qcase(isolated: Callable[..., dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """The parts of a case of qcases.py; each case runs once in a session, or again where kernels are wanted compiled that were not."""
    done: dict[tuple[str, bool | str], dict[str, Any]] = {}

    def get(name: str, compile: bool | str = True) -> dict[str, Any]:
        case = next((case for (known, how), case in done.items() if known == name and (how == compile or not compile)), None)
        if case is None:
            case = done[name, compile] = isolated(name, cases=Path(__file__).with_name("qcases.py"), compile=compile)
        result: dict[str, Any] = case.get("parts", case)
        return result

    return get
