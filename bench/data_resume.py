"""How long until the first sample after a resume: part of bench/data.py, and the fresh process that it times.

    corpus of a million samples --plan walked once--> cursor, as a checkpoint keeps it --JSON--> Place
    Place --Corpus.open, Plan.seek, Plan.step, Reader.batch--> first pack, decoded

Run as a program, with the file of a place and a number of workers, it does what a resumed run does, from the start of
the interpreter, and prints the keys of the first batch.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.corpus import Corpus
from data.loader import stream
from data.plan import Plan, PlanSettings
from data.reader import Reader, open_sample
from data.tokenizer import load_tokenizer
from train.layout import ModelLayout


@dataclass(frozen=True)
class Place:
    """A step of a run with one sequence a step, and what finds it."""

    shards: str  # a glob
    tokenizer: str  # its folder
    sequence_length: int
    step: int
    cursor: dict[str, Any] = field(default_factory=dict)

    def open(self) -> tuple[Plan, Reader]:
        """Everything from the files up; the plan knows nothing of its place yet."""
        tokenizer = load_tokenizer(self.tokenizer)
        corpus = Corpus.open([self.shards], tokenizer.fingerprint)
        reader = Reader(corpus, tokenizer, seed=0, layout=ModelLayout(), sequence_length=self.sequence_length)
        return Plan(corpus, PlanSettings(self.sequence_length, 1), seed=0, sizing=reader.sizing), reader


@dataclass(frozen=True)
class Alone:
    """The only data rank."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Resumed:
    """Seconds until the first batch."""

    what: str
    cpu: float
    wall: float


def resumes(place: Place, folder: Path) -> tuple[Place, list[Resumed]]:
    """The place with its cursor, and the ways to get there: without it, with it, and in a fresh process."""
    plan, reader = place.open()
    reader.batch(Plan(reader.corpus, plan.settings, seed=1, sizing=plan.sizing).step(0)[0])  # warms what is made once
    clock = Clock()
    pack = plan.step(place.step)[0]
    keys = reader.batch(pack).keys
    found = [clock.resumed("in a process, files open, no cursor: all windows before it are packed")]
    place = Place(**asdict(place) | {"cursor": json.loads(json.dumps(asdict(plan.cursor(place.step))))})

    clock = Clock()
    plan, reader = place.open()
    found.append(clock.resumed(f"in a process, {len(reader.corpus.paths):,} shards opened"))
    plan.seek(place.cursor)
    pack = plan.step(place.step)[0]
    open_sample(reader.corpus, int(pack.samples[0]), reader.limits.max_bytes)
    found.append(clock.resumed("  ... and the cursor sought: first sample"))
    assert reader.batch(pack).keys == keys
    found.append(clock.resumed(f"  ... and the first batch of {len(keys)} samples decoded"))

    path = folder / "place.json"
    path.write_text(json.dumps(asdict(place)))
    for workers in (0, 2):
        found.append(_fresh(path, workers, keys))
    return place, found


def _fresh(path: Path, workers: int, keys: tuple[str, ...]) -> Resumed:
    clock = Clock()
    with subprocess.Popen([sys.executable, __file__, str(path), str(workers)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        wall = clock.resumed("").wall
    if process.returncode or tuple(json.loads(line)) != keys:
        raise SystemExit(f"the fresh process ended with {process.returncode} and said {line!r}")
    return Resumed(f"a fresh process with {workers} workers, from the interpreter's start", clock.resumed("").cpu, wall)


class Clock:
    """Wall time and CPU time of this process and of those that it has waited for."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), _cpu()

    def resumed(self, what: str) -> Resumed:
        """Since it was made."""
        return Resumed(what, _cpu() - self.cpu, time.perf_counter() - self.wall)


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main(path: str, workers: int) -> None:
    """What a resumed run does until its first batch."""
    place = Place(**json.loads(Path(path).read_text()))
    plan, reader = place.open()
    plan.seek(place.cursor)
    batches = stream(plan, reader, Alone(), place.step, place.step + 8, workers)
    _, (batch,) = next(batches)
    print(json.dumps(batch.keys), flush=True)
    batches.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
