"""What the waveform decoder is trained on: spectral distances of two waveforms.

    fake_S, real_S, lengths --STFT at each scale--> magnitudes --.--> linear L1 of the bins      (stft_linear)
                                                                 +--> logarithmic L1 of the bins (stft_log)
                                                                 '--> mel filters --> log L1     (mel)

Multi-resolution STFT losses usually pair log-magnitude L1 with spectral convergence (Parallel WaveGAN, Yamamoto et al.
2020). That is a ratio of norms over the whole signal, so the parts of a split do not add up. Here L1 of linear
magnitudes stands in its place, as in the spectral loss of DDSP (Engel et al. 2020). The mel term is HiFi-GAN's (Kong
et al. 2020, section 2.4) at several scales, as in EnCodec (Defossez et al. 2022, section 3.4) with fewer bands for
shorter windows.

Every result is a sum over waveforms of a waveform's mean times its samples. Divided by the samples of the global batch
it is the papers' mean, and the shares of any split over ranks and micro-batches add up. The one count, samples, is
known before any forward.

Frames are centred on multiples of the hop with zeros beyond both ends: every sample counts, any length will do, and
a waveform's loss does not depend on its neighbours. Magnitudes are divided by the norm of the window, so that white
noise has the same level, and the floor the same meaning, at every scale.

Cost: per scale two transforms, four frames a window; for the gradient 310 bytes a sample are kept (7.5 MB a second, a
hundredth of the released decoder's). Waveforms of equal length go in one batch, so crops of one size cost one call a
scale.

Letters: S samples (end to end), s samples of each of B waveforms of one length, K bins, F frames, M mel bands.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.mel import hz_to_mel, mel_to_hz
from train.errors import RecipeError

SAMPLE_RATE = 24_000


@dataclass(frozen=True)
class SpectralConfig:
    """Scales of the distance: pairs of a window in samples and its mel bands. The hop is a quarter of the window."""

    scales: tuple[tuple[int, int], ...] = ((2048, 160), (1024, 80), (512, 40), (256, 20), (128, 10))
    floor: float = 1e-4  # added to magnitudes under the logarithm: -80 dB of full scale, so that silence does not rule

    def __post_init__(self) -> None:
        """Reject windows without a hop and bands without a bin."""
        object.__setattr__(self, "scales", tuple((int(window), int(mels)) for window, mels in self.scales))
        if not self.scales:
            raise RecipeError("spectral.scales is empty: give at least one window and its mel bands")
        for window, mels in self.scales:
            if window < 4 or window % 4 or mels < 1:
                raise RecipeError(
                    f"spectral.scales: {window, mels} needs a window of 4, 8, 12, ... and at least 1 band"
                )
            if not bool((_bank(window, mels) > 0).any(1).all()):
                raise RecipeError(
                    f"spectral.scales: {mels} mel bands are too many for a window of {window} samples: some hold no bin"
                )
        if self.floor <= 0:
            raise RecipeError(f"spectral.floor must be above 0, not {self.floor}")


def spectral_sums(
    fake_S: Tensor, real_S: Tensor, lengths: Sequence[int], config: SpectralConfig | None = None
) -> dict[str, Tensor]:
    """Sums "stft_linear", "stft_log" and "mel", fp32 scalars with gradient, mean over scales. Divide by sum(lengths).

    fake and real are float [S], waveforms end to end that have `lengths` samples each. Mel and log terms are in nats.
    Raises ValueError where the lengths do not sum to S.
    """
    config = config or SpectralConfig()
    zero = fake_S.float().sum() * 0.0  # so that a gradient of zeros reaches the decoder when there is nothing to score
    sums = {"stft_linear": zero, "stft_log": zero, "mel": zero}
    for fake_Bs, real_Bs in by_length(lengths, fake_S, real_S):
        share = fake_Bs.numel() / len(config.scales)
        for window, mels in config.scales:
            fake_BKF, real_BKF = magnitudes(fake_Bs, window), magnitudes(real_Bs, window)
            bank_MK = mel_bank(window, mels, fake_S.device)
            sums["stft_linear"] = sums["stft_linear"] + share * (fake_BKF - real_BKF).abs().mean()
            sums["stft_log"] = sums["stft_log"] + share * _log_distance(fake_BKF, real_BKF, config.floor)
            sums["mel"] = sums["mel"] + share * _log_distance(bank_MK @ fake_BKF, bank_MK @ real_BKF, config.floor)
    return sums


def magnitudes(wave_Bs: Tensor, window: int) -> Tensor:
    """Magnitudes [B, window / 2 + 1, s // hop + 1] of float [B, s], Hann window, hop a quarter of it, in fp32."""
    hann = torch.hann_window(window, device=wave_Bs.device)
    spectrum_BKF = torch.stft(
        wave_Bs.float(), window, window // 4, window=hann, center=True, pad_mode="constant", return_complex=True
    )
    return spectrum_BKF.abs() / hann.norm()


@functools.cache
def mel_bank(window: int, mels: int, device: torch.device) -> Tensor:
    """Triangular filters on Slaney's mel scale over 0-12 kHz, float32 [mels, window / 2 + 1]; each sums to one."""
    return _bank(window, mels).to(device)


def by_length(lengths: Sequence[int], *waves_S: Tensor) -> list[list[Tensor]]:
    """Waveforms end to end -> for each distinct length s above 0, ascending, a [B, s] of each of `waves_S`.

    Raises ValueError where the lengths do not sum to S.
    """
    parts = [_split(wave_S, lengths) for wave_S in waves_S]
    return [
        [torch.stack([part for part in of_wave if len(part) == length]) for of_wave in parts]
        for length in sorted(set(lengths) - {0})
    ]


def _log_distance(fake: Tensor, real: Tensor, floor: float) -> Tensor:
    return ((fake + floor).log() - (real + floor).log()).abs().mean()


def _split(wave_S: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    if wave_S.ndim != 1 or sum(lengths) != len(wave_S):
        raise ValueError(f"a waveform {list(wave_S.shape)} must be mono [samples] and hold {sum(lengths)} samples")
    return wave_S.split(list(lengths))


def _bank(window: int, mels: int) -> Tensor:
    bins_K = np.linspace(0.0, SAMPLE_RATE / 2, window // 2 + 1)
    edges = mel_to_hz(np.linspace(0.0, hz_to_mel(np.array(SAMPLE_RATE / 2)), mels + 2))
    width = np.diff(edges)
    rising_MK = (bins_K[None] - edges[:-2, None]) / width[:-1, None]
    falling_MK = (edges[2:, None] - bins_K[None]) / width[1:, None]
    filters_MK = np.maximum(0.0, np.minimum(rising_MK, falling_MK))
    return torch.from_numpy((filters_MK / np.maximum(filters_MK.sum(1, keepdims=True), 1e-9)).astype(np.float32))
