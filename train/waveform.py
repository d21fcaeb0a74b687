"""Training of the waveform decoder: module, weights and a local step.

    Segments --codes, padded on the right--> Code2Wav --drop the context--> fake_S --.
       '---- wave, cut to what the decoder gives ------------------------> real_S --+--> spectral_sums
                                                                                    '--> Adversary (optional)

Sample s of the decoder's wave is trained to be sample s of the utterance. So the wave begins with the utterance, and
what T frames do not yet give are the last samples of their stretch: 555 of 1920 T in the released shape, where the next
frame is waited for (models/code2wav.py). The same samples are lacking here, so training and decoding agree.

Sums only: divide by the samples of the global batch, `WaveformObjective.lengths` of all segments.

Cost: decoder forward and backward on context and frames, and with an adversary one more forward of the decoder.

Letters: B segments, G codes of a frame, T frames, S samples end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.code2wav import Code2Wav
from train.adversary import Adversary
from train.errors import RecipeError
from train.waveform_loss import Segments, SpectralConfig, spectral_sums


@dataclass(frozen=True)
class WaveformWeights:
    """HiFi-GAN's 1, 2 and 45 (Kong et al. 2020, section 2.4), the 45 shared by three spectral terms."""

    stft_linear: float = 15.0
    stft_log: float = 15.0
    mel: float = 15.0
    adversarial: float = 1.0
    matching: float = 2.0

    def __post_init__(self) -> None:
        """Reject what would be a reward."""
        for name, weight in asdict(self).items():
            if weight < 0:
                raise RecipeError(f"weights.{name} must not be below 0, not {weight}")

    def share(self, sums: dict[str, Tensor], samples: int) -> Tensor:
        """A micro-batch's share of the loss, fp32 scalar; `samples` are those of the global batch."""
        return sum((getattr(self, name) * part for name, part in sums.items()), torch.tensor(0.0)) / max(1, samples)


class WaveformObjective(nn.Module):
    """Decoder and losses as one module."""

    def __init__(self, code2wav: Code2Wav, spectral: SpectralConfig | None = None) -> None:
        super().__init__()
        self.code2wav, self.spectral = code2wav, spectral or SpectralConfig()

    def forward(self, segments: Segments, adversary: Adversary | None = None) -> dict[str, Tensor]:
        """Sums by name, fp32 scalars: "stft_linear", "stft_log", "mel"; of an adversary "adversarial", "matching"."""
        real_S, fake_S = self.waves(segments)
        lengths = self.lengths(segments)
        sums = spectral_sums(fake_S, real_S, lengths, self.spectral)
        if adversary is not None:
            sums["adversarial"], sums["matching"], _ = adversary.generator_loss(real_S, fake_S, lengths)
        return sums

    def lengths(self, segments: Segments) -> list[int]:
        """Samples of each segment that are scored: those which the decoder gives after the context."""
        rate, given = self.code2wav.config.samples_per_frame, self.code2wav.num_samples
        return [
            max(0, min(given(frames) - rate * context, samples))
            for frames, context, samples in zip(segments.frames, segments.contexts, segments.samples, strict=True)
        ]

    def waves(self, segments: Segments) -> tuple[Tensor, Tensor]:
        """Real and decoded waveforms of the scored samples, end to end, float [S] each."""
        rate, lengths = self.code2wav.config.samples_per_frame, self.lengths(segments)
        wave_BS = self.code2wav(_padded(segments))
        fake = [
            wave_S[rate * context : rate * context + length]
            for wave_S, context, length in zip(wave_BS, segments.contexts, lengths, strict=True)
        ]
        real = [
            wave_S[:length]
            for wave_S, length in zip(segments.wave_S.split(list(segments.samples)), lengths, strict=True)
        ]
        return torch.cat([segments.wave_S[:0], *real]), torch.cat([wave_BS.flatten()[:0], *fake])


def train_step(
    objective: WaveformObjective,
    micro_batches: Sequence[Segments],
    optimizer: torch.optim.Optimizer,
    weights: WaveformWeights,
    adversary: Adversary | None = None,
    adversary_optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, float]:
    """One step in one process -> means by name, and "loss". Any split into micro-batches gives the same step.

    With an adversary its discriminators step first, on waves without gradient ("discriminator"), then the decoder
    against the new ones, as in HiFi-GAN.
    """
    samples = sum(sum(objective.lengths(segments)) for segments in micro_batches)
    means: dict[str, float] = {}

    def count(name: str, total: Tensor) -> None:
        means[name] = means.get(name, 0.0) + float(total.detach()) / max(1, samples)

    if adversary is not None:
        assert adversary_optimizer is not None, "an adversary has an optimizer of its own"
        adversary_optimizer.zero_grad()
        for segments in micro_batches:
            with torch.no_grad():
                real_S, fake_S = objective.waves(segments)
            total, _ = adversary.discriminator_loss(real_S, fake_S, objective.lengths(segments))
            (total / max(1, samples)).backward()
            count("discriminator", total)
        adversary_optimizer.step()
        adversary.requires_grad_(False)
    optimizer.zero_grad()
    for segments in micro_batches:
        sums = objective(segments, adversary)
        loss = weights.share(sums, samples)
        loss.backward()
        for name, total in sums.items():
            count(name, total)
        count("loss", loss * max(1, samples))
    optimizer.step()
    if adversary is not None:
        adversary.requires_grad_(True)
    return means


def _padded(segments: Segments) -> Tensor:
    """Codes int64 [B, G, T], zeros on the right, which the decoder's own samples do not see."""
    if not segments.frames:
        return segments.codes_GF.unsqueeze(0)[:0]
    parts_TG = [codes_GT.T for codes_GT in segments.codes_GF.split(list(segments.frames), 1)]
    return pad_sequence(parts_TG, batch_first=True).transpose(1, 2)
