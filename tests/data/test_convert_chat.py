"""Conversations as finetuning sets have them: OpenAI's and Qwen's messages, ShareGPT, Alpaca; media in the rows."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.data.convert_kit import clip, converts, counts, media_folder, samples, write_lines

ANSWER = {"role": "assistant", "content": "red"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def asked(*parts: Any) -> dict[str, Any]:
    return {"messages": [user(*parts), ANSWER]}


def shapes(record: Any) -> list[str]:
    return [part["type"] for part in record.messages[0]["content"]]


def test_openai_messages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    media_folder(tmp_path)
    wav = base64.b64encode(clip(0.5, kind="wav")).decode()
    png = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    rows = [
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"},
                      ANSWER | {"weight": 0}, {"role": "user", "content": "?"}, ANSWER | {"weight": 1}]},
        asked({"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}}, text("?")),
        asked({"type": "image_url", "image_url": f"data:image/png;base64,{png}"}, text("?")),
        asked(text("Hear."), {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}),
        asked({"type": "audio_url", "audio_url": {"url": f"file://{tmp_path}/a.wav"}}),
        asked({"type": "video_url", "video_url": {"url": "film.mp4"}}, text("?")),
        asked({"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "red.png"}),
        asked({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}),
        asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,???"}}),
        asked({"type": "image_url", "image_url": {"url": "data:text/html;base64,aaaa"}}),
        asked({"type": "image_url", "image_url": {"url": "data:image/png,aaaa"}}),
        asked({"type": "input_audio", "input_audio": {"data": wav}}),
        {"messages": [{"role": "user", "content": "x", "weight": 1}, ANSWER]},
        {"messages": [{"role": "user", "content": "x"}, ANSWER | {"weight": 0.5}]},
        {"messages": [{"role": "user", "content": "x"}, ANSWER, {"role": "tool", "content": "y"}]},
    ]  # fmt: skip
    path = write_lines(tmp_path / "list.jsonl", *rows)
    printed = converts(capsys, "openai", path, tmp_path / "out")
    assert counts(printed) == (7, 1, 8), printed
    for line, reason in {
        8: "image is an address, not a file",
        9: "image is not base64",
        10: "image is of the unknown type text/html",
        11: "image has an address that is no data in base64",
        12: 'audio has data and no "format"',
        13: "weight on a turn of user: only the assistant's turns are learnt",
        14: "weight is neither 0 nor 1: 0.5",
        15: "messages[2].role is 'tool'",
    }.items():
        assert f"list.jsonl:{line}: {reason}" in printed, (line, printed)
    found = list(samples(tmp_path / "out/train").values())
    assert [turn.get("loss") for turn in found[0].messages] == [None, None, False, None, True]
    assert found[0].messages[0]["role"] == "system"
    assert found[1].media == found[2].media == {"png": (tmp_path / "red.png").read_bytes()}
    assert shapes(found[3]) == ["text", "audio"] and found[3].media == {"wav": clip(0.5, kind="wav")}
    assert found[4].media == {"wav": (tmp_path / "a.wav").read_bytes()}
    assert shapes(found[5]) == ["video", "text"] and shapes(found[6]) == ["text", "image"]


def test_qwen_messages_and_files_named_in_the_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    media_folder(tmp_path)
    path = write_lines(
        tmp_path / "list.jsonl",
        asked({"type": "image", "image": "red.png"}, {"type": "audio", "audio": "a.wav"}, text("?")),
        {"conversations": [{"from": "user", "value": "Picture 1: <img>red.png</img>\nWhat?"},
                           {"from": "assistant", "value": "red"}]},
        {"conversations": [{"from": "user", "value": "<audio>a.wav</audio><image>And?"},
                           {"from": "assistant", "value": "x"}], "image": "blue.jpg"},
        {"messages": [{"role": "user", "content": "plain <img> and <b>bold</b>"}, ANSWER]},
        {"conversations": [{"from": "user", "value": "<img>gone.png</img>"}, {"from": "assistant", "value": "x"}]},
    )  # fmt: skip
    printed = converts(capsys, "openai", path, tmp_path / "out")
    assert counts(printed) == (4, 1, 1) and "list.jsonl:5: no such file: gone.png" in printed
    found = list(samples(tmp_path / "out/train").values())
    assert [shapes(record) for record in found[:3]] == [
        ["image", "audio", "text"],
        ["text", "image", "text"],
        ["audio", "image", "text"],
    ]
    assert found[1].messages[0]["content"][0]["text"] == "Picture 1: "
    assert found[3].messages[0]["content"] == "plain <img> and <b>bold</b>"


def test_sharegpt_and_alpaca(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": False},
            {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]  # fmt: skip
    path = write_lines(
        tmp_path / "talk.jsonl", {"id": 1, "system": "S", "conversations": talk}, {"conversations": talk[:1]}
    )
    assert counts(converts(capsys, "sharegpt", path, tmp_path / "one"))[0] >= 1
    record = next(iter(samples(tmp_path / "one/train").values()))
    assert [(turn["role"], turn["content"]) for turn in record.messages] == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]  # fmt: skip
    assert [turn.get("loss", True) for turn in record.messages] == [True, True, False, True, True]
    path = write_lines(
        tmp_path / "alpaca.jsonl",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say.", "input": "", "output": "x", "history": [["a", "b"]], "system": "S"},
        {"instruction": "Add."},
    )
    assert counts(converts(capsys, "alpaca", path, tmp_path / "two")) == (2, 1, 1)
    one, two = samples(tmp_path / "two/train").values()
    assert one.messages[0]["content"] == "Add.\n1 2" and [turn["role"] for turn in two.messages] == [
        "system", "user", "assistant", "user", "assistant"]  # fmt: skip
