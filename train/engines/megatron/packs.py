"""A pack on its way into Megatron: padded, cut over context and tensor ranks, with what layers must know of it.

    pack [T0] --pad with a document of its own--> [P] --context ranks: an early and a late stretch each--> [S]
                                                      --tensor ranks: sequence parallelism--> [T]

P is a multiple of 2 cp tp (of tp without context parallelism). Padding has no label, no share in the balance loss, and
is seen by nobody. All ranks of a replica hold the same pack; what follows from its integers each works out by itself.

Letters: P rows of the padded pack, S of them on this context rank, T of them here, C head_dim, M rows that the Talker
reads, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from data.types import Batch
from models.config import TextConfig
from models.layers.attention import make_segments
from models.layers.ragged import make_pieces
from models.layers.rope import angles
from models.talker_inputs import TalkerPlan
from models.thinker import Features
from train.engines.megatron.block import Tokens
from train.engines.megatron.layout import Peers
from train.preference import PreferenceConfig


@dataclass(frozen=True)
class Cut:
    """Which rows of a padded pack lie here. Indices are int64, into the pack."""

    peers: Peers
    real: int  # rows before padding
    padded: int
    rows_S: Tensor
    rows_T: Tensor
    pack_order: Tensor | None  # rows of all context ranks, end to end, in the order of the pack
    stretches: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, length: int, peers: Peers, device: torch.device, least: int = 1) -> Cut:
        """Cut a pack of `length` rows, padded to `least` at least."""
        multiple, cp = peers.multiple, peers.cp.size()
        padded = -(-max(least, length) // multiple) * multiple
        rows = torch.arange(padded, device=device)
        order, stretches = None, ((0, padded),)
        if cp > 1:  # an early and a late stretch, so that causal work is even
            parts, rank, size = rows.chunk(2 * cp), peers.cp.rank(), padded // (2 * cp)
            halves = [(r, 2 * cp - 1 - r) for r in range(cp)]
            order = torch.cat([parts[part] for both in halves for part in both]).argsort()
            rows = torch.cat([parts[part] for part in halves[rank]])
            stretches = tuple((part * size, (part + 1) * size) for part in halves[rank])
        here = rows.chunk(peers.tp.size())[peers.tp.rank()]
        return cls(peers, length, padded, rows, here, order, stretches)

    def pad(self, x: Tensor, value: float = 0, dim: int = -1) -> Tensor:
        """Fill rows along `dim` up to the padded length."""
        if self.padded == self.real:
            return x
        shape = list(x.shape)
        shape[dim] = self.padded - self.real
        return torch.cat([x, x.new_full(shape, value)], dim)

    def lengths(self, doc_lengths: Sequence[int]) -> tuple[int, ...]:
        """Documents, padding as one of them."""
        return (*doc_lengths, self.padded - self.real) if self.padded > self.real else tuple(doc_lengths)

    @property
    def padding_1T(self) -> Tensor:
        """Whether a row here is padding, bool [1, T]."""
        return (self.rows_T >= self.real).unsqueeze(0)

    def places_here(self, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows of the pack those that lie here: their places here, and which of the N they are."""
        number_P = torch.full((self.padded,), -1, device=rows_N.device)
        number_P[rows_N] = torch.arange(len(rows_N), device=rows_N.device)
        number_T = number_P[self.rows_T]
        places = (number_T >= 0).nonzero().squeeze(1)
        return places, number_T[places]

    def gather_tensor(self, x_TD: Tensor) -> Tensor:
        """Rows here -> those of the context rank, [S, D]; backward reduces and scatters."""
        return gather_from_sequence_parallel_region(x_TD, True, self.peers.tp) if self.peers.tp.size() > 1 else x_TD

    def gather(self, x_TD: Tensor) -> Tensor:
        """Rows here -> the whole pack in order, without padding, on every rank. No gradient."""
        x_SD = self.gather_tensor(x_TD)
        if self.pack_order is None:
            return x_SD[: self.real]
        whole = gather_from_sequence_parallel_region(x_SD, True, self.peers.cp)
        return whole.index_select(0, self.pack_order)[: self.real]

    def tokens(self, text: TextConfig, position_ids: Tensor, doc_lengths: Sequence[int], dtype: torch.dtype) -> Tokens:
        """What the layers must know; position ids float [3, real]."""
        positions_3S = self.pad(position_ids)[:, self.rows_S]
        turns = angles(positions_3S, text.head_dim, text.rope_theta, text.mrope_section, text.rope_scaling)
        cos_SC, sin_SC = (turn_SC.to(dtype) for turn_SC in turns)
        lengths, device = self.lengths(doc_lengths), position_ids.device
        if self.pack_order is None:
            return Tokens(cos_SC=cos_SC, sin_SC=sin_SC, segments=make_segments(lengths, device))
        pieces = make_pieces(self.stretches, lengths, device)
        return Tokens(cos_SC=cos_SC, sin_SC=sin_SC, pieces=pieces, pack_order=self.pack_order)


@dataclass
class ThinkerPack:
    """A micro-batch for the Thinker's stages, and what they leave in it."""

    batch: Batch  # on the device
    cut: Cut
    tokens: Tokens
    purpose: str = "loss"
    """loss; sums: loss and right answers; documents: loss of each; last: hidden states of the documents' last tokens;
    tap: the tapped alone."""
    features: Features | None = None  # of its media, where they were encoded before
    text_ids_X: Tensor | None = None  # the Talker's text, where its gradient reaches the embedding
    text_grad_XH: Tensor | None = None
    losses_K: Tensor | None = None  # what the last stage found here; parts that tensor ranks share are with the first
    media: Tensor | None = None  # the same by media of documents, train.media.by_media
    found: Tensor | None = None  # for the other purposes

    @classmethod
    def of(
        cls, batch: Batch, text: TextConfig, peers: Peers, dtype: torch.dtype, purpose: str, least: int
    ) -> ThinkerPack:
        """Cut a micro-batch, which is on the device, to `least` rows at least."""
        cut = Cut.of(len(batch.token_ids_T), peers, batch.token_ids_T.device, least)
        return cls(batch, cut, cut.tokens(text, batch.position_ids_3T, batch.doc_lengths, dtype), purpose)


@dataclass
class TalkerPack:
    """A micro-batch for the Talker's stages, and what they leave in it."""

    plan: TalkerPlan  # on the device
    cut: Cut
    tokens: Tokens
    inputs_TD: Tensor  # of the rows here: a leaf on the first stage
    pairs: tuple[Tensor, PreferenceConfig] | None = None  # a reference's log-probabilities [N, 2], of pairs
    losses_K: Tensor | None = None

    @classmethod
    def of(cls, plan: TalkerPlan, text: TextConfig, cut: Cut, inputs_TD: Tensor) -> TalkerPack:
        """Cut a plan, which is on the device."""
        tokens = cut.tokens(text, plan.position_ids_3P, plan.doc_lengths, inputs_TD.dtype)
        return cls(plan, cut, tokens, inputs_TD)
