"""A conversation of several turns, with media as bytes, ready for models.generate and models.speak.

    turns: text, audio, image, video --decode, lay out (data/document.py)--> Batch of one document

Parts of a turn stay in the order in which they are given, in ChatML. A video brings its sound, interleaved by time,
unless told otherwise. The document ends where the assistant's next answer begins. Cost: that of decoding.

Letters: S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import decode
from data.chat import Run, render
from data.document import Desk, MediaLimits, join, whole
from data.errors import BadSample, DataError
from data.interrupts import uninterrupted
from data.sample import Medium as Member
from data.sample import SampleRecord, medium_of
from data.tokenizer import Tokenizer
from data.types import Batch
from data.video import load_sound
from train.layout import ModelLayout

KINDS = ("audio", "image", "video")
SILENT = 1e-3  # of full scale, -60 dB: nothing louder was recorded


@dataclass(frozen=True)
class Medium:
    """A file to ask about."""

    kind: str  # one of KINDS
    name: str  # for messages
    payload: bytes


@dataclass(frozen=True)
class Turn:
    """What one side said, in order."""

    role: str  # "system", "user" or "assistant"
    parts: Sequence[str | Medium]


def conversation(
    layout: ModelLayout, limits: MediaLimits, tokenizer: Tokenizer, turns: Sequence[Turn], video_sound: bool = True
) -> Batch:
    """A prompt of one document. Raises DataError, naming the file, for a medium that is broken, silent or too large."""
    media = [part for turn in turns for part in turn.parts if isinstance(part, Medium)]
    if layout.patching is None and (seen := [medium.name for medium in media if medium.kind != "audio"]):
        raise DataError(f"{seen[0]}: this model has no vision encoder: it takes audio and text")
    waves: dict[Member, np.ndarray] = {}  # sound that had to be decoded to know what it is
    parts = iter([_part(medium, str(at), limits, waves, video_sound) for at, medium in enumerate(media)])
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": each} if isinstance(each, str) else next(parts) for each in turn.parts
            ],
        }
        for turn in turns
    ]
    desk = Desk(layout, limits, {str(at): medium.payload for at, medium in enumerate(media)})
    desk.waves.update(waves)
    rendered = render(SampleRecord("prompt", messages), tokenizer, prompt_only=True)
    items = []
    for item in whole(rendered):
        if isinstance(item, Run):
            items.append(item)
            continue
        with _naming(media[item.number].name):
            items.append(desk.take(item))
    return join([desk.document("prompt", items)])


def read_medium(kind: str, path: Path, limits: MediaLimits) -> Medium:
    """A file, of no more bytes than its decoder takes. Raises DataError, naming it."""
    try:
        with open(path, "rb") as file:
            payload = file.read(limits.max_bytes + 1)  # one too many is the decoder's to refuse
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return Medium(kind, str(path), payload)


def _part(
    medium: Medium, key: str, limits: MediaLimits, waves: dict[Member, np.ndarray], video_sound: bool
) -> dict[str, Any]:
    """A medium as a part of a record; what it sounds like is added to `waves`."""
    part: dict[str, Any] = {"type": medium.kind, medium.kind: key}
    with _naming(medium.name):
        if medium.kind == "audio":
            wave_S = waves[medium_of(part)] = decode(medium.payload, limits.audio)
            peak = max(float(wave_S.max()), -float(wave_S.min()))
            if peak < SILENT:
                raise BadSample(f"is silent: its loudest sample is {peak:.1g} of full scale")
        elif medium.kind == "video" and video_sound:
            sound_S = load_sound(medium.payload, limits.video)
            if sound_S is not None:
                part["sound"] = True
                waves[medium_of(part)] = sound_S
    return part


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the file's name in front of what is wrong with its content; Ctrl-C waits for the decoder."""
    try:
        with uninterrupted():
            yield
    except BadSample as error:
        raise DataError(f"{name}: {error.reason}") from None
