"""Converters: clips by name; what all kinds share: safety, dry runs, workers, options, the table at the end."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from data.convert import main, parse_names
from data.convert_report import kind_of
from data.errors import DataError
from data.shard_index import ShardIndex
from data.tokenizer import load_tokenizer, train_tokenizer
from tests.data.audio_bytes import encode, tone
from tests.data.convert_kit import (
    clip,
    converts,
    counts,
    fails,
    keys,
    media_folder,
    members,
    run,
    said,
    samples,
    tree,
    write_lines,
)

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
SPEAKERS = ("ann", "bob", "cat")


@pytest.fixture
def wavs(tmp_path: Path) -> Path:
    folder = tmp_path / "wavs"
    folder.mkdir()
    for label in range(2):
        for place, speaker in enumerate(SPEAKERS):
            for take in range(5):
                payload = encode(tone(8_000, 0.2 + 0.01 * take, hz=300 + 50 * place), 8_000)
                (folder / f"{label}_{speaker}_{take}.wav").write_bytes(payload)
    return folder


def test_wavs(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--names", "zero,one", "--eval-speaker", "cat", "--holdout", "0.1", "--language", "en")
    printed = converts(capsys, "wavs", wavs, out, *options)
    assert counts(printed) == (18, 1, 0) and counts(printed, "heldout") == (2, 1, 0)
    assert counts(printed, "speaker") == (10, 1, 0) and counts(printed, "all") == (30, 3, 0)
    train, heldout, speaker = (keys(out / name) for name in ("train", "heldout", "speaker"))
    assert not train & heldout and speaker == {key for key in train | heldout | speaker if "_cat_" in key}
    assert len(train | heldout | speaker) == 30
    name = sorted(train)[0]
    record = samples(out / "train")[name]
    assert record.media == {"wav": (wavs / f"{name}.wav").read_bytes()}
    assert said(record) == ("zero" if name[0] == "0" else "one")
    assert record.messages[0]["content"][1]["text"] == "Transcribe."
    assert (record.language, record.source, record.speaker) == ("en", "wavs", name.split("_")[1])
    fingerprint = load_tokenizer(out / "tokenizer").fingerprint
    for shard in out.glob("*/*.tar"):
        assert ShardIndex.open(shard).about["tokenizer"] == fingerprint


def test_a_tar_gives_the_same_as_its_folder(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "wavs.tar", "w") as tar:
        tar.add(wavs, arcname="some/folder")
    options = ("--eval-speaker", "ann", "--holdout", "0.2", "--seed", "3")
    for source, out in ((wavs, "a"), (tmp_path / "wavs.tar", "b")):
        converts(capsys, "wavs", source, tmp_path / out, *options)
    for split in ("train", "heldout", "speaker"):
        assert members(tmp_path / "a" / split) == members(tmp_path / "b" / split)
    converts(capsys, "wavs", wavs, tmp_path / "c", *options[:-1], "4")
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
    (wavs / "0_bob_8.wav").write_bytes(b"")
    (wavs / "0_bob_1.WAV").write_bytes((wavs / "0_bob_1.wav").read_bytes())
    (wavs / "0_ann_7.wav").write_bytes(b"RIFF no sound")
    (wavs / "1_ann_7.wav").write_bytes(encode(tone(8_000)[:0], 8_000))
    (wavs / "2_ann_0.wav").write_bytes(encode(tone(8_000), 8_000))
    printed = converts(capsys, "wavs", wavs, tmp_path / "out", "--names", "zero,one")
    assert counts(printed) == (30, 1, 7)
    assert "       2  not named label_speaker_number.wav\n" in printed
    for line in (
        "README.txt: not named label_speaker_number.wav",
        "0_ann.wav: not named",
        "0_bob_8.wav: empty file: 0_bob_8.wav has 0 bytes",
        "0_bob_1.wav: key occurs twice: 0_bob_1",
        "0_ann_7.wav: audio is none of wav",
        "1_ann_7.wav: audio has zero length",
        "2_ann_0.wav: label is not among --names: 2",
    ):
        assert line in printed


def test_wavs_errors(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such f" in fails(capsys, "wavs", tmp_path / "none", out)
    assert "--eval-speaker eve" in fails(capsys, "wavs", wavs, out, "--eval-speaker", "eve")
    assert "there are ann, bob, cat" in fails(capsys, "wavs", wavs, out, "--eval-speaker", "eve")
    assert "--holdout 1.0" in fails(capsys, "wavs", wavs, out, "--holdout", "1.0")
    assert "nothing to convert" in fails(capsys, "wavs", wavs, out, "--eval-speaker", "ann,bob,cat", "--names", "a=b")
    assert "nothing to convert" in fails(capsys, "wavs", tmp_path, out)
    assert "tokenizer.json: no such file" in fails(capsys, "wavs", wavs, out, "--tokenizer", tmp_path)
    assert not out.exists()


def test_command_line_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert "out: is a file; name a folder to write to" in fails(capsys, "text", tmp_path / "a.txt", _touched(tmp_path))
    for workers in ("0", "-1", "x", "1.5"):
        with pytest.raises(SystemExit):
            main(["text", str(tmp_path / "a.txt"), str(tmp_path / "new"), f"--workers={workers}"])
        assert f"argument --workers: {workers}: must be a whole number, 1 or more" in capsys.readouterr().err


def _touched(folder: Path) -> Path:
    (folder / "out").touch()
    return folder / "out"


def test_names() -> None:
    assert parse_names("zero, one") == {"0": "zero", "1": "one"}
    assert parse_names("yes=oui,no=non") == {"yes": "oui", "no": "non"}
    assert parse_names("") == {}
    with pytest.raises(DataError, match="throughout"):
        parse_names("zero,1=one")


def test_given_tokenizer_is_used(capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path) -> None:
    train_tokenizer(["other words"], 300).save(tmp_path / "tok")
    converts(capsys, "wavs", wavs, tmp_path / "out", "--tokenizer", tmp_path / "tok")
    ours, theirs = (load_tokenizer(folder).fingerprint for folder in (tmp_path / "out/tokenizer", tmp_path / "tok"))
    assert ours == theirs


def mixed_manifest(folder: Path, rows: int = 40) -> Path:
    """Rows about one folder of media, some of which cannot be used."""
    media_folder(folder / "media")
    usable = [
        {"audio": f"media/{'ab'[i % 2]}.{('wav', 'flac')[i % 2]}", "text": f"number {i}"} for i in range(rows - 6)
    ]
    pictures = [
        {"image": ["media/red.png", "media/blue.jpg"], "text": "two"},
        {"video": "media/film.mp4", "text": "grey"},
    ]
    bad = [
        {"audio": "media/zero.wav", "text": "x"},
        {"image": "media/broken.jpg", "text": "x"},
        "{",
        {"audio": "../q.wav", "text": ""},
    ]
    return write_lines(folder / "list.jsonl", *usable[: rows // 2], *bad, *pictures, *usable[rows // 2 :])


def test_the_result_does_not_depend_on_workers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = mixed_manifest(tmp_path)
    printed = [
        converts(capsys, "manifest", path, tmp_path / f"out{workers}", "--samples-per-shard", 7, "--workers", workers)
        for workers in (1, 3)
    ]
    assert printed[0] == printed[1] and counts(printed[0]) == (36, 6, 4)
    assert tree(tmp_path / "out1") == tree(tmp_path / "out3")
    assert len(samples(tmp_path / "out1/train")) == 36
    assert not list((tmp_path / "out3").rglob(".*"))


def test_a_dry_run_writes_nothing_and_tells_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = mixed_manifest(tmp_path)
    before = tree(tmp_path)
    dry = converts(capsys, "manifest", path, tmp_path / "out", "--samples-per-shard", 7, "--dry-run", "--workers", 2)
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()
    wet = converts(capsys, "manifest", path, tmp_path / "out", "--samples-per-shard", 7)
    assert dry.startswith("would be written:\n")
    told, did = (text[text.index("left out, by reason") :] for text in (dry, wet))
    assert told == did and counts(dry) == counts(wet) == (36, 6, 4)

    def cells(text: str) -> list[str]:
        """All of a row but its MB: a dry run does not count a tar's headers."""
        row = next(line for line in text.splitlines() if line.startswith("train")).split()
        return row[:3] + row[4:]

    assert cells(dry) == cells(wet)


def test_shards_end_at_their_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A clip of 0.5 MB: a shard of 1 MB holds two; what a job writes goes on in shard-000000_0001.tar."""
    big = clip(16.0, rate=16_000)
    (tmp_path / "big.wav").write_bytes(big)
    path = write_lines(tmp_path / "list.jsonl", *[{"audio": "big.wav", "text": str(i)} for i in range(5)])
    options = ("--shard-mb", 1)
    assert counts(converts(capsys, "manifest", path, tmp_path / "out", *options, "--dry-run")) == (5, 3, 0)
    assert counts(converts(capsys, "manifest", path, tmp_path / "out", *options)) == (5, 3, 0)
    names = [path.name for path in sorted((tmp_path / "out/train").glob("*.tar"))]
    assert names == ["shard-000000.tar", "shard-000000_0001.tar", "shard-000000_0002.tar"]
    assert [said(record) for record in samples(tmp_path / "out/train").values()] == list("01234")


def test_paths_stay_in_the_media_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    media_folder(tmp_path / "media")
    (tmp_path / "secret.wav").write_bytes(clip())
    os.symlink(tmp_path / "secret.wav", tmp_path / "media/link.wav")
    os.mkfifo(tmp_path / "media/pipe.wav")
    (tmp_path / "media/folder.wav").mkdir()
    paths = ["a.wav", "../secret.wav", str(tmp_path / "secret.wav"), "link.wav", "x/../../secret.wav", "pipe.wav"]
    paths += ["folder.wav", "http://127.0.0.1/a.wav", "sox a.wav -t wav - |", "touch x.wav|", "a\0.wav", "", "~/a.wav"]
    path = write_lines(tmp_path / "lists/list.jsonl", *[{"audio": name, "text": "x"} for name in paths])
    options = ("--media", tmp_path / "media")
    printed = converts(capsys, "manifest", path, tmp_path / "out", *options)
    assert counts(printed) == (1, 1, 12)
    for line in (
        "       4  path leaves the media folder\n",
        "       2  not a regular file\n",
        "       2  audio is a command, which is never run\n",
        "       1  audio without a path\n",
        "       1  no media\n",
        "audio is an address, not a file: http://127.0.0.1/a.wav",
        "no such file: ~/a.wav",
    ):
        assert line in printed
    printed = converts(capsys, "manifest", path, tmp_path / "out2", *options, "--allow-outside")
    assert counts(printed)[0] == 5
    assert "no such folder" in fails(capsys, "manifest", path, tmp_path / "o", "--media", tmp_path / "none")


def test_a_folder_of_another_conversion_is_refused(
    capsys: pytest.CaptureFixture[str], wavs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = converts(capsys, "wavs", wavs, out)
    before = tree(out)
    assert converts(capsys, "wavs", wavs, out) == first and tree(out) == before  # nothing is left to do
    error = fails(capsys, "wavs", wavs, out, "--language", "en", "--holdout", "0.1")
    assert f"{out}: was begun with other options: holdout was 0.0, is 0.1, language was , is en" in error
    (wavs / "new_ann_0.wav").write_bytes(clip())
    assert "the source has changed since it was begun" in fails(capsys, "wavs", wavs, out)
    (out / "convert.jsonl").unlink()
    assert "already holds shards" in fails(capsys, "wavs", wavs, out)


def test_nothing_is_left_where_nothing_can_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "list.jsonl", {"audio": "gone.wav", "text": "x"})
    error = fails(capsys, "manifest", path, tmp_path / "out")
    assert "nothing to convert; list.jsonl:1: no such file: gone.wav" in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    path = write_lines(tmp_path / "list.jsonl", {"audio": "broken.wav", "text": "x"})
    assert "nothing to convert; list.jsonl:1: audio is none of" in fails(capsys, "manifest", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_without_a_usable_sample_is_not_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    media_folder(tmp_path)
    rows = [{"audio": name, "text": "x"} for name in ("a.wav", "broken.wav", "broken.wav", "broken.wav", "b.flac")]
    path = write_lines(tmp_path / "list.jsonl", *rows)
    printed = converts(capsys, "manifest", path, tmp_path / "out", "--samples-per-shard", 2)
    assert counts(printed) == (2, 2, 3) and "       3  audio is none of" not in printed
    assert "       3  audio" in printed and "and 0 more" not in printed
    assert sorted(p.name for p in (tmp_path / "out/train").glob("*.tar")) == ["shard-000000.tar", "shard-000002.tar"]


def test_kinds_of_reasons() -> None:
    assert kind_of("no such file: a1.wav") == "no such file"
    assert kind_of("audio is too short: 300 samples at 16 kHz") == "audio is too short"
    assert kind_of("not UTF-8: byte 3") == "not UTF-8"
    assert kind_of("audio claims 3700 s, the limit is 3600 s") == "audio claims N s, the limit is N s"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared with real recordings is absent")
def test_real_recordings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--eval-speaker", "nicolas", "--holdout", "0.1")
    status, printed, _ = run(capsys, "wavs", SHARED / "fsdd_dev.tar", tmp_path, *options)
    assert status == 0
    assert counts(printed) == (1350, 2, 0)
    assert counts(printed, "heldout") == (150, 1, 0) and counts(printed, "speaker") == (500, 1, 0)
