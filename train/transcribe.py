"""An audio encoder and its text decoder as an engine trains them: a train.loss.Objective.

    Batch --audio_tower, drawn windows--> frames --audio_decoder--> hidden --chunked cross-entropy--> sum

What a sample asks stands before the answer and is the decoder's prompt; the answer is the target: speech recognition
and audio understanding differ in their text alone. The Thinker is not made. No routers, no experts.

Sums only; the engine divides by the count of targets in the global batch. Every module is entered whatever the batch,
one without clips or without tokens too: sharded engines count on it.

Cost: models/flops.py, transcriber_flops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from data.types import Batch
from models.config import TranscriberConfig
from models.flops import transcriber_flops
from models.thinker import Features, Media
from models.transcriber import Transcriber, split_pack
from train.loss import IGNORE, MAX_LOGITS, Family, Routers, Sums, Term, Totals, cross_entropy_sum


class TranscribeObjective(nn.Module):
    """Encoder, decoder and loss as one module."""

    prefix = "transcriber."
    terms: tuple[Term, ...] = (Term("transcript"),)
    routers: tuple[Routers, ...] = ()
    families: tuple[Family, ...] = ()

    def __init__(self, transcriber: Transcriber, *, max_logits: int = MAX_LOGITS) -> None:
        super().__init__()
        self.transcriber, self.max_logits = transcriber, max_logits

    @property
    def model(self) -> nn.Module:
        """What is trained and kept in checkpoints."""
        return self.transcriber

    def totals(self, batches: Sequence[Batch]) -> Totals:
        """Count this rank's micro-batches."""
        return Totals(
            skipped=sum(len(batch.skipped) for batch in batches),
            targets=(sum(int((batch.labels_T != IGNORE).sum()) for batch in batches),),
            tokens=(sum(len(batch.token_ids_T) for batch in batches),),
        )

    def forward(self, batch: Batch | Media, features: Features | None = None) -> Sums | Features:
        """Sums over a pack. `features` are those of its clips where they are encoded already; given Media, these."""
        if isinstance(batch, Media):
            return self.transcriber.encode(batch)
        hidden_XD, labels_X = self.read(batch, features)
        decoder = self.transcriber.audio_decoder
        ce_sum = decoder.head(hidden_XD, partial(cross_entropy_sum, labels_T=labels_X, max_logits=self.max_logits))
        if features is not None:  # a gradient of zero in every parameter of the encoder: train.loss.nothing_to_encode
            nothing = self.transcriber.encode(Media(batch.mel_FM[:0], (), None, ()))
            ce_sum = ce_sum + nothing.audio_TD.float().sum()
        return Sums(ce_sum.unsqueeze(0), (), ())

    def read(self, batch: Batch, features: Features | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of a pack's text [X, D], and its labels int64 [X]."""
        if features is None:
            features = self.transcriber.encode(media_of(batch))
        hidden_XD, rows_X = self.transcriber(batch.token_ids_T, batch.doc_lengths, features.audio_TD)
        return hidden_XD, batch.labels_T.index_select(0, rows_X)


def media_of(batch: Batch) -> Media:
    """The clips of a batch with their windows."""
    return Media(batch.mel_FM, batch.mel_lengths, None, batch.grids, batch.windows)


def flops_of(config: TranscriberConfig, batch: Batch) -> int:
    """Forward and backward over a pack."""
    split = split_pack(batch.token_ids_T, batch.doc_lengths, config.thinker.audio_token_id)
    return transcriber_flops(config, split.text_lengths, split.frame_lengths, batch.mel_lengths, batch.windows)
