"""Position ids of packed documents.

Text and audio advance all three axes by one per token (one audio token is a thirteenth of a second), so a document
of both counts 0, 1, 2, ... on each axis. Images and video, which part the axes, come with their encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def text_audio_positions(doc_lengths: Sequence[int]) -> Tensor:
    """Documents of `doc_lengths` tokens, text and audio only -> float32 [3, T], restarting at 0 in each."""
    parts = [torch.arange(length, dtype=torch.float32) for length in doc_lengths]
    return torch.cat([torch.empty(0), *parts]).expand(3, -1).contiguous()
