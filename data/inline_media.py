"""Media that stand in a row itself: data: addresses and base64, as chat APIs take them; and file: addresses.

    "data:image/png;base64,iVBOR..." | {"data": "UklGR...", "format": "wav"} --place_in--> a part, its bytes kept

Only what a row holds is decoded; nothing is ever fetched. Cost: the bytes stay in memory while their sample is made.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import unquote

from data.errors import BadSample
from data.sample import EXTENSIONS
from data.sources import MAX_MEDIA_BYTES, Media

_DATA = re.compile(r"data:(\w+)/([\w.+-]+)(?:;[\w=.+-]+)*;base64,")
_ENDINGS = {"jpeg": "jpg", "mpeg": "mp3", "x-wav": "wav", "wave": "wav", "vnd.wave": "wav", "x-flac": "flac"}
_ENDINGS |= {"quicktime": "mov", "x-matroska": "mkv"}


def place_in(media: Media) -> Callable[[str, Any], dict[str, Any]]:
    """What makes a part of a kind and a file, an address of a file, or the medium itself."""

    def place(kind: str, file: Any) -> dict[str, Any]:
        if isinstance(file, str) and file.startswith("file://"):
            file = unquote(file.removeprefix("file://"))
        if not isinstance(file, str) or not file.startswith("data:"):
            return media.part(kind, file)
        match = _DATA.match(file)
        if match is None:
            raise BadSample(f"{kind} has an address that is no data in base64: {file[:60]}")
        ending = _ENDINGS.get(match[2].lower(), match[2].lower())
        if ending not in EXTENSIONS["audio" if kind == "speech" else kind]:
            raise BadSample(f"{kind} is of the unknown type {match[1]}/{match[2]}")
        payload = _decoded(kind, file[match.end() :])
        return media.add(kind, ending, partial(bytes, payload), hashlib.sha256(payload).digest())

    return place


def as_address(kind: str, value: Any) -> Any:
    """{"url": ...}, {"data": base64, "format": "wav"} or text, as a path or an address."""
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("data"), str):
        ending = value.get("format")
        if value["data"].startswith("data:"):
            return value["data"]
        if not isinstance(ending, str):
            raise BadSample(f'{kind} has data and no "format"')
        return f"data:{kind}/{ending};base64,{value['data']}"
    return value.get("url") or value.get("path")


def _decoded(kind: str, text: str) -> bytes:
    if len(text) > MAX_MEDIA_BYTES // 3 * 4:
        raise BadSample(f"{kind} too large: the limit is {MAX_MEDIA_BYTES} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(f"{kind} is not base64: {error}") from None
