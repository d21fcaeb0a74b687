"""Films and clips of many codecs and containers for tests, encoded by PyAV."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.data.audio_bytes import tone

NASA = Path(__file__).resolve().parents[2] / "../shared/data/media/nasa_13013.mp4"
TICKS = 1000  # a second


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """A picture unlike all others near it, with motion that makes frames lean on each other: uint8 [H, W, 3]."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin((columns + 3 * number) / 5) + np.cos((rows - 2 * number) / 7)
    grey = 128 + 40 * waves + 25 * np.sin(number * 0.7)
    return np.stack([grey, grey[::-1], np.full_like(grey, number * 7 % 256)], axis=2).clip(0, 255).astype(np.uint8)


def film(
    kind="mp4",
    codec="libx264",
    times=None,
    *,
    size=(64, 48),
    gop=10,
    b_frames=0,
    params="",
    rotation=0,
    sound=None,
    sound_codec="flac",
    sound_at=0.0,
    mux=None,
) -> bytes:
    """Pictures 0, 1, 2 ... shown at `times` seconds; `sound` float32 [S] at 48 kHz beside them from `sound_at` on."""
    times = np.arange(60) / 20 if times is None else times
    file, options = io.BytesIO(), {"preset": "ultrafast", "x264-params": params} if codec == "libx264" else {}
    with av.open(file, "w", format=kind, options=mux or {}) as out:
        video = out.add_stream(codec, rate=20 if codec != "mpeg2video" else 25, bit_rate=500_000, options=options)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        coder = video.codec_context
        coder.gop_size, coder.max_b_frames, coder.thread_count = gop, b_frames, 1
        if codec != "mpeg2video" and kind != "avi":
            video.time_base = coder.time_base = Fraction(1, TICKS)
        if rotation:
            video.set_display_rotation(rotation)
        audio = None
        if sound is not None:
            audio = out.add_stream(sound_codec, rate=48_000, layout="mono")
        for number, seconds in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, size), "rgb24")
            frame.time_base = coder.time_base or Fraction(1, 20)
            frame.pts = round(seconds / frame.time_base)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None:
            _mux_sound(out, audio, sound, 48_000, sound_at)
    return file.getvalue()


def clip(kind: str, codec: str, wave_S: np.ndarray, rate: int, layout="mono", bit_rate=64_000) -> bytes:
    """An audio file of one stream."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout, bit_rate=bit_rate)
        _mux_sound(out, stream, wave_S, rate)
    return file.getvalue()


def _mux_sound(out, stream, wave_S, rate, late=0.0) -> None:
    coder = stream.codec_context
    if coder.name == "tta":
        coder.format = "s16"  # else 8 bits
    convert = av.AudioResampler(format=coder.format, layout=coder.layout, rate=rate)
    for start in range(0, len(wave_S), 1024):
        block = np.repeat(wave_S[start : start + 1024], coder.layout.nb_channels)[None]
        frame = av.AudioFrame.from_ndarray(block, "flt", coder.layout.name)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start + round(late * rate)
        for part in convert.resample(frame):
            out.mux(stream.encode(part))
    for part in convert.resample(None):
        out.mux(stream.encode(part))
    out.mux(stream.encode())


def remuxed(payload: bytes, kind: str, keep=lambda packet: True, shift: float = 0.0) -> bytes:
    """The video packets that `keep` says, in another container, `shift` seconds later."""
    file = io.BytesIO()
    with av.open(io.BytesIO(payload)) as source, av.open(file, "w", format=kind) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None and keep(packet):
                ticks = round(shift / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, stream
                out.mux(packet)
    return file.getvalue()


def everything(payload: bytes) -> tuple[list[int], list[np.ndarray]]:
    """All frames that a film's decoder gives when nothing is sought: ticks and uint8 [H, W, 3]."""
    with av.open(io.BytesIO(payload)) as source:
        stream = source.streams.best("video")
        stream.codec_context.thread_count = 1
        frames = list(source.decode(stream))
        return [f.pts for f in frames], [np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)) for f in frames]


def sounding(seconds: float, rate: int = 48_000) -> np.ndarray:
    """A tone as the sound of a film."""
    return tone(rate, seconds)
