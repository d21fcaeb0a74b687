"""Run a function in N processes that form a gloo group, for tests.

    results = spawn(some_module.function, 2, *arguments)      # one result per rank; arguments and results are JSON

Every process is a session of its own with one thread. When one does not finish in time it prints the stack of every
thread, and then all are killed with whatever they started. With one process there is no torchrun environment at all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import ranks

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE = 10.0  # seconds: for the others to end by themselves when one has failed, and for stacks to be printed


class ProcessFailed(AssertionError):
    """A process failed or did not finish; the message holds the output of all."""


def spawn(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call a module-level function in `world` processes and return its results in the order of ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = f"{function.__module__}:{function.__qualname__}"
        (folder / "arguments.json").write_text(json.dumps([target, timeout, *arguments]))
        port = _free_port()
        processes = [_start(folder, rank, world, port) for rank in range(world)]
        try:
            _wait(processes, time.monotonic() + timeout + GRACE)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        codes = [process.returncode for process in processes]
        if any(codes):
            outputs = [f"--- rank {r}: {codes[r]}\n{(folder / f'{r}.log').read_text()}" for r in range(world)]
            raise ProcessFailed(f"{target} failed\n" + "\n".join(outputs))
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(folder: Path, rank: int, world: int, port: int) -> subprocess.Popen[bytes]:
    env = {key: value for key, value in os.environ.items() if key not in TORCHRUN}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if world > 1:
        values = rank, rank, world, world, "127.0.0.1", port
        env |= {key: str(value) for key, value in zip(TORCHRUN, values, strict=True)}
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.distributed", str(folder), str(rank)],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):  # its peers would wait for it in a collective
            deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.05)


def main(folder: Path, rank: int) -> None:
    """One of the processes."""
    target, timeout, *arguments = json.loads((folder / "arguments.json").read_text())
    faulthandler.dump_traceback_later(timeout, exit=True)
    import torch

    torch.set_num_threads(1)
    module, name = target.split(":")
    result = getattr(importlib.import_module(module), name)(*arguments)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    ranks.leave(0)  # as train.py does: a destructor of gloo's or DeepSpeed's may abort a process that has done its work
