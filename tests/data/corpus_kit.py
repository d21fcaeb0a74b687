"""Small corpora for tests: real shards on disk, and plans over costs alone."""

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.costs import AUDIO, IMAGE, KINDS, VIDEO, Sizing
from data.plan import Plan, PlanSettings
from data.sample import SampleRecord
from data.shard_index import COLUMNS, ShardIndex
from data.tokenizer import Tokenizer, train_tokenizer
from data.vision import Patching
from tests.data.audio_bytes import encode, tone


def num_audio_tokens(frames):
    """13 tokens for 100 frames; like the model's, for numbers and arrays."""
    return -(-frames * 13 // 100)


def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world", "one two three four"], 300)


def spoken(key: str, seconds: float = 0.5, text: str = "hello", kind: str = "wav", **about: Any) -> SampleRecord:
    """One spoken question with a text answer."""
    question = {"role": "user", "content": [{"type": "audio", "audio": kind}, {"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": text}
    hz = 200 + 7 * sum(key.encode())
    return SampleRecord(key, [question, answer], {kind: encode(tone(16_000, seconds, hz), 16_000, kind)}, **about)


def written(key: str, text: str = "hello", **about: Any) -> SampleRecord:
    """One text-only sample."""
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": text}]
    return SampleRecord(key, messages, {}, **about)


def mixed(count: int) -> list[SampleRecord]:
    """Speech of 0.2 to 1.2 s and text, of two sources."""
    return [
        written(f"t{i}", "one two " * (i % 9 + 1), source="text", language="en")
        if i % 3 == 0
        else spoken(f"a{i}", 0.2 + i % 11 / 10, "three", source="speech", language="de")
        for i in range(count)
    ]


def write_tar(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """A tar of any members, hostile ones included."""
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def members_of(record: SampleRecord) -> dict[str, bytes]:
    """The tar members of a record."""
    media = {f"{record.key}.{extension}": payload for extension, payload in record.media.items()}
    return {f"{record.key}.json": record.to_json(), **media}


@dataclass(frozen=True)
class Made:
    """A sample that exists in an index alone."""

    text: int  # tokens, those around media included
    clips: Sequence[int] = ()  # samples of each
    images: Sequence[tuple[int, int]] = ()  # height and width of each
    videos: Sequence[tuple[int, int, float]] = ()  # height, width and seconds of each
    source: str | None = None  # None: "speech" with clips, "text" without
    language: str = ""
    document: bool = False


class KitLayout:
    """As much of a model's layout as a plan needs."""

    audio_window = 800

    def __init__(self, patching: Patching | None = None) -> None:
        self.patching = patching

    num_audio_tokens = staticmethod(num_audio_tokens)


def sizing(patching: Patching | None = None) -> Sizing:
    """13 tokens for 100 frames; pictures where there is a patching."""
    return Sizing(KitLayout(patching))  # type: ignore[arg-type]


def costs_corpus(shards: Sequence[Sequence[Made | tuple[int, Sequence[int]]]]) -> Corpus:
    """A corpus in memory: shards of samples, each (text tokens, samples of its clips). Nothing can be read from it."""
    paths = [Path(f"shard-{number}.tar") for number in range(len(shards))]
    offsets = np.cumsum([0, *map(len, shards)])
    corpus = Corpus(paths, [path.name for path in paths], offsets, repr(shards))
    made = [[sample if isinstance(sample, Made) else Made(*sample) for sample in shard] for shard in shards]
    corpus._open.update({number: costs_index(paths[number], shard) for number, shard in enumerate(made)})
    return corpus


def costs_index(path: Path, samples: Sequence[Made]) -> ShardIndex:
    """The index of a shard that does not exist."""
    columns: dict[str, np.ndarray] = {name: np.zeros(len(samples), dtype) for name, dtype in COLUMNS.items()}
    keys = [f"k{row}".encode() for row in range(len(samples))]
    columns["key_bytes"] = np.frombuffer(b"".join(keys), np.uint8)
    columns["key_offsets"] = np.cumsum([0, *map(len, keys)])
    columns["text_tokens"] = np.array([sample.text for sample in samples], np.int32)
    columns["document"] = np.array([sample.document for sample in samples], np.uint8)
    media = [
        [*((AUDIO, clip, 0, 0, 0, 0.0) for clip in sample.clips)]
        + [*((IMAGE, 0, height, width, 0, 0.0) for height, width in sample.images)]
        + [*((VIDEO, 0, height, width, int(25 * secs), secs) for height, width, secs in sample.videos)]
        for sample in samples
    ]
    columns["media_offsets"] = np.cumsum([0, *map(len, media)])
    table = list(zip(*(row for rows in media for row in rows), strict=True)) or [()] * 6
    for name, column in zip(("kind", "samples", "height", "width", "frames", "seconds"), table, strict=True):
        columns[f"media_{name}"] = np.array(column, COLUMNS[f"media_{name}"])
    columns["media_text"] = np.zeros(len(columns["media_kind"]), np.int32)
    names = [("speech" if sample.clips else "text") if sample.source is None else sample.source for sample in samples]
    languages = [sample.language for sample in samples]
    tables = {"source": sorted(set(names)), "language": sorted(set(languages))}
    for kind, values in (("source", names), ("language", languages)):
        columns[kind] = np.array([tables[kind].index(value) for value in values], np.uint16)
    pairs = Counter(zip(columns["source"].tolist(), columns["language"].tolist(), strict=True))
    about = {
        "sources": tables["source"],
        "languages": tables["language"],
        "groups": [[*codes, count] for codes, count in pairs.items()],
        "max_text_tokens": max(sample.text for sample in samples),
        "max_samples": max(sum(sample.clips) for sample in samples),
        "max_media": [max(sum(row[0] == kind for row in rows) for rows in media) for kind in range(len(KINDS))],
    }
    return ShardIndex(path, about, columns)


def costs_plan(corpus: Corpus, seed: int = 0, *, patching: Patching | None = None, **settings) -> Plan:
    """A plan with small defaults."""
    small: dict[str, Any] = {"sequence_length": 100, "sequences_per_step": 3, "window": 8}
    return Plan(corpus, PlanSettings(**small | settings), seed=seed, sizing=sizing(patching))
