"""Sound to a file or to standard output, as it is made or when it is whole.

    wave [S] --16 bits--> answer.wav, whose header is right after every packet | stdout: wav or bare samples
    wave [S] ... at the end --> answer.wav, answer.flac

A wav that grows can be read at any moment and after any end, kill -9 included: samples are written first, then the 44
bytes of header in one piece. Nothing is opened before there is sound, so an answer without any leaves an older file.

Letters: S samples at 24 kHz.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import soundfile
import torch
from torch import Tensor

from data.errors import DataError
from data.interrupts import uninterrupted

SAMPLE_RATE = 24_000
UNKNOWN = 0xFFFFFFFF  # a length that is not known yet, as readers of pipes expect it
MOST_BYTES = UNKNOWN - 44


def pcm16(wave_S: Tensor) -> bytes:
    """Float [S] in [-1, 1] -> 16-bit little-endian samples; what lies beyond is full scale."""
    return (wave_S.float() * 32767.0).round().clamp(-32768, 32767).to(torch.int16).numpy().astype("<i2").tobytes()


def wav_header(num_bytes: int = UNKNOWN) -> bytes:
    """The 44 bytes in front of mono 16-bit samples: RIFF, format 1, and `num_bytes` of data."""
    whole = UNKNOWN if num_bytes == UNKNOWN else num_bytes + 36
    about = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", whole, b"WAVE") + about + struct.pack("<4sI", b"data", num_bytes)


class Sink(Protocol):
    """Where sound goes."""

    def write(self, wave_S: Tensor) -> None:
        """More of it."""
        ...

    def close(self, complete: bool) -> None:
        """No more will come; `complete` where the answer has ended by itself."""
        ...


class GrowingFile:
    """A wav that is valid after every `write`, or headerless samples where `raw`."""

    def __init__(self, path: Path, raw: bool = False) -> None:
        self._path, self._raw, self._bytes = path, raw, 0
        self._file: IO[bytes] | None = None

    def write(self, wave_S: Tensor) -> None:
        """More sound. Raises DataError where it cannot be written; Ctrl-C waits until the header is right."""
        payload = pcm16(wave_S)
        if not payload:
            return
        if self._bytes + len(payload) > MOST_BYTES:
            raise DataError(f"out={self._path}: a wav holds 24 hours of sound, no more")
        try:
            with uninterrupted():
                if self._file is None:
                    self._file = open(self._path, "wb")
                    self._file.write(b"" if self._raw else wav_header(0))
                self._file.write(payload)
                self._file.flush()
                self._bytes += len(payload)
                if not self._raw:
                    self._file.seek(0)
                    self._file.write(wav_header(self._bytes))
                    self._file.seek(0, os.SEEK_END)  # which flushes
        except OSError as error:
            raise DataError(f"out={self._path}: cannot be written: {error.strerror}") from None

    def close(self, complete: bool) -> None:
        """No more. What there is stays, `complete` or not."""
        if self._file is not None:
            self._file.close()


class Pipe:
    """Standard output: a wav of unknown length, or headerless samples where `raw`."""

    def __init__(self, raw: bool = False) -> None:
        self._head = b"" if raw else wav_header()

    def write(self, wave_S: Tensor) -> None:
        """More sound. Raises DataError where the reader has left."""
        if not len(wave_S):
            return
        try:
            sys.stdout.buffer.write(self._head + pcm16(wave_S))
            sys.stdout.buffer.flush()
            self._head = b""
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # what is still in buffers goes there, when Python ends
            os.close(nowhere)
            raise DataError("out=-: whoever read it has left") from None

    def close(self, complete: bool) -> None:
        """No more."""


class WholeFile:
    """A wav or flac, written when the answer is complete, as the extension says."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waves: list[Tensor] = []

    def write(self, wave_S: Tensor) -> None:
        """More sound, kept."""
        self._waves.append(wave_S)

    def close(self, complete: bool) -> None:
        """Write it, where the answer is `complete`. Raises DataError."""
        wave_S = torch.cat([torch.empty(0), *self._waves])
        if not complete or not len(wave_S):
            return
        try:
            soundfile.write(self._path, np.frombuffer(pcm16(wave_S), "<i2"), SAMPLE_RATE)
        except (OSError, soundfile.LibsndfileError) as error:
            raise DataError(f"out={self._path}: cannot be written: {error}") from None
