"""Cutting documents: nothing lost, nothing twice, nothing too long, and encoders see what they would have seen."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.costs import AUDIO, FILM, IMAGE, VIDEO, Costs, Sizing
from data.split import MediaSpan, Piece, TextSpan, split_document
from data.video import Sampling
from data.vision import ImageLimits
from train.layout import ModelLayout

LAYOUT = ModelLayout()
SIZING = Sizing(LAYOUT, ImageLimits(max_pixels=512 * 512), Sampling(max_pixels=128 * 32 * 32))
SECOND = 16_000
Medium = tuple[int, int, int, float]  # kind, samples, side in pixels, seconds of pictures

AUDIOS = st.builds(lambda samples: (AUDIO, samples, 0, 0.0), st.integers(400, 120 * SECOND))
IMAGES = st.builds(lambda side: (IMAGE, 0, side, 0.0), st.integers(32, 600))
VIDEOS = st.builds(lambda side, seconds: (VIDEO, 0, side, seconds), st.integers(64, 400), st.floats(0.5, 60))
FILMS = st.builds(
    lambda side, seconds, samples: (FILM, samples, side, seconds),
    st.integers(64, 400),
    st.floats(0.5, 60),
    st.integers(400, 70 * SECOND),
)
MEDIA = st.lists(st.one_of(AUDIOS, IMAGES, VIDEOS, FILMS), max_size=5)
GAPS = st.lists(st.integers(0, 1_500), min_size=6, max_size=6)


def costs_of(gaps: Sequence[int], media: Sequence[Medium]) -> Costs:
    """One document: text, medium, text, ..., text."""
    kinds, samples, sides, seconds = ([medium[i] for medium in media] for i in range(4))
    wraps = sum(4 if kind == FILM else 2 for kind in kinds)
    return Costs(
        text_tokens_N=np.array([sum(gaps) + wraps]),
        document_N=np.array([True]),
        owner_M=np.zeros(len(media), np.int64),
        kind_M=np.array(kinds, np.uint8),
        samples_M=np.array(samples, np.int64),
        height_M=np.array(sides, np.int64),
        width_M=np.array(sides, np.int64),
        frames_M=np.array([int(30 * length) for length in seconds], np.int64),
        seconds_M=np.array(seconds, np.float64),
        text_before_M=np.array(gaps[: len(media)], np.int64),
    )


def split(gaps: Sequence[int], media: Sequence[Medium], limit: int) -> list[Piece]:
    costs = costs_of(gaps, media)
    return split_document(costs, SIZING.sizes(costs), limit, LAYOUT)


def true_tokens(piece: Piece, kinds: Sequence[int]) -> int:
    """Length of a piece from what the encoders make of its parts, one part at a time."""
    tokens, frames, grids = 0, list(piece.frames), list(piece.grids)
    for part in piece.parts:
        if isinstance(part, TextSpan):
            tokens += part.stop - part.start
            continue
        if part.samples[1] > part.samples[0]:
            tokens += 2 + int(LAYOUT.num_audio_tokens(np.array(frames.pop(0))))
        if kinds[part.medium] != AUDIO:
            tokens += 2 + int(np.prod(grids.pop(0))) // 4
    assert not frames and not grids
    return tokens


@settings(max_examples=300, deadline=None)
@given(GAPS, MEDIA, st.integers(300, 4_000))
@example([0] * 6, [(FILM, 20 * SECOND, 300, 40.0)], 700)  # sound that ends early
@example([0] * 6, [(FILM, 40 * SECOND, 300, 20.0)], 700)  # and late
@example([50, 9, 0, 0, 0, 0], [(AUDIO, 32 * SECOND + 399, 0, 0.0)], 318)  # a rest too short to be heard
def test_everything_once_and_nothing_too_long(gaps, media, limit) -> None:
    gaps = gaps[: len(media) + 1]
    pieces = split(gaps, media, limit)
    assert pieces == split(gaps, media, limit)
    costs = costs_of(gaps, media)
    sizes, kinds = SIZING.sizes(costs), costs.kind_M.tolist()
    patch_tokens = [seen // max(grid[0], 1) for seen, grid in zip(sizes.seen_M, sizes.grid_M3, strict=True)]
    if not pieces:
        late = [kind == FILM and samples > length * SECOND for kind, samples, _, length in media]
        assert sum(gaps) + len(media) == 0 or any(late) or max(patch_tokens) > limit - 4 - 60
        return
    parts = [part for piece in pieces for part in piece.parts]
    for gap, tokens in enumerate(gaps):
        spans = [part for part in parts if isinstance(part, TextSpan) and part.gap == gap and not part.context]
        check_covered([(span.start, span.stop) for span in spans], tokens)
    for medium, (kind, samples, _, _) in enumerate(media):
        spans = [part for part in parts if isinstance(part, MediaSpan) and part.medium == medium]
        whole = samples if kind == AUDIO else int(sizes.grid_M3[medium][0])
        check_covered([(span.start, span.stop) for span in spans], whole)
        check_covered([span.samples for span in spans if span.samples[1] > span.samples[0]], samples)
        if sizes.tokens_M[medium] + (4 if kind == FILM else 2) <= limit:
            assert len(spans) == 1
    for piece in pieces:
        assert 0 < piece.tokens == true_tokens(piece, kinds) <= limit
        heard = [part.samples for part in piece.parts if isinstance(part, MediaSpan) and part.samples[1]]
        assert all(stop - start >= 400 for start, stop in heard if stop > start)
        assert piece.frames == tuple((stop - start) // 160 for start, stop in heard if stop > start)
    order = [(part.gap, 0) if isinstance(part, TextSpan) else (part.medium, 1) for part in parts]
    own = [place for part, place in zip(parts, order, strict=True) if not getattr(part, "context", False)]
    assert own == sorted(own)


def check_covered(spans: list[tuple[int, int]], total: int) -> None:
    """Spans, in order, hold 0 to total exactly once."""
    assert all(start < stop for start, stop in spans)
    edges = [0, *(edge for span in spans for edge in span), total]
    assert edges[::2] == edges[1::2]


@settings(max_examples=200, deadline=None)
@given(GAPS, MEDIA, st.integers(300, 4_000))
def test_context_opens_what_goes_on_and_no_piece_closes_early(gaps, media, limit) -> None:
    gaps = gaps[: len(media) + 1]
    pieces = split(gaps, media, limit)
    for before, after in pairwise(pieces):
        context = [part for part in after.parts if isinstance(part, TextSpan) and part.context]
        first = after.parts[len(context)]
        assert context == list(after.parts[: len(context)]) and len(context) <= 1
        if isinstance(first, TextSpan):  # one token of overlap, so that the first one has one before it
            assert [(part.gap, part.start, part.stop) for part in context] == (
                [(first.gap, first.start - 1, first.start)] if first.start else []
            )
            assert before.tokens == limit
        elif first.start == 0:
            assert not context
        else:
            length = sum(part.stop - part.start for part in context)
            assert length <= limit // 8 and all(part.stop == gaps[first.medium] for part in context)
            assert length > 0 or gaps[first.medium] == 0
        if isinstance(first, MediaSpan) and first.start == 0:
            costs = costs_of(gaps, media)
            tokens = int(SIZING.sizes(costs).tokens_M[first.medium]) + (4 if costs.kind_M[first.medium] == FILM else 2)
            assert before.tokens + tokens > limit
    assert not any(getattr(part, "context", False) for part in (pieces[0].parts if pieces else ()))


def test_long_audio_is_cut_at_windows_of_the_encoder() -> None:
    pieces = split([100, 20], [(AUDIO, 40 * 60 * SECOND, 0, 0.0)], 8_192)
    spans = [part for piece in pieces for part in piece.parts if isinstance(part, MediaSpan)]
    assert all(span.start % (800 * 160) == 0 for span in spans)
    frames = np.array([frames for piece in pieces for frames in piece.frames])
    assert LAYOUT.num_audio_tokens(frames).sum() == 40 * 60 * 13
    assert len(pieces) == 4  # 31,200 tokens of audio and 100 of context in each; 8,192 x 4 = 32,768
    assert pieces[1].parts[0] == TextSpan(0, 0, 100, context=True)


def test_sound_is_cut_with_the_pictures() -> None:
    pieces = split([0, 0], [(FILM, 60 * SECOND, 300, 60.0)], 1_000)
    spans = [part for piece in pieces for part in piece.parts if isinstance(part, MediaSpan)]
    assert len(spans) > 3
    assert all(span.samples == (span.start * SECOND, span.stop * SECOND) for span in spans)


def test_silent_end_of_a_film_is_seen_only() -> None:
    pieces = split([0, 0], [(FILM, 20 * SECOND, 300, 60.0)], 1_000)
    assert pieces[-1].frames == () and pieces[-1].grids
    assert sum(sum(piece.frames) for piece in pieces) == 2_000


@pytest.mark.parametrize(
    "limit, samples, frames",
    [
        (106, 16 * SECOND, (800, 800)),
        (107, 16 * SECOND + 399, (800, 802)),
        (106, 16 * SECOND + 400, (800, 800, 2)),
        (314, 48 * SECOND, (2_400, 2_400)),
        (314, 48 * SECOND + 399, (2_400, 1_600, 802)),  # not alone, though all before it would fill a piece
    ],
)
def test_rest_too_short_to_be_heard_stays_with_what_is_before(limit, samples, frames) -> None:
    pieces = split([0, 0], [(AUDIO, samples, 0, 0.0)], limit)
    assert tuple(frame for piece in pieces for frame in piece.frames) == frames


def test_context_leaves_room_for_a_window() -> None:
    pieces = split([50, 0], [(AUDIO, 60 * SECOND, 0, 0.0)], 110)
    assert all(piece.parts[0] == TextSpan(0, 46, 50, context=True) for piece in pieces[2:-1])
    assert all(piece.tokens == 110 for piece in pieces[2:-1]) and len(pieces) > 5


def test_film_of_many_frames_is_cut_where_its_sound_can_be_heard() -> None:
    costs = replace(costs_of([600, 0], [(FILM, SECOND, 300, 1.0)]), frames_M=np.array([240]))
    sizing = Sizing(LAYOUT, video=Sampling(fps=240, max_pixels=128 * 32 * 32))
    pieces = split_document(costs, sizing.sizes(costs), 1_000, LAYOUT)  # 120 patches of 133 samples
    sounds = [part.samples for piece in pieces for part in piece.parts if isinstance(part, MediaSpan)]
    check_covered(sounds, SECOND)
    assert len(pieces) > 10 and all(stop - start >= 400 for start, stop in sounds)


def test_medium_that_fits_a_sequence_starts_a_new_piece() -> None:
    image = (IMAGE, 0, 512, 0.0)  # 256 tokens
    first, second = split([300, 0], [image], 400)
    assert first.tokens == 300 and second.parts == (MediaSpan(0, 0, 1, (0, 0)),) and second.tokens == 258


def test_image_above_a_sequence_cannot_be_split() -> None:
    assert split([10, 10], [(IMAGE, 0, 512, 0.0)], 257) == []
    assert split([10, 10], [(AUDIO, 60 * SECOND, 0, 0.0)], 105) == []
    assert split([10, 10], [(AUDIO, 60 * SECOND, 0, 0.0)], 106) != []


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100_000), st.integers(8, 5_000))
def test_text_alone_needs_as_few_pieces_as_can_be(tokens: int, limit: int) -> None:
    pieces = split([tokens], [], limit)
    assert len(pieces) == max(1, -(-(tokens - 1) // (limit - 1)))
    assert sum(piece.tokens for piece in pieces) == tokens + len(pieces) - 1
