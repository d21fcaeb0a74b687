"""From a pack of the plan to tensors: the only place where a shard's bytes become training data.

    Pack --index--> byte ranges --pread, crc32--> JSON + clips --decode, speed, augment--> waves --log_mel--> mel_FM
                                                  JSON --chat.encode--> ids, labels        all documents --> Batch

A sample that cannot be used is left out of its pack, and `Batch.skipped` says which and why.  Nothing of a sample is
ever cut: its tokens and audio lengths must be those that the plan counted with, or it is left out too.
Cost: that of decoding, about 1 ms a second of audio and 3 ms for its log-mel; one open file per shard in use.

Shapes: T tokens, S samples at 16 kHz, F log-mel frames, M mel filters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.audio import Limits, change_speed, decode
from data.augment import Augment, augment_mel, augment_wave
from data.chat import encode
from data.corpus import Corpus
from data.errors import BadSample
from data.mel import NUM_MELS, log_mel
from data.plan import Pack
from data.sample import MAX_CLIPS, SampleRecord, parse_sample
from data.tokenizer import Tokenizer
from data.types import Batch


def sequential_positions(ids_T: Tensor) -> Tensor:
    """Position ids of a document of text and audio, float32 [3, T]: all three axes count 0, 1, 2, ..."""
    return torch.arange(len(ids_T), dtype=torch.float32).expand(3, -1)


@dataclass(frozen=True)
class _Document:
    """One sample, ready to be packed."""

    key: str
    ids_T: Tensor
    labels_T: Tensor
    mels_FM: Sequence[Tensor]


class Reader:
    """Reads packs. Holds no state but open files, so every worker may have its own copy."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        seed: int,
        num_audio_tokens: Callable[[int], int],
        limits: Limits | None = None,
        augment: Augment | None = None,
        positions: Callable[[Tensor], Tensor] = sequential_positions,
    ) -> None:
        """`num_audio_tokens` and `positions` are the model's: tokens of a clip of so many frames, [3, T] of ids."""
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.seed = seed
        self.num_audio_tokens = num_audio_tokens
        self.limits = limits or Limits()
        self.augment = augment
        self.positions = positions

    def batch(self, pack: Pack) -> Batch:
        """The samples of a pack, end to end, but for those that are unusable."""
        documents, skipped = [], []
        for sample, speed, tokens in zip(pack.samples, pack.speeds, pack.tokens, strict=True):
            try:
                documents.append(self._document(int(sample), pack.epoch, float(speed), int(tokens)))
            except BadSample as error:
                skipped.append(f"{self.corpus.name(int(sample))}: {error.reason}")
        return self._join(documents, skipped)

    def prompts(self, samples: Sequence[int]) -> tuple[Batch, list[int]]:
        """Samples up to where the assistant answers, as a batch, and which of them could be read."""
        documents, readable, skipped = [], [], []
        for sample in samples:
            try:
                documents.append(self._prompt(sample))
                readable.append(sample)
            except BadSample as error:
                skipped.append(f"{self.corpus.name(sample)}: {error.reason}")
        return self._join(documents, skipped), readable

    def _join(self, documents: Sequence[_Document], skipped: Sequence[str]) -> Batch:
        if not documents:
            return Batch.empty(NUM_MELS, tuple(skipped))
        mels_FM = [mel_FM for document in documents for mel_FM in document.mels_FM]
        return Batch(
            token_ids_T=torch.cat([document.ids_T for document in documents]),
            labels_T=torch.cat([document.labels_T for document in documents]),
            position_ids_3T=torch.cat([self.positions(document.ids_T) for document in documents], dim=1),
            doc_lengths=tuple(len(document.ids_T) for document in documents),
            mel_FM=torch.cat(mels_FM) if mels_FM else torch.empty(0, NUM_MELS),
            mel_lengths=tuple(len(mel_FM) for mel_FM in mels_FM),
            keys=tuple(document.key for document in documents),
            skipped=tuple(skipped),
        )

    def _prompt(self, sample: int) -> _Document:
        record, extensions, _ = open_sample(self.corpus, sample, self.limits)
        mels_FM = [log_mel(decode(record.audio[name], self.limits)) for name in extensions]
        counts = [int(self.num_audio_tokens(len(mel_FM))) for mel_FM in mels_FM]
        ids, labels = encode(record.messages, self.tokenizer, counts, prompt_only=True)
        return _Document(self.corpus.name(sample), torch.tensor(ids), torch.tensor(labels), mels_FM)

    def _document(self, sample: int, epoch: int, speed: float, tokens: int) -> _Document:
        record, extensions, expected = open_sample(self.corpus, sample, self.limits)
        waves = {name: decode(record.audio[name], self.limits) for name in dict.fromkeys(extensions)}
        mels_FM = []
        for clip, (extension, num_samples) in enumerate(zip(extensions, expected, strict=True)):
            wave_S = waves[extension]
            if len(wave_S) != num_samples:
                raise BadSample(f".{extension} decodes to {len(wave_S)} samples, its index says {num_samples}")
            mels_FM.append(self._mel(change_speed(wave_S, speed), epoch, sample * MAX_CLIPS + clip))
        counts = [int(self.num_audio_tokens(len(mel_FM))) for mel_FM in mels_FM]
        ids, labels = encode(record.messages, self.tokenizer, counts)
        if len(ids) != tokens:
            raise BadSample(f"it has {len(ids)} tokens, its index says {tokens}")
        return _Document(self.corpus.name(sample), torch.tensor(ids), torch.tensor(labels), mels_FM)

    def _mel(self, wave_S: np.ndarray, epoch: int, clip: int) -> Tensor:
        if self.augment is None:
            return log_mel(wave_S)
        mel_FM = log_mel(augment_wave(wave_S, self.augment, self.seed, epoch, clip))
        return augment_mel(mel_FM, self.augment, self.seed, epoch, clip)


def open_sample(corpus: Corpus, sample: int, limits: Limits) -> tuple[SampleRecord, list[str], list[int]]:
    """A sample's record with its media, the extensions of its clips in order, and their lengths by the index."""
    shard, row = corpus.locate(sample)
    index = corpus.index(shard)
    members: Mapping[str, bytes] = index.read(row, limits.max_bytes)
    if "json" not in members:
        raise BadSample("has no .json member")
    record, extensions = parse_sample(corpus.name(sample), members["json"])
    for extension in extensions:
        if extension not in members:
            raise BadSample(f"its .json names .{extension}, which is not there")
    lengths = index.clip_samples(row)
    if len(lengths) != len(extensions):
        raise BadSample(f"it has {len(extensions)} clips, its index says {len(lengths)}")
    return replace(record, audio={name: members[name] for name in extensions}), extensions, lengths
