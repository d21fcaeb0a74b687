"""Media containers through FFmpeg: the only place that opens one. Sound as blocks, frames by seeking.

    bytes --first bytes--> demuxer --own lengths: is it whole?--> opened, with that demuxer and no other
      sound:  decoded front to back --gaps filled with silence--> blocks float32 [B] at its own rate
      frames: pass over packets: times, key frames --seek to the last key frame at or before a wanted time--> frames

FFmpeg is never left to guess: a container is told by its first bytes, no second demuxer may be reached from inside it
(a playlist hidden in a subtitle, say), and nothing but the bytes in hand is opened. Memory is a frame or a block. Cost:
a pass over packets decodes nothing; by seek, decoding is at most one group of pictures for each frame wanted.

Shapes: K frames of a film, G key frames, B samples of one block.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from data.errors import BadSample

MOV = rb"....(ftyp|moov|mdat|wide)"  # patterns of first bytes; QuickTime once began without ftyp
MATROSKA, AVI = rb"\x1a\x45\xdf\xa3", rb"RIFF....AVI "
RIFF_FILLER = 0x7FFF0000  # a length from here up is what encoders write that cannot know it yet
_ESTIMATED = ("aac", "ac3", "eac3", "amr", "wav")  # FFmpeg may guess their length, from the bit rate
_MAX_GAP = 0.1  # seconds of sound that may be missing before silence takes their place
_BLOCK = 1 << 16


@dataclass(frozen=True)
class ContainerLimits:
    """What a container may be at most; every field is checked before memory is taken."""

    max_bytes: int = 1 << 30
    max_seconds: float = 3600.0
    max_channels: int = 16
    min_rate: int = 4_000
    max_rate: int = 384_000


class Format(NamedTuple):
    """A kind of file: FFmpeg's name of its demuxer, extensions, and the pattern of its first bytes."""

    name: str
    extensions: tuple[str, ...]
    magic: bytes


class Sound(NamedTuple):
    """A sound stream while it is being decoded."""

    rate: int
    claimed: int | None  # samples, where the header says
    blocks: Iterator[np.ndarray]  # float32 [B], mean of the channels


class Timeline(NamedTuple):
    """When the frames of a film are shown, in ticks of its stream."""

    pts_K: np.ndarray  # int64, rising
    end: int  # until when the last frame is shown
    keys_G: np.ndarray  # int64, rising: frames from which decoding can start
    start: int  # where the first packet lies
    in_order: bool  # times of single frames cannot be relied on, only their order


class Astray(Exception):
    """Seeking does not surely lead to the frames that are wanted: decode from the start."""


def format_of(payload: bytes, formats: Iterable[Format], what: str) -> str:
    """The name of the format whose pattern the first bytes match. Raises BadSample, naming what is known."""
    head, names = payload[:64], []
    for form in formats:
        if re.match(form.magic, head, re.DOTALL):
            return form.name
        names += [name for name in form.extensions if name not in names]
    raise BadSample(f"{what} is none of {', '.join(names)} (starts with {payload[:8]!r})")


def check_bytes(payload: bytes, what: str, limits: ContainerLimits) -> None:
    """Raise BadSample where there are none or too many."""
    if not payload:
        raise BadSample(f"{what} is empty (0 bytes)")
    if len(payload) > limits.max_bytes:
        raise BadSample(f"{what} has {len(payload)} bytes, the limit is {limits.max_bytes}")


@contextmanager
def opened(
    payload: bytes, demuxer: str, what: str, limits: ContainerLimits, options: dict[str, str] | None = None
) -> Iterator[InputContainer]:
    """The container, open while in the block; all that FFmpeg raises there comes out as BadSample."""
    claimed = _claimed_bytes(payload, demuxer)
    if claimed > len(payload):
        raise BadSample(f"{what} is cut short: it has {len(payload)} of the {claimed} bytes that it claims")
    options = (options or {}) | {"format_whitelist": demuxer, "protocol_whitelist": "none"}
    try:
        with av.open(
            io.BytesIO(payload), "r", format=demuxer, options=options, io_open=_refuse, metadata_errors="replace"
        ) as container:
            seconds = (container.duration or 0) / av.time_base
            if seconds > limits.max_seconds and demuxer not in _ESTIMATED:
                raise BadSample(f"{what} claims {seconds:.0f} s, the limit is {limits.max_seconds:.0f} s")
            yield container
    except BadSample:
        raise
    except (FFmpegError, ValueError) as error:  # ValueError: a format that changes on the way
        raise BadSample(f"{what} cannot be decoded: {getattr(error, 'strerror', error)}") from error


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise BadSample("container refers to another file, which is not opened")


def _claimed_bytes(payload: bytes, demuxer: str) -> int:
    """How far the outermost parts of a container reach by their own lengths; 0 where these do not say."""
    if demuxer == "avi":
        size = int.from_bytes(payload[4:8], "little")
        return 8 + size if size < RIFF_FILLER else 0
    if demuxer == "matroska":
        header = _end_of_element(payload, 0)
        return _end_of_element(payload, header) if payload[header : header + 4] == b"\x18\x53\x80\x67" else 0
    offset = 0
    while demuxer == "mov" and offset + 16 <= len(payload):
        size, name = int.from_bytes(payload[offset : offset + 4], "big"), payload[offset + 4 : offset + 8]
        if size == 1:
            size = int.from_bytes(payload[offset + 8 : offset + 16], "big")
        if size < 8:  # 0: it reaches to the end
            break
        offset += size
        if offset > len(payload):
            return offset if name in (b"moov", b"moof", b"mdat") else 0
    return 0


def _end_of_element(payload: bytes, offset: int) -> int:
    """Where the Matroska element ends whose name of four bytes lies at `offset`; 0 if it does not say."""
    offset += 4
    width = 9 - (payload[offset] if offset < len(payload) else 0).bit_length()  # its leading zeros count its bytes
    known = (1 << 7 * width) - 1
    size = int.from_bytes(payload[offset : offset + width], "big") & known
    return offset + width + size if width < 9 and size != known else 0


def zero(container: InputContainer) -> Fraction:
    """When a film starts, in seconds of its own clock."""
    return Fraction(container.start_time or 0, av.time_base)


def tick(stream: av.VideoStream | av.AudioStream) -> Fraction:
    """Seconds of a unit of a stream's times."""
    if not stream.time_base:
        raise BadSample(f"{stream.type} stream has no unit of time")
    return stream.time_base


def _check_decoder(stream: av.VideoStream | av.AudioStream) -> None:
    if stream.codec_context is None:  # av's type says that it cannot be
        raise BadSample(f"{stream.type} stream is in a format that cannot be decoded")


def open_sound(container: InputContainer, what: str, limits: ContainerLimits) -> Sound | None:
    """The best audio stream, that which goes with the best video if there is one; None without.

    Sample 0 is the start of the container: sound that begins later, or stops for a while, is led by silence. Raises
    BadSample, also while its blocks are read, which must happen before the container is closed.
    """
    stream = container.streams.best("audio", related=container.streams.best("video"))
    if not isinstance(stream, av.AudioStream):
        return None
    _check_decoder(stream)
    _tame(stream.codec_context, what)
    frames = _sound_frames(container, stream, what)
    first = next(frames, None)
    if first is None:
        raise BadSample(f"{what} has zero length")
    rate, channels = first.sample_rate, first.layout.nb_channels
    if not limits.min_rate <= rate <= limits.max_rate:
        raise BadSample(
            f"{what} of {rate} Hz and {channels} channels: {limits.min_rate} to {limits.max_rate} Hz allowed"
        )
    if not 1 <= channels <= limits.max_channels:
        raise BadSample(f"{what} of {rate} Hz and {channels} channels: at most {limits.max_channels} channels allowed")
    seconds = _claimed_seconds(container, stream)
    claimed = min(round(seconds * rate), int(limits.max_seconds * rate)) if seconds else None
    blocks = _mono_blocks(itertools.chain([first], frames), tick(stream), zero(container), limits.max_seconds)
    return Sound(rate, claimed, blocks)


def _tame(coder: av.AudioCodecContext, what: str) -> None:
    """Make sound safe to decode by av, which frees twice what a channel layout of a file's own order points to.

    Whoever reads `layout` owns that, so a plain one takes its place at once: the order of channels does not matter for
    their mean. Streams that may bring another such layout along later are refused.
    """
    extradata = int.from_bytes((coder.extradata or b"")[:16], "big")
    if coder.name == "aac_latm" or (coder.name == "aac" and "11111001010" in f"{extradata:b}"):  # object type 42
        raise BadSample(f"{what} is xHE-AAC, which is not read")
    layout = coder.layout
    if layout.nb_channels:
        coder.layout = f"{layout.nb_channels} channels"
    coder.thread_count = 1  # workers share the machine by processes


def _claimed_seconds(container: InputContainer, stream: av.AudioStream) -> Fraction | None:
    """How long the header says that a sound is; None where it does not, or only estimates."""
    if container.format.name in _ESTIMATED:
        return None
    if stream.duration is not None:
        return stream.duration * tick(stream)
    return Fraction(container.duration or 0, av.time_base) if len(container.streams) == 1 else None


def _sound_frames(container: InputContainer, stream: av.AudioStream, what: str) -> Iterator[av.AudioFrame]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BadSample(f"{what} is cut short")
        if packet.has_sidedata("new_extradata") or packet.has_sidedata("param_change"):
            raise BadSample(f"{what} changes its format on the way")
        yield from packet.decode()


def _mono_blocks(
    frames: Iterable[av.AudioFrame], unit: Fraction, start: Fraction, max_seconds: float
) -> Iterator[np.ndarray]:
    """Mean of the channels, with silence where times leave a gap and before the first sample."""
    floats, done = av.AudioResampler(format="flt"), 0  # interleaved: av reads past the end of more than 8 planes
    for frame in frames:
        if frame.pts is not None:
            gap = round((frame.pts * unit - start) * frame.sample_rate) - done
            if done + gap > max_seconds * frame.sample_rate:
                raise BadSample(f"sound claims to go on after {float(frame.pts * unit):.0f} s, past the limit")
            if gap > (_MAX_GAP * frame.sample_rate if done else 0):
                for first in range(0, gap, _BLOCK):
                    yield np.zeros(min(_BLOCK, gap - first), np.float32)
                done += gap
        for part in floats.resample(frame):
            yield part.to_ndarray().reshape(part.samples, -1).mean(axis=1)
            done += part.samples


def open_video(container: InputContainer, max_pixels: int) -> av.VideoStream:
    """The best video stream, its decoder ready. Raises BadSample if there is none or its frames are too large."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise BadSample("video has no video stream")
    _check_decoder(stream)
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_pixels:
        raise BadSample(f"video claims frames of {width} x {height}, the limit is {max_pixels} pixels")
    stream.codec_context.thread_count = 1  # workers share the machine by processes
    stream.codec_context.options = {"max_pixels": str(max_pixels)}
    return stream


def read_timeline(container: InputContainer, stream: av.VideoStream, max_frames: int, max_seconds: float) -> Timeline:
    """A pass over all packets that decodes none. Raises BadSample for a film that is damaged, cut short or too long."""
    by_order = container.format.name == "avi"  # its times are of decoding; frames are shown in order, as many a second
    ticks, keys, length, start = [], [], 0, None
    for packet in container.demux():
        if packet.is_corrupt:
            raise BadSample(f"video is cut short or damaged after {len(ticks)} frames")
        if packet.stream_index != stream.index or packet.size == 0:  # 0: the end
            continue
        by_order |= packet.pts is None
        time = packet.dts if by_order and packet.dts is not None else packet.pts
        if time is None:
            raise BadSample(f"video frame {len(ticks)} has no time")
        start = time if start is None else start
        if packet.is_discard:  # cut away by an edit list
            continue
        ticks.append(time)
        if packet.is_keyframe:
            keys.append(time)
        length = packet.duration or length
        if len(ticks) > max_frames:
            raise BadSample(f"video has more than {max_frames} frames")
    if not ticks:
        raise BadSample("video has no frames")
    pts_K = np.unique(np.array(ticks, dtype=np.int64))
    end = int(pts_K[-1]) + max(length or int(np.ptp(pts_K)) // max(len(pts_K) - 1, 1), 1)
    span = end - int(pts_K[0])
    if span * tick(stream) > max_seconds:
        raise BadSample(f"video is longer than {max_seconds:.0f} s")
    exact = container.format.name in ("mov", "avi")  # in others FFmpeg may take the sound's for it
    if exact and stream.duration is not None and span * 2 < stream.duration:
        raise BadSample("video is cut short: over half of the time that it claims is missing")
    return Timeline(pts_K, end, np.unique(np.array(keys, dtype=np.int64)), int(start or 0), by_order)


def frames_by_seek(
    container: InputContainer, stream: av.VideoStream, timeline: Timeline, wanted: Sequence[int]
) -> Iterator[av.VideoFrame]:
    """The frames at the `wanted` ticks (rising, of `timeline`), each decoded from the nearest key frame before it.

    Where a wanted frame comes before the next key frame, decoding goes on instead. Raises Astray where it is not sure
    that a frame is the one that decoding everything gives: the key frame must come and be one by the decoder's word
    (after a recovery point, or in a file whose index lies, it is not), and the wanted one must come, undamaged.
    """
    if timeline.in_order:
        raise Astray
    frames, here, key, sure = iter(()), None, None, False
    for want in wanted:
        nearest = np.searchsorted(timeline.keys_G, want, side="right") - 1
        from_key = int(timeline.keys_G[nearest]) if nearest >= 0 else None
        following = None if here is None else np.searchsorted(timeline.pts_K, here, side="right")
        if following is None or (from_key is not None and from_key > timeline.pts_K[following]):
            key, sure = from_key, from_key is None
            try:
                container.seek(timeline.start if key is None else key, stream=stream)
            except FFmpegError:
                raise Astray from None
            frames = _decoded(container, stream)
        frame = None
        try:
            for frame in frames:
                if frame.pts == key and frame.key_frame:
                    sure = True
                if frame.pts is None or frame.pts >= want:
                    break
        except FFmpegError:
            raise Astray from None
        if frame is None or frame.pts != want or frame.is_corrupt or not sure:
            raise Astray
        here = want
        yield frame


def frames_in_order(
    container: InputContainer, stream: av.VideoStream, timeline: Timeline, wanted: Sequence[int]
) -> Iterator[av.VideoFrame]:
    """The first frames at or after each of the `wanted` ticks, decoding everything from the start."""
    frames, frame, time, number, taken = _decoded(container, stream), None, None, 0, 0
    for want in wanted:
        while frame is None or time is None or time < want:
            frame = next(frames, None)
            if frame is None:
                raise BadSample(f"video breaks off: {taken} of {len(wanted)} frames could be decoded")
            last = len(timeline.pts_K) - 1
            time = int(timeline.pts_K[min(number, last)]) if timeline.in_order else frame.pts
            number += 1
        taken += 1
        yield frame


def _decoded(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames as they come; a name of its own so that a test can count them."""
    yield from container.decode(stream)


def upright(frame: av.VideoFrame, max_pixels: int) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3], turned as the film asks."""
    if frame.width * frame.height > max_pixels:
        raise BadSample(f"video has a frame of {frame.width} x {frame.height} pixels, more than it claims")
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
