"""Converters of lists of recordings: Kaldi, Lhotse, NeMo; and the cutting beneath them."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data.audio import decode
from data.errors import BadSample
from data.sources_cut import read_cut
from data.sources_speech import Lookup
from tests.data.audio_bytes import encode
from tests.data.convert_kit import clip, converts, counts, fails, said, samples, write_lines

NOISE = np.random.default_rng(0).integers(-20_000, 20_000, (32_000, 2)).astype(np.int16)  # 2 s at 16 kHz, stereo


def heard(payload: bytes) -> np.ndarray:
    wave, _ = soundfile.read(io.BytesIO(payload), dtype="int16", always_2d=True)
    return wave


def recording(path: Path, kind: str = "wav") -> Path:
    path.write_bytes(encode(NOISE, 16_000, kind))
    return path


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_cut_is_exact(tmp_path: Path, kind: str) -> None:
    path = recording(tmp_path / f"x.{kind}", kind)
    cut = read_cut(path, "x", 0.5, 0.25)
    assert cut.startswith(b"fLaC") and np.array_equal(heard(cut), NOISE[8_000:12_000])
    assert np.array_equal(heard(read_cut(path, "x", 1.5, None)), NOISE[24_000:])
    assert np.array_equal(heard(read_cut(path, "x", 0.0, 0.1, channel=1)), NOISE[:1_600, 1:])
    assert np.array_equal(heard(read_cut(path, "x", 1.9, 0.3)), NOISE[30_400:])  # ends a little late


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "PCM_U8"])
def test_a_cut_of_other_samples(tmp_path: Path, subtype: str) -> None:
    wave = NOISE[:, 0] / 32_768
    (tmp_path / "x.wav").write_bytes(encode(wave, 16_000, "wav", subtype))
    whole, _ = soundfile.read(tmp_path / "x.wav")
    cut, _ = soundfile.read(io.BytesIO(read_cut(tmp_path / "x.wav", "x", 0.5, 0.5)))
    assert np.abs(cut - whole[8_000:16_000]).max() < 2**-23


@pytest.mark.parametrize("kind", ["mp3", "vorbis", "opus"])
def test_a_cut_of_lossy_formats_lies_where_it_should(tmp_path: Path, kind: str) -> None:
    """A seek lands on the same sample as decoding from the start does, but for what a codec needs to settle."""
    times = np.arange(48_000) / 16_000
    wave = (0.5 * np.sin(2 * np.pi * 300 * times * times)).astype(np.float32)  # no two places sound alike
    path = tmp_path / f"x.{kind}"
    path.write_bytes(encode(wave, 16_000, kind))
    whole, _ = soundfile.read(path)
    cut, _ = soundfile.read(io.BytesIO(read_cut(path, "x", 1.0, 1.0)))
    assert len(cut) == 16_000 and np.abs(cut[800:] - whole[16_800:32_000]).max() < 0.02


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((2.5, 0.1), "cut starts outside its recording: at 2.5 s, x has 2 s"),
        ((-1.0, 0.1), "cut starts outside"),
        ((1.0, 1.6), "cut ends outside its recording"),
        ((1.0, 0.0), "cut ends outside"),
        ((0.0, 1.0, 2), "channel is not there: x has 2 channels"),
    ],
)
def test_cuts_that_are_not_there(tmp_path: Path, arguments: tuple, reason: str) -> None:
    path = recording(tmp_path / "x.wav")
    with pytest.raises(BadSample, match=reason):
        read_cut(path, "x", *arguments)


@pytest.mark.parametrize("payload", [b"", b"R", b"\xff", b"RIFF no sound", b"#!AMR\n nothing", bytes(100)])
def test_cuts_of_what_is_no_recording(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "x.wav").write_bytes(payload)
    with pytest.raises(BadSample):
        read_cut(tmp_path / "x.wav", "x", 0.0, 0.1)


def kaldi_folder(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_scp", ".scp")).write_text(text)
    return folder


def test_kaldi(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = kaldi_folder(
        tmp_path / "data",
        text="ann-1 hello there\nann.2\tWELT\nbob-1\nbob-2 gone\nbob-3 piped\neve-1 never recorded\n",
        wav_scp="ann-1 a.wav\nann.2 sub/b.flac\nbob-1 a.wav\nbob-2 c.wav\nbob-3 sph2pipe -f wav a.sph |\nzoe-1 a.wav\n",
        utt2spk="ann-1 ann\nann.2 ann\n",
        utt2lang="ann.2 de\n",
    )
    (folder / "sub").mkdir()
    (folder / "a.wav").write_bytes(clip())
    (folder / "sub/b.flac").write_bytes(clip(kind="flac"))
    printed = converts(capsys, "kaldi", folder, tmp_path / "out", "--language", "en")
    assert counts(printed) == (2, 1, 4)
    for line in (
        "text:3: no text: bob-1",
        "text:4: no such file: c.wav",
        "text:5: audio is a command, which is never run: sph2pipe -f wav a.sph |",
        "text:6: not in wav.scp: eve-1",
        "1 utterances of wav.scp have no line in text: nothing was made of them",
    ):
        assert line in printed
    found = samples(tmp_path / "out/train")
    assert {key: (said(record), record.speaker, record.language) for key, record in found.items()} == {
        "ann-1": ("hello there", "ann", "en"),
        "ann_2": ("WELT", "ann", "de"),
    }
    assert found["ann-1"].media == {"wav": (folder / "a.wav").read_bytes()}


def test_kaldi_segments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = kaldi_folder(
        tmp_path / "data",
        text="u1 one\nu2 two\nu3 three\nu4 four\nu5 five\nu5 five again\n",
        wav_scp="rec r.wav\n",
        segments="u1 rec 0.5 0.75\nu2 rec 1.5 -1\nu3 rec 5 6\nu4 rec one\nu5 rec 0 0.5\nu6 rec 0 1\n",
    )
    recording(folder / "r.wav")
    printed = converts(capsys, "kaldi", folder, tmp_path / "out", "--instruction", "", "--samples-per-shard", 2)
    assert counts(printed) == (3, 2, 3) and "1 utterances of segments have no line in text" in printed
    assert "text:3: cut starts outside its recording" in printed and "text:6: key occurs twice: u5" in printed
    assert "text:4: segment is not 'utterance recording start end': u4 rec one" in printed
    found = samples(tmp_path / "out/train")
    assert np.array_equal(heard(found["u1"].media["flac"]), NOISE[8_000:12_000])
    assert np.array_equal(heard(found["u2"].media["flac"]), NOISE[24_000:])
    assert found["u1"].messages[0]["content"] == [{"type": "audio", "audio": "flac"}]


def test_kaldi_folders_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = kaldi_folder(tmp_path / "data", wav_scp="a a.wav\n")
    assert "lacks the file text" in fails(capsys, "kaldi", folder, tmp_path / "out")
    assert "none: is no Kaldi folder" in fails(capsys, "kaldi", tmp_path / "none", tmp_path / "out")
    kaldi_folder(folder, text="a outside\n", wav_scp=f"a {tmp_path}/x.wav\n")
    (tmp_path / "x.wav").write_bytes(clip())
    assert "path leaves the media folder" in fails(capsys, "kaldi", folder, tmp_path / "out")
    assert counts(converts(capsys, "kaldi", folder, tmp_path / "out", "--allow-outside")) == (1, 1, 0)


def test_a_change_in_any_file_is_seen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = kaldi_folder(tmp_path / "data", text="a one\n", wav_scp="a a.wav\n", utt2spk="a ann\n")
    (folder / "a.wav").write_bytes(clip())
    converts(capsys, "kaldi", folder, tmp_path / "out")
    (folder / "utt2spk").write_text("a bob\n")
    assert "the source has changed" in fails(capsys, "kaldi", folder, tmp_path / "out")


def test_lookups_find_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {f"name{i}": f"name{i} value {i}" for i in range(100)}
    (tmp_path / "table").write_text("\n".join(lines.values()) + "\nname3 again\n")
    lookup = Lookup(tmp_path / "table")
    assert {name: lookup.get(name) for name in lines} == lines and lookup.get("name") is None
    monkeypatch.setattr("data.sources_speech._hash", lambda name: len(name))  # nearly all collide
    assert {name: Lookup(tmp_path / "table").get(name) for name in list(lines)[::9]} == dict(list(lines.items())[::9])


def test_nemo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recording(tmp_path / "r.wav")
    row = {"audio_filepath": "r.wav", "text": "x", "duration": 0.5}
    path = write_lines(
        tmp_path / "manifest.json",
        {**row, "duration": 2.0, "lang": "de", "speaker": "ann", "pnc": "yes"},
        {**row, "offset": 1.0},
        {**row, "offset": "one"},
        {**row, "text": None},
        {**row, "audio_filepath": None},
        {**row, "offset": 9.0},
    )
    printed = converts(capsys, "nemo", path, tmp_path / "out")
    assert counts(printed) == (2, 1, 4) and "manifest.json:3: offset is not a number of seconds: one" in printed
    assert "pnc (1)" in printed
    whole, cut = samples(tmp_path / "out/train").values()
    assert whole.media == {"wav": (tmp_path / "r.wav").read_bytes()} and (whole.language, whole.speaker) == (
        "de",
        "ann",
    )
    assert np.array_equal(heard(cut.media["flac"]), NOISE[16_000:24_000])


def lhotse_recording(name: str, source: str = "r.wav", kind: str = "file", **more: Any) -> dict[str, Any]:
    sources = [{"type": kind, "channels": [0, 1], "source": source}]
    return {"id": name, "sources": sources, "sampling_rate": 16_000, "num_samples": 32_000, "duration": 2.0} | more


def lhotse_cut(name: str, text: str = "words", channel: Any = (0, 1), **more: Any) -> dict[str, Any]:
    supervision = {"id": name, "recording_id": "r", "start": 0.0, "duration": 1.0, "channel": 0, "text": text}
    return {
        "id": name,
        "type": "MultiCut",
        "start": 0.0,
        "duration": 2.0,
        "channel": channel,
        "supervisions": [{**supervision, "language": "en", "speaker": "ann"}],
        "recording": lhotse_recording("r"),
    } | more


def test_lhotse_cuts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recording(tmp_path / "r.wav")
    pieces = [{"start": 1.0, "text": "world", "speaker": "b"}, {"start": 0.1, "text": "hello", "speaker": "a"}]
    path = write_lines(
        tmp_path / "cuts.jsonl",
        lhotse_cut("whole"),
        lhotse_cut("part", type="MonoCut", channel=1, start=0.5, duration=0.25),
        lhotse_cut("two", supervisions=pieces),
        lhotse_cut("mixed", type="MixedCut"),
        lhotse_cut("command", recording=lhotse_recording("r", "sph2pipe x", "command")),
        lhotse_cut("url", recording=lhotse_recording("r", "http://x/r.wav", "url")),
        lhotse_cut("fast", recording=lhotse_recording("r", transforms=[{"name": "Speed"}])),
        lhotse_cut("silent", supervisions=[]),
        lhotse_cut("features", recording=None),
        lhotse_cut("channels", channel=[5]),
        lhotse_cut("whole"),
    )
    printed = converts(capsys, "lhotse", path, tmp_path / "out")
    assert counts(printed) == (3, 1, 8)
    for line in (
        "cuts.jsonl:4: cut is not of one recording: its type is MixedCut",
        "cuts.jsonl:5: audio is a command, which is never run: sph2pipe x",
        "cuts.jsonl:6: recording is no file: its type is url",
        "cuts.jsonl:7: recording is transformed",
        "cuts.jsonl:8: no text",
        "cuts.jsonl:9: no recording",
        "cuts.jsonl:10: channel is not there",
        "cuts.jsonl:11: key occurs twice: whole",
    ):
        assert line in printed
    found = samples(tmp_path / "out/train")
    assert found["whole"].media == {"wav": (tmp_path / "r.wav").read_bytes()}
    assert (found["whole"].language, found["whole"].speaker) == ("en", "ann")
    assert np.array_equal(heard(found["part"].media["flac"]), NOISE[8_000:12_000, 1:])
    assert said(found["two"]) == "hello world" and found["two"].speaker == ""


@pytest.mark.parametrize("packed", [False, True])
def test_lhotse_recordings_and_supervisions(capsys: pytest.CaptureFixture[str], tmp_path: Path, packed: bool) -> None:
    recording(tmp_path / "r.wav")
    supervision = {"recording_id": "r", "start": 0.5, "duration": 0.25, "channel": 0, "text": "x"}
    files = {
        "corpus_recordings_train.jsonl": [lhotse_recording("q", "gone.wav"), lhotse_recording("r")],
        "corpus_supervisions_train.jsonl": [
            {"id": "u1", **supervision},
            {"id": "u2", **supervision, "recording_id": "z"},
        ],
        "corpus_recordings_dev.jsonl": [lhotse_recording("r")],
        "corpus_supervisions_dev.jsonl": [{"id": "v1", **supervision, "start": 1.0}],
    }
    for name, rows in files.items():
        path = write_lines(tmp_path / name, *rows)
        if packed:
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    printed = converts(capsys, "lhotse", tmp_path, tmp_path / "out")
    assert counts(printed) == (1, 1, 1) and counts(printed, "dev") == (1, 1, 0)
    assert f"supervisions_train.jsonl{'.gz' if packed else ''}:2: not in corpus_recordings_train.jsonl" in printed
    assert np.array_equal(heard(samples(tmp_path / "out/train")["u1"].media["flac"]), NOISE[8_000:12_000, :1])
    assert list(samples(tmp_path / "out/dev")) == ["v1"]
    next(tmp_path.glob("corpus_recordings_dev*")).unlink()
    assert "beside it is no corpus_recordings_dev.jsonl" in fails(capsys, "lhotse", tmp_path, tmp_path / "o")


def test_lhotse_folders_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "holds no cuts*.jsonl" in fails(capsys, "lhotse", tmp_path, tmp_path / "out")
    assert "no such file or folder" in fails(capsys, "lhotse", tmp_path / "none", tmp_path / "out")
    (tmp_path / "cuts.jsonl").write_text(json.dumps({"id": 1}) + "\n")
    assert "nothing to convert; cuts.jsonl:1: no recording" in fails(capsys, "lhotse", tmp_path, tmp_path / "out")


def test_a_cut_of_another_codec_is_taken_from_16_khz(tmp_path: Path) -> None:
    """What libsndfile does not read is decoded as the loader would."""
    import av

    path = tmp_path / "x.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(NOISE[None, :, 0].astype(np.float32) / 65_536, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = decode(path.read_bytes())
    cut = decode(read_cut(path, "x", 0.5, 0.5))
    assert len(cut) == 8_000 and np.abs(cut - whole[8_000:16_000]).max() < 1e-4
