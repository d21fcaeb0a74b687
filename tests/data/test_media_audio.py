"""Audio of every container on the list, its length, its damage, and the memory of 40 minutes."""

import math
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.audio import EXTENSIONS, FORMATS, SAMPLE_RATE, Limits, decode, resampled_length
from data.errors import BadSample
from tests.data.audio_bytes import encode, tone
from tests.data.media_kit import clip, film, sounding

ROOT = Path(__file__).resolve().parents[2]
# FFmpeg's muxer, codec, rate, whether no sample is changed, and the samples at its rate that it may add
KINDS = {
    "m4a": ("ipod", "aac", 44_100, False, 1024),
    "m4a alac": ("ipod", "alac", 44_100, True, 0),
    "mp4 flac": ("mp4", "flac", 48_000, True, 0),
    "mp4 opus": ("mp4", "libopus", 48_000, False, 960),
    "mov": ("mov", "pcm_s24le", 48_000, True, 0),
    "3gp": ("3gp", "amr_nb", 8_000, False, 320),
    "mka": ("matroska", "flac", 22_050, True, 0),
    "mka aac": ("matroska", "aac", 44_100, False, 1024),
    "webm": ("webm", "libopus", 48_000, False, 0),
    "aac": ("adts", "aac", 44_100, False, 2048),
    "aiff": ("aiff", "pcm_s16be", 44_100, True, 0),
    "wma": ("asf", "wmav2", 44_100, False, 4096),
    "amr": ("amr", "amr_nb", 8_000, False, 320),
    "ac3": ("ac3", "ac3", 48_000, False, 1536),
    "eac3": ("eac3", "eac3", 48_000, False, 1536),
    "caf": ("caf", "pcm_s16le", 44_100, True, 0),
    "au": ("au", "pcm_s16be", 16_000, True, 0),
    "w64": ("w64", "pcm_f32le", 48_000, True, 0),
    "wv": ("wv", "wavpack", 44_100, True, 0),
    "tta": ("tta", "tta", 44_100, True, 0),
    "ogg flac": ("ogg", "flac", 44_100, True, 0),
    "mp2": ("mp2", "mp2", 44_100, False, 1152),
    "wav wma": ("wav", "wmav2", 44_100, False, 4096),
    "wav adpcm": ("wav", "adpcm_swf", 44_100, False, 8192),
}


def made(name: str, wave_S: np.ndarray, rate: int, layout: str = "mono") -> bytes:
    muxer, codec, *_ = KINDS[name]
    try:
        return clip(muxer, codec, wave_S, rate, layout, bit_rate=12_200 if codec == "amr_nb" else 96_000)
    except (LookupError, ValueError) as error:
        pytest.skip(f"this FFmpeg cannot write it: {error}")


@pytest.mark.parametrize("seconds", [0.1, 1.3])
@pytest.mark.parametrize("name", KINDS)
def test_round_trip(name, seconds):
    _, _, rate, exact, extra = KINDS[name]
    payload = made(name, tone(rate, seconds), rate)
    wave_S = decode(payload)
    assert wave_S.dtype == np.float32 and wave_S.ndim == 1 and wave_S.flags.owndata
    low, high = resampled_length(round(rate * seconds), rate), resampled_length(round(rate * seconds) + extra, rate)
    if exact:
        assert len(wave_S) == low
    assert low - (0 if exact else SAMPLE_RATE * 0.05) <= len(wave_S) <= high
    if seconds > 1:
        steady_S = wave_S[3_000:15_000]
        spectrum = np.abs(np.fft.rfft(steady_S * np.hanning(len(steady_S))))
        assert abs(spectrum.argmax() * SAMPLE_RATE / len(steady_S) - 440) < 3
        assert abs(np.sqrt((steady_S**2).mean()) - 0.5 / math.sqrt(2)) < 0.08
    assert np.array_equal(wave_S, decode(payload))


@pytest.mark.parametrize("name", ["m4a", "mka", "aiff", "wv"])
def test_stereo_is_averaged(name):
    rate = KINDS[name][2]
    mono_S, stereo_S = (decode(made(name, tone(rate, 0.5), rate, layout)) for layout in ("mono", "stereo"))
    assert len(mono_S) == len(stereo_S)
    np.testing.assert_allclose(stereo_S[2000:6000], mono_S[2000:6000], atol=0.05)


MANY = """
import io, sys
from pathlib import Path
import numpy as np
from data.audio import decode
from tests.data.audio_bytes import tone
payload = Path(sys.argv[1]).read_bytes()
for _ in range(20):
    wave_S = decode(payload)
assert abs(len(wave_S) - 8_000) < 400, len(wave_S)
spectrum = np.abs(np.fft.rfft(wave_S[2_000:6_000] * np.hanning(4_000)))
assert abs(spectrum.argmax() * 4 - 440) < 8 and 0.1 < wave_S.max() < 1.0
print("whole")
"""


@pytest.mark.parametrize("layout", ["5.1", "7.1", "hexadecagonal"])
@pytest.mark.parametrize("kind,codec", [("aiff", "pcm_s16be"), ("caf", "pcm_s16le"), ("mov", "aac"), ("wv", "wavpack")])
def test_many_channels(kind, codec, layout, tmp_path):
    """av alone reads past the end of eight planes, and frees twice the order of channels that aiff and caf may give."""
    if layout == "hexadecagonal" and kind == "caf":
        pytest.skip("FFmpeg does not write it")
    payload = clip(kind, codec, tone(48_000, 0.5), 48_000, layout, bit_rate=600_000)
    (tmp_path / "clip").write_bytes(payload)
    command = [sys.executable, "-c", MANY, str(tmp_path / "clip")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # a process of its own: it would crash
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def test_exact_samples_without_resampling():
    wave_S = np.random.default_rng(0).uniform(-0.9, 0.9, 20_000).astype(np.float32)
    whole_S = np.round(wave_S * 32_767) / 32_768
    for muxer, codec in [("aiff", "pcm_s16be"), ("matroska", "flac"), ("tta", "tta"), ("ipod", "alac")]:
        np.testing.assert_allclose(decode(clip(muxer, codec, wave_S, SAMPLE_RATE)), whole_S, atol=1e-4)


def test_the_sound_of_a_film_is_a_clip_too():
    payload = film(sound=sounding(1.0), sound_codec="aac")
    assert len(decode(payload)) == pytest.approx(16_000, abs=400)
    with pytest.raises(BadSample, match="no sound stream"):
        decode(film())


def test_titles_in_front_change_nothing():
    tag = b"ID3\x04\0\0" + bytes([0, 0, 2, 10]) + bytes(266)
    for payload in (encode(tone(44_100), 44_100, "mp3"), made("aac", tone(44_100), 44_100)):
        assert np.array_equal(decode(tag + payload), decode(payload))


def test_every_format_has_extensions_and_all_are_told_apart():
    assert {"wav", "flac", "mp3", "opus", "ogg", "m4a", "aac", "webm", "aiff", "wma", "amr", "caf"} <= set(EXTENSIONS)
    assert len(set(EXTENSIONS)) == len(EXTENSIONS)
    assert all(name == name.lower() and "." not in name for name in EXTENSIONS)
    assert len({form.magic for form in FORMATS}) == len(FORMATS)


def refused(payload: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(BadSample) as caught:
        decode(payload, limits)
    assert "\n" not in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize(
    "name", ["m4a", "m4a alac", "mov", "mka", "webm", "aiff", "caf", "w64", "au", "wv", "tta", "mp4 flac"]
)
def test_cut_short(name):
    rate = KINDS[name][2]
    payload = made(name, np.random.default_rng(0).uniform(-0.5, 0.5, 4 * rate).astype(np.float32), rate)
    for share in (0.3, 0.6, 0.8):
        assert refused(payload[: int(len(payload) * share)])


def test_a_cut_mp3_is_known_by_its_first_frame():
    wave_S = np.random.default_rng(0).uniform(-0.5, 0.5, 10 * 44_100).astype(np.float32)
    for rate in (44_100, 16_000):
        payload = encode(wave_S, rate, "mp3")
        assert payload[:200].find(b"Xing") > 0 or payload[:200].find(b"Info") > 0
        assert len(decode(payload)) == resampled_length(len(wave_S), rate)
        for share in (0.2, 0.5, 0.9):
            assert "cut short" in refused(payload[: int(len(payload) * share)])
        tag = b"ID3\x04\0\0" + bytes([0, 0, 2, 10]) + bytes(266)
        assert "cut short" in refused(tag + payload[: len(payload) // 2])


def test_an_mp3_that_does_not_say_its_length_is_taken_as_it_is():
    payload = encode(tone(44_100, 3.0), 44_100, "mp3").replace(b"Xing", b"....").replace(b"Info", b"....")
    whole, half = decode(payload), decode(payload[: len(payload) // 2])
    assert 0.4 < len(half) / len(whole) < 0.6


CLAIMS = {  # where a header says how much comes, and how it says a billion samples
    "aiff": (b"COMM", 10, ">I", 1_000_000_000),
    "au": (b".snd", 8, ">I", 2_000_000_000),
    "w64": (b"data", 16, "<Q", 4_000_000_000),
    "caf": (b"data", 4, ">Q", 2_000_000_000),
    "wv": (b"wvpk", 12, "<I", 1_000_000_000),
    "tta": (b"TTA1", 14, "<I", 1_000_000_000),
    "mka": (b"\x44\x89\x88", 3, ">d", 1e9),
    "m4a alac": (b"stsz", 12, ">I", 1_000_000_000),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_of_a_billion_samples_are_refused_at_once(name):
    rate = KINDS[name][2]
    payload = made(name, tone(rate), rate)
    mark, offset, form, value = CLAIMS[name]
    at = payload.index(mark) + offset
    lie = payload[:at] + struct.pack(form, value) + payload[at + struct.calcsize(form) :]
    start = time.process_time()
    assert re.search("claims|cut short|cannot be decoded", refused(lie))
    assert time.process_time() - start < 1.0


def test_a_claim_that_an_mp4_contradicts_itself_costs_nothing():
    """Its edit list says a second, its table of times a billion packets: what is there is taken."""
    payload = made("m4a alac", tone(44_100), 44_100)
    at = payload.index(b"stts") + 12
    wave_S = decode(payload[:at] + struct.pack(">I", 1_000_000_000) + payload[at + 4 :])
    assert 16_000 <= len(wave_S) < 18_000


def test_limits_of_what_ffmpeg_decodes():
    payload = made("mka", tone(22_050, 3.0), 22_050)
    assert "the limit is 2 s" in refused(payload, Limits(max_seconds=2.0))
    assert "past the limit of 1000 samples" in refused(payload, Limits(max_frames=1000))
    assert "22050 Hz" in refused(payload, Limits(max_rate=16_000))
    assert "2 channels" in refused(made("mka", tone(22_050), 22_050, "stereo"), Limits(max_channels=1))
    assert "bytes, the limit is 100" in refused(payload, Limits(max_bytes=100))
    aac = made("aac", tone(44_100, 3.0), 44_100)  # without a header
    assert "past the limit" in refused(aac, Limits(max_seconds=2.0))


@pytest.mark.parametrize("name,codec", [("mov", "pcm_f32le"), ("w64", "pcm_f32le"), ("matroska", "pcm_f32le")])
def test_no_numbers(name, codec):
    wave_S = tone(16_000)
    for value, reason in ((np.nan, "NaN"), (np.inf, "infinite"), (1e30, "full scale")):
        wave_S[500] = value
        assert reason in refused(clip(name, codec, wave_S, 16_000))


def test_damage_gives_a_clip_or_a_reason():
    generator = np.random.default_rng(0)
    for name in ("m4a", "mka", "aac", "aiff", "caf", "wv", "tta", "ac3"):
        rate = KINDS[name][2]
        good = made(name, tone(rate, 0.3), rate)
        for _ in range(20):
            bad = bytearray(good)
            for place in generator.integers(0, len(bad), generator.integers(1, 30)):
                bad[place] = generator.integers(256)
            try:
                wave_S = decode(bytes(bad), Limits(max_seconds=5.0))
            except BadSample as error:
                assert "\n" not in str(error)
            else:
                assert 400 <= len(wave_S) <= 5 * SAMPLE_RATE and np.isfinite(wave_S).all()


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from data.audio import decode
from data.mel import log_mel
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
short, long = (Path(name).read_bytes() for name in sys.argv[1:])
log_mel(decode(short))
before = peak()
wave_S = decode(long)
decoded = peak()
mel_FM = log_mel(wave_S)
print(len(wave_S), len(mel_FM), decoded - before, peak() - before)
"""
BEYOND_RESULT = 24  # MiB that decoding and log-mel may take besides the waveform and the log-mel frames


def growth(folder: Path, kind: str, minutes: float) -> tuple[int, float, float]:
    """Samples, and peak memory in MiB beyond the waveform after decoding, and beyond both results after log-mel."""
    rate = 16_000
    second_S = tone(rate, 1.0) * np.linspace(0.2, 1, rate, dtype=np.float32)
    for name, seconds in (("short", 1), ("long", round(60 * minutes))):
        wave_S = np.tile(second_S, seconds)
        codec = {"m4a": ("ipod", "aac"), "aiff": ("aiff", "pcm_s16be")}.get(kind)
        payload = clip(*codec, wave_S, rate) if codec else encode(wave_S, rate, kind)
        (folder / name).write_bytes(payload)
    names = [str(folder / name) for name in ("short", "long")]
    done = subprocess.run([sys.executable, "-c", MEMORY, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    samples, frames, decoded, both = (float(value) for value in done.stdout.split())
    assert frames == samples // 160
    wave = samples * 4 / 2**20
    return int(samples), decoded - wave, both - wave - frames * 512 / 2**20


@pytest.mark.parametrize("kind", ["flac", "aiff"])
def test_memory_is_the_result_and_a_constant(kind, tmp_path):
    """The waveform takes 29 MiB here, so that a second copy of it would be noticed."""
    samples, decoded, both = growth(tmp_path, kind, 8)
    assert samples == 8 * 60 * 16_000 and decoded < BEYOND_RESULT and both < BEYOND_RESULT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus", "m4a"])
def test_memory_of_40_minutes(kind, tmp_path):
    samples, decoded, both = growth(tmp_path, kind, 40)
    assert abs(samples - 40 * 60 * 16_000) < 2048
    assert decoded < BEYOND_RESULT and both < BEYOND_RESULT
