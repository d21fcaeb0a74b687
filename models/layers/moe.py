"""Mixture-of-experts block: route every token to its top-k experts, add up what they say.

    x [T, D] --gate, fp32--> logits [T, E] --top-k, softmax over the chosen--> weights [T, K] --experts--> [T, D]

The softmax over the chosen logits equals the softmax over all experts, cut to the top k and renormalised. The child
names gate, experts.gate_up_proj, experts.down_proj and experts.num_experts are what DeepSpeed's AutoEP looks for
when it puts its own expert-parallel block in this one's place, so both take [..., D] and return (out, logits).

The Talker's block adds an expert that every token passes, scaled by a sigmoid of its own gate.

Letters: T tokens, D hidden, E experts, K chosen experts per token, F width of a dense layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.experts import Experts


class _Linear32(torch.autograd.Function):
    """x @ weight^T in fp32, keeping x as it is: autograd alone would keep an fp32 copy of a 16-bit x."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return x_TD.float() @ weight_ED.float().t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        return (grad_TE @ weight_ED.float()).to(x_TD.dtype), (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)


def linear32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x [T, D] of any float dtype, weight [E, D] -> float32 [T, E]."""
    return _Linear32.apply(x_TD, weight_ED)


class Gate(nn.Module):
    """The router's linear map, in fp32 whatever the model's dtype."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """x [T, D] -> router logits float32 [T, E]."""
        return linear32(x_TD, self.weight)


class MoE(nn.Module):
    """Sparse feed-forward block with softmax top-k routing."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, width: int, recompute: bool = False) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = Gate(num_experts, hidden_size)
        self.experts = Experts(num_experts, hidden_size, width, recompute)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> output of the same shape, and router logits float32 [T, E] with T the product of the rest."""
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = self.gate(x_TD)
        best_TK, chosen_TK = logits_TE.topk(self.top_k, dim=-1, sorted=False)
        return self.experts(x_TD, chosen_TK, best_TK.softmax(-1)).view_as(x), logits_TE


class SwiGLU(nn.Module):
    """Dense gated layer: D -> F -> D without biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SharedMoE(MoE):
    """The sparse block beside one expert of `shared_width` that all tokens share."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        width: int,
        shared_width: int,
        recompute: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, width, recompute)
        self.shared_expert = SwiGLU(hidden_size, shared_width)
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As MoE.forward."""
        out, logits_TE = super().forward(x)
        return out + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x), logits_TE
