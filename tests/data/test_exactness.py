"""Nothing is ever cut: what reaches the model is what the clip's seconds ask.

Other frameworks cut audio at 30 seconds for months without a word. Here the tokens of every clip from 0.1 seconds to 40
minutes are counted where the model takes them, and compared with the seconds alone.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data.audio import decode
from data.corpus import Corpus
from data.mel import log_mel
from data.plan import Plan, PlanSettings
from data.reader import Reader
from data.sample import SampleRecord
from data.shards import write_shards
from data.tokenizer import AUDIO_PAD
from data.types import Batch
from tests.data.corpus_kit import tokenizer
from tests.data.layouts import layout_of

TOKENIZER = tokenizer()
SECONDS = (0.1, 0.11, 0.5, 0.999, 1.0, 1.01, 7.99, 8.0, 8.01, 29.99, 30.0, 30.01, 59.5, 61.3, 120.07, 600.0)


def tokens_of_seconds(seconds: float, rate: int) -> int:
    """13 for each whole second; what is left, in 10 ms frames, halved and rounded up three times."""
    frames = round(seconds * rate) * 16_000 // rate // 160
    rest = frames % 100
    for _ in range(3):
        rest = (rest + 1) // 2
    return frames // 100 * 13 + rest


def clip(seconds: float, rate: int = 8000, kind: str = "FLAC") -> bytes:
    """A sweep, so that no two seconds of it sound alike."""
    count = round(seconds * rate)
    times = np.arange(count) / rate
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(times * (400 + 0.5 * times)), rate, format=kind)
    return buffer.getvalue()


def asked(key: str, payload: bytes, extension: str = "flac") -> SampleRecord:
    content = [{"type": "audio", "audio": extension}, {"type": "text", "text": "one?"}]
    answer = {"role": "assistant", "content": "two"}
    return SampleRecord(key, [{"role": "user", "content": content}, answer], {extension: payload})


def batches(folder: Path, records: list[SampleRecord], length: int, too_long: str = "error") -> list[Batch]:
    """Everything that an epoch brings."""
    write_shards(records, folder, TOKENIZER)
    corpus = Corpus.open([str(folder / "*.tar")], TOKENIZER.fingerprint)
    reader = Reader(corpus, TOKENIZER, seed=0, layout=layout_of(TOKENIZER), sequence_length=length)
    plan = Plan(corpus, PlanSettings(length, 1, too_long=too_long), seed=0, sizing=reader.sizing)
    read, number = [], 0
    while True:
        (pack,) = plan.step(number)
        if pack.epochs.min() > 0:
            return read
        read.append(reader.batch(pack))
        number += 1


def heard(batch: Batch) -> dict[str, int]:
    """Audio placeholders of each document."""
    documents = batch.token_ids_T.split(list(batch.doc_lengths))
    pads = [int((ids == TOKENIZER.id(AUDIO_PAD)).sum()) for ids in documents]
    return dict(zip(batch.keys, pads, strict=True))


def test_tokens_of_clips_from_a_tenth_of_a_second_to_ten_minutes(tmp_path: Path) -> None:
    records = [asked(f"s{int(seconds * 1000)}", clip(seconds)) for seconds in SECONDS]
    found: dict[str, int] = {}
    for batch in batches(tmp_path, records, 8192):
        assert not batch.skipped and len(batch.mel_FM) == sum(batch.mel_lengths)
        found |= heard(batch)
    expected = {f"shard-000000.tar:s{int(seconds * 1000)}": tokens_of_seconds(seconds, 8000) for seconds in SECONDS}
    assert found == expected


@pytest.mark.parametrize("kind", ["FLAC", "WAV"])
def test_forty_minutes_are_31200_tokens(tmp_path: Path, kind: str) -> None:
    payload = clip(2400.0, kind=kind)
    (batch,) = batches(tmp_path, [asked("long", payload, kind.lower())], 32_768)
    assert heard(batch) == {"shard-000000.tar:long": 31_200}
    assert batch.mel_lengths == (240_000,) and len(batch.mel_FM) == 240_000
    late_FM = log_mel(decode(payload))[-100:]  # the last second is there, not silence
    assert torch.equal(batch.mel_FM[-100:], late_FM) and late_FM.std() > 0.1


def test_a_recording_longer_than_a_sequence_is_split_without_loss(tmp_path: Path) -> None:
    segments = [
        {"type": "text", "text": "one two three"},
        {"type": "audio", "audio": "flac"},
        {"type": "text", "text": "four"},
    ]
    seconds, limit = 100.37, 300
    payload = clip(seconds)
    pieces = batches(tmp_path, [SampleRecord("d", segments=segments, media={"flac": payload})], limit, "split")
    assert len(pieces) > 4 and all(len(batch.token_ids_T) <= limit for batch in pieces)
    names = sorted(key for batch in pieces for key in batch.keys)
    assert names == [f"shard-000000.tar:d#{i}" for i in range(len(pieces))]
    frames = [length for batch in pieces for length in batch.mel_lengths]
    assert sum(frames) == round(seconds * 16_000) // 160
    assert sum(length % 800 > 0 for length in frames) == 1  # cut at the encoder's windows of 8 s
    assert sum(sum(heard(batch).values()) for batch in pieces) == tokens_of_seconds(seconds, 8000)
    order = sorted(pieces, key=lambda batch: batch.keys)  # fewer than ten
    assert torch.equal(torch.cat([batch.mel_FM for batch in order]), log_mel(decode(payload)))
    spoken = [label for batch in pieces for label in batch.labels_T.tolist() if label >= 0]
    text = TOKENIZER.decode(spoken, keep_control_tokens=True)
    assert text.count("two three") == 1 and text.endswith("four<|endoftext|>") or "four<|endoftext|>" in text
