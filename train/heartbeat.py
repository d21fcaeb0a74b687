"""Where each rank is: written by a thread of its own, read by whoever asks which rank hangs.

    loop, engines: beat("forward") --an assignment--> Heart --thread, every few seconds--> RUN/heartbeats/rank00000.json
    no beat for too long --every rank's file (train/hang.py)--> who is behind, in one line; stacks; exit status 70

The file: {"rank", "host", "pid", "step", "part", "media", "at": unix seconds of the last beat} for people and for
schedulers, and for the other ranks "launch", "beats" (in this step), "still" (seconds without a beat while this process
ran), "slow", "alive" (counts up while the thread runs) and "where" (the line that it stands in). It is replaced whole.
A file that cannot be written is left as it is: heartbeats never stop a run.

A rank whose next rank hangs stops too, in the next collective: it is enough to watch oneself, and to read the others'
files once that has happened. Time in which this process did not run, stopped or suspended, does not count.

Cost: an assignment of a few numbers a beat, some ten of them a step; a file of 300 bytes every one to five seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from data.types import Batch
from train import hang
from train.engines import Engine
from train.journal import Journal

FOLDER = "heartbeats"
STDERR = 2  # as a file that needs no interpreter
STATUS = 70  # of a process that leaves because some rank hangs: EX_SOFTWARE


class Beat(NamedTuple):
    """The last sign of progress of the training thread."""

    count: int
    in_step: int  # beats since the step began: the same at the same place on every rank
    step: int
    part: str
    media: str
    slow: bool
    at: float  # time.monotonic()


class Heart:
    """Notes progress, and watches it."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world: int,
        launch: str,
        hang_s: float,
        slow: float,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """Start the thread. `launch` is the same on all ranks and new in every launch; `hang_s` 0: only write."""
        self.folder, self.rank, self.world, self.launch = folder, rank, world, launch
        self.hang_s, self.slow, self._leave = hang_s, slow, leave
        self.host = socket.gethostname()
        self.period_s = min(5.0, hang_s / 40) if hang_s else 5.0
        self._beat = Beat(0, 0, 0, "start", "", True, time.monotonic())
        self._trainer = threading.get_ident()
        self._still, self._alive, self._seen = 0.0, 0, 0
        self._others: dict[int, hang.Pulse] = {}
        self._write({})  # before anything can hang
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, part: str, step: int | None = None, *, media: str | None = None, slow: bool | None = None) -> None:
        """The training thread begins a part of a step; what is not given stays, but `slow` where a step is given."""
        last = self._beat
        self._beat = Beat(
            last.count + 1,
            last.in_step + 1 if step in (None, last.step) else 0,
            last.step if step is None else step,
            part,
            last.media if media is None else media,
            (last.slow if step is None else False) if slow is None else slow,
            time.monotonic(),
        )

    def begin(self, step: int, microbatches: Sequence[Batch], slow: bool = False) -> None:
        """A step begins, with its data; `slow` where it may take longer than others."""
        self.beat("forward", step, media=media_of(microbatches), slow=slow)

    def close(self) -> None:
        """End the thread; the file stays, and says so."""
        self._end.set()
        self._thread.join()
        self.beat("end")
        self._write({})

    def _watch(self) -> None:
        then = time.monotonic()
        while not self._end.wait(self.period_s):
            now = time.monotonic()
            elapsed, then = min(now - then, 2 * self.period_s), now
            beat, self._alive = self._beat, self._alive + 1
            self._still = self._still + elapsed if beat.count == self._seen else 0.0
            self._seen = beat.count
            if not self.hang_s:
                self._write({})
                continue
            # for when this thread cannot run either: a call into C holds the interpreter's lock
            faulthandler.dump_traceback_later(self.hang_s, file=STDERR)
            suspicious = self._still > self.hang_s / 2
            self._write({"where": hang.where(self._trainer)} if suspicious else {})
            if not suspicious:
                self._others.clear()
                continue
            hang.read(self.folder, self.launch, self.world, self._others, self.period_s, self.hang_s)
            said = hang.verdict(self._others, self.rank, self.world, self.hang_s, self.slow)
            if said or self._sign.exists():  # another rank has given up
                self._give_up(said)
        if self.hang_s:
            faulthandler.cancel_dump_traceback_later()

    def _write(self, more: Mapping[str, Any]) -> None:
        beat, path = self._beat, self.folder / f"rank{self.rank:05d}.json"
        line = {
            "rank": self.rank,
            "host": self.host,
            "pid": os.getpid(),
            "step": beat.step,
            "part": beat.part,
            "media": beat.media,
            "at": round(time.time() - (time.monotonic() - beat.at), 3),
            "launch": self.launch,
            "beats": beat.in_step,
            "still": round(self._still, 3),
            "slow": beat.slow,
            "alive": self._alive,
            **more,
        }
        part = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(exist_ok=True)
            part.write_text(json.dumps(line) + "\n")
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()

    @property
    def _sign(self) -> Path:
        return self.folder / f"hang-{self.launch}"

    def _give_up(self, said: hang.Verdict | None) -> None:
        """Say who is behind, dump the stacks, leave. The first rank to find out speaks for all."""
        if said and self._speaks():
            print(f"error: {said.text}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                journal = Journal(self.folder.parent / "metrics.jsonl", lambda text: None)
                journal.write({"step": said.step, "event": "hang", "text": said.text, "ranks": said.behind})
        atexit.register(self._leave, STATUS)  # should the training thread end first, as a peer has left
        print(f"rank {self.rank}: stacks of all threads", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        self._write({"where": hang.where(self._trainer)})
        time.sleep(10 * self.period_s)  # or the others would end of its absence, before they said where they stand
        self._leave(STATUS)

    def _speaks(self) -> bool:
        try:
            os.close(os.open(self._sign, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass  # twice is better than never
        return True


def beating(engine: Engine, heart: Heart) -> Engine:
    """The engine, its evaluation a sign of progress."""
    return cast(Engine, _Beating(engine, heart))


class _Beating:
    """An engine whose evaluation is a sign of progress."""

    def __init__(self, engine: Engine, heart: Heart) -> None:
        self._engine, self._heart = engine, heart

    def __getattr__(self, name: str) -> Any:
        """What is the engine's own."""
        return getattr(self._engine, name)

    def eval_step(self, *arguments: Any) -> Any:
        """See train.engines.Engine."""
        self._heart.beat("evaluate")
        return self._engine.eval_step(*arguments)

    def generate(self, *arguments: Any) -> Any:
        """See train.engines.Engine."""
        self._heart.beat("evaluate")
        return self._engine.generate(*arguments)

    def losses(self, *arguments: Any) -> Any:
        """See train.engines.Engine."""
        self._heart.beat("evaluate")
        return self._engine.losses(*arguments)

    def likelihoods(self, *arguments: Any) -> Any:
        """See train.engines.Engine."""
        self._heart.beat("evaluate")
        return self._engine.likelihoods(*arguments)


def media_of(batches: Sequence[Batch]) -> str:
    """What media a rank's batches hold, for instance `audio, video`."""
    grids = [grid for batch in batches for grid in batch.grids]
    found = {
        "audio": any(batch.mel_lengths for batch in batches),
        "image": any(frames == 1 for frames, *_ in grids),
        "video": any(frames > 1 for frames, *_ in grids),
        "speech": any(batch.speech is not None for batch in batches),
    }
    names = [name for name, there in found.items() if there]
    if not names:
        return "text" if any(batch.doc_lengths for batch in batches) else "nothing"
    return ", ".join(names)
