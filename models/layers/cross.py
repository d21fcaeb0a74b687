"""Cross-attention over packed sequences: every token of a document sees all frames of that document and no others.

    q [T, H, C] of N documents, k and v [E, H, C] of the same N --gather by bucket--> [B, H, L, C] x [B, H, S, C]
      --SDPA, padding masked--> --back to pack order--> [T, H, C]

A document without frames attends to nothing and gets zeros. On a GPU in 16 bits torch's variable-length kernel runs on
the packs as they are. Elsewhere documents of like lengths share one batched call, as in models/layers/attention.py:
padding stays inside this file.

Cost: sum over documents of tokens times frames, one kernel call a bucket.

Letters: T tokens, E frames, N documents, B documents of a bucket, L most tokens of one, S most frames, H heads,
C head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.attention import varlen_kernel


@dataclass(frozen=True)
class Bucket:
    """Documents that share one kernel call: rows of the packs, int64, and which places hold a frame."""

    token_rows_BL: Tensor
    frame_rows_BS: Tensor
    heard_BS: Tensor | None  # bool; None where all do


@dataclass(frozen=True)
class Pairs:
    """How tokens and frames of a pack belong together, worked out once and shared by all layers.

    `back_T` says where each token lies after the buckets are laid end to end, a row of zeros behind them.
    """

    token_lengths: tuple[int, ...]
    frame_lengths: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    back_T: Tensor
    token_bounds: Tensor  # int32 [N + 1], for the variable-length kernel
    frame_bounds: Tensor


def make_pairs(token_lengths: Sequence[int], frame_lengths: Sequence[int], device: torch.device) -> Pairs:
    """Group documents of so many tokens and frames, either maybe 0, for `attend_across`."""
    tokens, frames = ([0, *accumulate(lengths)] for lengths in (token_lengths, frame_lengths))
    classes: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(zip(token_lengths, frame_lengths, strict=True)):
        if all(pair):
            classes.setdefault((_class_of(pair[0]), _class_of(pair[1])), []).append(index)
    buckets, places, offset = [], torch.full((tokens[-1],), -1), 0
    for members in classes.values():
        token_BL, asks_BL = _rows([tokens[i] for i in members], [token_lengths[i] for i in members])
        frame_BS, heard_BS = _rows([frames[i] for i in members], [frame_lengths[i] for i in members])
        places[token_BL[asks_BL]] = asks_BL.flatten().nonzero().squeeze(1) + offset
        offset += token_BL.numel()
        heard = None if bool(heard_BS.all()) else heard_BS.to(device)
        buckets.append(Bucket(token_BL.to(device), frame_BS.to(device), heard))
    back_T = torch.where(places < 0, offset, places).to(device)
    bounds = (torch.tensor(starts, dtype=torch.int32, device=device) for starts in (tokens, frames))
    return Pairs(tuple(token_lengths), tuple(frame_lengths), tuple(buckets), back_T, *bounds)


def _class_of(length: int) -> int:
    """Lengths of one class share a bucket: four classes per octave from 32 up."""
    step = 1 << max((length - 1).bit_length() - 3, 3)
    return -(-length // step) * step


def _rows(starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of a pack [B, longest], each document's last one repeated as padding, and which places are real."""
    start_B1, length_B1 = (torch.tensor(values, dtype=torch.int64).unsqueeze(1) for values in (starts, lengths))
    steps_L = torch.arange(max(lengths))
    return start_B1 + torch.minimum(steps_L, length_B1 - 1), steps_L < length_B1


def attend_across(q_THC: Tensor, k_EHC: Tensor, v_EHC: Tensor, pairs: Pairs) -> Tensor:
    """Scaled dot-product attention of each document's tokens over its frames, [T, H, C] -> [T, H, C]."""
    if not pairs.buckets:  # zeros, and gradients of zero rather than None
        return (q_THC + (k_EHC.sum() + v_EHC.sum())) * 0
    kernel = varlen_kernel() if q_THC.is_cuda and q_THC.dtype in (torch.bfloat16, torch.float16) else None
    if kernel is not None and all(pairs.token_lengths) and all(pairs.frame_lengths):
        bounds, most = (pairs.token_bounds, pairs.frame_bounds), (max(pairs.token_lengths), max(pairs.frame_lengths))
        return kernel(q_THC, k_EHC, v_EHC, *bounds, *most, window_size=(-1, -1))
    parts = []
    for bucket in pairs.buckets:
        q, k, v = (
            x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
            for x, rows in (
                (q_THC, bucket.token_rows_BL),
                (k_EHC, bucket.frame_rows_BS),
                (v_EHC, bucket.frame_rows_BS),
            )
        )
        mask = None if bucket.heard_BS is None else bucket.heard_BS[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        parts.append(out.transpose(1, 2).reshape(-1, *q_THC.shape[1:]))
    parts.append(q_THC.new_zeros(1, *q_THC.shape[1:]))
    return torch.cat(parts).index_select(0, pairs.back_T)
