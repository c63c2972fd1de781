"""What a test runs in two processes: ``run(__file__, check)`` in the test, ``main(checks)`` in the file, which is then a script. An assertion that fails in one process fails the test.

On "cpu" they meet through gloo; on "cuda" through NCCL, and each process makes its tensors on a GPU of its own.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta


def run(file: str, check: str, device: str = "cpu") -> str:
    """Runs one check of the file on both ranks; gives what rank 0 printed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, file, check, device, folder]
        ranks = ("01",) if device == "cpu" else ("0", "1")
        started = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", start_new_session=True) for rank in ranks]
        printed = []
        for process in started:
            try:
                printed.append(process.communicate(timeout=300)[0])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed.append(f"{process.communicate()[0]}\nnot done after 300 s")
    assert not any(process.returncode for process in started), "\n".join(text[-4000:] for text in printed)
    return printed[0]


def main(checks: Mapping[str, Callable[[int], None]]) -> None:
    """The script's side."""
    import torch
    import torch.distributed as dist

    name, device, folder, ranks = sys.argv[1:]
    torch.set_num_threads(1)
    rank, child = int(ranks[0]), 0
    if ranks == "01":  # imports take longer than most checks, and are done once
        import torch._inductor.compile_fx

        import qcompile.backend  # noqa: F401

        child = os.fork()
        rank = int(not child)
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what rank 0 prints is what the test reads
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    store = dist.FileStore(str(pathlib.Path(folder) / "meet"), 2)
    store.set_timeout(timedelta(seconds=60))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    try:
        checks[name](rank)
    except BaseException:
        if child:  # it would wait for this one, and keep the pipe open
            os.kill(child, signal.SIGTERM)
        raise
    # both are done before one closes its connections: through the store, since a process that still waits in a barrier of gloo fails when the other one leaves
    store.set(f"done{rank}", "yes")
    store.wait(["done0", "done1"])
    dist.destroy_process_group()
    if child and os.waitpid(child, 0)[1]:
        raise SystemExit("rank 1 failed")
