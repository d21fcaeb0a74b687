"""From a pack of the plan to tensors: the only place where a shard's bytes become training data.

    Pack --index--> byte ranges --read, crc32--> JSON + media --document.Maker: decode, speed, augment--> documents
      --join--> Batch

A sample that cannot be used is left out of its pack, and `Batch.skipped` says which and why.  Nothing of a sample is
ever cut: its tokens and audio lengths must be those that the plan counted with, or it is left out too.
Cost: that of decoding; one open file per shard in use.

Shapes: T tokens, S samples at 16 kHz, F log-mel frames, M mel filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor

from data.audio import change_speed
from data.augment import Augment, augment_mel, augment_wave, draw_windows
from data.corpus import Corpus
from data.costs import Sizing
from data.document import Document, Maker, MediaLimits, join
from data.errors import BadSample
from data.layout import Layout
from data.mel import log_mel
from data.pair_store import ShardPairs
from data.plan import Pack
from data.sample import MAX_MEDIA, SampleRecord, media_of, parse_sample
from data.split import Piece, split_document
from data.tokenizer import Tokenizer
from data.types import Batch, Speech, SpeechPairs


class Records(Protocol):
    """Documents that were made before: data.hidden.HiddenStates."""

    def document(self, sample: int) -> Document:
        """One sample. Raises BadSample."""
        ...


class Reader:
    """Reads packs. Holds no state but open files, so every worker may have its own copy."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        seed: int,
        layout: Layout,
        limits: MediaLimits | None = None,
        augment: Augment | None = None,
        sequence_length: int = 0,
        windows: tuple[int, int] | None = None,
        last_only: bool = False,
    ) -> None:
        """`layout` is the model's. `sequence_length` is the plan's, needed where it splits documents.

        `windows`: seconds from which each clip's attention window is drawn for training; prompts have none drawn.
        `last_only`: of a conversation, the last answer alone carries loss.
        """
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.seed = seed
        self.layout = layout
        self.limits = limits or MediaLimits()
        self.augment = augment
        self.sequence_length = sequence_length
        self.windows = windows
        self.sizing = Sizing(layout, self.limits.image, self.limits.sampling)
        self._maker = Maker(tokenizer, layout, self.limits, last_only)
        self._records: Records | None = None

    def of_records(self, records: Records) -> Self:
        """A reader whose packs are of `records`: it opens no shard."""
        other = copy(self)
        other._records = records
        return other

    def batch(self, pack: Pack) -> Batch:
        """The samples of a pack, end to end, but for those that are unusable."""
        documents, skipped = [], []
        columns = (pack.samples, pack.epochs, pack.pieces, pack.speeds, pack.tokens)
        for sample, epoch, piece, speed, tokens in zip(*(column.tolist() for column in columns), strict=True):
            try:
                documents.append(self._document(sample, epoch, piece, speed, tokens))
            except BadSample as error:
                skipped.append(f"{self.corpus.name(sample)}: {error.reason}")
        return join(documents, skipped, self._join_speech())

    def prompts(self, samples: Sequence[int], *, whole: bool = False) -> tuple[Batch, list[int]]:
        """Samples up to where the assistant answers, or `whole`, as a batch, and which of them could be read."""
        documents, readable, skipped = [], [], []
        for sample in samples:
            try:
                record, _ = open_sample(self.corpus, sample, self.limits.max_bytes)
                documents.append(self._maker.document(record, prompt_only=not whole))
                readable.append(sample)
            except BadSample as error:
                skipped.append(f"{self.corpus.name(sample)}: {error.reason}")
        return join(documents, skipped), readable

    def prompt_tokens(self, sample: int) -> int:
        """Tokens of a sample by the index, its answer included: an upper bound of its prompt's."""
        costs = self.corpus.costs(sample)
        return int(self.sizing.tokens(costs, self.sizing.sizes(costs))[0])

    def _document(self, sample: int, epoch: int, piece: int, speed: float, tokens: int) -> Document:
        made = self._records.document(sample) if self._records else self._made(sample, epoch, piece, speed)
        document = self._spoken(made, sample) if self.corpus.codec else made
        found = len(document.ids_T) + document.frames
        if found != tokens:
            raise BadSample(f"it has {found} tokens, its index says {tokens}")
        return document if piece < 0 else replace(document, key=f"{document.key}#{piece}")

    def _made(self, sample: int, epoch: int, piece: int, speed: float) -> Document:
        record, samples = open_sample(self.corpus, sample, self.limits.max_bytes)

        def hear(wave_S: np.ndarray, medium: int) -> Tensor:
            return self._mel(change_speed(wave_S, speed), epoch, sample * MAX_MEDIA + medium)

        document = self._maker.document(
            record,
            samples=samples,
            hear=hear,
            piece=None if piece < 0 else self._piece(sample, piece),
        )
        if self.windows is None:
            return document
        drawn = draw_windows(self.windows, self.seed, epoch, sample, piece, len(document.mels_FM))
        return replace(document, windows=drawn)

    def _spoken(self, document: Document, sample: int) -> Document:
        """The document with the codes of its answer."""
        shard, row = self.corpus.locate(sample)
        codes = self.corpus.index(shard).codes
        if isinstance(codes, ShardPairs):
            return self._paired(document, codes, row)
        codes_GF = codes.codes(row) if codes else None
        if codes is None or codes_GF is None:
            raise BadSample("its answer has no speech codes")
        speech = self.layout.speech(document.ids_T, document.position_ids_3T, codes.speaker(row), codes_GF)
        return replace(document, speech=speech, frames=codes_GF.shape[1])

    def _paired(self, document: Document, pairs: ShardPairs, row: int) -> Document:
        """The document with its answer in two ways."""
        pair = pairs.pair(row)
        if pair is None:
            raise BadSample("its answer has no preference pair")
        ways = pair.chosen_GF, pair.rejected_GF
        speaker, ids_T, places_3T = pairs.speaker(row), document.ids_T, document.position_ids_3T
        spoken = tuple(self.layout.speech(ids_T, places_3T, speaker, codes_GF) for codes_GF in ways)
        frames = sum(codes_GF.shape[1] for codes_GF in ways)
        return replace(document, speech=SpeechPairs(spoken, pair.logprobs_22), frames=frames)

    def _join_speech(self) -> Callable[[Sequence[Any]], Speech] | None:
        """How documents' speech becomes that of a batch, None where none is read."""
        if not self.corpus.codec:
            return None
        join_speech = self.layout.join_speech
        return partial(SpeechPairs.join, join_speech) if self.corpus.pairs else join_speech

    def _piece(self, sample: int, piece: int) -> Piece:
        costs = self.corpus.costs(sample)
        return split_document(costs, self.sizing.sizes(costs), self.sequence_length, self.layout)[piece]

    def _mel(self, wave_S: np.ndarray, epoch: int, medium: int) -> Tensor:
        if self.augment is None:
            return log_mel(wave_S)
        mel_FM = log_mel(augment_wave(wave_S, self.augment, self.seed, epoch, medium))
        return augment_mel(mel_FM, self.augment, self.seed, epoch, medium)


def open_sample(corpus: Corpus, sample: int, max_bytes: int) -> tuple[SampleRecord, list[int]]:
    """A sample's record with its media, under its full name; samples at 16 kHz of each medium, as the index says."""
    shard, row = corpus.locate(sample)
    index = corpus.index(shard)
    members = index.read(row, max_bytes)
    if "json" not in members:
        raise BadSample("has no .json member")
    record = parse_sample(corpus.name(sample), members["json"])
    media = media_of(record)
    for medium in media:
        if medium.extension not in members:
            raise BadSample(f"its .json names .{medium.extension}, which is not there")
    samples = index.media_samples(row)
    if len(samples) != len(media):
        raise BadSample(f"it has {len(media)} media, its index says {len(samples)}")
    return replace(record, media={medium.extension: members[medium.extension] for medium in media}), samples
