"""The Talker: text and multimodal context in, speech codes out, one frame of 80 ms per position.

    Thinker's token embeddings --text_projection---.
    Thinker's hidden states --hidden_projection----+-- models/talker_inputs.py --> inputs [T, D]
    codes of earlier frames --embed_frames---------'
    inputs --MoE layers with a shared expert, norm--> hidden [T, D] --codec_head--> first code of the next frame
                                                           '--code_predictor--> its residual codes

Documents are packed end to end without padding; attention stays within each. Children carry the released
checkpoint's names under `talker.`; experts alone are fused. Every parameter gets a gradient from every batch, zero
where the batch has no tokens, no frames or no multimodal context.

Cost per token: the shared expert and six experts of 128 in the released model; per frame the code predictor's 16
positions. Letters: T tokens, N frames, G codes of a frame, D hidden, H hidden of the Thinker, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.code_predictor import Choose, CodePredictor
from models.config import TextConfig
from models.layers.attention import make_segments
from models.layers.cache import KVCache
from models.layers.decoder import DecoderLayer
from models.layers.head import LMHead
from models.layers.norm import RMSNorm
from models.layers.rope import angles
from models.layers.saving import Saves
from models.omni_config import TalkerConfig


class ResizeMLP(nn.Module):
    """From the Thinker's width to the Talker's: [T, H] -> [T, D]."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.thinker_hidden_size, config.thinker_hidden_size)
        self.linear_fc2 = nn.Linear(config.thinker_hidden_size, config.text.hidden_size)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, D]."""
        return self.linear_fc2(F.silu(self.linear_fc1(x_TH)))


class CodecDecoder(Saves):
    """The backbone without its head. `codec_embedding` is called by those who build its inputs."""

    def __init__(self, config: TextConfig, recompute_experts: bool) -> None:
        super().__init__()
        self.config = config
        self.codec_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, recompute_experts) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, position_ids_3T: Tensor, doc_lengths: Sequence[int], cache: KVCache | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As Talker.forward."""
        config = self.config
        wave = config.rope_theta, config.mrope_section, config.rope_scaling
        turns = angles(position_ids_3T, config.head_dim, *wave)
        cos_TC, sin_TC = (turn_TC.to(x_TD.dtype) for turn_TC in turns)
        segments = make_segments(doc_lengths, x_TD.device)
        router_logits = []
        for index, layer in enumerate(self.layers):
            run = partial(layer, cos_TC=cos_TC, sin_TC=sin_TC, segments=segments, cache=cache, layer=index)
            x_TD, logits_TE = self.saving.layer(run, x_TD)
            router_logits.append(logits_TE)
        return self.norm(x_TD), tuple(router_logits)


class Talker(nn.Module):
    """Decoder of speech codes. Weights are unset until an initialisation or a load."""

    def __init__(self, config: TalkerConfig, recompute_experts: bool = False) -> None:
        """`recompute_experts` keeps no activations of the experts for backward (a quarter more GEMM work there)."""
        super().__init__()
        self.config = config
        self.model = CodecDecoder(config.text, recompute_experts)
        self.text_projection = ResizeMLP(config)
        self.hidden_projection = ResizeMLP(config)
        self.codec_head = LMHead(config.text.hidden_size, config.text.vocab_size)
        self.code_predictor = CodePredictor(config.code_predictor)

    def forward(
        self,
        inputs_TD: Tensor,
        position_ids_3T: Tensor,
        doc_lengths: Sequence[int],
        cache: KVCache | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One pack of documents -> hidden states after the final norm [T, D], router logits float32 [T, E] per layer.

        inputs float [T, D] as models.talker_inputs makes them; position_ids float32 [3, T]; doc_lengths sum to T. With
        a filled `cache` the T rows are one more for each of its documents. Raises ValueError where counts disagree.
        """
        if sum(doc_lengths) != len(inputs_TD) or min(doc_lengths, default=1) < 1:
            raise ValueError(f"doc_lengths {list(doc_lengths)} must be positive and sum to the {len(inputs_TD)} rows")
        return self.model(inputs_TD, position_ids_3T, doc_lengths, cache)

    def embed_frames(self, codes_GN: Tensor) -> Tensor:
        """What the Talker hears of frames: the sum of the embeddings of all their codes, int64 [G, N] -> [N, D]."""
        return self.model.codec_embedding(codes_GN[0]) + self.code_predictor.embed(codes_GN[1:])

    def residual_states(self, hidden_ND: Tensor, codes_GN: Tensor) -> Tensor:
        """Teacher forcing: what the code predictor's heads read, [N, G - 1, D].

        hidden [N, D] of the positions that predicted the frames; codes int64 [G, N].
        """
        return self.code_predictor(hidden_ND, self.model.codec_embedding(codes_GN[0]), codes_GN[1:])

    @torch.no_grad()
    def predict(self, hidden_ND: Tensor, codes0_N: Tensor, choose: Choose) -> Tensor:
        """Complete one frame for each of N documents: codes int64 [N, G].

        hidden [N, D] of the positions that predicted `codes0` int64 [N]; `choose(logits [N, V]) -> ids [N]`.
        """
        first_ND = self.model.codec_embedding(codes0_N)
        residual_NR = self.code_predictor.predict(hidden_ND, first_ND, choose)
        return torch.cat([codes0_N.unsqueeze(1), residual_NR], dim=1)
