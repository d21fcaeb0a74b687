"""Audio bytes to mono at 16 kHz, or another rate: the only place where a compressed clip is opened.

    bytes --first bytes--> libsndfile: wav, flac, mp3, ogg --blocks--> mean of channels --soxr stream-->
                           FFmpeg: all else on the list (data/ffmpeg.py)      float32 [S] at 16 kHz

libsndfile is faster and exact about lengths. Every limit is checked against what the header claims before anything is
allocated, and again block by block while decoding, since headers lie. Memory is the decoded clip, in one piece, plus a
few blocks: 40 minutes take 146 MB. Cost: about 1 ms for a 3 s clip, 2 ms of a 3 s m4a.

Shapes: S samples, C channels, B samples of one block.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import soundfile
import soxr

from data.errors import BadSample
from data.ffmpeg import MATROSKA, MOV, RIFF_FILLER, ContainerLimits, Format, check_bytes, format_of, open_sound, opened

SAMPLE_RATE = 16_000
MIN_SAMPLES = 400  # one 25 ms analysis window
# What is read, told by the first bytes; nothing else reaches a decoder. wav, flac, ogg and mp3 go to libsndfile,
# but for rare encodings in wav and ogg; all others to FFmpeg, whose demuxer bears the name that comes first.
FORMATS = (
    Format("wav", ("wav",), rb"(RIFF|RF64)....WAVE"),
    Format("flac", ("flac",), rb"fLaC"),
    Format("ogg", ("opus", "ogg", "oga"), rb"OggS"),
    Format("aac", ("aac",), rb"\xff[\xf0\xf1\xf8\xf9]"),
    Format("mp3", ("mp3", "mp2"), rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]|ID3"),
    Format("mov", ("m4a", "m4b", "mp4", "mov", "3gp"), MOV),
    Format("matroska", ("mka", "mkv", "webm", "weba"), MATROSKA),
    Format("asf", ("wma", "asf"), rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    Format("aiff", ("aiff", "aif", "aifc"), rb"FORM....AIF[FC]"),
    Format("caf", ("caf",), rb"caff"),
    Format("w64", ("w64",), rb"riff\x2e\x91\xcf\x11"),
    Format("au", ("au", "snd"), rb"\.snd"),
    Format("amr", ("amr", "awb"), rb"#!AMR(-WB)?\n"),
    Format("eac3", ("eac3", "ec3"), rb"\x0b\x77...[\x58-\x87]"),
    Format("ac3", ("ac3",), rb"\x0b\x77"),
    Format("wv", ("wv",), rb"wvpk"),
    Format("tta", ("tta",), rb"TTA1"),
    Format("ape", ("ape",), rb"MAC "),
)
EXTENSIONS = tuple(dict.fromkeys(extension for form in FORMATS for extension in form.extensions))
_BLOCK_FRAMES = 1 << 16
_MAX_PEAK = 100.0  # full scale is 1; beyond this the bytes are not audio, and the power spectrum may overflow
_SNDFILE_WAV = (1, 2, 3, 6, 7, 0x11, 0x31, 0xFFFE)  # PCM, ADPCM, float, A-law, mu-law, IMA ADPCM, GSM, extensible
_XING_SLACK = 10  # MPEG frames: more than encoders add at both ends
_UNKNOWN_FRAMES = 1 << 62  # libsndfile answers 2**63 - 1 where a streamed header left the length out


@dataclass(frozen=True)
class Limits(ContainerLimits):
    """What a clip may be at most; every field is checked before memory is taken."""

    max_frames: int = 1 << 29


def decode(payload: bytes, limits: Limits | None = None, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Decode one clip of any format on the list.

    Returns float32 [S] at `rate`, channels averaged, with S = `resampled_length(frames, its own rate, rate)`.
    Raises BadSample, with the reason, for anything that is not a whole clip within the limits.
    """
    limits = limits or Limits()
    check_bytes(payload, "audio", limits)
    name = format_of(payload, FORMATS, "audio")
    if re.match(rb"\xff[\xf0\xf1\xf8\xf9]", payload[_end_of_id3(payload) :][:2]):
        name = "aac"
    if _is_for_sndfile(name, payload):
        wave_S = _by_sndfile(payload, limits, rate)
    else:
        wave_S = _by_ffmpeg(payload, name, limits, rate)
    check_wave(wave_S, "audio", rate)
    return wave_S


def check_wave(wave_S: np.ndarray, what: str, rate: int = SAMPLE_RATE) -> None:
    """Raise BadSample for a clip at `rate` that is too short or no sound."""
    least = MIN_SAMPLES * rate // SAMPLE_RATE
    if len(wave_S) < least:
        raise BadSample(f"{what} is too short: {len(wave_S)} samples at {rate / 1000:g} kHz, at least {least} needed")
    peak = max(float(wave_S.max()), -float(wave_S.min()))  # abs() would copy it
    if not math.isfinite(peak):
        raise BadSample(f"{what} contains NaN or infinite samples")
    if peak > _MAX_PEAK:
        raise BadSample(f"{what} samples reach {peak:.3g}, full scale is 1")


def resample(
    blocks: Iterable[np.ndarray], rate: int, max_frames: int, expected: int, what: str, target: int = SAMPLE_RATE
) -> tuple[np.ndarray, int]:
    """Blocks float32 [B] at `rate` -> float32 [S] at `target`, and how many samples came; BadSample past the most.

    `expected` samples at `rate` only save memory: room is taken once where they are right, and grows where not.
    """
    stream = None if rate == target else soxr.ResampleStream(rate, target, 1, dtype="float32")
    wave_S, filled, frames = np.empty(resampled_length(min(expected, max_frames), rate, target) + 64, np.float32), 0, 0

    def keep(piece_B: np.ndarray) -> None:
        nonlocal filled
        end = filled + len(piece_B)
        if end > len(wave_S):  # in place: nothing else refers to it
            wave_S.resize(end + len(wave_S) // 8 + _BLOCK_FRAMES, refcheck=False)
        wave_S[filled:end] = piece_B
        filled = end

    for block_B in blocks:
        frames += len(block_B)
        if frames > max_frames:
            raise BadSample(f"{what} goes on past the limit of {max_frames} samples, {max_frames / rate:.0f} s")
        keep(block_B if stream is None else stream.resample_chunk(block_B))
    if stream is not None:
        keep(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    length = resampled_length(frames, rate, target)  # a resampler's own length may differ by a few samples
    if length > filled:
        keep(np.zeros(length - filled, np.float32))
    wave_S.resize(length, refcheck=False)
    return wave_S, frames


def resampled_length(num_frames: int, rate: int, target: int = SAMPLE_RATE) -> int:
    """Samples at `target` of a clip of `num_frames` at `rate`: exact integer rounding, half up."""
    return (2 * num_frames * target + rate) // (2 * rate)


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


def _is_for_sndfile(name: str, payload: bytes) -> bool:
    if name == "wav":
        encodings = [payload[at : at + 2] for chunk, at, _ in _chunks(payload) if chunk == b"fmt "]
        return not encodings or int.from_bytes(encodings[0], "little") in _SNDFILE_WAV
    if name == "ogg":
        return re.search(rb"OpusHead|\x01vorbis", payload[:300]) is not None
    return name in ("flac", "mp3")


def _chunks(payload: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and length of what a wav is made of."""
    offset = 12
    while offset + 8 <= len(payload):
        name, size = struct.unpack_from("<4sI", payload, offset)
        yield name, offset + 8, size
        offset += 8 + size + size % 2


def _end_of_id3(payload: bytes) -> int:
    """Where a tag of titles and pictures at the start ends; 0 without one."""
    if not payload.startswith(b"ID3") or len(payload) < 10:
        return 0
    size = sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(payload[6:10]))
    return 10 + size + (10 if payload[5] & 16 else 0)


def _claimed_by_mpeg(payload: bytes) -> tuple[int, int]:
    """Samples that the first frame of an mp3 says will come, where its encoder put that there; and those of a frame."""
    start = _end_of_id3(payload)
    if len(payload) < start + 60 or payload[start] != 0xFF or payload[start + 1] & 0xE6 != 0xE2:  # not layer III
        return 0, 0
    newest, mono = payload[start + 1] & 8 != 0, payload[start + 3] >> 6 == 3
    place = start + 4 + ((17 if mono else 32) if newest else (9 if mono else 17))
    frames = 0
    if payload[place : place + 4] in (b"Xing", b"Info") and payload[place + 7] & 1:
        frames = int.from_bytes(payload[place + 8 : place + 12], "big")
    elif payload[start + 36 : start + 40] == b"VBRI":
        frames = int.from_bytes(payload[start + 50 : start + 54], "big")
    return frames * (1152 if newest else 576), 1152 if newest else 576


def _by_ffmpeg(payload: bytes, demuxer: str, limits: Limits, rate: int) -> np.ndarray:
    with opened(payload, demuxer, "audio", limits) as container:
        sound = open_sound(container, "audio", limits)
        if sound is None:
            raise BadSample("audio has no sound stream")
        most = min(limits.max_frames, int(limits.max_seconds * sound.rate))
        wave_S, frames = resample(sound.blocks, sound.rate, most, sound.claimed or 0, "audio", rate)
    if sound.claimed and frames < 0.98 * sound.claimed - sound.rate / 2:  # claims are rounded, and count padding
        raise BadSample(f"audio is cut short: {frames} of the {sound.claimed} samples that its header claims")
    return wave_S


def _by_sndfile(payload: bytes, limits: Limits, rate: int) -> np.ndarray:
    try:
        with _Forward(io.BytesIO(payload)) as clip:
            claimed = _claimed_frames(clip, payload)
            _check_claims(clip.samplerate, clip.channels, claimed, limits)
            most = min(limits.max_frames, int(limits.max_seconds * clip.samplerate))
            wave_S, frames = resample(_mono_blocks(clip), clip.samplerate, most, claimed or 0, "audio", rate)
            exact = clip.format in ("WAV", "WAVEX", "RF64", "FLAC")  # lengths of mp3 and ogg may be estimates
    except soundfile.LibsndfileError as error:
        raise BadSample(f"audio cannot be decoded: {error.error_string}") from error
    if frames == 0:
        raise BadSample("audio has zero length")
    least = claimed or 0 if exact else 0
    if clip.format == "MP3":
        claimed, per_frame = _claimed_by_mpeg(payload)
        least = claimed - _XING_SLACK * per_frame
    if frames < least:
        raise BadSample(f"audio is cut short: {frames} of the {claimed} samples that its header claims")
    return wave_S


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
    for name, offset, size in _chunks(payload):
        if name == b"data":
            present = len(payload) - offset
            whole = size <= present or size >= RIFF_FILLER
            return frames if whole else frames * size // max(present, 1)
    return frames


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
