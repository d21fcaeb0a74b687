"""One conversation from files and text: what a user asks, ready for models.generate and models.speak.

    system, text, audio, image, video files --data.document: decode, lay out--> Batch of one document

Media come in the order in which they are given, before the text, in ChatML. A video brings its sound, interleaved by
time, unless told otherwise. Cost: that of decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.chat import Run, render
from data.document import Desk, MediaLimits, join, whole
from data.errors import BadSample, DataError
from data.sample import Medium as Part
from data.sample import SampleRecord, medium_of
from data.tokenizer import Tokenizer
from data.types import Batch
from data.video import load_sound
from models.omni_config import OmniConfig
from models.positions import MediaTokens
from train.layout import ModelLayout

KINDS = ("audio", "image", "video")


@dataclass(frozen=True)
class Medium:
    """A file to ask about."""

    kind: str  # one of KINDS
    path: Path


def conversation(
    config: OmniConfig,
    tokenizer: Tokenizer,
    text: str,
    media: Sequence[Medium] = (),
    system: str = "",
    video_sound: bool = True,
) -> Batch:
    """A prompt of one document that ends where the assistant's answer begins. Raises DataError, naming the file."""
    if config.thinker.vision is None and any(medium.kind != "audio" for medium in media):
        raise DataError("this model has no vision encoder: it takes audio and text")
    limits = MediaLimits()
    payloads: dict[str, bytes] = {}
    waves: dict[Part, np.ndarray] = {}  # sound that had to be decoded to know that there is some
    parts: list[dict[str, Any]] = []
    for number, medium in enumerate(media):
        payloads[str(number)] = payload = _read(medium.path)
        part: dict[str, Any] = {"type": medium.kind, medium.kind: str(number)}
        if medium.kind == "video":
            with _naming(medium.path):
                wave_S = load_sound(payload, limits.video) if video_sound else None
            if wave_S is not None:
                part["sound"] = True
                waves[medium_of(part)] = wave_S
        parts.append(part)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
    rendered = render(SampleRecord("prompt", messages), tokenizer, prompt_only=True)
    desk = Desk(ModelLayout.of(config.thinker, MediaTokens.of(config)), limits, payloads)
    desk.waves.update(waves)
    items = []
    for item in whole(rendered):
        if isinstance(item, Run):
            items.append(item)
            continue
        with _naming(media[item.number].path):
            items.append(desk.take(item))
    return join([desk.document("prompt", items)])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of what is wrong with its content."""
    try:
        yield
    except BadSample as error:
        raise DataError(f"{path}: {error.reason}") from None
