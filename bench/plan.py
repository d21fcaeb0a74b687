"""The plan of 10 million samples: time, padding and memory, beside next-fit packing.

    .venv/bin/python bench/plan.py [samples]

An index of a long-tailed mix is written to disk (45 % text, 30 % image-like, 15 % audio, 10 % video-like; mean 1,300
tokens, up to 27,000), then one epoch is planned at 32,768 tokens: shuffle, pack, deal to 64 ranks.  The peer is
next-fit in random order, the scheme of dynamic batching by token count.  Met means: padding below 0.5 %, 10 million
samples in less than 20 CPU seconds of one thread, and no more memory for the whole than for a tenth, mapped files
aside.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from bisect import bisect_right
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report  # noqa: E402
from data.balance import deal  # noqa: E402
from data.corpus import Corpus  # noqa: E402
from data.plan import Plan, PlanSettings  # noqa: E402
from data.shard_index import ShardIndex, save_index  # noqa: E402

SEQUENCE_LENGTH = 32_768
SEQUENCES_PER_STEP = 256
NUM_RANKS = 64
SHARD_SAMPLES = 10_000
GOAL_SECONDS = 20.0
GOAL_WASTE = 0.005


def main(num_samples: int) -> None:
    """Plan a tenth, and the whole; print both."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder), num_samples)
        rows = []
        for part in (num_samples // 10, num_samples):
            shards = part // SHARD_SAMPLES
            some = Corpus(corpus.paths[:shards], corpus.names[:shards], corpus.offsets[: shards + 1], str(shards))
            rows.append(plan_epoch(some))
    print(f"{'samples':>12}{'CPU s':>8}{'samples/s':>12}{'waste':>9}{'next-fit':>9}{'steps':>8}{'MB grown':>10}")
    for row in rows:
        print(
            f"{row['samples']:>12,}{row['seconds']:>8.1f}{row['samples'] / row['seconds']:>12,.0f}"
            f"{row['waste']:>9.3%}{row['next_fit']:>9.2%}{row['steps']:>8,}{row['grown_mb']:>10.1f}"
        )
    whole = rows[-1]
    flat = whole["grown_mb"] <= rows[0]["grown_mb"] + 64
    print(f"memory beyond the mapped index is {'flat' if flat else 'NOT flat'} from a tenth to the whole")
    report(
        "plan",
        ours=whole["waste"],
        peer=whole["next_fit"],
        ratio=whole["next_fit"] / whole["waste"],
        unit=f"share of padding; planned {num_samples:,} samples in {whole['seconds']:.1f} CPU s of {GOAL_SECONDS:.0f}",
        goal=GOAL_WASTE,
        met=whole["seconds"] < GOAL_SECONDS and whole["waste"] < GOAL_WASTE and flat,
    )


def write_corpus(folder: Path, num_samples: int) -> Corpus:
    """Indexes of shards that do not exist: a plan never opens one."""
    paths = [folder / f"{number:06d}.tar" for number in range(num_samples // SHARD_SAMPLES)]
    for number, path in enumerate(paths):
        rng = np.random.default_rng(number)
        write_index(path, *draw_mix(rng, SHARD_SAMPLES))
    offsets = np.arange(len(paths) + 1, dtype=np.int64) * SHARD_SAMPLES
    return Corpus(paths, [path.name for path in paths], offsets, "benchmark")


def draw_mix(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens, and clips' samples (0 where a sample has none): audio is 13 tokens a second."""
    kind = rng.choice(4, count, p=[0.45, 0.30, 0.15, 0.10])
    text = np.exp(rng.normal(np.log(350), 0.8, count))
    image = rng.uniform(300, 1_500, count)
    video = np.exp(rng.normal(np.log(5_000), 0.75, count))
    tokens = np.clip(np.choose(kind, [text, image, np.full(count, 30.0), video]), 20, 27_000).astype(np.int32)
    seconds = np.clip(np.exp(rng.normal(np.log(40), 0.9, count)), 0.5, 1_800)
    return tokens, np.where(kind == 2, seconds * 16_000, 0).astype(np.int64)


def write_index(path: Path, tokens: np.ndarray, clips: np.ndarray) -> None:
    """An index with these costs and one member for each sample."""
    count = len(tokens)
    zeros, ends = np.zeros(count, np.int64), np.arange(count + 1)
    columns = {
        "key_offsets": ends * 8,
        "key_bytes": np.frombuffer(b"".join(f"{row:08d}".encode() for row in range(count)), np.uint8),
        "member_offsets": ends,
        "member_start": zeros + 512,
        "member_size": zeros,
        "member_crc": zeros,
        "member_extension": zeros,
        "clip_offsets": np.concatenate([[0], np.cumsum(clips > 0)]),
        "clip_samples": clips[clips > 0],
        "text_tokens": tokens,
        "language": zeros,
        "source": zeros,
    }
    about = {
        "tar_size": 1 << 40,
        "header_digest": "",
        "tokenizer": "",
        "extensions": ["json"],
        "languages": [""],
        "sources": [""],
        "left_out": [],
        "max_text_tokens": int(tokens.max()),
        "max_audio_samples": int(clips.max()),
        "max_clips": 1,
        "total_text_tokens": int(tokens.sum()),
        "total_audio_samples": int(clips.sum()),
    }
    save_index(path, about, columns)


def num_audio_tokens(frames: np.ndarray) -> np.ndarray:
    """13 tokens for 100 frames: the model's count within one token, without importing the model."""
    return -(-frames * 13 // 100)


def plan_epoch(corpus: Corpus) -> dict[str, float]:
    """Plan one epoch and what it costs."""
    before = held_mb()
    start = time.process_time()
    settings = PlanSettings(SEQUENCE_LENGTH, SEQUENCES_PER_STEP)
    plan = Plan(corpus, settings, seed=0, num_audio_tokens=num_audio_tokens)
    tokens = packs = step = most = 0
    while (this := plan.step(step))[-1].epoch == 0:
        assert sum(map(len, deal([pack.work for pack in this], NUM_RANKS))) == SEQUENCES_PER_STEP
        packs += len(this)
        tokens += sum(int(pack.tokens.sum()) for pack in this)
        step += 1
        if step % 50 == 0:
            most = max(most, held_mb())
    seconds = time.process_time() - start
    return {
        "samples": corpus.num_samples,
        "seconds": seconds,
        "steps": step,
        "waste": 1 - tokens / (packs * SEQUENCE_LENGTH),
        "next_fit": next_fit_waste(corpus),
        "grown_mb": max(most, held_mb()) - before,
    }


def next_fit_waste(corpus: Corpus, shards: int = 20) -> float:
    """Padding where packs are closed by the first sample that does not fit, in random order."""
    lengths = []
    for path in corpus.paths[:shards]:
        text, clips_of, clips = ShardIndex.open(path).costs(0, SHARD_SAMPLES)
        text[clips_of > 0] += num_audio_tokens(clips // 160)
        lengths.append(text)
    shuffled = np.random.default_rng(0).permutation(np.concatenate(lengths))
    ends = np.cumsum(shuffled).tolist()
    packs = first = filled = 0
    while first < len(ends):
        first = bisect_right(ends, filled + SEQUENCE_LENGTH, first)
        filled = ends[first - 1]
        packs += 1
    return 1 - ends[-1] / (packs * SEQUENCE_LENGTH)


def held_mb() -> float:
    """Memory of this process that is its own, in MB: pages mapped from the index files do not count."""
    fields = Path("/proc/self/status").read_text().split("RssAnon:")
    return int(fields[1].split()[0]) / 1024


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)
