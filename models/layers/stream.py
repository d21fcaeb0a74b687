"""What causal layers remember between the chunks of a stream.

    whole:   zeros ++ x                    --layer--> out
    stream:  the last columns before x ++ x --layer--> out, and the last columns of that for the next chunk

A layer that looks back `width` columns sees the same columns either way, so the joined chunks are the whole. Cost: a
copy of each chunk and `width` columns a layer, whatever the stream's past.

Letters: B streams in step, C channels, T columns (frames, samples).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Past:
    """Last input columns of every layer, and how many frames have gone by."""

    def __init__(self) -> None:
        self.frames = 0
        self._columns: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, x_BCT: Tensor, width: int, zeros: int) -> Tensor:
        """The columns before x, then x; keeps the last `width` for the next call. A stream starts with `zeros`."""
        before = self._columns.get(layer)
        if before is None:
            before = x_BCT.new_zeros(*x_BCT.shape[:2], zeros)
        joined = torch.cat([before, x_BCT], dim=2)
        self._columns[layer] = joined[:, :, max(joined.shape[2] - width, 0) :].clone()  # not a view of the whole chunk
        return joined


def with_past(layer: nn.Module, x_BCT: Tensor, width: int, past: Past | None, *, zeros: int | None = None) -> Tensor:
    """[B, C, T] -> [B, C, width + T]: `width` columns that `layer` sees before x. Before the start lie zeros.

    `zeros` other than `width` is how many columns of them there are.
    """
    zeros = width if zeros is None else zeros
    if past is not None and width:
        return past.extend(layer, x_BCT, width, zeros)
    return F.pad(x_BCT, (zeros, 0)) if zeros else x_BCT
