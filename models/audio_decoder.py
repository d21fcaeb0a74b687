"""The text decoder that an audio encoder learns with: it writes what it is asked to about the clips it hears.

    frames [E, S] --norm--> values                        of each document's clips, end to end
                    '--+ sinusoids of their place in the document--> keys
    token ids --embed_tokens x sqrt(D)--> [T, D] --layers: causal self-attention, cross-attention to the document's
      frames, SwiGLU--> norm --> [T, D] --embed_tokens again, or lm_head--> next token

The attention encoder-decoder of AuT (Qwen3-Omni report, section 2.2), whose decoder is not published: pre-norm, QK-norm
and rotary positions as in the Thinker, dense layers. The encoder's own positions start anew every second, so a key is
also told where in its document it is. A document without clips is a plain language model's. Documents are packed end to
end without padding. Every parameter gets a gradient from every batch, zero where it has no tokens or no frames.

Cost per token: models/flops.py; keys and values of all frames once a layer.

Letters: T text tokens of a pack, N documents, E frames (audio tokens) of all of them, S width of a frame, D hidden,
H heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.audio_encoder import sinusoids
from models.config import AudioDecoderConfig
from models.layers.attention import Segments, attend, make_segments
from models.layers.cache import KVCache
from models.layers.cross import Pairs, attend_across, make_pairs
from models.layers.head import LMHead
from models.layers.moe import SwiGLU
from models.layers.norm import RMSNorm
from models.layers.rope import angles, rotate

Turns = tuple[Tensor, Tensor]  # cos and sin [T, C] of models.layers.rope


@dataclass(frozen=True)
class Heard:
    """What the tokens of a forward attend to across."""

    frames_ES: Tensor  # values' source
    placed_ES: Tensor  # keys' source
    pairs: Pairs
    kept: dict[int, tuple[Tensor, Tensor]] | None  # keys and values by layer, where they are needed again


@dataclass
class TextCache:
    """Keys and values of past tokens and of frames, for generation."""

    past: KVCache
    frames: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class WordEmbedding(nn.Embedding):
    """Embedding and, where they are tied, output head: one weight, so that it comes to both (models/layers/head.py)."""

    def forward(self, input: Tensor, apply: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Ids [T] -> [T, D]; with `apply`, hidden states [T, D] -> `apply(hidden_TD, weight_VD)`."""
        return super().forward(input) if apply is None else apply(input, self.weight)


class SelfAttention(nn.Module):
    """Causal attention within documents."""

    def __init__(self, config: AudioDecoderConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x_TD: Tensor, turns: Turns, segments: Segments, past: KVCache | None, layer: int) -> Tensor:
        """[T, D] -> [T, D]. With a filled `past` the T tokens are one per document."""
        q, k, v = (proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *turns), rotate(self.k_norm(k), *turns)
        decoding = past is not None and past.filled
        if past is not None:
            past.store(layer, k, v)
        out_THC = past.attend(layer, q) if past is not None and decoding else attend(q, k, v, segments, causal=True)
        return self.o_proj(out_THC.flatten(1))


class CrossAttention(nn.Module):
    """Attention of a document's tokens to its frames."""

    def __init__(self, config: AudioDecoderConfig, source: int) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(source, width, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x_TD: Tensor, heard: Heard, layer: int) -> Tensor:
        """[T, D] -> [T, D]."""
        q_THC = self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        found = None if heard.kept is None else heard.kept.get(layer)
        if found is None:
            k_EHC = self.k_norm(self.k_proj(heard.placed_ES).unflatten(-1, (-1, self.head_dim)))
            found = k_EHC, self.v_proj(heard.frames_ES).unflatten(-1, (-1, self.head_dim))
            if heard.kept is not None:
                heard.kept[layer] = found
        return self.o_proj(attend_across(q_THC, *found, heard.pairs).flatten(1))


class AudioDecoderLayer(nn.Module):
    """Pre-norm residual layer."""

    def __init__(self, config: AudioDecoderConfig, source: int) -> None:
        super().__init__()
        norms = (RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3))
        self.input_layernorm, self.cross_layernorm, self.post_layernorm = norms
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config, source)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_TD: Tensor, turns: Turns, segments: Segments, heard: Heard, past: KVCache | None, layer: int
    ) -> Tensor:
        """[T, D] -> [T, D]."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), turns, segments, past, layer)
        x_TD = x_TD + self.cross_attn(self.cross_layernorm(x_TD), heard, layer)
        return x_TD + self.mlp(self.post_layernorm(x_TD))


class AudioDecoder(nn.Module):
    """Text tokens and frames of packed documents to hidden states. Weights are unset until an init or a load."""

    def __init__(self, config: AudioDecoderConfig, vocab_size: int, source: int) -> None:
        """`source` is the width of a frame."""
        super().__init__()
        self.config = config
        self.embed_tokens = WordEmbedding(vocab_size, config.hidden_size)
        self.audio_norm = RMSNorm(source, config.rms_norm_eps)
        self.layers = nn.ModuleList(AudioDecoderLayer(config, source) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else LMHead(config.hidden_size, vocab_size)

    def forward(
        self,
        token_ids_T: Tensor,
        doc_lengths: Sequence[int],
        frames_ES: Tensor,
        frame_lengths: Sequence[int],
        cache: TextCache | None = None,
    ) -> Tensor:
        """One pack -> hidden states after the final norm [T, D], which `head` reads.

        token_ids int64 [T]; doc_lengths sum to T, and any may be 0 but in a cache; frames [E, S], `frame_lengths` of
        each document. With a filled `cache` the T tokens are one more for each of its documents, and frames are not
        looked at.
        """
        config, device = self.config, token_ids_T.device
        past = None if cache is None else cache.past
        if past is not None and past.filled:
            place_T = past.lengths_N - 1
        else:
            place_T = _places(doc_lengths, device)
        x_TD = self.embed_tokens(token_ids_T) * config.hidden_size**0.5  # a head's weights are that much smaller
        head_dim = config.hidden_size // config.num_attention_heads
        places_3T = place_T.float().expand(3, -1)
        turned = angles(places_3T, head_dim, config.rope_theta, (head_dim // 2, 0, 0))
        turns = turned[0].to(x_TD.dtype), turned[1].to(x_TD.dtype)
        segments = make_segments([length for length in doc_lengths if length], device)
        heard = self._heard(doc_lengths, frames_ES.to(x_TD.dtype), frame_lengths, cache)
        for index, layer in enumerate(self.layers):
            x_TD = layer(x_TD, turns, segments, heard, past, index)
        return self.norm(x_TD)

    def head(self, hidden_TD: Tensor, apply: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        """`apply(hidden_TD, weight_VD)`: logits by default."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head)(hidden_TD, apply)

    def _heard(
        self, doc_lengths: Sequence[int], frames_ES: Tensor, frame_lengths: Sequence[int], cache: TextCache | None
    ) -> Heard:
        pairs, kept = make_pairs(doc_lengths, frame_lengths, frames_ES.device), None if cache is None else cache.frames
        if kept:
            return Heard(frames_ES, frames_ES, pairs, kept)
        frames_ES = self.audio_norm(frames_ES)
        table_FS = sinusoids(max(frame_lengths, default=0), frames_ES.shape[1], frames_ES.device)
        placed_ES = frames_ES + table_FS.to(frames_ES.dtype).index_select(0, _places(frame_lengths, frames_ES.device))
        return Heard(frames_ES, placed_ES, pairs, kept)


def _places(lengths: Sequence[int], device: torch.device) -> Tensor:
    """0, 1, ... within each of the stretches, int64 [sum of lengths]."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *map(torch.arange, lengths)]).to(device)
