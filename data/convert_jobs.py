"""One job of a conversion: rows of a source to one or more shards, and an account of them.

    span --Source.read--> items --media read--> records --write_tar--> shard-000012.tar --build_index--> .tar.index
                                                                       shard-000012_0001.tar, where it grew too large

What a job writes is a function of the source and the settings alone, not of the worker or of when it runs. A dry run
decodes and counts as the index would, and writes nothing. Memory is one sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import SAMPLE_RATE
from data.chat import count_text_tokens
from data.costs import AUDIO, FILM, IMAGE, VIDEO
from data.document import MediaLimits
from data.errors import BadSample, DataError
from data.index import build_index, measure
from data.sample import SampleRecord, media_of, parse_sample, speech_of
from data.shard_index import ShardIndex, index_path
from data.shards import write_tar
from data.sources import Source, Span
from data.tar import group_samples, read_members, read_range
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """Rows that one process turns into shards."""

    split: str
    number: int  # in the split
    span: Span


@dataclass
class Totals:
    """Sums over samples."""

    samples: int = 0
    shards: int = 0
    bytes: int = 0
    audio_seconds: float = 0.0  # of clips, and of films that are heard
    images: int = 0
    videos: int = 0
    text_tokens: int = 0
    spoken: int = 0  # samples whose answer has speech

    def add(self, other: Totals) -> None:
        """Add another's sums."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Outcome:
    """What became of a job; JSON holds it."""

    split: str
    number: int
    shards: dict[str, int] = field(default_factory=dict)  # file names and bytes
    totals: Totals = field(default_factory=Totals)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # (place, reason)
    unread: dict[str, int] = field(default_factory=dict)  # fields of rows that nothing was made of

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Outcome:
        """What `asdict` gave."""
        return cls(
            content["split"],
            content["number"],
            content["shards"],
            Totals(**content["totals"]),
            [(place, reason) for place, reason in content["left_out"]],
            content["unread"],
        )


@dataclass(frozen=True)
class Work:
    """What a process needs to run jobs."""

    sources: Mapping[str, Source]
    out: Path
    tokenizer: Tokenizer
    samples_per_shard: int
    max_bytes: int  # of a shard: it ends with the sample that reaches them
    dry: bool = False
    limits: MediaLimits = field(default_factory=MediaLimits)

    def run(self, job: Job) -> Outcome:
        """Write the shards of a job, or only check its rows. Raises DataError where the source fails as a whole."""
        outcome = Outcome(job.split, job.number)
        loaded = self._loaded(job, outcome)
        if self.dry:
            self._check(loaded, outcome)
            return outcome
        folder = self.out / job.split
        for part in itertools.count():
            path, places = folder / shard_name(job.number, part), {}
            if not write_tar(path, _noted(loaded, places), self.samples_per_shard, self.max_bytes):
                return outcome
            self._index(path, places, outcome)
        raise AssertionError

    def _loaded(self, job: Job, outcome: Outcome) -> Iterator[tuple[str, SampleRecord]]:
        """(place, sample) of the rows that can be used so far."""
        keys = set()
        for place, item in self.sources[job.split].read(job.span):
            try:
                if isinstance(item, BadSample):
                    raise item
                if item.record.key in keys:
                    raise BadSample(f"key occurs twice: {item.record.key}")
                record = item.load()
            except BadSample as error:
                outcome.left_out.append((place, error.reason))
                continue
            keys.add(record.key)
            outcome.unread.update({name: outcome.unread.get(name, 0) + 1 for name in item.unread})
            yield place, record

    def _index(self, path: Path, places: Mapping[str, str], outcome: Outcome) -> None:
        try:
            index = build_index(path, self.tokenizer, self.limits)
        except DataError as error:
            reasons = self._reasons(path)
            if len(reasons) < len(places):
                raise error
            path.unlink()  # no sample of it can be used
            outcome.left_out += [(places[key], reason) for key, reason in reasons.items()]
            return
        used = {index.key(row) for row in range(index.num_samples)}
        unusable = [key for key in places if key not in used]
        for key, line in zip(unusable, index.about["left_out"], strict=True):
            outcome.left_out.append((places[key], line.removeprefix(f"{path.name}:{key}: ")))
        outcome.shards[path.name] = index.about["tar_size"]
        outcome.totals.add(_totals_of(index))

    def _reasons(self, path: Path) -> dict[str, str]:
        """Why samples of a shard cannot be used, by key."""
        reasons = {}
        with open(path, "rb") as file:
            for key, members in group_samples(path, read_members(path)):
                payloads = {name: read_range(file.fileno(), m.start, m.size) for name, m in members.items()}
                try:
                    self._measured(key, payloads.pop("json"), payloads)
                except BadSample as error:
                    reasons[key] = error.reason
        return reasons

    def _check(self, loaded: Iterator[tuple[str, SampleRecord]], outcome: Outcome) -> None:
        samples, size = 0, self.max_bytes  # of the shard that would be open
        for place, record in loaded:
            payload = record.to_json()
            if samples == self.samples_per_shard or size >= self.max_bytes:
                outcome.totals.shards += 1
                samples, size = 0, 0
            samples, size = samples + 1, size + len(payload) + sum(map(len, record.media.values()))
            try:
                outcome.totals.add(self._measured(record.key, payload, record.media))
            except BadSample as error:
                outcome.left_out.append((place, error.reason))

    def _measured(self, key: str, payload: bytes, media: Mapping[str, bytes]) -> Totals:
        """What the index would count of one sample. Raises BadSample where it would leave it out."""
        record = parse_sample(key, payload)
        totals = Totals(1, 0, len(payload) + sum(map(len, media.values())))
        totals.text_tokens = count_text_tokens(record, self.tokenizer)
        totals.spoken = int(speech_of(record) is not None)
        for medium in media_of(record):
            size = measure(medium, media[medium.extension], self.limits)
            totals.audio_seconds += size.samples / SAMPLE_RATE
            totals.images += size.kind == IMAGE
            totals.videos += size.kind in (VIDEO, FILM)
        return totals


def shard_name(number: int, part: int = 0) -> str:
    """File name of a shard of job `number`."""
    return f"shard-{number:06d}_{part:04d}.tar" if part else f"shard-{number:06d}.tar"


def is_whole(folder: Path, shards: Mapping[str, int]) -> bool:
    """Whether the shards that a job wrote are there, with their indexes."""
    paths = {folder / name: size for name, size in shards.items()}
    return all(p.is_file() and p.stat().st_size == size and index_path(p).is_file() for p, size in paths.items())


def _noted(loaded: Iterator[tuple[str, SampleRecord]], places: dict[str, str]) -> Iterator[SampleRecord]:
    """The samples; where they come from is noted in `places` as they pass."""
    for place, record in loaded:
        places[record.key] = place
        yield record


def _totals_of(index: ShardIndex) -> Totals:
    columns = index.columns
    kinds = columns["media_kind"]
    heard = columns["media_samples"][np.isin(kinds, (AUDIO, FILM))]
    return Totals(
        samples=index.num_samples,
        shards=1,
        bytes=index.about["tar_size"],
        audio_seconds=int(heard.sum()) / SAMPLE_RATE,
        images=int((kinds == IMAGE).sum()),
        videos=int(np.isin(kinds, (VIDEO, FILM)).sum()),
        text_tokens=int(columns["text_tokens"].sum()),
        spoken=len(index.speech_rows()),
    )
