"""Media that are empty, broken, cut, hostile or bombs: a reason each, quickly, and nothing else is ever opened."""

import io
import struct
import time
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from data.audio import decode
from data.errors import BadSample
from data.video import Sampling, load_sound, load_video, measure_video
from data.vision import decode_image, load_image, measure_image
from tests.data.audio_bytes import encode, tone
from tests.data.media_kit import clip, film, sounding

SMALL = Sampling(min_pixels=32 * 32, max_pixels=64 * 64)
LOADERS = (decode, decode_image, measure_image, load_video, load_sound, measure_video)


def reason(load, payload: bytes) -> str:
    start = time.process_time()
    with pytest.raises(BadSample) as caught:
        load(payload)
    assert time.process_time() - start < 2.0
    assert "\n" not in caught.value.reason and len(caught.value.reason) <= 300
    return caught.value.reason


@pytest.mark.parametrize("load", LOADERS)
def test_zero_bytes_and_noise(load):
    assert "0 bytes" in reason(load, b"")
    for size in (1, 7, 64, 100_000):
        assert reason(load, np.random.default_rng(size).bytes(size))
        assert reason(load, bytes(size))


PLAYLISTS = [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile '{}'\n",
    b"<?xml version='1.0'?><MPD><Period><AdaptationSet><BaseURL>{}</BaseURL></AdaptationSet></Period></MPD>",
    b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    b"[playlist]\nFile1={}\n",
]


@pytest.mark.parametrize("playlist", PLAYLISTS, ids=["hls", "concat", "dash", "sdp", "pls"])
def test_playlists_are_not_opened(playlist, tmp_path):
    target = tmp_path / "film.mp4"
    target.write_bytes(film(sound=sounding(1.0), sound_codec="aac"))
    payload = playlist.replace(b"{}", str(target).encode())
    for load in LOADERS:
        assert "none of" in reason(load, payload)
    hidden = b"\x00\x00\x00\x10ftypisom\0\0\0\0" + payload  # behind a beginning that is known
    for load in (decode, load_video, load_sound, measure_video):
        assert reason(load, hidden)


def referring(payload: bytes, path: bytes) -> bytes:
    """An mp4 of which only the index is left, its samples said to lie at the same places of another file."""
    start = payload.index(b"moov") - 4
    moov = payload[start : start + int.from_bytes(payload[start : start + 4], "big")]
    body = bytes(10) + bytes([4]) + b"disk".ljust(27, b"\0") + bytes(12) + bytes([4]) + b"film".ljust(63, b"\0")
    body += bytes(16) + b"\0\x01\0\x01" + bytes(16) + struct.pack(">HH", 2, len(path)) + path + bytes(len(path) % 2)
    body += struct.pack(">HH", 0xFFFF, 0)
    alias = struct.pack(">I4sI", 12 + len(body), b"alis", 0) + body
    place = moov.index(b"url ") - 4
    grown = len(alias) - 12
    out = bytearray(moov[:place] + alias + moov[place + 12 :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = moov.index(name) - 4
        out[at : at + 4] = struct.pack(">I", int.from_bytes(out[at : at + 4], "big") + grown)
    return payload[: int.from_bytes(payload[:4], "big")] + bytes(out)


def test_references_to_other_files_are_not_followed(tmp_path):
    target = tmp_path / "film.mp4"
    whole = film()
    target.write_bytes(whole)
    payload = referring(whole, str(target).encode())
    assert len(payload) < len(whole) // 2
    (tmp_path / "referring.mp4").write_bytes(payload)
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(tmp_path / "referring.mp4", options=options) as container:  # one that follows would see all of it
        assert sum(1 for _ in container.decode(video=0)) == 60
    for load in (load_video, measure_video, decode):
        assert reason(load, payload)


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_cut_mp4(front, share, tmp_path):
    payload = film(sound=sounding(3.0), sound_codec="aac")
    if front:
        (tmp_path / "a.mp4").write_bytes(payload)
        with (
            av.open(tmp_path / "a.mp4") as source,
            av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as out,
        ):
            streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    out.mux(packet)
        payload = (tmp_path / "b.mp4").read_bytes()
    assert (payload.index(b"moov") < payload.index(b"mdat")) == front
    assert load_video(payload, SMALL).grid[0] == 3
    cut = payload[: int(len(payload) * share)]
    for load in (load_video, load_sound, measure_video):
        assert reason(load, cut)


@pytest.mark.parametrize("kind,codec", [("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_other_films_that_are_cut(kind, codec):
    payload = film(kind, codec)
    for share in (0.05, 0.5, 0.9):
        assert "cut short" in reason(load_video, payload[: int(len(payload) * share)])


def test_a_film_of_unknown_length_is_taken_as_far_as_it_goes():
    payload = film("matroska", mux={"live": "1"})
    clip_of = load_video(payload, SMALL)
    half = load_video(payload[: len(payload) // 2], SMALL)
    assert 0 < half.grid[0] < clip_of.grid[0]


def test_films_without_frames():
    for kind in ("mp4", "matroska", "avi"):
        sound_codec = "pcm_s16le" if kind == "avi" else "flac"
        empty = film(kind, "mpeg4", [], sound=sounding(0.5), sound_codec=sound_codec)
        assert reason(load_video, empty) and reason(measure_video, empty)
    sound_only = clip("ipod", "aac", tone(44_100), 44_100)
    assert "no video stream" in reason(load_video, sound_only)


def test_a_film_that_claims_vast_frames():
    payload = film(codec="mpeg4")
    for mark, offset in ((b"mp4v", 28), (b"tkhd", 80)):
        at = payload.index(mark) + offset
        payload = payload[:at] + struct.pack(">HH", 65_000, 65_000) + payload[at + 4 :]
    try:
        assert load_video(payload, SMALL).grid[0] == 3  # the coded frames say otherwise, and they are right
    except BadSample as error:
        assert "limit" in error.reason or "cannot be decoded" in error.reason


def test_a_film_that_claims_days():
    payload = film("matroska", sound=sounding(1.0))
    at = payload.index(b"\x44\x89\x88") + 3
    assert "the limit is 3600 s" in reason(load_video, payload[:at] + struct.pack(">d", 1e9) + payload[at + 8 :])


def test_sound_that_is_none_in_a_film():
    wave_S = tone(48_000)
    wave_S[500] = np.nan
    payload = film("mov", sound=wave_S, sound_codec="pcm_f32le")
    assert "NaN" in reason(load_sound, payload) and "NaN" in reason(measure_video, payload)
    assert measure_video(payload, sound=False).frames == 60


def image_bytes(kind: str, side: int = 64, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_cut_images(kind):
    payload = image_bytes(kind)
    for share in (0.01, 0.1, 0.5, 0.9):
        cut = payload[: int(len(payload) * share)]
        assert reason(decode_image, cut)
    if kind == "JPEG":
        progressive = image_bytes(kind, progressive=True)
        assert "cannot be decoded" in reason(decode_image, progressive[: len(progressive) // 2])


def test_corrupt_jpegs():
    payload = image_bytes("JPEG")
    tables = payload.index(b"\xff\xc4")
    for bad in (payload[:tables] + b"\xff\xc4" + bytes(64), payload[:2] + bytes(500), payload[:100] + payload[300:]):
        assert reason(decode_image, bad)


def bombs() -> dict[str, bytes]:
    """Headers of 65,000 x 65,000 pixels, 12 GB when decoded."""
    side = 65_000
    jpeg, gif, bmp = image_bytes("JPEG"), image_bytes("GIF"), image_bytes("BMP")
    at = jpeg.index(b"\xff\xc0") + 5
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b""))
    png = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return {
        "png": b"\x89PNG\r\n\x1a\n" + png,
        "jpeg": jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4 :],
        "gif": gif[:6] + struct.pack("<HH", side, side) + gif[10:],
        "bmp": bmp[:18] + struct.pack("<ii", side, side) + bmp[26:],
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp"])
def test_image_bombs(kind, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for load in (decode_image, measure_image):
        said = reason(load, bombs()[kind])
        assert "claims 65000 x 65000 pixels" in said or "bomb" in said


def test_a_bomb_within_an_image():
    """A small gif or webp whose later frame is vast: only the first is decoded, within the size of the whole."""
    gif = bytearray(image_bytes("GIF"))
    at = gif.index(b"\x2c", 13 + 3 * 256)  # the frame's own size
    gif[at + 5 : at + 9] = struct.pack("<HH", 65_000, 65_000)
    assert reason(decode_image, bytes(gif))


@pytest.mark.parametrize("width,height", [(0, 0), (0, 9), (9, 0)])
def test_images_of_no_size(width, height):
    png = image_bytes("PNG")
    head = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    bad = png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]
    for load in (decode_image, measure_image, load_image):
        assert reason(load, bad)


def test_sound_bombs():
    wav = encode(tone(16_000), 16_000)
    at = wav.index(b"data") + 4
    assert "claims" in reason(decode, wav[:at] + struct.pack("<I", 2_000_000_000) + wav[at + 4 :])
    flac = encode(tone(16_000), 16_000, "flac")
    fields = int.from_bytes(flac[18:26], "big") >> 36 << 36 | 10**9
    assert "claims 1000000000 samples" in reason(decode, flac[:18] + fields.to_bytes(8, "big") + flac[26:])
