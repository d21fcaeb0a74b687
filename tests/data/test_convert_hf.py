"""The converter of Hugging Face datasets: saved to disk and Parquet, stored bytes kept, columns told by their types."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.convert_kit import clip, converts, counts, fails, film, picture, said, samples, tree

datasets = pytest.importorskip("datasets", reason="the optional extra hf is absent")
CLIP = clip()


def stored(*payloads: bytes | None, name: str = "") -> list[dict[str, Any] | None]:
    return [None if payload is None else {"bytes": payload, "path": name or None} for payload in payloads]


def table(columns: dict[str, list], **features: Any) -> Any:
    """A dataset of columns; those of media hold bytes and paths as they are stored."""
    raw = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    media = (datasets.Audio, datasets.Image, datasets.Video)

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.List) and isinstance(feature.feature, media):
            return datasets.List(raw)
        return raw if isinstance(feature, media) else feature

    kinds = {name: features.get(name, datasets.Value("string")) for name in columns}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({n: plain(f) for n, f in kinds.items()}))
    return datasets.Dataset(rows.data.cast(datasets.Features(kinds).arrow_schema))


def spoken(count: int = 4) -> Any:
    audio = [*stored(CLIP, name="x.wav"), *stored(CLIP, None, b"?"), *stored(*[CLIP] * (count - 4))]
    columns = {
        "audio": audio,
        "text": [f"text {i}" for i in range(count)],
        "label": [i % 2 for i in range(count)],
        "speaker": [f"s{i}" for i in range(count)],
    }
    labels = datasets.ClassLabel(names=["no", "yes"])
    return table(columns, audio=datasets.Audio(decode=False), label=labels)


@pytest.mark.parametrize("splits", [False, True])
def test_saved_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path, splits: bool) -> None:
    rows = spoken()
    (datasets.DatasetDict({"train": rows, "test": rows}) if splits else rows).save_to_disk(str(tmp_path / "saved"))
    capsys.readouterr()
    out = tmp_path / "out"
    printed = converts(capsys, "hf", tmp_path / "saved", out, "--text-column", "label", "--language", "en")
    assert counts(printed) == (2, 1, 2) and (counts(printed, "test") == (2, 1, 2) if splits else True)
    assert "train row 2: no media: 'audio' is empty" in printed
    assert "train row 3: unknown format of audio: 'audio' starts with b'?'" in printed
    record = samples(out / "train")["train-00000001"]
    assert record.media == {"wav": CLIP} and said(record) == "yes"
    assert (record.language, record.source, record.speaker) == ("en", "saved", "s1")
    assert (out / "test").exists() == splits


def parquet(rows: Any, path: Path, group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(path), batch_size=group)
    return path


def test_parquet_of_several_files_and_splits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    rows = spoken(20)
    parquet(rows.select(range(12)), folder / "data/train-00000-of-00002.parquet")
    parquet(rows.select(range(12, 20)), folder / "data/train-00001-of-00002.parquet")
    parquet(rows.select(range(5, 9)), folder / "data/test.clean-00000-of-00001.parquet")
    parquet(rows.select(range(5, 8)), folder / "validation/0000.parquet")
    capsys.readouterr()
    options = ("--samples-per-shard", 4, "--text-column", "text")
    printed = converts(capsys, "hf", folder, tmp_path / "out", *options)
    assert counts(printed) == (18, 6, 2)  # jobs are whole row groups: 6, 6, 6 and 2 rows, in shards of up to 4
    assert counts(printed, "test.clean")[0] == 4 and counts(printed, "validation")[0] == 3
    found = samples(tmp_path / "out/train")
    assert [said(record) for record in found.values()] == [f"text {i}" for i in range(20) if i not in (2, 3)]
    assert list(found)[-1] == "train-00000019"
    printed = converts(capsys, "hf", folder, tmp_path / "parallel", *options, "--workers", 3)
    assert tree(tmp_path / "parallel") == tree(tmp_path / "out")
    converts(capsys, "hf", f"{folder}/data/train-*.parquet", tmp_path / "glob", *options)
    globbed = samples(tmp_path / "glob/train")
    assert [said(record) for record in globbed.values()] == [said(record) for record in found.values()]
    assert {record.source for record in globbed.values()} == {"data"}
    one = folder / "validation/0000.parquet"
    assert counts(converts(capsys, "hf", one, tmp_path / "one", *options))[0] == 3


def test_images_videos_and_lists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    png, jpg, mp4 = picture(), picture((9, 9, 200), "JPEG"), film()
    pictures = table({"image": stored(png, jpg), "caption": ["red", "blue"]}, image=datasets.Image(decode=False))
    several = table(
        {"images": [stored(png, jpg), stored(png), []], "text": ["two", "one", "none"]},
        images=datasets.List(datasets.Image(decode=False)),
    )
    films = table({"clip": stored(mp4), "text": ["grey"]}, clip=datasets.Video(decode=False))
    raw = table({"photo": [png], "text": ["raw"]}, photo=datasets.Value("binary"))
    for name, rows in {"pictures": pictures, "several": several, "films": films, "raw": raw}.items():
        parquet(rows, tmp_path / f"{name}.parquet")
    capsys.readouterr()
    found = {}
    for name in ("pictures", "several", "films"):
        printed = converts(capsys, "hf", tmp_path / f"{name}.parquet", tmp_path / name)
        found[name] = list(samples(tmp_path / name / "train").values())
    assert "train row 2: no media: 'images' is empty" in converts(
        capsys, "hf", tmp_path / "several.parquet", tmp_path / "several"
    )
    assert [record.media for record in found["pictures"]] == [{"png": png}, {"jpg": jpg}]
    assert found["pictures"][0].messages[0]["content"][1]["text"] == "Describe the image."
    assert [record.media for record in found["several"]] == [{"0.png": png, "1.jpg": jpg}, {"png": png}]
    assert found["films"][0].media == {"mp4": mp4}
    printed = converts(capsys, "hf", tmp_path / "raw.parquet", tmp_path / "raw", "--image-column", "photo")
    assert counts(printed) == (1, 1, 0) and samples(tmp_path / "raw/train")["train-00000000"].media == {"png": png}


def test_conversations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    png, jpg = picture(), picture((9, 9, 200), "JPEG")
    answer = {"role": "assistant", "content": "fine"}
    rows = table(
        {
            "images": [stored(png, jpg), stored(png), [], stored(png)],
            "messages": [
                [{"role": "user", "content": "A <image> and <image>."}, answer],
                [{"role": "user", "content": "no tag"}, answer],
                [{"role": "user", "content": "only text"}, answer],
                [{"role": "user", "content": "<image><image>"}, answer],
            ],
        },
        images=datasets.List(datasets.Image(decode=False)),
        messages=datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
    )
    rows.save_to_disk(str(tmp_path / "chat"))
    capsys.readouterr()
    printed = converts(capsys, "hf", tmp_path / "chat", tmp_path / "out")
    assert counts(printed) == (3, 1, 1) and "train row 3: tags and media differ" in printed
    two, one, none = samples(tmp_path / "out/train").values()
    assert [part["type"] for part in two.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert [part["type"] for part in one.messages[0]["content"]] == ["image", "text"]
    assert none.messages[0]["content"] == "only text" and not none.media


def test_text_alone_is_a_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parquet(table({"text": ["one", None, " ", "four"], "url": list("abcd")}), tmp_path / "text.parquet")
    capsys.readouterr()
    printed = converts(capsys, "hf", tmp_path / "text.parquet", tmp_path / "out")
    assert counts(printed) == (2, 1, 2) and "train row 1: no text" in printed
    assert [record.segments[0]["text"] for record in samples(tmp_path / "out/train").values()] == ["one", "four"]


def test_media_by_path_stay_in_their_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(CLIP)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.wav").write_bytes(CLIP)
    paths = [{"bytes": None, "path": name} for name in ("a.wav", "../secret.wav", str(tmp_path / "secret.wav"))]
    rows = table({"audio": paths, "text": list("abc")}, audio=datasets.Audio(decode=False))
    parquet(rows, tmp_path / "corpus/x.parquet")
    capsys.readouterr()
    printed = converts(capsys, "hf", tmp_path / "corpus", tmp_path / "out")
    assert counts(printed) == (1, 1, 2) and "       2  path leaves the media folder\n" in printed


def test_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken().save_to_disk(str(tmp_path / "saved"))
    parquet(table({"a": ["x"], "b": ["y"]}), tmp_path / "ab.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    out = tmp_path / "out"
    saved = ("hf", tmp_path / "saved", out)
    assert "no column 'sentence', it has: audio, text" in fails(capsys, *saved, "--text-column", "sentence")
    assert "not of the Audio type" in fails(capsys, *saved, "--audio-column", "speaker")
    assert "'audio' holds no text" in fails(capsys, *saved, "--text-column", "audio")
    assert "which column holds the text?" in fails(capsys, "hf", tmp_path / "ab.parquet", out)
    assert "is no Parquet file that can be read" in fails(capsys, "hf", tmp_path / "bad.parquet", out)
    assert "a name on the hub needs --hub" in fails(capsys, "hf", tmp_path / "empty", out)
    assert "a name on the hub needs --hub" in fails(capsys, "hf", "owner/name", out)
    (tmp_path / "saved/state.json").write_text("{")
    assert "not a dataset saved with" in fails(capsys, *saved)
    monkeypatch.setattr(datasets, "__version__", "3.9.9")
    assert "can run code of a dataset; 4 or later" in fails(capsys, *saved)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "omniloom[hf]"' in fails(capsys, *saved)
    assert not out.exists()


def test_the_hub_is_read_through_its_parquet(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands in for the hub: the same calls, no network."""
    import huggingface_hub
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    parquet(spoken(), tmp_path / "datasets/owner/name@~parquet/default/partial-train/0000.parquet")
    capsys.readouterr()
    hub = DirFileSystem(str(tmp_path), LocalFileSystem())
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: hub)
    printed = converts(capsys, "hf", "owner/name", tmp_path / "out", "--hub", "--text-column", "text")
    assert counts(printed) == (2, 1, 2) and "the hub made Parquet of a part of this dataset only" in printed
    assert "has no Parquet files on the hub" in fails(capsys, "hf", "owner/other", tmp_path / "o", "--hub")

    def unreachable(*_: object) -> None:
        raise RuntimeError("Name or service not known")  # its HTTP library's own error, of no common kind

    monkeypatch.setattr(hub, "glob", unreachable)
    assert "owner/name: cannot be read from the hub: Name or" in fails(
        capsys, "hf", "owner/name", tmp_path / "p", "--hub"
    )
