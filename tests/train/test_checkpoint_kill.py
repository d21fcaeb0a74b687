"""kill -9 at any moment of a save: the newest complete checkpoint, or the one before, loads and is no mix."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.train.checkpoint_helpers import INFO
from train.checkpoint import CheckpointReader, Saver, candidates, choose
from train.checkpoint.format import folder_step
from train.checkpoint.writer import Writer
from train.engines import MOMENTS, WEIGHT, Fragment

FORK = multiprocessing.get_context("fork")  # torch is imported already: forty starts cost nothing
WORLD, NUMEL, NAMES = 2, 300_000, ("a", "b", "c")


def fragments_of(rank: int, step: int) -> list[Fragment]:
    """Every value of the state of step n is n, n + 0.25 or n + 0.5: a mix of steps cannot hide."""
    low, high = NUMEL * rank // WORLD, NUMEL * (rank + 1) // WORLD
    tensors = {kind: torch.full((high - low,), step + i / 4) for i, kind in enumerate((WEIGHT, *MOMENTS))}
    return [Fragment(name, (NUMEL,), low, high - low, tensors) for name in NAMES]


def check(run: Path) -> int:
    """Step of the checkpoint that a restart takes, after checking every value of it."""
    manifest = choose(run, "auto", wait_s=30, warn=pytest.fail)
    if manifest is None:
        return 0
    reader = CheckpointReader(manifest)
    for name in NAMES:
        for i, kind in enumerate((WEIGHT, *MOMENTS)):
            assert (reader.read(kind, name, (NUMEL,), 0, NUMEL) == manifest.step + i / 4).all()
    return manifest.step


def train_and_save(run: Path, rank: int, launch: str, start: int, group: int) -> None:
    """One trainer: saves as fast as it can until it is killed."""
    os.setpgid(0, group)
    torch.set_num_threads(1)
    saver = Saver(run, rank=rank, world=WORLD, launch_id=launch, start_step=start, keep=2, timeout_s=30)
    for step in range(start + 1, start + 10_000):
        saver.save(step, fragments_of(rank, step), INFO)


def writers_of(run: Path) -> list[int]:
    """Processes that have this run's folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in path.read_bytes() and b"train.checkpoint.writer" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass  # it ended meanwhile
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(240)
def test_twenty_kills_while_saving(tmp_path: Path):
    chooser, step = random.Random(0), 0
    for kill in range(20):
        trainers = []
        for rank in range(WORLD):
            group = trainers[0].pid if trainers else 0
            trainers.append(FORK.Process(target=train_and_save, args=(tmp_path, rank, f"kill{kill}", step, group)))
            trainers[-1].start()
            # here as well as in the child, as shells do: the group must exist before the next one joins it
            os.setpgid(trainers[-1].pid, group or trainers[-1].pid)
        deadline = time.monotonic() + 60
        while not [path for path in candidates(tmp_path) if (folder_step(path.name) or 0) > step]:
            assert time.monotonic() < deadline, "nothing is saved"
            time.sleep(0.01)
        time.sleep(chooser.random() * 0.4)
        published = max(folder_step(path.name) or 0 for path in candidates(tmp_path))
        if kill % 2:  # the whole group, writers too; otherwise only the trainers: the writers finish by themselves
            os.killpg(trainers[0].pid, signal.SIGKILL)
        for trainer in trainers:
            os.kill(trainer.pid, signal.SIGKILL)
        for trainer in trainers:
            trainer.join(30)
        found = check(tmp_path)  # waits for the writers
        assert found >= published > step, (found, published, step)
        step = found
    assert not writers_of(tmp_path)
    assert not [name for name in os.listdir("/dev/shm") if "omniloom" in name]
    with Saver(tmp_path, rank=0, world=1, launch_id="last", start_step=step):
        pass
    left = {path.name.split("-")[0] for path in (tmp_path / "checkpoints").iterdir()}
    assert left <= {".lock", "step", "latest"} and len(candidates(tmp_path)) in (1, 2, 3)


class Countdown:
    """Ends the process, as kill -9 would, at the n-th call of anything that it wraps."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def wrap(self, module: object, name: str) -> None:
        original: Callable = getattr(module, name)

        def counted(*args: object, **kwargs: object) -> object:
            self.calls -= 1
            if self.calls == 0:
                os._exit(9)
            return original(*args, **kwargs)

        setattr(module, name, counted)


def save_until(run: Path, calls: int) -> None:
    """Save step 2 with a writer in this process, which dies at a given system call."""
    torch.set_num_threads(1)  # the parent's thread pool did not come along
    memory = os.memfd_create("test")
    values = [tensor for rank in (0, 1) for f in fragments_of(rank, 2) for tensor in f.tensors.values()]
    os.write(memory, b"".join(tensor.numpy().tobytes() for tensor in values))
    settings = {"folder": str(run / "checkpoints"), "rank": 0, "world": 1, "keep": 1, "launch": "b"}
    writer = Writer({**settings, "versions": {}, "memory": memory})
    handle = writer.prepare(20.0)
    rows = [(f, list(f.tensors)) for rank in (0, 1) for f in fragments_of(rank, 2)]
    writer.set_layout([[f.name, kinds, [[f.name, [NUMEL], f.start, f.length]]] for f, kinds in rows])
    countdown = Countdown(calls)
    for name in ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "open"):
        countdown.wrap(os, name)
    error = writer.save(2, [], INFO)
    writer.delete_old(2)
    os.close(handle)
    os._exit(7 if error else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="memfd")
def test_a_death_at_every_system_call_of_the_writer(tmp_path: Path):
    """R3 of crash consistency: not random moments but all of them."""
    first = tmp_path / "first"
    with Saver(first, rank=0, world=1, launch_id="a") as saver:
        whole = [f for rank in range(WORLD) for f in fragments_of(rank, 1)]
        saver.save(1, whole, INFO)
    seen, calls = [], 0
    while True:
        calls += 1
        run = tmp_path / f"run{calls}"
        folder = run / "checkpoints"
        folder.mkdir(parents=True)
        shutil.copytree(candidates(first)[0], folder / "step-00000001")
        process = FORK.Process(target=save_until, args=(run, calls))
        process.start()
        process.join(60)
        process.kill()
        assert process.exitcode in (0, 9)
        seen.append(check(run))
        if process.exitcode == 0:
            break
    assert calls > 15 and seen == sorted(seen) and seen[0] == 1 and seen[-1] == 2
