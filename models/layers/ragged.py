"""Causal attention where a process holds some tokens of a pack, and the keys of all of it.

    pack      [ document 0 | document 1                    | 2  ]
    mine             [ here ]               [ and here ]             queries: two stretches of the pack
    piece        a stretch within one document: its queries are the last rows of keys [start of document, its end)

Work is that of the pieces; nothing of the size queries x keys exists beyond a strip of queries on a CPU.

Letters: S tokens here, T tokens of the pack, H query heads, G key-value heads, C head_dim, K keys of all pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.attention import varlen_kernel

STRIP = 256  # queries of a call on a CPU


@dataclass(frozen=True)
class Piece:
    """Queries here [start, stop) are the last rows of the keys [first, last) of the pack."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Pieces:
    """How the tokens here divide, worked out once per forward and shared by all layers."""

    all: tuple[Piece, ...]
    keys_K: Tensor  # int64: keys of all pieces end to end, as rows of the pack
    query_bounds: Tensor  # int32 [pieces + 1]
    key_bounds: Tensor  # int32 [pieces + 1]


def make_pieces(stretches: Sequence[tuple[int, int]], doc_lengths: Sequence[int], device: torch.device) -> Pieces:
    """Divide stretches [start, stop) of a pack, which lie here one after the other, at the bounds of documents."""
    found = tuple(_pieces(stretches, doc_lengths))
    rows = [torch.arange(piece.first, piece.last) for piece in found]
    bounds = (
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
        for sizes in ([p.stop - p.start for p in found], [p.last - p.first for p in found])
    )
    return Pieces(found, torch.cat(rows).to(device), *bounds)


def _pieces(stretches: Sequence[tuple[int, int]], doc_lengths: Sequence[int]) -> Iterator[Piece]:
    ends, offset = list(accumulate(doc_lengths)), 0
    for start, stop in stretches:
        for length, end in zip(doc_lengths, ends, strict=True):
            low, high = max(start, end - length), min(stop, end)
            if low < high:
                yield Piece(offset + low - start, offset + high - start, end - length, high)
        offset += stop - start


def attend_pieces(q_SHC: Tensor, k_TGC: Tensor, v_TGC: Tensor, pieces: Pieces) -> Tensor:
    """q [S, H, C], k and v [T, G, C] of the whole pack, in its order and one float dtype -> [S, H, C]."""
    grouped = q_SHC.shape[1] != k_TGC.shape[1]
    if q_SHC.is_cuda and q_SHC.dtype in (torch.bfloat16, torch.float16) and (kernel := varlen_kernel()) is not None:
        k_KGC, v_KGC = k_TGC.index_select(0, pieces.keys_K), v_TGC.index_select(0, pieces.keys_K)
        most = (max(p.stop - p.start for p in pieces.all), max(p.last - p.first for p in pieces.all))
        bounds = pieces.query_bounds, pieces.key_bounds
        # causal for the last rows of the keys: the kernel aligns queries and keys at their ends
        return kernel(q_SHC, k_KGC, v_KGC, *bounds, *most, window_size=(-1, 0), enable_gqa=grouped)
    longest = max((p.last - p.first for p in pieces.all), default=0)
    above = torch.ones(STRIP, longest, dtype=torch.bool, device=q_SHC.device).triu_(longest - STRIP + 1)
    mask = torch.zeros(STRIP, longest, dtype=q_SHC.dtype, device=q_SHC.device).masked_fill_(above, float("-inf"))
    out = [
        _strip(q_SHC, k_TGC, v_TGC, piece, start, min(start + STRIP, piece.stop), grouped, mask)
        for piece in pieces.all
        for start in range(piece.start, piece.stop, STRIP)
    ]
    return torch.cat(out)


def _strip(
    q_SHC: Tensor, k_TGC: Tensor, v_TGC: Tensor, piece: Piece, start: int, stop: int, grouped: bool, mask: Tensor
) -> Tensor:
    """Queries [start, stop) of a piece, [stop - start, H, C]. `mask` is of STRIP queries, whose last sees all keys.

    Its corner is a view: a mask of its own for each strip would be kept for backward, T^2 of them in all.
    """
    last = piece.last - (piece.stop - stop)
    q, k, v = (
        x.transpose(0, 1).unsqueeze(0) for x in (q_SHC[start:stop], *(x[piece.first : last] for x in (k_TGC, v_TGC)))
    )
    queries, keys = stop - start, last - piece.first
    seen = mask[STRIP - queries :, mask.shape[1] - keys :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)[0].transpose(0, 1)
