"""Codes beside shards: made once, found again by row, refused where they are not those, whole after any kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from isal.isal_zlib import crc32
from torch import Tensor

import data.codes
from data.code_store import CodesWriter, ShardCodes, about_codes
from data.codec import Codec
from data.codes import encode_row, encode_shard, encode_shards, main, summarize, tables
from data.corpus import Corpus
from data.errors import BadSample, DataError
from data.index import build_index
from data.report import as_text
from data.sample import SampleRecord
from data.shard_index import ShardIndex
from data.shards import write_shards
from tests.data.audio_bytes import encode, tone
from tests.data.corpus_kit import members_of, tokenizer, write_tar, written

TOKENIZER = tokenizer()
HOP = 1920
FSDD = Path(__file__).resolve().parents[2] / "../shared/data/fsdd_dev.tar"


class ToyCodec:
    """Codes by loudness and first sample of pieces of a frame; a codec is anything that fits the protocol."""

    sample_rate, frame_rate, codebook_size = 24_000, 12.5, 64

    def __init__(self, identity: str = "toy/1", num_codebooks: int = 3, dies_at: int = 0) -> None:
        self.identity, self.num_codebooks, self.calls, self.dies_at = identity, num_codebooks, 0, dies_at

    def encode(self, waveform_S: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        assert waveform_S.dtype is torch.float32 and waveform_S.ndim == 1
        padded = torch.nn.functional.pad(waveform_S, (0, -len(waveform_S) % HOP))
        pieces_TGX = padded.reshape(-1, self.num_codebooks, HOP // self.num_codebooks)
        values_TG = pieces_TGX.abs().mean(2) + pieces_TGX[..., 0]
        return (values_TG * 1000).long().remainder(self.codebook_size).T.contiguous()

    def decode(self, codes_GT: Tensor) -> Tensor:
        return torch.zeros(HOP * codes_GT.shape[1])


CODEC: Codec = ToyCodec()


def said(key: str, wave: np.ndarray | bytes, speaker: str = "", rate: int = 24_000) -> SampleRecord:
    """A written question, and an answer that is spoken."""
    part = {"type": "speech", "speech": "speech.wav"} | ({"speaker": speaker} if speaker else {})
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}, part]},
    ]
    payload = wave if isinstance(wave, bytes) else encode(wave, rate, subtype="FLOAT")
    return SampleRecord(key, turns, {"speech.wav": payload})


def records(count: int = 9) -> list[SampleRecord]:
    """Utterances of three speakers, every third sample without speech, one that cannot be decoded."""
    made = [
        written(f"k{i}") if i % 3 == 2 else said(f"k{i}", tone(24_000, 0.2 + 0.1 * i, 200 + i), ("george", "")[i % 2])
        for i in range(count)
    ]
    return [*made, said("bad", b"not audio"), said("last", tone(24_000, 0.5), "lucas")]


def shards(folder: Path, made: list[SampleRecord] | None = None, each: int = 5) -> Corpus:
    report = write_shards(made or records(), folder, TOKENIZER, each)
    assert not report.left_out  # whether speech can be decoded is not the index's to say
    return Corpus.open([str(folder / "*.tar")])


def opened(corpus: Corpus, shard: int = 0, **asked: Any) -> ShardCodes:
    return ShardCodes.open(corpus.paths[shard], corpus.index(shard), **asked)


def sidecars(corpus: Corpus) -> list[bytes]:
    return [Path(f"{tar}.codes").read_bytes() for tar in corpus.paths]


def test_codes_are_those_of_each_utterance_alone(tmp_path: Path) -> None:
    corpus = shards(tmp_path)
    before = [Path(tar).read_bytes() for tar in corpus.paths]
    encode_shards(corpus, CODEC)
    assert [Path(tar).read_bytes() for tar in corpus.paths] == before and len(before) == 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".codes"] * 3 + [".index"] * 3 + [".tar"] * 3
    for sample, record in enumerate(records()):
        shard, row = corpus.locate(sample)
        codes, index = opened(corpus, shard, identity="toy/1", codebooks=3), corpus.index(shard)
        found = codes.codes(row)
        if record.key == "bad" or not record.media:
            assert found is None and codes.frames(slice(row, row + 1)).tolist() == [0] and codes.speaker(row) == ""
            continue
        wave = tone(24_000, 0.5) if record.key == "last" else tone(24_000, 0.2 + 0.1 * sample, 200 + sample)
        assert found is not None and found.dtype is torch.int64 and found.is_contiguous()
        assert torch.equal(found, CODEC.encode(torch.from_numpy(wave))) and len(found.unique()) > 1
        assert found.shape == (3, -(-len(wave) // HOP))
        assert torch.equal(found, encode_row(index, row, CODEC, 60)[0])
        speaker = record.messages[1]["content"][1].get("speaker", "")
        assert codes.speaker(row) == speaker


def test_frames_of_rows_in_any_order(tmp_path: Path) -> None:
    corpus = shards(tmp_path, each=99)
    encode_shards(corpus, CODEC)
    codes = opened(corpus)
    frames = codes.frames(slice(None))
    assert frames.dtype == np.int64 and frames.tolist() == [3, 4, 0, 7, 8, 0, 10, 12, 0, 0, 7]
    assert codes.frames(np.array([4, 0, 4, 9])).tolist() == [8, 3, 8, 0]
    assert codes.frames(slice(3, 5)).tolist() == [7, 8] and codes.frames(np.zeros(0, np.int64)).tolist() == []


@pytest.mark.parametrize("key", ["a", "z"])
def test_a_shard_without_any_usable_speech(tmp_path: Path, key: str) -> None:
    corpus = shards(tmp_path, [said("x", tone(24_000)), said(key, b"?"), written("b")], each=2 if key == "z" else 1)
    encode_shards(corpus, CODEC)
    codes = opened(corpus, 1)
    assert codes.codes(0) is None and codes.frames(slice(None)).tolist() == [0]
    assert len(codes.about["left_out"]) == (key == "a")


def test_other_rates_are_brought_to_the_codecs(tmp_path: Path) -> None:
    corpus = shards(tmp_path, [said("a", tone(8_000, 1.0), rate=8_000), said("b", tone(24_000, 1.0))])
    encode_shards(corpus, CODEC)
    assert opened(corpus).frames(slice(None)).tolist() == [13, 13]


# What cannot be used

NAN = tone(24_000, 0.5)
NAN[100] = np.nan
QUIET = np.full(24_000, 0.9e-4, np.float32)
BAD = {
    "silence": (np.zeros(24_000, np.float32), "speech is silence: no sample reaches 0.0001 of full scale"),
    "quiet": (QUIET, "speech is silence: no sample reaches 0.0001 of full scale"),
    "short": (tone(24_000, 0.05), "speech lasts 0.05 s, less than a frame of the codec, 0.08 s"),
    "shorter": (tone(24_000, 0.01), "audio is too short: 240 samples at 24 kHz, at least 600 needed"),
    "nan": (NAN, "audio contains NaN or infinite samples"),
    "undecodable": (b"not audio", "audio is none of wav, flac, "),
    "empty": (b"", "audio "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path, name: str) -> None:
    wave, reason = BAD[name]
    corpus = shards(tmp_path, [said("a", tone(24_000, 0.5)), said(name, wave), said("b", tone(24_000, 0.5))])
    found = encode_shards(corpus, CODEC)
    (line,) = opened(corpus).about["left_out"]
    assert line.startswith(f"{name}: {reason}")
    assert opened(corpus).frames(slice(None)).tolist() == [7, 0, 7]
    assert (found.utterances, found.left_out.total()) == (2, 1)
    shown = "\n".join(map(as_text, tables(found)))
    assert f"shard-000000.tar:{name}: {reason}" in shown


def test_just_loud_and_long_enough(tmp_path: Path) -> None:
    corpus = shards(tmp_path, [said("a", QUIET * 1.2), said("b", tone(24_000, 0.08)), said("c", tone(24_000, 60.0))])
    assert encode_shards(corpus, CODEC).utterances == 3


def test_twenty_minutes_are_not_even_decoded(tmp_path: Path) -> None:
    long = tmp_path / "long.flac"
    soundfile.write(long, np.zeros(20 * 60 * 8_000, np.int16), 8_000)
    corpus = shards(tmp_path / "s", [said("long", long.read_bytes()), said("b", tone(24_000, 2.0))])
    encode_shards(corpus, CODEC)
    assert opened(corpus).about["left_out"] == ["long: audio claims 1200 s, the limit is 60 s"]
    encode_shards(corpus, CODEC, max_seconds=1.5, replace=True)
    assert len(opened(corpus).about["left_out"]) == 2


def test_a_codec_may_refuse_an_utterance_but_not_lie(tmp_path: Path) -> None:
    class Picky(ToyCodec):
        def encode(self, waveform_S: Tensor) -> Tensor:
            if len(waveform_S) > 20_000:
                raise BadSample("too much")
            return super().encode(waveform_S)

    class Lying(ToyCodec):
        def encode(self, waveform_S: Tensor) -> Tensor:
            return super().encode(waveform_S) + 64

    corpus = shards(tmp_path, [said("a", tone(24_000, 0.5)), said("b", tone(24_000, 1.0))])
    with pytest.raises(ValueError, match=r"codes run from 64 to \d+, they must lie in 0 .. 63"):
        encode_shards(corpus, Lying())
    encode_shards(corpus, Picky())
    assert opened(corpus).about["left_out"] == ["b: too much"]


def test_speech_that_changed_since_indexing_is_left_out(tmp_path: Path) -> None:
    record = said("a", tone(24_000, 0.5))
    tar = write_tar(tmp_path / "x.tar", members_of(record) | members_of(said("b", tone(24_000, 0.5))))
    index = build_index(tar, TOKENIZER)
    payload = bytearray(tar.read_bytes())
    payload[payload.find(record.media["speech.wav"]) + 200] ^= 1
    tar.write_bytes(payload)
    encode_shard(index, CODEC, 60.0, False)
    (line,) = ShardCodes.open(tar, index).about["left_out"]
    assert line == "a: .speech.wav has changed since its index was made (crc32 differs)"


def test_the_summary(tmp_path: Path) -> None:
    found = encode_shards(shards(tmp_path), CODEC)
    assert (found.shards, found.silent, found.utterances, found.not_indexed) == (3, 3, 7, 0)
    assert found.seconds == pytest.approx((3 + 4 + 7 + 8 + 10 + 12 + 7) * 0.08)
    counts = {name: (count, round(seconds / 0.08)) for name, (count, seconds) in found.speakers.items()}
    assert counts == {"george": (3, 21), "": (3, 23), "lucas": (1, 7)}
    text = "\n".join(map(as_text, tables(found)))
    assert re.search(r"\(unknown\) +3 +1.8 s", text) and re.search(r"all +7 +4.1 s", text)
    assert "shard-000001.tar:bad" in text or "shard-000002.tar:bad" in text


# Going on


def test_finished_shards_are_not_touched(tmp_path: Path) -> None:
    corpus = shards(tmp_path)
    encode_shards(corpus, CODEC)
    before, whole = sidecars(corpus), [os.stat(f"{tar}.codes").st_mtime_ns for tar in corpus.paths]
    os.unlink(f"{corpus.paths[1]}.codes")
    codec = ToyCodec()
    encode_shards(corpus, codec)
    assert codec.calls == sum(len(record.media) for record in records()[5:10]) - 1  # but for the undecodable one
    assert sidecars(corpus) == before
    again = [os.stat(f"{tar}.codes").st_mtime_ns for tar in corpus.paths]
    assert [a == b for a, b in zip(again, whole, strict=True)] == [True, False, True]
    encode_shards(corpus, codec := ToyCodec(), replace=True)  # there is nothing to replace
    assert codec.calls == 0


def partial_of(corpus: Corpus, folder: Path) -> bytes:
    """The partial file just before a shard is finished."""
    index = corpus.index(0)
    with CodesWriter(index, CODEC, 60.0) as writer:
        for row in index.speech_rows().tolist():
            try:
                writer.add(row, *encode_row(index, row, CODEC, 60.0))
            except BadSample as error:
                writer.leave_out(row, error.reason)
    path = folder / "shard-000000.tar.codes.partial"
    payload = path.read_bytes()
    path.unlink()
    return payload


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, bytes, bytes]:
    """A corpus of one shard, its codes, and what a run leaves that is killed at the last moment."""
    folder = tmp_path_factory.mktemp("killed")
    corpus = shards(folder, each=99)
    left = partial_of(corpus, folder)
    encode_shards(corpus, CODEC)
    return corpus, sidecars(corpus)[0], left


@given(st.data())
def test_whatever_a_kill_leaves_the_result_is_the_same(killed: tuple[Corpus, bytes, bytes], data: Any) -> None:
    """Cut anywhere; behind the cut nothing, zeros (a file system after a power cut), noise, or a changed byte."""
    corpus, whole, left = killed
    cut = data.draw(st.integers(0, len(left)))
    tail = data.draw(st.sampled_from([b"", bytes(50), b"\xff" * 50, bytes(8)]) | st.binary(max_size=40))
    Path(f"{corpus.paths[0]}.codes").unlink(missing_ok=True)
    path = Path(f"{corpus.paths[0]}.codes.partial")
    path.write_bytes(left[:cut] + tail)
    codec = ToyCodec()
    encode_shard(corpus.index(0), codec, 60.0, False)
    assert sidecars(corpus)[0] == whole and not path.exists()
    if cut == len(left):
        assert codec.calls == 0  # nothing is done twice


@pytest.mark.parametrize("tail", [b"", bytes(8), bytes(50), struct.pack("<II", 1 << 31, 0), b"\x01" * 50])
def test_whole_records_are_not_done_twice(killed: tuple[Corpus, bytes, bytes], tail: bytes) -> None:
    """Whatever lies behind them: here a hole of zeros, and a record longer than the file."""
    corpus, whole, left = killed
    Path(f"{corpus.paths[0]}.codes").unlink(missing_ok=True)
    Path(f"{corpus.paths[0]}.codes.partial").write_bytes(left + tail)
    encode_shard(corpus.index(0), codec := ToyCodec(), 60.0, False)
    assert sidecars(corpus)[0] == whole and codec.calls == 0


def test_a_process_that_is_killed_again_and_again(tmp_path: Path) -> None:
    made, rng = [said(f"k{i}", tone(24_000, 0.2 + 0.01 * i, 200 + i)) for i in range(30)], random.Random(0)
    corpus, other = shards(tmp_path / "a", made, 12), shards(tmp_path / "b", made, 12)
    encode_shards(other, CODEC)
    kills = 0
    while True:
        codec = ToyCodec(dies_at=rng.randint(1, 6))
        child = os.fork()
        if child == 0:
            encode_shards(corpus, codec)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        kills += 1
        for path in tmp_path.glob("a/*.partial"):  # and the last record is torn
            payload = path.read_bytes()
            path.write_bytes(payload[: len(payload) - rng.randint(0, 30)])
        assert kills < 100
    assert kills >= 3 and sidecars(corpus) == sidecars(other)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    corpus = shards(tmp_path, each=99)
    with CodesWriter(corpus.index(0), CODEC, 60.0), pytest.raises(DataError, match="another process is writing it"):
        encode_shards(corpus, CODEC)
    encode_shards(corpus, CODEC)


def test_workers_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = shards(tmp_path / "one", each=3), shards(tmp_path / "two", each=3)
    first = encode_shards(one, CODEC)
    second = encode_shards(two, CODEC, workers=2, reopen=ToyCodec)
    assert sidecars(one) == sidecars(two) and len(one.paths) == 4 and first == second


def test_an_error_of_a_worker_is_told(tmp_path: Path) -> None:
    corpus = shards(tmp_path, each=3)
    with pytest.raises(DataError, match="a worker process ended in the middle of its work"):
        encode_shards(corpus, CODEC, workers=2, reopen=partial(ToyCodec, dies_at=2))
    with pytest.raises(DataError, match="made with codec=toy/1, asked for is codec=toy/2; replace=true begins it anew"):
        encode_shards(corpus, CODEC, workers=2, reopen=partial(ToyCodec, "toy/2"))


# What is refused


def test_codes_of_another_codec_are_refused(tmp_path: Path) -> None:
    corpus = shards(tmp_path)
    encode_shards(corpus, CODEC)
    before = sidecars(corpus)
    with pytest.raises(DataError) as caught:
        encode_shards(corpus, ToyCodec("toy/2"))
    tar = corpus.paths[0]
    assert str(caught.value) == (
        f"{tar}.codes: made with codec=toy/1, asked for is codec=toy/2; replace=true makes it anew"
    )
    with pytest.raises(DataError, match="made with max_seconds=60.0, asked for is max_seconds=9.0; replace=true"):
        encode_shards(corpus, CODEC, max_seconds=9.0)
    assert sidecars(corpus) == before
    with pytest.raises(DataError) as caught:
        opened(corpus, identity="toy/2")
    assert str(caught.value) == (
        f"{tar}.codes: its codes are those of codec toy/1, needed is toy/2; make it again with: python -m data.codes "
        f"codec=FOLDER shards={tar} replace=true"
    )
    with pytest.raises(DataError, match="codec toy/1 has 3 codebooks, needed are 16; make it again with"):
        opened(corpus, identity="toy/1", codebooks=16)
    encode_shards(corpus, ToyCodec("toy/2", 4), replace=True)
    assert opened(corpus, identity="toy/2", codebooks=4).codes(0).shape == (4, 3)  # type: ignore[union-attr]


def test_work_of_another_codec_that_was_interrupted_is_refused(tmp_path: Path) -> None:
    corpus = shards(tmp_path, each=99)
    path = Path(f"{corpus.paths[0]}.codes.partial")
    path.write_bytes(partial_of(corpus, tmp_path))
    with pytest.raises(DataError, match="made with codec=toy/1, asked for is codec=toy/2; replace=true begins it anew"):
        encode_shards(corpus, ToyCodec("toy/2"))
    encode_shards(corpus, codec := ToyCodec("toy/2"), replace=True)
    assert opened(corpus, identity="toy/2").frames(slice(None)).sum() == 51 and codec.calls == 7


def test_codes_of_another_tar_or_index_are_refused(tmp_path: Path) -> None:
    corpus, other = shards(tmp_path / "a", each=99), shards(tmp_path / "b", records(8), each=99)
    encode_shards(corpus, CODEC)
    os.rename(f"{corpus.paths[0]}.codes", f"{other.paths[0]}.codes")
    with pytest.raises(DataError, match="made from another shard or index than is there now"):
        opened(other)
    with pytest.raises(DataError, match="made from another shard or index than is there now"):
        encode_shards(other, CODEC)
    encode_shards(other, CODEC, replace=True)
    assert opened(other).frames(slice(None)).sum() > 0
    with pytest.raises(DataError, match=r"has no codec codes; make them with: python -m data.codes codec=FOLDER"):
        opened(corpus)


def test_rows_that_moved_are_noticed(tmp_path: Path) -> None:
    """The same tar with as many samples, but another of them left out: rows would be off by one."""
    corpus = shards(tmp_path, each=99)
    encode_shards(corpus, CODEC)
    columns = dict(corpus.index(0).columns)
    columns["key_bytes"] = columns["key_bytes"].copy()
    columns["key_bytes"][1] += 1
    with pytest.raises(DataError, match="made from another shard or index"):
        ShardCodes.open(corpus.paths[0], ShardIndex(corpus.paths[0], corpus.index(0).about, columns))


def test_every_damaged_byte_is_noticed(killed: tuple[Corpus, bytes, bytes]) -> None:
    """By the file as a whole or by the utterance; only the text of names and reasons has no sum of its own."""
    corpus, whole, _ = killed
    path, index = Path(f"{corpus.paths[0]}.codes"), corpus.index(0)
    path.write_bytes(whole)
    expected = ShardCodes.open(path.with_suffix(""), index)
    right = [expected.codes(row) for row in range(index.num_samples)]
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x81
        path.write_bytes(damaged)
        try:
            codes = ShardCodes.open(path.with_suffix(""), index)
            for row, codes_GT in enumerate(right):
                found = codes.codes(row)
                assert (found is None) == (codes_GT is None)
                assert codes_GT is None or torch.equal(found, codes_GT)  # type: ignore[arg-type]
            speakers = [codes.speaker(row) for row in range(index.num_samples)]
        except DataError:
            continue
        unused = [row for row, codes_GT in enumerate(right) if codes_GT is None]
        sums = [place - start - 8 * (index.num_samples + 1) - 4 * row in range(4) for row in unused]
        assert any(sums) or speakers != [expected.speaker(row) for row in range(index.num_samples)], place


@given(st.data())
def test_files_that_are_cut_or_mangled_raise_data_errors_alone(killed: tuple[Corpus, bytes, bytes], data: Any) -> None:
    corpus, whole, _ = killed
    path = Path(f"{corpus.paths[0]}.codes")
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    mangled = bytearray(whole)
    if data.draw(st.booleans()):
        del mangled[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        mangled[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path.write_bytes(mangled)
    try:
        codes = ShardCodes.open(path.with_suffix(""), corpus.index(0))
        codes.frames(slice(None))
        _ = [(codes.codes(row), codes.speaker(row)) for row in range(corpus.num_samples)]
    except DataError:
        return


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "omniloom-codes-0"}, "its format is omniloom-codes-0, needed is omniloom-codes-1"),
        ({"codebooks": 0}, "its codebooks are out of bounds"),
        ({"codebooks": "3"}, "metadata codebooks is missing or no int"),
        ({"codebooks": 2}, "its offsets make no sense"),
        ({"speakers": []}, "a speaker has no name"),
        ({"speakers": [1, 2, 3]}, "speakers or left_out are not all text"),
        ({"codebook_size": 1 << 20}, "its codebooks are out of bounds"),
    ],
)
def test_metadata_that_makes_no_sense(killed: tuple[Corpus, bytes, bytes], change: dict[str, Any], reason: str) -> None:
    corpus, whole, _ = killed
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    about = json.loads(header["__metadata__"]["omniloom"]) | change
    header["__metadata__"]["omniloom"] = json.dumps(about)
    raw = json.dumps(header).encode()
    Path(f"{corpus.paths[0]}.codes").write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + size :])
    with pytest.raises(DataError, match=f"damaged codes .*{reason}.*; make it again with: python -m data.codes"):
        opened(corpus)


def test_nothing_to_do_and_too_large_codebooks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no answer of these shards has speech"):
        encode_shards(shards(tmp_path / "text", [written("a")]), CODEC)
    codec = ToyCodec()
    codec.codebook_size = 1 << 17
    corpus = shards(tmp_path / "speech")
    with pytest.raises(DataError, match="codec toy/1 has codebooks of 131072, at most 65536 fit"):
        encode_shards(corpus, codec)
    assert not list(tmp_path.glob("speech/*.codes*"))
    with pytest.raises(DataError, match="codes are written beside local shards only"):
        CodesWriter(ShardIndex("https://host/x.tar", {}, {}), codec, 60.0)
    assert about_codes(corpus.index(0), CODEC, 60)["frame_rate"] == 12.5


# The command


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = shards(tmp_path / "a")
    folders = []

    def opens(folder: str, device: str) -> ToyCodec:
        folders.append((folder, device))
        return ToyCodec()

    monkeypatch.setattr(data.codes, "open_codec", opens)
    given = ["codec=somewhere", f"shards={tmp_path}/a/shard-00000{{0,1}}.tar,{tmp_path}/a/*2.tar"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "codes of speech in 3 shards, 3 speakers:" in printed and "speech that has no codes:" in printed
    assert printed.endswith("3 samples have no speech; 0 were left out when the shards were indexed\n")
    assert folders == [("somewhere", "cpu")] and summarize(corpus).utterances == 7
    assert main([*given, "max_seconds=9"]) == 2
    assert "error: " in (err := capsys.readouterr().err) and "replace=true" in err and err.count("\n") == 1
    assert main([*given, "max_seconds=9", "replace=true"]) == 0

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ToyCodec, "encode", interrupted)
    assert main([*given, "replace=true"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on where it stopped\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "usage: python -m data.codes codec=FOLDER shards=PATTERN"),
        (["codec=x"], "usage: "),
        (["codec=x", "shards=y", "levels=3"], "usage: "),
        (["codec=x", "shards=y", "z.tar"], "usage: "),
        (["codec=x", "shards=y", "workers=0"], "workers=0: must be a whole number above 0"),
        (["codec=x", "shards=y", "max_seconds=0"], "max_seconds=0: must be above 0 and at most 3600"),
        (["codec=x", "shards=y", "max_seconds=nan"], "max_seconds=nan: must be above 0 and at most 3600"),
        (["codec=x", "shards=y", "replace=yes"], "replace=yes: must be true or false"),
        (["codec=x", "shards=y", "device=abacus"], "device=abacus: "),
        (["codec=x", "shards=s3://b/x.tar"], "s3://b/x.tar: codes are written beside local shards; copy it here"),
        (["codec=x", "shards=nowhere.tar"], "nowhere.tar: no such shard"),
    ],
)
def test_errors_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"error: {line}") and found.count("\n") == 1


@pytest.mark.skipif(not FSDD.is_file(), reason="needs ../shared/data/fsdd_dev.tar")
def test_real_recordings(tmp_path: Path) -> None:
    from data.tar import read_members, read_range

    with open(FSDD, "rb") as file:
        members = [m for m in read_members(FSDD) if m.extension == "wav"][:12]
        clips = {m.key.rpartition("/")[2]: read_range(file.fileno(), m.start, m.size) for m in members}
    corpus = shards(tmp_path, [said(key, clip, key.split("_")[1]) for key, clip in clips.items()])
    found = encode_shards(corpus, CODEC)
    assert found.utterances == 12 and not found.left_out
    for row, clip in enumerate(clips.values()):
        codes = opened(corpus, row // 5)
        frames = -(-round(3 * (len(clip) - 44) / 2) // HOP)  # 8 kHz, 16 bits
        assert codes.frames(slice(row % 5, row % 5 + 1)).tolist() == [frames]
        assert crc32(codes.codes(row % 5).numpy().tobytes()) != 0  # type: ignore[union-attr]
