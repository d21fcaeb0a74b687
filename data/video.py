"""Video bytes to patches and sound: the only place where a film is opened.

    bytes --magic--> FFmpeg, pass 1: times of all frames, nothing decoded --> frames to take, at an even rate
      --pass 2: decode up to the last of them, upright, RGB, resized--> [N, H, W, 3] --patches--> pixels [P, X], grid
    bytes --> FFmpeg: sound, mean of channels --soxr--> float32 [S] at 16 kHz

Each clip has its own rate: as asked, but within the numbers of frames, and the more frames the smaller each, within a
budget of tokens. Times are the frames' own, in seconds from the start of the film, where the sound starts too. Demuxers
that open other files are never reached: the container is told by its first bytes and FFmpeg is not left to guess.
Memory is the resized frames and the result; cost is decoding, once, of all up to the last frame taken.

Shapes: K frames of the film, N frames taken, H rows and W columns of pixels, P patches, X values of a patch, S samples.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
import soxr
from av.container import InputContainer
from av.error import FFmpegError
from torch import Tensor

from data.audio import MIN_SAMPLES, SAMPLE_RATE, resampled_length
from data.errors import BadSample
from data.vision import Grid, Patching, resize, smart_resize, to_patches


@dataclass(frozen=True)
class VideoLimits:
    """What a film may be at most; every field is checked before memory is taken."""

    max_bytes: int = 1 << 30
    max_seconds: float = 3600.0
    max_frames: int = 1 << 20
    max_source_pixels: int = 7680 * 4320  # of a frame
    max_channels: int = 16
    min_rate: int = 4_000  # of the sound
    max_rate: int = 384_000


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


def load_video(
    payload: bytes,
    sampling: Sampling | None = None,
    limits: VideoLimits | None = None,
    patching: Patching | None = None,
) -> Clip:
    """The best video stream of a film -> patches of frames at a dynamic rate. Raises BadSample, with the reason."""
    sampling, limits, patching = sampling or Sampling(), limits or VideoLimits(), patching or Patching()
    temporal = patching.temporal_patch_size
    with _opened(payload, limits) as film:
        stream = _video_stream(film, limits)
        zero, tick = _zero(film), _tick(stream)
        pts_K, end = _frame_times(film, stream, limits)
    seconds = float((end - int(pts_K[0])) * tick)
    taken = pts_K[pick_frames(pts_K, end, wanted_frames(seconds, len(pts_K), sampling, temporal))].tolist()
    with _opened(payload, limits) as film:
        frames = _decode(film, taken, sampling, limits, patching)
    pixels_PX, grid = to_patches(np.stack(frames), patching)
    times = tuple(max(0.0, float(pts * tick - zero)) for pts in taken[::temporal])
    return Clip(pixels_PX, grid, seconds * temporal / len(taken), times)


def load_sound(payload: bytes, limits: VideoLimits | None = None) -> np.ndarray | None:
    """The best audio stream of a film: float32 [S] at 16 kHz, channels averaged; None if there is none.

    Sample 0 is the start of the film: sound that begins later is led by silence. Raises BadSample.
    """
    limits = limits or VideoLimits()
    with _opened(payload, limits) as film:
        video = film.streams.best("video")
        stream = film.streams.best("audio", related=video)
        if not isinstance(stream, av.AudioStream):
            return None
        _check_decoder(stream)
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        if not limits.min_rate <= rate <= limits.max_rate or not 1 <= channels <= limits.max_channels:
            raise BadSample(f"sound of {rate} Hz and {channels} channels is outside the limits")
        most = int(limits.max_seconds * rate)
        wave_S = _resampled(_mono_blocks(film, stream, most), rate, most)
    if len(wave_S) < MIN_SAMPLES:
        raise BadSample(f"sound is too short: {len(wave_S)} samples at 16 kHz, at least {MIN_SAMPLES} needed")
    if not np.isfinite(wave_S).all():
        raise BadSample("sound contains NaN or infinite samples")
    return wave_S


def wanted_frames(seconds: float, present: int, sampling: Sampling, temporal: int = 2) -> int:
    """Frames to take of a clip that has `present`: whole temporal patches of them where there are as many."""
    count = min(max(seconds * sampling.fps, sampling.min_frames), sampling.max_frames, present)
    return max(int(count // temporal) * temporal, min(temporal, present))


def pick_frames(pts_K: np.ndarray, end: int, count: int) -> np.ndarray:
    """Indices of the frames on show at `count` moments spread evenly over the clip, the first at its start.

    `pts_K` int64 rising, in ticks, the last frame shown until `end`. A frame on show at several moments counts once,
    so a film of few and long pictures gives fewer.
    """
    moments = [int(pts_K[0]) + (end - int(pts_K[0])) * i // count for i in range(count)]
    return np.unique(np.searchsorted(pts_K, moments, side="right") - 1)


def frame_size(height: int, width: int, count: int, sampling: Sampling, patching: Patching) -> tuple[int, int]:
    """Rows and columns of pixels to which each of `count` frames is resized."""
    budget = sampling.max_tokens * patching.factor**2 * patching.temporal_patch_size // count
    most = max(min(sampling.max_pixels, budget), int(sampling.min_pixels * 1.05))
    return smart_resize(height, width, patching.factor, sampling.min_pixels, most)


def _container_of(payload: bytes) -> str:
    """FFmpeg's name of the container; anything else could be a playlist, which opens files and addresses."""
    if payload[4:8] == b"ftyp":
        return "mov"
    if payload.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if payload.startswith(b"RIFF") and payload[8:12] == b"AVI ":
        return "avi"
    raise BadSample(f"video is not mp4, mov, mkv, webm or avi (starts with {payload[:8]!r})")


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise BadSample("video refers to another file, which is not opened")


@contextmanager
def _opened(payload: bytes, limits: VideoLimits) -> Iterator[InputContainer]:
    if not payload:
        raise BadSample("video is empty (0 bytes)")
    if len(payload) > limits.max_bytes:
        raise BadSample(f"video has {len(payload)} bytes, the limit is {limits.max_bytes}")
    container, options = _container_of(payload), {"max_pixels": str(limits.max_source_pixels)}
    try:
        with av.open(
            io.BytesIO(payload), "r", format=container, options=options, io_open=_refuse, metadata_errors="replace"
        ) as film:
            if film.duration is not None and film.duration > limits.max_seconds * av.time_base:
                raise BadSample(
                    f"video claims {film.duration / av.time_base:.0f} s, the limit is {limits.max_seconds:.0f} s"
                )
            yield film
    except BadSample:
        raise
    except (FFmpegError, ValueError) as error:  # ValueError: a format that changes on the way
        raise BadSample(f"video cannot be decoded: {getattr(error, 'strerror', error)}") from error


def _zero(film: InputContainer) -> Fraction:
    """When the film starts, in seconds of its own clock."""
    return Fraction(film.start_time or 0, av.time_base)


def _tick(stream: av.VideoStream | av.AudioStream) -> Fraction:
    """Seconds of a unit of a stream's times."""
    if not stream.time_base:
        raise BadSample(f"{stream.type} stream has no unit of time")
    return stream.time_base


def _check_decoder(stream: av.VideoStream | av.AudioStream) -> None:
    if stream.codec_context is None:  # av's type says that it cannot be
        raise BadSample(f"{stream.type} stream is in a format that cannot be decoded")


def _video_stream(film: InputContainer, limits: VideoLimits) -> av.VideoStream:
    stream = film.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise BadSample("video has no video stream")
    _check_decoder(stream)
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.max_source_pixels:
        raise BadSample(f"video claims frames of {width} x {height}, the limit is {limits.max_source_pixels} pixels")
    stream.codec_context.thread_count = 1  # workers share the machine by processes
    stream.codec_context.options = {"max_pixels": str(limits.max_source_pixels)}
    return stream


def _frame_times(film: InputContainer, stream: av.VideoStream, limits: VideoLimits) -> tuple[np.ndarray, int]:
    """When each frame is shown, int64 [K] rising, and until when the last is, in ticks; no frame is decoded."""
    ticks, length = [], 0
    for packet in film.demux(stream):
        if packet.size == 0 or packet.is_discard:  # the end, or cut away by an edit list
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or packet.is_corrupt:
            raise BadSample(f"video frame {len(ticks)} is cut short or has no time")
        ticks.append(time)
        length = packet.duration or length
        if len(ticks) > limits.max_frames:
            raise BadSample(f"video has more than {limits.max_frames} frames")
    if not ticks:
        raise BadSample("video has no frames")
    pts_K = np.unique(np.array(ticks, dtype=np.int64))
    end = int(pts_K[-1]) + max(length or int(np.ptp(pts_K)) // max(len(pts_K) - 1, 1), 1)
    if (end - int(pts_K[0])) * _tick(stream) > limits.max_seconds:
        raise BadSample(f"video is longer than {limits.max_seconds:.0f} s")
    if stream.duration is not None and (end - int(pts_K[0])) * 2 < stream.duration:
        raise BadSample("video is cut short: over half of the time that it claims is missing")
    return pts_K, end


def _decode(
    film: InputContainer, taken: list[int], sampling: Sampling, limits: VideoLimits, patching: Patching
) -> list[np.ndarray]:
    """The frames at `taken` ticks, uint8 [H, W, 3], all of one size."""
    stream = _video_stream(film, limits)
    frames: list[np.ndarray] = []
    size = None
    for frame in film.decode(stream):
        time = frame.pts if frame.pts is not None else frame.dts
        if time is None or time < taken[len(frames)]:
            continue
        if frame.width * frame.height > limits.max_source_pixels:
            raise BadSample(f"video has a frame of {frame.width} x {frame.height} pixels, more than it claims")
        rgb_HWC = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        height, width = rgb_HWC.shape[:2]
        size = size or frame_size(height, width, len(taken), sampling, patching)
        frames.append(resize(np.ascontiguousarray(rgb_HWC), size))
        if len(frames) == len(taken):
            return frames
    raise BadSample(f"video breaks off: {len(frames)} of {len(taken)} frames could be decoded")


def _mono_blocks(film: InputContainer, stream: av.AudioStream, most: int) -> Iterator[np.ndarray]:
    """Samples float32 [B] at the stream's own rate, from the start of the film; at most `most` of silence first."""
    planes = av.AudioResampler(format="fltp")
    late = None
    for frame in film.decode(stream):
        if late is None:
            start = _zero(film) if frame.pts is None else frame.pts * (frame.time_base or _tick(stream))
            late = round((start - _zero(film)) * frame.sample_rate)
            if late > most:
                raise BadSample(f"sound claims to begin after {float(start):.0f} s, past the limit")
            yield np.zeros(max(late, 0), np.float32)
        for part in planes.resample(frame):
            yield part.to_ndarray().mean(axis=0)


def _resampled(blocks: Iterator[np.ndarray], rate: int, most: int) -> np.ndarray:
    """Blocks at `rate` -> float32 [S] at 16 kHz; more than `most` samples are refused."""
    stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    pieces, samples = [np.zeros(0, np.float32)], 0
    for block_B in blocks:
        samples += len(block_B)
        if samples > most:
            raise BadSample(f"sound is longer than {most / rate:.0f} s")
        pieces.append(block_B if stream is None else stream.resample_chunk(block_B))
    if stream is not None:
        pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    wave_S = np.concatenate(pieces)
    length = resampled_length(samples, rate)
    return np.pad(wave_S, (0, max(length - len(wave_S), 0)))[:length]
