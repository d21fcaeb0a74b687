"""One sample as it lies in a shard: KEY.json beside the media members of the same key.

    conversation  {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "flac"},
                                                             {"type": "text", "text": "What is said?"}]},
                                {"role": "assistant", "content": "seven"}],
                   "language": "en", "source": "fsdd", "speaker": "george"}
    document      {"segments": [{"type": "text", "text": "A storm comes up."},
                                {"type": "video", "video": "mp4", "sound": true}], "source": "films"}

A part names the extension of a member of the same key: KEY.flac, KEY.mp4. With "sound" a film's own sound is heard in
step with its frames. The last answer may have, beside its text, a recording of that text, which the Talker learns to
say and the Thinker neither hears nor counts: {"type": "speech", "speech": "speech.flac", "speaker": "george"}. What
evaluation compares answers with, besides the last one, stands under "grading" (data/grading.py). Only the
JSON and the members that it names are ever opened, and only where their extension is on the lists below; all else in a
tar is dead weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.audio import EXTENSIONS as AUDIO_EXTENSIONS
from data.errors import BadSample
from data.grading import Grading, parse_grading
from data.tokenizer import ROLES
from data.video import EXTENSIONS as VIDEO_EXTENSIONS
from data.vision import EXTENSIONS as IMAGE_EXTENSIONS

EXTENSIONS = {"audio": AUDIO_EXTENSIONS, "image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}
MAX_JSON_BYTES = 16 << 20
MAX_MEDIA = 4096
SPEECH = "speech."  # begins the extension of an answer's recording, and of nothing else
_ABOUT = ("language", "source", "speaker")
_PART_KEYS = {
    "text": {"text", "loss"},
    "audio": {"audio"},
    "image": {"image"},
    "video": {"video", "sound"},
    "speech": {"speech", "speaker"},
}

Part = Mapping[str, Any]


class Medium(NamedTuple):
    """A part that the Thinker hears or sees."""

    kind: str  # "audio", "image" or "video"
    extension: str  # of the member that holds it
    sound: bool = False  # of a video: its sound is heard with it


class Speech(NamedTuple):
    """A recording of the last answer."""

    extension: str  # of the member that holds it, "speech.flac"
    speaker: str = ""  # whose voice it is, "" where that is unknown


@dataclass(frozen=True)
class SampleRecord:
    """A sample with its media still encoded: a conversation (`messages`) or a document (`segments`)."""

    key: str
    messages: Sequence[Mapping[str, Any]] = ()
    media: Mapping[str, bytes] = field(default_factory=dict)  # by member extension, "flac" or "0.flac"
    language: str = ""
    source: str = ""
    speaker: str = ""
    segments: Sequence[Part] = ()
    grading: Grading | None = None  # of evaluation sets

    def to_json(self) -> bytes:
        """The bytes of the sample's .json member."""
        content = {"messages": self.messages} if self.messages else {"segments": self.segments}
        about: dict[str, Any] = {name: value for name in _ABOUT if (value := getattr(self, name))}
        if self.grading is not None:
            about["grading"] = self.grading.plain()
        return json.dumps(content | about, ensure_ascii=False).encode()


def parse_sample(key: str, payload: bytes) -> SampleRecord:
    """The record of a .json member, without media. Raises BadSample where the bytes are not such a sample."""
    if len(payload) > MAX_JSON_BYTES:
        raise BadSample(f"its .json has {len(payload)} bytes, the limit is {MAX_JSON_BYTES}")
    try:
        content = json.loads(payload.decode())  # as bytes, it would guess UTF-16 and let half characters through
        if b"\\ud" in payload or b"\\uD" in payload:  # escapes of half a character, which no tokenizer takes
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its .json cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise BadSample("its .json is not an object")
    about = {}
    for name in _ABOUT:
        about[name] = content.get(name, "")
        _check_name(about[name], f'"{name}"')
    if ("messages" in content) == ("segments" in content):
        raise BadSample('its .json needs either "messages" or "segments"')
    grading = parse_grading(content["grading"]) if "grading" in content else None
    segments = content.get("segments", ())
    record = SampleRecord(key, content.get("messages", ()), {}, **about, segments=segments, grading=grading)
    check_record(record)
    return record


def check_record(record: SampleRecord) -> None:
    """Raise BadSample, with the place, unless the record is a conversation or a document."""
    if record.segments:
        check_segments(record.segments)
    else:
        check_messages(record.messages)
    media = media_of(record)
    if len(media) > MAX_MEDIA:
        raise BadSample(f"it has {len(media)} media parts, the limit is {MAX_MEDIA}")
    for medium in media:
        check_extension(medium)


def check_messages(messages: Any) -> None:
    """Raise BadSample, with the place, unless `messages` is a conversation."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadSample('"messages" must be a list with at least one message')
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise BadSample(f"{where} must be an object with role and content")
        if message.get("role") not in ROLES:
            raise BadSample(f"{where}.role is {message.get('role')!r}, must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("loss", True), bool):
            raise BadSample(f"{where}.loss is {message['loss']!r}, must be true or false")
        unknown = set(message) - {"role", "content", "loss"}
        if unknown:
            raise BadSample(f"{where} has unknown keys: {', '.join(sorted(map(str, unknown)))}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, Sequence):
            raise BadSample(f"{where}.content must be text or a list of parts")
        spoken = 0
        for j, part in enumerate(content):
            kind = _check_part(part, f"{where}.content[{j}]")
            if kind == "speech":
                spoken += 1
                if i + 1 < len(messages) or message["role"] != "assistant" or spoken > 1:
                    raise BadSample(f"{where}.content[{j}]: speech belongs to the last turn, an answer, and only once")
            elif kind != "text" and message["role"] == "assistant":
                raise BadSample(f"{where}.content[{j}]: an assistant turn holds text only, media belong to other turns")
            if "loss" in part:
                raise BadSample(f'{where}.content[{j}]: "loss" belongs to the turn, not to its parts')
        if spoken and not text_of(content).strip():
            raise BadSample(f"{where}: speech without its transcript: the turn holds no text")


def check_segments(segments: Any) -> None:
    """Raise BadSample, with the place, unless `segments` is a document."""
    if not isinstance(segments, Sequence) or isinstance(segments, str) or not segments:
        raise BadSample('"segments" must be a list with at least one part')
    for i, part in enumerate(segments):
        if _check_part(part, f"segments[{i}]") == "speech":
            raise BadSample(f"segments[{i}]: speech belongs to an answer, a document has none")


def check_extension(medium: Medium) -> None:
    """Raise BadSample unless a member of this extension may be decoded as such a medium."""
    kind, extension = medium.kind, medium.extension
    if extension.rpartition(".")[2] not in EXTENSIONS[kind] or "/" in extension:
        raise BadSample(f'{kind} names member "{extension[:40]}"; known are {", ".join(EXTENSIONS[kind])}')
    if extension.startswith(SPEECH):
        raise BadSample(f'{kind} names member "{extension[:40]}"; such names are for the speech of an answer')


def parts_of(content: str | Sequence[Part]) -> Sequence[Part]:
    """A turn's content as parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(content: str | Sequence[Part]) -> str:
    """The text of a turn's content."""
    return "".join(part["text"] for part in parts_of(content) if part["type"] == "text")


def all_parts(record: SampleRecord) -> Iterator[Part]:
    """Every part of a record, in order."""
    yield from record.segments
    for message in record.messages:
        yield from parts_of(message["content"])


def media_of(record: SampleRecord) -> list[Medium]:
    """The media parts of a record, in order; speech of an answer is none."""
    return [medium_of(part) for part in all_parts(record) if part["type"] in EXTENSIONS]


def speech_of(record: SampleRecord) -> Speech | None:
    """The recording of a record's last answer, where it has one."""
    last = parts_of(record.messages[-1]["content"]) if record.messages else ()
    return next((Speech(part["speech"], part.get("speaker", "")) for part in last if part["type"] == "speech"), None)


def medium_of(part: Part) -> Medium:
    """A part that is heard or seen, as a Medium."""
    return Medium(part["type"], part[part["type"]], part.get("sound", False))


def _check_part(part: Any, where: str) -> str:
    """The kind of a part; raises BadSample for one that is none."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PART_KEYS:
        raise BadSample(f'{where}.type is {kind!r}, must be "text", "audio", "image", "video" or "speech"')
    if not isinstance(part.get(kind), str):
        raise BadSample(f"{where}.{kind} is missing or not a string")
    unknown = set(part) - _PART_KEYS[kind] - {"type"}
    if unknown:
        raise BadSample(f"{where} has unknown keys: {', '.join(sorted(map(str, unknown)))}")
    for flag in ("loss", "sound"):
        if not isinstance(part.get(flag, True), bool):
            raise BadSample(f"{where}.{flag} is {part[flag]!r}, must be true or false")
    if kind == "speech":
        _check_name(part.get("speaker", ""), f"{where}.speaker")
        _check_speech_extension(part["speech"])
    return kind


def _check_speech_extension(extension: str) -> None:
    head, _, ending = extension.rpartition(".")
    if not f"{head}.".startswith(SPEECH) or "/" in extension or ending not in AUDIO_EXTENSIONS:
        raise BadSample(
            f'speech names member "{extension[:40]}"; it must begin with "{SPEECH}" and end with one of '
            f"{', '.join(AUDIO_EXTENSIONS)}"
        )


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
        raise BadSample(f"{what} must be a printable string of at most 200 characters")
