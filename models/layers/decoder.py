"""One decoder layer: grouped-query attention with QK-norm and rotary positions, then a mixture of experts.

    x --norm--> attention --+--> norm --> MoE --+--> x        and the router's logits beside it
    x ----------------------'  ------------------'

Letters: T tokens, D hidden, H query heads, G key-value heads, C head_dim, E experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.config import TextConfig
from models.layers.attention import Segments, attend
from models.layers.cache import KVCache
from models.layers.moe import MoE, SharedMoE
from models.layers.norm import RMSNorm
from models.layers.rope import rotate
from models.layers.saving import Saves


class Attention(nn.Module):
    """Causal attention within documents."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, cos_TC: Tensor, sin_TC: Tensor, segments: Segments, cache: KVCache | None, layer: int
    ) -> Tensor:
        """[T, D] -> [T, D]. With a filled cache the T tokens are one per document."""
        q_THC, k_TGC, v_TGC = (
            proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_THC = rotate(self.q_norm(q_THC), cos_TC, sin_TC)
        k_TGC = rotate(self.k_norm(k_TGC), cos_TC, sin_TC)
        if cache is None:
            out_THC = attend(q_THC, k_TGC, v_TGC, segments, causal=True)
        else:
            decoding = cache.filled
            cache.store(layer, k_TGC, v_TGC)
            if decoding:
                out_THC = cache.attend(layer, q_THC)
            else:
                out_THC = attend(q_THC, k_TGC, v_TGC, segments, causal=True)
        return self.o_proj(out_THC.flatten(1))


class DecoderLayer(Saves):
    """Pre-norm residual layer."""

    def __init__(self, config: TextConfig, recompute_experts: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        shape = config.hidden_size, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
        shared = config.shared_expert_intermediate_size
        self.mlp = SharedMoE(*shape, shared, recompute_experts) if shared else MoE(*shape, recompute_experts)

    def forward(
        self, x_TD: Tensor, cos_TC: Tensor, sin_TC: Tensor, segments: Segments, cache: KVCache | None, layer: int
    ) -> tuple[Tensor, Tensor]:
        """[T, D] -> [T, D] and router logits float32 [T, E]."""
        attended_TD = self.self_attn(self.input_layernorm(x_TD), cos_TC, sin_TC, segments, cache, layer)
        x_TD = x_TD + attended_TD
        out_TD, logits_TE = self.saving.block(self.mlp, self.post_attention_layernorm(x_TD))
        return x_TD + out_TD, logits_TE
