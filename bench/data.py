"""The data plane against webdataset, mosaicml-streaming and megatron-energon, and against the bare decoder.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 mosaicml-streaming megatron-energon webdataset \\
        av fsspec pillow safetensors soundfile soxr tokenizers tqdm
    PEERS/bin/python bench/data.py [samples [position]]

Run by another Python, such as .venv's, it leaves out the peers that are not installed, and says so. One run measures,
on the same samples (bench/data_corpus.py), page cache warm, one thread, in turns, medians:

1. undecoded: one epoch's order, every sample's bytes in hand. Ours opens the corpus, plans, reads byte ranges and
   checks every crc32; the peers check nothing. Goal: 4 times plain webdataset, by CPU time.
2. decoded: `worked` makes a document of one sample (JSON, tokens, JPEG to patches, FLAC to log-mel, labels, positions)
   and `join` a batch of several, the same calls for all. The bare decoder makes those calls on bytes in memory, pack by
   pack of the plan, and nothing else; ours reads, checks and decodes the same packs. Goal: 0.97 of the bare decoder's
   rate, the median of pairs. "media alone" is Pillow, to_patches, libsndfile and log_mel and no more.
3. batches as training gets them, in this process and in steady state from one and two workers.
4. resuming: bench/data_resume.py. Goals: 1 s until the first sample at position one million, files opened anew, and
   5 s until the first batch of step one million in a fresh process with two workers. A sample is one with its bytes
   read and checked, as with the peers; a batch is decoded.
5. padding at 8,192 and 32,768 tokens of the mix of bench/plan.py, which measures the plan itself. Goal: 0.5 %.

Wall time means something only on a machine that does nothing else. Cost: five minutes, 1.5 GB of disk.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common import matmul_rate, report, void_if_drifted
from bench.data_corpus import Stored, store, warm
from bench.data_peers import Peer, peers
from bench.data_resume import Alone, Place, resumes
from bench.plan import plan_part, write_corpus
from data.audio import decode
from data.corpus import Corpus
from data.document import Document, Maker, MediaLimits, join
from data.loader import stream
from data.mel import log_mel
from data.plan import Pack, Plan, PlanSettings
from data.reader import Reader
from data.sample import parse_sample
from data.tokenizer import Tokenizer
from data.types import Batch
from data.vision import load_image
from train.layout import ModelLayout

SEQUENCE_LENGTH = 8_192
BATCH = 24  # samples of a peer's batch: about what a pack holds
ROUNDS, WARMUP, PACKS, TAKEN = 3, 2, 30, 192
GOAL_UNDECODED, GOAL_DECODED, GOAL_PADDING = 4.0, 0.97, 0.005


@dataclass(frozen=True)
class Rates:
    """Samples and tokens a second."""

    cpu: float
    wall: float
    tokens_cpu: float = 0.0
    tokens_wall: float = 0.0


class Ours:
    """The data plane as training uses it, and the same samples in memory."""

    def __init__(self, stored: Stored, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.shards = [str(path) for path in stored.tars]
        self.corpus = Corpus.open(self.shards, tokenizer.fingerprint)
        layout = ModelLayout()
        self.reader = Reader(self.corpus, tokenizer, seed=0, layout=layout, sequence_length=SEQUENCE_LENGTH)
        self.maker = Maker(tokenizer, layout, MediaLimits())
        self.plan = self.make_plan(self.corpus)

    def make_plan(self, corpus: Corpus) -> Plan:
        """One sequence a step."""
        return Plan(corpus, PlanSettings(SEQUENCE_LENGTH, 1), seed=0, sizing=self.reader.sizing)

    def raw(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, members) in the plan's order, everything done anew, from opening the corpus on."""
        corpus = Corpus.open(self.shards, self.tokenizer.fingerprint)
        plan = self.make_plan(corpus)
        for step in itertools.count():
            for sample in plan.step(step)[0].samples.tolist():
                shard, row = corpus.locate(sample)
                index = corpus.index(shard)
                yield index.key(row), index.read(row, self.reader.limits.max_bytes)

    def batches(self, workers: int) -> Iterator[Batch]:
        """Packs, as training gets them."""
        for _, (batch,) in stream(self.plan, self.reader, Alone(), 0, 1 << 40, workers):
            yield batch

    def worked(self, key: str, json_bytes: bytes, media: dict[str, bytes]) -> Document:
        """What every contestant does with one sample."""
        return self.maker.document(replace(parse_sample(key, json_bytes), media=media))

    def in_memory(self, pack: Pack) -> list[tuple[str, bytes, dict[str, bytes]]]:
        """The bytes of a pack's samples."""
        found = []
        for sample in pack.samples.tolist():
            shard, row = self.corpus.locate(sample)
            members = self.corpus.index(shard).read(row)
            found.append((self.corpus.name(sample), members["json"], members))
        return found


def main(samples: int = 8_000, position: int = 1_000_000) -> None:
    """Measure, print the tables and the JSON lines."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # energon asks for it without looking for a GPU
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored, tokenizer = store(folder, samples, position + 2 * 65_536)
        warm(folder)
        before = matmul_rate()
        others = peers(stored, folder)
        missing = {"webdataset", "streaming", "energon"} - {peer.name for peer in others}
        print(
            f"{samples:,} samples in {len(stored.tars)} shards; peers: "
            + ", ".join(f"{p.name} {p.version}" for p in others)
        )
        if missing:
            print(f"left out, since not installed: {', '.join(sorted(missing))}")
        ours = Ours(stored, tokenizer)
        outcomes = [undecoded(ours, others, samples), overhead(ours)]
        decoded(ours, others)
        outcomes += resumed(others, tokenizer, folder, position)
        outcomes.append(padding(folder))
        void = void_if_drifted(before, matmul_rate())
    if void:
        print(void)
    for each in outcomes:
        each["met"] = each["met"] and void is None
        report(**each)


def in_turns(works: dict[str, Callable[[], tuple[int, int]]], rounds: int) -> dict[str, Rates]:
    """Median rates of works that return samples and tokens done, after one round of warm-up."""
    found: dict[str, list[Rates]] = {name: [] for name in works}
    for _ in range(1 + rounds):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            samples, tokens = work()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found[name].append(Rates(samples / cpu, samples / wall, tokens / cpu, tokens / wall))
    return {name: middle(each[1:]) for name, each in found.items()}


def middle(rates: Sequence[Rates]) -> Rates:
    """Medians, column by column."""
    return Rates(*(median(getattr(each, field) for each in rates) for field in Rates.__dataclass_fields__))


def undecoded(ours: Ours, others: Sequence[Peer], samples: int) -> dict[str, Any]:
    """Bytes of samples in hand: of an epoch, or of an eighth for the slow ones."""

    def taken(source: Callable[[], Iterator[Any]], count: int) -> Callable[[], tuple[int, int]]:
        return lambda: (sum(1 for _ in itertools.islice(source(), count)), 0)

    works = {"ours": taken(ours.raw, samples)}
    for peer in others:
        works[peer.name] = taken(peer.raw, samples if peer.name == "webdataset" else samples // 8)
    rates = in_turns(works, ROUNDS)
    print(f"\n{'undecoded':32}{'samples/CPU s':>16}{'samples/s':>12}{'ours over it':>14}")
    for name, rate in rates.items():
        print(f"{name:32}{rate.cpu:>16,.0f}{rate.wall:>12,.0f}{rates['ours'].cpu / rate.cpu:>14.1f}")
    mine, peer = rates["ours"].cpu, rates["webdataset"].cpu
    unit = "undecoded samples per CPU second; peer: plain webdataset"
    return outcome("data.undecoded", mine, peer, mine / peer, unit, GOAL_UNDECODED, mine / peer >= GOAL_UNDECODED)


def overhead(ours: Ours) -> dict[str, Any]:
    """The reader beside the bare decoder, pack by pack in turns; both must make the same batch."""
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "media": []}
    samples = tokens = 0
    for step in range(WARMUP + PACKS):
        pack = ours.plan.step(step)[0]
        held = ours.in_memory(pack)
        works: dict[str, Callable[[], Any]] = {
            "ours": lambda step=step: ours.reader.batch(ours.plan.step(step)[0]),
            "bare": lambda held=held: join([ours.worked(*sample) for sample in held]),
            "media": lambda held=held: [media_alone(members) for _, _, members in held],
        }
        assert step >= WARMUP or same(works["ours"](), works["bare"]())
        for name in ("ours", "bare", "media") if step % 2 else ("bare", "ours", "media"):
            start = time.process_time()
            made = works[name]()
            seconds[name].append(time.process_time() - start)
            del made  # or the next one would find less memory at hand
        if step < WARMUP:
            seconds = {name: [] for name in seconds}
        else:
            samples, tokens = samples + len(held), tokens + int(pack.tokens.sum())
    print(f"\n{f'decoded, {PACKS} packs in turns':32}{'samples/CPU s':>16}{'tokens/CPU s':>14}{'ms/sample':>11}")
    labels = {"ours": "ours, shards to batch", "bare": "bare, memory to batch", "media": "media alone"}
    for name, label in labels.items():
        total = sum(seconds[name])
        print(f"{label:32}{samples / total:>16,.1f}{tokens / total:>14,.0f}{1e3 * total / samples:>11.3f}")
    ratio = median(bare / mine for bare, mine in zip(seconds["bare"], seconds["ours"], strict=True))
    mine, bare = samples / sum(seconds["ours"]), samples / sum(seconds["bare"])
    unit = "decoded samples per CPU second; peer: the bare decoder; the ratio is the median of pairs"
    return outcome("data.decoded", mine, bare, ratio, unit, GOAL_DECODED, ratio >= GOAL_DECODED)


def media_alone(members: dict[str, bytes]) -> Any:
    """The least that can be done with the media of a sample."""
    return load_image(members["jpg"]) if "jpg" in members else log_mel(decode(members["flac"]))


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal to the bit."""
    names = ("token_ids_T", "labels_T", "position_ids_3T", "mel_FM", "pixels_PX")
    return one.keys == other.keys and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def decoded(ours: Ours, others: Sequence[Peer]) -> None:
    """Decoded batches in this process, then from one and two workers."""
    print(f"\n{'decoded':32}{'samples/s':>11}{'tokens/s':>11}{'samples/CPU s':>15}{'tokens/CPU s':>14}")
    sources = {"ours": ours.batches}
    for peer in others:
        sources[peer.name] = partial(peer.batches, ours.worked, join, BATCH)
    running = {name: source(workers=0) for name, source in sources.items()}
    works = {name: partial(some, batches, TAKEN) for name, batches in running.items()}
    for name, rate in in_turns(works, ROUNDS).items():
        row = f"{rate.wall:>11,.1f}{rate.tokens_wall:>11,.0f}{rate.cpu:>15,.1f}{rate.tokens_cpu:>14,.0f}"
        print(f"{name + ', in this process':32}{row}")
    for workers in (1, 2):
        rates = {name: [steady(source, workers) for _ in range(2)] for name, source in sources.items()}
        for name, each in rates.items():
            rate = middle(each)
            print(f"{f'{name}, {workers} workers':32}{rate.wall:>11,.1f}{rate.tokens_wall:>11,.0f}")


def some(batches: Iterator[Batch], count: int) -> tuple[int, int]:
    """Samples and tokens of the next batches, `count` samples at least."""
    samples = tokens = 0
    while samples < count:
        batch = next(batches)
        samples, tokens = samples + len(batch.doc_lengths), tokens + len(batch.token_ids_T)
    return samples, tokens


def steady(source: Callable[..., Iterator[Batch]], workers: int) -> Rates:
    """Wall rates once every worker has delivered; the stream goes on behind, so nothing was prepared before."""
    batches = source(workers=workers)
    some(batches, 2 * workers * BATCH)
    start = time.perf_counter()
    samples, tokens = some(batches, TAKEN)
    wall = time.perf_counter() - start
    close = getattr(batches, "close", None) or getattr(batches, "_shutdown_workers", None)
    if close:
        close()
    return Rates(0.0, samples / wall, 0.0, tokens / wall)


def resumed(others: Sequence[Peer], tokenizer: Tokenizer, folder: Path, position: int) -> list[dict[str, Any]]:
    """First samples after a resume, ours and the peers'."""
    tokenizer.save(folder / "tokenizer")
    far, words = str(folder / "far" / "*" / "*.tar"), str(folder / "tokenizer")
    plan, _ = Place(far, words, SEQUENCE_LENGTH, 0).open()
    samples = sum(len(plan.step(step)[0].samples) for step in range(200))
    ways_of = []
    for name, length, step in (
        (f"about sample {position:,}", SEQUENCE_LENGTH, position * 200 // samples),
        (f"step {position:,}", 2_048, position),  # short sequences, or walking there once would take long
    ):
        place, ways = resumes(Place(far, words, length, step), folder)
        passed = place.cursor["state"]["positions"][0]
        print(f"\n{f'{name}: {length:,} tokens a step, {passed:,} samples passed':76}{'CPU s':>8}{'wall s':>8}")
        for way in ways:
            print(f"{'ours, ' + way.what:76}{way.cpu:>8.2f}{way.wall:>8.2f}")
        ways_of.append((ways[2], ways[-1], ways[0]))
    print()
    walls = {}
    for peer in others:
        walls[peer.name], how = peer.resume(position)
        print(f"{peer.name + ', ' + how:84}{walls[peer.name]:>8.2f}")
    (first, _, _), (_, fresh, walk) = ways_of
    best = min(walls.values(), default=walk.wall)
    unit = "wall s until the first sample at a million, from opening the files; peer: the fastest"
    unit_fresh = (
        "wall s from a fresh interpreter's start to the first batch of step one million; peer: without a cursor"
    )
    return [
        outcome("data.first_sample", first.wall, best, best / first.wall, unit, 1.0, first.wall < 1),
        outcome("data.resume", fresh.wall, walk.wall, walk.wall / fresh.wall, unit_fresh, 5.0, fresh.wall < 5),
    ]


def padding(folder: Path) -> dict[str, Any]:
    """Share of a pack that is padding, by the mix of bench/plan.py."""
    corpus = write_corpus(folder, 1_000_000)
    print(f"\n{'padding, one million samples of the mix of bench/plan.py':60}{'ours':>9}{'next-fit':>10}")
    parts = [plan_part(corpus, length, None) for length in (8_192, 32_768)]
    for part in parts:
        print(f"{part['length']:>10,} tokens{part['waste']:>52.3%}{part['next_fit']:>10.2%}")
    worst = max(parts, key=lambda part: part["waste"])
    unit = f"share of padding at {worst['length']:,} tokens; peer: next-fit"
    waste, peer = worst["waste"], worst["next_fit"]
    return outcome("data.padding", waste, peer, peer / waste, unit, GOAL_PADDING, waste < GOAL_PADDING)


def outcome(bench: str, ours: float, peer: float, ratio: float, unit: str, goal: float, met: bool) -> dict[str, Any]:
    """What `report` takes."""
    return {"bench": bench, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "goal": goal, "met": met}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
