"""Two gloo ranks of which one stops, sleeps or misses a collective, under a watch of a few seconds."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.types import Batch
from train import ranks
from train.heartbeat import Heart

HANG_S = 3.0
BATCHES = [dataclasses.replace(Batch.empty(4), mel_lengths=(7,), grids=((2, 4, 4),), doc_lengths=(3,))]


def loop(folder: str, how: str, ready: str) -> None:
    """Steps of a loop; in the third one of the ranks does not go on. Ends with status 70, or 0 where nothing hangs."""
    ranks.start(torch.device("cpu"))
    rank = ranks.rank()
    own = Path(folder) / (str(rank) if how == "apart" else "run")
    own.mkdir(exist_ok=True)
    heart = Heart(own / "heartbeats", rank=rank, world=2, launch="a", hang_s=HANG_S, slow=4.0)
    for step in range(1, 5):
        heart.beat("data", step)
        heart.begin(step, BATCHES if rank else [Batch.empty(4)])
        time.sleep(0.3)
        ranks.barrier()
        if step == 3 and rank == 1:
            misbehave(how, Path(ready))
        heart.beat("optimizer")
        if step == 3 and rank == 0 and how == "missed":
            heart.beat("data", 4)
            time.sleep(60)
        ranks.barrier()
        if step == 2 and how == "evaluation":  # longer than hang_s, on one rank alone
            heart.beat("evaluate", slow=True)
            time.sleep(2.0 * HANG_S if rank == 0 else 0.0)
        if step == 2 and how == "apart":  # folders that are not shared
            time.sleep(2.0 * HANG_S if rank == 0 else 0.0)
    heart.close()
    ranks.leave(0)


def misbehave(how: str, ready: Path) -> None:
    """As the name says."""
    if how == "sleep":
        time.sleep(60)
    if how == "stop":
        ready.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "lock":  # a call into C that holds the interpreter's lock
        ctypes.PyDLL(None).sleep(60)


def start(folder: Path, how: str, port: int) -> list[subprocess.Popen[str]]:
    """Both ranks as processes of their own."""
    root = Path(__file__).resolve().parents[2]
    code = f"from tests.train.hang_cases import loop; loop({str(folder)!r}, {how!r}, {str(folder / 'ready')!r})"
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {key: str(value) for key, value in place.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=root, env=env, stderr=pipe, stdout=pipe, text=True))
    return processes
