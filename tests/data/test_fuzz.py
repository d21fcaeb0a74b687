"""Damaged samples and indexes by the hundred thousand: an error of ours or a value, never anything else.

Inputs are valid ones with bytes flipped, cut, doubled and words of the format put in, all by seed, so a failure can be
repeated: its number is in the message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.chat import count_text_tokens
from data.errors import BadSample, DataError
from data.sample import media_of, parse_sample
from data.shard_index import ShardIndex, index_path
from data.shards import write_shards
from tests.data.corpus_kit import mixed, tokenizer

TOKENIZER = tokenizer()
FILM = {"type": "video", "video": "0.mp4", "sound": True}
PARTS = [
    {"type": "text", "text": "one ü 猫"},
    {"type": "audio", "audio": "flac"},
    {"type": "image", "image": "1.jpg"},
    FILM,
]
SAMPLES = [
    {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "x", "loss": False}]},
    {
        "segments": [*PARTS, {"type": "text", "text": "two", "loss": False}],
        "language": "en",
        "source": "s",
        "speaker": "a",
    },
    {"messages": [{"role": role, "content": "hello"} for role in ("system", "user", "assistant")], "source": ""},
]
WORDS = [
    *(
        json.dumps(word).encode()
        for word in ("messages", "segments", "type", "audio", "loss", "sound", "content", "role")
    ),
    *(
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b"{}",
        b"[]",
        b'""',
        b"true",
        b'"\\ud800"',
        b'"../x"',
        b"\xff",
        b"\0",
        b"9" * 400,
    ),
]


def damaged(valid: list[bytes], count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Numbered inputs, each one of `valid` with one to four changes."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        payload = bytearray(valid[number % len(valid)])
        for _ in range(int(rng.integers(1, 5))):
            place, kind = int(rng.integers(len(payload) + 1)), int(rng.integers(6))
            length = int(rng.integers(1, 30))
            if kind == 0 and place < len(payload):
                payload[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del payload[place : place + length]
            elif kind == 2:
                payload[place:place] = payload[place : place + length]
            elif kind == 3:
                payload[place:place] = WORDS[int(rng.integers(len(WORDS)))]
            elif kind == 4 and place + 8 <= len(payload):
                payload[place : place + 8] = int(rng.integers(-(2**63), 2**63 - 1)).to_bytes(8, "little", signed=True)
            elif kind == 5:
                del payload[place + length * 40 :]
        yield number, bytes(payload)


def parse_all(count: int) -> int:
    """How many of `count` inputs are samples after all."""
    usable = 0
    for number, payload in damaged([json.dumps(sample, ensure_ascii=False).encode() for sample in SAMPLES], count, 1):
        try:
            record = parse_sample("key", payload)
            assert len(media_of(record)) <= 4096 and count_text_tokens(record, TOKENIZER) > 0
            assert parse_sample("key", record.to_json()) == record
            usable += 1
        except BadSample as error:
            assert error.reason and "\n" not in error.reason
        except Exception as error:
            raise AssertionError(f"input {number}: {payload!r}") from error
    return usable


def open_all(folder: Path, count: int) -> int:
    """How many of `count` indexes can be opened and read throughout."""
    tar = write_shards(mixed(5), folder, TOKENIZER).paths[0]
    path, usable = index_path(tar), 0
    for number, payload in damaged([path.read_bytes()], count, 2):
        path.write_bytes(payload)
        try:
            index = ShardIndex.open(tar)
            index.verify()
            index.costs(slice(0, index.num_samples))
            for row in range(index.num_samples):
                index.key(row), index.name("source", row), index.name("language", row), index.media_samples(row)
                index.read(row)
            usable += 1
        except DataError as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"index {number}") from error
    return usable


def test_damaged_samples() -> None:
    assert 100 < parse_all(6_000) < 5_000


def test_damaged_indexes(tmp_path: Path) -> None:
    assert 10 < open_all(tmp_path, 2_000) < 1_900


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_damaged_samples() -> None:
    assert parse_all(100_000) > 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_damaged_indexes(tmp_path: Path) -> None:
    assert open_all(tmp_path, 100_000) > 1000
