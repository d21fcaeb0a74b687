"""Who is writing: each writer process holds an flock for as long as it lives, whatever kills its trainer.

The lock file holds {"launch", "pid", "host"} for the message and to tell this launch's writers from a dying one's.
The kernel drops the lock with the process, so nothing has to be cleaned up. Needs flock (NFS 4 has it).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.errors import CheckpointError

POLL_S = 0.02
PATTERN = ".lock-rank*"


def lock_path(folder: Path, rank: int) -> Path:
    """Of a rank's writer."""
    return folder / f".lock-rank{rank}"


def is_held(path: Path) -> bool:
    """True while some process holds the lock. A shared try: probes do not disturb each other."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)  # drops the shared lock


def acquire(folder: Path, rank: int, launch: str, timeout_s: float) -> int:
    """Descriptor of this rank's lock, to be kept open; waits for the writer of a run that is just dying."""
    path = lock_path(folder, rank)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CheckpointError(_busy(path, timeout_s)) from None
            time.sleep(POLL_S)
    owner = json.dumps({"launch": launch, "pid": os.getpid(), "host": socket.gethostname()}).encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, owner, 0)
    return handle


def wait_for_writers(
    folder: Path, timeout_s: float, launch: str | None = None, tell: Callable[[str], None] | None = None
) -> None:
    """Return once no writer of another launch is alive; CheckpointError when one still is after `timeout_s`."""
    began = time.monotonic()
    for path in sorted(folder.glob(PATTERN)):
        while is_held(path) and (launch is None or _owner(path).get("launch") != launch):
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise CheckpointError(_busy(path, timeout_s))
            if tell and waited > 2:
                tell(f"{path}: waiting for the writer of the previous run to finish its checkpoint")
                tell = None
            time.sleep(POLL_S)


def _owner(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            owner = json.loads(file.read(4096))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _busy(path: Path, timeout_s: float) -> str:
    owner = _owner(path)
    who = f"process {owner.get('pid')} on {owner.get('host')}"
    return f"{path}: {who} still writes here after {timeout_s:.0f} s; stop that run or choose another run folder"
