"""Fitting a codec to shards: the same bytes twice, better with more codebooks, one line on what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data.fit_codec as fit_codec
import data.kmeans_codec as kmeans_codec
from data.audio import decode
from data.codec import open_codec
from data.corpus import Corpus
from data.errors import BadSample, DataError
from data.fit_codec import FitSettings, blocks_of, crops, draw, main, parse
from data.quantizer import BLOCK_VALUES, fit_quantizer
from data.sample import SampleRecord
from data.shards import write_shards
from data.vocoder import log_mel
from tests.data.audio_bytes import encode, tone
from tests.data.corpus_kit import spoken, tokenizer, written

TINY = ("codebooks=3", "codebook_size=8", "vocoder_steps=3", "max_seconds=20")


def voice(seconds: float, seed: int, rate: int = 16_000) -> np.ndarray:
    """Harmonics that glide, under an envelope: no two blocks alike."""
    time_S = np.arange(round(seconds * rate)) / rate
    phase_S = 2 * np.pi * np.cumsum(100 + 15 * (seed % 7) + 40 * np.sin(2 * time_S + seed)) / rate
    wave_S = sum(np.sin(k * phase_S) / k for k in range(1, 15)) * (1.2 + np.sin(9 * time_S + seed))
    return (0.1 * wave_S).astype(np.float32)


def record(key: str, media: dict[str, bytes]) -> SampleRecord:
    parts = [{"type": "audio", "audio": name} for name in media]
    return SampleRecord(key, [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}], media)


def shards(folder: Path, records: list[SampleRecord]) -> str:
    write_shards(records, folder, tokenizer(), samples_per_shard=15)
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """50 s of sound in 41 members of three kinds, one sample of text."""
    records = [
        record(f"v{i:02d}", {"wav": encode(voice(1.2, i), 16_000), **({"1.flac": sound} if i == 7 else {})})
        for sound in [encode(voice(2.0, 99, 48_000), 48_000, "flac")]
        for i in range(40)
    ]
    return shards(tmp_path_factory.mktemp("corpus"), [*records, written("text")])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command(corpus, tmp_path, capsys):
    assert main([str(tmp_path / "codec"), f"shards={corpus}", *TINY]) == 0
    said = capsys.readouterr().out
    assert re.search(r"held out: 1 utterances, 1 s", said) and "0 members left out" in said
    rows = [line.split() for line in said.splitlines() if re.fullmatch(r"[ 0-9.]+", line)]
    assert [row[0] for row in rows] == ["1", "2", "3"] and float(rows[0][1]) > float(rows[2][1])
    used = next(line for line in said.splitlines() if line.startswith("codes in use of 8")).rpartition(": ")[2].split()
    assert len(used) == 3 and all(1.0 <= float(value) <= 8.0 for value in used)
    assert "real-time factor: encoding" in said and re.search(r"fitted to 20 s of sound in \d+ s of one core", said)
    assert set(files(tmp_path / "codec")) == {"codec.json", "codec.safetensors"}
    codec = open_codec(tmp_path / "codec")
    wave = torch.from_numpy(voice(1.0, 3, 24_000))
    assert codec.decode(codec.encode(wave)).shape == (13 * 1920,)
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def test_the_same_bytes_twice(corpus, tmp_path):
    for name, more in (("a", []), ("b", []), ("c", ["seed=1"])):
        torch.manual_seed(len(name + str(more)))  # nothing may depend on it
        assert main([str(tmp_path / name), f"shards={corpus}", *TINY, *more]) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["codec.safetensors"] != files(tmp_path / "c")["codec.safetensors"]


def test_the_number_of_threads_changes_nothing(corpus, tmp_path):
    kept = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert main([str(tmp_path / "two"), f"shards={corpus}", *TINY]) == 0
        assert torch.get_num_threads() == 2, "the caller's setting is put back"
        torch.set_num_threads(1)
        assert main([str(tmp_path / "one"), f"shards={corpus}", *TINY]) == 0
    finally:
        torch.set_num_threads(kept)
    assert files(tmp_path / "one") == files(tmp_path / "two")


# what is drawn


def test_every_member_that_is_sound_is_drawn(corpus):
    drawn = draw(Corpus.open([corpus]), FitSettings(codebook_size=8, max_seconds=1000), quiet=True)
    lengths = sorted(len(wave) / 1920 for wave in [*drawn.used, *drawn.held_out])
    assert lengths == [15.0] * 40 + [25.0] and len(drawn.held_out) == 3
    assert not drawn.left_out and not drawn.shortened


def test_of_a_spoken_answer_only_the_answer_is_drawn(tmp_path):
    speech = {"type": "speech", "speech": "speech.wav", "speaker": "one"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}, speech]}
    question = {"role": "user", "content": [{"type": "audio", "audio": "wav"}]}
    media = {"wav": encode(voice(2.0, 1), 16_000), "speech.wav": encode(voice(1.2, 2), 16_000)}
    records = [SampleRecord(f"s{i:02d}", [question, answer], media) for i in range(30)]
    drawn = draw(Corpus.open([shards(tmp_path, records)]), FitSettings(codebook_size=8, max_seconds=1000), quiet=True)
    assert {len(wave) / 1920 for wave in [*drawn.used, *drawn.held_out]} == {15.0}


def test_drawing_stops_and_follows_the_seed(corpus):
    def first(seed: int) -> torch.Tensor:
        return draw(Corpus.open([corpus]), FitSettings(codebook_size=8, max_seconds=12, seed=seed), quiet=True).used[0]

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0)[:9999], first(1)[:9999])
    drawn = draw(Corpus.open([corpus]), FitSettings(codebook_size=8, max_seconds=12), quiet=True)
    assert 10.8 <= drawn.seconds <= 12


def test_what_cannot_be_used_is_named_and_counted(tmp_path, capsys):
    records = [record(f"v{i}", {"wav": encode(voice(1.5, i), 16_000)}) for i in range(12)]
    records += [
        record("silent", {"wav": encode(np.zeros(16_000, np.float32), 16_000)}),
        record("short", {"wav": encode(voice(0.05, 1), 16_000)}),
        record("long", {"flac": encode(voice(40.0, 1, 8000), 8000, "flac")}),
    ]
    pattern = shards(tmp_path / "shards", records)
    tar = next((tmp_path / "shards").glob("*.tar"))
    payload = tar.read_bytes()
    at = payload.index(encode(voice(1.5, 4), 16_000)) + 1000
    tar.write_bytes(payload[:at] + bytes([payload[at] ^ 255]) + payload[at + 1 :])
    assert main([str(tmp_path / "codec"), f"shards={pattern}", *TINY, "max_seconds=1000"]) == 0
    said = capsys.readouterr().out
    assert "2 members left out, 1 used only for their first 30 s" in said
    assert ":silent: .wav: silent throughout" in said and ":v4: .wav has changed since its index was made" in said


def test_blocks_are_also_those_from_half_a_block_on():
    mel = torch.arange(24 * 80, dtype=torch.float32).reshape(24, 80)
    blocks = blocks_of([mel, mel[:8]], FitSettings(blocks=10**6))
    assert blocks.shape == (3 + 2 + 1, BLOCK_VALUES)
    assert torch.equal(blocks[3], mel[4:12].flatten()) and torch.equal(blocks[5], mel[:8].flatten())
    few = blocks_of([mel, mel[:8]], FitSettings(blocks=4))
    assert len(few) == 4 and all((blocks == block).all(1).any() for block in few)


def test_crops_match_their_sound():
    wave = torch.from_numpy(np.concatenate([voice(1.6, 3, 24_000), voice(1.6, 5, 24_000)]))
    mel = log_mel(wave)
    quantizer = fit_quantizer(mel.reshape(-1, BLOCK_VALUES), 4, 8, 16, 0, lambda: None)
    batches = crops(wave, mel, quantizer.encode(mel), quantizer, seed=0)
    exact = 0
    for _ in range(10):
        mels, waves = next(batches)
        assert mels.shape == (8, 104, 80) and waves.shape == (8, 13 * 1920)
        heard = log_mel(waves)[:, 4:-4]  # at the ends other sound goes on
        distances = (heard - mels[:, 4:-4]).square().mean((1, 2)).sqrt()
        others = (heard - mels.roll(1, 0)[:, 4:-4]).square().mean((1, 2)).sqrt()
        assert distances.mean() < 0.5 * others.mean()
        exact += int((distances < 1e-3).sum())
    assert 10 < exact < 40, "about 0.3 of 80"
    again = next(crops(wave, mel, quantizer.encode(mel), quantizer, seed=0))
    first = next(crops(wave, mel, quantizer.encode(mel), quantizer, seed=1))
    assert torch.equal(again[1], next(crops(wave, mel, quantizer.encode(mel), quantizer, seed=0))[1])
    assert not torch.equal(again[1], first[1])


# what is wrong


def refused(capsys, *arguments: object) -> str:
    """The one line of an error."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in said.err and not said.out
    return line


def test_a_corpus_without_sound(tmp_path, capsys):
    pattern = shards(tmp_path / "shards", [written("a"), written("b")])
    assert "the shards have no usable sound" in refused(capsys, tmp_path / "codec", f"shards={pattern}")
    assert not (tmp_path / "codec").exists()


def test_a_corpus_of_silence(tmp_path, capsys):
    pattern = shards(tmp_path / "shards", [record("a", {"wav": encode(np.zeros(16_000, np.float32), 16_000)})])
    line = refused(capsys, tmp_path / "codec", f"shards={pattern}")
    assert "the first left out: shard-000000.tar:a: .wav: silent throughout" in line


def test_a_corpus_with_too_little_sound(tmp_path, capsys):
    pattern = shards(tmp_path / "shards", [spoken(f"k{i}", 1.0) for i in range(10)])
    line = refused(capsys, tmp_path / "codec", f"shards={pattern}")
    assert "9 s of sound to fit to, but codebook_size=512 needs 83 s: give more shards" in line
    lone = shards(tmp_path / "lone", [spoken("k", 5.0)])
    line = refused(capsys, tmp_path / "codec", f"shards={lone}", "codebook_size=8")
    assert "0 s of sound to fit to, but codebook_size=8 needs 2 s" in line, "the one utterance is held out"


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "usage: python -m data.fit_codec OUT shards=PATTERN"),
        (["OUT"], "usage: .*codebook_size=512"),
        (["shards=x.tar"], "usage: "),
        (["OUT", "OTHER", "shards=x.tar"], "usage: "),
        (["OUT", "shards=x.tar", "codebook=8"], "codebook: no such setting; there are shards, codebooks, "),
        (["OUT", "shards=x.tar", "codebooks=-1"], "codebooks=-1: must be a whole number"),
        (["OUT", "shards=x.tar", "codebooks=many"], "codebooks=many: must be a whole number"),
        (["OUT", "shards=x.tar", "codebooks=0"], "codebooks must be a whole number from 1 to 64, not 0"),
        (["OUT", "shards=x.tar", "codebook_size=1"], "codebook_size must be a whole number from 2 to 65536"),
        (["OUT", "shards=x.tar", "blocks=2000"], "blocks=2000: codebook_size=512 needs 2048"),
        (["OUT", "shards=x.tar", "vocoder_steps=0"], "vocoder_steps=0: must be above 0"),
        (["OUT", "shards=x.tar", "max_seconds=0"], "max_seconds=0: must be above 0"),
        (["OUT", "shards=absent.tar"], "absent.tar"),
    ],
)
def test_command_lines_that_are_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(capsys, *arguments))
    assert not list(tmp_path.iterdir())


def test_patterns_are_told_apart_by_commas_outside_of_braces():
    _, patterns, settings = parse(["out", "shards=a-{1..3}.tar,b-{x,y}.tar", "shards=c.tar", "seed=7"])
    assert patterns == ["a-{1..3}.tar", "b-{x,y}.tar", "c.tar"] and settings == FitSettings(seed=7)


def test_a_folder_that_exists_is_kept(corpus, tmp_path, capsys):
    (tmp_path / "note").write_text("mine")
    assert "exists; delete it or choose another folder" in refused(capsys, tmp_path, f"shards={corpus}", *TINY)
    assert files(tmp_path) == {"note": b"mine"}


@pytest.mark.parametrize("where", ["train_vocoder", "fit_quantizer", "decode", "save"])
def test_an_interrupt_leaves_nothing(corpus, tmp_path, monkeypatch, capsys, where):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if where == "save":
        monkeypatch.setattr(kmeans_codec, "write_atomically", stop)
    else:
        monkeypatch.setattr(fit_codec, where, stop)
    assert main([str(tmp_path / "codec"), f"shards={corpus}", *TINY]) == 130
    assert "interrupted: nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


# decoding at 24 kHz


@pytest.mark.parametrize("rate,kind", [(8000, "wav"), (16_000, "flac"), (24_000, "wav"), (44_100, "flac")])
def test_sound_is_decoded_at_another_rate(rate, kind):
    wave = decode(encode(tone(rate, 0.5, 440.0), rate, kind), rate=24_000)
    assert len(wave) == 12_000
    spectrum = np.abs(np.fft.rfft(wave[2000:10_000] * np.hanning(8000)))
    assert spectrum.argmax() * 24_000 / 8000 == pytest.approx(440, abs=3)
    assert np.abs(wave[2000:10_000]).max() == pytest.approx(0.5, abs=0.01)


def test_too_short_is_too_short_at_any_rate():
    with pytest.raises(BadSample, match="480 samples at 24 kHz, at least 600 needed"):
        decode(encode(tone(24_000, 0.02), 24_000), rate=24_000)
    with pytest.raises(DataError, match="320 samples at 16 kHz, at least 400 needed"):
        decode(encode(tone(24_000, 0.02), 24_000))
