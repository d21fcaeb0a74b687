"""The Thinker: text tokens and speech in, hidden states of the next text token out.

    mel --audio_tower--> features ------.
    token ids --embed_tokens--> [T, D] --+ features in the placeholders' rows --> layers --> norm --> hidden [T, D]
                                                                    '--> router logits per layer [T, E]

Documents are packed end to end without padding; attention stays within each. `lm_head` is a child that the loss
calls on pieces of the hidden states, so that full logits never exist. Children carry the released checkpoint's
names under `thinker.`; experts alone are fused (models/hf.py). Every parameter gets a gradient from every batch,
zero where the batch has no tokens or no audio: ranks of a sharded engine must enter the same modules in the same
order.

Cost per token: models/flops.py. Letters: T tokens, D hidden, E experts, C head_dim, F mel frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.audio_encoder import AudioEncoder
from models.config import TextConfig, ThinkerConfig
from models.layers.attention import make_segments
from models.layers.cache import KVCache
from models.layers.decoder import DecoderLayer
from models.layers.head import LMHead
from models.layers.norm import RMSNorm
from models.layers.rope import angles


class Decoder(nn.Module):
    """The language model without its head."""

    def __init__(self, config: TextConfig, recompute_experts: bool) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, recompute_experts) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        token_ids_T: Tensor,
        position_ids_3T: Tensor,
        doc_lengths: Sequence[int],
        places_T: Tensor,
        features_TD: Tensor,
        cache: KVCache | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Embeds, puts `features` in the rows `places`, runs the layers: hidden [T, D] and router logits per layer."""
        x_TD = self.embed_tokens(token_ids_T)
        x_TD = x_TD.index_copy(0, places_T, features_TD.to(x_TD.dtype))
        config = self.config
        turns = angles(position_ids_3T, config.head_dim, config.rope_theta, config.mrope_section)
        cos_TC, sin_TC = (turn_TC.to(x_TD.dtype) for turn_TC in turns)
        segments = make_segments(doc_lengths, x_TD.device)
        router_logits = []
        for index, layer in enumerate(self.layers):
            x_TD, logits_TE = layer(x_TD, cos_TC, sin_TC, segments, cache, index)
            router_logits.append(logits_TE)
        return self.norm(x_TD), tuple(router_logits)


class Thinker(nn.Module):
    """Audio encoder and mixture-of-experts decoder. Weights are unset until models.init.init_weights or a load."""

    def __init__(self, config: ThinkerConfig, recompute_experts: bool = False) -> None:
        """`recompute_experts` keeps no activations of the experts for backward (a quarter more GEMM work there)."""
        super().__init__()
        self.config = config
        self.audio_tower = AudioEncoder(config.audio)
        self.model = Decoder(config.text, recompute_experts)
        self.lm_head = LMHead(config.text.hidden_size, config.text.vocab_size)

    def forward(
        self,
        token_ids_T: Tensor,
        position_ids_3T: Tensor,
        doc_lengths: Sequence[int],
        mel_FM: Tensor,
        mel_lengths: Sequence[int],
        cache: KVCache | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One pack of documents -> hidden states after the final norm [T, D], router logits float32 [T, E] per layer.

        token_ids int64 [T]; position_ids float32 [3, T]; doc_lengths sum to T; mel float32 [F, M], clips in the order
        of their runs of placeholders, mel_lengths frames each. T = 0 and no clips are both fine. With a filled `cache`
        the T tokens are one more for each of its documents. Raises ValueError where counts disagree.
        """
        if sum(doc_lengths) != len(token_ids_T) or min(doc_lengths, default=1) < 1:
            raise ValueError(
                f"doc_lengths {list(doc_lengths)} must be positive and sum to the {len(token_ids_T)} tokens"
            )
        features_TD = self.audio_tower(mel_FM, mel_lengths)
        places_T = (token_ids_T == self.config.audio_token_id).nonzero().squeeze(1)
        if len(places_T) != len(features_TD):
            raise ValueError(
                f"{len(places_T)} audio placeholders in the tokens, but {len(features_TD)} audio tokens from "
                f"{len(mel_lengths)} clips; they must be equal"
            )
        return self.model(token_ids_T, position_ids_3T, doc_lengths, places_T, features_TD, cache)
