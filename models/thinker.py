"""The Thinker: text, speech, images and video in, hidden states of the next text token out.

    mel ----audio_tower--> features -----------.
    pixels --visual--> features, DeepStack --. |
    token ids --embed_tokens--> [T, D] ------+-+ features in the placeholders' rows --> layers --> norm --> hidden
                                                 DeepStack added after the first --^       '--> router logits [T, E]

Documents are packed end to end without padding; attention stays within each. `lm_head` is a child that the loss
calls on pieces of the hidden states, so that full logits never exist. Children carry the released checkpoint's
names under `thinker.`; experts alone are fused (models/hf.py). Every parameter gets a gradient from every batch,
zero where the batch has no tokens, no audio or no pictures: ranks of a sharded engine must enter the same modules in
the same order.

Cost per token: models/flops.py. Letters: T tokens, D hidden, E experts, C head_dim, F mel frames, M mel bins,
P patches of pictures, X values of a patch, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.audio_encoder import AudioEncoder
from models.config import TextConfig, ThinkerConfig
from models.layers.attention import Across, make_segments
from models.layers.cache import KVCache
from models.layers.decoder import DecoderLayer
from models.layers.head import LMHead
from models.layers.norm import RMSNorm
from models.layers.rope import angles
from models.layers.saving import Saves
from models.vision_encoder import VisionEncoder

Grids = Sequence[tuple[int, int, int]]


class Media(NamedTuple):
    """Clips and pictures, end to end."""

    mel_FM: Tensor  # float32
    mel_lengths: Sequence[int]  # frames of each clip
    pixels_PX: Tensor | None  # float32, of images and videos alike
    grids: Grids  # frames, rows and columns of patches of each
    windows: Sequence[int] = ()  # mel frames of each clip's attention windows; without, the encoder's own


class Features(NamedTuple):
    """What the encoders make of Media, in the order of their placeholders."""

    audio_TD: Tensor
    visual_VD: Tensor | None  # None without a vision encoder
    deepstack: tuple[Tensor, ...]  # one [V, D] for each of the decoder's first layers


class Decoder(Saves):
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
        features: Sequence[tuple[Tensor, Tensor]],
        deepstack: tuple[Tensor, Sequence[Tensor]] | None,
        cache: KVCache | None,
        tap: int | None,
        stop: bool,
        across: Across | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Embed, put each (rows, features) of `features` in its rows, run the layers.

        `deepstack` is (rows, one tensor [V, D] for each of the first layers), added to what those layers give. Returns
        hidden [T, D], router logits per layer, and what layer `tap` gave, counted from 1, before that addition; with
        `stop` the layers after it do not run, and hidden is the same tensor.
        """
        x_TD = self.embed_tokens(token_ids_T)
        for rows, features_D in features:
            x_TD = x_TD.index_copy(0, rows, features_D.to(x_TD.dtype))
        config = self.config
        wave = config.rope_theta, config.mrope_section, config.rope_scaling
        turns = angles(position_ids_3T, config.head_dim, *wave)
        cos_TC, sin_TC = (turn_TC.to(x_TD.dtype) for turn_TC in turns)
        segments = replace(make_segments(doc_lengths, x_TD.device), across=across)
        router_logits, tapped_TD = [], None
        rows_V, added = deepstack or (None, ())
        for index, layer in enumerate(self.layers):
            run = partial(layer, cos_TC=cos_TC, sin_TC=sin_TC, segments=segments, cache=cache, layer=index)
            x_TD, logits_TE = self.saving.layer(run, x_TD)
            router_logits.append(logits_TE)
            if tap == index + 1 < len(self.layers):
                tapped_TD = x_TD
                if stop:
                    return x_TD, tuple(router_logits), x_TD
            if rows_V is not None and index < len(added):
                x_TD = x_TD.index_add(0, rows_V, added[index].to(x_TD.dtype))
        x_TD = self.norm(x_TD)
        return x_TD, tuple(router_logits), x_TD if tap == len(self.layers) else tapped_TD


class Thinker(nn.Module):
    """Encoders and mixture-of-experts decoder. Weights are unset until models.init.init_weights or a load."""

    def __init__(self, config: ThinkerConfig, recompute_experts: bool = False) -> None:
        """`recompute_experts` keeps no activations of the experts for backward (a quarter more GEMM work there)."""
        super().__init__()
        self.config = config
        self.audio_tower = AudioEncoder(config.audio)
        if config.vision is not None:
            self.visual = VisionEncoder(config.vision)
        self.model = Decoder(config.text, recompute_experts)
        self.lm_head = LMHead(config.text.hidden_size, config.text.vocab_size)

    def encode(self, media: Media) -> Features:
        """Run the encoders alone. No clips and no pictures are fine: features are empty, gradients zero.

        Raises ValueError for pictures that this model cannot see.
        """
        audio_TD = self.audio_tower(media.mel_FM, media.mel_lengths, media.windows)
        if self.config.vision is None:
            if media.grids:
                raise ValueError(f"{len(media.grids)} images or videos, but this model has no vision encoder")
            return Features(audio_TD, None, ())
        pixels_PX = media.pixels_PX
        if pixels_PX is None or not len(pixels_PX):
            pixels_PX = media.mel_FM.new_empty(0, self.config.vision.patch_dim)
        return Features(audio_TD, *self.visual(pixels_PX, media.grids))

    def forward(
        self,
        token_ids_T: Tensor,
        position_ids_3T: Tensor,
        doc_lengths: Sequence[int],
        mel_FM: Tensor,
        mel_lengths: Sequence[int],
        cache: KVCache | None = None,
        *,
        pixels_PX: Tensor | None = None,
        grids: Grids = (),
        features: Features | None = None,
        tap: int | None = None,
        stop: bool = False,
        across: Across | None = None,
    ) -> tuple[Any, ...]:
        """One pack of documents -> hidden states after the final norm [T, D], router logits float32 [T, E] per layer.

        token_ids int64 [T]; position_ids float32 [3, T]; doc_lengths sum to T; mel float32 [F, M], clips in the order
        of their runs of placeholders, mel_lengths frames each; pixels float32 [P, X] of images and videos alike in the
        order of their placeholders, grids (frames, rows, columns) of patches each. T = 0, no clips and no pictures are
        all fine. With a filled `cache` the T tokens are one more for each of its documents. `features` are what
        `encode` made of the same media; without them it runs here.

        With `across`, ranks that hold the pack together, all but doc_lengths is of the tokens here, `features` too.
        With `tap`, a number of layers, a third result: the hidden states [T, D] that transformers counts as
        hidden_states[tap], which the Talker reads; with `stop` nothing after them is computed, and the first result
        is of no use. Raises ValueError where counts disagree.
        """
        tokens = len(token_ids_T) * (across.size if across is not None else 1)
        if sum(doc_lengths) != tokens or min(doc_lengths, default=1) < 1:
            raise ValueError(f"doc_lengths {list(doc_lengths)} must be positive and sum to the {tokens} tokens")
        if tap is not None and not 1 <= tap <= len(self.model.layers):
            raise ValueError(f"tap ({tap}) must be from 1 to the decoder's {len(self.model.layers)} layers")
        found = features or self.encode(Media(mel_FM, mel_lengths, pixels_PX, grids))
        rows_A = (token_ids_T == self.config.audio_token_id).nonzero().squeeze(1)
        _agree("audio", len(rows_A), len(found.audio_TD), f"{len(mel_lengths)} clips")
        placed, deepstack = [(rows_A, found.audio_TD)], None
        if found.visual_VD is not None:
            image_T, video_T = token_ids_T == self.config.image_token_id, token_ids_T == self.config.video_token_id
            rows_V = (image_T | video_T).nonzero().squeeze(1)
            _agree("visual", len(rows_V), len(found.visual_VD), f"{len(grids)} images and videos")
            placed.append((rows_V, found.visual_VD))
            deepstack = rows_V, found.deepstack
        hidden_TD, router_logits, tapped_TD = self.model(
            token_ids_T, position_ids_3T, doc_lengths, placed, deepstack, cache, tap, stop, across
        )
        return (hidden_TD, router_logits) if tapped_TD is None else (hidden_TD, router_logits, tapped_TD)


def _agree(kind: str, places: int, tokens: int, source: str) -> None:
    if places != tokens:
        raise ValueError(
            f"{places} {kind} placeholders in the tokens, but {tokens} {kind} tokens from {source}; they must be equal"
        )
