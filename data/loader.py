"""Worker processes that read ahead: the plan's packs of one rank, in order, as batches.

    main process: plan.share(step, rank) --pack by pack--> workers: reader.batch(pack) --shared memory--> main process
    main process: packs of one step together, empty batches where a rank has fewer than another --> training

Workers hold nothing worth saving and get only indices, so their number changes no result.  They are forked from a
clean server process: forking the training process, with its threads, can deadlock.  Their parent alone ends them:
they ignore Ctrl-C and SIGTERM, which often reach all processes of a run while its last step should still finish.
Memory: workers * prefetch batches.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.errors import DataError
from data.mel import NUM_MELS
from data.plan import Pack, Plan
from data.reader import Reader
from data.types import Batch

POLL_S = 2.0  # how soon a dead worker is noticed
WORKER_TIMEOUT_S = 900.0  # for one pack; a worker that takes longer hangs
# glibc gives large blocks back at once, and each new picture then faults its pages in anew: a third of decoding time.
GLIBC = {"MALLOC_MMAP_THRESHOLD_": 32 << 20, "MALLOC_TRIM_THRESHOLD_": 512 << 20}


class ShardOf(Protocol):
    """Which of `count` data ranks this one is."""

    @property
    def index(self) -> int:
        """From 0."""
        ...

    @property
    def count(self) -> int:
        """At least 1."""
        ...


def stream(
    plan: Plan,
    reader: Reader,
    shard: ShardOf,
    start_step: int,
    stop_step: int,
    workers: int,
    *,
    origin: int = 0,
    prefetch: int = 4,
    pin_memory: bool = False,
) -> Generator[tuple[int, list[Batch]], None, None]:
    """(step, this rank's batches) for the steps from `start_step` to `stop_step` - 1.

    `origin` is the step of the run at which the plan begins.
    Every rank gets ceil(sequences_per_step / count) batches a step, empty ones (T = 0) where packs run out.
    Raises DataError where a shard cannot be read any more or a worker dies. Closing the iterator ends the workers.
    """
    per_step = -(-plan.settings.sequences_per_step // shard.count)
    steps = range(start_step, stop_step)
    order = _Order(plan, shard, range(start_step - origin, stop_step - origin), per_step)
    parallel: dict[str, Any] = {}
    if workers > 0:
        context = multiprocessing.get_context("forkserver")
        modules = {"__main__", "data.loader", type(reader.layout).__module__}
        for name, size in GLIBC.items():
            os.environ.setdefault(name, str(size))  # for processes to come: this one has read its own
        context.set_forkserver_preload(sorted(modules))  # imported once for all workers: torch alone takes seconds
        parallel = {"multiprocessing_context": context, "prefetch_factor": prefetch, "timeout": POLL_S}
    loader = DataLoader(
        _Packs(reader),
        batch_size=None,
        sampler=order,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, or the loader would draw from the random state of training
        **parallel,
    )
    batches = iter(loader)
    ending = _Ending(batches)
    try:
        for step in steps:
            yield step, [_next(batches) for _ in range(per_step)]
    finally:
        ending.close()


class _Order(Sampler):
    """The packs of one rank, step after step, `per_step` each, None where it has fewer."""

    def __init__(self, plan: Plan, shard: ShardOf, steps: range, per_step: int) -> None:
        self.plan = plan
        self.shard = shard
        self.steps = steps
        self.per_step = per_step

    def __iter__(self) -> Iterator[Pack | None]:
        for step in self.steps:
            packs = self.plan.share(step, self.shard.index, self.shard.count)
            yield from packs
            yield from [None] * (self.per_step - len(packs))


class _Packs(Dataset):
    """Packs to batches; what goes wrong for good comes back as its line, since a raised error drags a traceback."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, pack: Pack | None) -> Batch | DataError:
        if pack is None:
            return Batch.empty(NUM_MELS)
        try:
            return self.reader.batch(pack)
        except DataError as error:
            return error


class _Ending:
    """Ends the workers when the stream closes, and at the latest when the process ends.

    torch ends them when its iterator is collected, which an exception's traceback may put off; and it asks them by an
    event whose lock a worker that was killed may hold for good. Both must be kept from meeting.
    """

    def __init__(self, batches: Any) -> None:
        self.workers = list(getattr(batches, "_workers", ()))  # torch has no public names for any of these
        self.batches = batches if self.workers else None
        if self.workers:
            atexit.register(self.kill)  # runs before multiprocessing's own handler, which would wait for them

    def close(self) -> None:
        """Ask the workers to end, or kill them where one is dead already; wait for the threads that fed them.

        Such a thread may be the last to hold a semaphore; cut short by the end of the process while it lets go, it
        would make the resource tracker complain.
        """
        if self.batches is None:
            return
        queues = self.batches._index_queues
        if all(worker.is_alive() for worker in self.workers):
            self.batches._shutdown_workers()
        self.kill()
        for queue in queues:
            if queue._thread is not None:
                queue._thread.join(1.0)

    def kill(self) -> None:
        """Kill workers that still run. Called again while the interpreter ends, it touches nothing."""
        if self.batches is None:
            return  # modules may be gone by now, atexit too
        self.batches._shutdown = True  # torch must not ask the dead
        for worker in self.workers:
            if worker.is_alive():
                worker.kill()
        self.workers, self.batches = [], None
        atexit.unregister(self.kill)


def _next(batches: Iterator[Batch | DataError]) -> Batch:
    problem = f"no answer for {WORKER_TIMEOUT_S:.0f} s"
    for _ in range(round(WORKER_TIMEOUT_S / POLL_S)):
        try:
            batch = next(batches)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
            if problem.startswith("DataLoader timed out"):  # all workers are alive: the loader may be asked again
                continue
            if not problem.startswith("DataLoader worker"):
                raise
            break
        except (EOFError, ConnectionError, FileNotFoundError):  # died between announcing a batch and handing it over
            problem = "it ended while it handed over a batch"
            break
        if isinstance(batch, DataError):
            raise batch
        return batch
    raise DataError(
        f"a data worker died or hangs ({problem}); the usual cause is memory: lower data.workers or data.prefetch, "
        "or give /dev/shm more room"
    )


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _hook
    # torch's own watch looks at the forkserver, which lives as long as its workers: they would wait for each other
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say nothing where the parent hung up while a tensor was on its way, as it does at Ctrl-C."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _unchanged(batch: Any) -> Any:
    return batch
