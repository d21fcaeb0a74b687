"""One sample as it lies in a shard: KEY.json beside the media members of the same key.

    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "flac"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": "seven"}],
     "language": "en", "source": "fsdd", "speaker": "george"}

A part's "audio" names the extension of a member of the same key: KEY.flac here. Only the JSON and the members that
it names are ever opened, and only where their extension is on the list below; all else in a tar is dead weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.chat import audio_parts, check_messages
from data.errors import BadSample

AUDIO_EXTENSIONS = ("wav", "flac", "mp3", "opus", "ogg")
MAX_JSON_BYTES = 16 << 20
MAX_CLIPS = 4096
_ABOUT = ("language", "source", "speaker")


@dataclass(frozen=True)
class SampleRecord:
    """A sample with its media still encoded."""

    key: str
    messages: Sequence[Mapping[str, Any]]
    audio: Mapping[str, bytes] = field(default_factory=dict)  # by member extension, "flac" or "0.flac"
    language: str = ""
    source: str = ""
    speaker: str = ""

    def to_json(self) -> bytes:
        """The bytes of the sample's .json member."""
        about = {name: value for name in _ABOUT if (value := getattr(self, name))}
        return json.dumps({"messages": self.messages, **about}, ensure_ascii=False).encode()


def parse_sample(key: str, payload: bytes) -> tuple[SampleRecord, list[str]]:
    """The record of a .json member, without media, and the extensions of its clips in order of the messages.

    Raises BadSample where the bytes are not such a sample.
    """
    if len(payload) > MAX_JSON_BYTES:
        raise BadSample(f"its .json has {len(payload)} bytes, the limit is {MAX_JSON_BYTES}")
    try:
        content = json.loads(payload)
        if b"\\ud" in payload or b"\\uD" in payload:  # escapes of half a character, which no tokenizer takes
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its .json cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise BadSample("its .json is not an object")
    check_messages(content.get("messages"))
    about = {}
    for name in _ABOUT:
        about[name] = content.get(name, "")
        if not isinstance(about[name], str) or len(about[name]) > 200:
            raise BadSample(f'"{name}" must be a string of at most 200 characters')
    clips = audio_parts(content["messages"])
    if len(clips) > MAX_CLIPS:
        raise BadSample(f"it has {len(clips)} audio parts, the limit is {MAX_CLIPS}")
    for extension in clips:
        check_extension(extension)
    return SampleRecord(key, content["messages"], {}, **about), clips


def check_extension(extension: str) -> None:
    """Raise BadSample unless a member of this extension may be decoded as audio."""
    if extension.rpartition(".")[2] not in AUDIO_EXTENSIONS or "/" in extension:
        raise BadSample(f'audio names member "{extension[:40]}"; known are {", ".join(AUDIO_EXTENSIONS)}')
