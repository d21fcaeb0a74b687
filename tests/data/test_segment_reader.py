"""What the waveform decoder reads: codes and their sound, aligned, a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.audio import decode
from data.codec import Codec, open_codec
from data.codes import encode_shards
from data.corpus import Corpus
from data.document import MediaLimits
from data.errors import DataError
from data.kmeans_codec import levelled
from data.plan import Plan, PlanSettings
from data.sample import SampleRecord
from data.segment_reader import FrameSizing, SegmentReader, Sound
from data.segments import Segments
from data.shards import write_shards
from data.tokenizer import train_tokenizer
from data.vision import Patching
from tests.data.audio_bytes import encode
from tests.data.corpus_kit import written
from tests.data.test_fit_codec import voice
from tests.data.test_kmeans_codec import write as write_codec
from tests.train.test_speech_run import SIZES
from train.layout import ModelLayout

FRAMES, CONTEXT, RATE = 4, 2, 1920
SECONDS = (0.3, 0.5, 0.9, 1.7)
WORDS = train_tokenizer(["Say it", "word"], 300)
LAYOUT = ModelLayout(patching=None)


def answer(number: int, seconds: float) -> SampleRecord:
    part = {"type": "speech", "speech": "speech.wav", "speaker": "ann"}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "word " * (1 + 50 * number)}, part]}
    media = {"speech.wav": encode(voice(seconds, number, 24_000), 24_000)}
    return SampleRecord(f"a{number}", [{"role": "user", "content": "Say it"}, reply], media)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return open_codec(write_codec(tmp_path_factory.mktemp("codec") / "codec", SIZES))


@pytest.fixture(scope="module")
def shards(codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aloud")
    write_shards([*(answer(n, s) for n, s in enumerate(SECONDS)), written("mute")], folder, WORDS, 9)
    encode_shards(Corpus.open([f"{folder}/*.tar"]), codec)
    return folder


def open_reader(shards: Path, codec: Codec, frames: int = FRAMES, context: int = CONTEXT, seed: int = 3):
    corpus = Corpus.open([f"{shards}/*.tar"], codec=codec.identity)
    return SegmentReader(
        corpus,
        WORDS,
        seed=seed,
        layout=replace(LAYOUT, patching=Patching()),
        limits=MediaLimits(),
        sound=Sound.of(codec),
        frames=frames,
        context=context,
    )


def plan_of(reader: SegmentReader, length: int = 8) -> Plan:
    return Plan(reader.corpus, PlanSettings(length, 2), seed=3, sizing=reader.sizing)


def pieces(reader: SegmentReader, steps: range = range(6)) -> list[tuple[str, Segments]]:
    plan, found = plan_of(reader), []
    for step in steps:
        for pack in plan.step(step):
            batch = reader.batch(pack)
            assert isinstance(batch.speech, Segments) and not batch.skipped and not len(batch.token_ids_T)
            assert sum(batch.speech.frames) <= 8 and len(batch.keys) == len(batch.speech.frames)
            ends = np.cumsum([0, *batch.speech.frames]), np.cumsum([0, *batch.speech.samples])
            for place, key in enumerate(batch.keys):
                (a, b), (c, d) = (end[place : place + 2].tolist() for end in ends)
                found.append((key, Segments(
                    batch.speech.codes_GF[:, a:b], batch.speech.wave_S[c:d], (b - a,),
                    batch.speech.contexts[place : place + 1], (d - c,)
                )))  # fmt: skip
    return found


def test_pieces_are_codes_and_the_sound_they_stand_for(shards: Path, codec: Codec) -> None:
    """Each piece is found in its utterance, whose codes are those of the codec, at the codec's level."""
    reader, seen = open_reader(shards, codec), set()
    waves = [torch.from_numpy(decode(answer(n, s).media["speech.wav"], rate=24_000)) for n, s in enumerate(SECONDS)]
    for key, piece in pieces(reader):
        number = int(key[-1])
        codes_GT, wave_S = codec.encode(waves[number]), levelled(waves[number])[: len(waves[number])]
        (frames,), (before,) = piece.frames, piece.contexts
        fits = [
            start
            for start in range(codes_GT.shape[1] - frames + 1)
            if torch.equal(codes_GT[:, start : start + frames], piece.codes_GF)
            and torch.equal(wave_S[(start + before) * RATE : (start + frames) * RATE], piece.wave_S)
        ]
        assert fits and frames - before == min(FRAMES, codes_GT.shape[1])
        seen.add((number, fits[0] + before))
    assert {number for number, _ in seen} == set(range(4))
    assert len([start for number, start in seen if number == 3]) > 2  # of a long one, ever another piece


def test_a_piece_follows_from_seed_epoch_and_sample(shards: Path, codec: Codec) -> None:
    def starts(reader: SegmentReader) -> list[tuple[str, bytes]]:
        return [(key, piece.wave_S.numpy().tobytes()) for key, piece in pieces(reader)]

    first = open_reader(shards, codec)
    assert starts(first) == starts(pickle.loads(pickle.dumps(first)))  # as a worker has it
    late = [(key, piece.wave_S.numpy().tobytes()) for key, piece in pieces(open_reader(shards, codec), range(4, 6))]
    assert starts(first)[-len(late) :] == late
    assert sorted(starts(first)) != sorted(starts(open_reader(shards, codec, seed=4)))


def test_samples_cost_their_frames_whatever_their_text(shards: Path, codec: Codec) -> None:
    reader = open_reader(shards, codec)
    costs = reader.corpus.index(0).costs(slice(None))
    assert isinstance(reader.sizing, FrameSizing)
    tokens_N = reader.sizing.tokens(costs, reader.sizing.sizes(costs))
    assert tokens_N.tolist() == [4, 6, 6, 6, 0]
    assert plan_of(reader).tally.silent == 1 and plan_of(reader).dropped == {}


def test_other_pieces_are_another_plan(shards: Path, codec: Codec) -> None:
    prints = {plan_of(open_reader(shards, codec, *sizes)).fingerprint for sizes in ((4, 2), (2, 4), (4, 3))}
    assert len(prints) == 3
    assert plan_of(open_reader(shards, codec)).fingerprint in prints


def test_what_cannot_be_used_is_left_out_and_named(shards: Path, codec: Codec) -> None:
    reader = open_reader(shards, codec)
    reader.sound = replace(reader.sound, samples_per_frame=2000)
    (pack, *_) = plan_of(reader).step(0)
    batch = reader.batch(pack)
    assert batch.speech is None and len(batch.skipped) == len(pack.samples)
    assert "frames of codes do not fit" in batch.skipped[0] and "shard-000000.tar:a" in batch.skipped[0]


def test_codecs_whose_frames_are_no_whole_samples_are_refused(codec: Codec) -> None:
    class Odd:
        sample_rate, frame_rate, identity = 24_000, 7.0, "odd"

    assert Sound.of(codec) == Sound(24_000, 1920, True)
    with pytest.raises(DataError, match="codec odd: 3428.57 samples a frame are no whole number"):
        Sound.of(Odd())  # pyright: ignore[reportArgumentType]
