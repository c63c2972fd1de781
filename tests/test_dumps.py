"""Graphs as text: files of ``options={"dump": ...}``, TORCH_LOGS and TORCH_TRACE. What a subprocess writes is compared byte for byte between two runs."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import expecttest
import pytest
import torch
from torch import nn

from qcompile.core.errors import PassError, StrictError
from qcompile.passes import PASSES, Pass

PIPELINE = ["normalize", "find_sites", "match", "observe", "merge", "attend", "lower", "glu", "factors"]
FILES = {"00_capture.txt", "kernels.txt"} | {f"{i + 1:02d}_{name}.{end}" for i, name in enumerate(PIPELINE) for end in ("txt", "diff")}

LINE = r"{i:02d} {name} +\d+ lines changed +[\d.]+ ms"
SCRIPT = """
import torch
from torch import nn
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down, self.small = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32), nn.Linear(32, 4)
    def forward(self, x):
        x = self.down(self.norm(torch.nn.functional.gelu(self.up(x))))
        torch._dynamo.graph_break()
        return self.small(x[:, 1:].float()).to(torch.bfloat16, memory_format=torch.contiguous_format)
fast = torch.compile(Model().eval(), backend="qcompile", options={"lower": "eager"})
with torch.no_grad():
    fast(torch.randn(2, 3, 32))
"""


def python(script: str, folder: pathlib.Path, **environment: str) -> str:
    """Run a script in a fresh process; returns what it wrote to stderr."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text(encoding="utf-8") for f in sorted(folder.rglob("*")) if f.is_file()}


def call(model: nn.Module, x: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return torch.compile(model.eval(), backend="qcompile", options={"lower": "eager", **options})(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.small = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(self.down(torch.relu(self.up(x))))


class Text(expecttest.TestCase):
    def dumped(self) -> dict[str, str]:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            call(Block(), torch.randn(2, 32), weight="int4.g32", dump=folder)
            return contents(pathlib.Path(folder) / "graph00")

    def test_capture(self) -> None:
        self.assertExpectedInline(
            self.dumped()["00_capture.txt"],
            """\
inputs: l_x_: float32[2, 32]
linear = linear(l_x_, %up.weight, %up.bias)
relu = relu(linear)
linear_1 = linear(relu, %down.weight, None)
linear_2 = linear(linear_1, %small.weight, %small.bias)
return (linear_2,)
""",
        )

    def test_match_diff(self) -> None:
        self.assertExpectedInline(
            self.dumped()["03_match.diff"],
            """\
-linear = linear(l_x_, %up.weight, %up.bias)  # up linear
+linear = linear(l_x_, %up.weight, %up.bias)  # up: int4.g32
-linear_1 = linear(relu, %down.weight, None)  # down linear
-linear_2 = linear(linear_1, %small.weight, %small.bias)  # small linear
+linear_1 = linear(relu, %down.weight, None)  # down: int4.g32
+linear_2 = linear(linear_1, %small.weight, %small.bias)  # small: 4 x 32 is smaller than 16
""",
        )

    def test_lower(self) -> None:
        self.assertExpectedInline(
            self.dumped()["07_lower.txt"],
            """\
inputs: l_x_: float32[2, 32], l_self_modules_up_parameters_weight__codes: uint8[64, 64], l_self_modules_up_parameters_weight__scale: bfloat16[64, 1], l_self_modules_down_parameters_weight__codes: uint8[32, 64], l_self_modules_down_parameters_weight__scale: bfloat16[32, 2]
linear_default = qcompile.linear(l_x_, [l_self_modules_up_parameters_weight__codes, l_self_modules_up_parameters_weight__scale], 'int4.g32')  # up: int4.g32
linear = add(linear_default, %up.bias)
relu = relu(linear)
linear_1 = qcompile.linear(relu, [l_self_modules_down_parameters_weight__codes, l_self_modules_down_parameters_weight__scale], 'int4.g32')  # down: int4.g32
linear_2 = linear(linear_1, %small.weight, %small.bias)  # small: 4 x 32 is smaller than 16
return (linear_2,)
""",
        )

    def test_kernels(self) -> None:
        shown = re.sub(r"(int4.g32  ).*", r"\1<kernel>", self.dumped()["kernels.txt"])
        self.assertExpectedInline(
            shown,
            """\
up     64x32  int4.g32  <kernel>
down   32x64  int4.g32  <kernel>
small  4x32   kept      4 x 32 is smaller than 16
""",
        )


def test_files_are_the_passes(tmp_path):
    call(Block(), torch.randn(2, 32), dump=str(tmp_path))
    files = contents(tmp_path / "graph00")
    assert set(files) == FILES
    before = "00_capture.txt"
    for i, name in enumerate(PIPELINE):
        after = f"{i + 1:02d}_{name}.txt"
        lines = files[f"{i + 1:02d}_{name}.diff"].splitlines()
        gone, new = ([line[1:] for line in lines if line[0] == sign] for sign in "-+")
        old_lines, new_lines = files[before].splitlines(), files[after].splitlines()
        assert len(new_lines) - len(old_lines) == len(new) - len(gone)
        assert set(gone) <= set(old_lines) and set(new) <= set(new_lines)
        assert bool(lines) == (files[before] != files[after])
        before = after


def test_kernels_are_the_graphs(tmp_path):
    from qcompile.backend import collecting

    fast = torch.compile(Block().eval(), backend="qcompile", options={"dump": str(tmp_path)})
    kernels = {}
    with torch.no_grad(), collecting(lambda graph, args: kernels.update(graph.kernels)):
        fast(torch.randn(2, 32))
    lines = {line.split("  ")[0].strip(): line for line in contents(tmp_path)["graph00/kernels.txt"].splitlines()}
    assert set(lines) == {"up", "down", "small"} and set(kernels) == {"up", "down"}
    assert all(lines[name].endswith(str(kernel)) for name, kernel in kernels.items())
    assert re.search(r" kept +4 x 32 is smaller than 16$", lines["small"])


def test_a_kernel_that_does_not_apply_gives_its_reason(tmp_path):
    call(nn.Linear(32, 32), torch.randn(2, 32), weight="e3m4.row", input="int8.row", dump=str(tmp_path))
    assert re.search(r"32x32  int8.row @ e3m4.row  reference: \w", contents(tmp_path)["graph00/kernels.txt"])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What two processes wrote and dumped, of other hash seeds, in other folders, one with loud logs, the other with short ones."""
    found = []
    for seed, logs in (("1", "+qcompile.passes"), ("2", "qcompile.passes")):
        folder = tmp_path_factory.mktemp("ran")
        wrote = python(SCRIPT, folder, QCOMPILE_DUMP=str(folder / "dump"), PYTHONHASHSEED=seed, TORCH_LOGS=logs)
        found.append((wrote, contents(folder / "dump")))
    return found


@pytest.mark.xdist_group("dumps")
def test_same_bytes_twice(ran):
    """Addresses, hash seeds, paths and times leave no trace."""
    runs = [dumped for _, dumped in ran]
    assert runs[0] == runs[1] and {name.partition("/")[0] for name in runs[0]} == {"graph00", "graph01"}
    for name, content in runs[0].items():
        assert not re.search(r"0x[0-9a-f]{6}|object at|<function|<built-in", content), name
        assert "/" not in content, name


def test_numbers_start_again_in_each_folder(tmp_path):
    for folder in ("a", "b", "a"):
        torch._dynamo.reset()
        call(Block(), torch.randn(2, 32), dump=str(tmp_path / folder))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*")) == ["a/graph00", "a/graph01", "b/graph00"]


def test_what_an_earlier_run_left_is_replaced(tmp_path):
    (tmp_path / "graph00").mkdir()
    for name in ("04_smooth.txt", "04_smooth.diff", "notes.txt"):
        (tmp_path / "graph00" / name).write_text("old")
    call(Block(), torch.randn(2, 32), dump=str(tmp_path))
    assert set(contents(tmp_path / "graph00")) == FILES | {"notes.txt"}


def test_a_failing_pass_leaves_what_came_before(tmp_path, monkeypatch):
    def broken(gm, context):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setitem(PASSES, "match", Pass("match", broken))
    with pytest.raises(Exception, match="pass 'match' failed after normalize, find_sites: ZeroDivisionError: on purpose") as info:
        call(Block(), torch.randn(2, 32), dump=str(tmp_path))
    chain = [info.value, info.value.__cause__, info.value.__context__, getattr(info.value, "inner_exception", None)]
    assert any(isinstance(e, PassError) for e in chain)
    assert set(contents(tmp_path / "graph00")) == {"00_capture.txt", "01_normalize.txt", "01_normalize.diff", "02_find_sites.txt", "02_find_sites.diff"}


def test_strict_refusal_is_dumped(tmp_path):
    with pytest.raises(Exception, match="emulated") as info:
        call(nn.Linear(32, 32), torch.randn(2, 32), weight="e3m4.row", input="int8.row", strict=True, dump=str(tmp_path))
    assert isinstance(info.value, StrictError) or "StrictError" in repr(info.value.__cause__) + repr(info.value)
    assert set(contents(tmp_path / "graph00")) == FILES


def test_no_folder_without_the_option(tmp_path, monkeypatch):
    monkeypatch.delenv("QCOMPILE_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    call(Block(), torch.randn(2, 32))
    assert not list(tmp_path.iterdir())


@pytest.mark.xdist_group("dumps")
def test_torch_logs(ran):
    """``TORCH_LOGS="+qcompile.passes"`` prints each pass and the graph after it; ``qcompile.passes`` alone a line for each pass."""
    loud, short = (wrote for wrote, _ in ran)
    for i, name in enumerate(PIPELINE):
        assert len(re.findall(LINE.format(i=i, name=name), loud)) == len(re.findall(LINE.format(i=i, name=name), short)) == 2
        assert f"after {name}:" in loud and f"after {name}:" not in short
    assert "up = linear" not in short and re.search(r"linear\(l_x_, %up.weight, %up.bias\)  # up: int8.row @ int8.row", loud)
    assert "qcompile.scaled_linear(" in loud


def test_torch_trace(tmp_path, monkeypatch):
    """Artifacts for tlparse: the graph after each pass, and the plan. Without ``TORCH_LOGS`` no pass is printed."""
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    quiet = python(SCRIPT, tmp_path, TORCH_TRACE=str(tmp_path / "trace"))
    assert not any(re.search(LINE.format(i=i, name=name), quiet) for i, name in enumerate(PIPELINE))
    found: dict[str, list[str]] = {}
    (log,) = (tmp_path / "trace").glob("*.log")
    lines = log.read_text().splitlines()
    for i, line in enumerate(lines):
        _, brace, record = line.partition("{")
        name = json.loads(brace + record).get("artifact", {}).get("name", "") if brace and '"artifact"' in record and "qcompile" in record else ""
        if name:
            end = next((j for j in range(i + 1, len(lines)) if not lines[j].startswith("\t")), len(lines))
            found.setdefault(name, []).append("\n".join(text.removeprefix("\t") for text in lines[i + 1 : end]))
    assert set(found) == {f"qcompile_{i:02d}_{name}" for i, name in enumerate(PIPELINE)} | {"qcompile_plan"}
    assert all(len(payloads) == 2 for payloads in found.values())
    assert "linear(l_x_, %up.weight, %up.bias)" in found["qcompile_00_normalize"][0]
    first, second = map(json.loads, found["qcompile_plan"])
    assert first["up"] | {"kernel": None} == {"shape": [64, 32], "role": "linear", "rows": 6, "weight": "int8.row", "input": "int8.row", "why": "W8A8", "kernel": None}
    assert set(first) == {"up", "down"} and second == {"small": {"shape": [4, 32], "role": "linear", "rows": 4, "kept": "4 x 32 is smaller than 16"}}
