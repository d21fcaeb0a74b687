"""Attention over packed sequences: every token sees its own segment and nothing else.

    q, k, v [T, H, C] --gather by bucket--> [N, H, L, C] --SDPA--> --back to pack order--> [T, H, C]

A segment is a document of the decoder or an 8-second window of the audio encoder. On GPU with 16-bit floats,
torch's variable-length kernel runs on the pack as it is. Elsewhere segments of like length share one batched call:
each is right-padded with copies of its own last token, so nothing of another document is ever read, not even a NaN.
Under the causal mask no real query sees padding; without it a key mask hides it. Padding stays inside this file and
below a quarter of the tokens of short segments; segments of LONG tokens and more run alone and unpadded.

Cost: sum of L^2 over segments, one kernel call per bucket.

Letters: T tokens of the pack, H query heads, G key-value heads, C head_dim, N segments of a bucket, L its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LONG = 512
STRIP, STRIPS_UP_TO = 64, 1536  # queries of a call of causal attention on a CPU, and the longest segment cut so


@dataclass(frozen=True)
class Bucket:
    """Segments that share one kernel call.

    `start` is set where there is one segment, which a slice of the pack serves; else `rows_NL` holds pack rows, int64.
    `real_NL` says which places hold a token, where not all do.
    """

    num: int
    longest: int
    start: int | None
    rows_NL: Tensor
    real_NL: Tensor | None


class Across(Protocol):
    """`size` ranks that hold a pack together, each as many of its tokens, in order of rank."""

    @property
    def size(self) -> int:
        """How many."""
        ...

    def attend(self, q_SHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, segments: Segments) -> Tensor:
        """Causal attention over the whole pack for the S tokens here, [S, H, C]."""
        ...


@dataclass(frozen=True)
class Segments:
    """How a pack divides, worked out once per forward and shared by all layers.

    `back_T` says where each token lies after the buckets are laid end to end; None where they are in order already.
    `across` is set where several ranks hold the pack together: queries, keys and values are of the tokens here.
    """

    lengths: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    back_T: Tensor | None
    bounds: Tensor  # int32 [segments + 1], for the variable-length kernel
    across: Across | None = None


def _class_of(length: int, index: int) -> tuple[int, int]:
    """Segments of one class share a bucket: four classes per octave from 64 up, and long ones alone."""
    if length >= LONG:
        return LONG, index
    step = 1 << max((length - 1).bit_length() - 3, 3)
    return -(-length // step) * step, 0


def make_segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """Group segments, in pack order and each at least one token long, for `attend`."""
    starts = [0, *accumulate(lengths)]
    classes: dict[tuple[int, int], list[int]] = {}
    for index, length in enumerate(lengths):
        classes.setdefault(_class_of(length, index), []).append(index)
    buckets, places, offset = [], [], 0
    for members in classes.values():
        start_N1 = torch.tensor([starts[i] for i in members]).unsqueeze(1)
        length_N1 = torch.tensor([lengths[i] for i in members]).unsqueeze(1)
        longest = max(lengths[i] for i in members)
        steps_L = torch.arange(longest)
        real_NL, rows_NL = steps_L < length_N1, start_N1 + torch.minimum(steps_L, length_N1 - 1)
        places.append(torch.stack([rows_NL[real_NL], real_NL.flatten().nonzero().squeeze(1) + offset]))
        offset += rows_NL.numel()
        real_NL = None if bool(real_NL.all()) else real_NL.to(device)
        start = starts[members[0]] if len(members) == 1 else None
        buckets.append(Bucket(len(members), longest, start, rows_NL.to(device), real_NL))
    bounds = torch.tensor(starts, dtype=torch.int32, device=device)
    if all(bucket.num == 1 for bucket in buckets):
        return Segments(tuple(lengths), tuple(buckets), None, bounds)
    rows_T, place_T = torch.cat(places, dim=1)
    back_T = torch.empty_like(place_T).index_copy_(0, rows_T, place_T)
    return Segments(tuple(lengths), tuple(buckets), back_T.to(device), bounds)


def attend(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, segments: Segments, *, causal: bool) -> Tensor:
    """Scaled dot-product attention within segments; heads of keys and values are shared by H / G query heads.

    q [T, H, C], k and v [T, G, C] in one float dtype -> [T, H, C]. T may be 0.
    """
    if segments.across is not None:
        return segments.across.attend(q_THC, k_TGC, v_TGC, segments)
    if not segments.lengths:
        return q_THC + (k_TGC.sum() + v_TGC.sum())  # empty, and gradients are zero rather than None
    if (
        q_THC.is_cuda
        and q_THC.dtype in (torch.bfloat16, torch.float16)
        and (varlen_attn := varlen_kernel()) is not None
    ):
        bounds, longest = segments.bounds, max(segments.lengths)
        window = (-1, 0) if causal else (-1, -1)
        grouped = q_THC.shape[1] != k_TGC.shape[1]
        return varlen_attn(
            q_THC, k_TGC, v_TGC, bounds, bounds, longest, longest, window_size=window, enable_gqa=grouped
        )  # pyright: ignore[reportReturnType]
    parts = [_attend_bucket(q_THC, k_TGC, v_TGC, bucket, causal) for bucket in segments.buckets]
    out_THC = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out_THC if segments.back_T is None else out_THC.index_select(0, segments.back_T)


def varlen_kernel() -> Any:
    """torch's kernel for packed sequences, CUDA only; None in older releases. Imported late: it takes seconds."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _attend_bucket(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, bucket: Bucket, causal: bool) -> Tensor:
    """[T, ...] inputs -> [N L, H, C], padding included."""
    q, k, v = (_gathered(x, bucket) for x in (q_THC, k_TGC, v_TGC))
    grouped = q.shape[1] != k.shape[1]
    strips = causal and q.device.type == "cpu" and q.dtype is torch.float32  # bf16 is slower in strips
    if strips and STRIP < bucket.longest <= STRIPS_UP_TO:
        out = _causal_in_strips(q, k, v, grouped)
    else:
        mask = None if causal or bucket.real_NL is None else bucket.real_NL[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(bucket.num * bucket.longest, *q_THC.shape[1:])


def _causal_in_strips(q_NHLC: Tensor, k_NGLC: Tensor, v_NGLC: Tensor, grouped: bool) -> Tensor:
    """Causal attention, STRIP queries at a time against the keys up to them, [N, H, L, C].

    torch's CPU kernel walks keys in blocks of 512 and computes those above the diagonal too: 1.5 times the work at
    1,024 tokens. Measured there: a fifth faster, forward and backward; from 2,048 the strips' key gradients cost more.
    """
    longest, parts = q_NHLC.shape[2], []
    above = torch.ones(STRIP, longest, dtype=torch.bool).triu_(longest - STRIP + 1)  # of the last strip
    mask = torch.zeros(STRIP, longest, dtype=q_NHLC.dtype).masked_fill_(above, float("-inf"))
    for start in range(0, longest, STRIP):
        stop = min(start + STRIP, longest)
        k, v, queries = k_NGLC[:, :, :stop], v_NGLC[:, :, :stop], stop - start
        bias = mask[STRIP - queries :, longest - stop :]
        parts.append(F.scaled_dot_product_attention(q_NHLC[:, :, start:stop], k, v, attn_mask=bias, enable_gqa=grouped))
    return torch.cat(parts, dim=2)


def _gathered(x_THC: Tensor, bucket: Bucket) -> Tensor:
    """[T, H, C] -> [N, H, L, C]."""
    if bucket.start is None:
        rows = x_THC.index_select(0, bucket.rows_NL.flatten())
    else:
        rows = x_THC[bucket.start : bucket.start + bucket.longest]
    return rows.view(bucket.num, bucket.longest, *x_THC.shape[1:]).transpose(1, 2)
