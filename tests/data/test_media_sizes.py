"""What an index says of a medium, and the closed forms over it, are exactly what decoding gives."""

import io

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import BadSample
from data.video import (
    Sampling,
    frame_counts,
    frame_sides,
    frame_size,
    load_sound,
    load_video,
    measure_video,
    wanted_frames,
)
from data.vision import ImageLimits, Patching, decode_image, image_sides, load_image, measure_image, smart_resize
from tests.data.media_kit import NASA, film, sounding

sides = st.integers(1, 20_000)
patchings = st.sampled_from([Patching(), Patching(14), Patching(8, 1, 3)])


def refused_or(function, *args):
    try:
        return function(*args)
    except BadSample:
        return 0, 0


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=30),
    patchings,
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 13),
)
def test_image_sides_equal_smart_resize(pairs, patching, low, times):
    limits = ImageLimits(min_pixels=low, max_pixels=low * times)
    heights_N, widths_N = np.array(pairs).T
    rows_N, columns_N = image_sides(heights_N, widths_N, limits, patching)
    assert rows_N.dtype == columns_N.dtype == np.int64
    want = [refused_or(smart_resize, h, w, patching.factor, low, low * times) for h, w in pairs]
    assert list(zip(rows_N.tolist(), columns_N.tolist(), strict=True)) == want


def test_image_sides_at_the_edges():
    """Halves of the factor, which round to even; each side of every bound; shapes just allowed and just not."""
    halves = np.arange(8, 16 * 60, 8)
    heights_N, widths_N = (side.ravel() for side in np.meshgrid(halves, halves))
    for low, high in [(1, 1 << 40), (64 * 96, 64 * 96), (3_136, 12_845_056)]:
        limits = ImageLimits(min_pixels=low, max_pixels=high)
        got = np.stack(image_sides(heights_N, widths_N, limits, Patching()), axis=1).tolist()
        sizes = zip(heights_N.tolist(), widths_N.tolist(), strict=True)
        assert got == [list(refused_or(smart_resize, h, w, 32, low, high)) for h, w in sizes]
    rows_N, columns_N = image_sides(np.array([1, 1, 201]), np.array([200, 201, 1]), ImageLimits(), Patching())
    assert rows_N[0] > 0 and rows_N[1:].tolist() == columns_N[1:].tolist() == [0, 0]


samplings = st.builds(
    Sampling,
    fps=st.sampled_from([0.1, 1.0, 2.0, 29.97]),
    min_frames=st.integers(1, 8),
    max_frames=st.integers(8, 800),
    min_pixels=st.integers(1, 1 << 18),
    max_pixels=st.integers(1 << 18, 1 << 22),
    max_tokens=st.integers(1, 200_000),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.001, 1e5), st.integers(1, 1 << 20), sides, sides), min_size=1, max_size=20),
    samplings,
    st.sampled_from([Patching(), Patching(14, 3), Patching(8, 1)]),
)
def test_frame_counts_and_sides_equal_one_by_one(films, sampling, patching):
    temporal = patching.temporal_patch_size
    seconds_N, present_N, heights_N, widths_N = (np.array(column) for column in zip(*films, strict=True))
    counts_N = frame_counts(seconds_N, present_N, sampling, temporal)
    assert counts_N.dtype == np.int64
    assert counts_N.tolist() == [wanted_frames(s, p, sampling, temporal) for s, p, *_ in films]
    rows_N, columns_N = frame_sides(heights_N, widths_N, counts_N, sampling, patching)
    for (_, _, h, w), count, *got in zip(films, counts_N.tolist(), rows_N, columns_N, strict=True):
        assert tuple(got) == refused_or(frame_size, h, w, count, sampling, patching)


SAMPLING = Sampling(fps=3.0, min_frames=2, max_frames=20, min_pixels=32 * 32, max_pixels=96 * 96, max_tokens=60)


def assert_as_measured(payload: bytes) -> None:
    size, patching = measure_video(payload), Patching()
    clip, sound_S = load_video(payload, SAMPLING), load_sound(payload)
    assert size.sound_samples == (0 if sound_S is None else len(sound_S))
    assert size._replace(sound_samples=0) == measure_video(payload, sound=False)
    counts_N = frame_counts(np.array([size.seconds]), np.array([size.frames]), SAMPLING)
    rows_N, columns_N = frame_sides(np.array([size.height]), np.array([size.width]), counts_N, SAMPLING, patching)
    assert clip.grid == (-(-counts_N[0] // 2), rows_N[0] // 16, columns_N[0] // 16)
    assert clip.seconds_per_grid == size.seconds * 2 / counts_N[0]
    assert len(clip.times) == clip.grid[0] and list(clip.times) == sorted(set(clip.times))


CODECS = [
    ("mp4", "libx264", "aac"),
    ("mp4", "mpeg4", "flac"),
    ("mov", "libx264", "pcm_s16le"),
    ("matroska", "libx264", "flac"),
    ("webm", "libvpx", "libopus"),
    ("avi", "mpeg4", "pcm_s16le"),
    ("avi", "libx264", "libmp3lame"),
]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(CODECS),
    st.lists(st.sampled_from([0.02, 0.05, 0.05, 0.4]), min_size=1, max_size=30),
    st.integers(0, 3),
    st.sampled_from([0, 90, 180, 270]),
    st.tuples(st.integers(10, 60), st.integers(10, 60)),
    st.sampled_from([None, 0.0, 0.35]),
)
def test_films_are_as_measured(codecs, steps, b_frames, rotation, half_size, sound_at):
    kind, codec, sound_codec = codecs
    times = np.arange(len(steps)) / 20 if kind == "avi" else np.cumsum(steps)
    payload = film(
        kind,
        codec,
        times,
        size=(2 * half_size[0], 2 * half_size[1]),
        b_frames=0 if codec == "libvpx" else b_frames,
        rotation=rotation if kind in ("mp4", "mov") else 0,
        sound=None if sound_at is None else sounding(0.7),
        sound_codec=sound_codec,
        sound_at=0.0 if kind == "avi" else sound_at or 0.0,
    )
    assert_as_measured(payload)


def test_odd_sides_and_one_frame():
    for size in [(35, 21), (61, 99)]:
        for rotation in (0, 90):
            payload = film(codec="mpeg4", size=size, rotation=rotation, times=np.arange(7) / 20)
            measured = measure_video(payload)
            assert (measured.width, measured.height) == (size if rotation == 0 else size[::-1])
            assert_as_measured(payload)
    assert_as_measured(film(times=[0.0]))


@pytest.mark.skipif(not NASA.is_file(), reason="the folder ../shared with real films is absent")
def test_a_real_film_is_as_measured():
    payload = NASA.read_bytes()
    size = measure_video(payload)
    assert size.frames == 390 and size.seconds == pytest.approx(13.013)
    assert_as_measured(payload)


def test_sound_that_stops_for_a_while_stays_in_step():
    whole = film("matroska", sound=sounding(3.0), times=np.arange(60) / 20)
    file = io.BytesIO()
    with av.open(io.BytesIO(whole)) as source, av.open(file, "w", format="matroska") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            lost = packet.stream.type == "audio" and packet.pts is not None and 1.0 <= packet.pts * packet.time_base < 2
            if packet.dts is not None and not lost:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    want_S, got_S = load_sound(whole), load_sound(file.getvalue())
    assert want_S is not None and got_S is not None and abs(len(got_S) - len(want_S)) <= 32
    assert np.abs(got_S[17_500:30_500]).max() < 1e-3
    np.testing.assert_allclose(got_S[33_600:47_000], want_S[33_600:47_000], atol=0.03)
    assert measure_video(file.getvalue()).sound_samples == len(got_S)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_are_as_measured(monkeypatch):
    exif = Image.Exif()
    for orientation in range(9):
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
            options = {"exif": exif} if orientation and kind in ("JPEG", "PNG", "WEBP") else {}
            payload = encoded(Image.new("RGB", (70, 33), "teal"), kind, **options)
            height, width, _ = decode_image(payload).shape
            assert (height, width) == ((70, 33) if options and orientation > 4 else (33, 70))
            assert measure_image(payload) == measure_image(payload, check=True) == (height, width)
            _, grid = load_image(payload)
            rows_N, columns_N = image_sides(np.array([height]), np.array([width]), ImageLimits(), Patching())
            assert grid == (1, rows_N[0] // 16, columns_N[0] // 16)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        assert measure_image(encoded(Image.new("RGB", (70, 33)), kind)) == (33, 70)


def test_turning_written_behind_the_pixels_of_a_png():
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = encoded(Image.new("RGB", (70, 33)), "PNG", exif=exif)
    start = payload.index(b"eXIf") - 4
    length = 12 + int.from_bytes(payload[start : start + 4], "big")
    end = payload.index(b"IEND") - 4
    late = payload[:start] + payload[start + length : end] + payload[start : start + length] + payload[end:]
    assert decode_image(late).shape[:2] == measure_image(late) == (70, 33)


def test_a_measure_checks_limits_and_whole_images():
    payload = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    with pytest.raises(BadSample, match="claims 64 x 64 pixels, the limit is 4000"):
        measure_image(payload, ImageLimits(max_source_pixels=4000))
    cut = payload[: len(payload) // 2]
    assert measure_image(cut) == (64, 64)
    with pytest.raises(BadSample, match="cannot be decoded"):
        measure_image(cut, check=True)
