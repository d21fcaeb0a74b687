"""Published evaluation sets, as they lie on disk, turned into shards that `launch.evaluate` asks and grades.

    python -m data.convert_sets NAME FOLDER OUT --tokenizer FOLDER [--split test] [--languages en,zh]
    python -m data.convert_sets list

    FOLDER --data.benchmarks: opened, rows made into questions--> items --data.convert_run--> OUT/SPLIT/shard-000000.tar

Nothing is fetched. What is missing or unreadable is left out, counted and named; the number of samples stands beside
the published one. Media keep their bytes. Cost and safety are those of data.convert: one decode of every medium.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from data.benchmark import Benchmark, Wanted, sources
from data.benchmarks import BENCHMARKS, benchmark_named
from data.convert_report import Summary
from data.convert_run import convert
from data.errors import DataError
from data.sources import Common, MediaFolder
from data.terminal import ended, say
from data.tokenizer import load_tokenizer

_NOT_IN_PLAN = ("out", "workers", "dry_run", "tokenizer")  # options that do not shape the result, or are told otherwise


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line as a namespace; argparse itself exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        "python -m data.convert_sets", description="Turn a published evaluation set on disk into shards."
    )
    parser.add_argument("name", help="of the set; the name `list` prints all, with what is expected on disk")
    parser.add_argument("folder", nargs="?", type=Path, help="where its files lie, as they are published")
    parser.add_argument("out", nargs="?", type=Path, help="folder to write, or to go on with")
    parser.add_argument("--tokenizer", type=Path, help="folder with the tokenizer.json of the model under test")
    parser.add_argument("--split", default="", help="comma-separated; else those that are usually reported")
    parser.add_argument("--languages", default="", help="comma-separated codes or folders; else all")
    parser.add_argument("--instruction", help="what is asked beside the medium or the choices; else what suits the set")
    parser.add_argument("--shots", type=int, default=5, help="of mmlu: answered questions before the one that is asked")
    parser.add_argument("--sound", action=argparse.BooleanOptionalAction, help="films are heard; else as the set says")
    parser.add_argument("--allow-outside", action="store_true", help="media may be links that leave the folder")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="rows of a job, samples of a shard")
    parser.add_argument("--shard-mb", type=int, default=1024, help="a shard ends with the sample that reaches it")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--dry-run", action="store_true", help="read and check everything, write nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one line on what is wrong, or 130 after Ctrl-C."""
    options = parse_options(arguments)
    if options.name == "list":
        say("\n".join(f"{each.name:15} suite={each.suite:11} {each.layout}" for each in BENCHMARKS.values()))
        return 0
    return ended(partial(_convert_and_tell, options), "\nstopped: the same command goes on where it stopped")


def _checked(options: argparse.Namespace) -> Benchmark:
    """The set that is asked for. Raises DataError for options that do not fit."""
    benchmark = benchmark_named(options.name)
    if options.folder is None or options.out is None:
        raise DataError(f"{options.name}: give the folder where it lies and the folder to write")
    if options.tokenizer is None:
        raise DataError("--tokenizer FOLDER is missing: that of the model under test, such as RUN/tokenizer")
    if not options.folder.is_dir():
        raise DataError(f"{options.folder}: no such folder; expected: {benchmark.layout}")
    if options.out.exists() and not options.out.is_dir():
        raise DataError(f"{options.out}: is a file; name a folder to write to")
    if options.languages and not benchmark.languages:
        raise DataError(f"--languages: {benchmark.name} has no folders of languages")
    if options.sound is not None and not benchmark.layout.count(".mp4"):
        raise DataError(f"--sound: {benchmark.name} has no films")
    for name, least in (("shots", 0), ("samples_per_shard", 1), ("shard_mb", 1), ("workers", 1)):
        if getattr(options, name) < least:
            raise DataError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be {least} or more")
    return benchmark


def _convert_and_tell(options: argparse.Namespace) -> None:
    benchmark = _checked(options)
    tokenizer = load_tokenizer(options.tokenizer)
    folder = options.folder.resolve()
    splits, languages = ([part for part in text.split(",") if part] for text in (options.split, options.languages))
    wanted = Wanted(folder, tuple(splits), tuple(languages), options.instruction, options.shots)
    sound = benchmark.sound if options.sound is None else options.sound
    common = Common(
        MediaFolder(folder, options.allow_outside), benchmark.name, "" if benchmark.languages else "en", sound=sound
    )
    summary = convert(
        sources(benchmark, wanted, common),
        options.out,
        _plan(options) | {"tokenizer": tokenizer.fingerprint},
        tokenizer=tokenizer,
        vocab_size=0,
        samples_per_shard=options.samples_per_shard,
        max_bytes=options.shard_mb * 1_000_000,
        workers=options.workers,
        dry=options.dry_run,
    )
    say("\n".join([*summary.lines(), *beside(benchmark, summary), f"ask them with suite={benchmark.suite}"]))
    if not summary.total.samples:
        raise DataError(f"{options.folder}: nothing to convert; {summary.first_left_out()}")


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    """The options that shape the result, as they are kept in the journal."""
    chosen = {name: value for name, value in vars(options).items() if name not in _NOT_IN_PLAN}
    return chosen | {"kind": "benchmark", "folder": str(options.folder.resolve())}


def beside(benchmark: Benchmark, summary: Summary) -> list[str]:
    """A line for each split: how many samples there are, and how many are published."""
    lines = []
    for split, totals in summary.totals.items():
        published = benchmark.published.get(split)
        if published is None:
            lines.append(f"{split}: {totals.samples} samples; how many are published is not known here")
            continue
        known = f"{published} are published ({benchmark.told_by})"
        missing = published - totals.samples
        difference = (
            f": {missing} are missing" if missing > 0 else f": {-missing} are more than that" if missing else ""
        )
        lines.append(f"{split}: {totals.samples} samples; {known}{difference}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
