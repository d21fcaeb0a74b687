"""The run of a conversion: jobs dealt to processes, what they did noted and counted.

    sources --first pass--> jobs --those not in the journal--> worker processes --outcomes--> journal, progress, summary

Workers take one job after another, so the order of their work differs and its result does not. They end with their
parent, however that ends. Cost: that of the slowest of reading media, decoding them once for the index, and writing.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Container, Generator, Mapping, Sequence
from contextlib import closing
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.chat import rendered_texts
from data.convert_jobs import Job, Outcome, Work
from data.convert_journal import Journal
from data.convert_report import Summary
from data.errors import DataError
from data.interrupts import deaf_workers
from data.sources import Item, Source
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


def convert(
    sources: Mapping[str, Source],
    out: Path,
    options: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    samples_per_shard: int,
    max_bytes: int,
    workers: int,
    dry: bool,
) -> Summary:
    """Convert every split to OUT/split, or go on where an earlier run with the same `options` stopped.

    Raises DataError where nothing can be converted, or OUT belongs to another conversion.
    """
    jobs = [
        Job(name, number, span)
        for name, source in sources.items()
        for number, span in enumerate(source.spans(samples_per_shard))
    ]
    if not jobs:
        raise DataError("nothing to convert: the source is empty")
    summary = Summary(list(sources), [note for source in sources.values() for note in source.notes], dry)
    if dry:
        trained = tokenizer or _trained(sources, jobs, vocab_size)
        for outcome in _run(Work(sources, out, trained, samples_per_shard, max_bytes, dry), jobs, workers):
            summary.add(outcome)
        return summary
    plan = {"options": dict(options), "sources": {name: source.digest for name, source in sources.items()}}
    with closing(Journal(out, plan)) as journal:
        tokenizer = _kept_tokenizer(journal, tokenizer, sources, jobs, vocab_size)
        for name in sources:
            (out / name).mkdir(exist_ok=True)
        work = Work(sources, out, tokenizer, samples_per_shard, max_bytes)
        try:
            with closing(_run(work, jobs, workers, journal.done)) as outcomes:
                for outcome in outcomes:
                    journal.note(outcome)
        finally:
            journal.sweep()  # what processes left that were stopped
        for outcome in journal.outcomes():
            summary.add(outcome)
        if summary.total.samples:
            journal.finish()
        else:
            journal.abandon()
    return summary


def _trained(sources: Mapping[str, Source], jobs: Sequence[Job], vocab_size: int) -> Tokenizer:
    """A tokenizer trained on the texts of the training split."""
    split = "train" if "train" in sources else next(iter(sources))
    return train_tokenizer(_texts(sources[split], [job for job in jobs if job.split == split]), vocab_size)


def _kept_tokenizer(
    journal: Journal, given: Tokenizer | None, sources: Mapping[str, Source], jobs: Sequence[Job], vocab_size: int
) -> Tokenizer:
    """The tokenizer in OUT/tokenizer: the one given, or one trained when the conversion was begun."""
    folder = journal.out / "tokenizer"
    if journal.tokenizer:
        saved = load_tokenizer(folder)
        if saved.fingerprint != journal.tokenizer:
            raise DataError(f"{folder}: has changed since the conversion was begun; put it back")
        return saved
    tokenizer = given or _trained(sources, jobs, vocab_size)
    tokenizer.save(folder)
    journal.note_tokenizer(tokenizer.fingerprint)
    return tokenizer


def _texts(source: Source, jobs: Sequence[Job]) -> Generator[str]:
    """Every text of a split, without its media."""
    rows = sum(job.span.count for job in jobs)
    with tqdm(total=rows, unit=" rows", desc="texts", disable=None) as bar:
        for job in jobs:
            for _, item in source.read(job.span, media=False):
                if isinstance(item, Item):
                    yield from rendered_texts(item.record)
            bar.update(job.span.count)


def _run(work: Work, jobs: Sequence[Job], workers: int, done: Container[tuple[str, int]] = ()) -> Generator[Outcome]:
    """What became of each job that is not done."""
    waiting = [job for job in jobs if (job.split, job.number) not in done]
    rows = {(job.split, job.number): job.span.count for job in jobs}
    begun = sum(rows.values()) - sum(job.span.count for job in waiting)
    outcomes = _in_parallel(work, waiting, workers) if workers > 1 else (work.run(job) for job in waiting)
    with tqdm(total=sum(rows.values()), initial=begun, unit=" rows", desc="convert", disable=None) as bar:
        with closing(outcomes):
            for outcome in outcomes:
                yield outcome
                bar.update(rows[outcome.split, outcome.number])


def _in_parallel(work: Work, jobs: Sequence[Job], workers: int) -> Generator[Outcome]:
    """Outcomes as they come from `workers` processes, which end when this generator does."""
    context = deaf_workers("data.convert_jobs")
    processes, busy, waiting = [], [], iter(jobs)
    try:
        for job in itertools.islice(waiting, workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            busy.append(ours)
            ours.send(job)
        while busy:
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                answer = pipe.recv()
                if isinstance(answer, BaseException):
                    raise answer
                job = next(waiting, None)
                if job is None:
                    busy.remove(pipe)
                    pipe.close()
                else:
                    pipe.send(job)
                yield answer
    except (EOFError, ConnectionError):
        raise DataError(
            "a worker process ended in the middle of its work (out of memory?); the same command goes on where it "
            "stopped, give it fewer --workers"
        ) from None
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(work: Work, pipe: Connection) -> None:
    """A worker process: job after job, until the parent closes the pipe or ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = work.run(job)
        except DataError as error:
            answer = error
        except OSError as error:
            answer = DataError(str(error))
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
