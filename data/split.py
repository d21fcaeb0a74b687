"""Documents longer than a sequence, cut into pieces that are not: a pure function of what the index says.

    text 0, medium 0, text 1, medium 1, ... --fill sequences in order, greedily--> pieces

    text               cut at any token; the piece that goes on opens with the token before the cut, so that the first
                       token after it is still predicted
    image              never cut
    audio              cut at the encoder's windows: it attends within them, and a piece's are those of the whole
    video              cut at its temporal patches, its sound at the same moments

A medium that fits into one sequence is never cut: where there is no room left it starts a new piece. A piece that goes
on inside a cut medium opens with the medium's context, the text directly before the medium, its last limit // 8 tokens
at most. What opens a piece in this way is context: it carries no loss, and all else is in exactly one piece. Sound too
short to be heard on its own, below one analysis window of 400 samples, stays with the sound before it.

A document that is cut is heard at its own speed. Cost: 30 us a medium, 2 us a piece.

M media; C cuts, the places where a medium may be cut, its start and end included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.audio import MIN_SAMPLES, SAMPLE_RATE
from data.costs import AUDIO, FILM, IMAGE, VIDEO, Costs, Sizes
from data.layout import WRAP, Layout
from data.mel import HOP
from data.vision import Grid

CONTEXT = 8  # context is at most this fraction of a sequence


class TextSpan(NamedTuple):
    """Text tokens `start` to `stop` of what lies before medium `gap`, or after the last one."""

    gap: int
    start: int
    stop: int
    context: bool = False  # repeated from an earlier piece, without loss


class MediaSpan(NamedTuple):
    """A medium, or a part of it: of audio samples at 16 kHz, of a video temporal patches, of an image 0 to 1."""

    medium: int
    start: int
    stop: int
    samples: tuple[int, int]  # of audio, or of the sound in step with the patches: empty where there is none


class Piece(NamedTuple):
    """A part of a document that fits into one sequence."""

    parts: tuple[TextSpan | MediaSpan, ...]
    tokens: int
    frames: tuple[int, ...]  # log-mel frames of each part that is heard
    grids: tuple[Grid, ...]  # of each part that is seen


def split_document(costs: Costs, sizes: Sizes, limit: int, layout: Layout) -> list[Piece]:
    """Pieces of at most `limit` tokens of one document, given as the `costs` of one sample and their `sizes`.

    Empty where it cannot be split: an image, a window of audio or a temporal patch is longer than a sequence.
    """
    assert len(costs.text_tokens_N) == 1
    media = [_Medium.of(costs, sizes, number, layout) for number in range(len(costs.kind_M))]
    last_gap = int(costs.text_tokens_N[0] - costs.text_before_M.sum()) - sum(medium.wraps for medium in media)
    gaps = [*costs.text_before_M.tolist(), last_gap]
    filling = _Filling(limit, gaps)
    for number, medium in enumerate(media):
        filling.add_text(number)
        if not filling.add_medium(number, medium):
            return []
    filling.add_text(len(media))
    filling.close()
    return filling.pieces


@dataclass(frozen=True)
class _Medium:
    """A medium and where it may be cut."""

    at_C: np.ndarray  # int64: in the units of MediaSpan
    samples_C: np.ndarray  # int64: samples heard before each cut
    patches_C: np.ndarray  # int64: temporal patches seen before each cut
    sides: tuple[int, int]  # rows and columns of patches
    patch_tokens: int  # of a temporal patch
    wraps: int  # tokens around it, as a whole
    layout: Layout

    @classmethod
    def of(cls, costs: Costs, sizes: Sizes, number: int, layout: Layout) -> _Medium:
        """The medium `number` of a sample."""
        kind, samples = int(costs.kind_M[number]), int(costs.samples_M[number])
        patches, rows, columns = sizes.grid_M3[number].tolist()
        patch_tokens = int(sizes.seen_M[number]) // max(patches, 1)
        if kind == AUDIO:
            at_C = samples_C = _audio_cuts(samples, layout.audio_window * HOP)
            patches_C = np.zeros_like(at_C)
        elif kind == FILM:
            at_C, samples_C = _film_cuts(samples, float(costs.seconds_M[number]), patches)
            patches_C = at_C
        else:
            at_C = np.append(np.arange(max(patches, 1)), patches) if kind == VIDEO else np.array([0, 1])
            patches_C = at_C * patches if kind == IMAGE else at_C
            samples_C = np.zeros_like(at_C)
        wraps = 2 * WRAP if kind == FILM else WRAP
        return cls(at_C, samples_C, patches_C, (rows, columns), patch_tokens, wraps, layout)

    def tokens(self, first: int, last: np.ndarray) -> np.ndarray:
        """int64: tokens of the stretches from the cut `first` to the cuts `last`, those that wrap them included."""
        samples = self.samples_C[last] - self.samples_C[first]
        patches = self.patches_C[last] - self.patches_C[first]
        heard = np.asarray(self.layout.num_audio_tokens(samples // HOP), np.int64)
        wraps = WRAP * np.maximum((samples > 0).astype(np.int64) + (patches > 0), 1)
        return heard + self.patch_tokens * patches + wraps


def _audio_cuts(samples: int, window: int) -> np.ndarray:
    """Samples where audio may be cut: starts of windows after which there is something to hear."""
    return np.append(np.arange(0, max(samples - MIN_SAMPLES, 0) + 1, window), samples)


def _film_cuts(samples: int, seconds: float, patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Temporal patches where a film may be cut, and the sample of each: no stretch has less than can be heard."""
    at, before = [0], [0]
    for patch in range(1, patches):
        sample = int(patch * seconds / patches * SAMPLE_RATE)
        if samples - sample < MIN_SAMPLES:
            sample = samples
        if sample - before[-1] >= MIN_SAMPLES or before[-1] == samples:
            at.append(patch)
            before.append(sample)
    return np.array([*at, patches]), np.array([*before, samples])


@dataclass
class _Filling:
    """Pieces that are done, and the one that is being filled."""

    limit: int
    gaps: list[int]
    pieces: list[Piece] = field(default_factory=list)
    parts: list[TextSpan | MediaSpan] = field(default_factory=list)
    room: int = 0
    frames: list[int] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.room = self.limit

    def close(self) -> None:
        """Start a new piece, unless this one is empty."""
        if self.parts:
            self.pieces.append(Piece(tuple(self.parts), self.limit - self.room, tuple(self.frames), tuple(self.grids)))
            self.parts, self.room, self.frames, self.grids = [], self.limit, [], []

    def add_text(self, gap: int) -> None:
        """All text of a gap, cut wherever a piece is full."""
        start = 0
        while start < self.gaps[gap]:
            if not self.room:
                self.close()
            if start and not self.parts:
                self._add_context(gap, start, min(1, self.limit // CONTEXT))
            stop = min(start + self.room, self.gaps[gap])
            self.parts.append(TextSpan(gap, start, stop))
            self.room -= stop - start
            start = stop

    def add_medium(self, number: int, medium: _Medium) -> bool:
        """A medium, cut only if it is longer than a sequence; False where that cannot be done."""
        first, end = 0, len(medium.at_C) - 1
        whole = int(medium.tokens(0, np.array([end]))[0]) <= self.limit
        while first < end:
            stops = np.array([end]) if whole else np.arange(first + 1, end + 1)
            tokens = medium.tokens(first, stops)
            if tokens[0] > self.limit:
                return False
            if first or tokens[0] > self.room:
                self.close()
            if first:
                self._add_context(number, self.gaps[number], min(self.limit // CONTEXT, self.limit - int(tokens[0])))
            fitting = int(np.searchsorted(tokens, self.room, side="right")) - 1
            self._add_stretch(number, medium, first, int(stops[fitting]), int(tokens[fitting]))
            first = int(stops[fitting])
        return True

    def _add_context(self, gap: int, stop: int, most: int) -> None:
        start = max(stop - most, 0)
        if start < stop:
            self.parts.append(TextSpan(gap, start, stop, context=True))
            self.room -= stop - start

    def _add_stretch(self, number: int, medium: _Medium, first: int, last: int, tokens: int) -> None:
        start, stop = int(medium.samples_C[first]), int(medium.samples_C[last])
        self.parts.append(MediaSpan(number, int(medium.at_C[first]), int(medium.at_C[last]), (start, stop)))
        self.room -= tokens
        if stop > start:
            self.frames.append((stop - start) // HOP)
        if patches := int(medium.patches_C[last] - medium.patches_C[first]):
            self.grids.append((patches, *medium.sides))
