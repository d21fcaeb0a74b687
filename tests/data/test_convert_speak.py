"""Converters with --speak, and answers with speech in lists of messages: text-to-speech samples of recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.codes import encode_shards
from data.convert import main
from data.corpus import Corpus
from data.sample import SampleRecord, Speech, media_of, speech_of
from data.sources import MediaFolder
from data.sources_cut import read_cut
from tests.data.convert_kit import clip, converts, counts, fails, media_folder, samples, tree, write_lines
from tests.data.test_codes import ToyCodec

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
NAMES = "zero,one,two,three,four,five,six,seven,eight,nine"


def check_spoken(record: SampleRecord, asked: str, text: str, speech: Speech) -> None:
    assert record.messages[0] == {"role": "user", "content": asked}
    assert record.messages[1]["content"][0] == {"type": "text", "text": text}
    assert len(record.messages) == 2 and len(record.messages[1]["content"]) == 2
    assert not media_of(record) and speech_of(record) == speech and record.speaker == speech.speaker


def wavs_folder(folder: Path) -> Path:
    folder.mkdir()
    for label in range(2):
        for place, speaker in enumerate(("ann", "bob", "cat")):
            for take in range(4):
                (folder / f"{label}_{speaker}_{take}.wav").write_bytes(clip(0.2 + 0.01 * take, 300 + 50 * place))
    return folder


def test_wavs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, out = wavs_folder(tmp_path / "wavs"), tmp_path / "out"
    (folder / "2_ann_0.wav").write_bytes(clip())
    options = ("--names", "zero,one", "--eval-speaker", "cat", "--holdout", "0.25", "--language", "en", "--speak")
    printed = converts(capsys, "wavs", folder, out, *options)
    assert [counts(printed, split)[0] for split in ("train", "heldout", "speaker")] == [12, 4, 8]
    assert counts(printed)[2] == 1 and "2_ann_0.wav: label is not among --names: 2" in printed
    assert "answers with speech: 24; python -m data.codes" in printed
    for split in ("train", "heldout", "speaker"):
        for key, record in samples(out / split).items():
            text, speaker = ("zero", "one")[int(key[0])], key.split("_")[1]
            check_spoken(record, "Say it.", text, Speech("speech.wav", speaker))
            assert (speaker == "cat") == (split == "speaker") and record.language == "en"
    found = encode_shards(Corpus.open([str(out / "*/*.tar")]), ToyCodec())
    assert {name: count for name, (count, _) in found.speakers.items()} == {"ann": 8, "bob": 8, "cat": 8}
    assert not found.left_out


def test_instructions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A transcript is put in as it is, whatever braces it has."""
    folder = tmp_path / "wavs"
    folder.mkdir()
    (folder / "a_ann_0.wav").write_bytes(clip())
    for given in ("", " "):
        line = fails(capsys, "wavs", folder, tmp_path / "out", "--speak", "--instruction", given)
        assert line.endswith("--instruction is empty: with --speak the user has to ask something\n")
    options = ("--names", "a={text} {0}", "--speak", "--instruction", "Read “{text}” twice: {text} {x}")
    converts(capsys, "wavs", folder, tmp_path / "out", *options)
    (record,) = samples(tmp_path / "out/train").values()
    asked = "Read “{text} {0}” twice: {text} {0} {x}"
    check_spoken(record, asked, "{text} {0}", Speech("speech.wav", "ann"))


def test_kaldi(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "text").write_text("u1 one\nu2 two\nu3\nu4 four\n")
    (folder / "wav.scp").write_text("rec r.wav\n")
    (folder / "segments").write_text("u1 rec 0.5 0.75\nu2 rec 0 -1\nu3 rec 0 1\nu4 rec 0.1 0.2\n")
    (folder / "utt2spk").write_text("u1 ann\nu4 bob\n")
    (folder / "r.wav").write_bytes(clip(2.0))
    printed = converts(capsys, "kaldi", folder, tmp_path / "out", "--speak")
    assert counts(printed) == (2, 1, 2) and "text:3: no text: u3" in printed
    assert "text:2: no speaker: --speaker NAME is that of rows that name none" in printed
    found = samples(tmp_path / "out/train")
    check_spoken(found["u1"], "Say it.", "one", Speech("speech.flac", "ann"))
    assert found["u1"].media == {"speech.flac": read_cut(folder / "r.wav", "r", 0.5, 0.25)}
    assert counts(converts(capsys, "kaldi", folder, tmp_path / "more", "--speak", "--speaker", "eve")) == (3, 1, 1)
    found = samples(tmp_path / "more/train")
    assert {key: record.speaker for key, record in found.items()} == {"u1": "ann", "u2": "eve", "u4": "bob"}
    assert found["u2"].media == {"speech.wav": (folder / "r.wav").read_bytes()}  # a whole recording keeps its bytes


def test_lhotse_and_nemo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "r.wav").write_bytes(clip(2.0))
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "r.wav"}], "duration": 2.0}
    words = {"text": "hello", "speaker": "ann", "start": 0.0}
    cut = {"id": "c1", "start": 0.5, "duration": 1.0, "channel": 0, "recording": recording, "supervisions": [words]}
    several = [words, {**words, "speaker": "bob", "start": 0.5}]
    cuts = write_lines(tmp_path / "cuts.jsonl", cut, {**cut, "id": "c2", "supervisions": several})
    printed = converts(capsys, "lhotse", cuts, tmp_path / "lhotse", "--speak")
    assert counts(printed) == (1, 1, 1) and "cuts.jsonl:2: no speaker" in printed  # two speak: neither is the voice
    check_spoken(samples(tmp_path / "lhotse/train")["c1"], "Say it.", "hello", Speech("speech.flac", "ann"))

    row = {"audio_filepath": "r.wav", "text": "hello"}
    rows = write_lines(tmp_path / "nemo.json", {**row, "speaker": "ann"}, row, {**row, "text": " "}, {**row, "text": 1})
    printed = converts(capsys, "nemo", rows, tmp_path / "nemo", "--speak", "--speaker", "bob")
    assert counts(printed) == (2, 1, 2) and "nemo.json:3: no transcript: its text is empty" in printed
    one, two = samples(tmp_path / "nemo/train").values()
    check_spoken(one, "Say it.", "hello", Speech("speech.wav", "ann"))
    check_spoken(two, "Say it.", "hello", Speech("speech.wav", "bob"))


def test_manifests(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    media_folder(tmp_path / "media")
    row = {"audio": "b.flac", "text": "hello", "speaker": "ann"}
    path = write_lines(
        tmp_path / "list.jsonl",
        row | {"key": "k", "language": "en"},
        row | {"image": "red.png"},
        row | {"audio": ["a.wav", "b.flac"]},
        row | {"audio": []},
        row | {"audio": "red.png"},
        row | {"audio": "gone.wav"},
        row | {"text": ""},
        {"audio": "a.wav", "text": "hello"},
        {"audio": "a.wav", "speaker": "ann"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"segments": [{"type": "text", "text": "a"}]},
    )
    options = ("--media", tmp_path / "media", "--speak")
    printed = converts(capsys, "manifest", path, tmp_path / "out", *options)
    assert counts(printed) == (1, 1, 10)
    for reason in (
        "no recording with its transcript",
        "not one recording: --speak takes one, the row has 2",
        "not one recording: --speak takes one, the row has 0",
        "unknown extension of speech: red.png",
        "no such file: gone.wav",
        "no transcript: its text is empty",
        "no speaker: --speaker NAME is that of rows that name none",
        "list.jsonl:9: no recording with its transcript",  # there is no text
        "list.jsonl:10: no recording with its transcript",
    ):
        assert reason in printed
    (record,) = samples(tmp_path / "out/train").values()
    check_spoken(record, "Say it.", "hello", Speech("speech.flac", "ann"))
    assert record.key == "k" and record.media == {"speech.flac": (tmp_path / "media/b.flac").read_bytes()}


def test_dry_runs_workers_and_going_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = wavs_folder(tmp_path / "wavs")
    options = ("wavs", folder, tmp_path / "one", "--speak", "--samples-per-shard", 5)
    dry = converts(capsys, *options, "--dry-run")
    assert not (tmp_path / "one").exists() and "answers with speech: 24" in dry
    assert counts(converts(capsys, *options)) == counts(dry)
    converts(capsys, *("wavs", folder, tmp_path / "two", *options[3:]), "--workers", 2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    error = fails(capsys, "wavs", folder, tmp_path / "one", "--samples-per-shard", 5)
    assert "was begun with other options: speak was True, is False" in error


def test_options_that_an_older_version_did_not_know(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, out = wavs_folder(tmp_path / "wavs"), tmp_path / "out"
    converts(capsys, "wavs", folder, out)
    journal = out / "convert.jsonl"
    older = journal.read_text().replace(', "speak": false, "speaker": ""', "")
    assert older != journal.read_text()
    journal.write_text(older)
    assert counts(converts(capsys, "wavs", folder, out)) == (24, 1, 0)
    assert "speak was None, is True" in fails(capsys, "wavs", folder, out, "--speak")


@pytest.mark.parametrize("kind", ["text", "hf", "llava", "swift"])
def test_kinds_without_transcripts_do_not_speak(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([kind, "a", "b", "--speak"])
    assert "unrecognized arguments: --speak" in capsys.readouterr().err


def answered(speech: Any, text: str = "seven", speaker: Any = "x") -> dict[str, Any]:
    """A row whose last answer has speech."""
    said = {"type": "speech", "speech": speech, "speaker": speaker}
    heard = {"type": "audio", "audio": "a.wav"}
    return {
        "messages": [
            {"role": "user", "content": [heard, {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": text}, said]},
        ]
    }


@pytest.mark.parametrize("kind", ["manifest", "llava", "swift"])
def test_messages_with_paths_of_speech(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    media_folder(tmp_path / "media")
    (tmp_path / "media/sub.folder").mkdir()
    (tmp_path / "media/sub.folder/b.v2.FLAC").write_bytes(clip(0.5, 500, "flac"))
    twice = answered("a.wav")
    twice["messages"][1]["content"].append({"type": "speech", "speech": "b.flac"})
    early = {"messages": [*answered("a.wav")["messages"], {"role": "user", "content": "And?"}]}
    path = write_lines(
        tmp_path / "list.jsonl",
        answered("sub.folder/b.v2.FLAC"),
        answered("gone.wav"),
        answered("red.png"),
        answered("../list.jsonl"),
        answered("../outside.wav"),
        answered(3),
        answered("a.wav", text=" "),
        answered("a.wav", speaker=7),
        answered("zero.wav"),
        twice,
        early,
        answered("http://host/a.wav"),
    )
    (tmp_path / "outside.wav").write_bytes(clip())
    printed = converts(capsys, kind, path, tmp_path / "out", "--media", tmp_path / "media")
    assert counts(printed) == (1, 1, 11), printed
    for reason in (
        "list.jsonl:2: no such file: gone.wav",
        "list.jsonl:3: unknown extension of speech: red.png",
        "list.jsonl:4: unknown extension of speech: ../list.jsonl",
        "list.jsonl:5: path leaves the media folder: ../outside.wav",
        "list.jsonl:7: messages[1]: speech without its transcript",
        "list.jsonl:8: messages[1].content[1].speaker must be",
        "list.jsonl:9: empty file: zero.wav",
        "list.jsonl:10: messages[1].content[2]: speech belongs to the last turn",
        "list.jsonl:11: messages[1].content[1]: speech belongs to the last turn",
        "list.jsonl:12: speech is an address, not a file",
    ):
        assert reason in printed, printed
    (record,) = samples(tmp_path / "out/train").values()
    assert speech_of(record) == Speech("speech.flac", "x") and [m.extension for m in media_of(record)] == ["wav"]
    assert record.media == {
        "wav": (tmp_path / "media/a.wav").read_bytes(),
        "speech.flac": (tmp_path / "media/sub.folder/b.v2.FLAC").read_bytes(),
    }


def test_documents_have_no_speech(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(clip())
    part = {"type": "speech", "speech": "a.wav"}
    path = write_lines(tmp_path / "list.jsonl", {"segments": [{"type": "text", "text": "a"}, part]})
    assert "speech" in fails(capsys, "manifest", path, tmp_path / "out")


def test_speech_is_looked_for_as_audio_is(tmp_path: Path) -> None:
    folder = MediaFolder(tmp_path)
    assert folder.find("speech", "a/b.wav") == folder.find("audio", "a/b.wav") == ("wav", tmp_path / "a/b.wav")


def test_real_digits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tar = SHARED / "fsdd_dev.tar"
    if not tar.is_file():
        pytest.skip("the recordings of spoken digits are absent")
    options = ("--names", NAMES, "--eval-speaker", "nicolas", "--holdout", "0.1", "--language", "en", "--speak")
    printed = converts(capsys, "wavs", tar, tmp_path / "out", *options)
    speakers = {}
    for split in ("train", "heldout", "speaker"):
        found = samples(tmp_path / "out" / split)
        assert len(found) == counts(printed, split)[0] > 0 and counts(printed, split)[2] == 0
        speakers[split] = {record.speaker for record in found.values()}
        for key, record in found.items():
            text = NAMES.split(",")[int(key[0])]
            check_spoken(record, "Say it.", text, Speech("speech.wav", key.split("_")[1]))
    assert speakers["train"] == speakers["heldout"] and speakers["speaker"] == {"nicolas"}
