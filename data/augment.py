"""Augmentation of training speech as a pure function of (settings, seed, epoch, sample).

    wave [S] -> reverb -> noise -> gain --log_mel--> [F, M] -> vocal tract -> equaliser -> masks

Lengths never change here, since the plan has counted them; `data.audio.change_speed`, which does change them,
is the plan's. Every choice comes from a generator keyed by integers, so any worker, rank or resumed run makes
the same clip. All probabilities default to zero. Cost: about 1.5 ms a second of audio with everything on.

Shapes: S samples, F frames, M mel filters, K frequency bins.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from data.audio import SAMPLE_RATE
from data.mel import HOP, NUM_MELS, hz_to_mel, mel_to_hz

_WAVE, _MEL, _WINDOW = 0, 1, 2  # each draws from a stream of its own


@dataclass(frozen=True)
class Augment:
    """What may happen to a clip; `*_probability` 0 and `*_masks` 0 switch a part off."""

    ramp_epochs: float = 0.0  # epochs over which it all, speed changes too, grows from nothing to full strength
    reverb_probability: float = 0.0
    reverb_seconds: tuple[float, float] = (0.05, 0.3)  # time to fall by 60 dB
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (5.0, 30.0)
    gain_probability: float = 0.0
    gain_db: tuple[float, float] = (-12.0, 6.0)
    warp_probability: float = 0.0
    warp: float = 0.15  # largest change of the vocal tract's length, as a logarithm
    equaliser_probability: float = 0.0
    equaliser: float = 0.1  # deviation of a smooth gain over frequency, in log-mel units (1 is 40 dB)
    frequency_masks: int = 0
    frequency_mask_mels: int = 20
    time_masks: int = 0
    time_mask_frames: int = 20
    time_mask_share: float = 0.2  # no time mask covers more of the clip than this
    band_hz: float = 0.0  # silence above it, for recordings that have nothing there; 0 leaves all

    def __post_init__(self) -> None:
        """Refuse probabilities outside 0 to 1."""
        for name, value in vars(self).items():
            if name.endswith("_probability") and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value}: must be between 0 and 1")


def ramp(ramp_epochs: float, epoch: int) -> float:
    """Strength of augmentation in an epoch, 0 to 1: a model that has learnt nothing yet learns faster without it."""
    return min(1.0, epoch / ramp_epochs) if ramp_epochs > 0 else 1.0


def augment_wave(wave_S: np.ndarray, settings: Augment, seed: int, epoch: int, sample: int) -> np.ndarray:
    """Reverb, noise and gain on float32 [S] at 16 kHz; same length. The integers (>= 0) key the choices."""
    rng = np.random.default_rng((seed, epoch, sample, _WAVE))
    if rng.random() >= ramp(settings.ramp_epochs, epoch):
        return wave_S
    if rng.random() < settings.reverb_probability:
        wave_S = _reverberate(wave_S, rng.uniform(*settings.reverb_seconds), rng)
    if rng.random() < settings.noise_probability:
        wave_S = _add_noise(wave_S, rng.uniform(*settings.noise_snr_db), rng)
    if rng.random() < settings.gain_probability:
        wave_S = wave_S * np.float32(10.0 ** (rng.uniform(*settings.gain_db) / 20.0))
    return wave_S


def augment_mel(mel_FM: torch.Tensor, settings: Augment, seed: int, epoch: int, sample: int) -> torch.Tensor:
    """Vocal tract, equaliser and SpecAugment masks on float32 [F, M]; never changes its argument."""
    rng = np.random.default_rng((seed, epoch, sample, _MEL))
    strength = ramp(settings.ramp_epochs, epoch)
    if rng.random() >= strength:
        return mel_FM
    frames, num_mels = mel_FM.shape
    floor = mel_FM.min()
    if rng.random() < settings.warp_probability:
        mel_FM = warp_mel(mel_FM, math.exp(strength * rng.uniform(-settings.warp, settings.warp)))
    if rng.random() < settings.equaliser_probability:
        mel_FM = torch.maximum(mel_FM + _smooth_curve(num_mels, settings.equaliser, rng), floor)
    if settings.band_hz:
        num_mels = int((_filter_centres() < settings.band_hz).sum())
        mel_FM = mel_FM.clone()
        mel_FM[:, num_mels:] = mel_FM.max() - 2.0  # where log_mel clamps
    bands = [(1, num_mels, settings.frequency_mask_mels)] * settings.frequency_masks
    longest = min(settings.time_mask_frames, int(frames * settings.time_mask_share))
    spans = [(0, frames, longest)] * settings.time_masks
    if bands or spans:
        mel_FM, fill = mel_FM.clone(), float(mel_FM.mean())
    for dim, size, widest in bands + spans:
        width = int(rng.integers(0, min(widest, size) + 1))
        first = int(rng.integers(0, size - width + 1))
        mel_FM.narrow(dim, first, width).fill_(fill)
    return mel_FM


def _filter_centres() -> np.ndarray:
    """Centre frequency of each mel filter in Hz, [M]."""
    step = hz_to_mel(np.array(SAMPLE_RATE / 2)) / (NUM_MELS + 1)
    return mel_to_hz(np.arange(1, NUM_MELS + 1) * step)


def draw_windows(
    seconds: tuple[int, int], seed: int, epoch: int, sample: int, piece: int, clips: int
) -> tuple[int, ...]:
    """Log-mel frames of the attention windows of a document's clips: whole seconds, both bounds included."""
    rng = np.random.default_rng((seed, epoch, sample, piece + 1, _WINDOW))
    drawn = rng.integers(seconds[0], seconds[1] + 1, clips) * (SAMPLE_RATE // HOP)
    return tuple(drawn.tolist())


def warp_mel(mel_FM: torch.Tensor, alpha: float) -> torch.Tensor:
    """The clip as from a vocal tract `alpha` times as long: formants move down by that factor.

    The frequency axis is read at alpha * f, bending above 0.85 of the band so that 8 kHz stays in place
    (vocal tract length perturbation, Jaitly and Hinton 2013), and interpolated linearly between filters.
    """
    top = SAMPLE_RATE / 2
    step = hz_to_mel(np.array(top)) / (NUM_MELS + 1)
    hz_M = _filter_centres()
    knee = 0.85 * top / max(alpha, 1.0)
    upper_M = alpha * knee + (hz_M - knee) * (top - alpha * knee) / (top - knee)
    read_M = hz_to_mel(np.where(hz_M <= knee, alpha * hz_M, upper_M)) / step - 1.0
    read_M = np.clip(read_M, 0.0, NUM_MELS - 1.0)
    lower_M = np.minimum(read_M.astype(np.int64), NUM_MELS - 2)
    share_M = torch.from_numpy((read_M - lower_M).astype(np.float32))
    below = torch.from_numpy(lower_M)
    return torch.lerp(mel_FM.index_select(1, below), mel_FM.index_select(1, below + 1), share_M)


def _add_noise(wave_S: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Noise whose spectrum falls by a random power of frequency, from white to brown."""
    samples = len(wave_S)
    spectrum_K = np.fft.rfft(rng.standard_normal(samples).astype(np.float32))
    spectrum_K *= np.maximum(np.arange(len(spectrum_K)), 1.0) ** -rng.uniform(0.0, 1.0)
    noise_S = np.fft.irfft(spectrum_K, samples)
    power = float(np.mean(np.square(wave_S, dtype=np.float64)))
    scale = math.sqrt(power / (float(np.mean(noise_S**2)) + 1e-12) * 10.0 ** (-snr_db / 10.0))
    return (wave_S + scale * noise_S).astype(np.float32)


def _reverberate(wave_S: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a direct sound and an exponentially falling noise tail of the same energy or less."""
    taps = max(2, int(seconds * SAMPLE_RATE))
    tail = rng.standard_normal(taps) * 10.0 ** (-3.0 * np.arange(taps) / taps)
    tail *= rng.uniform(0.2, 0.8) / math.sqrt(float(np.sum(tail**2)))
    tail[0] = 1.0
    size = 1 << (len(wave_S) + taps - 1).bit_length()
    wet_S = np.fft.irfft(np.fft.rfft(wave_S, size) * np.fft.rfft(tail, size), size)
    return wet_S[: len(wave_S)].astype(np.float32)


def _smooth_curve(num_mels: int, strength: float, rng: np.random.Generator) -> torch.Tensor:
    """A random smooth gain over the mel axis: four cosines, the slow ones strongest, float32 [M]."""
    position_M = np.arange(num_mels) / num_mels
    curve_M = np.zeros(num_mels)
    for wave_number in range(1, 5):
        phase = rng.uniform(0.0, 2.0 * math.pi)
        curve_M += rng.standard_normal() / wave_number * np.cos(math.pi * wave_number * position_M + phase)
    return torch.from_numpy((strength * curve_M).astype(np.float32))
