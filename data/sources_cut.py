"""A stretch of a recording as flac, the only media that converters encode.

    wav, flac, ogg --libsndfile: seek--> samples of the stretch at their own rate, as they are stored--> flac
    mp3 --libsndfile: decode up to there--^
    anything else --data.audio: decode all of it--> 16 kHz mono--> flac

16-bit samples stay bit for bit what they are; wider ones keep 24 bits, lossy formats become 16. Memory is the stretch,
or all of a recording that cannot be read by seeking.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import soundfile

from data.audio import SAMPLE_RATE, decode
from data.errors import BadSample
from data.interrupts import uninterrupted
from data.sources import check_file, read_file

MAX_SECONDS = 3600.0
OVERSHOOT = 0.5  # seconds by which a stretch may end after its recording does; Kaldi allows as much
_MAGIC = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3")
_BLOCK = 1 << 16
_MAX_CHANNELS = 8  # of flac
_WIDE = ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")


def read_cut(place: Path, name: str, start: float, seconds: float | None, channel: int | None = None) -> bytes:
    """The `seconds` from `start` on (to the end where it is None) as flac; all channels, or the one of that number.

    Raises BadSample.
    """
    check_file(place, name)
    try:
        with uninterrupted(), open(place, "rb") as file:
            magic = file.read(4).ljust(4, b"\0")
            file.seek(0)
            if magic.startswith(_MAGIC) or magic[0] == 0xFF and magic[1] & 0xE0 == 0xE0 and magic[1] & 6:
                return _seek(file, name, start, seconds, channel)
        with uninterrupted():
            wave_S = decode(read_file(place, name))
        if channel:
            raise BadSample(f"channel is not there: {name} is read as mono")
        first, last = _bounds(name, start, seconds, len(wave_S), SAMPLE_RATE)
        return _flac(wave_S[first:last].clip(-1.0, 1.0), SAMPLE_RATE, "PCM_16")
    except soundfile.LibsndfileError as error:
        raise BadSample(f"audio cannot be decoded: {name}: {error.error_string}") from None
    except OSError as error:
        raise BadSample(f"file cannot be read: {name}: {error.strerror}") from None


class _Forward(soundfile.SoundFile):
    """Does not seek behind our back: the library does after each read, and a seek in mp3 is not exact."""

    def seekable(self) -> bool:
        return False


def _seek(file: BinaryIO, name: str, start: float, seconds: float | None, channel: int | None) -> bytes:
    with _Forward(file) as clip:
        if clip.channels > _MAX_CHANNELS or channel is not None and channel >= clip.channels:
            raise BadSample(f"channel is not there: {name} has {clip.channels} channels, flac holds {_MAX_CHANNELS}")
        first, last = _bounds(name, start, seconds, clip.frames, clip.samplerate)
        if clip.format == "MP3":
            for done in range(0, first, _BLOCK):
                clip.read(min(_BLOCK, first - done), "float32")
        else:
            clip.seek(first)
        exact = clip.subtype in ("PCM_16", "PCM_24", "PCM_32")
        wave_SC = cast(np.ndarray, clip.read(last - first, "int32" if exact else "float32", always_2d=True))
        rate, subtype = clip.samplerate, "PCM_24" if clip.subtype in _WIDE else "PCM_16"
    if len(wave_SC) < last - first:
        raise BadSample(f"audio is cut short: {name} has {len(wave_SC)} of {last - first} samples of a cut")
    if not np.isfinite(wave_SC).all():
        raise BadSample(f"audio contains NaN or infinite samples: {name}")
    wave_SC = wave_SC if exact else wave_SC.clip(-1.0, 1.0)
    return _flac(wave_SC if channel is None else wave_SC[:, channel : channel + 1], rate, subtype)


def _bounds(name: str, start: float, seconds: float | None, frames: int, rate: int) -> tuple[int, int]:
    """First sample of a stretch, and the one behind it. Raises BadSample where it is not inside the recording."""
    length = frames / rate
    if not 0 <= start < length:
        raise BadSample(f"cut starts outside its recording: at {start:g} s, {name} has {length:g} s")
    if seconds is not None and not 0 < seconds <= length - start + OVERSHOOT:
        raise BadSample(f"cut ends outside its recording: {start:g} + {seconds:g} s, {name} has {length:g} s")
    first = round(start * rate)
    last = frames if seconds is None else min(round((start + seconds) * rate), frames)
    if last <= first or (last - first) / rate > MAX_SECONDS:
        raise BadSample(f"cut is empty or over {MAX_SECONDS:g} s: {(last - first) / rate:g} s of {name}")
    return first, last


def _flac(wave: np.ndarray, rate: int, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="FLAC", subtype=subtype)
    return file.getvalue()
