"""Code predictor: the residual codes of a speech frame from the Talker's hidden state and the frame's first code.

    position     0        1        2        ...    G-1
    input     hidden   embed c0  embed c1   ...  embed c(G-2)      [N, G, D]
                 '-------- causal layers, norm --------'
    head                 lm_head.0  lm_head.1  ... lm_head.(G-2)
    predicts                c1         c2      ...   c(G-1)

A dense decoder over the G positions of a frame; frames do not see each other. Training knows all codes, so one
causal pass serves all heads; bench/code_predictor.py measures it against a pass per codebook. The hidden state is
that of the position which predicted the frame. The last code is never fed here, but its embedding belongs to the sum
that the Talker reads. c0 is embedded by the Talker.

Cost: G positions per frame, 16 in the released model, so that its 79 M parameters cost more than the Talker's
backbone. Decoding: G - 1 steps per frame, all documents together, keys and values kept for the frame.

Letters: N frames, G codes of a frame, R = G - 1 residual codes, S positions of a call, D hidden, H query heads,
K key-value heads, C head_dim, V codes of a codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.head import LMHead
from models.layers.moe import SwiGLU
from models.layers.norm import RMSNorm
from models.layers.rope import angles, rotate
from models.layers.saving import Saves
from models.omni_config import CodePredictorConfig

Choose = Callable[[Tensor], Tensor]  # logits [N, V] -> ids int64 [N]
Past = tuple[Tensor, Tensor]  # keys and values [N, K, G, C] of a layer


class FrameAttention(nn.Module):
    """Causal attention among the positions of each frame, with QK-norm and rotary positions."""

    def __init__(self, config: CodePredictorConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x_NSD: Tensor, cos_SC: Tensor, sin_SC: Tensor, past: Past | None, start: int) -> Tensor:
        """[N, S, D] -> [N, S, D]; the positions are `start` and on. After `past`, which is added to, S is 1."""
        q, k, v = (proj(x_NSD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos_SC, sin_SC), rotate(self.k_norm(k), cos_SC, sin_SC)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        stop = start + x_NSD.shape[1]
        if past is not None:
            for kept, new in zip(past, (k, v), strict=True):
                kept[:, :, start:stop] = new
            k, v = (kept[:, :, :stop] for kept in past)
        grouped = q.shape[1] != k.shape[1]
        out_NHSC = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0, enable_gqa=grouped)
        return self.o_proj(out_NHSC.transpose(1, 2).flatten(2))


class FrameLayer(nn.Module):
    """Pre-norm residual layer, dense."""

    def __init__(self, config: CodePredictorConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = FrameAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x_NSD: Tensor, cos_SC: Tensor, sin_SC: Tensor, past: Past | None, start: int) -> Tensor:
        """As FrameAttention.forward."""
        x_NSD = x_NSD + self.self_attn(self.input_layernorm(x_NSD), cos_SC, sin_SC, past, start)
        return x_NSD + self.mlp(self.post_attention_layernorm(x_NSD))


class FrameDecoder(Saves):
    """The predictor without its heads. In the released shapes its layers keep most of what a Talker's step keeps."""

    def __init__(self, config: CodePredictorConfig) -> None:
        super().__init__()
        self.config = config
        embeddings = (nn.Embedding(config.vocab_size, config.hidden_size) for _ in range(config.num_code_groups - 1))
        self.codec_embedding = nn.ModuleList(embeddings)
        self.layers = nn.ModuleList(FrameLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_NSD: Tensor, past: list[Past] | None = None, start: int = 0) -> Tensor:
        """Positions `start` and on: [N, S, D] -> after the norm [N, S, D]."""
        config = self.config
        steps_S = torch.arange(start, start + x_NSD.shape[1], device=x_NSD.device, dtype=torch.float32)
        turns = angles(steps_S.expand(3, -1), config.head_dim, config.rope_theta, (config.head_dim // 2, 0, 0))
        cos_SC, sin_SC = (turn_SC.to(x_NSD.dtype) for turn_SC in turns)
        for index, layer in enumerate(self.layers):
            kept = None if past is None else past[index]
            x_NSD = self.saving.layer(partial(layer, cos_SC=cos_SC, sin_SC=sin_SC, past=kept, start=start), x_NSD)
        return self.norm(x_NSD)


class CodePredictor(nn.Module):
    """Residual codes of frames. Weights are unset until an initialisation or a load."""

    def __init__(self, config: CodePredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.model = FrameDecoder(config)
        heads = (LMHead(config.hidden_size, config.vocab_size) for _ in range(config.num_code_groups - 1))
        self.lm_head = nn.ModuleList(heads)

    def forward(self, hidden_ND: Tensor, first_ND: Tensor, residual_RN: Tensor) -> Tensor:
        """Teacher forcing: hidden states [N, R, D], of which number r is what `lm_head[r]` reads.

        hidden [N, D] of the positions that predicted the frames; first [N, D], the Talker's embeddings of their first
        codes; residual int64 [R, N], all residual codes (the last row is not looked at). N may be 0.
        """
        fed_RND = [
            embed(code_N) for embed, code_N in zip(self.model.codec_embedding[:-1], residual_RN[:-1], strict=True)
        ]
        return self.model(torch.stack([hidden_ND, first_ND, *fed_RND], dim=1))[:, 1:]

    def logits(self, states_NRD: Tensor) -> Tensor:
        """What `forward` returns -> logits [N, R, V] of all residual codes."""
        return torch.stack([head(states_NRD[:, r]) for r, head in enumerate(self.lm_head)], dim=1)

    def embed(self, residual_RN: Tensor) -> Tensor:
        """Sum of the embeddings of all residual codes of each frame: int64 [R, N] -> [N, D]."""
        parts = [embed(code_N) for embed, code_N in zip(self.model.codec_embedding, residual_RN, strict=True)]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def predict(self, hidden_ND: Tensor, first_ND: Tensor, choose: Choose) -> Tensor:
        """Decode one frame for each of N documents: residual codes int64 [N, R].

        hidden and first as in `forward`; `choose(logits [N, V]) -> ids [N]` picks each code in turn.
        """
        config, codes = self.config, []
        shape = len(hidden_ND), config.num_key_value_heads, config.num_code_groups, config.head_dim
        past = [(hidden_ND.new_empty(shape), hidden_ND.new_empty(shape)) for _ in self.model.layers]
        x_NSD, start = torch.stack([hidden_ND, first_ND], dim=1), 0
        for r, head in enumerate(self.lm_head):
            states_NSD = self.model(x_NSD, past, start)
            codes.append(choose(head(states_NSD[:, -1])))
            start += x_NSD.shape[1]
            if r + 1 < len(self.lm_head):
                x_NSD = self.model.codec_embedding[r](codes[-1]).unsqueeze(1)
        return torch.stack(codes, dim=1)
