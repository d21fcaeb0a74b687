"""Pictures, sounds and films of the demo's corpus as bytes of common formats.

    uint8 [H, W, 3] --Pillow--> png, jpg, webp      float32 [S] --libsndfile--> flac, mp3
    uint8 [N, H, W, 3] + float32 [S] --FFmpeg, one thread, bitexact--> mp4: H.264 (or MPEG-4) and AAC

The same input gives the same bytes with the same libraries: no clock, no random serial number. Cost: 1 ms a picture,
1 ms a flac of 2 s and 15 ms an mp3, 25 ms a film.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import soundfile
from av.codec.context import Flags
from av.container import OutputContainer
from PIL import Image

from data.audio import SAMPLE_RATE

_SAVED = {"png": {"compress_level": 6}, "jpg": {"quality": 88}, "webp": {"quality": 85, "method": 2}}
_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_AAC_FRAME = 1024


def encode_image(frame_HWC: np.ndarray, extension: str) -> bytes:
    """uint8 [H, W, 3] -> png, jpg or webp."""
    file = io.BytesIO()
    Image.fromarray(frame_HWC).save(file, _FORMATS[extension], **_SAVED[extension])
    return file.getvalue()


def encode_sound(wave_S: np.ndarray, extension: str, rate: int = SAMPLE_RATE) -> bytes:
    """float32 [S], or int16, -> flac of 16 bits, or mp3."""
    file = io.BytesIO()
    kind = {"flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III")}[extension]
    soundfile.write(file, wave_S, rate, format=kind[0], subtype=kind[1])
    return file.getvalue()


def encode_film(frames_NHWC: np.ndarray, fps: int, wave_S: np.ndarray | None = None) -> bytes:
    """uint8 [N, H, W, 3] of even sides, and its sound, float32 [S] at 16 kHz -> mp4."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", container_options={"fflags": "+bitexact"}) as film:
        pictures = _video_stream(film, fps, *frames_NHWC.shape[1:3])
        sound = None if wave_S is None else _audio_stream(film)
        for i, frame_HWC in enumerate(frames_NHWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            film.mux(pictures.encode(frame))
        film.mux(pictures.encode(None))
        if sound is not None and wave_S is not None:
            for start in range(0, len(wave_S), _AAC_FRAME):
                block_1S = np.ascontiguousarray(wave_S[None, start : start + _AAC_FRAME], dtype=np.float32)
                block = av.AudioFrame.from_ndarray(block_1S, format="fltp", layout="mono")
                block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
                film.mux(sound.encode(block))
            film.mux(sound.encode(None))
    return file.getvalue()


def _video_stream(film: OutputContainer, fps: int, height: int, width: int) -> av.VideoStream:
    encoder = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    stream = film.add_stream(encoder, rate=fps)
    assert isinstance(stream, av.VideoStream)
    stream.height, stream.width, stream.pix_fmt, stream.bit_rate = height, width, "yuv420p", 120_000
    stream.codec_context.thread_count = 1
    stream.codec_context.flags |= Flags.bitexact
    if encoder == "libx264":
        stream.options = {"preset": "ultrafast", "crf": "20"}
    return stream


def _audio_stream(film: OutputContainer) -> av.AudioStream:
    stream = film.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
    assert isinstance(stream, av.AudioStream)
    stream.bit_rate = 48_000
    stream.codec_context.flags |= Flags.bitexact
    return stream
