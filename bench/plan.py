"""The plan of millions of samples: speed, padding, memory and resuming, beside next-fit packing.

    .venv/bin/python bench/plan.py [samples]

Indexes of a long-tailed mix are written to disk: 45 % text, 30 % images, 15 % audio, 10 % videos, each a source with
five languages and shards of its own, mean 1,300 tokens. One million samples are real; of more, their index files are
linked under further names, so that any number fits on a disk. Planned are a tenth of the samples and all of them,
without a mixture and with one that weighs sources and evens out languages, at 8,192 and 32,768 tokens: draw, size,
shuffle, pack, and deal to 64 ranks. The peer is next-fit in random order, as dynamic batching by token count does it.
Time is CPU time of one thread; a new run's one look at the whole corpus is timed apart.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report  # noqa: E402
from data.corpus import Corpus  # noqa: E402
from data.costs import AUDIO, IMAGE, KINDS, VIDEO, Sizing  # noqa: E402
from data.mixture import Mixture  # noqa: E402
from data.plan import Plan, PlanSettings  # noqa: E402
from data.shard_index import index_path, save_index  # noqa: E402
from data.vision import Patching  # noqa: E402

NUM_RANKS = 64
SHARD_SAMPLES = 10_000
REAL_SHARDS = 100
SOURCES = ("text", "image", "speech", "video")
LANGUAGES = ("en", "zh", "de", "hi", "sw")
MIXTURE = Mixture({"text": 40, "image": 25, "speech": 20, "video": 15}, language_temperature=3.0)
PLANNED = 3_000_000  # samples that are planned for the speed; memory is watched over all of them
GOAL_SPEED = 1_000_000
GOAL_WASTE = 0.005
GOAL_SEEK = 1.0


class Layout:
    """13 tokens for 100 frames, as the model's within one token, and its patches; the model is not imported."""

    patching = Patching()
    audio_window = 800

    def num_audio_tokens(self, frames: np.ndarray) -> np.ndarray:
        """Placeholders of clips."""
        return -(-frames * 13 // 100)


def main(num_samples: int) -> None:
    """Plan a tenth, and the whole; print both."""
    with tempfile.TemporaryDirectory() as folder:
        whole = write_corpus(Path(folder), num_samples)
        shards = len(whole.paths) // 10
        tenth = Corpus(whole.paths[:shards], whole.names[:shards], whole.offsets[: shards + 1], "tenth")
        print(
            f"{'samples':>12}{'tokens':>8}{'mixture':>9}{'look s':>8}{'planned':>11}{'samples/s':>12}{'waste':>8}"
            f"{'next-fit':>9}{'off':>8}{'MB':>6}"
        )
        rows = [
            show(plan_part(corpus, length, mixture))
            for length in (8_192, 32_768)
            for mixture in (None, MIXTURE)
            for corpus in (tenth, whole)
        ]
        seek = seek_far(whole)
    slowest = min(row["speed"] for row in rows[1::2])
    waste = max(row["waste"] for row in rows)
    grown = max(large["mb"] - small["mb"] for small, large in zip(rows[::2], rows[1::2], strict=True))
    goals = {
        f"slowest {slowest:,.0f} samples/s, goal {GOAL_SPEED:,}": slowest >= GOAL_SPEED,
        f"most waste {waste:.3%}, goal below {GOAL_WASTE:.1%}": waste < GOAL_WASTE,
        f"memory {grown:+.1f} MB from a tenth to the whole, goal below 64": grown < 64,
        f"step 1,000,000 after seek {seek:.3f} s, goal below {GOAL_SEEK:.0f}": seek < GOAL_SEEK,
        f"realised shares off by {max(row['off'] for row in rows):.4%}, goal below 0.1 %": all(
            row["off"] < 0.001 for row in rows
        ),
    }
    for line, met in goals.items():
        print(f"{line}  met: {str(met).lower()}")
    report(
        "plan",
        ours=waste,
        peer=min(row["next_fit"] for row in rows),
        ratio=min(row["next_fit"] for row in rows) / waste,
        unit=f"share of padding; {num_samples:,} samples at {slowest:,.0f} a second",
        goal=GOAL_WASTE,
        met=all(goals.values()),
    )


def show(row: dict) -> dict:
    """Print one line of the table."""
    print(
        f"{row['samples']:>12,}{row['length']:>8,}{row['mixture']:>9}{row['look']:>8.1f}{row['planned']:>11,}"
        f"{row['speed']:>12,.0f}{row['waste']:>8.3%}{row['next_fit']:>9.2%}{row['off']:>8.4%}{row['mb']:>6.0f}",
        flush=True,
    )
    return row


def plan_part(corpus: Corpus, length: int, mixture: Mixture | None) -> dict:
    """Plan an epoch or PLANNED samples, whichever is less, and what it costs."""
    settings = PlanSettings(length, 8_192 * 256 // length, too_long="drop", mixture=mixture)
    before = held_mb()
    plan = Plan(corpus, settings, seed=0, sizing=Sizing(Layout()))  # type: ignore[arg-type]
    start = time.process_time()
    plan.dropped  # noqa: B018
    look = time.process_time() - start
    samples = step = 0
    most, start = 0.0, time.process_time()
    while samples < min(corpus.num_samples, PLANNED):
        for step in range(step, step + 32):  # noqa: B020
            plan.share(step, 3, NUM_RANKS)
        step += 1
        samples = sum(plan.cursor(step).state.positions)
        most = max(most, held_mb())
    seconds = time.process_time() - start
    most = max(most, held_mb())
    realised = Counter(plan.realised(step))
    off = 0.0
    if mixture:
        for source, weight in mixture.weights.items():
            given = sum(count for name, count in realised.items() if name[0] == source)
            off = max(off, abs(given / realised.total() - weight / sum(mixture.weights.values())))
    return {
        "samples": corpus.num_samples,
        "length": length,
        "mixture": "yes" if mixture else "no",
        "look": look,
        "planned": samples,
        "speed": samples / seconds,
        "waste": 1 - realised.total() / (step * settings.sequences_per_step * length),
        "next_fit": next_fit_waste(plan, length),
        "off": off,
        "mb": most - before,
    }


def seek_far(corpus: Corpus) -> float:
    """CPU seconds from opening a plan to the packs of step one million, with a cursor."""
    settings = PlanSettings(8_192, 256, too_long="drop", mixture=MIXTURE)
    plan = Plan(corpus, settings, seed=0, sizing=Sizing(Layout()))  # type: ignore[arg-type]
    cursor = plan.cursor(20)
    # as if a million steps had passed: the state is positions and tokens, whatever they are
    far = 1_000_000 * 256 // max(cursor.first_pack, 1)
    state = cursor.state
    scaled = {name: tuple(value * far for value in getattr(state, name)) for name in ("positions", "tokens", "targets")}
    fields = {
        "plan": cursor.plan,
        "first_pack": 1_000_000 * 256 - 100,
        "state": {"window": state.window * far, **scaled},
        "tally": vars(cursor.tally),
    }
    resumed = Plan(corpus, settings, seed=0, sizing=Sizing(Layout()))  # type: ignore[arg-type]
    start = time.process_time()  # making the plan reads the header of every index: shards, not samples, count there
    resumed.seek(fields)
    assert len(resumed.step(1_000_000)) == 256
    return time.process_time() - start


def next_fit_waste(plan: Plan, length: int) -> float:
    """Padding where packs are closed by the first sample that does not fit, in the plan's mix in random order."""
    lengths = np.concatenate([pack.tokens for step in range(8) for pack in plan.step(step)])
    shuffled = np.random.default_rng(0).permutation(lengths)
    ends = np.cumsum(shuffled).tolist()
    packs = first = filled = 0
    while first < len(ends):
        first = bisect_right(ends, filled + length, first)
        filled = ends[first - 1]
        packs += 1
    return 1 - ends[-1] / (packs * length)


def write_corpus(folder: Path, num_samples: int) -> Corpus:
    """Indexes of shards that do not exist: a plan never opens one."""
    paths = [folder / f"{number:06d}.tar" for number in range(num_samples // SHARD_SAMPLES)]
    kinds = np.repeat(np.arange(4), [45, 30, 15, 10])
    for number, path in enumerate(paths):
        if number < REAL_SHARDS:
            # neighbours are of one source only within 20 shards, so that a tenth of them is a fair part
            write_index(path, np.random.default_rng(number), int(kinds[number * 37 % 100]))
        else:
            os.link(index_path(paths[number % REAL_SHARDS]), index_path(path))
    offsets = np.arange(len(paths) + 1, dtype=np.int64) * SHARD_SAMPLES
    return Corpus(paths, [path.name for path in paths], offsets, "whole")


def write_index(path: Path, rng: np.random.Generator, source: int) -> None:
    """An index of one source: a medium in each sample but for text."""
    count = SHARD_SAMPLES
    text = np.exp(rng.normal(np.log((500, 60, 40, 90)[source]), 0.8, count)).clip(4, 5_000).astype(np.int64)
    seconds = np.exp(rng.normal(np.log(50 if source == 2 else 20), 0.8, count)).clip(0.5, 600 if source == 2 else 60)
    sides = np.exp(rng.normal(np.log(900 if source == 1 else 500), 0.35, (2, count))).clip(64, 1_600).astype(np.int64)
    media = count if source else 0
    zeros, ends = np.zeros(count, np.int64), np.arange(count + 1)
    kind = {0: 0, 1: IMAGE, 2: AUDIO, 3: VIDEO}[source]
    seen, films = (sides if source in (1, 3) else sides * 0)[:, :media], source == 3
    columns = {
        "key_offsets": ends * 8,
        "key_bytes": np.frombuffer(b"".join(f"{row:08d}".encode() for row in range(count)), np.uint8),
        "member_offsets": ends,
        "member_start": zeros + 512,
        "member_size": zeros,
        "member_crc": zeros,
        "member_extension": zeros,
        "media_offsets": ends * (media > 0),
        "media_kind": np.full(media, kind),
        "media_samples": (seconds * 16_000 * (source == 2))[:media],
        "media_height": seen[0],
        "media_width": seen[1],
        "media_frames": (seconds * 25 * films)[:media],
        "media_seconds": (seconds * films)[:media],
        "media_text": zeros[:media],
        "text_tokens": text,
        "document": zeros,
        "language": rng.choice(len(LANGUAGES), count, p=[0.6, 0.2, 0.1, 0.06, 0.04]),
        "source": zeros,
    }
    groups = np.bincount(columns["language"], minlength=len(LANGUAGES))
    about = {
        "tar_size": 1 << 40,
        "header_digest": "",
        "tokenizer": "",
        "extensions": ["json"],
        "languages": list(LANGUAGES),
        "sources": [SOURCES[source]],
        "left_out": [],
        "groups": [[0, language, int(samples)] for language, samples in enumerate(groups)],
        "max_text_tokens": int(text.max()),
        "max_samples": int(columns["media_samples"].max(initial=0)),
        "max_media": [int(media > 0 and kind == each) for each in range(len(KINDS))],
    }
    save_index(path, about, columns)


def held_mb() -> float:
    """Memory of this process that is its own, in MB: pages mapped from the index files do not count."""
    fields = Path("/proc/self/status").read_text().split("RssAnon:")
    return int(fields[1].split()[0]) / 1024


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)
