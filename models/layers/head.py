"""The output head, which can be applied by a function instead of a matmul.

A chunked cross-entropy needs the weight itself, and under ZeRO-3 a weight is whole only inside the forward of the
module that owns it. So the function comes to the weight: `lm_head(hidden_TD, loss)` returns `loss(hidden_TD,
weight_VD)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class LMHead(nn.Linear):
    """Hidden states [T, D] to logits [T, V], or to whatever `apply` makes of hidden states and weight [V, D]."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden_TD: Tensor, apply: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:  # type: ignore[override]
        """Return `apply(hidden_TD, weight_VD)`; logits by default."""
        return apply(hidden_TD, self.weight)
