"""Decoding: every format, rate and channel count to 16 kHz mono; every lie and bomb refused with a reason."""

import struct
import tracemalloc

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from data.audio import SAMPLE_RATE, Limits, change_speed, decode, resampled_length, sped_up_length
from data.errors import BadSample
from tests.data.audio_bytes import encode, tone

RATES = (8_000, 22_050, 44_100, 48_000)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus", "vorbis"])
def test_round_trip(kind: str, rate: int, channels: int) -> None:
    if kind == "opus" and rate in (22_050, 44_100):
        pytest.skip("opus stores 8, 12, 16, 24 or 48 kHz only")
    wave = tone(rate, 1.3)
    payload = encode(wave if channels == 1 else np.stack([wave, wave], axis=1), rate, kind)
    decoded = decode(payload)
    expected = tone(SAMPLE_RATE, 1.3)
    assert decoded.dtype == np.float32
    assert len(decoded) == resampled_length(len(wave), rate) == len(expected)
    middle = slice(2_000, -2_000)  # codecs may start and end softly
    assert np.corrcoef(decoded[middle], expected[middle])[0, 1] > 0.995
    assert np.array_equal(decoded, decode(payload))


def test_channels_are_averaged() -> None:
    left, right = tone(SAMPLE_RATE), tone(SAMPLE_RATE, hz=1_000)
    decoded = decode(encode(np.stack([left, right, np.zeros_like(left)], axis=1), SAMPLE_RATE))
    np.testing.assert_allclose(decoded, (left + right) / 3, atol=1e-4)


def test_block_wise_resampling_equals_whole() -> None:
    rate = 44_100
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * rate).astype(np.float32)  # four blocks
    decoded = decode(encode(wave, rate, subtype="FLOAT"))
    whole = soxr.resample(wave, rate, SAMPLE_RATE)
    np.testing.assert_allclose(decoded[: len(whole)], whole[: len(decoded)], atol=1e-5)


def test_float_and_24_bit_wav() -> None:
    wave = tone(SAMPLE_RATE)
    for subtype in ("FLOAT", "DOUBLE", "PCM_24", "PCM_32"):
        np.testing.assert_allclose(decode(encode(wave, SAMPLE_RATE, subtype=subtype)), wave, atol=1e-6)


def refused(payload: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(BadSample) as caught:
        decode(payload, limits)
    assert "\n" not in caught.value.reason
    return caught.value.reason


def test_limits() -> None:
    clip = encode(tone(SAMPLE_RATE, 2.0), SAMPLE_RATE)
    assert len(decode(clip)) == 2 * SAMPLE_RATE
    assert "2 s, the limit is 1 s" in refused(clip, Limits(max_seconds=1.0))
    assert "32000 samples, the limit is 31999" in refused(clip, Limits(max_frames=31_999))
    assert "bytes, the limit is 1000" in refused(clip, Limits(max_bytes=1_000))
    stereo = encode(np.stack([tone(SAMPLE_RATE)] * 2, axis=1), SAMPLE_RATE)
    assert "2 channels, the limit is 1" in refused(stereo, Limits(max_channels=1))
    assert "claims 1000 Hz" in refused(encode(tone(1_000, 3.0), 1_000))


def claim_wav(payload: bytes, data_bytes: int) -> bytes:
    place = payload.index(b"data") + 4
    return payload[:place] + struct.pack("<I", data_bytes) + payload[place + 4 :]


def claim_flac(payload: bytes, samples: int) -> bytes:
    """FLAC's STREAMINFO keeps the number of samples in the low 36 bits of bytes 18 to 25."""
    field = int.from_bytes(payload[18:26], "big")
    return payload[:18] + (field >> 36 << 36 | samples).to_bytes(8, "big") + payload[26:]


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_claim_of_a_billion_samples_costs_no_memory(kind: str) -> None:
    clip = encode(tone(SAMPLE_RATE), SAMPLE_RATE, kind)
    lie = claim_wav(clip, 2_000_000_000) if kind == "wav" else claim_flac(clip, 1_000_000_000)
    tracemalloc.start()
    try:
        assert "1000000000 samples, the limit is" in refused(lie)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_header_without_a_length_cannot_pass_the_limit() -> None:
    clip = claim_flac(encode(tone(SAMPLE_RATE, 3.0), SAMPLE_RATE, "flac"), 0)
    assert "goes on past the limit of 32000" in refused(clip, Limits(max_seconds=2.0))


def test_a_small_file_that_unpacks_to_hours_is_refused() -> None:
    bomb = encode(np.zeros(SAMPLE_RATE * 600, np.float32), SAMPLE_RATE, "flac")
    assert len(bomb) < 200_000
    assert "600 s, the limit is 60 s" in refused(bomb, Limits(max_seconds=60))


def test_lengths_that_a_pipe_could_not_fill_in_are_accepted() -> None:
    wave = tone(SAMPLE_RATE)
    assert len(decode(claim_wav(encode(wave, SAMPLE_RATE), 0xFFFFFFFF))) == len(wave)
    assert len(decode(claim_flac(encode(wave, SAMPLE_RATE, "flac"), 0))) == len(wave)


@pytest.mark.parametrize("kind", ["wav", "flac", "opus", "vorbis"])
def test_truncated_files(kind: str) -> None:
    clip = encode(tone(48_000), 48_000, kind)
    assert refused(clip[: len(clip) // 2])


def test_zero_length_and_too_short() -> None:
    assert "0 bytes" in refused(b"")
    assert "zero length" in refused(encode(np.zeros(0, np.float32), SAMPLE_RATE))
    assert "399 samples at 16 kHz, at least 400" in refused(encode(tone(SAMPLE_RATE)[:399], SAMPLE_RATE))
    assert len(decode(encode(tone(SAMPLE_RATE)[:400], SAMPLE_RATE))) == 400


def test_values_that_are_not_sound() -> None:
    wave = tone(SAMPLE_RATE)
    for value, reason in ((np.nan, "NaN"), (np.inf, "infinite"), (1e30, "full scale")):
        wave[100] = value
        assert reason in refused(encode(wave, SAMPLE_RATE, subtype="FLOAT"))


@pytest.mark.parametrize(
    "start", [b"garbage", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"PK\x03\x04", b"\x80\x04"]
)
def test_garbage(start: bytes) -> None:
    assert refused(start + bytes(range(256)) * 8)


def test_containers_outside_the_list_never_reach_the_decoder() -> None:
    """A sound that libsndfile reads (VOC) and a playlist that FFmpeg does."""
    for payload in (b"Creative Voice File\x1a\x1a\0" + b"\0" * 300, b"#EXTM3U\nfile:///etc/passwd\n"):
        assert "audio is none of wav, flac" in refused(payload)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["wav", "flac", "vorbis"]),
    damage=st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 255)), max_size=8),
)
def test_damage_gives_a_clip_or_a_reason(kind: str, damage: list[tuple[int, int]]) -> None:
    clip = bytearray(encode(tone(8_000, 0.2), 8_000, kind))
    for place, value in damage:
        clip[place % len(clip)] = value
    try:
        wave = decode(bytes(clip), Limits(max_seconds=5.0))
    except BadSample:
        return
    assert wave.dtype == np.float32 and 400 <= len(wave) <= 5 * SAMPLE_RATE and np.isfinite(wave).all()


@given(st.integers(0, 1 << 40), st.integers(1, 400_000))
def test_resampled_length_is_exact(frames: int, rate: int) -> None:
    length = resampled_length(frames, rate)
    assert abs(length * rate - frames * SAMPLE_RATE) * 2 <= rate


@pytest.mark.parametrize("factor", [0.9, 0.95, 1.0, 1.07, 1.1, 1.25])
def test_change_speed(factor: float) -> None:
    for samples in (400, 16_001, 48_000):
        wave = tone(SAMPLE_RATE, samples / SAMPLE_RATE, hz=500)
        faster = change_speed(wave, factor)
        assert faster.dtype == np.float32
        assert len(faster) == round(samples / factor) == sped_up_length(samples, factor)
    peak = np.abs(np.fft.rfft(faster)).argmax() * SAMPLE_RATE / len(faster)
    assert abs(peak - 500 * factor) < 1.0


def test_change_speed_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="positive"):
        change_speed(tone(SAMPLE_RATE), 0.0)
