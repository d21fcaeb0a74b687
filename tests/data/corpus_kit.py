"""Small corpora for tests: real shards on disk, and plans over costs alone."""

import io
import tarfile
from pathlib import Path

import numpy as np

from data.corpus import Corpus
from data.plan import Plan, PlanSettings
from data.sample import SampleRecord
from data.shard_index import COLUMNS, ShardIndex
from data.tokenizer import Tokenizer, train_tokenizer
from tests.data.audio_bytes import encode, tone


def num_audio_tokens(frames):
    """13 tokens for 100 frames; like the model's, for numbers and arrays."""
    return -(-frames * 13 // 100)


def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world", "one two three four"], 300)


def spoken(key: str, seconds: float = 0.5, text: str = "hello", kind: str = "wav", **about: str) -> SampleRecord:
    """One spoken question with a text answer."""
    question = {"role": "user", "content": [{"type": "audio", "audio": kind}, {"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": text}
    hz = 200 + 7 * sum(key.encode())
    return SampleRecord(key, [question, answer], {kind: encode(tone(16_000, seconds, hz), 16_000, kind)}, **about)


def written(key: str, text: str = "hello", **about: str) -> SampleRecord:
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
    media = {f"{record.key}.{extension}": payload for extension, payload in record.audio.items()}
    return {f"{record.key}.json": record.to_json(), **media}


def costs_corpus(shards: list[list[tuple[int, list[int]]]]) -> Corpus:
    """A corpus in memory: shards of samples, each (text tokens, samples of its clips). Nothing can be read from it."""
    paths = [Path(f"shard-{number}.tar") for number in range(len(shards))]
    offsets = np.cumsum([0, *map(len, shards)])
    corpus = Corpus(paths, [path.name for path in paths], offsets, repr(shards))
    corpus._open.update({number: _costs_index(paths[number], shard) for number, shard in enumerate(shards)})
    return corpus


def _costs_index(path: Path, samples: list[tuple[int, list[int]]]) -> ShardIndex:
    columns = {name: np.zeros(len(samples), dtype) for name, dtype in COLUMNS.items()}
    keys = [f"k{row}".encode() for row in range(len(samples))]
    columns["key_bytes"] = np.frombuffer(b"".join(keys), np.uint8)
    columns["key_offsets"] = np.cumsum([0, *map(len, keys)])
    columns["text_tokens"] = np.array([text for text, _ in samples], np.int32)
    columns["clip_offsets"] = np.cumsum([0, *(len(clips) for _, clips in samples)])
    columns["clip_samples"] = np.array([clip for _, clips in samples for clip in clips], np.int64)
    columns["source"] = np.array([len(clips) > 0 for _, clips in samples], np.uint16)
    about = {
        "sources": ["text", "speech"],
        "max_text_tokens": max(text for text, _ in samples),
        "max_audio_samples": max(sum(clips) for _, clips in samples),
        "max_clips": max(len(clips) for _, clips in samples),
    }
    return ShardIndex(path, about, columns)


def costs_plan(corpus: Corpus, seed: int = 0, **settings) -> Plan:
    """A plan with small defaults."""
    values = {"sequence_length": 100, "sequences_per_step": 3, "window": 8} | settings
    return Plan(corpus, PlanSettings(**values), seed=seed, num_audio_tokens=num_audio_tokens)
