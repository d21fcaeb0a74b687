"""Deal the packs of a step to ranks so that they carry equal work.

    work of each pack (attention is quadratic, encoders cost too) --longest processing time first--> packs of each rank

Cost: 1 us a pack.  Within a rank the heaviest comes first, so that the ranks' i-th micro-batches are alike as well.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Work:
    """What a sample costs, in units of one decoder token.

    The defaults are the FLOPs of Qwen3-Omni-30B-A3B: 3.04 G active weights, 48 layers of 32 heads of 128, and an
    audio encoder of 0.64 G weights at 13 tokens for 100 frames.  Only ratios matter, and those move little.
    """

    per_token: float = 1.0
    per_token_squared: float = 6.5e-5
    per_frame: float = 0.027

    def of(self, tokens: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """float64 work of samples with `tokens` decoder tokens and `frames` log-mel frames."""
        return (
            self.per_token * tokens
            + self.per_token_squared * np.square(tokens, dtype=np.float64)
            + (self.per_frame * frames)
        )


def deal(works: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Positions of the packs of each rank: at most ceil(packs / ranks) each, every pack at exactly one rank.

    Longest processing time first: the heaviest pack left goes to the least loaded rank that has room.
    """
    room = -(-len(works) // num_ranks)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for pack in sorted(range(len(works)), key=lambda pack: (-works[pack], pack)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(pack)
        if len(ranks[rank]) < room:
            heapq.heappush(loads, (load + works[pack], rank))
    return ranks
