"""Video bytes to patches and sound, and the sizes of both without decoding more than must be.

    bytes --pass over packets--> times of all frames --even rate--> frames to take --by seek--> upright, RGB, resized
      [N, H, W, 3] --patches--> pixels [P, X], grid
    bytes --> sound --soxr--> float32 [S] at 16 kHz
    bytes --measure_video--> VideoSize --frame_counts, frame_sides--> the same grid, for a planner

Each clip has its own rate: as asked, but within the numbers of frames, and the more frames the smaller each, within a
budget of tokens. Times are seconds from the start of the film, where the sound starts too. How containers are opened,
and that it is safe, data/ffmpeg.py says. Memory is the resized frames and the result; cost is decoding, of at most one
group of pictures for each frame taken.

Shapes: K frames of the film, N frames taken, H rows and W columns of pixels, P patches, X values of a patch, S samples.
In functions of many films, N films.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from av import VideoFrame, VideoStream
from av.container import InputContainer
from torch import Tensor

from data.audio import check_wave, resample
from data.errors import BadSample
from data.ffmpeg import (
    AVI,
    MATROSKA,
    MOV,
    Astray,
    ContainerLimits,
    Format,
    Timeline,
    check_bytes,
    format_of,
    frames_by_seek,
    frames_in_order,
    open_sound,
    open_video,
    opened,
    read_timeline,
    tick,
    upright,
    zero,
)
from data.vision import Grid, Patching, resize, resized_sides, smart_resize, to_patches

FORMATS = (
    Format("mov", ("mp4", "m4v", "mov", "3gp"), MOV),
    Format("matroska", ("mkv", "webm"), MATROSKA),
    Format("avi", ("avi",), AVI),
)
EXTENSIONS = tuple(extension for form in FORMATS for extension in form.extensions)
T = TypeVar("T")


@dataclass(frozen=True)
class VideoLimits(ContainerLimits):
    """What a film may be at most; every field is checked before memory is taken."""

    max_frames: int = 1 << 20
    max_source_pixels: int = 7680 * 4320  # of a frame


@dataclass(frozen=True)
class Sampling:
    """How many frames are taken and how large: `fps` where that makes neither too few nor too many.

    `min_pixels` and `max_pixels` bound a frame; `max_tokens` the whole clip, by smaller frames and not by fewer.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    max_tokens: int = 115_200


class Clip(NamedTuple):
    """A video as the model takes it."""

    pixels_PX: Tensor  # float32
    grid: Grid  # frames (temporal patches), rows and columns, in patches
    seconds_per_grid: float  # mean time from one temporal patch to the next
    times: tuple[float, ...]  # seconds at which the first frame of each temporal patch is shown


class VideoSize(NamedTuple):
    """What a planner must know of a film; `frame_counts` and `frame_sides` say what it becomes."""

    height: int  # pixels, upright
    width: int
    frames: int  # times at which a frame is shown
    seconds: float  # from the first frame to the end of the last
    sound_samples: int  # at 16 kHz, 0 where there is no sound


def load_video(
    payload: bytes,
    sampling: Sampling | None = None,
    limits: VideoLimits | None = None,
    patching: Patching | None = None,
    patches: tuple[int, int] | None = None,
) -> Clip:
    """The best video stream of a film -> patches of frames at a dynamic rate.

    `patches` (a, b) takes temporal patches a to b - 1 of those that the whole would give, of the same size, their
    times counted from the first of them. Raises BadSample, with the reason.
    """
    sampling, limits, patching = sampling or Sampling(), limits or VideoLimits(), patching or Patching()
    temporal = patching.temporal_patch_size
    with _opened(payload, limits) as film:
        stream, timeline = _timeline(film, limits)
        unit, pts_K = tick(stream), timeline.pts_K
        seconds = _seconds(stream, timeline)
        count = wanted_frames(seconds, len(pts_K), sampling, temporal)
        frame_N, shown_N = pick_frames(pts_K, timeline.end, count)
        span = _span(patches, count, temporal)
        wanted_N = np.unique([0, *frame_N[span]])  # frame 0 gives the size of all

        def shrink(frames: Iterator) -> list[np.ndarray]:
            small, size = [], None
            for frame in frames:
                rgb_HWC = upright(frame, limits.max_source_pixels)
                height, width = rgb_HWC.shape[:2]
                size = size or frame_size(height, width, count, sampling, patching)
                small.append(resize(rgb_HWC, size))
            return small

        small = _frames(payload, film, stream, timeline, wanted_N, limits, shrink)
        origin = shown_N[span][0] * unit if patches else zero(film)
    pixels_PX, grid = to_patches(np.stack([small[i] for i in np.searchsorted(wanted_N, frame_N[span])]), patching)
    times = tuple(max(0.0, float(time * unit - origin)) for time in shown_N[span][::temporal])
    return Clip(pixels_PX, grid, seconds * temporal / count, times)


def load_sound(payload: bytes, limits: VideoLimits | None = None) -> np.ndarray | None:
    """The best audio stream of a film: float32 [S] at 16 kHz, channels averaged; None if there is none.

    Sample 0 is the start of the film: sound that begins later, or stops for a while, is led by silence. A stretch is a
    slice of it. Raises BadSample.
    """
    limits = limits or VideoLimits()
    with _opened(payload, limits) as film:
        sound = open_sound(film, "sound", limits)
        if sound is None:
            return None
        wave_S, _ = resample(
            sound.blocks, sound.rate, int(limits.max_seconds * sound.rate), sound.claimed or 0, "sound"
        )
    check_wave(wave_S, "sound")
    return wave_S


def measure_video(payload: bytes, limits: VideoLimits | None = None, *, sound: bool = True) -> VideoSize:
    """The sizes of which `load_video` and `load_sound` make theirs. Raises BadSample where either would.

    Decodes the first frame, which alone tells how the film is turned, and all of the sound, which alone tells its exact
    length: False leaves that out and says 0. Frames are counted, not decoded: a film damaged further on is not noticed.
    """
    limits = limits or VideoLimits()
    with _opened(payload, limits) as film:
        stream, timeline = _timeline(film, limits)

        def shape(frames: Iterator) -> tuple[int, ...]:
            return upright(next(frames), limits.max_source_pixels).shape

        height, width, _ = _frames(payload, film, stream, timeline, np.zeros(1, np.int64), limits, shape)
        seconds = _seconds(stream, timeline)
    wave_S = load_sound(payload, limits) if sound else None
    return VideoSize(height, width, len(timeline.pts_K), seconds, 0 if wave_S is None else len(wave_S))


def wanted_frames(seconds: float, present: int, sampling: Sampling, temporal: int = 2) -> int:
    """Frames taken of a clip that has `present`: whole temporal patches of them where there are as many."""
    count = min(max(seconds * sampling.fps, sampling.min_frames), sampling.max_frames, present)
    return max(int(count // temporal) * temporal, min(temporal, present))


def frame_counts(seconds_N: np.ndarray, present_N: np.ndarray, sampling: Sampling, temporal: int = 2) -> np.ndarray:
    """int64 [N]: `wanted_frames` of N films, given in float64 and int64."""
    asked_N = np.maximum(np.asarray(seconds_N, np.float64) * sampling.fps, sampling.min_frames)
    count_N = np.minimum(np.minimum(asked_N, sampling.max_frames), present_N)
    whole_N = (count_N // temporal).astype(np.int64) * temporal
    return np.maximum(whole_N, np.minimum(temporal, present_N)).astype(np.int64)


def pick_frames(pts_K: np.ndarray, end: int, count: int) -> tuple[np.ndarray, list[int]]:
    """Which frames are on show at `count` moments spread evenly over a clip, int64 [N]; and since when, in ticks.

    `pts_K` int64 rising, in ticks, the last frame shown until `end`. A frame on show at several moments is taken as
    often: at first since its own time, then since the moment itself.
    """
    first = int(pts_K[0])
    moments = [first + (end - first) * i // count for i in range(count)]
    frame_N = np.searchsorted(pts_K, moments, side="right") - 1
    again_N = np.diff(frame_N, prepend=-1) == 0
    shown = [moment if again else int(pts_K[i]) for i, moment, again in zip(frame_N, moments, again_N, strict=True)]
    return frame_N, shown


def frame_size(height: int, width: int, count: int, sampling: Sampling, patching: Patching) -> tuple[int, int]:
    """Rows and columns of pixels to which each of `count` frames is resized."""
    budget = sampling.max_tokens * patching.factor**2 * patching.temporal_patch_size // count
    most = max(min(sampling.max_pixels, budget), int(sampling.min_pixels * 1.05))
    return smart_resize(height, width, patching.factor, sampling.min_pixels, most)


def frame_sides(
    heights_N: np.ndarray, widths_N: np.ndarray, counts_N: np.ndarray, sampling: Sampling, patching: Patching
) -> tuple[np.ndarray, np.ndarray]:
    """`frame_size` of N films, int64 [N] each; 0 x 0 where that refuses."""
    budget_N = sampling.max_tokens * patching.factor**2 * patching.temporal_patch_size // np.maximum(counts_N, 1)
    most_N = np.maximum(np.minimum(sampling.max_pixels, budget_N), int(sampling.min_pixels * 1.05))
    return resized_sides(heights_N, widths_N, patching.factor, sampling.min_pixels, most_N)


@contextmanager
def _opened(payload: bytes, limits: VideoLimits) -> Iterator[InputContainer]:
    check_bytes(payload, "video", limits)
    options = {"max_pixels": str(limits.max_source_pixels)}
    with opened(payload, format_of(payload, FORMATS, "video"), "video", limits, options) as film:
        yield film


def _timeline(film: InputContainer, limits: VideoLimits) -> tuple[VideoStream, Timeline]:
    stream = open_video(film, limits.max_source_pixels)
    return stream, read_timeline(film, stream, limits.max_frames, limits.max_seconds)


def _seconds(stream: VideoStream, timeline: Timeline) -> float:
    return float((timeline.end - int(timeline.pts_K[0])) * tick(stream))


def _span(patches: tuple[int, int] | None, count: int, temporal: int) -> slice:
    """The frames of the temporal patches asked for, among `count`."""
    whole = -(-count // temporal)
    first, last = patches or (0, whole)
    if not 0 <= first < last <= whole:
        raise BadSample(f"video has {whole} temporal patches, those from {first} to {last} are asked for")
    return slice(first * temporal, last * temporal)


def _frames(
    payload: bytes,
    film: InputContainer,
    stream: VideoStream,
    timeline: Timeline,
    wanted_N: np.ndarray,
    limits: VideoLimits,
    use: Callable[[Iterator[VideoFrame]], T],
) -> T:
    """What `use` makes of the frames `wanted_N` (rising indices): by seek, or from the start where seeking fails."""
    ticks = timeline.pts_K[wanted_N].tolist()
    try:
        return use(frames_by_seek(film, stream, timeline, ticks))
    except Astray:
        with _opened(payload, limits) as again:
            return use(frames_in_order(again, open_video(again, limits.max_source_pixels), timeline, ticks))
