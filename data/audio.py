"""Audio bytes to 16 kHz mono: the only place where a compressed clip is opened.

    bytes --magic--> libsndfile --blocks--> mean of channels --soxr stream--> float32 [S] at 16 kHz

Every limit is checked against what the header claims before anything is allocated, and again block by block
while decoding, since headers lie. Memory is the decoded clip plus one block. Cost: about 1 ms for a 3 s clip.

Shapes: S samples, C channels, B samples of one block.
"""

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import soundfile
import soxr

from data.errors import BadSample

SAMPLE_RATE = 16_000
MIN_SAMPLES = 400  # one 25 ms analysis window
_BLOCK_FRAMES = 1 << 16
_MAX_PEAK = 100.0  # full scale is 1; beyond this the bytes are not audio, and the power spectrum may overflow
_RIFF_FILLER = 0x7FFF0000  # a data length from here up is what encoders write that cannot know the length yet
_UNKNOWN_FRAMES = 1 << 62  # libsndfile answers 2**63 - 1 where a streamed header left the length out


@dataclass(frozen=True)
class Limits:
    """What a clip may be at most; every field is checked before memory is taken."""

    max_bytes: int = 1 << 30
    max_seconds: float = 3600.0
    max_frames: int = 1 << 29
    max_channels: int = 16
    min_rate: int = 4_000
    max_rate: int = 384_000


def decode(payload: bytes, limits: Limits | None = None) -> np.ndarray:
    """Decode one clip of wav, flac, mp3, ogg-opus or ogg-vorbis.

    Returns float32 [S] at 16 kHz, channels averaged, with S = `resampled_length(frames, rate)`.
    Raises BadSample, with the reason, for anything that is not a whole clip within the limits.
    """
    limits = limits or Limits()
    if not payload:
        raise BadSample("audio is empty (0 bytes)")
    if len(payload) > limits.max_bytes:
        raise BadSample(f"audio has {len(payload)} bytes, the limit is {limits.max_bytes}")
    _check_magic(payload)
    try:
        with _Forward(io.BytesIO(payload)) as clip:
            claimed = _claimed_frames(clip, payload)
            _check_claims(clip.samplerate, clip.channels, claimed, limits)
            wave_S = _read_resampled(clip, claimed, limits)
    except soundfile.LibsndfileError as error:
        raise BadSample(f"audio cannot be decoded: {error.error_string}") from error
    if len(wave_S) < MIN_SAMPLES:
        raise BadSample(f"audio is too short: {len(wave_S)} samples at 16 kHz, at least {MIN_SAMPLES} needed")
    peak = float(np.abs(wave_S).max())
    if not math.isfinite(peak):
        raise BadSample("audio contains NaN or infinite samples")
    if peak > _MAX_PEAK:
        raise BadSample(f"audio samples reach {peak:.3g}, full scale is 1")
    return wave_S


def resampled_length(num_frames: int, rate: int) -> int:
    """Samples at 16 kHz of a clip of `num_frames` at `rate`: exact integer rounding, half up."""
    return (2 * num_frames * SAMPLE_RATE + rate) // (2 * rate)


def change_speed(wave_S: np.ndarray, factor: float) -> np.ndarray:
    """Play `factor` times faster, pitch and all: float32 [`sped_up_length(S, factor)`], by resampling."""
    length = sped_up_length(len(wave_S), factor)
    if factor == 1.0:
        return wave_S
    return _fit_length(soxr.resample(wave_S, factor, 1.0).astype(np.float32, copy=False), length)


def sped_up_length(num_samples: int, factor: float) -> int:
    """Samples left of `num_samples` after `change_speed` by `factor`: round(num_samples / factor)."""
    if not factor > 0:
        raise ValueError(f"speed factor must be positive, got {factor}")
    return round(num_samples / factor)


def _check_magic(payload: bytes) -> None:
    """Refuse what is not one of our containers, so libsndfile's two dozen old parsers never see it."""
    known = payload.startswith((b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3"))
    mpeg_frame = len(payload) > 1 and payload[0] == 0xFF and payload[1] & 0xE0 == 0xE0
    if not (known or mpeg_frame):
        raise BadSample(f"audio is not wav, flac, mp3 or ogg (starts with {payload[:4]!r})")


class _Forward(soundfile.SoundFile):
    """Reads front to back without seeking: faster, and no wrong length in a header can mislead it."""

    def seekable(self) -> bool:
        return False


def _check_claims(rate: int, channels: int, frames: int | None, limits: Limits) -> None:
    if not limits.min_rate <= rate <= limits.max_rate:
        raise BadSample(f"audio claims {rate} Hz, allowed is {limits.min_rate} to {limits.max_rate}")
    if not 1 <= channels <= limits.max_channels:
        raise BadSample(f"audio claims {channels} channels, the limit is {limits.max_channels}")
    if frames is None:
        return
    if frames == 0:
        raise BadSample("audio has zero length")
    if frames > limits.max_frames:
        raise BadSample(f"audio claims {frames} samples, the limit is {limits.max_frames}")
    if frames > limits.max_seconds * rate:
        raise BadSample(f"audio claims {frames / rate:.0f} s, the limit is {limits.max_seconds:.0f} s")


def _claimed_frames(clip: soundfile.SoundFile, payload: bytes) -> int | None:
    """Frames the header claims, None where a header written to a pipe leaves them out.

    libsndfile silently shortens the claim of a wav to the bytes that are there, so that header is read here.
    """
    frames = None if clip.frames >= _UNKNOWN_FRAMES else clip.frames
    if payload[:4] != b"RIFF" or not frames:
        return frames
    offset = 12
    while offset + 8 <= len(payload):
        name, size = struct.unpack_from("<4sI", payload, offset)
        if name == b"data":
            present = len(payload) - offset - 8
            whole = size <= present or size >= _RIFF_FILLER
            return frames if whole else frames * size // max(present, 1)
        offset += 8 + size + size % 2
    return frames


def _read_resampled(clip: soundfile.SoundFile, claimed: int | None, limits: Limits) -> np.ndarray:
    rate = clip.samplerate
    stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    max_frames = min(limits.max_frames, int(limits.max_seconds * rate))
    pieces, frames = [], 0
    for block_B in _mono_blocks(clip):
        frames += len(block_B)
        if frames > max_frames:
            raise BadSample(f"audio goes on past the limit of {max_frames} samples, more than it claims")
        pieces.append(block_B if stream is None else stream.resample_chunk(block_B))
    if frames == 0:
        raise BadSample("audio has zero length")
    exact = clip.format in ("WAV", "WAVEX", "RF64", "FLAC")  # lengths of mp3 and ogg may be estimates
    if exact and claimed is not None and frames < claimed:
        raise BadSample(f"audio is cut short: {frames} of the {claimed} samples that its header claims")
    if stream is not None:
        pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return _fit_length(np.concatenate(pieces), resampled_length(frames, rate))


def _mono_blocks(clip: soundfile.SoundFile) -> Iterator[np.ndarray]:
    while True:
        block_BC = cast(np.ndarray, clip.read(_BLOCK_FRAMES, dtype="float32", always_2d=True))
        if not len(block_BC):
            return
        yield block_BC.mean(axis=1)


def _fit_length(wave_S: np.ndarray, length: int) -> np.ndarray:
    """Trim or zero-pad the few samples by which a resampler's length differs from the stated one."""
    missing = length - len(wave_S)
    if missing > 0:
        return np.pad(wave_S, (0, missing))
    return wave_S[:length]
