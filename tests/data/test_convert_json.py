"""Converters of rows: our manifests, LLaVA, ms-swift, plain text; and the reader of rows beneath them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import BadSample
from data.sources import Common, Item, MediaFolder
from data.sources_chat import Chat, Manifest, conversation, turns_of
from data.sources_files import TextRow
from tests.data.convert_kit import (
    clip,
    converts,
    counts,
    fails,
    media_folder,
    samples,
    write_lines,
)


def test_manifest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, kind in {"a.flac": "flac", "b.mp3": "mp3", "c.opus": "opus", "d.WAV": "wav"}.items():
        (tmp_path / name).write_bytes(clip(1.0, kind=kind))
    question = [
        {"type": "audio", "audio": "c.opus"},
        {"type": "text", "text": "and"},
        {"type": "audio", "audio": "d.WAV"},
    ]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "two clips"}]
    path = write_lines(
        tmp_path / "list.jsonl",
        {"audio": "a.flac", "text": "eins", "language": "de", "speaker": "eva", "key": "first"},
        "",
        {"audio": str(tmp_path / "b.mp3"), "text": "two", "source": "mine"},
        {"messages": messages},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no audio"}]},
        {"audio": "gone.wav", "text": "gone"},
    )
    printed = converts(capsys, "manifest", path, tmp_path / "out", "--language", "en", "--instruction", "Write.")
    assert counts(printed) == (4, 1, 1) and "list.jsonl:6: no such file: gone.wav" in printed
    found = samples(tmp_path / "out/train")
    assert set(found) == {"first", "list-00000003", "list-00000004", "list-00000005"}
    assert found["first"].media == {"flac": (tmp_path / "a.flac").read_bytes()}
    assert found["first"].messages[0]["content"][1]["text"] == "Write."
    about = [(found[key].language, found[key].speaker, found[key].source) for key in ("first", "list-00000003")]
    assert about == [("de", "eva", "list"), ("en", "", "mine")]
    assert set(found["list-00000004"].media) == {"0.opus", "1.wav"}
    assert [part.get("audio") for part in found["list-00000004"].messages[0]["content"]] == ["0.opus", None, "1.wav"]


def test_manifest_of_every_kind_of_media(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    media_folder(tmp_path)
    segments = [
        {"type": "text", "text": "see", "loss": False},
        {"type": "image", "image": "red.png"},
        {"type": "video", "video": "loud.mp4", "sound": True},
        {"type": "image", "image": "red.png"},
        {"type": "text", "text": "twice"},
    ]
    path = write_lines(
        tmp_path / "list.jsonl",
        {"segments": segments},
        {"image": "blue.jpg", "audio": "a.wav", "text": "both"},
        {"video": "loud.mp4", "sound": True, "text": "heard"},
        {"video": "film.mp4", "text": "seen"},
        {"video": "film.mp4", "sound": True, "text": "it has no sound"},
    )
    printed = converts(capsys, "manifest", path, tmp_path / "out")
    assert counts(printed) == (4, 1, 1) and 'list.jsonl:5: .mp4 has no sound, though its part says "sound"' in printed
    document, both, heard, seen = samples(tmp_path / "out/train").values()
    names = {"0.png", "1.mp4"}
    assert set(document.media) == names and document.media["0.png"] == (tmp_path / "red.png").read_bytes()
    assert [part.get("image") for part in document.segments] == [None, "0.png", None, "0.png", None]
    assert document.segments[0]["loss"] is False and document.segments[2]["sound"] is True
    assert [part["type"] for part in both.messages[0]["content"]] == ["image", "audio", "text"]
    assert both.messages[0]["content"][2]["text"] == "Describe the image."
    assert heard.messages[0]["content"][0] == {"type": "video", "video": "mp4", "sound": True}
    assert seen.messages[0]["content"][0] == {"type": "video", "video": "mp4"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: Expecting"),
        (b'{"audio": "a.wav", "text": "\xff"}', "not UTF-8: byte 28 is 0xff"),
        ("[1]", "not a JSON object: [1]"),
        ("[" * 100_000, "not JSON: maximum recursion"),
        ({"audio": "a.wav"}, 'needs "text" and "audio"'),
        ({"text": "alone"}, 'needs "text" and "audio"'),
        ({"audio": "a.wav", "text": 3}, '"text" must be a string'),
        ({"audio": "a.wav", "text": "x", "language": 3}, '"language" must be a string'),
        ({"audio": ["a.wav", 3], "text": "x"}, "audio without a path: '3'"),
        ({"audio": [], "text": "x"}, "no media"),
        ({"audio": "a.exe", "text": "x"}, "unknown extension of audio: a.exe"),
        ({"image": "a.wav", "text": "x"}, "unknown extension of image: a.wav"),
        ({"audio": "a.wav", "text": "x", "txt": ""}, "unknown field txt: known are"),
        ({"messages": [], "text": ""}, 'or "messages"'),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": 3}]}]}, "messages[0].content[0].audio"),
        ({"segments": [{"type": "smell"}]}, "segments[0].type is 'smell'"),
        ({"audio": "a.wav", "text": "x", "key": "a.b"}, "key needs 1 to 200 characters"),
        ({"audio": "a.wav", "text": "x", "key": "first"}, "key occurs twice: first"),
        ('{"audio": "a.wav", "text": "\\ud800"}', "text holds half a character"),
        ({"audio": "zero.wav", "text": "x"}, "empty file: zero.wav has 0 bytes"),
        ({"image": "broken.jpg", "text": "x"}, "image cannot be decoded"),
    ],
)
def test_a_bad_line_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: Any, reason: str
) -> None:
    media_folder(tmp_path)
    path = write_lines(tmp_path / "list.jsonl", {"audio": "a.wav", "text": "x", "key": "first"}, line)
    printed = converts(capsys, "manifest", path, tmp_path / "out")
    assert counts(printed) == (1, 1, 1)
    assert "list.jsonl:2: " in printed and reason in printed


def test_a_manifest_that_is_absent_or_binary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such file" in fails(capsys, "manifest", tmp_path / "none.jsonl", tmp_path / "out")
    (tmp_path / "list.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "list.jsonl:1: not UTF-8" in fails(capsys, "manifest", tmp_path / "list.jsonl", tmp_path / "out")
    (tmp_path / "list.jsonl").write_bytes(b"\n\n")
    assert "the source is empty" in fails(capsys, "manifest", tmp_path / "list.jsonl", tmp_path / "out")
    (tmp_path / "list.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:-9])
    assert "list.jsonl.gz: cannot be read" in fails(capsys, "manifest", tmp_path / "list.jsonl.gz", tmp_path / "out")


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


LLAVA = [
    {
        "id": "1",
        "image": "red.png",
        "conversations": [human("<image>\nWhat is it?"), gpt("red"), human("Sure?"), gpt("yes")],
    },
    {"id": "1", "image": ["red.png", "blue.jpg"], "conversations": [human("One <image>, two <image>."), gpt("two")]},
    {"id": "2", "conversations": [{"from": "system", "value": "Be brief."}, human("hi"), gpt("ho")], "model": "x"},
    {"id": "3", "video": "film.mp4", "audio": "a.wav", "conversations": [human("<audio><video>"), gpt("grey")]},
    {"id": "4", "image": "red.png", "conversations": [human("no tag"), gpt("x")]},
    {"id": "5", "image": "red.png", "conversations": [human("<image><image>"), gpt("x")]},
    {"id": "6", "image": "gone.png", "conversations": [human("<image>"), gpt("x")]},
    {"id": "7", "image": "red.png", "conversations": [human("draw"), gpt("<image>")]},
    {"id": "8", "conversations": [human("call"), {"from": "function_call", "value": "f()"}]},
    {"id": "9", "conversations": []},
    {"id": "10", "conversations": [{"from": "human"}]},
]


@pytest.mark.parametrize("form", ["array", "pretty", "lines", "lines.gz"])
def test_llava(capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str) -> None:
    media_folder(tmp_path / "media")
    path = tmp_path / ("list.json" if form in ("array", "pretty") else "list.jsonl")
    if form.startswith("lines"):
        write_lines(path, *LLAVA)
    else:
        path.write_text(json.dumps(LLAVA, indent=2 if form == "pretty" else None))
    if form == "lines.gz":
        packed = path.with_name("list.jsonl.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    options = ("--media", tmp_path / "media", "--samples-per-shard", 2, "--workers", 2 if form == "lines.gz" else 1)
    printed = converts(capsys, "llava", path, tmp_path / "out", *options)
    assert counts(printed) == (4, 2, 7)
    assert "       2  tags and media differ\n" in printed and "more <image> tags than image files" in printed
    assert "role is 'function_call'" in printed and "an assistant turn holds text only" in printed
    assert "fields that nothing was made of, and rows that have them: id (4), model (1)" in printed
    place = "list.json, entry 5: " if path.name == "list.json" else f"{path.name}:5: "
    assert f"{place}tags and media differ: 1 image files more than <image> tags" in printed
    one, two, three, four = samples(tmp_path / "out/train").values()
    assert one.messages[0]["content"] == [{"type": "image", "image": "png"}, {"type": "text", "text": "\nWhat is it?"}]
    assert [turn["role"] for turn in one.messages] == ["user", "assistant"] * 2
    assert [part.get("image", part.get("text")) for part in two.messages[0]["content"]] == [
        "One ",
        "0.png",
        ", two ",
        "1.jpg",
        ".",
    ]
    assert [turn["role"] for turn in three.messages] == ["system", "user", "assistant"]
    assert [part["type"] for part in four.messages[0]["content"]] == ["audio", "video"]


def test_swift(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    media_folder(tmp_path)
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "red"}
    path = write_lines(
        tmp_path / "list.jsonl",
        {"messages": [system, {"role": "user", "content": "<image>what?"}, answer], "images": ["red.png"]},
        {
            "messages": [system, {"role": "user", "content": "what?"}, answer],
            "images": ["red.png"],
            "audios": ["a.wav"],
        },
        {
            "messages": [
                {"role": "user", "content": "a"},
                {**answer, "loss": False},
                {"role": "user", "content": "b"},
                answer,
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {**answer, "loss_scale": 0.5}]},
        {"messages": [{"role": "user", "content": "<video>"}, {**answer, "loss": 1}], "videos": [{"path": "film.mp4"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "?"}]},
                answer,
            ]
        },
        {
            "query": "<image>and now",
            "response": "grey",
            "history": [["first", "one"]],
            "images": ["blue.jpg"],
            "system": "S",
        },
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": [{"role": "user", "content": "<image>x"}, answer], "images": []},
        {"messages": [{"role": "user", "content": "x"}, answer], "tools": "[{}]"},
        {
            "messages": [{"role": "user", "content": "<image><bbox>"}, answer],
            "images": ["red.png"],
            "objects": {"bbox": []},
        },
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
        {"query": 3},
        {"messages": [{"role": "user", "content": "x"}, answer], "rejected_response": "blue"},
    )
    printed = converts(capsys, "swift", path, tmp_path / "out")
    assert counts(printed) == (8, 1, 6)
    assert "list.jsonl:4: loss_scale is neither 0 nor 1: 0.5" in printed
    assert "list.jsonl:9: tags and media differ: more <image> tags than image files" in printed
    assert "list.jsonl:10: tools" in printed and "list.jsonl:11: objects" in printed
    assert "rejected_response (1)" in printed
    found = list(samples(tmp_path / "out/train").values())
    shapes = [[part["type"] for part in record.messages[1]["content"]] for record in found[:2]]
    assert shapes == [["image", "text"], ["audio", "image", "text"]]  # files without a tag come first
    assert [turn.get("loss", True) for turn in found[2].messages] == [True, False, True, True]
    assert found[3].messages[1]["loss"] is True and set(found[3].media) == {"mp4"}
    assert found[4].messages[0]["content"] == [{"type": "image", "image": "png"}, {"type": "text", "text": "?"}]
    assert [(turn["role"], turn["content"]) for turn in found[5].messages[:3]] == [
        ("system", "S"),
        ("user", "first"),
        ("assistant", "one"),
    ]
    assert found[6].messages[0]["content"] == "Add.\n1 2"


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "messages",
                        "conversations",
                        "from",
                        "value",
                        "role",
                        "content",
                        "images",
                        "image",
                        "type",
                        "text",
                        "query",
                        "response",
                        "history",
                        "system",
                        "audio",
                        "segments",
                        "loss",
                        "path",
                        "language",
                        "tools",
                        "sound",
                        "key",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
    )
)
def test_no_row_is_a_surprise(row: Any) -> None:
    """Whatever JSON holds, a row is an item or is left out with a reason."""
    common = Common(MediaFolder(Path("/nowhere")), "s")
    for parser in (Manifest(common), Chat(common), Chat(common, in_front=True), TextRow(common, plain=False)):
        try:
            item = parser.item(row if isinstance(row, dict) else {"messages": row, "text": row}, "k")
            assert isinstance(item, Item)
        except BadSample as error:
            assert error.reason


@given(st.lists(st.sampled_from(["<image>", "<video>", "<audio>", "text", "<", "\n"]), max_size=9))
def test_tags_keep_text_and_order(words: list[str]) -> None:
    text = "".join(words)
    kinds = [word[1:-1] for word in words if word in ("<image>", "<video>", "<audio>")]
    files = {kind: [f"{kind}{i}" for i in range(kinds.count(kind))] for kind in ("image", "video", "audio")}
    (message,) = conversation(
        turns_of({"messages": [{"role": "user", "content": text}]}), files, lambda k, f: {"type": k, k: f}
    )
    parts = (
        [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
    )
    assert "".join(part.get("text", f"<{part['type']}>") for part in parts) == text
    seen = [part[part["type"]] for part in parts if part["type"] != "text"]
    assert seen == [f"{kind}{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def test_text_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffErste Zeile\nzweite ü".encode())
    (folder / "b/a.txt").write_text("deeper")
    (folder / "empty.txt").write_text("")
    (folder / "spaces.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("schön".encode("latin-1"))
    (folder / "readme.md").write_text("not taken")
    printed = converts(capsys, "text", folder, tmp_path / "out", "--language", "de", "--source", "books")
    assert counts(printed) == (2, 1, 3) and "latin.txt: not UTF-8: byte 3 is 0xf6" in printed
    found = samples(tmp_path / "out/train")
    assert {key: record.segments[0]["text"] for key, record in found.items()} == {
        "a": "Erste Zeile\nzweite ü",
        "b_a": "deeper",
    }
    assert {(record.language, record.source) for record in found.values()} == {("de", "books")}


def test_text_by_lines_and_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("\ufeffeins\r\n\nzwei\ndrei".encode())
    converts(capsys, "text", tmp_path / "lines.txt", tmp_path / "lines", "--lines")
    found = samples(tmp_path / "lines/train")
    assert [(key, record.segments[0]["text"]) for key, record in found.items()] == [
        ("lines-00000001", "eins"),
        ("lines-00000003", "zwei"),
        ("lines-00000004", "drei"),
    ]
    packed = write_lines(
        tmp_path / "rows.jsonl", {"text": "one", "url": "u"}, {"text": 2}, {"text": "two", "language": "en"}
    )
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(packed.read_bytes()))
    printed = converts(capsys, "text", tmp_path / "rows.jsonl.gz", tmp_path / "rows")
    assert counts(printed) == (2, 1, 1) and "url (1)" in printed and 'rows.jsonl.gz:2: no text: "text"' in printed
    assert [record.language for record in samples(tmp_path / "rows/train").values()] == ["", "en"]
    assert "both .txt and .jsonl" in fails(capsys, "text", tmp_path, tmp_path / "out")
    assert "holds no .txt" in fails(capsys, "text", tmp_path / "lines/train", tmp_path / "out")
