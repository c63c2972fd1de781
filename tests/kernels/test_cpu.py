"""The C++ kernels against plain torch in float64, on ugly sizes, for every instruction set this machine has."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.kernels import cpu

SIZES = [(0, 3, 5), (1, 1, 1), (1, 5, 17), (2, 7, 64), (3, 4, 63), (7, 9, 65), (13, 31, 130), (5, 16, 1000), (49, 70, 300), (25, 33, 127), (64, 65, 256)]
GROUPS = [None, 16, 48, 64, 128, 192]
KINDS = ["table4", "int8", "uint8", "e4m3", "e5m2", "table8"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=["avx512_vnni", "avx2", "scalar"])
def isa(request, monkeypatch):
    if request.param not in cpu.supported():
        pytest.skip(f"this CPU has no {request.param}")
    force(monkeypatch, request.param)
    yield request.param
    monkeypatch.undo()
    clear()


def force(monkeypatch, name):
    monkeypatch.setenv("QCOMPILE_CPU_ISA", name)
    clear()
    try:
        cpu.integer_library(), cpu.table_library()
    except cpu.NoCompiler as error:
        pytest.skip(str(error))


def clear():
    for cached in (cpu.isa, cpu.integer_library, cpu.table_library):
        cached.cache_clear()


@pytest.mark.skipif(not set(cpu.supported()) - {"scalar"}, reason="not an x86 machine, or no AVX2")
@pytest.mark.parametrize("name", cpu._FLAGS)
def test_every_instruction_set_compiles(name):
    """Also those that this machine cannot run: what is loaded is not called."""
    try:
        for source, function in (("integer", "qc_int_linear"), ("table", "qc_table_linear")):
            assert getattr(cpu.load_cpp(cpu._source("isa") + cpu._source(source), cpu._FLAGS[name]), function)
    except cpu.NoCompiler as error:
        assert "no C++ compiler" in str(error), error
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs are born as NaN, so an element that a kernel leaves out shows."""

    def empty(*args, **kwargs):
        return torch.full(*args, float("nan"), **kwargs)

    monkeypatch.setattr(cpu.torch, "empty", empty)


def pack4(codes):
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 128) * 128, dtype=torch.int64)
    padded[:, :columns] = codes & 15
    low, high = padded.view(rows, -1, 2, 64).unbind(2)
    return (low | high << 4).to(torch.uint8).reshape(rows, -1)


def integers(low, high, *shape):
    """Random codes with both ends of the range in them."""
    codes = torch.randint(low, high + 1, shape)
    flat = codes.view(-1)
    flat[: 1 + flat.numel() // 3 : 3] = low
    flat[1:2] = high
    return codes


def scales(rows, columns, group):
    return torch.rand(rows, 1 if group is None else -(-columns // group)) + 0.1


def spread(values, columns, group):
    """(N, G) -> (N, K)"""
    return values.double()[:, torch.arange(columns) // (group or columns)]


def close(result, expected, tolerance):
    assert result.shape == expected.shape
    error = (result.double() - expected).abs().max().item() if result.numel() else 0.0
    assert error <= tolerance * max(expected.abs().max().item() if result.numel() else 0.0, 1e-30), error


def check_integer(bits, m, n, k, group, way, low=-128):
    xq, wq = integers(low, 127, m, k).to(torch.int8), integers(-(1 << bits - 1), (1 << bits - 1) - 1, n, k)
    sx, sw = torch.rand(m) + 0.1, scales(n, k, group)
    expected = sx.double()[:, None] * (xq.double() @ (wq.double() * spread(sw, k, group)).T)
    linear, codes = (cpu.int8_linear, wq.to(torch.int8)) if bits == 8 else (cpu.int4_int8_linear, pack4(wq))
    close(linear(xq, sx, codes, sw, group, way), expected, 2e-6)


@pytest.mark.parametrize("way", [None, "dot", "panel"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integer(isa, bits, way):
    for m, n, k in SIZES:
        for group in GROUPS:
            check_integer(bits, m, n, k, group, way)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([8, 4]),
    st.integers(0, 60),
    st.integers(1, 90),
    st.integers(1, 400),
    st.sampled_from([None, 16, 32, 64, 80, 128, 256]),
    st.sampled_from([None, "dot", "panel"]),
    st.integers(1, 3),
)
def test_integer_any_size(bits, m, n, k, group, way, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_integer(bits, m, n, k, group, way)
    except cpu.NoCompiler as error:
        pytest.skip(str(error))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("way", ["dot", "panel"])
@pytest.mark.parametrize(("x", "w"), [(-128, -128), (-128, 127), (127, -128), (127, 127)])
def test_integer_extremes_are_exact(isa, x, w, way):
    """Where 16-bit partial sums would saturate; the sums are below 2**24, so float32 holds them exactly."""
    m, n, k = 3, 9, 1000
    y = cpu.int8_linear(torch.full((m, k), x, dtype=torch.int8), torch.ones(m), torch.full((n, k), w, dtype=torch.int8), torch.ones(n, 1), way=way)
    assert torch.equal(y, torch.full((m, n), float(x * w * k)))


@pytest.mark.parametrize("way", ["dot", "panel"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_sums_are_exact(isa, bits, way):
    """Small sums of large terms: a bias that were not taken back exactly would show."""
    torch.manual_seed(0)
    xq, wq = integers(100, 127, 5, 640).to(torch.int8), integers(-(1 << bits - 1), (1 << bits - 1) - 1, 21, 640)
    linear, codes = (cpu.int8_linear, wq.to(torch.int8)) if bits == 8 else (cpu.int4_int8_linear, pack4(wq))
    assert torch.equal(linear(xq, torch.ones(5), codes, torch.ones(21, 1), way=way).long(), xq.long() @ wq.T)


def test_many_threads(isa):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        for m, n in ((200, 40), (3, 700), (100, 300)):
            check_integer(8, m, n, 256, None, None)
            check_table("table4", m, n, 256, 64, True)
    finally:
        torch.set_num_threads(before)


def make_codes(kind, n, k):
    """-> codes as the kernel takes them, table, values in float64"""
    codes, table = torch.randint(0, 256, (n, k)).to(torch.uint8), None
    if kind == "table4":
        codes, table = codes & 15, torch.randn(16)
        return pack4(codes.long()), table, table[codes.long()].double()
    if kind == "table8":
        table = torch.randn(256)
        return codes, table, table[codes.long()].double()
    if kind == "uint8":
        return codes, table, codes.double()
    dtype = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    if kind != "int8":
        codes = torch.where(codes.view(dtype).float().isfinite(), codes, 1)
    return codes.view(dtype), table, codes.view(dtype).double()


def check_table(kind, m, n, k, group, with_offset):
    codes, table, values = make_codes(kind, n, k)
    scale = scales(n, k, group)
    offset = torch.randn_like(scale) if with_offset else None
    w = values * spread(scale, k, group) + (spread(offset, k, group) if with_offset else 0)
    close(cpu.dequantize(codes, table, scale, offset, group, k), w, 1e-6)
    close(cpu.dequantize(codes, table, scale, offset, group, k, torch.bfloat16), w, 4e-3)
    x = torch.randn(m, k)
    close(cpu.table_linear(x, codes, table, scale, offset, group), x.double() @ w.T, 5e-6)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_table(isa, kind, with_offset):
    for m, n, k in SIZES:
        for group in GROUPS:
            check_table(kind, m, n, k, group, with_offset)


def test_many_rows_go_block_by_block(isa, monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK", 64 * 200)
    for kind in KINDS:
        check_table(kind, 70, 201, 200, 64, True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8_value(isa, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(dtype)
    assert torch.equal(cpu.dequantize(codes, None, torch.ones(1, 1)).nan_to_num(nan=1e9), codes.float().nan_to_num(nan=1e9))


def test_bfloat16_rounds_like_torch(isa):
    table = torch.randn(256)
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    assert torch.equal(cpu.dequantize(codes, table, torch.ones(1, 1), dtype=torch.bfloat16), table.view(1, 256).bfloat16())


def test_other_float_dtypes(isa):
    codes, table, values = make_codes("table4", 8, 128)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(3, 128).to(dtype)
        y = cpu.table_linear(x, codes, table, torch.ones(8, 1))
        assert y.dtype == dtype
        close(y, x.double() @ values.T, 1e-2)


def test_reads_stay_inside(isa):
    """The last byte of every operand is followed by a page that may not be read."""
    libc, page = ctypes.CDLL(None, use_errno=True), os.sysconf("SC_PAGESIZE")
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def fenced(tensor):
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // page) * page
        start = libc.mmap(None, pages + page, 3, 0x22, -1, 0)  # read and write; private, anonymous
        assert libc.mprotect(start + pages, page, 0) == 0
        memory = (ctypes.c_char * size).from_address(start + pages - size)
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    for n, k in ((5, 17), (33, 130), (64, 192), (6, 1000)):
        for m in (1, 4, 50):
            xq, sx, sw = (fenced(t) for t in (torch.ones(m, k, dtype=torch.int8), torch.ones(m), torch.ones(n, 1)))
            for way in ("dot", "panel"):
                ones = fenced(torch.ones(n, k, dtype=torch.int8))
                assert (cpu.int8_linear(xq, sx, ones, sw, way=way) == k).all()
                assert (cpu.int4_int8_linear(xq, sx, fenced(pack4(ones.long())), sw, way=way) == k).all()
            for kind in KINDS:
                codes, table, _ = make_codes(kind, n, k)
                table = None if table is None else fenced(table)
                raw = fenced(codes.view(torch.uint8)).view(codes.dtype)
                cpu.table_linear(fenced(torch.ones(m, k)), raw, table, sw, sw)
                cpu.dequantize(raw, table, sw, None, None, k)


def test_wrong_arguments():
    one = torch.ones(4, 1)
    xq, sx, wq = torch.zeros(2, 32, dtype=torch.int8), torch.ones(2), torch.zeros(4, 32, dtype=torch.int8)
    for arguments in (
        (xq.float(), sx, wq, one),
        (xq, sx[:1], wq, one),
        (xq, sx, wq.t(), one),
        (xq, sx, wq[:, :31], one),
        (xq, sx, wq, torch.ones(4, 2)),
        (xq, sx, wq, torch.ones(4, 2), 32),
        (xq, sx, wq, torch.ones(4, 4), 8),
        (xq, sx, wq, one.double()),
    ):
        with pytest.raises(ValueError, match=r"expected|do not fit"):
            cpu.int8_linear(*arguments)
    with pytest.raises(ValueError, match="expected"):
        cpu.table_linear(xq.float(), wq, torch.ones(16), one)


def test_unknown_isa(monkeypatch):
    monkeypatch.setenv("QCOMPILE_CPU_ISA", "mmx")
    cpu.isa.cache_clear()
    with pytest.raises(ValueError, match="avx512_vnni, avx2, scalar"):
        cpu.isa()
    monkeypatch.undo()
    cpu.isa.cache_clear()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(cpu.NoCompiler, match="error"):
        cpu.load_cpp("this is not C++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(cpu.NoCompiler, match="CXX"):
        cpu.load_cpp("int x;")


def test_processes_may_race(tmp_path):
    """Several processes that compile the same source at once all get a working library."""
    code = f"import sys; from qcompile.kernels.cpu import load_cpp; print(load_cpp('extern \"C\" int answer() {{ return 42; }} // {tmp_path}').answer())"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    if all(child.wait() for child in children):
        pytest.skip("no compiler")
    assert [child.communicate()[0].strip() for child in children] == ["42"] * 3
    assert len(list((tmp_path / "qcompile").iterdir())) == 1
