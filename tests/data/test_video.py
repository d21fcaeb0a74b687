"""Video to patches and sound: equal to transformers' processor on the same frames, at their real times."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data.errors import BadSample
from data.mel import log_mel
from data.video import Sampling, VideoLimits, load_sound, load_video, pick_frames, wanted_frames
from data.vision import Patching
from tests.data.audio_bytes import tone
from tests.data.test_vision import processor

NASA = Path(__file__).resolve().parents[2] / "../shared/data/media/nasa_13013.mp4"
needs_nasa = pytest.mark.skipif(not NASA.is_file(), reason="the folder ../shared with real films is absent")
SMALL = Sampling(min_pixels=32 * 32, max_pixels=64 * 64)
LEVELS = 60  # grey level of frame i of a film below: 3 i + 20


def film(
    times=None,
    kind="mp4",
    rotation=0,
    sound=None,
    sound_rate=48_000,
    sound_at=0.0,
    size=(64, 32),
    codec="mpeg4",
    path=None,
) -> bytes:
    """Grey frames shown at `times` seconds, each a little brighter, its left edge white; `sound` beside them."""
    times = np.arange(LEVELS) / 20 if times is None else times
    file = path or io.BytesIO()
    options = {"movflags": "faststart"} if path else {}  # the index first, for which FFmpeg needs a real file
    with av.open(file, "w", format=kind, options=options) as out:
        video = out.add_stream(codec, rate=20, bit_rate=4_000_000)
        video.width, video.height = size
        video.pix_fmt, video.time_base = "yuv420p", Fraction(1, 1000)
        video.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            video.set_display_rotation(rotation)
        lossless = "pcm_s16le" if kind == "avi" else "flac"
        audio = out.add_stream(lossless, rate=sound_rate, layout="stereo") if sound is not None else None
        for i, seconds in enumerate(times):
            picture = np.full((size[1], size[0], 3), 20 + 3 * i, np.uint8)
            picture[:, :8] = 255
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None:
            for start in range(0, len(sound), 1024):
                block = np.stack([sound, -0.5 * sound])[:, start : start + 1024]  # channels of which one is the less
                packed = (block.T.reshape(1, -1) * 32_767).round().astype(np.int16)
                frame = av.AudioFrame.from_ndarray(packed, "s16", "stereo")
                frame.sample_rate, frame.time_base = sound_rate, Fraction(1, sound_rate)
                frame.pts = start + round(sound_at * sound_rate)
                out.mux(audio.encode(frame))
            out.mux(audio.encode())
    return path.read_bytes() if path else file.getvalue()


def shown(clip, patching=Patching()) -> list[int]:  # noqa: B008
    """The number of every frame taken, by the grey of its bottom right patch."""
    values = clip.pixels_PX.view(clip.grid[0], -1, 3, patching.temporal_patch_size, patching.patch_size**2)
    grey = (values[:, -1].mean(dim=(1, 3)) * 0.5 + 0.5) * 255
    return [round(v) for v in ((grey - 20) / 3).flatten().tolist()]


@needs_nasa
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(fps=0.7, max_tokens=700, min_pixels=40_000)])
def test_a_real_film_equals_transformers_on_the_same_frames(sampling):
    """The video processor needs torchvision, so each frame goes through the image processor: the same arithmetic."""
    clip = load_video(NASA.read_bytes(), sampling)
    with av.open(NASA) as container:
        stream = max(container.streams.video, key=lambda s: s.width)
        frames = list(container.decode(stream))
    count = wanted_frames(13.013, len(frames), sampling)
    assert len(frames) == 390 and count == (26 if sampling.fps == 2.0 else 8)
    taken = [frames[i * len(frames) // count] for i in range(count)]
    assert clip.times == tuple(float(frame.pts * stream.time_base) for frame in taken[::2])
    assert clip.seconds_per_grid == pytest.approx(13.013 * 2 / count)
    most = min(768 * 32 * 32, sampling.max_tokens * 32 * 32 * 2 // count)
    images = processor(Patching(), sampling.min_pixels, most)
    values = clip.pixels_PX.view(clip.grid[0], -1, 3, 2, 256)
    for i, frame in enumerate(taken):
        want = images(images=frame.to_image(), return_tensors="pt")
        assert clip.grid == (count // 2, *want["image_grid_thw"][0, 1:].tolist())
        assert torch.equal(values[i // 2, :, :, i % 2], want["pixel_values"].view(-1, 3, 2, 256)[:, :, 0])


@needs_nasa
def test_a_real_soundtrack_and_its_log_mel_equal_the_references():
    transformers = pytest.importorskip("transformers")
    wave_S = load_sound(NASA.read_bytes())
    with av.open(NASA) as container:
        stream = max(container.streams.audio, key=lambda s: s.rate)
        planes = av.AudioResampler("fltp")
        blocks = [part.to_ndarray() for frame in container.decode(stream) for part in planes.resample(frame)]
    assert stream.rate == 16_000
    want_S = np.concatenate(blocks, axis=1).mean(axis=0)
    assert wave_S is not None and wave_S.dtype == np.float32 and np.array_equal(wave_S, want_S)
    assert np.sqrt((wave_S**2).mean()) > 0.01
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    out = extractor(wave_S, sampling_rate=16_000, padding=True, truncation=False, return_tensors="pt")
    torch.testing.assert_close(log_mel(wave_S), out["input_features"][0].T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind,codec", [("mp4", "mpeg4"), ("matroska", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
def test_containers(kind, codec):
    clip = load_video(film(kind=kind, codec=codec), SMALL)
    assert clip.grid == (3, 2, 4)
    assert shown(clip) == pytest.approx([0, 10, 20, 30, 40, 50], abs=1)
    assert clip.times == pytest.approx((0.0, 1.0, 2.0)) and clip.seconds_per_grid == pytest.approx(1.0, rel=0.02)


def test_pictures_of_uneven_length():
    """The frame on show at each moment, as often as it is: at first since it came, then since the moment."""
    times = np.array([0.0, 0.1, 0.2, 1.0, 1.1, 3.9, 4.0, 4.05, 4.1])
    clip = load_video(film(times, kind="matroska"), SMALL)  # 4.15 s: 8 frames, at 0, 0.52, 1.04 ... 3.63
    assert shown(clip) == [0, 2, 3, 4, 4, 4, 4, 4]
    assert clip.times == pytest.approx((0.0, 1.0, 2.075, 3.1125), abs=1e-3)


def test_rotation_is_undone():
    for rotation in (90, -90, 180):
        clip = load_video(film(rotation=rotation), SMALL)
        rows, columns = clip.grid[1:]
        assert (rows, columns) == ((2, 4) if rotation == 180 else (4, 2))
        values = clip.pixels_PX.view(3, rows // 2, columns // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        values = values.reshape(3, rows, columns, -1)[0].mean(-1)  # the white edge was on the left
        edge = {90: values[-1], -90: values[0], 180: values[:, -1]}[rotation]
        assert edge.min() > values.min() + 0.5


def test_frames_wanted():
    ask = Sampling(fps=2.0, min_frames=4, max_frames=10)
    assert [wanted_frames(s, 1_000, ask) for s in (0.1, 2.0, 3.4, 4.9, 5.0, 60.0)] == [4, 4, 6, 8, 10, 10]
    assert [wanted_frames(3.0, present, ask) for present in (1, 2, 3, 5, 6)] == [1, 2, 2, 4, 6]
    assert wanted_frames(3.0, 2, ask, temporal=3) == 2
    frame_N, shown_N = pick_frames(np.arange(0, 30, 3), 30, 4)
    assert frame_N.tolist() == [0, 2, 5, 7] and shown_N == [0, 6, 15, 21]
    frame_N, shown_N = pick_frames(np.array([5, 6]), 105, 4)
    assert frame_N.tolist() == [0, 1, 1, 1] and shown_N == [5, 6, 55, 80]


def test_short_films():
    for frames, grid in [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]:
        clip = load_video(film(np.arange(frames) / 20), SMALL)
        assert clip.grid == (grid, 2, 4) and len(clip.times) == grid and clip.seconds_per_grid > 0


def test_more_frames_are_smaller():
    payload = film(size=(320, 320))
    sizes = [
        load_video(payload, Sampling(fps, 2, 768, 1024, 512 * 512, max_tokens=120)).grid for fps in (0.7, 4.0, 20.0)
    ]
    assert sizes == [(1, 20, 20), (6, 8, 8), (30, 4, 4)]
    assert all(t * h * w // 4 <= 120 for t, h, w in sizes)


def test_sound_is_resampled_and_in_step():
    wave_S = tone(48_000, 2.0)
    got_S = load_sound(film(sound=wave_S, kind="matroska"))
    assert got_S is not None and len(got_S) == 32_000
    np.testing.assert_allclose(got_S[400:-400], tone(16_000, 2.0)[400:-400] / 4, atol=1e-3)  # mean of 1 and -1/2
    late_S = load_sound(film(sound=wave_S, kind="matroska", sound_at=0.5))
    assert late_S is not None and len(late_S) == 40_000
    assert np.abs(late_S[:7_900]).max() < 1e-3
    np.testing.assert_allclose(late_S[8_000:], got_S, atol=2e-2)
    assert load_sound(film()) is None


def test_times_count_from_the_start_of_the_sound():
    clip = load_video(film(np.arange(40) / 20 + 1.5, sound=tone(48_000, 3.5), kind="matroska"), SMALL)
    assert clip.times == pytest.approx((1.5, 2.5))


def test_a_title_in_another_encoding_is_no_damage():
    file = io.BytesIO()
    with av.open(io.BytesIO(film()), "r") as source, av.open(file, "w", format="mp4") as out:
        out.metadata["title"] = "TITLE_OF_FILM"
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    payload = file.getvalue().replace(b"TITLE_OF_FILM", b"caf\xe9 \xff\xfe movie"[:13].ljust(13))
    assert b"caf\xe9" in payload
    assert load_video(payload, SMALL).grid == (3, 2, 4)


def test_bad_films(tmp_path):
    good = film(sound=tone(48_000, 3.0))
    moov_first = film(path=tmp_path / "film.mp4")
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    sound_only = io.BytesIO()
    with av.open(sound_only, "w", format="matroska") as out:
        stream = out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), "s16", "mono")
        silence.sample_rate, silence.pts = 16_000, 0
        out.mux(stream.encode(silence))
        out.mux(stream.encode())
    for payload, message in [
        (b"", "empty"),
        (playlist, "none of mp4"),
        (b"\0\0\0\x18ftypisom" + bytes(100), "cannot be decoded|no video stream"),
        (good[:400], "cut short: it has 400 of"),
        (moov_first[: len(moov_first) // 2], "cut short|breaks off|cannot be decoded"),
        (sound_only.getvalue(), "no video stream"),
        (film([], kind="matroska", sound=tone(48_000)), "no frames|cannot be decoded"),
    ]:
        with pytest.raises(BadSample, match=message):
            load_video(payload)
    for limits, message in [
        (VideoLimits(max_bytes=100), "bytes, the limit is 100"),
        (VideoLimits(max_seconds=2), "claims 3 s, the limit is 2 s"),
        (VideoLimits(max_frames=59), "more than 59 frames"),
        (VideoLimits(max_source_pixels=2_000), "64 x 32|cannot be decoded"),
    ]:
        with pytest.raises(BadSample, match=message):
            load_video(good, limits=limits)
    for limits in (VideoLimits(max_channels=1), VideoLimits(max_rate=44_100)):
        with pytest.raises(BadSample, match="48000 Hz and 2 channels"):
            load_sound(good, limits)
    with pytest.raises(BadSample, match="too short"):
        load_sound(film(sound=tone(48_000, 0.02)))


def test_random_damage_never_gets_out():
    generator = np.random.default_rng(0)
    for kind in ("mp4", "matroska", "avi"):
        good = film(np.arange(12) / 20, kind=kind, sound=tone(48_000, 0.5))
        for _ in range(25):
            bad = bytearray(good)
            for place in generator.integers(0, len(bad), generator.integers(1, 40)):
                bad[place] = generator.integers(256)
            for load in (load_video, load_sound):
                try:
                    load(bytes(bad))
                except BadSample as error:
                    assert "\n" not in str(error)
