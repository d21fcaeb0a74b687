"""Position ids of packed documents: time, height and width of every token (TM-RoPE).

    segments of a document --lay_out--> token ids [T] with placeholders, position ids [3, T]
    token ids, grids, seconds, mel lengths --read_segments--> segments --document_positions--> position ids [3, T]

Text and audio advance the three axes together by one a token (an audio token is a thirteenth of a second). A picture's
axes part: its time is `rate` ids a second, fractions kept, its height and width count merged patches, all from where
the text before it ended. What follows a picture starts after the largest id of its last token. A video with its sound
starts both at one id and merges them by time, video first where times tie. Its run is wrapped in the tokens of both,
`vision_start audio_start ... audio_end vision_end`; every other medium has one token at each end.

Ids equal those of transformers' Qwen3-Omni bit for bit, so sums and products are float32 and in its order. Like there,
a video longer than its sound passes its height and width on to the ids that follow and a sound longer than its video
does not. Cost: a few vectorised operations for each medium, none for each token, and one sort of a video with sound.

Letters: T tokens of a document, N tokens of a piece, F frames (temporal patches) of a video.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from models.audio_encoder import num_audio_tokens
from models.omni_config import OmniConfig

Grid = tuple[int, int, int]  # frames, rows and columns, in patches
Seconds = float | Sequence[float]  # seconds from frame to frame, or the time of each frame from the start of the sound
MERGE, RATE = 2, 13  # the released spatial_merge_size and position_id_per_seconds


@dataclass(frozen=True)
class Text:
    """Tokens that are not placeholders and do not wrap any."""

    num_tokens: int

    def __post_init__(self) -> None:
        _require(self.num_tokens >= 0, f"text of {self.num_tokens} tokens")


@dataclass(frozen=True)
class Audio:
    """A clip of `num_tokens` placeholders: models.audio_encoder.num_audio_tokens."""

    num_tokens: int

    def __post_init__(self) -> None:
        _require(self.num_tokens >= 1, f"audio of {self.num_tokens} tokens; it must have at least 1")


@dataclass(frozen=True)
class Image:
    """A picture; should it have more frames than one, they are a second apart."""

    grid: Grid

    def __post_init__(self) -> None:
        _require(len(self.grid) == 3 and min(self.grid) >= 1, f"grid {tuple(self.grid)} must be three counts above 0")


@dataclass(frozen=True)
class Video(Image):
    """Frames of one rate (`seconds` a number: two frames at 2 fps in a patch make it 1.0) or each at its own time."""

    seconds: Seconds

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seconds, float | int):
            _require(0 < self.seconds < math.inf, f"seconds between frames must be above 0, not {self.seconds}")
            return
        times = tuple(self.seconds)
        object.__setattr__(self, "seconds", times)
        _require(len(times) == self.grid[0], f"{len(times)} times for the {self.grid[0]} frames of grid {self.grid}")
        _require(0 <= times[0] and times[-1] < math.inf, f"times must be finite and not below 0: {times}")
        _require(all(a <= b for a, b in pairwise(times)), f"times of frames must not go back: {times}")


@dataclass(frozen=True)
class VideoWithAudio(Video):
    """A video and its sound of `num_audio_tokens` placeholders."""

    num_audio_tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.num_audio_tokens >= 1, f"video with {self.num_audio_tokens} audio tokens; it needs at least 1")


Segment = Text | Audio | Image  # and its subclasses Video and VideoWithAudio


@dataclass(frozen=True)
class MediaTokens:
    """The special token ids by which media are marked, those of the released model if not given."""

    audio: int = 151675
    image: int = 151655
    video: int = 151656
    audio_start: int = 151669
    audio_end: int = 151670
    vision_start: int = 151652
    vision_end: int = 151653

    @classmethod
    def of(cls, config: OmniConfig) -> MediaTokens:
        """Those of a model. Without a vision encoder no token stands for a picture: -1."""
        thinker = config.thinker
        return cls(
            thinker.audio_token_id,
            -1 if thinker.image_token_id is None else thinker.image_token_id,
            -1 if thinker.video_token_id is None else thinker.video_token_id,
            config.audio_start_token_id,
            config.audio_end_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )


def text_audio_positions(doc_lengths: Sequence[int]) -> Tensor:
    """Documents of `doc_lengths` tokens, text and audio only -> float32 [3, T], restarting at 0 in each."""
    parts = [torch.arange(length, dtype=torch.float32) for length in doc_lengths]
    return torch.cat([torch.empty(0), *parts]).expand(3, -1).contiguous()


def num_tokens(segment: Segment, merge: int = MERGE) -> int:
    """Tokens of a segment, those that wrap it included. ValueError if `merge` does not divide a grid."""
    if isinstance(segment, Text):
        return segment.num_tokens
    if isinstance(segment, Audio):
        return segment.num_tokens + 2
    rows, columns = _merged_sides(segment.grid, merge)
    sound = segment.num_audio_tokens + 2 if isinstance(segment, VideoWithAudio) else 0
    return segment.grid[0] * rows * columns + 2 + sound


def document_positions(segments: Sequence[Segment], *, merge: int = MERGE, rate: float = RATE) -> Tensor:
    """One document -> float32 [3, T]. ValueError if `merge` does not divide a grid."""
    pieces = [position_3N for _, position_3N in _pieces(segments, MediaTokens(), merge, rate)]
    return torch.cat([torch.empty(3, 0), *pieces], dim=1)


def pack_positions(documents: Sequence[Sequence[Segment]], *, merge: int = MERGE, rate: float = RATE) -> Tensor:
    """Documents end to end -> float32 [3, T], restarting at 0 in each."""
    parts = [document_positions(segments, merge=merge, rate=rate) for segments in documents]
    return torch.cat([torch.empty(3, 0), *parts], dim=1)


def lay_out(
    segments: Sequence[Segment],
    text_ids: Sequence[int] | Tensor = (),
    tokens: MediaTokens | None = None,
    *,
    merge: int = MERGE,
    rate: float = RATE,
) -> tuple[Tensor, Tensor]:
    """One document -> token ids int64 [T] and position ids float32 [3, T].

    `text_ids` fill the Text segments in order; media become their placeholders, wrapped. A segment alone gives its
    run. A video with sound has its placeholders in the order of their ids, which is the order of transformers'
    processor, except where a tie is decided by rounding: the processor compares times in float64 from the video's
    start, its position ids in float32 from the document's, and they can differ at 15 frames a second and more.
    """
    pieces = list(_pieces(segments, tokens or MediaTokens(), merge, rate))
    token_ids_T = torch.cat([torch.empty(0, dtype=torch.int64), *(ids_N for ids_N, _ in pieces)])
    text_T = token_ids_T == _TEXT
    given = torch.as_tensor(text_ids, dtype=torch.int64)
    needed = int(text_T.sum())
    _require(len(given) == needed, f"{len(given)} text ids for text segments of {needed} tokens")
    token_ids_T[text_T] = given
    return token_ids_T, torch.cat([torch.empty(3, 0), *(position_3N for _, position_3N in pieces)], dim=1)


def token_positions(
    token_ids_T: Tensor,
    tokens: MediaTokens,
    *,
    grids: Sequence[Grid] = (),
    seconds: Sequence[Seconds] = (),
    mel_lengths: Sequence[int] = (),
    merge: int = MERGE,
    rate: float = RATE,
) -> Tensor:
    """One document by its token ids -> float32 [3, T] on the CPU; arguments and errors of `read_segments`.

    The order of placeholders inside a video with sound is taken to be that of `lay_out`, as in transformers.
    """
    segments = read_segments(token_ids_T, tokens, grids=grids, seconds=seconds, mel_lengths=mel_lengths, merge=merge)
    return document_positions(segments, merge=merge, rate=rate)


def next_positions(position_ids_3T: Tensor, count: int) -> Tensor:
    """Ids of `count` text tokens that are generated after a document [3, T] -> float32 [3, count].

    They go on from the document's largest id, in transformers' arithmetic: an offset to the number of tokens.
    """
    length = position_ids_3T.shape[1]
    offset = position_ids_3T.max() + 1 - length if length else torch.zeros(())
    return (torch.arange(length, length + count, device=position_ids_3T.device) + offset).float().expand(3, -1)


def read_segments(
    token_ids_T: Tensor,
    tokens: MediaTokens,
    *,
    grids: Sequence[Grid] = (),
    seconds: Sequence[Seconds] = (),
    mel_lengths: Sequence[int] = (),
    merge: int = MERGE,
) -> list[Segment]:
    """The segments of one document from its token ids int64 [T].

    `grids` of images and videos together, `seconds` of videos and `mel_lengths` (10-ms frames) of clips and sounds,
    each in the order of their runs. Whether a video has sound is read from the token after its first. ValueError if a
    run is not what its grid or clip asks for, or one is missing or left over.
    """
    ids_T = token_ids_T.cpu()
    starts, kinds, ends = _marks(ids_T, tokens)
    grid_of, seconds_of, clip_of = _Supply("grids", grids), _Supply("seconds", seconds), _Supply("clips", mel_lengths)
    segments: list[Segment] = []
    cursor = placeholders = 0
    for start, kind in zip(starts, kinds, strict=True):
        if start < cursor:  # the audio_start inside a video with sound
            continue
        where = f"run at token {start}"
        if kind == tokens.audio:
            segment: Segment = Audio(num_audio_tokens(clip_of.next(where)))
        elif kind == tokens.image:
            segment = Image(grid_of.next(where))
        elif kind == tokens.video:
            segment = Video(grid_of.next(where), seconds_of.next(where))
        elif kind == tokens.audio_start and int(ids_T[start]) == tokens.vision_start:
            sound = num_audio_tokens(clip_of.next(where))
            segment = VideoWithAudio(grid_of.next(where), seconds_of.next(where), sound)
        else:
            raise ValueError(f"{where} is of no known kind: token {int(ids_T[start])} is followed by {kind}")
        length = num_tokens(segment, merge)
        placeholders += _check_run(ids_T, start, length, ends, segment, tokens)
        segments += [Text(start - cursor), segment]
        cursor = start + length
    for supply in (grid_of, seconds_of, clip_of):
        supply.check_used()
    found = int(torch.isin(ids_T, torch.tensor([tokens.audio, tokens.image, tokens.video])).sum())
    _require(found == placeholders, f"{found} placeholders, but the runs hold {placeholders}: some lie outside a run")
    return [*segments, Text(len(ids_T) - cursor)]


_TEXT = -2  # stands for a token id that the caller knows


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _merged_sides(grid: Grid, merge: int) -> tuple[int, int]:
    _, rows, columns = grid
    _require(
        rows % merge == 0 and columns % merge == 0,
        f"grid {tuple(grid)} cannot be merged {merge} x {merge}: its rows and columns must be multiples of {merge}",
    )
    return rows // merge, columns // merge


def _pieces(
    segments: Sequence[Segment], tokens: MediaTokens, merge: int, rate: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids [N] (`_TEXT` where text is) and position ids [3, N] of each piece of a document, in order.

    Text that adjoins is one piece: each piece's start is rounded, so that cutting text in two must not show.
    """
    start, text = torch.zeros(()), 0
    for segment in segments:
        if isinstance(segment, Text):
            text += segment.num_tokens
            continue
        opening, closing = _wrap(segment, tokens)
        yield _filled(text, _TEXT), _steps(text, start)
        start, text = start + text, 0
        yield torch.tensor(opening), _steps(len(opening), start)
        start = start + len(opening)
        ids_N, position_3N = _placeholders(segment, start, tokens, merge, rate)
        yield ids_N, position_3N
        start = position_3N[:, -1].max() + 1
        yield torch.tensor(closing), _steps(len(closing), start)
        start = start + (len(closing) - 1) + 1
    yield _filled(text, _TEXT), _steps(text, start)


def _filled(count: int, token: int) -> Tensor:
    return torch.full((count,), token, dtype=torch.int64)


def _steps(count: int, start: Tensor) -> Tensor:
    """`count` ids from `start`, the same on each axis: [3, count]."""
    return (torch.arange(count, dtype=torch.float32) + start).expand(3, -1)


def _wrap(segment: Segment, tokens: MediaTokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens before and after a medium's placeholders."""
    if isinstance(segment, Audio):
        return (tokens.audio_start,), (tokens.audio_end,)
    if isinstance(segment, VideoWithAudio):
        return (tokens.vision_start, tokens.audio_start), (tokens.audio_end, tokens.vision_end)
    return (tokens.vision_start,), (tokens.vision_end,)


def _placeholders(
    segment: Audio | Image, start: Tensor, tokens: MediaTokens, merge: int, rate: float
) -> tuple[Tensor, Tensor]:
    """Token ids [N] and position ids [3, N] of a medium that starts at id `start`."""
    if isinstance(segment, Audio):
        return _filled(segment.num_tokens, tokens.audio), _steps(segment.num_tokens, start)
    times_F = _frame_times(segment) * rate
    rows, columns = _merged_sides(segment.grid, merge)
    shape = len(times_F), rows, columns
    picture_3N = torch.stack(
        [
            times_F.view(-1, 1, 1).expand(shape),
            torch.arange(rows, dtype=torch.float32).view(1, -1, 1).expand(shape),
            torch.arange(columns, dtype=torch.float32).expand(shape),
        ]
    ).flatten(1)
    picture_3N += start
    count = picture_3N.shape[1]
    if not isinstance(segment, VideoWithAudio):
        return _filled(count, tokens.video if isinstance(segment, Video) else tokens.image), picture_3N
    both_3N = torch.cat([picture_3N, _steps(segment.num_audio_tokens, start)], dim=1)
    order_N = both_3N[0].argsort(stable=True)  # video stands first, and stays first where times tie
    return torch.where(order_N < count, tokens.video, tokens.audio), both_3N[:, order_N]


def _frame_times(segment: Image) -> Tensor:
    """Seconds of each frame, float32 [F]."""
    seconds = segment.seconds if isinstance(segment, Video) else 1.0
    if isinstance(seconds, float | int):
        return torch.arange(segment.grid[0]) * torch.tensor(seconds, dtype=torch.float32)
    return torch.tensor(seconds, dtype=torch.float32)


class _Supply:
    """Grids, seconds or clips, taken one by one."""

    def __init__(self, name: str, items: Sequence) -> None:
        self.name, self.items, self.used = name, items, 0

    def next(self, where: str):
        """The next one, for the run `where`."""
        _require(self.used < len(self.items), f"{where} needs number {self.used + 1} of {len(self.items)} {self.name}")
        self.used += 1
        return self.items[self.used - 1]

    def check_used(self) -> None:
        """Raise if any is left over."""
        _require(self.used == len(self.items), f"{len(self.items)} {self.name} for {self.used} runs that take one")


def _marks(ids_T: Tensor, tokens: MediaTokens) -> tuple[list[int], list[int], list[int]]:
    """Where runs may start, the token after each (`_TEXT` at the end), and where runs may end."""
    starts_S = ((ids_T == tokens.vision_start) | (ids_T == tokens.audio_start)).nonzero().flatten()
    ends_S = ((ids_T == tokens.vision_end) | (ids_T == tokens.audio_end)).nonzero().flatten()
    followed_T = torch.cat([ids_T, ids_T.new_full((1,), _TEXT)])
    return starts_S.tolist(), followed_T[starts_S + 1].tolist(), ends_S.tolist()


def _check_run(
    ids_T: Tensor, start: int, length: int, ends: list[int], segment: Audio | Image, tokens: MediaTokens
) -> int:
    """Raise unless the tokens from `start` are the run of `segment`, `length` long. Returns its placeholders."""
    opening, closing = _wrap(segment, tokens)
    index, marks = bisect_left(ends, start), 2 * len(closing)
    _require(index < len(ends), f"run at token {start} has no end: none of the tokens {closing} follows")
    found = ends[index] + len(closing) - start
    _require(
        found == length,
        f"run at token {start} holds {found - marks} placeholders, not {length - marks}: {segment}",
    )
    run_N = ids_T[start : start + length]
    last = tuple(run_N[-len(closing) :].tolist())
    _require(last == closing, f"run at token {start} must end with tokens {closing}, not {last}")
    body_N = run_N[len(opening) : -len(closing)]
    picture = tokens.video if isinstance(segment, Video) else tokens.image
    counts = [int((body_N == token).sum()) for token in (picture, tokens.audio)]
    sound = {Audio: len(body_N), VideoWithAudio: getattr(segment, "num_audio_tokens", 0)}.get(type(segment), 0)
    _require(
        counts == [len(body_N) - sound, sound],
        f"run at token {start} has {counts[0]} picture and {counts[1]} audio placeholders, not "
        f"{len(body_N) - sound} and {sound}: {segment}",
    )
    return len(body_N)
