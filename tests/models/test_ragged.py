"""Attention of stretches of a pack to all of its keys against attention of the whole pack."""

from __future__ import annotations

import pytest
import torch

from models.layers.attention import attend, make_segments
from models.layers.ragged import STRIP, attend_pieces, make_pieces


@pytest.mark.parametrize(
    ("lengths", "stretches"),
    [
        ((40,), ((0, 10), (30, 40))),
        ((5, 1, 20, 14), ((8, 16), (24, 32))),  # within a document, and over bounds
        ((STRIP * 3 + 7, 50), ((0, 300), (500, 825))),  # several strips, the last one short
        ((STRIP, STRIP), ((STRIP, 2 * STRIP),)),
    ],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_stretches_are_rows_of_the_whole(
    lengths: tuple[int, ...], stretches: tuple[tuple[int, int], ...], groups: int
) -> None:
    torch.manual_seed(0)
    tokens, device = sum(lengths), torch.device("cpu")
    q_THC = torch.randn(tokens, 4, 8, requires_grad=True)
    k_TGC, v_TGC = (torch.randn(tokens, groups, 8, requires_grad=True) for _ in range(2))
    rows_S = torch.cat([torch.arange(*stretch) for stretch in stretches])
    whole = attend(q_THC, k_TGC, v_TGC, make_segments(lengths, device), causal=True)[rows_S]
    part = attend_pieces(q_THC[rows_S], k_TGC, v_TGC, make_pieces(stretches, lengths, device))
    torch.testing.assert_close(part, whole)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum(), (q_THC, k_TGC, v_TGC))
    found = torch.autograd.grad((part * weights).sum(), (q_THC, k_TGC, v_TGC))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
