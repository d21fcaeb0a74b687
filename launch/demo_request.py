"""What the page of launch/demo.py sends: JSON of a whole conversation, checked before anything is decoded.

    {"turns": [{"role": "user", "parts": [{"audio": BASE64, "name": "q.wav"}, {"text": "What is said?"}]},
               {"role": "assistant", "parts": [{"text": "seven"}]}, ...],
     "system": TEXT, "speaker": NAME, "levels": N, "temperature": T, "seed": N}

The page sends all turns each time, so the server remembers nobody. What is not on the lists here is refused: one line,
DataError. Cost: a copy of the media.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.document import MediaLimits
from data.errors import DataError
from launch.answering import Loaded
from launch.conversation import Medium, Turn

MAX_BODY = 64 << 20  # bytes of a request: eight minutes of recordings at 48 kHz, or a few photographs
MAX_TURNS, MAX_PARTS, MAX_TEXT = 64, 16, 20_000
MAX_SECONDS = 60.0  # of one recording
MAX_PIXELS, PIXELS_USED = 40_000_000, 1_003_520  # of a picture as it comes, and as the model sees it
MAX_TOKENS = 8_192  # of a conversation
KINDS = ("audio", "image")


@dataclass(frozen=True)
class Request:
    """A conversation whose last turn is the user's, and how to answer it."""

    turns: list[Turn]
    given: dict[str, str]  # as launch.answering.settings_of takes it
    levels: int | None
    seed: int


def limits_of(loaded: Loaded) -> MediaLimits:
    """The run's limits of media, none above the page's: decoding for strangers stays small."""
    own = loaded.limits
    return replace(
        own,
        audio=replace(own.audio, max_seconds=min(own.audio.max_seconds, MAX_SECONDS), max_bytes=MAX_BODY),
        image=replace(
            own.image,
            max_bytes=MAX_BODY,
            max_source_pixels=min(own.image.max_source_pixels, MAX_PIXELS),
            max_pixels=max(own.image.min_pixels, min(own.image.max_pixels, PIXELS_USED)),
        ),
    )


def read_request(body: bytes, given: Mapping[str, str]) -> Request:
    """A request from its bytes; `given` are the answer's settings that the page does not choose. Raises DataError."""
    try:
        asked = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise DataError("the request is no JSON object") from None
    if not isinstance(asked, dict):
        raise DataError("the request is no JSON object")
    system = _text(asked.get("system", ""), "system")
    turns = asked.get("turns")
    if not isinstance(turns, list) or not 1 <= len(turns) <= MAX_TURNS:
        raise DataError(f"a conversation has 1 to {MAX_TURNS} turns: start a new one")
    found = [_turn(each) for each in turns]
    if found[-1].role != "user" or not any(found[-1].parts):
        raise DataError("say, type or drop something first: there is nothing to answer")
    how = {**given, "speaker": _text(asked.get("speaker", ""), "speaker")}
    if (temperature := asked.get("temperature")) is not None:
        how["temperature"] = str(_number(temperature, "temperature", 0, 100))
    levels = asked.get("levels")
    return Request(
        [*([Turn("system", [system])] if system else []), *found],
        how,
        None if levels is None else int(_number(levels, "levels", 1, 64, whole=True)),
        int(_number(asked.get("seed", 0), "seed", 0, 2**53, whole=True)),
    )


def _turn(turn: Any) -> Turn:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    parts = turn.get("parts") if isinstance(turn, Mapping) else None
    if role not in ("user", "assistant") or not isinstance(parts, list) or len(parts) > MAX_PARTS:
        raise DataError(f"a turn is of the user or the assistant, with at most {MAX_PARTS} parts")
    found = [_part(part) for part in parts]
    if role == "assistant" and not all(isinstance(part, str) for part in found):
        raise DataError("an assistant's turn is text")
    return Turn(role, found)


def _part(part: Any) -> str | Medium:
    if not isinstance(part, Mapping):
        raise DataError("a part of a turn is text, audio or image")
    if "text" in part:
        return _text(part["text"], "text")
    kind = next((kind for kind in KINDS if kind in part), None)
    if kind is None or not isinstance(part[kind], str):
        raise DataError("a part of a turn is text, audio or image")
    name = _text(part.get("name", kind), "name")[:100]
    try:
        payload = base64.b64decode(part[kind], validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{name}: it came damaged (no base64)") from None
    return Medium(kind, name if name.isprintable() and name else kind, payload)


def _text(text: Any, what: str) -> str:
    if not isinstance(text, str) or len(text) > MAX_TEXT or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{what} must be text of at most {MAX_TEXT} characters")
    return text


def _number(value: Any, what: str, least: float, most: float, whole: bool = False) -> float:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        raise DataError(f"{what} must be a {'whole ' if whole else ''}number from {least} to {most}")
    return value
