"""Converters: wavs, manifests and saved datasets to shards, bytes kept, everything left out is counted."""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data.convert import main, parse_names
from data.errors import DataError
from data.sample import parse_sample
from data.shard_index import ShardIndex
from data.tokenizer import load_tokenizer, train_tokenizer
from tests.data.audio_bytes import encode, tone

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
SPEAKERS = ("ann", "bob", "cat")


@pytest.fixture
def wavs(tmp_path: Path) -> Path:
    folder = tmp_path / "wavs"
    folder.mkdir()
    for label in range(2):
        for place, speaker in enumerate(SPEAKERS):
            for take in range(5):
                clip = encode(tone(8_000, 0.2 + 0.01 * take, hz=300 + 50 * place), 8_000)
                (folder / f"{label}_{speaker}_{take}.wav").write_bytes(clip)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = file.read()
    return found


def keys(folder: Path) -> set[str]:
    return {name.partition(".")[0] for name in members(folder)}


def test_wavs(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--names", "zero,one", "--eval-speaker", "cat", "--holdout", "0.1", "--language", "en")
    status, printed, _ = run(capsys, "wavs", wavs, out, *options)
    assert status == 0
    assert "train: 18 samples in 1 shards, 0 left out" in printed
    assert "heldout: 2 samples" in printed and "speaker: 10 samples" in printed
    train, heldout, speaker = (keys(out / name) for name in ("train", "heldout", "speaker"))
    assert not train & heldout and speaker == {key for key in train | heldout | speaker if "_cat_" in key}
    assert len(train | heldout | speaker) == 30
    found = members(out / "train")
    name = sorted(train)[0]
    assert found[f"{name}.wav"] == (wavs / f"{name}.wav").read_bytes()
    record, clips = parse_sample(name, found[f"{name}.json"])
    assert clips == ["wav"] and record.messages[1]["content"][0]["text"] == ("zero" if name[0] == "0" else "one")
    assert (record.language, record.source, record.speaker) == ("en", "wavs", name.split("_")[1])
    fingerprint = load_tokenizer(out / "tokenizer").fingerprint
    for shard in out.glob("*/*.tar"):
        assert ShardIndex.open(shard).about["tokenizer"] == fingerprint


def test_a_tar_gives_the_same_as_its_folder(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "wavs.tar", "w") as tar:
        tar.add(wavs, arcname="some/folder")
    options = ("--eval-speaker", "ann", "--holdout", "0.2", "--seed", "3")
    for source, out in ((wavs, "a"), (tmp_path / "wavs.tar", "b")):
        assert run(capsys, "wavs", source, tmp_path / out, *options)[0] == 0
    for split in ("train", "heldout", "speaker"):
        assert members(tmp_path / "a" / split) == members(tmp_path / "b" / split)
    assert run(capsys, "wavs", wavs, tmp_path / "c", *options[:-1], "4")[0] == 0
    assert keys(tmp_path / "c" / "heldout") != keys(tmp_path / "a" / "heldout")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../x_y_1.wav", tarfile.REGTYPE), ("/x_y_1.wav", tarfile.REGTYPE), ("a_b_1.wav", tarfile.SYMTYPE)],
)
def test_hostile_tars(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, kind: bytes) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info, io.BytesIO(b""))
    assert "refused: member" in fails(capsys, "wavs", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_tar_is_not_unpacked(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "wavs.tar.gz", "w:gz") as tar:
        tar.add(wavs, arcname=".")
    assert "not a plain tar" in fails(capsys, "wavs", tmp_path / "wavs.tar.gz", tmp_path / "out")


def test_what_cannot_be_used_is_counted(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    (wavs / "README.txt").write_text("hello")
    (wavs / "0_ann.wav").write_bytes(b"")
    (wavs / "0_ann_7.wav").write_bytes(b"RIFF no sound")
    (wavs / "1_ann_7.wav").write_bytes(encode(tone(8_000)[:0], 8_000))
    (wavs / "2_ann_0.wav").write_bytes(encode(tone(8_000), 8_000))
    status, printed, _ = run(capsys, "wavs", wavs, tmp_path / "out", "--names", "zero,one")
    assert status == 0 and "train: 30 samples in 1 shards, 5 left out" in printed
    for line in (
        "README.txt: is not named label_speaker_number.wav",
        "0_ann.wav: is not named",
        "0_ann_7: audio cannot be decoded",
        "1_ann_7: audio has zero length",
        "2_ann_0.wav: label '2' is not among --names",
    ):
        assert line in printed


def test_wavs_errors(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such folder or tar" in fails(capsys, "wavs", tmp_path / "none", out)
    assert "--eval-speaker eve" in fails(capsys, "wavs", wavs, out, "--eval-speaker", "eve")
    assert "there are ann, bob, cat" in fails(capsys, "wavs", wavs, out, "--eval-speaker", "eve")
    assert "--holdout 1.0" in fails(capsys, "wavs", wavs, out, "--holdout", "1.0")
    assert "nothing to convert" in fails(capsys, "wavs", wavs, out, "--eval-speaker", "ann,bob,cat", "--names", "a=b")
    assert "nothing to convert" in fails(capsys, "wavs", tmp_path, out)
    assert "tokenizer.json: no such file" in fails(capsys, "wavs", wavs, out, "--tokenizer", tmp_path)
    assert run(capsys, "wavs", wavs, out)[0] == 0
    assert "already holds" in fails(capsys, "wavs", wavs, out)


def test_names() -> None:
    assert parse_names("zero, one") == {"0": "zero", "1": "one"}
    assert parse_names("yes=oui,no=non") == {"yes": "oui", "no": "non"}
    assert parse_names("") == {}
    with pytest.raises(DataError, match="throughout"):
        parse_names("zero,1=one")


def test_given_tokenizer_is_used(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    train_tokenizer(["other words"], 300).save(tmp_path / "tok")
    assert run(capsys, "wavs", wavs, tmp_path / "out", "--tokenizer", tmp_path / "tok")[0] == 0
    ours, theirs = (load_tokenizer(folder).fingerprint for folder in (tmp_path / "out/tokenizer", tmp_path / "tok"))
    assert ours == theirs


def write_manifest(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_manifest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    clips = {"a.flac": "flac", "b.mp3": "mp3", "c.opus": "opus", "d.WAV": "wav"}
    for name, kind in clips.items():
        (tmp_path / name).write_bytes(encode(tone(16_000), 16_000, kind))
    audio_part = {"type": "audio", "audio": "c.opus"}
    messages = [
        {"role": "user", "content": [audio_part, {"type": "text", "text": "and"}, {"type": "audio", "audio": "d.WAV"}]},
        {"role": "assistant", "content": "two clips"},
    ]
    path = write_manifest(
        tmp_path / "list.jsonl",
        {"audio": "a.flac", "text": "eins", "language": "de", "speaker": "eva", "key": "first"},
        "",
        {"audio": str(tmp_path / "b.mp3"), "text": "two"},
        {"messages": messages},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no audio"}]},
        {"audio": "gone.wav", "text": "gone"},
    )
    status, printed, _ = run(capsys, "manifest", path, tmp_path / "out", "--language", "en")
    assert status == 0 and "4 samples in 1 shards, 1 left out" in printed
    assert "list-00000006: " in printed and "gone.wav: No such file" in printed
    found = members(tmp_path / "out/train")
    record, clips_of_first = parse_sample("first", found["first.json"])
    assert clips_of_first == ["0.flac"] and found["first.0.flac"] == (tmp_path / "a.flac").read_bytes()
    assert (record.language, record.speaker, record.source) == ("de", "eva", "list")
    record, two = parse_sample("list-00000004", found["list-00000004.json"])
    assert two == ["0.opus", "1.wav"] and record.language == "en"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "must be a JSON object"),
        ({"audio": "a.wav"}, 'needs "audio" and "text"'),
        ({"audio": "a.wav", "text": 3}, '"text" must be a string'),
        ({"audio": "a.exe", "text": "x"}, "a.exe: is none of wav"),
        ({"audio": "a.wav", "text": "x", "txt": ""}, "unknown field txt"),
        ({"messages": [], "text": ""}, "not both"),
        ({"messages": [{"role": "user"}]}, r"messages[0].content"),
    ],
)
def test_manifest_errors_name_the_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: Any, reason: str
) -> None:
    path = write_manifest(tmp_path / "list.jsonl", {"audio": "a.wav", "text": "x"}, line)
    error = fails(capsys, "manifest", path, tmp_path / "out")
    assert "list.jsonl:2: " in error and reason in error


def test_manifest_that_is_absent_or_binary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "No such file" in fails(capsys, "manifest", tmp_path / "none.jsonl", tmp_path / "out")
    (tmp_path / "list.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "list.jsonl:1: " in fails(capsys, "manifest", tmp_path / "list.jsonl", tmp_path / "out")


def saved_dataset(folder: Path, splits: bool) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional extra hf is absent")
    clip = encode(tone(8_000), 8_000)
    stored = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "speaker": datasets.Value("string"),
        }
    )
    audio = [{"bytes": clip, "path": "x.wav"}, {"bytes": clip, "path": None}, None, {"bytes": b"?", "path": None}]
    columns = {"audio": audio, "text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1], "speaker": list("wxyz")}
    rows = datasets.Dataset.from_dict(columns, features=stored)
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    (datasets.DatasetDict({"train": rows, "test": rows}) if splits else rows).save_to_disk(str(folder))


@pytest.mark.parametrize("splits", [False, True])
def test_saved_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path, splits: bool) -> None:
    saved_dataset(tmp_path / "saved", splits)
    capsys.readouterr()
    out = tmp_path / "out"
    status, printed, _ = run(capsys, "hf", tmp_path / "saved", out, "--text-column", "label", "--language", "en")
    assert status == 0 and printed.count("2 samples in 1 shards, 2 left out") == (2 if splits else 1)
    assert "train row 2: 'audio' is empty" in printed
    assert "train row 3: 'audio' is neither wav, flac, mp3 nor ogg" in printed
    found = members(out / "train")
    record, clips = parse_sample("train-00000001", found["train-00000001.json"])
    assert clips == ["wav"] and found["train-00000001.wav"] == encode(tone(8_000), 8_000)
    assert record.messages[1]["content"][0]["text"] == "yes"
    assert (record.language, record.speaker, record.source) == ("en", "x", "saved")
    assert (out / "test").exists() == splits


def test_saved_dataset_errors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_dataset(tmp_path / "saved", splits=False)
    capsys.readouterr()
    assert "no column 'sentence'" in fails(
        capsys, "hf", tmp_path / "saved", tmp_path / "out", "--text-column", "sentence"
    )
    assert "not of the Audio type" in fails(
        capsys, "hf", tmp_path / "saved", tmp_path / "out", "--audio-column", "speaker"
    )
    assert "not a dataset saved with" in fails(capsys, "hf", tmp_path, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "omniloom[hf]"' in fails(capsys, "hf", tmp_path / "saved", tmp_path / "out")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared with real recordings is absent")
def test_real_recordings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--eval-speaker", "nicolas", "--holdout", "0.1")
    status, printed, _ = run(capsys, "wavs", SHARED / "fsdd_dev.tar", tmp_path, *options)
    assert status == 0
    assert "train: 1350 samples in 2 shards, 0 left out" in printed
    assert "heldout: 150 samples" in printed and "speaker: 500 samples" in printed
