"""Keys and values of past tokens, for generation.

    prefill (packed documents) --store--> [N, room, G, C] per layer --one token per document and step--> attention

Cost: 2 * layers * documents * room * G * C values. Letters: T tokens of a pack, N documents, G key-value heads,
H query heads, C head_dim, L longest document so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Grows by one token per document with every forward after the first."""

    def __init__(self, num_layers: int, doc_lengths: Sequence[int], room: int, device: torch.device) -> None:
        """Start for documents of `doc_lengths` tokens; `room` more will fit each."""
        self.num_docs, self.size = len(doc_lengths), max(doc_lengths, default=0) + room
        self.lengths_N = torch.tensor(doc_lengths, dtype=torch.int64, device=device)
        docs_T = torch.repeat_interleave(torch.arange(self.num_docs, device=device), self.lengths_N)
        starts_N = self.lengths_N.cumsum(0) - self.lengths_N
        self._slots_T = docs_T * self.size + torch.arange(len(docs_T), device=device) - starts_N[docs_T]
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self.longest = max(doc_lengths, default=0)

    @property
    def filled(self) -> bool:
        """Whether the documents are stored, so that the next forward brings one token for each."""
        return self._layers[-1] is not None

    def advance(self) -> None:
        """Make place for one more token per document; call it before the forward that brings them."""
        docs_N = torch.arange(self.num_docs, device=self.lengths_N.device)
        self._slots_T = docs_N * self.size + self.lengths_N
        self.lengths_N = self.lengths_N + 1
        self.longest += 1

    def rewind(self, lengths_N: Tensor) -> None:
        """Go back to where the documents had these lengths; what was stored after that is forgotten."""
        self.lengths_N, self.longest = lengths_N, int(lengths_N.max()) if self.num_docs else 0

    def store(self, layer: int, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Put the forward's keys and values [T, G, C] in their places."""
        if self._layers[layer] is None:
            shape = self.num_docs * self.size, *k_TGC.shape[1:]
            self._layers[layer] = k_TGC.new_zeros(shape), v_TGC.new_zeros(shape)
        for past, new in zip(self._layers[layer] or (), (k_TGC, v_TGC), strict=True):
            past.index_copy_(0, self._slots_T, new)

    def attend(self, layer: int, q_NHC: Tensor) -> Tensor:
        """One query per document over all of its past: [N, H, C] -> [N, H, C]."""
        if not self.num_docs:
            return q_NHC
        pair = self._layers[layer]
        assert pair is not None
        k, v = (x.view(self.num_docs, self.size, *x.shape[1:])[:, : self.longest].transpose(1, 2) for x in pair)
        past_NL = torch.arange(self.longest, device=q_NHC.device) < self.lengths_N.unsqueeze(1)
        grouped = q_NHC.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q_NHC.unsqueeze(2), k, v, attn_mask=past_NL[:, None, None, :], enable_gqa=grouped
        )
        return out.squeeze(2)
