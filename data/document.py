"""One sample to tensors: its media decoded, its text tokenised, all laid out as one document.

    record + bytes of media --decode--> mel frames, patches --chat.render, layout.lay_out--> ids, labels, positions

Labels are shifted: labels[t] is the target of position t, that is token t + 1, or -100. Nothing is ever cut: every
log-mel frame and every patch has its placeholder. A piece of a document too long for one sequence (data/split.py) takes
the same way; only its stretch of a medium is decoded into tokens. Cost: that of decoding, about 1 ms a second of audio
and 3 ms for its log-mel, 30 ms for a photograph of a megapixel.

Shapes: T tokens, S samples at 16 kHz, F log-mel frames, M mel filters, P patches, X values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.audio import Limits, decode
from data.chat import Run, render
from data.errors import BadSample
from data.layout import Layout, Segment
from data.mel import HOP, NUM_MELS, log_mel
from data.sample import Medium, SampleRecord
from data.split import MediaSpan, Piece
from data.tokenizer import Tokenizer
from data.types import Batch, Speech
from data.video import Sampling, VideoLimits, load_sound, load_video
from data.vision import Grid, ImageLimits, load_image

IGNORE = -100


@dataclass(frozen=True)
class MediaLimits:
    """What media may be at most, and to what sizes images and videos are brought."""

    audio: Limits = field(default_factory=Limits)
    image: ImageLimits = field(default_factory=ImageLimits)
    video: VideoLimits = field(default_factory=VideoLimits)
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def max_bytes(self) -> int:
        """Of one member."""
        return max(self.audio.max_bytes, self.image.max_bytes, self.video.max_bytes)


@dataclass(frozen=True)
class Document:
    """One sample, or a piece of one, ready to be packed."""

    key: str
    ids_T: Tensor
    labels_T: Tensor
    position_ids_3T: Tensor
    mels_FM: Sequence[Tensor]
    pixels_PX: Sequence[Tensor]
    grids: Sequence[Grid]
    speech: Speech | None = None
    frames: int = 0  # of speech
    media_RH: Tensor | None = None  # hidden states, where they take the place of media: data/hidden.py
    windows: Sequence[int] = ()  # mel frames of each clip's attention windows, where they are drawn


class Use(NamedTuple):
    """A medium as a document takes it."""

    number: int  # among the media of the record
    medium: Medium
    span: MediaSpan | None = None  # None: all of it


class Maker:
    """Makes documents. Holds no state."""

    def __init__(self, tokenizer: Tokenizer, layout: Layout, limits: MediaLimits, last_only: bool = False) -> None:
        """`last_only`: of a conversation, the last answer alone carries loss."""
        self.tokenizer, self.layout, self.limits, self.last_only = tokenizer, layout, limits, last_only

    def document(
        self,
        record: SampleRecord,
        *,
        samples: Sequence[int] | None = None,
        hear: Callable[[np.ndarray, int], Tensor] = lambda wave_S, _: log_mel(wave_S),
        prompt_only: bool = False,
        piece: Piece | None = None,
    ) -> Document:
        """Tokens, labels, positions and media of a record with its media.

        `samples` is what the index says of each medium's audio. `hear` makes float32 [F, M] of a waveform [S] and the
        number of its medium. Raises BadSample where a medium cannot be decoded or is not what the index says.
        """
        rendered = render(record, self.tokenizer, prompt_only, self.last_only)
        desk = Desk(self.layout, self.limits, record.media, samples, hear)
        uses = whole(rendered) if piece is None else _pieced(rendered, piece)
        return desk.document(record.key, [item if isinstance(item, Run) else desk.take(item) for item in uses])


def join(
    documents: Sequence[Document],
    skipped: Sequence[str] = (),
    join_speech: Callable[[Sequence[Speech]], Speech] | None = None,
) -> Batch:
    """Documents end to end as one packed sequence; `join_speech` where they are spoken."""
    if not documents:
        return Batch.empty(NUM_MELS, tuple(skipped))
    mels_FM = [mel_FM for document in documents for mel_FM in document.mels_FM]
    pixels_PX = [pixels for document in documents for pixels in document.pixels_PX]
    media_RH = [document.media_RH for document in documents if document.media_RH is not None]
    return Batch(
        token_ids_T=torch.cat([document.ids_T for document in documents]),
        labels_T=torch.cat([document.labels_T for document in documents]),
        position_ids_3T=torch.cat([document.position_ids_3T for document in documents], dim=1),
        doc_lengths=tuple(len(document.ids_T) for document in documents),
        mel_FM=torch.cat(mels_FM) if mels_FM else torch.empty(0, NUM_MELS),
        mel_lengths=tuple(len(mel_FM) for mel_FM in mels_FM),
        keys=tuple(document.key for document in documents),
        skipped=tuple(skipped),
        pixels_PX=torch.cat(pixels_PX) if pixels_PX else torch.empty(0, 0),
        grids=tuple(grid for document in documents for grid in document.grids),
        speech=join_speech([document.speech for document in documents if document.speech]) if join_speech else None,
        media_RH=torch.cat(media_RH) if media_RH else torch.empty(0, 0),
        windows=tuple(window for document in documents for window in document.windows),
    )


def whole(rendered: Sequence[Run | Medium]) -> Iterator[Run | Use]:
    """Runs, and each medium as all of it."""
    number = 0
    for item in rendered:
        yield Use(number, item) if isinstance(item, Medium) else item
        number += isinstance(item, Medium)


def _pieced(rendered: Sequence[Run | Medium], piece: Piece) -> Iterator[Run | Use]:
    runs = [item for item in rendered if isinstance(item, Run)]
    media = [item for item in rendered if isinstance(item, Medium)]
    for part in piece.parts:
        if isinstance(part, MediaSpan):
            yield Use(part.medium, media[part.medium], part)
            continue
        run, span = runs[part.gap], slice(part.start, part.stop)
        yield Run(run.ids[span], [learn and not part.context for learn in run.learned[span]])


class Desk:
    """Where one document is put together: decodes its media and collects what the encoders will take."""

    def __init__(
        self,
        layout: Layout,
        limits: MediaLimits,
        payloads: Mapping[str, bytes],
        samples: Sequence[int] | None = None,
        hear: Callable[[np.ndarray, int], Tensor] = lambda wave_S, _: log_mel(wave_S),
    ) -> None:
        self.layout, self.limits, self.payloads, self.samples, self.hear = layout, limits, payloads, samples, hear
        self.waves: dict[Medium, np.ndarray] = {}  # a member that is heard twice is decoded once
        self.mels_FM: list[Tensor] = []
        self.pixels_PX: list[Tensor] = []
        self.grids: list[Grid] = []

    def take(self, use: Use) -> Segment:
        """Decode a medium, keep what the encoders need, and say what stands for it among the tokens."""
        payload, patching = self.payloads[use.medium.extension], self.layout.patching
        if use.medium.kind == "audio":
            return self.layout.audio(self._listen(use, payload))
        if patching is None:
            raise BadSample(f"it has {use.medium.kind}s, and the model no vision encoder")
        if use.medium.kind == "image":
            return self.layout.image(self._look(*load_image(payload, self.limits.image, patching)))
        patches = (use.span.start, use.span.stop) if use.span else None
        clip = load_video(payload, self.limits.sampling, self.limits.video, patching, patches=patches)
        silent = use.span is not None and use.span.samples[0] == use.span.samples[1]  # the film outlasts its sound
        frames = self._listen(use, payload) if use.medium.sound and not silent else None
        return self.layout.video(self._look(clip.pixels_PX, clip.grid), clip.times, frames)

    def document(self, key: str, items: Sequence[Run | Segment]) -> Document:
        """Text runs and what `take` gave for the media between them, as one document."""
        segments = [self.layout.text(len(item.ids)) if isinstance(item, Run) else item for item in items]
        text_ids = [token for item in items if isinstance(item, Run) for token in item.ids]
        learned: list[bool] = []
        for item, segment in zip(items, segments, strict=True):
            learned += item.learned if isinstance(item, Run) else [False] * self.layout.num_tokens(segment)
        ids_T, position_ids_3T = self.layout.lay_out(segments, text_ids)
        labels_T = torch.full_like(ids_T, IGNORE)
        targets_T = torch.tensor([*learned[1:], False])
        labels_T[targets_T] = ids_T.roll(-1)[targets_T]
        return Document(key, ids_T, labels_T, position_ids_3T, self.mels_FM, self.pixels_PX, self.grids)

    def _look(self, pixels_PX: Tensor, grid: Grid) -> Grid:
        self.pixels_PX.append(pixels_PX)
        self.grids.append(grid)
        return grid

    def _listen(self, use: Use, payload: bytes) -> int:
        """Log-mel frames of a medium's audio or sound."""
        wave_S = self.waves.get(use.medium)
        if wave_S is None:
            wave_S = self.waves[use.medium] = self._wave(use.medium, payload)
        if self.samples is not None and len(wave_S) != self.samples[use.number]:
            said = self.samples[use.number]
            raise BadSample(f".{use.medium.extension} decodes to {len(wave_S)} samples, its index says {said}")
        if use.span is None:
            mel_FM = self.hear(wave_S, use.number)
        elif use.medium.kind == "audio":  # cut at windows of the encoder: frames are those of the whole clip
            mel_FM = self.hear(wave_S, use.number)[use.span.start // HOP : use.span.stop // HOP]
        else:
            mel_FM = self.hear(wave_S[slice(*use.span.samples)], use.number)
        self.mels_FM.append(mel_FM)
        return len(mel_FM)

    def _wave(self, medium: Medium, payload: bytes) -> np.ndarray:
        if medium.kind == "audio":
            return decode(payload, self.limits.audio)
        wave_S = load_sound(payload, self.limits.video)
        if wave_S is None:
            raise BadSample(f".{medium.extension} has no sound")
        return wave_S
