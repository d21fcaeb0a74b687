"""Waveform to log-mel frames, as Whisper and Qwen3-Omni define them, of any length.

    wave [S] --reflect pad--> blocks: STFT, power, mel filters, log10 --> clamp at the clip's maximum - 8

Windows of 25 ms (400 samples, Hann) every 10 ms (160), 128 Slaney mel filters over 0-8 kHz. A clip is never
cut at 30 seconds, and is worked through in blocks, so memory is the result plus about 10 MB. Cost: about 0.3 ms
a second of audio. Frame for frame equal to transformers' WhisperFeatureExtractor(feature_size=128), whose
last frame is dropped too.

Shapes: S samples, F frames, M mel filters, K frequency bins.
"""

import functools

import numpy as np
import torch

from data.audio import MIN_SAMPLES, SAMPLE_RATE
from data.errors import BadSample

NUM_MELS = 128
HOP = 160
WINDOW = 400
_BLOCK_FRAMES = 1024


def num_frames(num_samples: int) -> int:
    """Log-mel frames of a clip of `num_samples` at 16 kHz."""
    return num_samples // HOP


def log_mel(wave_S: np.ndarray, block_frames: int = _BLOCK_FRAMES) -> torch.Tensor:
    """Log-mel float32 [S // 160, 128] of float32 [S] at 16 kHz; `block_frames` only bounds memory.

    Raises BadSample below one window (400 samples).
    """
    if len(wave_S) < MIN_SAMPLES:
        raise BadSample(f"audio is too short: {len(wave_S)} samples, log-mel needs at least {MIN_SAMPLES}")
    frames = num_frames(len(wave_S))
    wave_S = wave_S.astype(np.float32, copy=False)
    window, filters_MK = torch.hann_window(WINDOW), mel_filters()
    mel_FM = torch.empty(frames, NUM_MELS)
    for first in range(0, frames, block_frames):
        last = min(first + block_frames, frames)
        piece_S = _reflected(wave_S, first * HOP - WINDOW // 2, (last - 1) * HOP + WINDOW // 2)
        spectrum_KF = torch.stft(
            torch.from_numpy(piece_S), WINDOW, HOP, window=window, center=False, return_complex=True
        )
        power_MF = filters_MK @ spectrum_KF.abs().square()
        mel_FM[first:last] = power_MF.clamp_min(1e-10).log10().T
    return mel_FM.clamp_min_(mel_FM.max() - 8.0).add_(4.0).div_(4.0)


def _reflected(wave_S: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Samples `start` to `stop`, by up to half a window beyond the clip's ends, where it is mirrored."""
    piece_S = wave_S[max(start, 0) : stop]
    before_S, after = wave_S[max(-start, 0) : 0 : -1], stop - len(wave_S)
    after_S = wave_S[-2 : -2 - after : -1] if after > 0 else wave_S[:0]
    return np.concatenate([before_S, piece_S, after_S])


@functools.cache
def mel_filters() -> torch.Tensor:
    """Triangular filters of equal area on the mel scale of Slaney (1998): float32 [128, 201]."""
    bins_K = np.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    edges = mel_to_hz(np.linspace(0.0, hz_to_mel(np.array(SAMPLE_RATE / 2)), NUM_MELS + 2))
    width = np.diff(edges)
    rising_MK = (bins_K[None] - edges[:-2, None]) / width[:-1, None]
    falling_MK = (edges[2:, None] - bins_K[None]) / width[1:, None]
    triangles_MK = np.maximum(0.0, np.minimum(rising_MK, falling_MK))
    filters_MK = triangles_MK * (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(filters_MK.astype(np.float32))


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney mel scale: linear below 1 kHz (15 mels), logarithmic above (27 mels for a factor of 6.4)."""
    above = 15.0 + 27.0 / np.log(6.4) * np.log(np.maximum(hz, 1e-3) / 1000.0)
    return np.where(hz < 1000.0, hz * 3.0 / 200.0, above)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Inverse of `hz_to_mel`."""
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp(np.log(6.4) / 27.0 * (mel - 15.0)))
