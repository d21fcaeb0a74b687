"""A stretch of a decoder as a pipeline stage, with what comes before its first layer and after its last.

    Thinker   media --Encoders--> features -.
              ids --embedding--------------+--> layers | ... | layers --norm--> head --> share of the loss
    Talker    inputs of its front ------------> layers | ... | layers --norm--> head, code predictor --> the same

Megatron's schedules call a stage with a pack and send on what it returns: hidden states [T, 1, D], or on the last stage
this rank's share of the global loss. Layers in between see only hidden states and `packed_seq_params`.

Letters: T rows here, S of the context rank, D hidden, V visual rows here, K terms of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from models.config import TextConfig, ThinkerConfig
from models.layers.saving import Saving, keep_less
from models.talker import Talker
from models.thinker import Media, Thinker
from train.config import EngineConfig
from train.engines.megatron.block import BalancedRouter, GroupedExperts, block_spec, tap
from train.engines.megatron.layout import Peers
from train.engines.megatron.packs import TalkerPack, ThinkerPack
from train.engines.megatron.parts import Encoders, Head, embedding, made, residual_sums
from train.engines.megatron.preference import preference_sums
from train.media import by_media, kinds_of, media_of

Share = Callable[[Tensor], Tensor]  # sums of the terms [K] -> share of the global loss


class Stage(MegatronModule):
    """Layers of one decoder on this rank: chunk `chunk` of those that the rank has."""

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        text: TextConfig,
        config: TransformerConfig,
        engine: EngineConfig,
        layers: Sequence[int],
        peers: Peers,
        chunk: int,
        max_logits: int,
    ) -> None:
        """`layers` of each chunk of the model in pipeline order."""
        super().__init__(config=config)
        self.text, self.vp_stage = text, chunk if peers.chunks > 1 else None
        self.pre_process = peers.is_first and chunk == 0
        self.post_process = peers.is_last and chunk == peers.chunks - 1
        count = layers[chunk * peers.pp.size() + peers.pp.rank()]
        self.decoder = TransformerBlock(
            config,
            block_spec(config, count, engine.transformer_engine),
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=self.vp_stage,
        )
        for module in self.decoder.modules():
            if isinstance(module, GroupedExperts):
                module.recompute = engine.recompute
        self.head = Head(text.vocab_size, config, max_logits) if self.post_process else None

    def set_input_tensor(self, input_tensor: Any) -> None:
        """What the stage before sent; called by Megatron's schedules."""
        self.decoder.set_input_tensor(input_tensor[0])

    def routers(self) -> dict[int, BalancedRouter]:
        """Those here by their layer, counted from 0 over all stages."""
        return {layer.layer_number - 1: layer.mlp.router for layer in self.decoder.layers}  # type: ignore[union-attr]

    def run(self, x: Tensor | None, pack: ThinkerPack | TalkerPack, context: Tensor | None = None) -> Tensor:
        """The layers, and on the last stage the norm: [T, 1, D]."""
        tokens = pack.tokens
        out: Tensor = self.decoder(x, None, context=context, packed_seq_params=tokens, padding_mask=pack.cut.padding_1T)
        if self.post_process and tokens.tap == self.text.num_hidden_layers:
            return tap(out, tokens)  # the Talker reads what comes after the norm
        return out


class ThinkerStage(Stage):
    """Of the Thinker's decoder."""

    def __init__(self, thinker: ThinkerConfig, *args: Any) -> None:
        """As Stage, with the Thinker's sizes first."""
        super().__init__(thinker.text, *args)
        self.thinker = thinker
        self.encoders = self.embedding = None
        if self.pre_process:
            peers: Peers = args[3]
            with torch.device("meta"):
                whole = Thinker(thinker)
            keep_less(whole, Saving(layers=self.config.recompute_granularity == "full"))
            self.encoders = made(Encoders(whole, peers.tp_cp), self.config)
            self.embedding = embedding(thinker.text.vocab_size, self.config)

    def forward(self, pack: ThinkerPack, share: Share | None = None) -> Tensor:
        """Hidden states for the next stage; of the last, what the pack's purpose says."""
        x, context = self.inputs(pack) if self.pre_process else (None, None)
        x = self.run(x, pack, context)
        if self.head is None or pack.purpose == "tap":
            return x
        hidden_TD = x.squeeze(1)
        if pack.purpose == "last":
            ends = torch.tensor(pack.batch.doc_lengths, dtype=torch.int64, device=x.device).cumsum(0) - 1
            pack.found = pack.cut.gather(hidden_TD).index_select(0, ends)
            return x
        hidden_SD, labels_S = (
            pack.cut.gather_tensor(hidden_TD),
            pack.cut.pad(pack.batch.labels_T, -100)[pack.cut.rows_S],
        )
        if pack.purpose == "sums":
            pack.found = self.head.sums(hidden_SD, labels_S)
            return x
        if pack.purpose == "documents":
            lengths = torch.tensor(pack.cut.lengths(pack.batch.doc_lengths), device=x.device)
            documents_P = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
            count = len(pack.batch.doc_lengths)  # padding, a document of its own, has no targets
            pack.found = self.head.document_losses(hidden_SD, labels_S, documents_P[pack.cut.rows_S], count)
            return x
        assert share is not None
        losses_S = torch.zeros(len(labels_S), device=x.device)
        losses_K, first = self.head(hidden_SD, labels_S, losses_S).unsqueeze(0), pack.cut.peers.tp.rank() == 0
        pack.losses_K = losses_K.detach() * first
        media_P = media_of(kinds_of(self.thinker, pack.batch.token_ids_T), pack.batch.doc_lengths)
        pack.media = by_media(losses_S, labels_S, pack.cut.pad(media_P)[pack.cut.rows_S]) * first
        return share(losses_K)

    def inputs(self, pack: ThinkerPack) -> tuple[Tensor, Tensor | None]:
        """Embeddings with features in their rows [T, 1, D], and DeepStack's of the visual rows here [layers, V, D]."""
        assert self.encoders is not None and self.embedding is not None
        batch, cut, config = pack.batch, pack.cut, self.thinker
        ids_P = cut.pad(batch.token_ids_T)
        x = self.embedding(ids_P[cut.rows_S].unsqueeze(1))  # [S, 1, D]
        if pack.text_grad_XH is not None:  # the Talker reads plain embeddings of its text
            text_XH = self.embedding(pack.text_ids_X)
            x = MoEAuxLossAutoScaler.apply(x, (text_XH.float() * pack.text_grad_XH).sum())
        if self.config.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x)
        features = pack.features
        if features is None:
            media = Media(batch.mel_FM.to(x.dtype), batch.mel_lengths, batch.pixels_PX.to(x.dtype), batch.grids)
            features = self.encoders(media)
        if pack.purpose in ("last", "documents"):
            pack.features = features  # generation, and every choice, asks again with the same media
        context = None
        places, which = cut.places_here((ids_P == config.audio_token_id).nonzero().squeeze(1))
        x = x.index_copy(0, places, features.audio_TD.index_select(0, which).to(x.dtype).unsqueeze(1))
        if features.visual_VD is not None:
            visual_P = (ids_P == config.image_token_id) | (ids_P == config.video_token_id)
            places, which = cut.places_here(visual_P.nonzero().squeeze(1))
            x = x.index_copy(0, places, features.visual_VD.index_select(0, which).to(x.dtype).unsqueeze(1))
            pack.tokens.visual_rows = places
            if features.deepstack:
                context = torch.stack([each_VD.index_select(0, which) for each_VD in features.deepstack])
        # a pipeline sends gradients back through every stage, also where nothing before this learns
        return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_(), context


class TalkerStage(Stage):
    """Of the Talker's decoder; the last one asks the front's code predictor."""

    def forward(self, pack: TalkerPack, share: Share, front: Talker | None = None) -> Tensor:
        """Hidden states for the next stage, or the share of the loss."""
        hidden = self.run(pack.inputs_TD.unsqueeze(1) if self.pre_process else None, pack)
        if self.head is None:
            return hidden
        assert front is not None
        cut, plan = pack.cut, pack.plan
        if pack.pairs is not None:
            losses_K = preference_sums(self.head, front, hidden.squeeze(1), pack)
            pack.losses_K = losses_K.detach() * (cut.peers.tp_cp.rank() == 0)
            return share(losses_K)
        labels_S = cut.pad(plan.targets_P, -100)[cut.rows_S]
        first = self.head(cut.gather_tensor(hidden.squeeze(1)), labels_S)
        residual_R = residual_sums(front, hidden.squeeze(1), plan, cut, self.head.max_logits)
        first_here = first.detach() * (cut.peers.tp.rank() == 0)  # tensor ranks share it; the rest is each one's own
        pack.losses_K = torch.cat([first_here.unsqueeze(0), residual_R.detach()])
        return share(torch.cat([first.unsqueeze(0), residual_R]))
