"""Augmentation: the same keys give the same clip, lengths stay, and each part does what its name says."""

import numpy as np
import pytest
import torch

from data.audio import SAMPLE_RATE
from data.augment import Augment, augment_mel, augment_wave, warp_mel
from data.mel import log_mel
from tests.data.audio_bytes import tone

ALL = Augment(
    reverb_probability=1.0,
    noise_probability=1.0,
    gain_probability=1.0,
    warp_probability=1.0,
    equaliser_probability=1.0,
    frequency_masks=2,
    time_masks=2,
)


def both(settings: Augment, *key: int) -> tuple[np.ndarray, torch.Tensor]:
    wave = augment_wave(tone(SAMPLE_RATE), settings, *key)
    return wave, augment_mel(log_mel(wave), settings, *key)


def test_default_changes_nothing() -> None:
    wave, mel = tone(SAMPLE_RATE), log_mel(tone(SAMPLE_RATE))
    assert augment_wave(wave, Augment(), 0, 0, 0) is wave
    assert augment_mel(mel, Augment(), 0, 0, 0) is mel


def test_pure_function_of_its_keys() -> None:
    wave, mel = both(ALL, 1, 2, 3)
    np.random.default_rng(0).random()
    torch.rand(1)
    again, mel_again = both(ALL, 1, 2, 3)
    assert np.array_equal(wave, again) and torch.equal(mel, mel_again)
    assert wave.dtype == np.float32 and len(wave) == SAMPLE_RATE and mel.shape == (100, 128)
    assert np.isfinite(wave).all() and bool(mel.isfinite().all())


def test_every_key_matters() -> None:
    mels = [both(ALL, *key)[1] for key in [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0)]]
    for i, mel in enumerate(mels):
        assert not any(torch.equal(mel, other) for other in mels[:i])


def test_arguments_are_not_changed() -> None:
    wave, mel = tone(SAMPLE_RATE), log_mel(tone(SAMPLE_RATE))
    wave_before, mel_before = wave.copy(), mel.clone()
    augment_wave(wave, ALL, 0, 0, 0)
    augment_mel(mel, ALL, 0, 0, 0)
    assert np.array_equal(wave, wave_before) and torch.equal(mel, mel_before)


@pytest.mark.parametrize("snr", [0.0, 10.0, 30.0])
def test_noise_has_the_stated_level(snr: float) -> None:
    clean = tone(SAMPLE_RATE)
    noisy = augment_wave(clean, Augment(noise_probability=1.0, noise_snr_db=(snr, snr)), 0, 0, 0)
    measured = 10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2))
    assert abs(measured - snr) < 0.1


def test_noise_on_silence_is_silence() -> None:
    silent = augment_wave(np.zeros(8_000, np.float32), ALL, 0, 0, 0)
    assert not silent.any()


def test_gain() -> None:
    louder = augment_wave(tone(SAMPLE_RATE), Augment(gain_probability=1.0, gain_db=(6.0, 6.0)), 0, 0, 0)
    np.testing.assert_allclose(louder, tone(SAMPLE_RATE) * 10 ** (6 / 20), rtol=1e-5)


def test_reverb_rings_on() -> None:
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[1_000] = 1.0
    settings = Augment(reverb_probability=1.0, reverb_seconds=(0.1, 0.1))
    wet = augment_wave(click, settings, 0, 0, 0)
    np.testing.assert_allclose(wet[:1_000], 0.0, atol=1e-6)
    assert abs(wet[1_000] - 1.0) < 1e-5
    assert np.mean(wet[1_001:1_401] ** 2) > 100 * np.mean(wet[2_200:2_600] ** 2) > 0


def test_warp_moves_formants_down_by_alpha() -> None:
    for hz, alpha in ((2_000.0, 1.15), (2_000.0, 0.87), (600.0, 1.1)):
        moved = warp_mel(log_mel(tone(SAMPLE_RATE, hz=hz)), alpha)[50].argmax()
        expected = log_mel(tone(SAMPLE_RATE, hz=hz / alpha))[50].argmax()
        assert abs(int(moved - expected)) <= 1
    mel = log_mel(tone(SAMPLE_RATE))
    torch.testing.assert_close(warp_mel(mel, 1.0), mel)


def test_masks_cover_at_most_what_is_stated() -> None:
    mel = log_mel(np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32))
    for sample in range(20):
        masked = augment_mel(mel, Augment(time_masks=1, time_mask_frames=50, time_mask_share=0.2), 0, 0, sample)
        frames = (masked != mel).any(dim=1).sum()
        assert frames <= 20
        masked = augment_mel(mel, Augment(frequency_masks=1, frequency_mask_mels=9), 0, 0, sample)
        assert (masked != mel).any(dim=0).sum() <= 9


def test_ramp_starts_with_clean_clips() -> None:
    wave, settings = tone(SAMPLE_RATE), Augment(ramp_epochs=10, gain_probability=1.0, gain_db=(6.0, 6.0))
    changed = {epoch: 0 for epoch in (0, 3, 5, 10, 50)}
    for epoch in changed:
        changed[epoch] = sum(augment_wave(wave, settings, 0, epoch, i) is not wave for i in range(200))
    assert changed[0] == 0 and changed[10] == changed[50] == 200
    assert 35 < changed[3] < 85 and 70 < changed[5] < 130


def test_band_limit() -> None:
    mel = log_mel(np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32))
    narrow = augment_mel(mel, Augment(band_hz=4_000.0), 0, 0, 0)
    kept = int((narrow == mel).all(dim=0).sum())
    assert 80 < kept < 128
    assert torch.equal(narrow[:, :kept], mel[:, :kept])
    torch.testing.assert_close(narrow[:, kept:], torch.full((100, 128 - kept), float(mel.max()) - 2.0))


def test_shortest_clip() -> None:
    wave = augment_wave(tone(SAMPLE_RATE)[:400], ALL, 0, 0, 0)
    assert augment_mel(log_mel(wave), ALL, 0, 0, 0).shape == (2, 128)


def test_probabilities_are_checked() -> None:
    with pytest.raises(ValueError, match="noise_probability=2"):
        Augment(noise_probability=2)
