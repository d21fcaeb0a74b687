"""Sequence parallelism under DeepSpeed (Ulysses): ranks of one replica hold a pack together, each a stretch of it.

    pack [T] --pad with a document of its own, cut--> [S] on each rank --layers, head and loss on S tokens--> its sums
    attention: q, k, v [S, H, C] --all-to-all--> [cp S, H / cp, C] --within documents--> --all-to-all--> [S, H, C]

Weights are the same on all ranks and ZeRO divides them over all: to DeepSpeed it is data parallelism, and the share of
the loss that a rank computes is that of its tokens. Positions are angles of the tokens here, before the exchange.
Documents may cross the cuts anywhere: attention sees whole packs, of some heads. Fewer key-value heads than ranks are
repeated. Padding has no label, no share in the balance loss, and nobody sees it.

Media are presented by the first rank of a replica, dealt over all ranks as ever (train/encoders.py), and their features
go where their placeholders lie. Evaluation is not cut: each rank of a replica runs the whole of a batch.

Cost: four all-to-alls of [S, heads, C] a layer, forward and backward each, by DeepSpeed's DistributedAttention (Jacobs
et al. 2023). Per token that does not grow with the ranks. All ranks of a replica read the same samples.

Letters: T tokens of a pack, S of them here, H query heads, G key-value heads, C head_dim, M tokens of media.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.types import Batch
from models.config import ThinkerConfig
from models.layers.attention import Segments, attend
from train import ranks
from train.encoders import Deal, without_media
from train.engines import Shard
from train.loss import IGNORE, Part
from train.media import kinds_of, media_of


@dataclass(frozen=True)
class Replica:
    """The ranks that hold packs together, and this one's place among them. An Across of models/layers/attention.py."""

    rank: int
    size: int
    thinker: ThinkerConfig
    exchange: Any  # DeepSpeed's DistributedAttention around ours

    @classmethod
    def form(cls, size: int, thinker: ThinkerConfig) -> Replica:
        """Make the groups: consecutive ranks. Collective."""
        from deepspeed.sequence.layer import DistributedAttention

        groups: list[Any] = [
            dist.new_group(list(range(first, first + size))) for first in range(0, ranks.world(), size)
        ]
        attention: Any = _attend  # any callable will do
        exchange = DistributedAttention(attention, groups[ranks.rank() // size])
        return cls(ranks.rank() % size, size, thinker, exchange)

    @property
    def shard(self) -> Shard:
        """What this rank reads: the same as the others here."""
        return Shard(ranks.rank() // self.size, ranks.world() // self.size, leads=self.rank == 0)

    def attend(self, q_SHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, segments: Segments) -> Tensor:
        """Causal attention over the whole pack, [S, H, C] of the queries here."""
        repeats = max(1, self.size // k_SGC.shape[1])
        k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k_SGC, v_SGC))
        q, k, v = (x.unsqueeze(1) for x in (q_SHC, k, v))  # as DeepSpeed has it: sequence, batch, heads, channels
        return self.exchange(q, k, v, 1, None, replace(segments, across=None)).squeeze(1)

    def rows(self, tokens: int) -> int:
        """S, at least one."""
        return -(-max(1, tokens) // self.size)

    def cut(self, batch: Batch) -> tuple[Batch, Part]:
        """The stretch here of a batch without media. Its doc_lengths stay those of the pack, padding as one of them."""
        tokens, rows = len(batch.token_ids_T), self.rows(len(batch.token_ids_T))
        padding, here = rows * self.size - tokens, slice(self.rank * rows, (self.rank + 1) * rows)
        taken = self.thinker.audio_token_id, self.thinker.image_token_id, self.thinker.video_token_id
        word = next(word for word in range(len(taken) + 1) if word not in taken)
        part = replace(
            batch,
            token_ids_T=F.pad(batch.token_ids_T, (0, padding), value=word)[here],
            labels_T=F.pad(batch.labels_T, (0, padding), value=IGNORE)[here],
            position_ids_3T=F.pad(batch.position_ids_3T, (0, padding))[:, here],
            doc_lengths=(*batch.doc_lengths, padding) if padding else batch.doc_lengths,
        )
        media_T = media_of(kinds_of(self.thinker, batch.token_ids_T), batch.doc_lengths)
        media_T = F.pad(media_T, (0, padding))[here]
        return part, Part(self, min(rows, max(0, tokens - self.rank * rows)), media_T)

    def present(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches with media on the first rank alone."""
        return list(batches) if self.rank == 0 else [without_media(batch) for batch in batches]

    def deals(self, batches: Sequence[Batch]) -> tuple[Deal, Deal]:
        """Where features of sound, and of pictures, go."""
        thinker = self.thinker
        pictures = thinker.image_token_id, thinker.video_token_id
        return self.deal(batches, (thinker.audio_token_id,)), self.deal(batches, pictures)

    def deal(self, batches: Sequence[Batch], ids: Sequence[int | None]) -> Deal:
        """Where features of the placeholders `ids` go from the first rank here."""
        rank_M = []
        for batch in batches:
            found = torch.isin(batch.token_ids_T, torch.tensor([i for i in ids if i is not None]))
            rank_M.append(found.nonzero().squeeze(1).numpy() // self.rows(len(batch.token_ids_T)))
        first, world = ranks.rank() - self.rank, ranks.world()
        counts, out, into = np.bincount(np.concatenate(rank_M), minlength=self.size), [0] * world, [0] * world
        order = np.zeros(0, np.int64)
        if self.rank == 0:
            order, out[first : first + self.size] = np.argsort(np.concatenate(rank_M), kind="stable"), counts.tolist()
        into[first] = int(counts[self.rank])
        return Deal(order, out, into, [int((each == self.rank).sum()) for each in rank_M])


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Of some heads, [cp S, 1, H / cp, C]."""
    return attend(q.squeeze(1), k.squeeze(1), v.squeeze(1), segments, causal=True).unsqueeze(1)
