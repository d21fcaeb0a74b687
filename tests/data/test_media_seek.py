"""Frames by seek: the same, bit for bit, as decoding everything, while few are decoded."""

import io

import av
import numpy as np
import pytest
import torch

import data.ffmpeg
from data.errors import BadSample
from data.video import Sampling, frame_size, load_video, pick_frames, wanted_frames
from data.vision import Patching, resize, to_patches
from tests.data.media_kit import NASA, everything, film, remuxed, sounding

needs_nasa = pytest.mark.skipif(not NASA.is_file(), reason="the folder ../shared with real films is absent")
SMALL = Sampling(fps=2.0, min_frames=2, min_pixels=32 * 32, max_pixels=96 * 96)
UNEVEN = np.cumsum(np.random.default_rng(0).choice([0.02, 0.05, 0.3], 60))


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Presentation times of all frames that are decoded."""
    times, decoded = [], data.ffmpeg._decoded

    def counting(container, stream):
        for frame in decoded(container, stream):
            times.append(frame.pts)
            yield frame

    monkeypatch.setattr("data.ffmpeg._decoded", counting)
    return times


def expected(payload: bytes, sampling: Sampling):
    """Patches of the frames that a decoder gives in order, by their number in it."""
    with av.open(io.BytesIO(payload)) as source:
        stream = source.streams.best("video")
        packets = [p for p in source.demux(stream) if p.size and not p.is_discard]
        by_dts = source.format.name == "avi"
        ticks = np.unique([p.dts if by_dts else p.pts for p in packets])
        end = int(ticks[-1]) + (packets[-1].duration or int(np.ptp(ticks)) // max(len(ticks) - 1, 1))
        seconds = float((end - int(ticks[0])) * stream.time_base)
    _, frames = everything(payload)
    count = wanted_frames(seconds, len(ticks), sampling)
    taken, _ = pick_frames(ticks, end, count)
    size = frame_size(*frames[0].shape[:2], count, sampling, Patching())
    return to_patches(np.stack([resize(np.ascontiguousarray(frames[i]), size) for i in taken]))


OPEN = "open-gop=1:keyint=12:min-keyint=1:scenecut=0:bframes=3:b-adapt=0"
FILMS = {
    "h264 mp4": {},
    "h264 B frames": {"b_frames": 3, "params": "b-adapt=0:b-pyramid=normal"},
    "h264 open GOP mkv": {"kind": "matroska", "b_frames": 3, "params": OPEN},
    "h264 open GOP mp4": {"b_frames": 3, "params": OPEN},
    "h264 uneven": {"times": UNEVEN, "b_frames": 2},
    "h264 fragmented": {"mux": {"movflags": "frag_keyframe+empty_moov"}, "b_frames": 2},
    "h264 turned, with sound": {"rotation": 90, "sound": sounding(3.0), "sound_codec": "aac"},
    "h264 intra refresh": {"params": "intra-refresh=1:keyint=15:scenecut=0"},
    "h264 one key frame": {"gop": 600},
    "h264 odd size mkv": {"kind": "matroska", "size": (70, 50), "times": UNEVEN},
    "h264 avi": {"kind": "avi", "b_frames": 2},
    "mpeg4 avi": {"kind": "avi", "codec": "mpeg4", "b_frames": 2},
    "mpeg4 mp4": {"codec": "mpeg4", "b_frames": 2, "times": UNEVEN},
    "mpeg2 open GOP": {"kind": "matroska", "codec": "mpeg2video", "b_frames": 2, "times": np.arange(75) / 25},
    "mjpeg": {"kind": "matroska", "codec": "mjpeg"},
    "vp8 webm": {"kind": "webm", "codec": "libvpx"},
    "vp9 webm": {"kind": "webm", "codec": "libvpx-vp9", "times": UNEVEN[:30]},
    "mkv without an index": {"kind": "matroska", "mux": {"live": "1"}, "b_frames": 2},
}


def make(name: str) -> bytes:
    settings = dict(FILMS[name])
    if settings.get("codec") == "mjpeg":
        settings["codec"] = "mpeg4"
        settings["gop"] = 1
    return film(**settings)


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("fps", [0.7, 3.0, 20.0])
def test_equals_decoding_everything(name, fps, monkeypatch):
    if "avi" not in name and "refresh" not in name:  # the others cannot be sought in
        monkeypatch.setattr("data.video.frames_in_order", lambda *args: pytest.fail("decoded from the start"))
    payload = make(name)
    sampling = Sampling(fps, 2, 768, SMALL.min_pixels, SMALL.max_pixels)
    clip = load_video(payload, sampling)
    pixels_PX, grid = expected(payload, sampling)
    assert clip.grid == grid and len(clip.times) == grid[0]
    assert torch.equal(clip.pixels_PX, pixels_PX)


@pytest.mark.parametrize("name", ["h264 open GOP mkv", "h264 open GOP mp4", "mpeg2 open GOP"])
def test_open_groups_are_what_they_say(name):
    """After their key frames come frames that are shown before them and lean on the group before."""
    with av.open(io.BytesIO(make(name))) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
    leading = [b.pts < a.pts for a, b in zip(packets, packets[1:], strict=False) if a.is_keyframe and a.pts > 0]
    assert leading and all(leading[:-1])


@needs_nasa
@pytest.mark.parametrize("fps", [0.3, 1.0])
def test_a_real_film_equals_decoding_everything(fps, counted):
    payload = NASA.read_bytes()
    sampling = Sampling(fps, 2, 768, SMALL.min_pixels, SMALL.max_pixels)
    clip = load_video(payload, sampling)
    decoded = len(counted)
    pixels_PX, grid = expected(payload, sampling)
    assert clip.grid == grid and torch.equal(clip.pixels_PX, pixels_PX)
    assert decoded <= 390


def test_few_frames_are_decoded(counted):
    """60 s at 30 frames a second, a key frame each second, 8 frames wanted."""
    payload = film(times=np.arange(1800) / 30, gop=30, params="scenecut=0:keyint=30:min-keyint=30", size=(32, 32))
    sampling = Sampling(0.01, 8, 8, 32 * 32, 64 * 64)
    clip = load_video(payload, sampling)
    assert clip.grid == (4, 2, 2) and clip.times == pytest.approx((0.0, 15.0, 30.0, 45.0), abs=0.04)
    assert 8 <= len(counted) <= 8 * 30
    counted.clear()
    at_keys = load_video(payload, Sampling(0.01, 6, 6, 32 * 32, 64 * 64))  # each 10 s, where key frames lie
    assert at_keys.grid[0] == 3 and len(counted) == 6
    counted.clear()
    load_video(payload, Sampling(30.0, 4, 10_000, 32 * 32, 32 * 32))
    assert 1790 < len(counted) <= 1800  # as good as all are wanted: each is decoded once


def test_an_index_that_lies_is_found_out(counted):
    """Without its list of key frames an mp4 says that every frame is one."""
    payload = film(codec="mpeg4", times=np.arange(40) / 20, gop=40)
    lying = payload.replace(b"stss", b"free")
    assert lying != payload
    for bad in (lying, film(params="intra-refresh=1:keyint=15:scenecut=0")):
        counted.clear()
        sampling = Sampling(2.0, 2, 768, SMALL.min_pixels, SMALL.max_pixels)
        assert torch.equal(load_video(bad, sampling).pixels_PX, expected(bad, sampling)[0])
        assert min(counted) == counted[0] and len(counted) > 30  # decoded from the start after all


def test_a_film_cut_at_no_key_frame_by_its_edit_list():
    """Packets before the first one shown must be decoded, though they are not shown."""
    payload = film(times=np.arange(60) / 20, gop=20, b_frames=2, params="scenecut=0:keyint=20")
    cut = edited(payload, start=0.65)
    times, _ = everything(cut)
    assert len(times) < 60 and times[0] >= 0
    for fps in (2.0, 20.0):
        sampling = Sampling(fps, 2, 768, SMALL.min_pixels, SMALL.max_pixels)
        clip = load_video(cut, sampling)
        pixels_PX, grid = expected(cut, sampling)
        assert clip.grid == grid and torch.equal(clip.pixels_PX, pixels_PX)


def edited(payload: bytes, start: float) -> bytes:
    """An mp4 whose edit list begins `start` seconds later."""
    place = payload.index(b"elst") + 8
    assert payload[place - 4 : place] == b"\0\0\0\0" and payload[place : place + 4] == b"\0\0\0\x01"
    scale_at = payload.index(b"mdhd") + 16
    scale = int.from_bytes(payload[scale_at : scale_at + 4], "big")
    movie_at = payload.index(b"mvhd") + 16
    movie = int.from_bytes(payload[movie_at : movie_at + 4], "big")
    length = int.from_bytes(payload[place + 4 : place + 8], "big") - round(start * movie)
    time = int.from_bytes(payload[place + 8 : place + 12], "big") + round(start * scale)
    return payload[: place + 4] + length.to_bytes(4, "big") + time.to_bytes(4, "big") + payload[place + 12 :]


def test_a_film_that_starts_late_or_without_a_key_frame(counted):
    late = remuxed(film(b_frames=2), "matroska", shift=7.5)
    clip = load_video(late, SMALL)
    assert torch.equal(clip.pixels_PX, expected(late, SMALL)[0]) and clip.times[0] == 0.0
    headless = remuxed(film(codec="mpeg4", gop=12), "matroska", keep=lambda packet: packet.pts > 0)
    try:
        assert torch.equal(load_video(headless, SMALL).pixels_PX, expected(headless, SMALL)[0])
    except BadSample as error:
        assert "breaks off" in str(error) or "cannot be decoded" in str(error)


def test_patches_of_a_clip_equal_those_of_the_whole():
    for name in ("h264 uneven", "vp8 webm", "h264 avi", "h264 turned, with sound"):
        payload = make(name)
        whole = load_video(payload, SMALL)
        count, tall, wide = whole.grid
        for first, last in [(0, count), (0, 1), (1, 3), (count - 1, count)]:
            part = load_video(payload, SMALL, patches=(first, last))
            assert part.grid == (last - first, tall, wide) and part.seconds_per_grid == whole.seconds_per_grid
            pixels = whole.pixels_PX.view(count, tall * wide, -1)[first:last].flatten(0, 1)
            assert torch.equal(part.pixels_PX, pixels)
            assert part.times == pytest.approx([time - whole.times[first] for time in whole.times[first:last]])
            assert part.times[0] == 0.0
        for wrong in [(0, 0), (0, count + 1), (-1, 1), (2, 1)]:
            with pytest.raises(BadSample, match=f"has {count} temporal patches"):
                load_video(payload, SMALL, patches=wrong)


def test_a_part_decodes_only_itself(counted):
    payload = film(times=np.arange(200) / 20, gop=10, params="scenecut=0:keyint=10:min-keyint=10")
    load_video(payload, SMALL, patches=(9, 10))
    assert len(counted) <= 1 + 20  # the first frame, for the size, and the two wanted from their key frames
