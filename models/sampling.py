"""Choosing the next token from logits: penalise repeats, cool, cut to the likeliest, draw.

    logits [N, V] --repetition penalty--> --temperature--> --top-k--> --top-p--> softmax --draw--> ids [N]

The order is transformers'. A temperature of 0 takes the likeliest. Cost: a sort of the vocabulary where top_p is
below 1, else a top-k. Letters: N documents, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import require


@dataclass(frozen=True)
class Sampling:
    """How to choose. `top_k` 0 and `top_p` 1 cut nothing; a `repetition_penalty` above 1 makes seen ids less likely."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Reject settings outside their ranges."""
        require(self.temperature >= 0, f"temperature must be 0 (greedy) or above, not {self.temperature}")
        require(self.top_k >= 0, f"top_k must be 0 (off) or above, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require(self.repetition_penalty > 0, f"repetition_penalty must be above 0, not {self.repetition_penalty}")

    def choose(
        self, logits_NV: Tensor, seen_NV: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Ids int64 [N] from logits [N, V]; `seen` bool [N, V] says which ids each document has had already."""
        logits_NV = logits_NV.float()
        if seen_NV is not None and self.repetition_penalty != 1:
            punished_NV = torch.where(
                logits_NV > 0, logits_NV / self.repetition_penalty, logits_NV * self.repetition_penalty
            )
            logits_NV = torch.where(seen_NV, punished_NV, logits_NV)
        if self.temperature == 0:
            return logits_NV.argmax(-1)
        logits_NV = logits_NV - logits_NV.amax(-1, keepdim=True)  # or the smallest temperatures would overflow
        probs_NV = kept(logits_NV / self.temperature, self.top_k, self.top_p).softmax(-1)
        return torch.multinomial(probs_NV, 1, generator=generator).squeeze(1)


def kept(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits with all but the `top_k` likeliest, and of these the fewest that reach `top_p` together, at -inf."""
    if 0 < top_k < logits_NV.shape[1]:
        least_N1 = logits_NV.topk(top_k, -1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if top_p < 1:
        sorted_NV, order_NV = logits_NV.sort(-1, descending=True)
        probs_NV = sorted_NV.softmax(-1)
        before_NV = probs_NV.cumsum(-1) - probs_NV  # the likeliest always stays
        beyond_NV = torch.zeros_like(before_NV, dtype=torch.bool).scatter(1, order_NV, before_NV >= top_p)
        logits_NV = logits_NV.masked_fill(beyond_NV, -torch.inf)
    return logits_NV
