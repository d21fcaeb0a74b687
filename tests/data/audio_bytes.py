"""Encoded clips for tests."""

import io

import numpy as np
import soundfile

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
    "vorbis": ("OGG", "VORBIS"),
}


def tone(rate: int, seconds: float = 1.0, hz: float = 440.0) -> np.ndarray:
    """A sine at half of full scale, float32 [S]."""
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encode(wave: np.ndarray, rate: int, kind: str = "wav", subtype: str | None = None) -> bytes:
    """`wave` [S] or [S, C] as the bytes of an audio file."""
    container, usual = FORMATS[kind]
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=container, subtype=subtype or usual)
    return file.getvalue()
