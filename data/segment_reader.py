"""From a pack of the plan to what the waveform decoder learns from: the recordings alone, no medium of the Thinker.

    Pack --index, codes--> JSON, recording, codes --decode at the codec's rate, its level--> segments.crop --> Batch

Where a piece begins is a pure function of (seed, epoch, sample). A sample costs the frames that are decoded for it,
context included, whatever its text and media: `data.sequence_length` is then frames of a micro-batch.
Cost: about 1 ms to decode a second of speech, all of it, since a codec's level may depend on the whole utterance.

Letters: S samples, N samples of a corpus, M media.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from data.audio import decode
from data.codec import Codec
from data.corpus import Corpus
from data.costs import Costs, Sizes, Sizing
from data.document import MediaLimits
from data.errors import BadSample, DataError
from data.hashing import hashed
from data.interrupts import uninterrupted
from data.kmeans_codec import KMeansCodec, levelled
from data.layout import Layout
from data.mel import NUM_MELS
from data.plan import Pack
from data.reader import Reader
from data.sample import parse_sample, speech_of
from data.segments import Segments, crop, join
from data.tokenizer import Tokenizer
from data.types import Batch

_START = 5  # what a random number is for; data.measure has the others


@dataclass(frozen=True)
class Sound:
    """What a codec's codes stand for."""

    sample_rate: int
    samples_per_frame: int
    levelled: bool  # at one level: loudness is not coded, so codes cannot bring it back

    @classmethod
    def of(cls, codec: Codec) -> Sound:
        """Raises DataError for a codec whose frames are no whole number of samples."""
        samples = codec.sample_rate / codec.frame_rate
        if samples != int(samples):
            raise DataError(f"codec {codec.identity}: {samples:g} samples a frame are no whole number")
        return cls(codec.sample_rate, int(samples), isinstance(codec, KMeansCodec))

    def target(self, wave_S: Tensor) -> Tensor:
        """The waveform that a decoder of these codes is to give, float32 [S]."""
        return levelled(wave_S)[: len(wave_S)] if self.levelled else wave_S


@dataclass(frozen=True)
class FrameSizing(Sizing):
    """Samples cost the frames of their piece, and their media nothing."""

    frames: int = 1
    context: int = 0

    def sizes(self, costs: Costs, speeds_N: np.ndarray | float = 1.0) -> Sizes:
        """Nothing is heard or seen."""
        zeros_M = np.zeros(len(costs.kind_M), np.int64)
        return Sizes(zeros_M, zeros_M, np.zeros((len(zeros_M), 3), np.int64), zeros_M)

    def tokens(self, costs: Costs, sizes: Sizes) -> np.ndarray:
        """int64 [N]: frames that are decoded, where the piece has all its context."""
        assert costs.speech_N is not None, "a corpus is opened with its codec"
        return np.minimum(costs.speech_N, self.frames + self.context)


class SegmentReader(Reader):
    """Reads packs as pieces of speech. Holds no state but open files."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        seed: int,
        layout: Layout,
        limits: MediaLimits,
        sound: Sound,
        frames: int,
        context: int,
    ) -> None:
        """Pieces of so many frames, after so many of context. Where they change, the corpus counts as another one."""
        super().__init__(corpus, tokenizer, seed=seed, layout=layout, limits=limits)
        self.sound, self.frames, self.context = sound, frames, context
        self.sizing = FrameSizing(layout, frames=frames, context=context)
        corpus.fingerprint = sha256(f"{corpus.fingerprint} {frames} {context}".encode()).hexdigest()

    def batch(self, pack: Pack) -> Batch:
        """A piece of each sample of a pack, but for those that are unusable."""
        found: list[Segments] = []
        keys: list[str] = []
        skipped: list[str] = []
        for sample, epoch in zip(pack.samples.tolist(), pack.epochs.tolist(), strict=True):
            name = self.corpus.name(sample)
            try:
                found.append(self._piece(sample, epoch))
                keys.append(name)
            except BadSample as error:
                skipped.append(f"{name}: {error.reason}")
        speech = join(found) if found else None
        return replace(Batch.empty(NUM_MELS, tuple(skipped)), keys=tuple(keys), speech=speech)

    def _piece(self, sample: int, epoch: int) -> Segments:
        shard, row = self.corpus.locate(sample)
        index = self.corpus.index(shard)
        codes_GF = index.codes.codes(row) if index.codes else None
        if codes_GF is None:
            raise BadSample("its answer has no speech codes")
        members = index.read_speech(row, self.limits.audio.max_bytes)
        speech = speech_of(parse_sample(self.corpus.name(sample), members.get("json", b"")))
        if speech is None or speech.extension not in members:
            raise BadSample("its .json names no speech that is there")
        with uninterrupted():
            wave_S = torch.from_numpy(decode(members[speech.extension], self.limits.audio, self.sound.sample_rate))
        draw = int(hashed(self.seed, epoch, _START, np.array([sample]))[0]) >> 1
        generator, rate = torch.Generator().manual_seed(draw), self.sound.samples_per_frame
        return crop(
            codes_GF, self.sound.target(wave_S), self.frames, generator, context=self.context, samples_per_frame=rate
        )
