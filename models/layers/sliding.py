"""Causal attention in a sliding window: a query sees its own frame and the W - 1 before it.

    q [B, T, H, C] --cut--> [N, B H, Q, C]             N blocks of Q = min(W, T) queries
    k, v [B, G C, T] --W - 1 frames of the past in front, overlapping cuts--> [N, B G, Q + W - 1, C]
      --SDPA, banded mask--> [B, T, H, C]

Cost: 2 W - 1 keys for each query, half of them hidden by the mask; time and memory are linear in T. One frame of a
stream: one query, W keys.

Letters: B batch, T frames, D hidden size, H query heads, G key-value heads, C head_dim, E = G C, W window, N blocks,
Q queries and K keys of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.rope import rotate
from models.layers.stream import Past, with_past


def sliding_mask(num_frames: int, window: int, frames_before: int, device: torch.device) -> Tensor:
    """Which keys of its block a query sees: bool [N, 1, Q, K], for all layers. Needs a frame at least.

    `frames_before` is how much of the past is real; the rest of W - 1 is padding.
    """
    queries = min(window, num_frames)
    starts_N11 = torch.arange(0, num_frames, queries, device=device)[:, None, None]
    query_Q1 = torch.arange(queries, device=device).unsqueeze(1)
    key_K = torch.arange(queries + window - 1, device=device) - (window - 1)  # 0 is the block's first frame
    in_band_QK = (key_K <= query_Q1) & (key_K > query_Q1 - window)
    return (in_band_QK & (key_K + starts_N11 + frames_before >= 0)).unsqueeze(1)


class SlidingAttention(nn.Module):
    """Grouped-query attention without norms or biases."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, window: int) -> None:
        super().__init__()
        self.head_dim, self.window = hidden_size // num_heads, window
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, mask_N1QK: Tensor, past: Past | None) -> Tensor:
        """[B, T, D] -> [B, T, D], with the `angles` of the frames and their `sliding_mask`. T is 1 or more."""
        batch, frames = x_BTD.shape[:2]
        q_BTHC, k_BTGC, v_BTGC = (
            proj(x_BTD).unflatten(2, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHC, k_BTGC = rotate(q_BTHC, cos_TC, sin_TC), rotate(k_BTGC, cos_TC, sin_TC)
        num_blocks, _, queries, _ = mask_N1QK.shape
        missing = num_blocks * queries - frames  # queries of the last block that are not there
        q = F.pad(q_BTHC, (0, 0, 0, 0, 0, missing)).unflatten(1, (num_blocks, queries)).permute(1, 0, 3, 2, 4)
        k, v = (
            self._windows(proj, x_BTGC, queries, missing, past)
            for proj, x_BTGC in ((self.k_proj, k_BTGC), (self.v_proj, v_BTGC))
        )
        grouped = q_BTHC.shape[2] != k_BTGC.shape[2]
        out = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, attn_mask=mask_N1QK, enable_gqa=grouped)
        out_BTD = out.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
        return self.o_proj(out_BTD[:, :frames])

    def _windows(self, proj: nn.Module, x_BTGC: Tensor, queries: int, missing: int, past: Past | None) -> Tensor:
        """Keys or values [B, T, G, C] -> those that each block of queries may see [N, B G, K, C]."""
        x_BET = with_past(proj, x_BTGC.flatten(2).transpose(1, 2), self.window - 1, past)
        windows_BENK = F.pad(x_BET, (0, missing)).unfold(2, queries + self.window - 1, queries)
        return windows_BENK.unflatten(1, x_BTGC.shape[2:]).permute(3, 0, 1, 4, 2).flatten(1, 2)
