"""The demo's corpus: shapes, sounds and films, asked about and told in text and speech of 14 languages, as shards.

    python -m data.demo OUT [--samples 20000] [--heldout 20] [--languages en,de,...] [--tasks choice,match,...]
                            [--speech] [--seed 0] [--workers 1] [--vocab-size 4096]

    settings --demo_plan: tasks, demo_studio: scenes, sentences, voices--> samples without media
      --demo_render: numpy, espeak-ng, Pillow, FFmpeg, in `workers` processes--> OUT/{train,voices,sentences,scenes}
    texts of train --> OUT/tokenizer

`--tasks transcription` alone is the corpus of the recipe "transcribe": counted animals in five languages, 640 tokens.
The recipe "demo" reads the tasks of data.demo_small (launch/tour.py).
`--speech` adds tasks whose answers are spoken, for the Talker; `--tasks reading` is a text-to-speech corpus alone.
`train` has no voice of `voices`, no statement of `sentences` and no picture, film or sequence of sounds of `scenes`.
A corpus appears under its name only when it is whole, and one that is there already is kept. The same settings give
the same bytes with the same libraries, whatever `workers` is. Cost: 12 ms of a core and 24 KB of disk a sample.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from data.chat import rendered_texts
from data.demo_plan import Planned, Settings, plan
from data.demo_render import render
from data.demo_small import KNOWN_TASKS, SMALL
from data.demo_spoken import SPOKEN
from data.demo_tasks import TASKS
from data.demo_words import LANGUAGES
from data.errors import DataError
from data.espeak import Synthesizer
from data.interrupts import deaf_workers, uninterrupted
from data.sample import SampleRecord
from data.shards import write_shards
from data.terminal import ended, say
from data.tokenizer import train_tokenizer

TRANSCRIPTION = Settings(4000, languages=("en", "de", "fr", "ru", "zh"), vocab_size=640, tasks=("transcription",))
CHUNK = 64  # samples that one Synthesizer speaks, since what it says depends on what it said before


def make_corpus(folder: Path, settings: Settings, workers: int = 1, quiet: bool = False) -> dict[str, int]:
    """Plan, make, write and index the corpus in `folder`; returns the samples of each split.

    Does nothing where the folder already holds it. It appears under its name only when whole.
    """
    stamp = folder / "corpus.json"
    if stamp.is_file():
        made = json.loads(stamp.read_text(encoding="utf-8"))
        if made.get("settings") == json.loads(json.dumps(asdict(settings))):
            return made["samples"]
    settings.check()
    if folder.exists() or folder.is_symlink():
        raise DataError(f"{folder}: exists and holds something else; delete it or choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts = {}
    try:
        partial.mkdir(parents=True)  # where it cannot be written, that is known before anything is made
        splits = plan(settings)
        texts = chain.from_iterable(rendered_texts(planned.record) for planned in splits["train"])
        tokenizer = train_tokenizer(texts, settings.vocab_size)
        with tqdm(total=sum(map(len, splits.values())), unit=" samples", disable=quiet) as bar:
            for split, planned in splits.items():
                bar.set_description(split)
                with closing(_rendered(planned, settings.seed, workers, bar)) as records:
                    report = write_shards(records, partial / split, tokenizer, workers=workers)
                if report.left_out:
                    raise DataError(f"the demo made an unusable sample: {report.left_out[0]}")
                counts[split] = report.num_samples
        tokenizer.save(partial / "tokenizer")
        content = {"settings": asdict(settings), "samples": counts}
        (partial / stamp.name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def _rendered(planned: Sequence[Planned], seed: int, workers: int, bar: tqdm) -> Generator[SampleRecord]:
    """The samples with their media, in order, a few chunks ahead of who takes them."""
    chunks = [planned[start : start + CHUNK] for start in range(0, len(planned), CHUNK)]
    for records in _in_turn(chunks, seed, workers):
        for record in records:
            bar.update()
            yield record


def _in_turn(chunks: Sequence[Sequence[Planned]], seed: int, workers: int) -> Iterator[list[SampleRecord]]:
    if workers <= 1:
        yield from (_render_chunk(chunk, seed) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers, deaf_workers("data.demo_render")) as pool:
        waiting = iter(chunks)
        ahead = deque(pool.submit(_render_chunk, chunk, seed) for chunk in islice(waiting, 2 * workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(_render_chunk, chunk, seed) for chunk in islice(waiting, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _render_chunk(chunk: Sequence[Planned], seed: int) -> list[SampleRecord]:
    made = []
    with Synthesizer(seed) as espeak:
        for planned in chunk:
            with uninterrupted():
                media = {name: render(medium, name, espeak) for name, medium in planned.media.items()}
            made.append(replace(planned.record, media=media))
    return made


def parse_settings(options: argparse.Namespace) -> Settings:
    """Settings of a command line; what it leaves out depends on whether transcription alone is asked for."""
    tasks = tuple(options.tasks.split(","))
    tasks += tuple(task for task in SPOKEN if options.speech and task not in tasks)
    default = TRANSCRIPTION if tasks == TRANSCRIPTION.tasks else Settings()
    return Settings(
        samples=default.samples if options.samples is None else options.samples,
        heldout=options.heldout,
        languages=tuple(options.languages.split(",")) if options.languages else default.languages,
        seed=options.seed,
        vocab_size=default.vocab_size if options.vocab_size is None else options.vocab_size,
        tasks=tasks,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 2 after one line on what is wrong, 130 when interrupted."""
    parser = argparse.ArgumentParser("python -m data.demo", description="Make the demo's corpus.")
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--samples", type=int, help="training samples: 20000, of transcription alone 4000")
    parser.add_argument("--heldout", type=int, default=Settings.heldout, help="samples a language in each held-out set")
    parser.add_argument("--languages", help=f"of {','.join(LANGUAGES)}; all, of transcription alone the first five")
    parser.add_argument(
        "--tasks", default=",".join(TASKS), help=f"of {','.join(KNOWN_TASKS)}; all but {','.join(SPOKEN | SMALL)}"
    )
    parser.add_argument("--speech", action="store_true", help=f"also {' and '.join(SPOKEN)}, whose answers are spoken")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--workers", type=int, default=1, help="processes; they change no result")
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer: 4096, of transcription alone 640")
    options = parser.parse_args(arguments)
    return ended(lambda: _make_and_tell(options), "interrupted: nothing was written")


def _make_and_tell(options: argparse.Namespace) -> None:
    settings = parse_settings(options)
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: must be at least 1")
    counts = make_corpus(options.folder, settings, options.workers)
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    say(f"{options.folder}: " + ", ".join(f"{count} samples in {split}" for split, count in counts.items()))
    say(f"{len(settings.languages)} languages, {len(settings.tasks)} tasks, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
