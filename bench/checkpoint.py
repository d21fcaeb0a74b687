"""Saving while training: ours against torch.distributed.checkpoint.async_save.

    .venv/bin/python bench/checkpoint.py

67 million fp32 parameters and their two AdamW moments (805 MB), one process, one thread, a real training step; every
saver in turn, three rounds after a warm-up, fewer where the machine is too busy for that. Printed per saver: seconds
that the call keeps training waiting; CPU seconds of the training thread in it, which other jobs on the machine distort
less; how many times slower steps are while the checkpoint is being written (wall time, against the steps just before);
seconds until the saver says done. Ours is durable then (fsync, SHA-256, rename); theirs is in the page cache.

Theirs is called as its documentation does: a thread, memory allocated anew for each save. That is the ratio's peer. The
table also shows it with a stager that is kept and reuses its memory, and that with a process instead of the thread:
those are one copy into touched memory, as ours is, and block as long. Needs 8 GB of memory and 5 GB of disk in the
folder given as argument, by default the system's temporary one. Under three minutes where nothing else runs.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report
from train.checkpoint import Saver
from train.engines import MOMENTS, WEIGHT, Fragment

WIDTH, LAYERS, TOKENS = 2048, 16, 32
ROUNDS, STEPS_BEFORE, BUDGET_S, GOAL = 3, 4, 120, 1 / 0.6


@dataclass
class Timings:
    """Of one saver, a value per round."""

    blocked: list[float] = field(default_factory=list)  # s, wall
    cpu: list[float] = field(default_factory=list)  # s of CPU in the same call
    slowdown: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)  # s until the saver says done


class Trainer:
    """A model that is nothing but 67 million parameters, and AdamW."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.input = torch.randn(TOKENS, WIDTH)

    def step(self) -> float:
        """Seconds of one training step."""
        began = time.perf_counter()
        self.model(self.input).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def fragments(self) -> list[Fragment]:
        """For our saver."""
        found = []
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors = {WEIGHT: parameter.detach().view(-1), **{kind: state[kind].view(-1) for kind in MOMENTS}}
            found.append(Fragment(name, tuple(parameter.shape), 0, parameter.numel(), tensors))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The same tensors for theirs."""
        return {f"{kind}.{f.name}": tensor for f in self.fragments() for kind, tensor in f.tensors.items()}


def our_saver(trainer: Trainer, folder: Path) -> tuple[Callable[[], Callable[[], bool]], Callable[[], None]]:
    """(start a save and return what tells whether it is done, close)."""
    saver = Saver(folder, rank=0, world=1, launch_id="bench", keep=1)
    saver.prepare(trainer.fragments())
    steps = itertools.count(1)

    def start() -> Callable[[], bool]:
        step = next(steps)
        saver.save(step, trainer.fragments(), {"identity": {}})
        return lambda: saver.poll() == step

    return start, saver.close


def their_saver(
    trainer: Trainer, folder: Path, kind: AsyncCheckpointerType, stager: DefaultStager | None
) -> tuple[Callable[[], Callable[[], bool]], Callable[[], None]]:
    """As `our_saver`; like ours it keeps one checkpoint, and the older one is deleted after the save."""
    steps, previous = itertools.count(1), []

    def start() -> Callable[[], bool]:
        path = folder / f"step-{next(steps)}"
        future = async_save(trainer.state_dict(), checkpoint_id=path, async_checkpointer_type=kind, async_stager=stager)
        written = future if isinstance(future, Future) else future.upload_completion
        previous.append(path)
        return written.done

    def close() -> None:
        if stager is not None:
            stager.close()

    def start_and_tidy() -> Callable[[], bool]:
        for path in previous[:-1]:
            shutil.rmtree(path)
            previous.remove(path)
        return start()

    return start_and_tidy, close


def measure(trainer: Trainer, start: Callable[[], Callable[[], bool]], timings: Timings) -> None:
    """One save amid training steps."""
    before = median(trainer.step() for _ in range(STEPS_BEFORE))
    cpu, began = time.thread_time(), time.perf_counter()
    done = start()
    timings.blocked.append(time.perf_counter() - began)
    timings.cpu.append(time.thread_time() - cpu)
    during = []
    while not done():
        during.append(trainer.step())
    timings.written.append(time.perf_counter() - began)
    timings.slowdown.append(sum(during) / max(1, len(during)) / before)
    os.sync()  # nobody's dirty pages are written during another's turn


def main() -> None:
    """Measure in turn and report."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    place = Path(tempfile.mkdtemp(prefix="omniloom-bench-", dir=sys.argv[1] if len(sys.argv) > 1 else None))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    trainer = Trainer()
    trainer.step()
    plain, shared = StagingOptions(False, False, False, False), StagingOptions(False, True, False, False)
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    savers = {
        "ours": our_saver(trainer, place / "ours"),
        "async_save": their_saver(trainer, place / "default", thread, None),
        "async_save, stager kept": their_saver(trainer, place / "kept", thread, DefaultStager(plain)),
        "async_save, process": their_saver(trainer, place / "process", process, DefaultStager(shared)),
    }
    timings = {name: Timings() for name in savers}
    try:
        began = time.monotonic()
        for turn in range(ROUNDS + 1):
            if turn > 1 and time.monotonic() - began > BUDGET_S * turn / (turn + 1):
                break
            for name, (start, _) in savers.items():
                measure(trainer, start, timings[name] if turn else Timings())
        for _, close in savers.values():
            close()
    finally:
        shutil.rmtree(place, ignore_errors=True)
        dist.destroy_process_group()
    print(f"{'':26}{'blocked s':>11}{'of it CPU s':>13}{'steps slower':>14}{'written after s':>17}")
    for name, t in timings.items():
        print(
            f"{name:26}{median(t.blocked):>11.3f}{median(t.cpu):>13.3f}{median(t.slowdown):>13.2f}x{median(t.written):>17.1f}"
        )
    ours, peer = timings["ours"], timings["async_save"]
    ratio = median(peer.blocked) / median(ours.blocked)
    report(
        "checkpoint",
        ours=median(ours.blocked),
        peer=median(peer.blocked),
        ratio=ratio,
        unit="s training is blocked",
        goal=round(GOAL, 3),
        met=ratio >= GOAL and median(ours.slowdown) <= median(peer.slowdown),
    )


if __name__ == "__main__":
    main()
