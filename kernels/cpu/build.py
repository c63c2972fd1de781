"""Compile a C++ source string into a shared library and load it with ctypes."""

import ctypes
import getpass
import glob
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading

import torch

_LOCK = threading.Lock()
"""One compile at a time in a process: a thread builds ahead while Inductor works."""


class NoCompiler(RuntimeError):
    """There is no C++ compiler here, or it could not compile the source."""


def load_cpp(source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile `source` (C++17, OpenMP) with `flags` and load it; the library is cached by the hash of everything that matters.

    The cache lies beside Inductor's. Processes may race: each builds under its own name and renames, so a reader sees a whole file.
    """
    cxx = next((path for path in map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++"))) if path), None)
    if cxx is None:
        raise NoCompiler("no C++ compiler: set CXX, or install g++ or clang++")
    flags = ("-std=c++17", "-O2", "-fPIC", "-fwrapv", "-fno-math-errno", "-fopenmp", *flags)
    # torch's own OpenMP runtime, under whatever name its wheel gives it: a second one would start a second pool of spinning threads.
    root = os.path.dirname(torch.__file__)
    runtimes = (f"{root}/lib/libgomp*.so*", f"{root}.libs/libgomp*.so*", f"{root}/lib/libiomp*.so*", f"{root}/lib/libomp*.so*")
    openmp = next((found[0] for found in map(glob.glob, runtimes) if found), "-fopenmp")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join((source, cxx, version, *flags, openmp)).encode()).hexdigest()[:24]
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    folder = os.path.join(cache, "qcompile")
    os.makedirs(folder, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise NoCompiler(f"{folder} belongs to another user: set TORCHINDUCTOR_CACHE_DIR")
    library = os.path.join(folder, f"{key}.so")
    with _LOCK:
        if not os.path.exists(library):
            _compile(cxx, source, flags, openmp, folder, library)
    return ctypes.CDLL(library)


def _compile(cxx: str, source: str, flags: tuple[str, ...], openmp: str, folder: str, library: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as work:  # same file system as the library, so that the rename is atomic
        with open(f"{work}/source.cpp", "w") as file:
            file.write(source)
        for command in (
            [cxx, *flags, "-c", f"{work}/source.cpp", "-o", f"{work}/source.o"],
            [cxx, "-shared", f"{work}/source.o", openmp, "-lm", "-o", f"{work}/library.so"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise NoCompiler(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        os.replace(f"{work}/library.so", library)
