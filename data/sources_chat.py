"""Rows of JSON about media files: our own manifests, and conversations as finetuning sets have them.

    {"audio": "a.flac", "text": "..."} | {"messages": [...]} | {"segments": [...]}              Manifest
    {"conversations": [{"from": "human", "value": "<image>..."}, ...], "image": "a.jpg"}        Chat
    {"messages": [{"role": "user", "content": "<image>..."}, ...], "images": ["a.jpg"]}         Chat(in_front=True)
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ..}}, ..]}, ..]}    the same
    {"instruction": "...", "input": "...", "output": "..."}                                                   the same

LLaVA, ShareGPT, Qwen, Alpaca, ms-swift and OpenAI's messages are all read by Chat. Whether an answer is learnt is said
in its turn: "loss", "loss_scale" or OpenAI's "weight", 0 or 1. Other turns never are. Qwen's older files name a file in
the text, <img>a.jpg</img>, which is the same as a tag and the file.

The tags <image>, <video> and <audio> stand where the media belong; the n-th tag of a kind is its n-th file. Where there
are more tags than files, or fewer, the row is left out; with `in_front`, files without a tag come before the first turn
that is not the system's, which is how ms-swift reads them.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import BadSample
from data.inline_media import as_address, place_in
from data.sample import EXTENSIONS, check_messages, check_segments
from data.sources import Common, Item, Media, asked

_TAG = re.compile(r"<(image|video|audio)>")
_NAMED = re.compile(r"<(img|audio|video)>([^<>\n]{1,1000})</\1>")
_FIELDS = {"image_url": "image", "input_image": "image", "video_url": "video", "audio_url": "audio"}
_FIELDS |= {"input_audio": "audio"}  # of parts: the field with the file -> its kind
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLES |= {"developer": "system"}
_FILES = {
    "image": ("image", "images"),
    "video": ("video", "videos"),
    "audio": ("audio", "audios"),
}
_MANIFEST = {*EXTENSIONS, "text", "sound", "messages", "segments", "language", "speaker", "key", "source"}
_ABOUT = ("language", "speaker")
_OLD = ("system", "query", "response", "history", "instruction", "input", "output")
_TURNS = ("conversations", "messages", "conversation")

Place = Callable[[str, Any], dict[str, Any]]  # (kind, file) -> part


@dataclass(frozen=True)
class Manifest:
    """Our own manifest: paths where a sample has members."""

    common: Common
    plain: bool = False

    def key_of(self, line: bytes | Any) -> str:
        """The key that a row names."""
        if isinstance(line, bytes):
            if b'"key"' not in line:
                return ""
            try:
                line = json.loads(line)
            except (ValueError, RecursionError):
                return ""
        key = line.get("key") if isinstance(line, dict) else None
        return key if isinstance(key, str) else ""

    def item(self, row: Any, key: str) -> Item:
        """The item of a row."""
        if unknown := sorted(set(row) - _MANIFEST):
            raise BadSample(f"unknown field {', '.join(unknown)}: known are {', '.join(sorted(_MANIFEST))}")
        if not isinstance(row.get("key", ""), str):
            raise BadSample('"key" must be a string')
        forms = [name for name in ("messages", "segments", "text") if name in row]
        kinds = [kind for kind in row if kind in EXTENSIONS]
        if self.common.speak and (forms, kinds) != (["text"], ["audio"]):
            raise BadSample('no recording with its transcript: --speak takes rows of "audio" and "text"')
        if len(forms) != 1 or (forms == ["text"]) != bool(kinds):
            raise BadSample('a row needs "text" and "audio", "image" or "video"; or "messages"; or "segments"')
        media, about = self.common.media(), self.common.about(row)
        key = row.get("key") or key
        if forms == ["messages"]:
            check_messages(_with_members(row["messages"]))
            return media.item(key, messages=[_turn(turn, media) for turn in row["messages"]], about=about)
        if forms == ["segments"]:
            check_segments(row["segments"])
            return media.item(key, segments=_parts(row["segments"], media), about=about)
        if not isinstance(row["text"], str):
            raise BadSample('"text" must be a string')
        if self.common.speak:
            return self._spoken(row, key)
        sound = {"sound": row["sound"]} if "sound" in row else {}
        parts = [
            media.part(kind, path) | (sound if kind == "video" else {}) for kind in kinds for path in _list(row[kind])
        ]
        if not parts:
            raise BadSample("no media: the list of files is empty")
        return media.item(key, messages=asked(parts, self.common.instruction, row["text"]), about=about)

    def _spoken(self, row: Mapping[str, Any], key: str) -> Item:
        """The item of a row whose recording is the answer."""
        media, about, files = self.common.media(), self.common.about(row), _list(row["audio"])
        if len(files) != 1:
            raise BadSample(f"not one recording: --speak takes one, the row has {len(files)}")
        part = media.part(self.common.recording, files[0])
        return media.item(key, messages=self.common.transcribed(part, row["text"], about), about=about)


@dataclass(frozen=True)
class Chat:
    """Conversations whose texts hold tags in place of media."""

    common: Common
    in_front: bool = False
    plain: bool = False

    def key_of(self, line: bytes | Any) -> str:
        """No row names its key: "id" often occurs twice in such files."""
        return ""

    def item(self, row: Any, key: str) -> Item:
        """The item of a row."""
        if row.get("tools"):
            raise BadSample("tools: calls of tools have no place in a sample")
        media = self.common.media()
        files = {
            kind: [_path(file) for name in names for file in _list(row.get(name))] for kind, names in _FILES.items()
        }
        messages = conversation(turns_of(row), files, place_in(media), self.in_front)
        if row.get("objects") and re.search("<bbox>|<ref-object>", json.dumps(messages)):
            raise BadSample("objects: boxes in the text have no place in a sample")
        known = {*_TURNS, *_OLD, *_ABOUT, *(name for names in _FILES.values() for name in names)}
        about = self.common.about({name: row[name] for name in _ABOUT if isinstance(row.get(name), str)})
        return media.item(key, messages=messages, about=about, unread=sorted(set(row) - known))


def turns_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turns {"role", "content", "loss"?} of a row in any of the known styles, tags still in the text."""
    turns = next((row[name] for name in _TURNS if row.get(name)), None)
    if turns is None:
        turns = _old_turns(row)
    elif not isinstance(turns, Sequence) or isinstance(turns, str):
        raise BadSample("conversation is not a list")
    found = []
    system = row.get("system")
    if isinstance(system, str) and system:
        found.append({"role": "system", "content": system})
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise BadSample("conversation has a turn that is not an object")
        if "role" not in turn and "from" not in turn and ("human" in turn or "user" in turn):
            asks = turn.get("human", turn.get("user"))
            found += [{"role": "user", "content": asks}, {"role": "assistant", "content": turn.get("assistant")}]
            continue
        role = turn.get("role", turn.get("from"))
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        found.append({"role": role, "content": turn.get("content", turn.get("value"))} | _loss(turn, role))
    return found


def conversation(
    turns: Sequence[Mapping[str, Any]], files: Mapping[str, Iterable[Any]], place: Place, in_front: bool = False
) -> list[dict[str, Any]]:
    """Messages with media in place of tags; `place` makes a part of a kind and a file. Raises BadSample."""
    waiting = {kind: deque(given) for kind, given in files.items()}
    first: list[dict[str, Any]] = []
    if in_front:
        texts = "".join(turn["content"] for turn in turns if isinstance(turn["content"], str))
        tags = _TAG.findall(_NAMED.sub("", texts))
        for kind in ("video", "audio", "image"):
            missing = len(waiting.get(kind, ())) - tags.count(kind) - _untagged(turns, kind)
            first += [place(kind, waiting[kind].popleft()) for _ in range(missing)]
    messages = []
    for turn in turns:
        content = turn["content"]
        if isinstance(content, str):
            content = _with_media(content, waiting, place)
        elif isinstance(content, Sequence):
            content = [part for given in content for part in _open_part(given, waiting, place)]
        else:
            raise BadSample(f"a turn of {turn['role']} has no text")
        if first and turn["role"] != "system":
            content = first + ([{"type": "text", "text": content}] if isinstance(content, str) else content)
            first = []
        messages.append({**turn, "content": content})
    for kind, left in waiting.items():
        if left:
            raise BadSample(f"tags and media differ: {len(left)} {kind} files more than <{kind}> tags")
    return messages


def _with_media(text: str, waiting: Mapping[str, deque], place: Place) -> str | list[dict[str, Any]]:
    named = _NAMED.split(text)  # text, kind, path, text, kind, path, ..., text
    parts = []
    for i in range(0, len(named), 3):
        pieces = _TAG.split(named[i])  # text, kind, text, kind, ..., text
        for j, piece in enumerate(pieces):
            if j % 2:
                parts.append(_next(piece, waiting, place))
            elif piece:
                parts.append({"type": "text", "text": piece})
        if i + 1 < len(named):
            parts.append(place("image" if named[i + 1] == "img" else named[i + 1], named[i + 2].strip()))
    return text if all(part["type"] == "text" for part in parts) else parts


def _open_part(part: Any, waiting: Mapping[str, deque], place: Place) -> list[dict[str, Any]]:
    """Parts as chat APIs have them: {"type": "image"}, {"type": "image", "image": path}, {"type": "image_url", ...}."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        content = _with_media(part["text"], waiting, place)
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    if kind in _FIELDS and part.get(kind):
        return [place(_FIELDS[kind], as_address(_FIELDS[kind], part[kind]))]
    if kind in _FIELDS and part.get("image_url"):  # {"type": "input_image", "image_url": ...}
        return [place(_FIELDS[kind], as_address(_FIELDS[kind], part["image_url"]))]
    if kind in ("input_text", "output_text") and isinstance(part.get("text"), str):
        part = {"type": "text", "text": part["text"]}
        return _open_part(part, waiting, place)
    if kind == "speech":
        return [place(kind, _path(part.get(kind))) | _flags(part)]
    if kind not in EXTENSIONS:
        raise BadSample(f"part of an unknown type: {str(kind)[:40]!r}")
    named = part.get(kind) or part.get("path") or part.get("url")
    return [place(kind, _path(named)) if named else _next(kind, waiting, place)]


def _next(kind: str, waiting: Mapping[str, deque], place: Place) -> dict[str, Any]:
    if not waiting.get(kind):
        raise BadSample(f"tags and media differ: more <{kind}> tags than {kind} files")
    return place(kind, waiting[kind].popleft())


def _untagged(turns: Sequence[Mapping[str, Any]], kind: str) -> int:
    """Parts of a kind, or tags in texts of parts, that take a file from the row's list."""
    parts = [part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]]
    count = 0
    for part in parts:
        if isinstance(part, Mapping) and part.get("type") == kind:
            count += not (part.get(kind) or part.get("path") or part.get("url"))
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            count += _TAG.findall(_NAMED.sub("", part["text"])).count(kind)
    return count


def _old_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """query, response and history of older files; instruction, input and output."""
    ask, answer = row.get("query", row.get("instruction")), row.get("response", row.get("output"))
    if not isinstance(ask, str) or not isinstance(answer, str):
        raise BadSample("no conversation: none of conversations, messages, query and response")
    more = row.get("input")
    ask = f"{ask}\n{more}" if isinstance(more, str) and more else ask
    pairs = [*_list(row.get("history")), [ask, answer]]
    if not all(isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in pairs):
        raise BadSample("history is not a list of pairs")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _loss(turn: Mapping[str, Any], role: Any) -> dict[str, bool]:
    """Whether a turn is learnt, where it says so."""
    for name in ("loss", "loss_scale", "weight"):
        flag = turn.get(name)
        if flag is None:
            continue
        if flag not in (0, 1):
            raise BadSample(f"{name} is neither 0 nor 1: {str(flag)[:40]}")
        if role == "assistant":
            return {"loss": bool(flag)}
        if flag:
            raise BadSample(f"{name} on a turn of {role}: only the assistant's turns are learnt")
    return {}


def _turn(turn: Mapping[str, Any], media: Media) -> dict[str, Any]:
    content = turn["content"]
    return {**turn, "content": content if isinstance(content, str) else _parts(content, media)}


def _with_members(messages: Any) -> Any:
    """Messages as they will be: files of speech named as its members are, which `check_messages` insists on."""
    if not isinstance(messages, list):
        return messages
    return [
        {**turn, "content": [_with_member(part) for part in turn["content"]]}
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), list)
        else turn
        for turn in messages
    ]


def _with_member(part: Any) -> Any:
    named = isinstance(part, Mapping) and part.get("type") == "speech" and isinstance(part.get("speech"), str)
    return {**part, "speech": "speech.wav"} if named else part


def _parts(parts: Iterable[Mapping[str, Any]], media: Media) -> list[dict[str, Any]]:
    """Parts with members in place of paths."""
    return [
        dict(part) if part["type"] == "text" else media.part(part["type"], part[part["type"]]) | _flags(part)
        for part in parts
    ]


def _flags(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in ("type", part["type"])}


def _path(file: Any) -> Any:
    """The path of a file that may be given as an object with its path."""
    return file.get("path") if isinstance(file, Mapping) else file


def _list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
