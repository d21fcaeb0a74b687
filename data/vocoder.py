"""Log-mel frames of 24 kHz sound, and a small causal network that makes sound of them.

    wave [S] --STFT, 80 mel bands, log--> log-mel [F, M] --ConvNeXt layers, each frame sees the past alone-->
      log-magnitude and phase [F, K] --inverse FFT, window, overlap-add--> wave [F * 240]

100 frames a second, frame i centred on sample (i + 1/2) * 240, so F * 240 samples give exactly F frames. The network is
Vocos (Siuzdak 2023, section 3) with causal convolutions: sample n depends on frames up to (n + 360) // 240, so sound is
final DELAY = 360 samples (15 ms) behind the frames, and on `context` = 24 frames before, of which a stream keeps just
those. 1.16 M parameters. Cost: 5 ms of one core a second of sound,
twice that in float64; training 0.16 s a step of 8 s.

Letters: B batch, S samples, F frames, M mel bands, K frequency bins, W width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

SAMPLE_RATE = 24_000
HOP = 240
NUM_MELS = 80
DELAY = 360  # samples by which a frame's window reaches past its end
_WINDOW = 1024  # of log-mel
_SYNTHESIS = HOP + 2 * DELAY  # of the inverse FFT
_BINS = _SYNTHESIS // 2 + 1
_LOW, _HIGH = 40.0, 12_000.0  # Hz
_FLOOR = 1e-3  # of a band's mean magnitude, -60 dB: what is below counts as silence
_KERNEL = 5
_GAIN = 1 / 1.5  # a quarter overlap of Hann windows adds up to 2; this starts training at about the level of speech
_MAX_LOG_MAGNITUDE = 6.0


def log_mel(wave: Tensor) -> Tensor:
    """Natural log of mel magnitudes float32 [..., F, M] of waves float32 [..., F * HOP]."""
    magnitude = _magnitude(wave, _WINDOW, HOP, centred=False)
    return (_mel_bank() @ magnitude).clamp_min(_FLOOR).log().transpose(-1, -2)


class Vocoder(nn.Module):
    """Log-mel [B, F, M] -> wave [B, F * HOP]. Frame f of the input changes no sample before f * HOP - DELAY."""

    window: Tensor

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.context = (_KERNEL - 1) * (layers + 1) + _SYNTHESIS // HOP  # frames
        self.enter = nn.Conv1d(NUM_MELS, width, _KERNEL)
        self.layers = nn.Sequential(*[_Layer(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, 2 * _BINS)
        self.register_buffer("window", torch.hann_window(_SYNTHESIS), persistent=False)
        with torch.no_grad():
            self.leave.bias.zero_()[:_BINS] -= 2.0  # begin quietly

    def forward(self, mel_BFM: Tensor) -> Tensor:
        """The waves of log-mel frames; before the first frame lies silence that the network has learnt."""
        scaled_BMF = (mel_BFM.transpose(1, 2) + 3.0) / 2.0  # about zero mean and unit variance
        hidden_BWF = self.layers(self.enter(_pad_left(scaled_BMF)))
        out_BFK = self.leave(self.norm(hidden_BWF.transpose(1, 2)))
        log_magnitude_BFK, phase_BFK = out_BFK.chunk(2, -1)
        spectrum_BFK = torch.polar(log_magnitude_BFK.clamp(max=_MAX_LOG_MAGNITUDE).exp(), phase_BFK)
        return _overlap_add(torch.fft.irfft(spectrum_BFK, _SYNTHESIS) * self.window) * _GAIN


class _Layer(nn.Module):
    """ConvNeXt block over the past: a convolution per channel, then two linear layers, scaled per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, _KERNEL, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, hidden_BWF: Tensor) -> Tensor:
        normed_BFW = self.norm(self.convolution(_pad_left(hidden_BWF)).transpose(1, 2))
        change_BFW = self.down(functional.gelu(self.up(normed_BFW))) * self.scale
        return hidden_BWF + change_BFW.transpose(1, 2)


class VocoderStream:
    """A wave as its frames come; what it gives, joined, is the whole wave, DELAY samples late.

    To 1e-6 only where vocoder and frames are float64: how float32 rounds depends on the number of frames in a call.
    """

    def __init__(self, vocoder: Vocoder) -> None:
        self._vocoder = vocoder
        self._past_FM, self._rest_S = torch.zeros(0, NUM_MELS), torch.zeros(0)

    @torch.no_grad()
    def push(self, mel_FM: Tensor) -> Tensor:
        """The samples float32 [S] that are final now. None where there are no frames."""
        if not len(mel_FM):
            return torch.zeros(0)
        past, delay = len(self._past_FM), DELAY if len(self._past_FM) else 0
        frames_FM = torch.cat([self._past_FM, mel_FM])
        wave_S = self._vocoder(frames_FM[None].to(self._vocoder.window.dtype))[0].float()
        self._past_FM, self._rest_S = frames_FM[-self._vocoder.context :], wave_S[len(wave_S) - DELAY :]
        return wave_S[past * HOP - delay : len(wave_S) - DELAY]

    def finish(self) -> Tensor:
        """The samples that were held back; the next frames then begin another wave."""
        rest_S = self._rest_S
        self._past_FM, self._rest_S = torch.zeros(0, NUM_MELS), torch.zeros(0)
        return rest_S


def make_vocoder(width: int, layers: int, seed: int) -> Vocoder:
    """An untrained vocoder whose weights follow from `seed`; torch's own random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Vocoder(width, layers)


def train_vocoder(vocoder: Vocoder, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> Iterator[float]:
    """Train on (log-mel [B, F, M], wave [B, F * HOP]), `steps` of them; yields the loss of each step.

    AdamW, 30 steps of warm-up to 2e-3, then a cosine down to 1e-4.
    """
    optimizer = torch.optim.AdamW(vocoder.parameters(), lr=2e-3, betas=(0.8, 0.98), weight_decay=0.01)
    vocoder.train()
    for step, (mel_BFM, wave_BS) in zip(range(steps), batches, strict=False):
        decay = max(0.05, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 30) * decay
        loss = spectral_loss(vocoder(mel_BFM), wave_BS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vocoder.parameters(), 5.0)
        optimizer.step()
        yield float(loss.detach())
    vocoder.train(False)


def spectral_loss(made_BS: Tensor, true_BS: Tensor) -> Tensor:
    """STFT magnitudes at four resolutions, linear and log, and mel bands (Yamamoto et al. 2020, section 3.2).

    The linear term is relative to the mean magnitude of the batch; the floor keeps silence from ruling the log term.
    """
    total = torch.zeros(())
    for window in (256, 512, 1024, 2048):
        made, true = (_magnitude(wave, window, window // 4, centred=True) for wave in (made_BS, true_BS))
        total = total + 0.5 * (made - true).abs().mean() / true.mean().clamp_min(_FLOOR) + _log_distance(made, true)
        if window == _WINDOW:
            total = total + 2.0 * _log_distance(_mel_bank() @ made, _mel_bank() @ true)
    return total / 4


def _log_distance(made: Tensor, true: Tensor) -> Tensor:
    return ((made + _FLOOR).log() - (true + _FLOOR).log()).abs().mean()


def _magnitude(wave: Tensor, window: int, hop: int, centred: bool) -> Tensor:
    """STFT magnitudes [..., K, F] over the square root of the window, so that noise has the same in all windows."""
    if not centred:
        wave = functional.pad(wave, ((window - hop) // 2, (window - hop) // 2))
    spectrum = torch.stft(wave, window, hop, window=_hann(window), center=centred, return_complex=True)
    return spectrum.abs() / math.sqrt(window)


def _pad_left(hidden: Tensor) -> Tensor:
    return functional.pad(hidden, (_KERNEL - 1, 0))


def _overlap_add(pieces_BFN: Tensor) -> Tensor:
    """Windowed pieces of N samples, one every HOP, added up and cut to [B, F * HOP]."""
    frames, size = pieces_BFN.shape[1:]
    length = (frames - 1) * HOP + size
    wave_BS = functional.fold(pieces_BFN.transpose(1, 2), (1, length), (1, size), stride=(1, HOP))[:, 0, 0]
    return wave_BS[:, DELAY : DELAY + frames * HOP]


@functools.cache
def _hann(size: int) -> Tensor:
    return torch.hann_window(size)


@functools.cache
def _mel_bank() -> Tensor:
    """Triangles [M, K], evenly spaced on the HTK mel scale. Each sums to one: the floor means the same in all bands."""
    top, bottom = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (_HIGH, _LOW))
    edges = 700.0 * (10.0 ** (torch.linspace(bottom, top, NUM_MELS + 2, dtype=torch.float64) / 2595.0) - 1.0)
    bins_K1 = torch.linspace(0.0, SAMPLE_RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)[:, None]
    rising, falling = (bins_K1 - edges[:-2]) / edges.diff()[:-1], (edges[2:] - bins_K1) / edges.diff()[1:]
    bank_KM = torch.minimum(rising, falling).clamp_min(0.0)
    return (bank_KM / bank_KM.sum(0).clamp_min(1e-3)).T.float().contiguous()
