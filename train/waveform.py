"""The waveform decoder as an engine trains it: a train.loss.Objective over decoder, spectral losses and discriminators.

    Batch.speech: Segments --codes, padded on the right--> Code2Wav --drop the context--> fake_S --.
       '---- wave, cut to what the decoder gives ----------------------------------------> real_S --+--> spectral_sums
                                                                                                  '--> Adversary

Sample s of the decoder's wave is trained to be sample s of the utterance. So the wave begins with the utterance, and
what T frames do not yet give are the last samples of their stretch: 555 of 1920 T in the released shape, where the next
frame is waited for (models/code2wav.py). The same samples are lacking here, so training and decoding agree.

Thinker and Talker are frozen and do not run. The discriminators are a part of what is trained, "adversary.", beside the
decoder: the same optimizer, one step for both. Exports and phases without them leave them out.

Sums only, of the samples that are scored: the engine divides. Every module is entered once and in the same order
whatever the segments, none included: sharded engines count on it.

Cost: decoder forward and backward on context and frames; train/adversary.py has that of the discriminators.

Letters: B segments, G codes of a frame, T frames, S samples end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from data.segments import Segments, no_segments
from data.types import Batch
from models.code2wav import Code2Wav
from models.omni import Omni
from models.thinker import Thinker
from train.adversary import Adversary
from train.errors import RecipeError
from train.loss import MAX_LOGITS, Family, Routers, Sums, Term, Totals
from train.waveform_config import WaveformConfig
from train.waveform_loss import spectral_sums

SPECTRAL, HOSTILE = ("stft_linear", "stft_log", "mel"), ("adversarial", "matching")
ADVERSARY = "adversary"  # a part of the model in phases that have one


class WaveformObjective(nn.Module):
    """Decoder and losses as one module; the other parts of the model are frozen here."""

    prefix = "omni."
    counts_kinds = False  # no experts learn here
    max_logits = MAX_LOGITS  # of evaluations of the Thinker
    routers: tuple[Routers, ...] = ()
    families: tuple[Family, ...] = ()

    def __init__(self, omni: Omni, config: WaveformConfig) -> None:
        """With discriminators where `add_adversary` gave the model some."""
        super().__init__()
        if omni.code2wav is None:
            raise RecipeError("the model has no code2wav to train")
        for name, part in omni.named_children():
            if name not in ("code2wav", ADVERSARY):
                part.requires_grad_(False)
        self.omni, self.spectral = omni, config.spectral
        self._enough = next(frames for frames in count(1) if omni.code2wav.num_samples(frames))  # for any sample
        hostile = self.adversary is not None
        self.terms = tuple(Term(name, getattr(config, name)) for name in SPECTRAL + HOSTILE * hostile)
        self.terms += (Term("discriminator"),) * hostile

    @property
    def model(self) -> nn.Module:
        """What is trained and kept in checkpoints."""
        return self.omni

    @property
    def thinker(self) -> Thinker:
        """What answers in evaluations."""
        return self.omni.thinker

    @property
    def code2wav(self) -> Code2Wav:
        """The decoder."""
        assert self.omni.code2wav is not None
        return self.omni.code2wav

    @property
    def adversary(self) -> Adversary | None:
        """The discriminators, in phases that have them."""
        found = getattr(self.omni, ADVERSARY, None)
        return found if isinstance(found, Adversary) else None

    def segments(self, batch: Batch) -> Segments:
        """What is to be decoded; a batch without samples has none."""
        groups = self.code2wav.config.num_quantizers
        return batch.speech if isinstance(batch.speech, Segments) else no_segments(groups)

    def totals(self, batches: Sequence[Batch]) -> Totals:
        """Count this rank's micro-batches: samples that are scored, frames that are decoded."""
        found = [self.segments(batch) for batch in batches]
        samples = sum(sum(self.lengths(segments)) for segments in found)
        frames = sum(sum(segments.frames) for segments in found)
        skipped = sum(len(batch.skipped) for batch in batches)
        return Totals(skipped, (samples,) * len(self.terms), (frames,))

    def forward(self, batch: Batch, features: None = None) -> Sums:
        """Sums of `terms` over the segments of a batch."""
        segments = self.segments(batch)
        real_S, fake_S = self.waves(segments)
        lengths = self.lengths(segments)
        sums = spectral_sums(fake_S, real_S, lengths, self.spectral)
        if self.adversary is not None:
            sums["adversarial"], sums["matching"], _ = self.adversary.generator_loss(real_S, fake_S, lengths)
            sums["discriminator"], _ = self.adversary.discriminator_loss(real_S, fake_S, lengths)
        return Sums(torch.stack([sums[term.name] for term in self.terms]), (), ())

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
        wave_BS = self.code2wav(self._padded(segments))
        fake = [
            wave_BS[row, rate * context : rate * context + length]
            for row, (context, length) in enumerate(zip(segments.contexts, lengths, strict=True))
        ]
        real = [
            wave_S[:length]
            for wave_S, length in zip(segments.wave_S.split(list(segments.samples)), lengths, strict=True)
        ]
        return torch.cat([segments.wave_S[:0], *real]), torch.cat([wave_BS.flatten()[:0], *fake])

    def _padded(self, segments: Segments) -> Tensor:
        """Codes int64 [B, G, T], zeros on the right, which the decoder's own samples do not see; never nothing."""
        parts_TG = [codes_GT.T for codes_GT in segments.codes_GF.split(list(segments.frames), 1)]
        if not segments.frames:
            parts_TG = [segments.codes_GF.new_zeros(self._enough, len(segments.codes_GF))]
        codes_BGT = pad_sequence(parts_TG, batch_first=True).transpose(1, 2)
        return pad(codes_BGT, (0, max(0, self._enough - codes_BGT.shape[2])))


def add_adversary(omni: Omni, config: WaveformConfig, seed: int) -> None:
    """Give a model discriminators to learn against; their first weights follow from the seed."""
    omni.add_module(ADVERSARY, Adversary(config.adversary, seed))
