"""Spectral distances against transforms by hand, splits that add up, and crops whose codes and sound stay together."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import BadSample
from data.segments import Segments, crop, join, no_segments
from train.errors import RecipeError
from train.waveform_loss import SpectralConfig, by_length, magnitudes, mel_bank, spectral_sums

SMALL = SpectralConfig(((64, 8), (32, 4)), floor=1e-3)


def noise(samples, seed=0):
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def by_hand(wave_S, window):
    """Magnitudes from the definition of the transform, in fp64: frames centred on multiples of the hop."""
    hop, half = window // 4, window // 2
    padded = torch.cat([torch.zeros(half), wave_S, torch.zeros(window)]).double()
    steps = torch.arange(window, dtype=torch.float64)
    hann = 0.5 - 0.5 * (2 * math.pi * steps / window).cos()
    turn_KW = 2 * math.pi * torch.arange(half + 1, dtype=torch.float64)[:, None] * steps / window
    frames = [padded[i * hop : i * hop + window] * hann for i in range(len(wave_S) // hop + 1)]
    parts = [torch.stack([(turn_KW.cos() @ frame), (turn_KW.sin() @ frame)]).norm(dim=0) for frame in frames]
    return torch.stack(parts, 1) / hann.norm()


@pytest.mark.parametrize("samples", [1, 15, 64, 333])
def test_magnitudes_equal_the_transform_by_hand(samples):
    wave_S = noise(samples)
    torch.testing.assert_close(magnitudes(wave_S[None], 64)[0].double(), by_hand(wave_S, 64), atol=1e-6, rtol=1e-5)


def test_sums_equal_means_of_torch_stft():
    """One waveform: the papers' means, times the samples. Two: the sum of both."""
    lengths = [500, 301]
    fake_S, real_S = noise(801, 1), noise(801, 2)
    got = spectral_sums(fake_S, real_S, lengths, SMALL)
    want = dict.fromkeys(got, 0.0)
    for length, fake, real in zip(lengths, fake_S.split(lengths), real_S.split(lengths), strict=True):
        for window, mels in SMALL.scales:
            hann = torch.hann_window(window)
            pair = [
                torch.stft(x, window, window // 4, window=hann, pad_mode="constant", return_complex=True).abs()
                / hann.square().sum().sqrt()
                for x in (fake, real)
            ]
            bands = [mel_bank(window, mels, fake.device) @ x for x in pair]
            logs, mel = ([(x + SMALL.floor).log() for x in two] for two in (pair, bands))
            for name, (a, b) in (("stft_linear", pair), ("stft_log", logs), ("mel", mel)):
                want[name] += float((a - b).abs().mean()) * length / len(SMALL.scales)
    assert {name: float(total) for name, total in got.items()} == pytest.approx(want, rel=1e-5)


def test_white_noise_has_the_same_level_at_every_scale():
    wave_S = noise(48_000)
    for window, _ in SpectralConfig().scales:
        level = magnitudes(wave_S[None], window)[0, 1:-1, 4:-4].square().mean().sqrt()
        assert float(level) == pytest.approx(0.1, rel=0.03)


def test_mel_bands():
    """Every band of the default scales holds bins, sums to one, and peaks higher than the one before."""
    for window, mels in SpectralConfig().scales:
        bank_MK = mel_bank(window, mels, torch.device("cpu"))
        torch.testing.assert_close(bank_MK.sum(1), torch.ones(mels))
        centres = (bank_MK * torch.arange(window // 2 + 1)).sum(1)
        assert (centres.diff() > 0).all()
    tone_S = torch.sin(2 * math.pi * 1000 / 24_000 * torch.arange(24_000.0))
    band = int((mel_bank(1024, 80, tone_S.device) @ magnitudes(tone_S[None], 1024)[0]).mean(1).argmax())
    assert 15 / 51.1 * 81 - 2 < band < 15 / 51.1 * 81 + 1  # 1 kHz is 15 of Slaney's 51.1 mels


def test_gradients():
    """Against finite differences along a line; finite on silence; zero at the goal."""
    config = SpectralConfig(((16, 3),), floor=1e-2)
    fake_S, real_S = noise(40).requires_grad_(), noise(40, 1)
    total = sum(spectral_sums(fake_S, real_S, [40], config).values())
    (gradient_S,) = torch.autograd.grad(total, fake_S)
    direction_S = noise(40, 2) / noise(40, 2).norm()
    step, values = 1e-3, []
    for sign in (1, -1):
        moved_S = (fake_S + sign * step * direction_S).detach()
        values.append(float(sum(spectral_sums(moved_S, real_S, [40], config).values())))
    assert float(gradient_S @ direction_S) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)

    silent_S = torch.zeros(100, requires_grad=True)
    (gradient_S,) = torch.autograd.grad(sum(spectral_sums(silent_S, noise(100), [100], SMALL).values()), silent_S)
    assert gradient_S.isfinite().all()
    same_S = noise(100).requires_grad_()
    sums = spectral_sums(same_S, same_S.detach(), [100], SMALL)
    assert not any(total.detach() for total in sums.values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=6), st.integers(0, 6))
def test_shares_of_any_split_add_up(lengths, cut):
    """Whatever stands beside a waveform: values and gradients; empty parts and waveforms too."""
    total, first = sum(lengths), sum(lengths[:cut])
    fake_S, real_S = noise(total, 1).requires_grad_(), noise(total, 2)
    whole = spectral_sums(fake_S, real_S, lengths, SMALL)
    parts = [
        spectral_sums(fake_S[:first], real_S[:first], lengths[:cut], SMALL),
        spectral_sums(fake_S[first:], real_S[first:], lengths[cut:], SMALL),
    ]
    for name in whole:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-4, atol=1e-5)
    (a,) = torch.autograd.grad(sum(whole.values()), fake_S)
    (b,) = torch.autograd.grad(sum(sum(part.values()) for part in parts), fake_S)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_by_length():
    groups = by_length([2, 3, 0, 2], torch.arange(7.0))
    assert [[x.tolist() for x in group] for group in groups] == [[[[0, 1], [5, 6]]], [[[2, 3, 4]]]]
    with pytest.raises(ValueError, match="hold 9 samples"):
        by_length([9], torch.arange(7.0))


def test_says_which_setting_is_wrong():
    for scales, message in (((), "empty"), (((30, 2),), "window of 4, 8, 12"), (((64, 60),), "60 mel bands are too")):
        with pytest.raises(RecipeError, match=message):
            SpectralConfig(scales)
    with pytest.raises(RecipeError, match="floor must be above 0"):
        SpectralConfig(floor=0.0)


def utterance(frames, samples, rate=10):
    """Codes and sound that say where they are from."""
    codes_GF = torch.arange(frames).expand(3, -1) + 100 * torch.arange(3)[:, None]
    assert -(-samples // rate) == frames
    return codes_GF, torch.arange(float(samples))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 12), st.integers(0, 15), st.integers(0, 99))
def test_crops_are_aligned(total, missing, frames, context, seed):
    codes_GF, wave_S = utterance(total, 10 * total - missing)
    generator = torch.Generator().manual_seed(seed)
    segment = crop(codes_GF, wave_S, frames, generator, context=context, samples_per_frame=10)
    (heard,), (before,), (samples,) = segment.frames, segment.contexts, segment.samples
    start = int(segment.codes_GF[0, before])
    assert segment.codes_GF[0].tolist() == list(range(start - before, start - before + heard))
    assert before == min(context, start) and heard - before == min(frames, total)
    assert segment.wave_S.tolist() == wave_S[10 * start : 10 * (start + heard - before)].tolist()
    assert samples == len(segment.wave_S) and segment.wave_S.untyped_storage().nbytes() == 4 * samples


def test_crops_reach_every_frame_and_repeat_with_their_generator():
    codes_GF, wave_S = utterance(10, 95)

    def starts(seed):
        generator = torch.Generator().manual_seed(seed)
        crops = (crop(codes_GF, wave_S, 4, generator, context=2, samples_per_frame=10) for _ in range(80))
        return [int(segment.codes_GF[0, segment.contexts[0]]) for segment in crops]

    assert set(starts(0)) == set(range(7)) and starts(0) == starts(0) != starts(1)


def test_joined_segments_follow_one_another():
    generator = torch.Generator().manual_seed(0)
    segments = [crop(*utterance(n, 10 * n), 3, generator, context=2, samples_per_frame=10) for n in (2, 7, 9)]
    whole = join(segments)
    assert isinstance(whole, Segments)
    assert whole.codes_GF.shape == (3, sum(whole.frames)) and len(whole.wave_S) == sum(whole.samples)
    for part, segment in zip(whole.codes_GF.split(list(whole.frames), 1), segments, strict=True):
        assert part.tolist() == segment.codes_GF.tolist()
    assert join([no_segments(3), *segments]).frames == whole.frames


def test_says_what_does_not_fit():
    codes_GF, wave_S = utterance(10, 95)
    for codes, wave, message in (
        (codes_GF[:, :9], wave_S, "9 frames of codes do not fit 95 samples"),
        (codes_GF[:, :0], wave_S[:0], "0 frames of codes do not fit 0 samples"),
        (codes_GF[0], wave_S, r"codes \[10\] must be \[codebooks, frames\]"),
        (codes_GF, wave_S.expand(2, -1), "mono"),
    ):
        with pytest.raises(BadSample, match=message):
            crop(codes, wave, 4, None, samples_per_frame=10)
    with pytest.raises(ValueError, match="frames 0"):
        crop(codes_GF, wave_S, 0, None)
